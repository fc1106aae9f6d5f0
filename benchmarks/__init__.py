"""Measurements: ``python -m benchmarks.NAME --json [--quick] [--data DIR]``."""
