"""Rows, their algebra, and how they are encoded as frames and records: all in columns, numpy and numba alone."""
