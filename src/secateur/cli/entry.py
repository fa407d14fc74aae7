"""The command line: verbs that explain themselves, one line and exit code 2 on bad input, ``--json`` everywhere."""

from __future__ import annotations

import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence

from secateur import distributed
from secateur.cli import manual
from secateur.cli.arguments import parser
from secateur.errors import RunError, UserError, disk_full, first_line, out_of_memory, spell
from secateur.formatting import join_words
from secateur.progress import set_spelling

__all__ = ["main"]

_PARALLEL = ("prune", "teach", "train", "eval")  #: verbs that take several processes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments: Namespace | None = None
    try:
        with distributed.process_group():
            arguments = parser().parse_args(argv)
            set_spelling(arguments.spelling)
            several = (
                arguments.verb in ("prune", "teach", "train", "eval") or getattr(arguments, "action", "") == "stage"
            )
            if distributed.world_size() > 1 and not several:
                raise UserError(
                    f"{arguments.verb}: runs in one process; of all verbs only {join_words(_PARALLEL)} take several"
                )
            # Imported late: --help must not wait for torch.
            from secateur.cli.verbs import function_of

            answer, text, code = function_of(arguments)(arguments)
            print(json.dumps(answer, ensure_ascii=False) if arguments.json else text, flush=True)
            return code
    except UserError as error:
        message = spell(str(error), arguments.spelling) if arguments else str(error)
        return distributed.exit_all(2, f"secateur: error: {message}")
    except RunError as error:
        message = spell(str(error), arguments.spelling) if arguments else str(error)
        return distributed.exit_all(error.code, f"secateur: error: {message}")
    except distributed.ProcessLost as lost:
        return distributed.exit_all(1, f"secateur: error: {lost}")
    except BrokenPipeError:
        # The reader of our output, e.g. head, has enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        resume = " with --resume" if arguments and arguments.verb == "prune" else ""
        return distributed.exit_all(130, f"\nsecateur: interrupted; run the same command again{resume} to go on")
    except Exception as error:
        if fault := _machine_fault(error, argv or sys.argv[1:]):
            return distributed.exit_all(fault[0], f"secateur: error: {fault[1]}")
        if distributed.world_size() == 1:
            raise
        return distributed.exit_all(1, traceback.format_exc())


def _machine_fault(error: Exception, argv: Sequence[str]) -> tuple[int, str] | None:
    """The exit code and message of an error of the machine that a user can mend; None for any other error."""
    if out_of_memory(error):
        return 1, f"out of memory; {manual.memory_hint(argv)} ({first_line(error)})"
    if disk_full(error):
        return 1, f"the disk is full; make room, then run the same again ({first_line(error)})"
    if isinstance(error, PermissionError) and error.filename is not None:
        return 2, f"{error.filename}: permission denied; change its permissions, or name another path"
    return None


if __name__ == "__main__":
    sys.exit(main())
