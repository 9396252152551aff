"""Measured latency: so far, of torch on this machine."""
