"""Reports of a run, written to its folder and read back from it."""
