from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.cli.entry import main
from secateur.data.tokenizer import train_tokenizer
from secateur.errors import UserError
from secateur.study.new import NewStudy, write_study
from secateur.study.session import Study
from secateur.study.spec import load_study

SPEED = 1e10


@pytest.fixture(scope="module")
def checkpoint(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 64 positions with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 4
    LlamaForCausalLM(LlamaConfig(vocab_size=280, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    train_tokenizer((path.read_text() for path in sorted(text.iterdir())), 280).save_pretrained(folder)
    return folder


def planned_hours(file: Path) -> float:
    return Study.load(file, file.parent / "out").plan(SPEED).device_hours


def test_a_parent_of_its_own_is_the_largest_that_the_hours_allow(tmp_path: Path):
    small, large = tmp_path / "small.yaml", tmp_path / "large.yaml"
    for file, hours in ((small, 0.5), (large, 8.0)):
        write_study(NewStudy(file=file, hours=hours, methods=("wanda",), flops_per_second=SPEED))
        assert 0.1 * hours < planned_hours(file) <= hours
    parents = [load_study(file).parent for file in (small, large)]
    assert parents[0] and parents[1] and (parents[0].hidden or 0) < (parents[1].hidden or 0)
    spec = load_study(large)
    assert parents[1].tokens == 4 * spec.retrain.tokens[0] and spec.question is not None


def test_a_checkpoint_is_retrained_on_as_many_tokens_as_the_hours_allow(tmp_path: Path, checkpoint: Path):
    file = tmp_path / "mine.yaml"
    request: dict[str, Any] = {"checkpoint": str(checkpoint), "corpus": "stdlib", "methods": ("wanda",), "ratio": 0.3}
    write_study(NewStudy(file=file, hours=2.0, seeds=2, flops_per_second=SPEED, **request))
    spec = load_study(file)
    assert spec.parent and spec.parent.checkpoint == str(checkpoint) and spec.ratios == (0.3,)
    assert spec.recipe.sequence == 64 and spec.seeds.values == (0, 1) and spec.corpus.source == "stdlib"
    assert planned_hours(file) == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "a.txt"}, "must end in .yaml"),
        ({"ratio": 1.5}, "`ratio`"),
        ({"methods": ("wandaa",)}, "wandaa"),
        ({"hours": 1e-6}, "the smallest study takes"),
    ],
)
def test_impossible_requests_are_refused_and_write_nothing(change: dict[str, Any], message: str, tmp_path: Path):
    fields: dict[str, Any] = {"file": "a.yaml", "flops_per_second": SPEED} | change
    fields["file"] = tmp_path / fields["file"]
    with pytest.raises(UserError, match=message):
        write_study(NewStudy(**fields))
    assert list(tmp_path.iterdir()) == []


def test_the_verb_refuses_a_file_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.yaml").write_text("")
    assert main(["study", "new", str(tmp_path / "a.yaml"), "--hours", "1"]) == 2
    assert "a.yaml exists" in capsys.readouterr().err
