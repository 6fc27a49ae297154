"""Pallas GPU kernels; imports nothing from memjax."""
