"""Pruning by streaming: under a memory limit, after a kill, for several ratios at once, with states on disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import files, killed_behind, tiny_family, tiny_llama, windows
from secateur.calibration import place as evidence
from secateur.calibration.block_walk import BlockWalk
from secateur.calibration.checksum import SIZE, checksum
from secateur.calibration.journal import Journal, StateStore
from secateur.calibration.malloc import reserve_heap
from secateur.calibration.place import Place
from secateur.cli import main, manual
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.model.checkpoint_writing import write_checkpoint
from secateur.model.safetensors_io import Stored, TensorFile, write_tensors
from secateur.model.shapes import Shape
from secateur.pruning.memory_estimate import estimate_memory
from secateur.pruning.target import Target

METHODS = ["shortgpt", "minitron-depth", "shortened-llama", "minitron-width", "wanda-sp", "flap", "wanda", "sparsegpt"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_llama(folder).rename(folder / "model")
    np.save(folder / "ids.npy", windows(6).numpy())
    return folder


def prune(world: Path, out: Path, method: str, *more: str, ratio: str = "0.5") -> int:
    calibration = ["--calibration", f"tokens:{world / 'ids.npy'}", "--batch", "2"]
    return main(["prune", str(world / "model"), str(out), "--method", method, "--ratio", ratio, *calibration, *more])


def test_a_file_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(7).to(torch.bool),
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "half": torch.randn(3).half(),
        "long": torch.arange(4),
        "c": torch.randn(2, 2),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    write_tensors(tmp_path / "ours", [Stored.of(n, t) for n, t in tensors.items()], {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    file = TensorFile(tmp_path / "theirs")
    assert sorted(file.names) == sorted(tensors)
    assert all(torch.equal(file.tensor(n), t) and file.dtype(n) == t.dtype for n, t in tensors.items())
    assert torch.equal(file.rows("a", 1, 3), tensors["a"][1:3])


def test_a_tensor_that_is_not_what_was_said_is_refused(tmp_path: Path) -> None:
    for stored in (
        Stored("x", torch.float32, (2, 2), lambda: (torch.zeros(2, 3),)),
        Stored("x", torch.float32, (2, 2), lambda: (torch.zeros(2, 2).half(),)),
        Stored("x", torch.float32, (2, 2), lambda: (torch.zeros(1, 2),)),
    ):
        with pytest.raises(ValueError, match="x "):
            write_tensors(tmp_path / "x", [stored])


def test_a_journal_forgets_steps_that_were_not_finished(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.put(0, {"mask.a": torch.ones(2)})
    journal.finish(0)
    journal.put(1, {"mask.b": torch.zeros(2)})
    again = Journal(tmp_path)
    assert (
        again.finished_steps == 1
        and dict(again.with_prefix("mask.")).keys() == {"a"}
        and "b" not in again.with_prefix("mask.")
    )
    journal.finish(1)
    journal.close()
    assert Journal(tmp_path).complete and len(Journal(tmp_path).with_prefix("mask.")) == 2


def test_a_damaged_journal_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for damage in (b"", b"\x10", b"\xff" * 64, None):
        journal = Journal(tmp_path)
        for step in range(2):
            journal.put(step, {f"mask.{step}": torch.ones(2)})
            journal.finish(step)
        file = tmp_path / "step-00000.safetensors"
        file.unlink() if damage is None else file.write_bytes(damage)
        again = Journal(tmp_path)
        assert (again.finished_steps, again.complete, len(again)) == (0, False, 0)
        assert "damaged" in capsys.readouterr().err
        assert Journal(tmp_path).finished_steps == 0 and "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize("marker", ["-1", "9", "", "x"])
def test_a_note_that_cannot_be_begins_anew(marker: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    journal = Journal(tmp_path)
    journal.put(0, {"mask": torch.ones(2)})
    journal.finish(0)
    (tmp_path / "finished").write_text(marker)
    again = Journal(tmp_path)
    assert (again.finished_steps, len(again)) == (0, 0) and "starts over" in capsys.readouterr().err


def test_a_checksum_knows_any_change() -> None:
    for count in (0, 5, 2**20, 2**20 + 3, 3 * 2**20 + 8):
        data = torch.randint(0, 256, (count,), dtype=torch.uint8)
        known = checksum(data)
        assert len(known) == SIZE and checksum(data.clone()) == known != checksum(torch.nn.functional.pad(data, (0, 1)))
        for at in {0, count // 2, count - 1} if count else ():
            data[at] ^= 16
            assert checksum(data) != known
            data[at] ^= 16
        if count:
            assert checksum(data[:-1].clone()) != known


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "states truncated": ("states/*/0/0-*", lambda path: path.write_bytes(path.read_bytes()[:-40])),
    "states empty": ("states/*/0/0-*", lambda path: path.write_bytes(b"")),
    "states flipped": ("states/*/0/0-*", lambda path: flip(path, 100)),
    "states of others": ("states/*/0/0-*", lambda path: path.write_bytes(os.urandom(path.stat().st_size))),
    "step flipped": ("*/step-00001.safetensors", lambda path: flip(path, -3)),
    "step of others": ("*/step-00001.safetensors", lambda path: shutil.copy(path.with_stem("step-00000"), path)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_does_not_go_on_with_what_is_damaged(
    damage: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert prune(world, tmp_path / "whole", "wanda") == 0
    with killed_behind(monkeypatch, 1):
        assert prune(world, tmp_path / "out", "wanda", "--states", "disk") == 130
    pattern, damaging = DAMAGE[damage]
    damaging(next((tmp_path / "out.partial" / "work").glob(pattern)))
    capsys.readouterr()
    assert prune(world, tmp_path / "out", "wanda", "--states", "disk", "--resume") == 0
    said = "run once more" if damage.startswith("states") else "starts over"
    assert said in capsys.readouterr().err
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_states_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    store, states = StateStore(tmp_path), torch.randn(2, 3, 4).to(torch.bfloat16)
    unnamed, named = store.save(states), store.save(states, "1-00000")
    assert torch.equal(unnamed, states) and torch.equal(named, states)
    assert [path.name for path in tmp_path.iterdir()] == ["1-00000"]
    found = StateStore(tmp_path).load("1-00000", states.shape, states.dtype)
    assert found is not None and torch.equal(found, states)


@pytest.mark.parametrize("states", ["ram", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_the_same_bytes(
    method: str,
    states: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert prune(world, tmp_path / "whole", method) == 0
    real, seen = Journal.finish, 0

    def killed(self: Journal, step: int) -> None:
        nonlocal seen
        real(self, step)
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateur.calibration.layer_removal.GROUP_BYTES", 1)  # so that removals have several steps
        patch.setattr(Journal, "finish", killed)
        whole_run_without_steps = prune(world, tmp_path / "out", method, "--states", states) == 0
    monkeypatch.setattr("secateur.calibration.layer_removal.GROUP_BYTES", 1)
    if not whole_run_without_steps:
        assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
        capsys.readouterr()
        assert prune(world, tmp_path / "out", method) == 2
        assert "--resume" in capsys.readouterr().err
        assert prune(world, tmp_path / "out", method, "--resume", ratio="0.25") == 2
        assert "an unfinished run with another request: --ratio, --shape, --pattern" in capsys.readouterr().err
        visited, blocks = [], BlockWalk.blocks

        def counted(self: BlockWalk, **options: object) -> Iterator[object]:
            for block in blocks(self, **options):  # type: ignore[arg-type]
                visited.append(block.index)
                yield block

        monkeypatch.setattr(BlockWalk, "blocks", counted)
        assert prune(world, tmp_path / "out", method, "--states", states, "--resume") == 0
        if states == "disk" and method != "minitron-depth":
            assert visited == [2, 3, 4]
    else:
        assert method == "shortened-llama"  # whose gradients come from a walk that is done anew
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("method", ["random-depth", "random-width", "random-weight"])
def test_a_killed_run_that_draws_draws_the_same_again(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["prune", str(world / "model"), "--method", method, "--ratio", "0.5"]
    assert main([*line, str(tmp_path / "whole")]) == 0
    with killed_behind(monkeypatch, 1):
        assert main([*line, str(tmp_path / "out")]) != 0
    assert main([*line, str(tmp_path / "out"), "--resume"]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("method", METHODS)
def test_several_ratios_give_what_each_gives_alone(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    starts, start = [], BlockWalk.start
    monkeypatch.setattr(BlockWalk, "start", lambda self, *a: (starts.append(1), start(self, *a))[1])
    assert prune(world, tmp_path / "both", method, "--json", ratio="0.25,0.5") == 0
    walks = len(starts)
    answer = json.loads(capsys.readouterr().out)
    assert [Path(one["out"]).name for one in answer["outputs"]] == ["ratio-0.25", "ratio-0.5"]
    for ratio in ("0.25", "0.5"):
        assert prune(world, tmp_path / ratio, method, ratio=ratio) == 0
        assert files(tmp_path / ratio) == files(tmp_path / "both" / f"ratio-{ratio}")
    depends = method in ("wanda", "sparsegpt", "wanda-sp", "minitron-depth")
    assert walks == (2 if depends else 1)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *(("wanda", "llama"), ("wanda", "olmo2")),
        *(("sparsegpt", "gemma3"), ("sparsegpt", "phi3")),
        *(("minitron-width", "olmo2"), ("minitron-width", "phi3")),
        *(("shortened-llama", "llama"), ("shortened-llama", "gemma3")),
        *(("minitron-depth", "gemma3"), ("minitron-depth", "phi3")),
    ],
)
def test_bfloat16_forwards_score_nearly_alike(family: str, method: str, tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, family)
    np.save(tmp_path / "ids.npy", windows(6).numpy())
    plans = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        line = ["prune", str(directory), str(out), "--method", method, "--ratio", "0.5", "--dtype", dtype]
        assert main([*line, "--calibration", f"tokens:{tmp_path / 'ids.npy'}"]) == 0
        plans[dtype] = load_file(out / "plan.safetensors")
        assert json.loads((out / "plan.json").read_text())["calibration"].get("dtype") == (
            None if dtype == "float32" else dtype
        )
    for name, wanted in plans["float32"].items():
        found = plans["bfloat16"][name]
        if name.startswith("mask."):
            assert (found == wanted).float().mean() > 0.9
        elif name.startswith("score."):
            assert torch.corrcoef(torch.stack([found, wanted]))[0, 1] > 0.9


def test_without_another_process_at_it(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import fcntl

    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prune(world, tmp_path / "out", "magnitude") == 2
    assert "another process" in capsys.readouterr().err
    assert prune(world, tmp_path / "out", "magnitude") == 0


LIMITED = """
import resource, sys
import accelerate, secateur.cli, secateur.cli.verbs.pruning
import transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
data = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData:"))
limit = 1024 * data + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(secateur.cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 0.38 GB in shards, of blocks of 13 MB."""
    return write_large(tmp_path_factory.mktemp("large"), layers=30)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with half of the layers."""
    return write_large(tmp_path_factory.mktemp("medium"), layers=15)


def write_large(out: Path, layers: int) -> Path:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers, "vocab_size": 2000}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=False)
    shape, generator = Shape.of_config(config, where="config"), torch.Generator().manual_seed(0)

    @cache
    def values(size: tuple[int, ...]) -> torch.Tensor:  # the same in every layer: drawing them takes seconds
        drawn = torch.randn(size, generator=generator) * 0.05 if len(size) > 1 else torch.ones(size)
        return drawn.to(torch.bfloat16)

    def stored(name: str, size: tuple[int, ...]) -> Stored:
        def make() -> tuple[torch.Tensor]:
            return (values(size),)

        return Stored(name, torch.bfloat16, size, make)

    tensors = [stored(name, shape.tensor_size(axes)) for name, axes in shape.family.outer.items()]
    for layer in range(shape.layers):
        for name, axes in shape.block_tensors().items():
            tensors.append(stored(shape.family.block_tensor(layer, name), shape.tensor_size(axes)))
    content = config.to_diff_dict() | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    write_checkpoint(out, content, tensors, provenance={}, card="", shard_bytes=2**26)
    np.save(out / "ids.npy", np.random.default_rng(0).integers(0, 2000, (4, 64)))
    return out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
@pytest.mark.parametrize(
    ("method", "model"),
    [("wanda", "large"), ("shortgpt", "large"), ("sparsegpt", "medium"), ("minitron-width", "medium")],
)
def test_a_checkpoint_is_pruned_in_a_fraction_of_its_size(
    method: str, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The process may take 170 MB more than after its imports, less than the model as it is stored.

    The larger model takes four times that in float32, and its masks take more. SparseGPT changes weights, slowly,
    and those of the smaller model take more.
    """
    directory: Path = request.getfixturevalue(model)
    checkpoint = Checkpoint(directory)
    limit = 170 * 2**20
    assert checkpoint.stored_bytes > limit * (2 if model == "large" else 1)
    assert 4 * checkpoint.shape.total > limit * (4 if model == "large" else 2)
    line = ["prune", str(directory), str(tmp_path / "out"), "--method", method, "--ratio", "0.5", "--states", "disk"]
    line += ["--calibration", f"tokens:{directory / 'ids.npy'}", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *line],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # each thread has memory of its own
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Checkpoint(tmp_path / "out").shape.layers == checkpoint.shape.layers // (2 if method == "shortgpt" else 1)


@pytest.mark.parametrize(("method", "masks"), [("shortgpt", 0), ("minitron-width", 0), ("magnitude", 2)])
def test_the_room_on_disk_is_that_of_what_is_written(method: str, masks: int, large: Path) -> None:
    checkpoint, found, target = Checkpoint(large), get_method(method), Target(ratio=0.5)
    after = target.shape(checkpoint.shape, found, method)
    needs = estimate_memory(found, checkpoint.shape, 4, 64, 4, torch.float32, checkpoint.stored_bytes, [after])
    assert needs.disk("ram") == pytest.approx(2 * after.total + masks * checkpoint.shape.block_weights, rel=0.01)


@pytest.mark.parametrize("method", ["llm-pruner", "shortened-llama", "shortgpt", "wanda-sp"])
def test_what_a_method_was_shown_of_a_block_is_gone_when_the_next_is_read(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[weakref.ref[Place]] = []
    places, read = evidence._places, BlockWalk._read_block

    def remembered(*arguments: Any) -> dict[str, list[Place]]:
        found = places(*arguments)
        shown.extend(weakref.ref(place) for several in found.values() for place in several)
        return found

    def looked(self: BlockWalk, index: int) -> dict[str, torch.Tensor]:
        assert all(place() is None for place in shown)
        return read(self, index)

    monkeypatch.setattr(evidence, "_places", remembered)
    monkeypatch.setattr(BlockWalk, "_read_block", looked)
    assert prune(world, tmp_path / "out", method) == 0 and shown


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
def test_under_a_limit_activations_stay_out_of_the_heap() -> None:
    """Whose holes a limit counts, so that a model of many layers would not fit where one of few does."""

    def in_heap() -> bool:
        with reserve_heap(2**22):
            activation = torch.ones(2**19)
        line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        return first <= activation.data_ptr() < last

    before = resource.getrlimit(resource.RLIMIT_DATA)
    if before[0] == resource.RLIM_INFINITY == resource.getrlimit(resource.RLIMIT_AS)[0]:
        assert in_heap()
    resource.setrlimit(resource.RLIMIT_DATA, (2**50, before[1]))
    try:
        assert not in_heap()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_too_little_memory_is_told_in_one_line(large: Path, tmp_path: Path) -> None:
    line = ["prune", str(large), str(tmp_path / "out"), "--method", "sparsegpt", "--ratio", "0.5", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(40 * 2**20), *line, "--calibration", f"tokens:{large / 'ids.npy'}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "out of memory; lower --batch, or take --states disk or --dtype" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "offered"),
    [
        ("eval", "lower --batch or --windows"),
        ("eval --data tokens:x.npy --batch=1", "take a machine with more"),
        ("prune", "lower --batch or --windows, or take --states disk or --dtype bfloat16"),
        ("prune --calibration tokens:x --states disk", "lower --batch, or take --dtype bfloat16"),
        ("prune --batch 1 --dtype bfloat16", "lower --windows, or take --states disk"),
        ("prune --batch 1 --windows 1 --states ram", "take --states disk or --dtype bfloat16"),
        ("prune --batch 16 --dtype=bfloat16 --states disk", "lower --batch or --windows"),
    ],
)
def test_what_is_offered_where_memory_is_short_is_not_done_already(given: str, offered: str) -> None:
    assert manual.memory_hint(given.split()) == offered


def test_where_the_note_of_what_was_asked_is_gone_the_way_out_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    work, note = tmp_path / "out.partial" / "work" / "layers", tmp_path / "out.partial" / "asked.json"
    work.mkdir(parents=True)
    (work / "finished").write_text("1")
    for content in (None, "{", "[]"):
        if content is not None:
            note.write_text(content)
        assert prune(world, tmp_path / "out", "shortgpt", "--resume") == 2
        assert capsys.readouterr().err.endswith(f"; delete {tmp_path / 'out.partial'} and start again\n")


def test_with_nothing_to_go_on_with_a_run_starts_and_says_so(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert prune(world, tmp_path / "out", "shortgpt", "--resume") == 0
    assert "--resume: there is no unfinished run" in capsys.readouterr().err
    assert prune(world, tmp_path / "other", "shortgpt") == 0
    assert "--resume" not in capsys.readouterr().err
