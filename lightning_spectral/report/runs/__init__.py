"""The reports of a run, read back from its folder."""
