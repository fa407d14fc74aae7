"""Questions to ``secateur recommend`` with its answers, as docs/prediction.md has them.

python benchmarks/questions.py > answers.md
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from secateur.api import recommend
from secateur.forecast.published_findings import FINDINGS

__all__ = ["QUESTIONS", "command", "findings_table", "markdown", "write_study"]

ROOT = Path(__file__).resolve().parents[1]
TRAIN = {"parent": "must-train", "parent_tokens": "200B"}

#: what is asked, in words, and the fields of the request
QUESTIONS: tuple[tuple[str, dict[str, object]], ...] = (
    ("An 8B parent, half of it removed, 50 B tokens", {"params": "8B", "ratio": 0.5, "tokens": "50B"}),
    ("The same on 1 T tokens", {"params": "8B", "ratio": 0.5, "tokens": "1T"}),
    ("The same at ratio 0.3", {"params": "8B", "ratio": 0.3, "tokens": "50B"}),
    ("The same at ratio 0.8", {"params": "8B", "ratio": 0.8, "tokens": "50B"}),
    ("The same at ratio 0.95 on 100 B", {"params": "8B", "ratio": 0.95, "tokens": "100B"}),
    ("Ratio 0.8 on 10 B", {"params": "8B", "ratio": 0.8, "tokens": "10B"}),
    ("By FLAP", {"params": "8B", "ratio": 0.5, "tokens": "50B", "method": "flap"}),
    ("Depth and width", {"params": "8B", "ratio": 0.5, "tokens": "100B", "granularity": "depth+width"}),
    ("The parent must be trained", {"params": "8B", "ratio": 0.5, "tokens": "50B", **TRAIN}),
    (
        "It must be trained, and eight children share it",
        {"params": "8B", "ratio": 0.5, "tokens": "50B", "children": 8, **TRAIN},
    ),
    (
        "It must be trained, single weights",
        {"params": "8B", "ratio": 0.5, "tokens": "50B", "granularity": "sparse", **TRAIN},
    ),
    (
        "It must be trained, layers, ratio 0.65",
        {"params": "8B", "ratio": 0.65, "tokens": "50B", "granularity": "depth", **TRAIN},
    ),
    ("It must be trained, ratio 0.8", {"params": "8B", "ratio": 0.8, "tokens": "50B", **TRAIN}),
    (
        "A public 8B parent of 15 T tokens",
        {"params": "8B", "ratio": 0.5, "tokens": "50B", "parent_tokens": "15T"},
    ),
    ("A public 70B parent", {"params": "70B", "ratio": 0.5, "tokens": "100B", "parent_tokens": "15T"}),
    (
        "A 1B parent, with prices",
        {
            "params": "1B",
            "ratio": 0.5,
            "tokens": "10B",
            "cost_per_hour": 2.5,
            "flops_per_second": 4e14,
            "currency": "EUR",
        },
    ),
    ("A 3B parent of 80 B tokens", {"params": "3B", "ratio": 0.5, "tokens": "20B", "parent_tokens": "80B"}),
    ("With a teacher", {"params": "8B", "ratio": 0.5, "tokens": "50B", "distill": True}),
    (
        "A study of ratios 0.4 and 0.6, asked for 0.5",
        {"params": "2M", "ratio": 0.5, "tokens": "20M", "study": "runs/mine"},
    ),
    ("The same, asked for 0.8", {"params": "2M", "ratio": 0.8, "tokens": "20M", "study": "runs/mine"}),
    (
        "A shipped study of ours, at a budget that was run",
        {"params": "2.25M", "ratio": 0.5, "tokens": "150k", "study": "docs/results/findings"},
    ),
    (
        "The same at a budget that was not: its runs fit no curve",
        {"params": "2.25M", "ratio": 0.5, "tokens": "200k", "study": "docs/results/findings"},
    ),
)


def markdown() -> Iterator[str]:
    """The lines of the section."""
    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder))
        for number, (words, fields) in enumerate(QUESTIONS, 1):
            study = fields.get("study")
            where = {"study": folder if study == "runs/mine" else ROOT / str(study)} if study else {}
            advice = recommend(**{**fields, **where})["recommendation"]  # type: ignore[arg-type]
            pilot = advice["cheapest_pilot"]
            sentences = [advice["statement"], *advice["assumptions"], *([pilot["sentence"]] if pilot else [])]
            yield f"{number}. {words}: `{command(fields)}`"
            yield f"   > {' '.join(sentences)}".replace("\u00a0", " ")


def findings_table() -> Iterator[str]:
    """The lines of the table of published findings."""
    yield "| source | conditions | tokens | teacher | finding | figures |"
    yield "|---|---|---|---|---|---|"
    for finding in FINDINGS:
        number = finding.source.removeprefix("arXiv:")
        source = f"[{finding.source}](https://arxiv.org/abs/{number}), {finding.table}"
        teacher = {True: "yes", False: "no", None: "not stated"}[finding.distilled]
        figures = "; ".join(f"{name} {value:g}" for name, value in finding.figures) or "none"
        cells = (source, finding.conditions, finding.tokens, teacher, finding.statement, figures)
        yield f"| {' | '.join(cells)} |"


def command(fields: dict[str, object]) -> str:
    """The request as options of the command line."""
    options = []
    for name, value in fields.items():
        number = f"{value:g}".replace("e+", "e") if isinstance(value, float) else value
        options.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {number}"))
    return " ".join(options)


def write_study(folder: Path) -> None:
    """An invented study of one's own: Minitron-width at ratios 0.4 and 0.6 of a parent of 2 M parameters.

    Losses follow E + G (D / 10 M) ** -0.4, without noise; a higher ratio ends higher.
    """
    rows = ["name,method,granularity,seed,ratio,ratio_total,parameters,train_tokens,loss"]
    for ratio, pruned, scratch in ((0.4, 0.25, 0.45), (0.6, 0.33, 0.45)):
        for millions in (4, 8, 16, 32):
            for name, floor, gap in (("P-R", 3.0 + ratio / 5, pruned), ("S_R", 3.0 + ratio / 5, scratch)):
                loss = floor + gap * (millions / 10) ** -0.4
                head = f"{name},minitron-width,width,0,{ratio},{ratio},{round(2e6 * (1 - ratio))}"
                rows.append(f"{head},{millions * 10**6},{loss:.4f}")
    (folder / "cells.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "curves.csv").write_text("name,tokens,loss\nparent,0,7.0\nparent,50000000,3.2\n", encoding="utf-8")


def main() -> None:
    """Print both parts, and write them into docs/prediction.md with ``--write``."""
    parts = {"findings": "\n".join(findings_table()), "questions": "\n".join(markdown())}
    print("\n\n".join(parts.values()))
    if "--write" in sys.argv:
        page = ROOT / "docs" / "prediction.md"
        text = page.read_text(encoding="utf-8")
        for name, part in parts.items():
            head, rest = text.split(f"<!-- {name} -->")
            text = f"{head}<!-- {name} -->\n{part}\n<!-- /{name} -->" + rest.split(f"<!-- /{name} -->")[1]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
