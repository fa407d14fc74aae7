"""The command line: verbs that explain themselves, one line and exit code 2 on bad input, ``--json`` everywhere."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence

from secateur import manual, ranks
from secateur.arguments import parser
from secateur.errors import RunError, UserError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        with ranks.together():
            arguments = parser().parse_args(argv)
            if ranks.world() > 1 and arguments.verb not in ("prune", "train", "eval"):
                raise UserError(
                    f"{arguments.verb}: runs in one process; of all verbs only prune, train and eval take several"
                )
            # Imported late: --help must not wait for torch.
            from secateur import verbs

            action = f"study_{arguments.action}" if arguments.verb == "study" else arguments.verb
            answer, text, code = getattr(verbs, action.replace("eval", "evaluate"))(arguments)
            print(json.dumps(answer, ensure_ascii=False) if arguments.json else text, flush=True)
            return code
    except UserError as error:
        return ranks.end(2, f"secateur: error: {error}")
    except RunError as error:
        return ranks.end(error.code, f"secateur: error: {error}")
    except ranks.Lost as lost:
        return ranks.end(1, f"secateur: error: {lost}")
    except BrokenPipeError:
        # The reader of our output, e.g. head, has enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return ranks.end(130, "\nsecateur: interrupted; run the same command again to go on")
    except Exception as error:
        if _out_of_memory(error):
            offer = manual.memory(argv or sys.argv[1:])
            return ranks.end(1, f"secateur: error: out of memory; {offer} ({_first_line(error)})")
        if _disk_full(error):
            return ranks.end(
                1, f"secateur: error: the disk is full; make room, then run the same again ({_first_line(error)})"
            )
        if ranks.world() == 1:
            raise
        return ranks.end(1, traceback.format_exc())


def _out_of_memory(error: Exception) -> bool:
    """Whether the system or a GPU had no more memory to give; torch has a type of its own for the latter alone."""
    told = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error) for t in told))


def _disk_full(error: Exception) -> bool:
    """Whether a file could not be written to its end; numpy raises an error without a number then."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, OSError) and (error.errno in full or "requested and" in str(error))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
