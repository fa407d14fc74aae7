"""What users mistype, and files that are not what they should be: one line that names the fault, exit code 2.

Errors that other tests check beside the feature (``test_prune_verb``, ``test_checkpoint``, ``test_shapes_verb``) are
not repeated here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import secateur
from helpers import token_corpus
from secateur.cli import main

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n"
STUDY = """\
name: mine
corpus: {source: stdlib, vocabulary: 300}
parent: {tokens: 10k, hidden: 32, ffn: 64, layers: 4, heads: 4, kv_heads: 2}
methods: [magnitude]
ratios: [0.5]
retrain: {tokens: 1k}
recipe: {sequence: 32, tokens_per_step: 64}
calibration: {windows: 2}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer, shards of its vocabulary, a study, and texts."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA))
    sizes = {"model.embed_tokens": (61, 16), "model.norm": (16,)}
    for layer in range(2):
        block = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
        sizes |= {f"model.layers.{layer}.self_attn.{name}_proj": size for name, size in block.items()}
        sizes |= {f"model.layers.{layer}.mlp.{name}_proj": (24, 16) for name in ("gate", "up")}
        sizes |= {f"model.layers.{layer}.mlp.down_proj": (16, 24)}
        sizes |= {f"model.layers.{layer}.{name}_layernorm": (16,) for name in ("input", "post_attention")}
    draw = np.random.default_rng(0)
    tensors = {f"{name}.weight": draw.standard_normal(size, dtype=np.float32) for name, size in sizes.items()}
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    token_corpus(folder / "corpus", tokens=2000, vocabulary=61)
    (folder / "mine.yaml").write_text(STUDY)
    (folder / "a.txt").write_text("A pear on a ladder.\n" * 40)
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("Äpfel und Birnen\n".encode("latin-1"))
    (folder / "paper.pdf").write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    (folder / "rows.jsonl").write_text('{"body": "a pear"}\n')
    (folder / "broken.jsonl").write_text('{"text": "a pear"}\n{"text": "a la\n')
    (folder / "nothing").mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (folder / "list.json").write_text("[]")
    return folder


def run(line: str, capsys: pytest.CaptureFixture[str], **places: Path) -> str:
    """The one line that a command ends with."""
    code = main([part.replace("~", " ").format(**places) for part in line.split()])
    captured = capsys.readouterr()
    *notices, last = captured.err.splitlines()
    assert code == 2 and captured.out == "" and last.startswith("secateur: error: "), captured.err
    assert not any("error: " in line or "Traceback" in line for line in notices), captured.err
    return last


PRUNE = "prune {m} {o} --method magnitude "
TRAIN = "train {o} --init {m} --data shards:{w}/corpus --set sequence=16 --set tokens_per_step=32 "
RECOMMEND = "recommend --params 8B --ratio 0.5 --tokens 50B "

#: a command line, in which ~ stands for a space, and what its error names
LINES: list[tuple[str, str]] = [
    (PRUNE + "--ratio 150%", "--ratio: '150%'"),
    (PRUNE + "--ratio 0,5", "--ratio: '0'"),
    (PRUNE + "--ratio half", "--ratio: 'half'"),
    (PRUNE + "--ratio -0.5", "--ratio"),
    (PRUNE + "--ratio", "--ratio: expected one argument"),
    (PRUNE + "--sparsity 0.5", "--sparsity is not an option; did you mean '--ratio'?"),
    (PRUNE + "--pattern 4:4", "--pattern: '4:4'"),
    (PRUNE + "--pattern 0:4", "--pattern: '0:4'"),
    (PRUNE + "--pattern 2:4 --ratio 0.6", "--ratio"),
    (PRUNE + "--ratio 0.5 --seqlen -1", "--seqlen"),
    (PRUNE + "--ratio 0.5 --windows 1.5", "--windows: '1.5' is not a whole number above zero"),
    (PRUNE + "--ratio 0.5 --dtype fp16", "--dtype: 'fp16' is not known"),
    ("prune {m} --method magnitude --ratio 0.5", "required: out"),
    ("prune {m} {o} --ratio 0.5", "required: --method"),
    ("prune {w}/model/model.safetensors {o} --method magnitude --ratio 0.5", "model.safetensors"),
    ("prune {w}/model.gguf {o} --method magnitude --ratio 0.5", "model.gguf"),
    ("prune {w}/nothing {o} --method magnitude --ratio 0.5", "nothing/config.json: no such file"),
    ("prune {m} {o} --method wanda --ratio 0.5 --calibration text:{w}/a.txt", "has no tokenizer"),
    ("prune {m} {o} --method wanda --ratio 0.5 --calibration {w}/a.txt", "write 'text:"),
    ("prune {m} {o} --method wanda --ratio 0.5 --calibration hf:", "'hf:' names no text; write hf:NAME"),
    ("inspect", "required: model"),
    ("inspect {w}/list.json", "list.json"),
    ("shapes {w}/list.json --ratio 0.5", "list.json: has no model_type"),
    ("shapes {m} --ratio 0.5 --shape ffn=1k", "--shape"),
    ("shapes {m} --shape ffn:12", "--shape: 'ffn:12'"),
    ("shapes {m} --shape ffn=-8", "--shape: 'ffn=-8' is not SIZE=NUMBER"),
    (TRAIN + "--tokens -5k", "--tokens"),
    (TRAIN + "--tokens 1.5", "--tokens: '1.5' is not a whole count"),
    (TRAIN + "--tokens 50~million", "--tokens: '50 million' is not a whole count"),
    (TRAIN + "--tokens 1", "--tokens: one token predicts nothing"),
    (TRAIN + "--tokens 50B", "corpus"),
    (TRAIN + "--tokens 1k --skip 2k", "corpus has 2,006 tokens, not 2,000 to 3,000"),
    (TRAIN + "--tokens 1k --set peak_rate", "--set: peak_rate should be KEY=VALUE"),
    (TRAIN + "--tokens 1k --set peak_rate=fast", "peak_rate: should be a number"),
    (TRAIN + "--tokens 1k --set peak_rate=-1", "peak_rate: should be greater than 0"),
    (TRAIN + "--tokens 1k --set tokens_per_step=40", "tokens_per_step: 40 is no multiple"),
    (TRAIN + "--tokens 1k --set seed=first", "seed: should be a whole number"),
    (TRAIN + "--tokens 1k --set schedule=cosin", "did you mean 'cosine'?"),
    (TRAIN + "--tokens 1k --recipe {w}/none.yaml", "none.yaml: no such file"),
    (TRAIN + "--tokens 1k --recipe {w}/nothing", "nothing: cannot be read: is a directory"),
    (TRAIN + "--tokens 1k --recipe {w}/list.json", "list.json: expected a mapping"),
    (TRAIN + "--tokens 1k --teacher {w}/nothing", "nothing/config.json: no such file"),
    (TRAIN + "--tokens 1k --alpha 2 --teacher {m}", "--alpha"),
    ("train {o} --init {m} --data text:{w}/a.txt --tokens 1k", "--data"),
    ("train {o} --init {m} --data shards:{w}/nothing --tokens 1k", "nothing holds no token shards"),
    ("train {o} --init scrach --data shards:{w}/corpus --tokens 1k", "scrach"),
    ("eval {m} --data text:{w}/a.txt", "has no tokenizer"),
    ("eval {m} {w}/none --data shards:{w}/corpus", "none: no such directory"),
    ("eval {m} --data shards:{m}", "holds no token shards"),
    ("eval {m} --data shards:{w}/corpus --windows 0", "--windows: '0'"),
    ("eval {m} --data shards:{w}/corpus --device gpu", "--device: 'gpu' is unknown"),
    ("data text:{w}/empty.txt {o} --tokenizer {w}/none", "none: no such directory"),
    ("data text:{w}/a.txt {o} --tokenizer {m} --holdout 5", "--holdout: '5' is not a share"),
    ("data text:{w}/a.txt {o} --tokenizer {m} --seed one", "--seed: 'one' is not a whole number"),
    ("compare {w}/list.json {w}/list.json", "list.json"),
    ("compare {w}/model/config.json {w}/model/config.json", "config.json"),
    ("compare {w}/nothing {w}/nothing", "nothing"),
    ("compare {w}/list.json", "required: B.json"),
    ("compare {w}/list.json {w}/list.json --margin -1", "--margin"),
    ("study plan dmo", "did you mean 'demo'?"),
    ("study plan {w}", "cannot be read: is a directory"),
    ("study plan {w}/mine.yaml --power 2", "--power: '2'"),
    ("study plan {w}/mine.yaml --power --pilot {w}/none", "none"),
    ("study run {w}/mine.yaml --jobs 0", "--jobs: '0'"),
    ("study run {w}/mine.yaml --launcher slrum", "did you mean 'slurm'?"),
    ("study run {w}/mine.yaml --only wnada", "--only"),
    ("study report {w}/mine.yaml --out {w}/none", "none"),
    ("study explain {w}/mine.yaml", "required: STAGE"),
    ("recommend --params 8X --ratio 0.5 --tokens 50B", "--params: '8X'"),
    ("recommend --params 8B --model {m} --ratio 0.5 --tokens 50B", "--model: not allowed with argument --params"),
    (RECOMMEND + "--study {w}/nothing", "nothing"),
    (RECOMMEND + "--method wnada", "did you mean 'wanda'?"),
    (RECOMMEND + "--children 0", "--children: '0'"),
    (RECOMMEND + "--like {w}/mine.yaml", "--like"),
]


@pytest.mark.parametrize(("line", "part"), LINES, ids=[line for line, _ in LINES])
def test_mistyped_lines(line: str, part: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(world.rglob("*"))
    assert part in run(line, capsys, m=world / "model", o=tmp_path / "out", w=world)
    assert sorted(world.rglob("*")) == before and list(tmp_path.iterdir()) == []


def edit(model: Path, *, drop: str = "", **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    config.pop(drop, None)
    (model / "config.json").write_text(json.dumps(config))


def keep_only(model: Path, **files: str | bytes) -> None:
    """Replace all files of a model; ``_`` in a name stands for a dot."""
    for path in model.iterdir():
        path.unlink()
    for name, content in files.items():
        head, _, tail = name.rpartition("_")
        (model / f"{head}.{tail}").write_bytes(content.encode() if isinstance(content, str) else content)


def quantise(model: Path, **section: Any) -> None:
    """What GPTQ writes: packed weights, scales and zeros in place of each linear's weight."""
    edit(model, quantization_config=section)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        rows, columns = tensors.pop(name).shape
        base = name.removesuffix(".weight")
        tensors[f"{base}.qweight"] = np.zeros((columns // 8, rows), np.int32)
        tensors[f"{base}.scales"] = np.ones((1, rows), np.float16)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def spoil(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].flat[3] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8})
INDEX = json.dumps({"weight_map": {"model.norm.weight": "../../etc/passwd"}})
MAGNITUDE = "prune {m} {o} --method magnitude --ratio 0.5"

#: what is wrong with a model -> the damage, a command line, and what its error names
MODELS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "adapter": (lambda m: keep_only(m, adapter_config_json=ADAPTER), MAGNITUDE, "adapter"),
    "adapter in eval": (
        lambda m: keep_only(m, adapter_config_json=ADAPTER, adapter_model_safetensors=b""),
        "eval {m} --data shards:{w}/corpus",
        "adapter",
    ),
    "GGUF beside the configuration": (
        lambda m: keep_only(m, config_json=json.dumps(LLAMA), q4_gguf=b"GGUF"),
        MAGNITUDE,
        "GGUF",
    ),
    "pickles in train": (
        lambda m: keep_only(m, config_json=json.dumps(LLAMA), pytorch_model_bin=b"PK"),
        TRAIN + "--tokens 1k",
        "convert its .bin files",
    ),
    "pointer of git-lfs": (lambda m: (m / "model.safetensors").write_text(POINTER), MAGNITUDE, "git lfs pull"),
    "folder for weights": (
        lambda m: ((m / "model.safetensors").unlink(), (m / "model.safetensors").mkdir()),
        MAGNITUDE,
        "model.safetensors",
    ),
    "index cut off": (
        lambda m: ((m / "model.safetensors").unlink(), (m / "model.safetensors.index.json").write_text(INDEX[:30])),
        MAGNITUDE,
        "model.safetensors.index.json: not valid JSON",
    ),
    "index outside": (
        lambda m: ((m / "model.safetensors").unlink(), (m / "model.safetensors.index.json").write_text(INDEX)),
        "eval {m} --data shards:{w}/corpus",
        "'../../etc/passwd', which is not a file in the same directory",
    ),
    "GPTQ": (lambda m: quantise(m, quant_method="gptq", bits=4), MAGNITUDE, "quantized"),
    "AWQ in train": (lambda m: quantise(m, quant_method="awq", bits=4), TRAIN + "--tokens 1k", "quantized"),
    "encoder": (lambda m: edit(m, model_type="bert"), MAGNITUDE, "model_type 'bert' is not a known family"),
    "encoder and decoder": (lambda m: edit(m, model_type="t5"), "shapes {m} --ratio 0.5", "'t5' is not a known family"),
    "dense weights of a mixture": (
        lambda m: edit(m, model_type="mixtral"),
        "inspect {m}",
        "lacks the tensor model.layers.0",
    ),
    "configuration a list": (lambda m: (m / "config.json").write_text("[]"), "eval {m} --data stdlib", "config.json"),
    "configuration empty": (lambda m: (m / "config.json").write_text(""), MAGNITUDE, "config.json: not valid JSON"),
    "configuration in YAML": (
        lambda m: (m / "config.json").write_text("model_type: llama\n"),
        "shapes {m} --ratio 0.5",
        "config.json: not valid JSON",
    ),
    "no layers": (lambda m: edit(m, num_hidden_layers=0), "shapes {m} --ratio 0.5", "config.json"),
    "size in quotes": (lambda m: edit(m, hidden_size="16"), "shapes {m} --ratio 0.5", "hidden_size"),
    "size below zero": (lambda m: edit(m, intermediate_size=-24), "shapes {m} --ratio 0.5", "intermediate_size"),
    "no vocabulary": (lambda m: edit(m, vocab_size=0), MAGNITUDE, "config.json"),
    "unknown activation": (
        lambda m: edit(m, hidden_act="swiglu"),
        TRAIN + "--tokens 1k",
        "config.json: transformers cannot build this model",
    ),
    "another FFN": (lambda m: edit(m, intermediate_size=32), MAGNITUDE, "config.json implies (32, 16)"),
    "rows that N:M does not divide": (
        lambda m: None,
        "prune {m} {o} --method magnitude --pattern 8:16",
        "the rows of mlp.down_proj.weight have 24 weights, not a multiple of 16",
    ),
    "NaN in train": (
        lambda m: spoil(m, "model.norm.weight", float("nan")),
        TRAIN + "--tokens 1k",
        "model.norm.weight holds NaN or infinity",
    ),
    "tokenizer a pointer": (
        lambda m: (m / "tokenizer.json").write_text(POINTER),
        "eval {m} --data text:{w}/a.txt",
        "tokenizer.json: holds a pointer of git-lfs",
    ),
    "output inside": (lambda m: None, TRAIN.replace("{o}", "{m}/out") + "--tokens 1k", "lies in {m}, which is read"),
    "output not empty": (lambda m: None, TRAIN.replace("{o}", "{w}") + "--tokens 1k", "already exists"),
    "output below a file": (
        lambda m: None,
        "prune {m} {w}/a.txt/out --method magnitude --ratio 0.5",
        "a.txt/out: cannot be created",
    ),
    "results into a file": (
        lambda m: None,
        "eval {m} --data shards:{w}/corpus --out {w}/a.txt",
        "--out: {w}/a.txt is a file",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_files_that_are_not_a_model(case: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, line, part = MODELS[case]
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    damage(model)
    assert part.format(m=model, w=world) in run(line, capsys, m=model, o=tmp_path / "out", w=world)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("line", [MAGNITUDE, "eval {m} --data shards:{w}/corpus --out {o}", TRAIN + "--tokens 1k"])
def test_a_folder_that_may_not_be_written(
    line: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so that the system's answers are replaced."""
    locked, mkdir = tmp_path / "locked", Path.mkdir
    locked.mkdir()

    def refuse(path: Path, *args: Any, **options: Any) -> None:
        if path.is_relative_to(locked):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(os, "access", lambda path, _mode: not Path(path).is_relative_to(locked))
    assert str(locked) in run(line, capsys, m=world / "model", o=locked / "out", w=world)
    assert list(locked.iterdir()) == []


#: what is wrong with a study file -> its text, and what the error names besides the file
STUDIES: dict[str, tuple[str, str]] = {
    "unknown key": (STUDY + "ratio: 0.5\n", "ratio: unknown key; did you mean 'ratios'"),
    "unknown key inside": (
        STUDY.replace("ffn: 64", "ffn: 64, head: 4"),
        "parent.head: unknown key; did you mean 'heads', ",
    ),
    "tab": (STUDY + "seeds:\n\t- 0\n", "line 10: not valid YAML: found character '\\t'"),
    "repeated key": (STUDY + "ratios: [0.7]\n", "line 9: not valid YAML: found duplicate key"),
    "seeds as text": (STUDY + "seeds: [zero, one]\n", "seeds.values[0]: should be a whole number"),
    "seed below zero": (STUDY + "seeds: [-1]\n", "seeds.values[0]"),
    "empty": ("", "expected a mapping of keys to values, got nothing"),
    "list": ("- name: mine\n", "expected a mapping of keys to values, got a list"),
    "object of Python": (STUDY + "title: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    "name with a space": (STUDY.replace("name: mine", "name: my study"), "name"),
    "ratio of one": (STUDY.replace("[0.5]", "[1.0]"), "ratios[0]"),
    "ratio in words": (STUDY.replace("[0.5]", "half"), "ratios"),
    "method": (STUDY.replace("magnitude", "magnitud"), "did you mean 'magnitude'?"),
    "tokens below zero": (STUDY.replace("10k", "-10k"), "parent.tokens"),
    "tokens with a comma": (STUDY.replace("{tokens: 1k}", '{tokens: "1,000"}'), "retrain.tokens"),
    "source": (STUDY.replace("stdlib", "stdlb"), "did you mean 'stdlib'?"),
    "vocabulary": (STUDY.replace("vocabulary: 300", "vocabulary: 200"), "corpus.vocabulary"),
    "heads": (STUDY.replace("heads: 4, kv_heads: 2", "heads: 4, kv_heads: 3"), "parent.heads: 4 is not a multiple"),
    "checkpoint": (
        STUDY.replace(
            "{tokens: 10k, hidden: 32, ffn: 64, layers: 4, heads: 4, kv_heads: 2}", "{checkpoint: none/here}"
        ),
        "none/here",
    ),
    "windows": (STUDY.replace("windows: 2", "windows: two"), "calibration.windows: should be a whole number"),
    "question": (STUDY + "question: {ask: Why?, comparisons: [{method: wanda, setting: equal}]}\n", "question"),
}


@pytest.mark.parametrize("case", STUDIES)
def test_study_files(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, part = STUDIES[case]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    line = run("study plan {f}", capsys, f=file)
    assert str(file) in line and part in line
    assert list(tmp_path.iterdir()) == [file]


NOTHING: Any = None

#: what is wrong with a call -> the call, and what its error names
CALLS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model": (lambda m: secateur.evaluate([], data="stdlib"), "`models`"),
    "model of no type": (lambda m: secateur.evaluate([None], data="stdlib"), "not NoneType"),
    "percent": (lambda m: secateur.prune(m, m.parent / "o", method="magnitude", ratio=50), "`ratio`"),
    "text for a ratio": (lambda m: secateur.prune(m, m.parent / "o", method="magnitude", ratio="half"), "`ratio`"),
    "method of no type": (lambda m: secateur.prune(m, m.parent / "o", method=NOTHING, ratio=0.5), "`method`"),
    "tokens below zero": (lambda m: secateur.train(m.parent / "o", init=m, tokens=-1, data="shards:x"), "`tokens`"),
    "folder for shards": (lambda m: secateur.train(m.parent / "o", init=m, tokens=9, data=m), "`data`"),
    "study of no file": (lambda m: secateur.Study.load(m.parent / "none.yaml"), "none.yaml: no such file"),
    "study of no type": (lambda m: secateur.Study.load(NOTHING), "not NoneType"),
    "size": (lambda m: secateur.recommend(params="8X", ratio=0.5, tokens="50B"), "`params`"),
    "share": (lambda m: secateur.recommend(params="8B", ratio=1.5, tokens="50B"), "`ratio`"),
    "holdout": (lambda m: secateur.build_corpus("stdlib", m.parent / "o", tokenizer=m, holdout=2), "`holdout`"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case: str, world: Path, tmp_path: Path) -> None:
    call, part = CALLS[case]
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    with pytest.raises(secateur.UserError) as error:
        call(model)
    assert part in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [model]
