"""TRL's SFTTrainer gives the golden values that the unit tests of chat data compare with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chat_cases import CASES, GOLDEN

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of the trainer itself


@pytest.mark.parametrize("name", CASES)
def test_the_golden_values_are_those_of_trl(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed (the extra handoff)")
    from sft_trainer import sft_figures

    figures, golden = sft_figures(CASES[name], tmp_path), json.loads(GOLDEN.read_text())[name]
    assert figures["rows"] == golden["rows"] and figures["targets"] == golden["targets"]
    assert figures["loss"] == pytest.approx(golden["loss"], rel=1e-5)
