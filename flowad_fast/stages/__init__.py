"""What is computed, one stage per file: frame to features, velocity, map, score and verdict."""
