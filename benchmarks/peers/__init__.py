"""Other engines doing the work of the fold, for comparison: python -m benchmarks.peers --help. From code: engines.run."""
