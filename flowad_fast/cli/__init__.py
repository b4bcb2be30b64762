"""Command-line front ends; each is a thin layer over a library call."""
