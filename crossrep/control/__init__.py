"""What the cluster says of a space: its spec and aliases, which model writes to it, how far its workers are, what their frames are made of,
and who reads it."""
