"""The files beside the weights that follow a checkpoint to an output, and those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

import secateur
from helpers import hf, tiny_llama, token_corpus
from secateur.data.tokenizer import load_tokenizer, train_tokenizer
from secateur.errors import UserError
from secateur.model.companions import copy_companions, tokenizer_files

NEEDED = [
    "LICENSE", "LICENSE.txt", "license.md", "Licence", "LICENSE-GEMMA", "NOTICE", "Notice.txt", "USE_POLICY.md",
    "COPYING", "THIRD_PARTY_NOTICES", "CITATION.cff", ".gitattributes", "generation_config.json", "tokenizer.model",
    "tokenizer.model.v3", "tokenizer.model.v7m1", "spiece.model", "sentencepiece.bpe.model", "source.spm", "vocab.txt",
    "vocab.json", "merges.txt", "tekken.json", "qwen.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json",
    "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "licenses/apache.txt",
]  # fmt: skip
REFUSED = [
    "pytorch_model.bin", "vocab.pkl", "tokenizer.pickle", "tokenization_model.py", "license.py", "vocab.pt",
    "consolidated.safetensors", "model-q4.gguf", "tokenizer.pyc", "additional_chat_templates/evil.py",
    "additional_chat_templates/cache.pkl", "onnx/tokenizer.json", "params.json", "trainer_state.json", "corpus.txt",
    "merges.txt.zip",
]  # fmt: skip


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer that works, and files of all kinds."""
    folder = tiny_llama(tmp_path, vocab_size=300)
    fill(folder, sorted({*NEEDED, *REFUSED} - {"vocab.json", "merges.txt", "added_tokens.json"}))
    train_tokenizer(["a text " * 20], 259).save_pretrained(folder)
    return folder


def test_files_that_follow_and_files_that_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    fill(folder, [*NEEDED, *REFUSED, "config.json", "README.md", "secateur.json", "plan.json", "train.json"])
    out.mkdir()
    copy_companions(folder, out)
    assert tree(out) == set(NEEDED)
    assert all((out / name).read_text() == f"content of {name}" for name in NEEDED)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"not copied from {folder}: corpus.txt, ") and "more; copy by hand" in line
    assert "README" not in line and "pytorch_model" not in line


def test_nothing_is_reported_where_nothing_stays_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    fill(folder, ["LICENSE", "README.md", "config.json", "model.safetensors", "model.safetensors.index.json"])
    out.mkdir()
    copy_companions(folder, out)
    copy_companions(tmp_path / "nowhere", out)
    assert tree(out) == {"LICENSE"} and not capsys.readouterr().err


def test_a_link_is_copied_as_a_file(tmp_path: Path) -> None:
    fill(tmp_path, ["blob", "snapshot/config.json"])
    (tmp_path / "snapshot" / "LICENSE").symlink_to(tmp_path / "blob")
    (tmp_path / "out").mkdir()
    copy_companions(tmp_path / "snapshot", tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
    assert (tmp_path / "out" / "LICENSE").read_text() == "content of blob"


def test_prune_and_train_carry_them(source: Path, tmp_path: Path) -> None:
    corpus = token_corpus(tmp_path / "corpus", tokens=600, vocabulary=259)
    present = tree(source) & {*NEEDED, "tokenizer.json", "tokenizer_config.json"}
    pruned = secateur.prune(source, tmp_path / "pruned", method="magnitude", ratio=0.5)
    recipe = {"sequence": 16, "tokens_per_step": 64}
    trained = secateur.train(tmp_path / "t", init=pruned, tokens=256, data=f"shards:{corpus}", recipe=recipe, points=1)
    learned = secateur.prune(
        source,
        tmp_path / "learned",
        method="sheared",
        ratio=0.3,
        calibration=f"shards:{corpus}",
        seqlen=16,
        options={"steps": 60, "windows": 2, "phi": 1000.0, "multiplier_rate": 300.0},
    )
    for result in (pruned, trained, learned):
        assert present <= tree(result.path), result.path
        assert not set(REFUSED) & tree(result.path), result.path


def test_a_live_model_carries_those_of_its_directory(source: Path, tmp_path: Path) -> None:
    pruned = secateur.prune(hf(source), tmp_path / "live", method="magnitude", ratio=0.5)
    assert tree(source) & {*NEEDED, "tokenizer.json"} <= tree(pruned.path)


def test_the_digest_of_a_tokenizer_covers_every_vocabulary(tmp_path: Path) -> None:
    fill(
        tmp_path,
        ["tokenizer.model", "tokenizer.json", "LICENSE", "spiece.model", "config.json", "merges.txt", "vocab.txt"],
    )
    names = [path.name for path in tokenizer_files(tmp_path)]
    assert names == ["tokenizer.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt"]


def test_a_model_of_sentencepiece_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.data.tokenizer.find_spec", lambda _: None)
    for name in ("tokenizer.model", "spiece.model"):
        folder = tmp_path / name.partition(".")[0]
        fill(folder, [name])
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}')
        with pytest.raises(UserError) as error:
            load_tokenizer(folder)
        assert f"{name}: reading this tokenizer needs the package sentencepiece; install it: " in str(error.value)
