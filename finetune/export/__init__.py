"""What leaves a run: merged models."""
