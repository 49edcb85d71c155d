"""Measuring weights that lie in shards over ranks; imported only where there are shards."""
