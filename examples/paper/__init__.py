"""The reproduction of arXiv 2606.02596: its data sets, networks and runs."""
