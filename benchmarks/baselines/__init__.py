"""What memjax is compared with; nothing here imports memjax."""
