"""What a measurement would do and cost, without doing it."""

from lightning_spectral.plan.planner import Plan, plan_spectra

__all__ = ["Plan", "plan_spectra"]
