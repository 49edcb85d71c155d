"""Two small real networks, trained with a `SpectralProbe` each: `lightning-spectral demo`."""
