"""What one training step does, as pure functions."""
