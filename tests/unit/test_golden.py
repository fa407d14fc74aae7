"""Golden values: pruning, training and verdicts give what they gave when ``tests/golden`` was recorded.

Each method is run on two of the families here, all families among them; ``python tests/golden/make.py FOLDER`` makes
the whole table, and the smoke study, anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))

import make  # noqa: E402


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


#: bytes are compared only where they were recorded on such a machine
SAME_BYTES = golden("prune")["environment"] == make.environment()
PAIRS = [
    (method, make.FAMILIES[(2 * number + half) % len(make.FAMILIES)])
    for number, method in enumerate(make.METHODS)
    for half in (0, 1)
]


def agree(actual: Any, expected: Any) -> None:
    """Equal, but for rounding in numbers and, on other machines, for hashes."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected if SAME_BYTES else expected.keys() - {"sha256"}:
            agree(actual[key], expected[key])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            agree(one, other)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-9 if SAME_BYTES else 1e-3)
    else:
        assert actual == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_pruning_gives_the_recorded_model(method: str, family: str, folder: Path) -> None:
    if method == "sheared" and not SAME_BYTES:
        pytest.skip("training under gates multiplies differences of rounding")
    agree(make.prune(folder, family, method), golden("prune")[f"{family}/{method}"])


def test_training_gives_the_recorded_curves(folder: Path) -> None:
    expected = golden("train")
    del expected["environment"]
    agree(make.train(folder), expected)
