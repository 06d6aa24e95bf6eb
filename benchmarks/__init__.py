"""What the system can do, each figure beside its limit in the same run: python -m benchmarks.fold, .restore, .end_to_end (--help)."""
