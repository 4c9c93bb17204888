"""`smartspec demo`: one load on a real model, with and without steering (see run.py)."""
