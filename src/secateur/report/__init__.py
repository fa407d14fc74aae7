"""From records to one self-contained page."""
