"""Checkpoints: what they hold, how they are stored, when they are saved."""
