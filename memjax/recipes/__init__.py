"""Data, the training step, evaluation, checkpoints, reports and the `memjax` command."""
