"""Thin collectives over the ranks of a process group, and what of a model is in shards."""
