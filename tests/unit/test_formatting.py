"""Counts and times as a reader expects them, and no count in the product that says "1 steps"."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from secateur.formatting import MINUS, TIMES, duration, every, fixed, number, plural, signed

SOURCES = Path(__file__).parents[2] / "src" / "secateur"

#: a whole count in an f-string before a plural noun, as in ``{len(stages)} stages``
COUNT = re.compile(
    r"\{(len\([\w.]+\)|\w*count\w*|[\w.\[\]'\"]+:,)\} (\w+ )?"
    r"(stages|steps|tokens|documents|windows|seeds|runs|comparisons|sweeps|trials|tasks|items|layers|jobs|processes)\b"
)


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (1, ("step",), "1 step"),
        (0, ("step",), "0 steps"),
        (1200, ("step",), "1,200 steps"),
        (1, ("choice of a rate", "choices of a rate"), "1 choice of a rate"),
        (2, ("process", "processes"), "2 processes"),
    ],
)
def test_a_count_agrees_with_its_noun(number: int, words: tuple[str, ...], text: str) -> None:
    assert plural(number, *words) == text


def test_all_of_one_thing_is_that_thing() -> None:
    assert [every(number, "comparison") for number in (1, 2, 3)] == [
        "the one comparison",
        "both comparisons",
        "all 3 comparisons",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.013716, "0.014 s"), (2.5, "2.5 s"), (90, "2 min"), (3723, "1 h 02 min"), (9e8, "250,000 h"), (None, "unknown")],
)
def test_times_have_a_unit_that_reads(seconds: float | None, text: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == text


def test_no_message_gives_one_thing_a_plural() -> None:
    """Every count that may be one goes through ``plural``."""
    lines = [
        f"{path.relative_to(SOURCES)}:{number}: {line.strip()}"
        for path in sorted(SOURCES.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if COUNT.search(line) and "> 1" not in line
    ]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.5000"), (123456.0, "123456.0000"), (math.exp(100), "2.69e+43"), (math.nan, "nan"), (math.inf, "inf")],
)
def test_fixed_has_few_digits(value: float, text: str) -> None:
    assert fixed(value) == text


def test_numbers_of_the_page_have_few_digits() -> None:
    assert number(1234.5678, 3) == "1234.568"
    assert number(-math.exp(100), 3) == f"{MINUS}2.69\u00a0{TIMES}\u00a010⁴³"
    assert signed(1e30) == f"+1.00\u00a0{TIMES}\u00a010³⁰"
    assert signed(-1e30) == f"{MINUS}1.00\u00a0{TIMES}\u00a010³⁰"
    assert (number(math.inf, 1), signed(-0.5)) == ("inf", f"{MINUS}0.500")
