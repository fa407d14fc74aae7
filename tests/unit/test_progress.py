"""Progress bars on terminals of several widths."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from secateur import progress

NAME = "train wanda-0.5/S_{P+R}-seed-1"
NOTE = "loss 3.456  rate 0.0012  norm 0.56  12,345 tokens/s  MFU 34%"


def last_lines(width: int, monkeypatch: pytest.MonkeyPatch, name: str = NAME) -> list[str]:
    """The lines of two running tasks, at an hour of work that is left."""
    seconds = iter(range(0, 10**6, 10))
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, soft_wrap=True, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    bars = progress.BarListener()
    bars.progress.get_time = lambda: float(next(seconds))
    try:
        for done in range(12):
            bars.update(name, done, 400, NOTE)
            bars.update("whole study", done, 400, "3 of 159 stages")
        bars.progress.refresh()
        text = output.getvalue()
    finally:
        for key in (name, "whole study"):
            bars.finish(key)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    return [line for line in lines if line][-2:]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_bar_has_its_eta_at_every_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for line, start in zip(last_lines(width, monkeypatch), ("train wa", "whole st"), strict=True):
        assert line.startswith(start) and len(line) <= width
        assert re.search(r" \d+% +\d+:\d\d:\d\d ETA \d+:\d\d", line), line


def test_a_wide_terminal_shows_names_and_notes_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    line = last_lines(200, monkeypatch)[0]
    assert line.startswith(NAME) and line.rstrip().endswith(NOTE)


def test_brackets_in_a_name_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_lines(120, monkeypatch, "text [red] of [/tmp]")[0].startswith("text [red] of [/tmp]")
