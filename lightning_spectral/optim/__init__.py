"""Spectral Newton: the optimizer, its matrix function and what they are made of."""
