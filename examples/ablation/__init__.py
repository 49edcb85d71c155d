"""Optimizers side by side on two small tasks: `make ablation`."""
