"""Runs that are more than a table of cases: the ladder, drift, other methods, the check of a GPU."""
