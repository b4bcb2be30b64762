"""Measuring: the benchmark harness behind `flowad-bench`, the demo, and committed results."""
