"""The paper's questions answered with this package: arXiv 2606.02596."""
