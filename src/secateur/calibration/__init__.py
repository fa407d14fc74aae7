"""Calibration: windows of text through the decoder, one block in memory at a time."""
