"""``secateur prune``: what can be asked for, what is said of it, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import edit_config, files, tiny_llama
from secateur.cli import main, manual
from secateur.data.tokenizer import encode_documents, load_tokenizer, token_hash, train_tokenizer
from secateur.methods.registry import METHODS, get_method
from secateur.model.weight_files import INDEX

TEXT = "The gardener prunes the old tree, and the tree grows new leaves in spring.\n" * 40
UNCALIBRATED = ("random-depth", "random-width", "magnitude", "random-weight")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, the same in shards, ``text.txt``, and what else calls may name."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "short.txt").write_text("too short", encoding="utf-8")
    tokenizer = train_tokenizer([TEXT], 262)
    for name, options in (("model", {}), ("sharded", {"shard": "40KB"})):
        tiny_llama(folder, vocab_size=300, **options).rename(folder / name)
        tokenizer.save_pretrained(folder / name)
    np.save(folder / "ids.npy", np.arange(96, dtype=np.uint16).reshape(6, 16))
    return folder


@dataclass
class Call:
    """One call of the command line and all that it said."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def call(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Call]:
    """Run a line in which ``{w}`` is the world, ``{o}`` a directory that is not there and ``{m}`` what was given."""

    def run(line: str, model: Path | None = None) -> Call:
        capsys.readouterr()  # the bars of transformers while a test made its model
        code = main([part.format(w=world, o=tmp_path / "out", m=model) for part in line.split()])
        captured = capsys.readouterr()
        told = [line for line in captured.err.splitlines(keepends=True) if not line.startswith("estimate: ")]
        return Call(code, captured.out, "".join(told))

    return run


def refused(found: Call, part: str) -> None:
    """One line, exit code 2, nothing on standard output."""
    assert found.code == 2 and found.out == ""
    assert found.err.startswith("secateur: error: ") and found.err.count("\n") == 1, found.err
    assert part in found.err


PRUNE = "prune {w}/model {o} --json "
TEXT_AT = " --calibration text:{w}/text.txt --seqlen 16 --windows 6"

# What is asked, what is recorded as asked, what a ratio counts, and the sizes that differ from the model's.
ASKED: list[tuple[str, dict[str, Any], str | None, dict[str, int]]] = [
    ("shortgpt --ratio 0.4", {"ratio": 0.4, "of": "non_embedding"}, "non_embedding", {"layers": 3}),
    ("shortgpt --ratio 0.4 --of total", {"ratio": 0.4, "of": "total"}, "total", {"layers": 2}),
    ("shortgpt --shape layers=1", {"shape": {"layers": 1}}, None, {"layers": 1}),
    ("minitron-depth --ratio 0.6", {"ratio": 0.6, "of": "non_embedding"}, "non_embedding", {"layers": 2}),
    ("shortened-llama --ratio 0.2", {"ratio": 0.2, "of": "non_embedding"}, "non_embedding", {"layers": 4}),
    ("shortened-llama-ppl --ratio 0.2", {"ratio": 0.2, "of": "non_embedding"}, "non_embedding", {"layers": 4}),
    ("random-depth --shape layers=2", {"shape": {"layers": 2}}, None, {"layers": 2}),
    ("minitron-width --shape hidden=16,ffn=24", {"shape": {"hidden": 16, "ffn": 24}}, None, {"hidden": 16, "ffn": 24}),
    (
        "minitron-width --ratio 0.5 --axes kv,ffn",
        {"ratio": 0.5, "of": "non_embedding", "axes": ["kv", "ffn"]},
        "non_embedding",
        {"heads": 2, "kv_heads": 1, "ffn": 24},
    ),
    ("llm-pruner --shape kv_heads=1", {"shape": {"kv_heads": 1}}, None, {"heads": 2, "kv_heads": 1}),
    (
        "wanda-sp --shape heads=2,ffn=20",
        {"shape": {"heads": 2, "ffn": 20}},
        None,
        {"heads": 2, "kv_heads": 1, "ffn": 20},
    ),
    (
        "flap --ratio 0.3 --axes ffn --allocation global --option bias=none",
        {"ratio": 0.3, "of": "non_embedding", "axes": ["ffn"], "allocation": "global"},
        "non_embedding",
        {"ffn": -1},
    ),
    ("random-width --shape ffn=30", {"shape": {"ffn": 30}}, None, {"ffn": 30}),
    ("magnitude --ratio 0.5", {"ratio": 0.5, "of": "block_weights"}, "block_weights", {}),
    ("wanda --pattern 2:4", {"pattern": "2:4"}, None, {}),
    ("wanda --ratio 0.5 --pattern unstructured", {"ratio": 0.5, "of": "block_weights"}, "block_weights", {}),
    ("sparsegpt --pattern 1:4 --option block=8", {"pattern": "1:4"}, None, {}),
    ("random-weight --pattern 4:8", {"pattern": "4:8"}, None, {}),
]


@pytest.mark.parametrize(("asked", "recorded", "of", "sizes"), ASKED, ids=[asked for asked, *_ in ASKED])
def test_what_can_be_asked_for(
    asked: str,
    recorded: dict[str, Any],
    of: str | None,
    sizes: dict[str, int],
    call: Callable[..., Call],
    tmp_path: Path,
) -> None:
    method = asked.split()[0]
    text = "" if method in UNCALIBRATED else TEXT_AT
    answer = call(f"{PRUNE} --method {asked}{text}").answer
    out = tmp_path / "out"
    plan = json.loads((out / "plan.json").read_text())
    assert {k: v for k, v in answer["asked"].items() if k != "options"} == recorded
    assert plan["asked"] == answer["asked"] and plan["fingerprint"] == answer["plan"]

    ratio = answer["ratio"]
    assert (ratio["asked"], ratio["of"]) == (recorded.get("ratio"), of)
    model = AutoModelForCausalLM.from_pretrained(out)
    sparse = get_method(method).granularity == "sparse"
    full = {"hidden": 32, "ffn": 48, "layers": 5, "heads": 4, "kv_heads": 2}
    if -1 in sizes.values():  # layers compete: as wide as the widest
        sizes = {"ffn": model.config.intermediate_size}
    assert {k: v for k, v in answer["shape"].items() if k in full} == full | sizes

    outside = 5 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32
    total = outside + 2 * 300 * 32
    zeros = sum(int((p == 0).sum()) for p in model.parameters()) if sparse or "global" in asked else 0
    gone = total - sum(p.numel() for p in model.parameters()) + zeros
    left = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n and "lm_head" not in n)
    assert ratio["total"] == pytest.approx(gone / total)
    assert ratio["non_embedding"] == pytest.approx((outside - left + zeros) / outside)
    assert ("block_weights" in ratio) == sparse
    if of is None:
        assert ratio["drift"] is None
    else:
        assert ratio["drift"] == pytest.approx(ratio[of] - ratio["asked"])
        assert abs(ratio["drift"]) < 0.1
    if "--pattern" in asked and "unstructured" not in asked:
        kept, span = map(int, recorded["pattern"].split(":"))
        assert ratio["block_weights"] == 1 - kept / span
        weight = model.model.layers[1].mlp.down_proj.weight
        assert ((weight.reshape(-1, span) != 0).sum(dim=1) == kept).all()
    assert (answer["calibration"]["source"] is None) == (method in UNCALIBRATED)


def test_what_is_printed(call: Callable[..., Call], world: Path) -> None:
    found = call("prune {w}/model {o} --method minitron-width --ratio 0.5" + TEXT_AT)
    assert found.code == 0
    lines = dict(line.split(None, 1) for line in found.out.splitlines()[1:])
    assert lines["asked"] == "50% of the parameters outside the embeddings"
    assert lines["removed"].endswith("of those outside the embeddings") and "% of all parameters, " in lines["removed"]
    assert lines["drift"].endswith(" points from the ratio asked")
    asked, reached = 50.0, float(lines["removed"].split("% of those")[0].split()[-1])
    assert float(lines["drift"].split()[0].replace("\N{MINUS SIGN}", "-")) == pytest.approx(reached - asked, abs=0.06)
    ids = encode_documents([_document()], load_tokenizer(world / "model"), 96).ids.reshape(6, 16)
    assert lines["calibration"].endswith(f"hash {token_hash(ids)[:16]}")


def _document() -> Any:
    from secateur.data.documents import Document

    return Document("text.txt", TEXT)


def test_what_is_printed_of_masks_and_shapes(call: Callable[..., Call], tmp_path: Path) -> None:
    out = call("prune {w}/model {o} --method magnitude --ratio 0.5").out
    assert "asked        50% of the weights of the blocks' linears\n" in out
    assert "50.0% of the weights of the blocks' linears\ndrift        +0.00 points from the ratio asked\n" in out
    assert "calibration  none, no text was read\n" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "asked for 50% of the weights of the blocks' linears" in card and "calibration: none" in card
    shutil.rmtree(tmp_path / "out")
    out = call("prune {w}/model {o} --method random-width --shape hidden=16,ffn=24").out
    assert "asked        hidden=16,ffn=24\n" in out and "drift" not in out


@pytest.mark.parametrize("method", UNCALIBRATED)
def test_calibration_that_is_not_read(method: str, call: Callable[..., Call]) -> None:
    found = call(PRUNE + f"--method {method} --ratio 0.4 --calibration text:{{w}}/none.txt")
    assert found.answer["calibration"]["source"] is None
    assert f"none.txt is not read, since {method} looks at no text" in found.err


def test_options_that_do_nothing_are_told(call: Callable[..., Call], tmp_path: Path) -> None:
    found = call(PRUNE + "--method magnitude --ratio 0.4 --states disk --dtype bfloat16 --windows 3")
    assert found.err.splitlines()[0] == (
        "--states, --dtype, --windows: without effect, since magnitude looks at no text"
    )
    shutil.rmtree(tmp_path / "out")
    assert "without effect" not in call(PRUNE + "--method wanda --ratio 0.4 --states disk" + TEXT_AT).err


def test_seeds_of_random_methods(call: Callable[..., Call], tmp_path: Path) -> None:
    plans = []
    for seed in (1, 1, 2):
        answer = call(PRUNE + f"--method random-weight --ratio 0.5 --option seed={seed}").answer
        assert answer["asked"]["options"] == {"seed": seed}
        plans.append((tmp_path / "out" / "plan.safetensors").read_bytes())
        shutil.rmtree(tmp_path / "out")
    assert plans[0] == plans[1] != plans[2]


def test_pruning_by_a_task(
    call: Callable[..., Call], monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []

    class Told:
        def __init__(self, name: str, *, data: str | None, limit: int | None, few_shot: int | None) -> None:
            self.name, self.data, self.limit, self.few_shot, self.requests = name, data, limit, few_shot, None

        def record(self) -> dict[str, Any]:
            return {"name": self.name}

    def accuracies(checkpoint: Any, length: int, task: Told, **_: Any) -> tuple[float, list[float]]:
        seen.append((length, task.name, task.data, task.limit, task.few_shot))
        return 0.9, [0.2, 0.8, 0.3, 0.1]

    monkeypatch.setattr("secateur.pruning.pruner.Task", Told)
    monkeypatch.setattr("secateur.pruning.layer_scoring.removal_accuracies", accuracies)
    line = "--method minitron-depth --ratio 0.4 --option task=winogrande --tasks-data {w} --task-limit 7"
    found = call(PRUNE + line + TEXT_AT)
    assert "text.txt is not read, since minitron-depth goes by the task winogrande" in found.err
    assert found.answer["summary"]["detail"] == "layers 1-2 of 0-4 removed"
    assert found.answer["calibration"]["source"] is None
    assert seen == [(2, "winogrande", str(world), 7, 0)]
    shutil.rmtree(tmp_path / "out")
    assert "calibration  none, scored by the task winogrande\n" in call((PRUNE + line).replace("--json", "")).out


def test_ids_from_a_file_are_those_of_the_text(call: Callable[..., Call], world: Path, tmp_path: Path) -> None:
    line = PRUNE + "--method wanda --ratio 0.5 --calibration "
    first = call(line + "text:{w}/text.txt --seqlen 16 --windows 6").answer
    (tmp_path / "out").rename(tmp_path / "first")
    ids = encode_documents([_document()], load_tokenizer(world / "model"), 96).ids.reshape(6, 16)
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    bare = shutil.copytree(world / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    found = call(line.replace("{w}/model", "{m}") + f"tokens:{tmp_path}/ids.npy --windows 5 --seqlen 16", bare)
    assert found.answer["calibration"]["hash"] == first["calibration"]["hash"] == token_hash(ids)
    assert found.answer["calibration"]["source"] == f"tokens:{tmp_path}/ids.npy"
    assert "uses all 6 windows of 16 tokens; --windows does not apply to it" in found.err
    same = "model.safetensors"
    assert (tmp_path / "out" / same).read_bytes() == (tmp_path / "first" / same).read_bytes()


def test_evaluating_on_ids_from_a_file(call: Callable[..., Call], world: Path, tmp_path: Path) -> None:
    text = call("eval {w}/model --json --data text:{w}/text.txt --seqlen 16 --windows 6")
    ids = encode_documents([_document()], load_tokenizer(world / "model"), 96).ids.reshape(6, 16)
    np.save(tmp_path / "ids.npy", ids.astype(">i4"))
    found = call(f"eval {{w}}/model --json --data tokens:{tmp_path}/ids.npy")
    (ours,), (theirs,) = (c.answer["results"][0]["measurements"] for c in (found, text))
    assert ours["value"] == theirs["value"] and found.err == text.err == ""
    assert ours["protocol"]["fingerprint"] == theirs["protocol"]["fingerprint"]
    assert ours["protocol"]["windows"] == 6
    said = call(f"eval {{w}}/model --data tokens:{tmp_path}/ids.npy --seqlen 8 --windows 6 --field x")
    assert "--seqlen, --field does not apply" in said.err
    assert f"hash {ours['protocol']['hash'][:16]}" in said.out


ARRAYS: dict[str, tuple[Any, str]] = {
    "one axis": (np.arange(8), "int64 of shape [8], but token ids are whole numbers of shape [windows, tokens]"),
    "three axes": (np.zeros((2, 2, 2), dtype=int), "of shape [2, 2, 2]"),
    "floats": (np.zeros((2, 8)), "float64 of shape [2, 8]"),
    "booleans": (np.zeros((2, 8), dtype=bool), "bool of shape [2, 8]"),
    "objects": (np.array([[{}, {}]], dtype=object), "is not a readable .npy file"),
    "no window": (np.zeros((0, 8), dtype=int), "has shape [0, 8]"),
    "one token": (np.zeros((8, 1), dtype=int), "has shape [8, 1]"),
    "negative": (np.full((2, 8), -1), "holds the id -1, but the model's ids are 0 to 299"),
    "beyond the vocabulary": (np.full((2, 8), 300), "holds the id 300, but the model's ids are 0 to 299"),
    "beyond int64": (np.full((2, 8), 2**63, dtype=np.uint64), "holds the id 9223372036854775808"),
    "too long": (np.zeros((1, 65), dtype=int), "windows of 65 tokens, but the model has 64 positions"),
    "text": (b"not an array", "is not a readable .npy file"),
    "nothing": (b"", "is not a readable .npy file"),
}


@pytest.mark.parametrize(
    "verb", ["prune {w}/model {o} --method wanda --ratio 0.5 --calibration", "eval {w}/model --data"]
)
@pytest.mark.parametrize("case", ARRAYS)
def test_files_that_hold_no_ids(case: str, verb: str, call: Callable[..., Call], tmp_path: Path) -> None:
    content, part = ARRAYS[case]
    path = tmp_path / "ids.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    found = call(f"{verb} tokens:{path}")
    refused(found, part)
    assert f"tokens:{path}: " in found.err
    assert list(tmp_path.iterdir()) == [path]


def test_a_truncated_file_and_an_archive(call: Callable[..., Call], world: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes((world / "ids.npy").read_bytes()[:-1])
    refused(call(f"eval {{w}}/model --data tokens:{path}"), "is not a readable .npy file")
    np.savez(tmp_path / "ids.npz", a=np.zeros((2, 8), dtype=int))
    refused(call(f"eval {{w}}/model --data tokens:{tmp_path}/ids.npz"), "is an .npz archive")
    refused(call("eval {w}/model --data tokens:{w}/none.npy"), "tokens:")
    refused(call("eval {w}/model --data token:{w}/ids.npy"), "did you mean 'tokens'?")
    refused(call("eval {w}/model --data {w}/ids.npy"), "write 'tokens:")


# What is asked for, and what the error names.
REFUSED: list[tuple[str, str]] = [
    ("--method wandaa --ratio 0.5", "'wandaa' is not a known method; did you mean 'wanda'?"),
    ("--method WANDA --ratio 0.5", "'WANDA' is not a known method; did you mean 'wanda'?"),
    ("--method Minitron_Width --ratio 0.5", "did you mean 'minitron-width'?"),
    ("--method wanda --ratio 0.5 --of non_embedding", "'non_embedding' is not known; did you mean 'non-embedding'?"),
    ("--method flap --ratio 0.5 --axes ffn,ffn", "--axes: ffn,ffn names an axis twice"),
    ("--method wanda --ratio 0.5,0.5", "--ratio: '0.5,0.5' names a ratio twice"),
    ("--method wanda --ratio 0.02", "--ratio 0.02: removes nothing: wanda compares 48 weights at a time"),
    ("--method magnitude --ratio 0.5,1e-9", "--ratio 1e-09: removes nothing: magnitude compares 1,536 weights"),
    ("--method sparsegpt --ratio 1e-3 --option block=8", "sparsegpt compares 384 weights at a time"),
    ("--method wanda --ratio 0.5 --option bias=none", "--option: wanda has no option 'bias' (it has none)"),
    (
        "--method sparsegpt --ratio 0.5 --option blok=3",
        "--option: sparsegpt has no option 'blok' (it has block, damping); did you mean 'block'?",
    ),
    ("--method sparsegpt --ratio 0.5 --option block=x", "--option of sparsegpt: block: should be a whole number"),
    ("--method sparsegpt --ratio 0.5 --option block=[", "--option of sparsegpt: block: should be"),
    ("--method sparsegpt --ratio 0.5 --option block", "--option: block is not KEY=VALUE"),
    ("--method sparsegpt --ratio 0.5 --option block=1 --option block=2", "--option: block is set twice"),
    ("--method llm-pruner --ratio 0.5 --option order=frist", "did you mean 'first'?"),
    ("--method wanda", "--ratio: how much should wanda remove? Pass --ratio, or --pattern N:M"),
    ("--method shortgpt", "--ratio: how much should shortgpt remove? Pass --ratio, or --shape layers=N"),
    (
        "--method shortgpt --ratio 0.5 --shape layers=2",
        "--shape and --ratio both say how much to remove; leave one out",
    ),
    ("--method wanda --ratio 0.5 --of total", "--of: a ratio for wanda always counts the weights"),
    ("--method wanda --ratio 0.5 --of totl", "--of: 'totl' is not known; did you mean 'total'?"),
    ("--method wanda --ratio 0.5 --axes ffn", "--axes: wanda prunes no channels"),
    ("--method flap --ratio 0.5 --axes hidden", "--axes: flap scores ffn, kv, not hidden"),
    ("--method flap --ratio 0.5 --axes heads", "--axes: 'heads' is not one of layers, hidden, ffn, kv"),
    ("--method flap --ratio 0.5 --allocation globl", "--allocation: 'globl' is not known; did you mean 'global'?"),
    ("--method minitron-width --ratio 0.5 --allocation global", "--allocation global: needs a --ratio, and --axes"),
    ("--method wanda --ratio 0.5 --tasks-data x", "--tasks-data: no task is measured"),
    ("--method minitron-depth --ratio 0.4 --task-limit 3", "--task-limit: no task is measured"),
    ("--method wanda --pattern 2-4", "--pattern: '2-4' is neither unstructured nor N:M"),
    ("--method wanda --pattern 4:2", "--pattern: '4:2' is neither"),
    ("--method wanda --pattern 3:5", "--pattern 3:5: the rows of self_attn.q_proj.weight have 32 weights"),
    ("--method magnitude --pattern 4:32", "the rows of mlp.down_proj.weight have 48 weights, not a multiple of 32"),
    ("--method shortgpt --pattern 2:4", "--pattern: shortgpt removes layers, not weights"),
    ("--method shortgpt --ratio 0.999", "--ratio 0.999: of 5 layers it would keep 0; possible: 0.2, 0.4, 0.6, 0.799"),
    ("--method shortgpt --ratio 0.01", "--ratio 0.01: of 5 layers it would keep 5; possible: 0.2"),
    ("--method minitron-width --ratio 0.999", "--ratio 0.999: too large; narrowing this model in steps of 4 hidden"),
    ("--method flap --ratio 0.999 --axes kv", "in steps of 1 KV head removes"),
    ("--method shortgpt --shape layers=6", "--shape: layers=6 is not between 1 and the model's 5"),
    ("--method shortgpt --shape layers=0", "--shape: layers must be a whole number above zero, got 0"),
    ("--method shortgpt --shape layers=5", "--shape: is the model's own shape"),
    ("--method shortgpt --shape hidden=16", "--shape: shortgpt does not change hidden"),
    ("--method shortgpt --shape layer=3", "--shape: 'layer' is not a size; did you mean 'layers'?"),
    ("--method flap --shape heads=3", "--shape: heads=3 splits a KV group: 2 query heads share each KV head"),
    ("--method flap --shape heads=2,kv_heads=2", "so 2 KV heads go with 4 query heads"),
    ("--method flap --shape layers=3", "--shape: flap does not change layers"),
    ("--method wanda --shape ffn=8", "--shape: wanda zeroes single weights"),
    ("--method wanda --ratio 0", "--ratio: '0' is not a ratio between 0 and 1"),
    ("--method wanda --ratio 50", "--ratio: '50' is not a ratio between 0 and 1, such as 0.5 or 50%"),
    ("--method wanda --sparsity 0.5", "--sparsity is not an option; did you mean '--ratio'?"),
    ("--method wanda --model x", "--model is not an option: name MODEL without it"),
    ("--method wanda --ratio nan", "--ratio: 'nan' is not a ratio between 0 and 1"),
    ("--method wanda --ratio 0.5 --device tpu", "--device: 'tpu' is unknown"),
]


@pytest.mark.parametrize(("asked", "part"), REFUSED, ids=[asked for asked, _ in REFUSED])
def test_what_is_refused(asked: str, part: str, call: Callable[..., Call], world: Path, tmp_path: Path) -> None:
    before = sorted(world.rglob("*"))
    refused(call(f"prune {{w}}/model {{o}} {asked}{TEXT_AT}"), part)
    assert sorted(world.rglob("*")) == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "part"),
    [
        # Each is wrong in all that comes after, which is looked at later.
        ("prune {w}/none {w}/model --method wnda --ratio 5e-1 --option a=b --calibration x:y", "'wnda'"),
        (
            "prune {w}/none {w}/model --method wanda --option a=b --shape layers=3 --calibration x:y",
            "--option: wanda has no option 'a'",
        ),
        ("prune {w}/none {w}/model --method wanda --shape layers=3 --calibration x:y", "--shape: wanda"),
        (
            "prune {w}/none {w}/model --method wanda --ratio 0.5",
            "--calibration: wanda is scored on text; name a source",
        ),
        ("prune {w}/none {w}/model --method shortgpt --ratio 0.999 --calibration x:y", "no such directory"),
        ("prune {w}/model {w}/model --method shortgpt --ratio 0.999 --calibration x:y", "it would keep 0"),
        ("prune {w}/model {w}/model --method shortgpt --ratio 0.4 --calibration x:y", "already exists"),
        ("prune {w}/model {o} --method shortgpt --ratio 0.4 --calibration x:y", "'x:y' is not a source"),
        ("prune {w}/model {o} --method shortgpt --ratio 0.4 --calibration text:{w}/none.txt", "no such file"),
        (
            "prune {w}/model {o} --method wanda --ratio 0.5 --calibration text:{w}/short.txt",
            "less than one calibration",
        ),
    ],
)
def test_the_cheapest_check_comes_first(line: str, part: str, call: Callable[..., Call], tmp_path: Path) -> None:
    found = call(line)
    assert found.code == 2 and found.err.splitlines()[-1].startswith("secateur: error: ") and part in found.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["out", "deep/er/out", "../model/out"])
def test_nothing_is_written_into_the_model(inside: str, call: Callable[..., Call], world: Path, tmp_path: Path) -> None:
    model = shutil.copytree(world / "model", tmp_path / "model")
    before = files(model)
    refused(
        call(f"prune {{m}} {model}/{inside} --method magnitude --ratio 0.5", model), "lies in the model's directory"
    )
    (tmp_path / "link").symlink_to(model)
    refused(call(f"prune {{m}} {tmp_path}/link/{inside} --method magnitude --ratio 0.5", model), "lies in the model's")
    refused(call("prune {m} {m} --method magnitude --ratio 0.5", model), "already exists and is not empty")
    assert files(model) == before and sorted(p.name for p in tmp_path.iterdir()) == ["link", "model"]


def test_an_output_that_is_a_file(call: Callable[..., Call], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    refused(call("prune {w}/model {o} --method magnitude --ratio 0.5"), "out: is a file; name a new directory")
    assert (tmp_path / "out").read_text() == "precious"


def test_a_loss_of_few_tokens_says_so(call: Callable[..., Call], tmp_path: Path) -> None:
    line = "eval {w}/model --data text:{w}/text.txt --json --seqlen 16 "
    (few,) = call(line + "--windows 6").answer["notes"]
    assert few == "loss: measured on only 90 predicted tokens: the figure may be far off; measure on more text"
    enough = call(line + "--windows 67").answer
    assert (enough["results"][0]["measurements"][0]["tokens"], enough["notes"]) == (1005, [])
    assert f"\nnote: {few}" in call((line + "--windows 6").replace("--json", "")).out
    assert "note: " not in call((line + "--windows 67").replace("--json", "")).out


def test_a_loss_of_less_than_a_window_says_so(call: Callable[..., Call], world: Path, tmp_path: Path) -> None:
    model = shutil.copytree(world / "model", tmp_path / "model")
    edit_config(model, max_position_embeddings=4096)
    line = "eval {m} --data text:{w}/text.txt --json --windows 1 --seqlen "
    whole = call(line + "1024", model).answer
    assert (whole["results"][0]["measurements"][0]["tokens"], whole["notes"]) == (1023, [])
    short = call(line + "4096", model).answer
    assert 1000 < short["results"][0]["measurements"][0]["tokens"] < 4095
    assert short["notes"] == ["the text is shorter than one window of 4,096 tokens; measure on more text"]


def test_a_text_shorter_than_a_window(call: Callable[..., Call], tmp_path: Path) -> None:
    line = "prune {w}/model {o}/deep/er --method wanda --ratio 0.5 --calibration text:{w}/short.txt --seqlen 64"
    refused(call(line), "less than one calibration window of 64; give more text or a smaller --seqlen")
    assert list(tmp_path.iterdir()) == []


def edit_tensors(directory: Path, name: str, value: float) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[3:4].fill_(value)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "method",
    [
        "random-depth",
        "shortgpt",
        "minitron-depth",
        "random-width",
        "minitron-width",
        "flap",
        "llm-pruner",
        "magnitude",
        "wanda",
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.4.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_not_finite(
    name: str, method: str, call: Callable[..., Call], world: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(world / "model", tmp_path / "model")
    edit_tensors(model, name, float("nan") if method < "n" else float("inf"))
    text = "" if method in UNCALIBRATED else TEXT_AT
    refused(call(f"prune {{m}} {{o}} --method {method} --ratio 0.4{text}", model), f"{model}: {name} holds NaN or inf")
    assert list(tmp_path.iterdir()) == [model]


def test_inspecting_weights_that_are_not_finite(call: Callable[..., Call], world: Path, tmp_path: Path) -> None:
    assert call("inspect {w}/model --json").answer["not_finite"] == []
    assert "damaged" not in call("inspect {w}/model").out
    model = shutil.copytree(world / "model", tmp_path / "model")
    names = ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"]
    for name in names:
        edit_tensors(model, name, float("nan"))
    assert sorted(call("inspect {m} --json", model).answer["not_finite"]) == names
    assert " and 1 more: NaN or infinity among the weights; prune refuses them" in call("inspect {m}", model).out


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def point_outside(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../model/model.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("model", lambda d: truncate(d / "model.safetensors"), "probably truncated"),
    "truncated shard": ("sharded", lambda d: truncate(shards(d)[1]), "probably truncated"),
    "missing shard": ("sharded", lambda d: shards(d)[1].unlink(), "this shard is missing"),
    "index outside": ("sharded", point_outside, "'../model/model.safetensors', which is not a file in the same"),
    "unknown family": ("model", lambda d: edit_config(d, model_type="gpt2"), "model_type 'gpt2' is not a known family"),
    "no config": ("model", lambda d: (d / "config.json").unlink(), "config.json: no such file"),
}


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints(case: str, method: str, call: Callable[..., Call], world: Path, tmp_path: Path) -> None:
    name, damage, part = DAMAGE[case]
    model = shutil.copytree(world / name, tmp_path / "damaged")
    damage(model)
    refused(call(f"prune {{m}} {{o}} --method {method} --ratio 0.5{TEXT_AT}", model), part)
    assert list(tmp_path.iterdir()) == [model]


def test_a_tokenizer_larger_than_the_embedding(call: Callable[..., Call], world: Path, tmp_path: Path) -> None:
    small = tiny_llama(tmp_path)  # 61 tokens
    for path in (world / "model").glob("token*"):
        shutil.copy(path, small)
    line = "prune {m} {o} --method wanda --ratio 0.5 --calibration "
    refused(
        call(line + "text:{w}/text.txt --seqlen 8", small), "but the embedding has 61 rows; take it out of the text"
    )
    refused(call(line + "tokens:{w}/ids.npy", small), "holds the id 95, but the model's ids are 0 to 60")
    answer = call("prune {m} {o} --method magnitude --ratio 0.5", small)
    assert answer.code == 0 and "its tokenizer has ids up to 261, and the embedding 61 rows" in answer.err
    shutil.rmtree(tmp_path / "out")
    for path in small.glob("token*"):
        path.unlink()
    refused(call(line + "tokens:{w}/ids.npy", small), "holds the id 95, but the model's ids are 0 to 60")
    assert list(tmp_path.iterdir()) == [small]


def test_the_model_is_left_as_it_is(call: Callable[..., Call], world: Path) -> None:
    before = files(world / "model")
    assert call(PRUNE + "--method sparsegpt --ratio 0.5" + TEXT_AT).code == 0
    assert files(world / "model") == before


def test_help_teaches_and_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom secateur.cli import main\ntry:\n    main(['prune', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'transformers', 'pydantic'} & set(sys.modules), sorted(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in METHODS:
        assert f"    {name} " in shown
    for part in ("--option order=first|second|mixed", "examples:", "--pattern 2:4", "tokens:ids.npy"):
        assert part in shown


def test_examples_of_the_manual_are_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every example gets as far as the checkpoint, which is not there."""
    examples = [
        line.strip()
        for line in (manual.prune_epilog() + manual.SHAPES_EPILOG).splitlines()
        if line.startswith("  secateur ")
    ]
    assert len(examples) == 21
    for line in examples:
        parts = line.partition("   ")[0].split()[1:]
        missing = [str(tmp_path / "none") if part in ("DIR", "config.json") else part for part in parts]
        assert main(missing) == 2
        error = capsys.readouterr().err
        assert "no such directory" in error or "no such file" in error, (line, error)
