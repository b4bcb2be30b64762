"""Judging: folders of photos, data sets with labels, and the drift of a precision."""
