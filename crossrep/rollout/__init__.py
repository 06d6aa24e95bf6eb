"""A new space beside the one in use: filled by a replay or from a snapshot, compared, handed over to, promoted."""
