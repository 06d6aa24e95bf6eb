"""What operators do to a space: examine it, take it back to an earlier time, erase a key, retire it."""
