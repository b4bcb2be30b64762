"""Writing artefacts: checkpoint to bundle."""
