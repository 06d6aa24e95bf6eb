"""What the cluster says of a space: its spec, which model writes to it, how far its workers are, and who reads it."""
