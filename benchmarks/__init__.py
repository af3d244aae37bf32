"""Measurements: ``python -m benchmarks NAME``. Each prints a table that names hardware, sizes and seeds."""
