"""What outlives a process, in a local folder or on an object store: folders that are published whole, records as Parquet."""
