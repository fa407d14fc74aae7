"""The arguments of every verb: what ``--help`` shows, and checks before anything is read."""

from __future__ import annotations

from secateur.cli import manual
from secateur.cli.arguments.common import Formatter, Parser
from secateur.cli.arguments.completion import add_completion
from secateur.cli.arguments.models import (
    add_compare,
    add_data,
    add_evaluate,
    add_inspect,
    add_mask,
    add_prune,
    add_search,
    add_shapes,
    add_teach,
    add_train,
)
from secateur.cli.arguments.studies import add_demo, add_recommend, add_study
from secateur.version import __version__

__all__ = ["parser"]

_VERBS = (
    add_demo,
    add_inspect,
    add_shapes,
    add_data,
    add_prune,
    add_search,
    add_teach,
    add_train,
    add_mask,
    add_evaluate,
    add_compare,
    add_study,
    add_recommend,
    add_completion,
)


def parser() -> Parser:
    """The parser of the command line."""
    outermost = Parser(
        prog="secateur",
        description="Prune a large language model, or train a small one from scratch? secateur measures, and says.",
        epilog=manual.EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    outermost.add_argument("--version", action="version", version=f"secateur {__version__}")
    verbs = outermost.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for add in _VERBS:
        add(verbs)
    return outermost
