"""What trained models arrive as."""
