"""Makes `examples.ablation` importable from the root of the repository."""
