"""From text to exact slices of tokens."""
