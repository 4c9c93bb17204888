"""An engine in virtual time: continuous batching with costs of real GPUs, and no model.

Everything but the model is as in an engine that serves: the link, the messages, the lengths.
"""
