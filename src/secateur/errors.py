"""Errors that users see as one line without a traceback: bad input (exit code 2), and runs that end early."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Container, Iterable

__all__ = [
    "REQUEUE",
    "DivergenceError",
    "RunError",
    "UserError",
    "did_you_mean",
    "disk_full",
    "first_line",
    "nearest",
    "out_of_memory",
    "reason",
    "refuse_unknown",
    "spell",
]


REQUEUE = 75  #: exit code (EX_TEMPFAIL) of a run that a signal stopped after it saved; the same command resumes it

_MOST_LISTED, _MOST_NAMED = 16, 3  # options that an error lists in full, and that it names of more than those

#: words of other tools -> the names here that they may stand for, of which the first that is an option counts
_SYNONYMS = {
    **dict.fromkeys(("lr", "learning-rate", "max-lr", "peak-lr", "rate"), "peak-rate"),
    **dict.fromkeys(("min-lr", "min-lr-ratio", "final-lr"), "final-share"),
    **dict.fromkeys(("lr-scheduler", "lr-scheduler-type", "lr-schedule", "scheduler"), "schedule"),
    **dict.fromkeys(("warmup-ratio", "warmup-steps", "warmup-share"), "warmup"),
    **dict.fromkeys(("bs", "batch-size", "global-batch-size", "batch"), "tokens-per-step batch micro-batch"),
    **dict.fromkeys(("per-device-train-batch-size", "micro-batch-size"), "micro-batch batch"),
    **dict.fromkeys(
        (
            *("seq-len", "seqlen", "seq-length", "sequence-length", "block-size", "context-length"),
            *("max-seq-len", "max-seq-length", "max-length", "model-max-length"),
        ),
        "sequence seqlen context",
    ),
    **dict.fromkeys(("epochs", "num-train-epochs", "max-steps", "num-steps", "train-iters"), "tokens tokens-per-step"),
    **dict.fromkeys(("gradient-accumulation-steps", "grad-accum", "accumulation"), "tokens-per-step"),
    **dict.fromkeys(("wd", "l2"), "weight-decay"),
    **dict.fromkeys(("grad-clip", "clip-grad", "max-grad-norm", "gradient-clipping"), "clip"),
    **dict.fromkeys(("eps", "adam-epsilon"), "epsilon"),
    "adam-beta1": "beta1",
    "adam-beta2": "beta2",
    **dict.fromkeys(("gradient-checkpointing", "activation-checkpointing"), "recompute"),
    **dict.fromkeys(("save-steps", "save-interval"), "save-every"),
    "resume-from-checkpoint": "resume",
    **dict.fromkeys(("sparsity", "sparsity-ratio", "pruning-ratio", "prune-ratio", "amount"), "ratio ratios"),
    **dict.fromkeys(("sparsity-type", "nm"), "pattern"),
    **dict.fromkeys(("prune-method", "pruning-method", "pruner-type", "algorithm"), "method methods"),
    **dict.fromkeys(
        ("samples", "nsamples", "n-samples", "num-samples", "num-calibration-samples", "num-examples"), "windows"
    ),
    **dict.fromkeys(("dataset", "calibration-data", "calib-data"), "calibration data source"),
    **dict.fromkeys(("output", "output-dir", "output-path", "save", "save-dir", "save-path", "save-model", "o"), "out"),
    **dict.fromkeys(
        ("model-path", "model-name-or-path", "base-model", "pretrained", "checkpoint"), "model models init"
    ),
    **dict.fromkeys(("num-fewshot", "shots"), "few-shot"),
    **dict.fromkeys(("task", "tasks"), "suite"),
    **dict.fromkeys(("num-workers", "processes", "num-proc"), "workers jobs"),
    **dict.fromkeys(("precision", "torch-dtype"), "dtype"),
    **dict.fromkeys(("gpu", "cuda"), "device"),
    "limit": "task-limit documents",
    "train-tokens": "tokens",
}
_FIELD = re.compile(r"`([a-z_]+)`")


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and what to do.

    The message names fields of a request in backticks, as in "`ratio` must be between 0 and 1, got 1.5". Each face
    spells them its own way (:func:`spell`): the command line as ``--ratio``, a study file as ``ratio:``.

    Attributes:
        field: the field at fault; None if the fault is in a file or a model. By default the field in backticks that
            the message begins with.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        leading = _FIELD.match(message)
        self.field = field or (leading[1] if leading else None)


class RunError(Exception):
    """A run that failed or was stopped although its input is valid. Its finished work is kept. The message is one line.

    Attributes:
        code: the exit code: 1 for a failure; 75 (``EX_TEMPFAIL``) if a signal stopped the run and the same command
            resumes it; 2 if the input may be at fault after all.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class DivergenceError(RunError):
    """A training run whose loss or gradient is no longer finite."""


def spell(message: str, spelling: Callable[[str], str | None]) -> str:
    """Replace each field that a message names in backticks by ``spelling(field)``, unless that is None."""
    return _FIELD.sub(lambda match: spelling(match[1]) or match[0], message)


def nearest(name: object, options: Iterable[str]) -> str | None:
    """The option that ``name`` most likely stands for: by the words of other tools, or by its spelling."""
    by_key, key = {_normalise(option): option for option in options}, _normalise(name)
    near = _synonym(key, by_key) or next(iter(difflib.get_close_matches(key, by_key, n=1, cutoff=0.5)), None)
    return None if near is None else by_key[near]


def _synonym(key: str, options: Container[str]) -> str | None:
    """The option that ``key`` is, or the first that it stands for as a word of other tools, with the same dashes."""
    word = key.lstrip("-")
    names = [key, *(key[: len(key) - len(word)] + name for name in _SYNONYMS.get(word, "").split())]
    return next((name for name in names if name in options), None)


def did_you_mean(name: object, options: Iterable[str], listing: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the option nearest to ``name``, or the options if they are few.

    Of many options it names one that is very near, or else up to three: those that contain ``name`` first, then the
    nearest. Upper and lower case count as equal, and so do ``_`` and ``-``.

    Args:
        listing: the command that lists all options, where they may be many.
    """
    options, key = sorted(options), _normalise(name)
    by_key = {_normalise(option): option for option in options}
    many = len(options) > _MOST_LISTED
    if synonym := _synonym(key, by_key):
        return f"; did you mean {by_key[synonym]!r}?"
    inside = sorted((option for option in by_key if key in option), key=len) if many and key else []
    clear = [] if inside else difflib.get_close_matches(key, by_key, n=1, cutoff=0.8)  # a typing error
    near = clear or [*inside, *difflib.get_close_matches(key, by_key, n=_MOST_NAMED if many else 1, cutoff=0.5)]
    names = [repr(by_key[option]) for option in dict.fromkeys(near)][:_MOST_NAMED]
    if names:
        return f"; did you mean {' or '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)}?"
    if not many:
        return f"; known: {', '.join(options)}" if options else ""
    names = [by_key[option] for option in difflib.get_close_matches(key, by_key, n=_MOST_NAMED, cutoff=0.0)]
    return f"; the nearest of {len(options)}: {', '.join(names)}" + (f" ({listing} lists all)" if listing else "")


def refuse_unknown(fields: Iterable[str], options: Iterable[str]) -> None:
    """Check that every field is one of the options.

    Raises:
        UserError: for the first that is not, with the nearest option.
    """
    options = list(options)
    for name in fields:
        if name not in options:
            raise UserError(f"`{name}`: no such field{did_you_mean(name, options)}")


def _normalise(name: object) -> str:
    return str(name).lower().replace("_", "-")


def out_of_memory(error: BaseException) -> bool:
    """Whether the system or a GPU ran out of memory. Torch has an error type for GPUs and none for the host."""
    phrases = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(p in str(error) for p in phrases))


def disk_full(error: BaseException) -> bool:
    """Whether a file could not be written because the disk is full; numpy's error for this has no number."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and (error.errno in numbers or "requested and" in str(error))


def reason(error: BaseException) -> str:
    """Why a file cannot be read, without the number and the path of the system's message: ``is a directory``."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return text[:1].lower() + text[1:] if isinstance(error, OSError) else text


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
