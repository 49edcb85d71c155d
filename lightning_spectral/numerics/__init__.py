"""Pure functions of tensors: fits, spectra, moments. They know no model."""
