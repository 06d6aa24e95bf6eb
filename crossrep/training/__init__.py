"""Labelled samples with what was known before them: as files, as a topic, and the check that neither knows the future."""
