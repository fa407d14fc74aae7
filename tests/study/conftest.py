"""A text in which there is something to learn."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

WORDS = [f"{a}{b}" for a in ("ba", "de", "fi", "go", "lu", "mo") for b in ("n", "rk", "st", "ll", "m")]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for number in range(60):
        # Each word decides much of the next, so that there is something to learn.
        word, words = 0, []
        for _ in range(500):
            word = (word * 7 + draw.choice((1, 1, 1, 2, 3))) % len(WORDS)
            words.append(WORDS[word])
        (folder / f"{number:03}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder
