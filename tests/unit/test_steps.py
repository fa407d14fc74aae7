"""Budgets of few optimizer steps are warned of before a run; the documented commands have enough of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import tiny_llama, token_corpus
from secateur.cli import main, manual
from secateur.config import parse_count
from secateur.training.recipe import FEW_STEPS, Recipe, few_steps
from secateur.training.request import read_recipe

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
PAGES |= {name: getattr(manual, name) for name in ("EPILOG", "TRAIN_EPILOG")}


@pytest.mark.parametrize(
    ("tokens", "size", "sequence", "answer"),
    [
        (50_000_000, 4_194_304, 8192, (12, 245_760, 204)),
        (50_000_000, 1_000_000, 500, None),
        (49_000_000, 1_000_000, 500, (49, 245_000, 200)),
        (1000, 512, 64, (2, 64, 16)),
        (60, 512, 64, (1, 64, 1)),
    ],
)
def test_the_size_of_a_step_that_gives_200(
    tokens: int, size: int, sequence: int, answer: tuple[int, int, int] | None
) -> None:
    assert few_steps(tokens, size, sequence) == answer


@pytest.mark.parametrize(("size", "advice"), [(256, "tokens_per_step=16 would give 250"), (64, None)])
def test_train_warns_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, advice: str | None
) -> None:
    model = tiny_llama(tmp_path, num_hidden_layers=1)
    corpus = token_corpus(tmp_path / "corpus", tokens=5000, vocabulary=61)
    arguments = ["train", str(tmp_path / "out"), "--init", str(model), "--tokens", "4000", "--data", f"shards:{corpus}"]
    assert main([*arguments, "--set", "sequence=16", "--set", f"tokens_per_step={size}", "--points", "1"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "fewer than 50" in line]
    if advice is None:
        assert not lines
    else:
        (line,) = lines
        assert line.startswith("--recipe or --set: 4,000 tokens in 16 optimizer steps of 256, ") and line.endswith(
            advice
        )


def commands() -> list[tuple[str, str]]:
    """Page and text of each documented training command."""
    pattern = re.compile(r"secateur train [^\n`]*--tokens \S+[^\n`]*")
    return [(page, match[0]) for page, text in PAGES.items() for match in pattern.finditer(text)]


def test_documented_commands_have_enough_steps() -> None:
    assert len(commands()) > 8
    for page, command in commands():
        settings = tuple(re.findall(r"--set (\S+=\d\S*)", command))
        recipe = read_recipe(None, settings)
        tokens = parse_count(re.findall(r"--tokens (\S+)", command)[0])
        assert recipe.steps(tokens) >= FEW_STEPS, f"{page}: {command}"
    assert Recipe().tokens_per_step == 4_194_304  # the default is part of a run's identity
