"""Data: from files, tables and known names to batches of pixels."""
