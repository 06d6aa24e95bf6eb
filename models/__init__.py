"""Upstream models, their features and their training."""
