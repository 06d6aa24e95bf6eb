"""The state of a space as Parquet, exact at recorded offsets, and what analysts ask: SQL, drift, the history of a key."""
