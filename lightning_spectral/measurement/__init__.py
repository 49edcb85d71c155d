"""The pipeline from a model and batches to a `SpectralReport`."""
