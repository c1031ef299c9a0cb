"""Trained models for other programs, each checked against nearkin's own numbers."""
