"""Measuring: cases, the processes that run them in turn, and the gate that a row must pass."""
