"""Formatting of numbers for the page and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

__all__ = [
    "MINUS",
    "NOT_MEASURED",
    "TIMES",
    "byte_size",
    "count",
    "decimals",
    "duration",
    "every",
    "fixed",
    "join_words",
    "loss",
    "number",
    "percent",
    "plain",
    "plural",
    "points",
    "probability",
    "scientific",
    "signed",
    "spelled",
    "symbols",
]

NOT_MEASURED = "not measured"  #: text for a missing value; never 0, never an empty cell

MINUS, TIMES, _NBSP = "\u2212", "\u00d7", "\u00a0"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_SYMBOL = re.compile(r"S_\{(P\+[RF])\}|S_([RF])\b")
_SPELLED = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def count(value: float) -> str:
    """Three significant digits and a unit: 700000 -> ``"700 k"``, 1712345 -> ``"1.71 M"``."""
    if value < 1000:
        return f"{value:g}"
    value = float(f"{value:.3g}")  # round first: 999,999 is 1 M, not 1000 k
    power = min(int(math.log10(value) + 1e-9) // 3, 4)
    return f"{value / 1000**power:.4g}{_NBSP}{' kMBT'[power]}"


def scientific(value: float) -> str:
    """FLOPs: 1.234e13 -> ``"1.23 × 10¹³"``."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}{_NBSP}{TIMES}{_NBSP}10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def loss(value: float | None, digits: int = 3) -> str:
    """A loss in nats per token; None becomes "not measured"."""
    return NOT_MEASURED if value is None else number(value, digits)


def number(value: float, digits: int) -> str:
    """A fixed-point number with a Unicode minus sign; zero has no sign. From 10⁹ on, with a power of ten."""
    if 1e9 <= abs(value) < math.inf:
        return scientific(value).replace("-", MINUS)
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def fixed(value: float, digits: int = 4) -> str:
    """Fixed-point in ASCII; from a million on, three digits and a power of ten: 2.7e+43 has 44 digits otherwise."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign."""
    if 1e9 <= abs(value) < math.inf:
        return f"{'+' if value > 0 else ''}{number(value, digits)}"
    return f"{value:+.{digits}f}".replace("-", MINUS)


def points(value: float) -> str:
    """A difference of shares in percentage points: -0.0335 -> ``"−3.35"``."""
    return signed(round(100 * value, 2) + 0.0, 2)


def probability(value: float) -> str:
    """A p-value: 0.0312 -> ``"0.031"``, 0.0002 -> ``"< 0.001"``."""
    return "< 0.001" if value < 0.001 else number(value, 3)


def decimals(*values: float) -> int:
    """The decimals, 2 to 5, with which no value that differs from zero is shown as zero."""
    return next((d for d in range(2, 5) if all(abs(v) < 1e-9 or round(v, d) != 0 for v in values)), 5)


def percent(value: float | None) -> str:
    """0.4353 -> ``"43.5%"``."""
    return NOT_MEASURED if value is None else f"{100 * value:.1f}%"


def duration(seconds: float | None) -> str:
    """Time in a unit that reads: 0.0137 -> ``"0.014 s"``, 3723 -> ``"1 h 02 min"``, 9e8 -> ``"250,000 h"``."""
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.2g}{_NBSP}s" if seconds < 1 else f"{seconds:.1f}{_NBSP}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}{_NBSP}min"
    if minutes >= 100 * 60:
        return f"{round(minutes / 60):,}{_NBSP}h"
    return f"{minutes // 60}{_NBSP}h{_NBSP}{minutes % 60:02d}{_NBSP}min"


def join_words(items: Sequence[str]) -> str:
    """``["a", "b", "c"]`` -> ``"a, b and c"``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def plural(number: float, noun: str, several: str | None = None) -> str:
    """A count with its noun: ``"1 step"``, ``"1,200 steps"``; ``several`` is a plural that takes more than an s."""
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"


def every(number: int, noun: str) -> str:
    """All of a number of things: ``"the one run"``, ``"both runs"``, ``"all 3 runs"``."""
    return f"the one {noun}" if number == 1 else f"both {noun}s" if number == 2 else f"all {plural(number, noun)}"


def spelled(value: int) -> str:
    """Small whole numbers as words."""
    return _SPELLED[value] if 0 <= value < len(_SPELLED) else str(value)


def symbols(text: str, form: str) -> str:
    """Rewrite the names of from-scratch runs in ``text``: with ``form="S({})"``, ``S_{P+R}`` -> ``S(P+R)``."""
    return _SYMBOL.sub(lambda match: form.format(match[1] or match[2]), text)


def plain(value: Any) -> str:
    """Any setting as one line of text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return "; ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return str(value)


def byte_size(count: float) -> str:
    """Bytes with a unit: ``3.4 GB``."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
