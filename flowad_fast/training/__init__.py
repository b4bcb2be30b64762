"""Training a velocity field on good parts."""
