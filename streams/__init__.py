"""Streaming side of crossrep: brokers, replay and feature computation over event streams."""
