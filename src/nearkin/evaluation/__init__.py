"""The evaluation room: predictions, metrics, statistics."""
