"""Measuring what a checkpoint is worth."""
