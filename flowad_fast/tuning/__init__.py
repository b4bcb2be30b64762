"""Choosing what to compute by evidence: recipes, synthetic defects, the measurement, its page (`flowad-tune`)."""
