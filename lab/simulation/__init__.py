"""Simulated engines under the daemon's own code, and under rival policies."""
