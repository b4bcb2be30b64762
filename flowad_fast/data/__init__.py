"""Data sets as lists of samples, and image files as frames."""
