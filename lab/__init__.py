"""Experiments as a product feature; for now, the demonstration."""
