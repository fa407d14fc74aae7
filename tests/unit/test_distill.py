"""Distillation as a training objective: models of all sizes and families, the run, the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from family_configs import FAMILY_CONFIGS
from helpers import edit_config, files, hf, tiny_family, tiny_llama, token_corpus, windows
from secateur.cli import main
from secateur.config import parse
from secateur.data.tokenizer import train_tokenizer
from secateur.errors import UserError
from secateur.losses.next_token import IGNORE_INDEX, model_loss
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.shapes import Shape, teacher_flops, train_flops
from secateur.training.distill import Distillation, check_teacher
from secateur.training.init import stored_weights
from secateur.training.parallel import Execution, TrainModule, place_model, place_teacher
from secateur.training.recipe import Distill

#: what differs from the student in a teacher
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden": ("llama", {"hidden_size": 72, "head_dim": 12}),
    "layers": ("llama", {"num_hidden_layers": 7}),
    "ffn": ("llama", {"intermediate_size": 100}),
    "heads": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "tied": ("llama-tied", {}),
    "family": ("gemma3-untied", {"final_logit_softcapping": 2.0}),
}


def by_hand(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, spec: Distill) -> Tensor:
    """The loss of each token, over whole logits and all ids."""
    s, t = (model(input_ids=ids, use_cache=False).logits[:, :-1] for model in (student, teacher))
    heat = spec.temperature
    p, q = (z.detach().div(heat).log_softmax(2) if z is t else z.div(heat).log_softmax(2) for z in (t, s))
    divergence = heat**2 * kl_div(q, p, log_target=True, reduction="none").sum(2)
    usual = cross_entropy(s.transpose(1, 2), ids[:, 1:], reduction="none")
    return spec.alpha * divergence + (1 - spec.alpha) * usual


def placed(directory: Path, execution: Execution | None = None) -> PreTrainedModel:
    checkpoint = Checkpoint(directory)
    skin = skeleton(checkpoint.config, directory)
    return place_teacher(skin, stored_weights(checkpoint), execution or Execution())


def distilled(student: Path, teacher: Path, execution: Execution | None = None, **options: Any) -> TrainModule:
    execution = execution or Execution()
    checkpoint = Checkpoint(student)
    objective = Distillation(Distill(**options), placed(teacher, execution))
    skin = skeleton(checkpoint.config, student)
    return place_model(skin, stored_weights(checkpoint), execution, objective)


# --- losses


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "alpha": 0.5}], ids=str)
def test_teachers_that_differ(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    family, sizes = TEACHERS[name]
    directories = tiny_family(tmp_path, "llama"), tiny_family(tmp_path, family, seed=1, **sizes)
    taught, ids = distilled(*directories, **options).train(), windows(4, 12)
    total, each, _ = taught(ids)
    (total / 44).backward()
    student, teacher = (hf(directory) for directory in directories)
    wanted = by_hand(student, teacher, ids, Distill(**options))
    (wanted.sum() / 44).backward()
    torch.testing.assert_close(each, wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.detach(), each.sum())
    for parameter, value in student.named_parameters():
        torch.testing.assert_close(taught.model.get_parameter(parameter).grad, value.grad, rtol=1e-3, atol=1e-5)


#: every family in both types; every other one with all ids apart in one type and the likeliest apart in the other
ONESELF = [
    (family, dtype, None if (number + half) % 2 else 7)
    for number, family in enumerate(FAMILY_CONFIGS)
    for half, dtype in enumerate(("float32", "bfloat16"))
]


@pytest.mark.parametrize(("family", "dtype", "top_k"), ONESELF)
def test_nothing_is_left_to_learn_of_oneself(family: str, dtype: Any, top_k: int | None, tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, family)
    taught = distilled(directory, directory, Execution(dtype=dtype), top_k=top_k).train()
    total, each, _ = taught(windows(4, 12))
    total.backward()
    if dtype == "bfloat16" and family.startswith(("olmo", "ernie4_5")):
        # They rotate in float32, and a student's blocks are handed rotations in bfloat16.
        assert float(each.abs().mean()) < 0.05
        return
    assert not each.any() and float(total.detach()) == 0
    assert not any(p.grad is not None and bool(p.grad.any()) for p in taught.trainable_parameters().values())


def test_ignored_targets_and_documents(tmp_path: Path) -> None:
    directories = tiny_family(tmp_path, "llama"), tiny_family(tmp_path, "qwen3", seed=1)
    taught, ids = distilled(*directories, temperature=2.0, alpha=0.5).train(), windows(3, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(3, 8)  # two texts in a window
    targets = ids[:, 1:].clone()
    targets[:, 2] = IGNORE_INDEX
    total, each, _ = taught(ids, positions, targets)
    apart = [taught(part)[1] for part in (ids[:, :3], ids[:, 3:])]
    torch.testing.assert_close(each, torch.cat([apart[0], torch.zeros(3, 1), apart[1]], dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total.detach(), each.sum())


def test_in_evaluation_it_is_the_usual_loss_and_the_teacher_rests(tmp_path: Path) -> None:
    taught = distilled(tiny_family(tmp_path, "llama"), tiny_family(tmp_path, "olmo2", seed=1), alpha=0.5)
    asked: list[int] = []
    assert isinstance(taught.objective, Distillation)
    taught.objective.teacher.get_decoder().register_forward_pre_hook(lambda *_: asked.append(1))
    ids = windows(4, 12)
    with torch.no_grad():
        each = taught.eval()(ids)[1]
        assert torch.equal(each, model_loss(taught.model, ids)[1]) and not asked
        assert not torch.equal(each, taught.train()(ids)[1]) and asked == [1]


def test_the_teacher_is_no_part_of_what_is_learned(tmp_path: Path) -> None:
    taught = distilled(tiny_family(tmp_path, "llama"), tiny_family(tmp_path, "llama", seed=1))
    assert list(taught.trainable_parameters()) == [name for name, _ in taught.model.named_parameters()]
    assert isinstance(taught.objective, Distillation)
    for mode in (taught.train(), taught.eval().train(), taught.train(True)):
        assert mode.training and mode.model.training and mode.objective.training
        assert not any(module.training for module in taught.objective.teacher.modules())
    assert taught.objective.state_dict() and not any(p.requires_grad for p in taught.objective.parameters())


def test_a_teacher_is_held_in_the_type_that_is_computed_in(tmp_path: Path) -> None:
    directory = tiny_family(tmp_path, "gemma3")
    wide, narrow = placed(directory), placed(directory, Execution(dtype="bfloat16", recompute=True))
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in narrow.buffers()} == {torch.float32}  # rotations, scales
    assert all(torch.equal(narrow.get_parameter(n), p.bfloat16()) for n, p in wide.named_parameters())


# --- whom one can learn from


def with_tokenizer(directory: Path, text: str) -> Path:
    train_tokenizer([text], 260).save_pretrained(directory)
    return directory


def test_who_cannot_teach(tmp_path: Path) -> None:
    student = Checkpoint(tiny_family(tmp_path, "llama", vocab_size=270))
    teach = lambda teacher, sequence=64: check_teacher(  # noqa: E731
        Checkpoint(teacher), student.shape, student.directory, sequence
    )
    other = tiny_family(tmp_path, "qwen3", vocab_size=271)
    with pytest.raises(UserError, match=r"its vocabulary is 271, the student's 270; name a teacher with"):
        teach(other)
    teacher = tiny_family(tmp_path, "qwen3", seed=1, vocab_size=270)
    teach(teacher)
    with pytest.raises(UserError, match=r"it has 64 positions, fewer than sequence=65; set sequence=64"):
        teach(teacher, 65)
    with_tokenizer(student.directory, "one two three ")
    teach(teacher)  # of which nothing is known but its size
    with_tokenizer(teacher, "one two three ")
    teach(teacher)
    edit = json.loads((teacher / "tokenizer.json").read_text())
    (teacher / "tokenizer.json").write_text(json.dumps({**edit, "truncation": None}, indent=1))
    teach(teacher)  # written otherwise, but with the same tokens
    with_tokenizer(teacher, "something else entirely ")
    with pytest.raises(UserError, match="under one id; name a teacher with the student's tokenizer"):
        teach(teacher)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"temperature": 0}, "temperature: should be greater than 0"),
        ({"temperature": float("inf")}, "temperature: should be a finite number"),
        ({"alpha": 0.0}, "alpha: should be greater than 0"),
        ({"alpha": 1.5}, "alpha: should be less than or equal to 1"),
        ({"top_k": 0}, "top_k: should be greater than 0"),
        ({"top_k": 2.5}, "top_k"),
        ({"kind": "distil"}, "did you mean 'distill'"),
        ({"temprature": 2}, "did you mean 'temperature'"),
    ],
)
def test_specs_are_strict(raw: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse(Distill, raw, origin="objective")


# --- the verb


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Path]:
    """A student, a sparse one, a larger teacher and data."""
    (tmp_path / "corpus").mkdir()
    found = {
        "student": tiny_llama(tmp_path),
        "sparse": tmp_path / "sparse",
        "teacher": tiny_family(tmp_path, "qwen3", seed=7),
        "corpus": token_corpus(tmp_path / "corpus", tokens=3000, vocabulary=61),
    }
    prune = ["prune", str(found["student"]), str(found["sparse"]), "--method", "magnitude", "--pattern", "2:4"]
    assert main(prune) == 0
    return found


def command(world: dict[str, Path], out: Path, *options: str, init: str = "student") -> list[str]:
    recipe = ["--set", "sequence=16", "--set", "tokens_per_step=256", "--set", "peak_rate=3e-3", "--points", "2"]
    data = ["--tokens", "2000", "--data", f"shards:{world['corpus']}", "--heldout-windows", "3"]
    return ["train", str(out), "--init", str(world[init]), *data, *recipe, *options]


def taught(world: dict[str, Path], out: Path, *options: str, **kind: str) -> list[str]:
    return command(world, out, "--teacher", str(world["teacher"]), *options, **kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run(dtype: str, world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = files(world["teacher"]), tmp_path / "out"
    options = ["--alpha", "0.5", "--temperature", "2", "--top-k", "9", "--dtype", dtype, "--keep", "9"]
    assert main(taught(world, out, *options, "--json")) == 0
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert files(world["teacher"]) == before
    student, teacher = (Checkpoint(world[name]) for name in ("student", "teacher"))
    theirs = 2000 * teacher.shape.forward_flops(16)
    assert answer["teacher_flops"] == theirs == teacher_flops(teacher.shape, 2000, 16)
    assert answer["flops"] == theirs + train_flops(student.shape, 2000, 16)
    assert "distilled from" in told.err
    record = json.loads((out / "train.json").read_text())
    spec = {"kind": "distill", "temperature": 2.0, "alpha": 0.5, "top_k": 9, "teacher": teacher.digest}
    assert record["asked"]["objective"] == spec and record["teacher_flops"] == theirs
    assert json.loads((out / "secateur.json").read_text())["objective"] == spec
    assert "distilled at temperature 2" in (out / "README.md").read_text()
    assert list(load_file(out / "model.safetensors")) == list(load_file(world["student"] / "model.safetensors"))


def test_what_is_said_of_a_run(world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(taught(world, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "of them the teacher's" in said
    assert main(command(world, tmp_path / "plain", "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "teacher_flops" not in answer
    assert "objective" not in json.loads((tmp_path / "plain" / "train.json").read_text())["asked"]


def test_a_student_comes_nearer_to_its_teacher(world: dict[str, Path], tmp_path: Path) -> None:
    assert main(taught(world, tmp_path / "out", "--set", "peak_rate=1e-2")) == 0
    entries = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_held_out_losses_are_those_of_the_language_model(world: dict[str, Path], tmp_path: Path) -> None:
    """A model that learns from itself stays as it is, and its held-out loss is that of any other run's start."""
    itself = ["--teacher", str(world["student"]), "--set", "weight_decay=0"]
    assert main(command(world, tmp_path / "itself", *itself)) == 0
    assert main(command(world, tmp_path / "plain")) == 0
    curves = [json.loads((tmp_path / n / "train.json").read_text())["result"]["curve"] for n in ("itself", "plain")]
    assert [point["loss"] for point in curves[0]] == [curves[1][0]["loss"]] * 3
    assert [point["training_loss"] for point in curves[0][1:]] == [0.0, 0.0]
    after = load_file(tmp_path / "itself" / "model.safetensors")
    assert all(torch.equal(after[n], t) for n, t in load_file(world["student"] / "model.safetensors").items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_hold(dtype: str, world: dict[str, Path], tmp_path: Path) -> None:
    assert main(taught(world, tmp_path / "out", "--dtype", dtype, init="sparse")) == 0
    after, before = (load_file(d / "model.safetensors") for d in (tmp_path / "out", world["sparse"]))
    pruned = [name for name in before if name.endswith("_proj.weight")]
    assert pruned and all(torch.equal(after[n] == 0, before[n] == 0) for n in pruned)
    assert not any(torch.equal(after[n], before[n].to(after[n].dtype)) for n in pruned)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_on_at_the_same_bits(
    dtype: str, world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--save-every", "3", "--keep", "9", "--alpha", "0.5", "--top-k", "5", "--dtype", dtype]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(taught(world, whole, *options)) == 0
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("secateur.training.job._write", killed)
        assert main(taught(world, cut, *options)) == 130
    steps = sorted((tmp_path / "cut.partial" / "work" / "checkpoints").glob("step-*"))
    saved = load_file(next(steps[0].glob("*.safetensors")))
    own = {name.partition(".")[2] for name in saved}
    assert own == set(load_file(whole / "model.safetensors"))  # weights and moments of the student, nothing else
    for later in steps[1:]:
        shutil.rmtree(later)
    capsys.readouterr()
    for other, word in (
        (command(world, cut, *options[:4], *options[8:]), "--teacher, --temperature, --alpha or --top-k"),
        (taught(world, cut, *options, "--temperature", "3"), "temperature was 1.0, is now 3.0"),
        (taught(world | {"teacher": world["student"]}, cut, *options), "--teacher, --temperature"),
    ):
        assert main(other) == 2
        assert word in capsys.readouterr().err.splitlines()[-1]
    assert main(taught(world, cut, *options)) == 0
    for name, content in files(whole).items():
        if name not in ("metrics.jsonl", "README.md"):  # times of steps; the directory's name
            assert (cut / name).read_bytes() == content, name


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--alpha", "0.5"], "--alpha: says how to distil; name a teacher to distil from with --teacher"),
        (["--temperature", "2"], "--temperature: says how to distil"),
        (["--top-k", "5"], "--top-k: says how to distil"),
        (["--teacher", "nowhere"], "nowhere: no such directory"),
        (["--teacher", "TEACHER", "--alpha", "0"], "alpha: should be greater than 0"),
        (["--teacher", "TEACHER", "--alpha", "2"], "alpha: should be less than or equal to 1"),
        (["--teacher", "TEACHER", "--temperature", "0"], "temperature: should be greater than 0"),
        (["--teacher", "TEACHER", "--temperature", "nan"], "temperature: should be"),
        (["--teacher", "TEACHER", "--temperature", "x"], "invalid float value: 'x'"),
        (["--teacher", "TEACHER", "--top-k", "0"], "'0' is not a whole number above zero"),
        (["--teacher", "OTHER"], "its vocabulary is 77, the student's 61"),
        (["--teacher", "SHORT"], "it has 8 positions, fewer than sequence=16; set sequence=8"),
        (["--teachers", "x"], "did you mean '--teacher'"),
    ],
)
def test_bad_input(
    options: list[str], told: str, world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"TEACHER": world["teacher"]}
    if "OTHER" in options:
        places["OTHER"] = tiny_family(tmp_path, "llama", seed=3, vocab_size=77)
    if "SHORT" in options:
        places["SHORT"] = tiny_family(tmp_path, "llama", seed=1)
        edit_config(places["SHORT"], max_position_embeddings=8)
    before = sorted(tmp_path.iterdir())
    given = [str(places.get(option, option)) for option in options]
    capsys.readouterr()
    assert main(command(world, tmp_path / "out", *given)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("secateur: error: ") and told in line
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_written_into_the_teacher(
    world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(taught(world, world["teacher"] / "out")) == 2
    assert "which is read; name a directory outside it" in capsys.readouterr().err


def test_flops_of_a_teacher() -> None:
    shape = Shape(hidden=64, ffn=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocabulary=500)
    assert teacher_flops(shape, 1000, 32) == pytest.approx(train_flops(shape, 1000, 32) / 3)
