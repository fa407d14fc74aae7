"""The command line: arguments become a request, the API does the work, a verb prints the answer."""

from secateur.cli.entry import main

__all__ = ["main"]
