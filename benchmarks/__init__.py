"""Measured speed and bytes: one suite per room, one process per case."""
