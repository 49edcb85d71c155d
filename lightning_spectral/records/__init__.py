"""Frozen results of a measurement, their JSON, and the keys they are logged by."""
