"""Data sets sent as events, how soon readers see them, and the demo of everything with its proof."""
