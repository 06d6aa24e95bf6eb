"""Upstream models, their features and their training. Only `models/` and the inference pool know torch."""
