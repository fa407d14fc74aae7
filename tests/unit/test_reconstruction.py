"""Block reconstruction against a plain loop over modules, with every method, after a kill, and with bad inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import secateur
from expert_models import tiny_mixture
from helpers import calibration, files, hf, tiny_family, tiny_llama, windows
from secateur.calibration.journal import Journal
from secateur.cli import main
from secateur.errors import UserError
from secateur.methods.registry import get_method
from secateur.model.checkpoint import Checkpoint
from secateur.model.cut import CutCheckpoint
from secateur.model.live import cut_model
from secateur.model.plan import Plan, load_masks
from secateur.model.shapes import Shape
from secateur.pruning import block_reconstruction
from secateur.pruning.block_reconstruction import Schedule, reconstruct, reconstruct_plan
from secateur.pruning.cost import reconstruction_flops
from secateur.pruning.memory_estimate import estimate_memory, with_reconstruction
from secateur.pruning.pipeline import make_plan
from secateur.pruning.reconstruction import Reconstruction
from secateur.pruning.request import PruneRequest
from secateur.pruning.target import Target

METHODS = {
    **{name: {"pattern": "2:4"} for name in ("magnitude", "wanda", "sparsegpt", "random-weight")},
    **{name: {"ratio": 0.3} for name in ("minitron-width", "wanda-sp", "flap", "llm-pruner", "random-width")},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


def plan_of(directory: Path, method: str, ids: Tensor, **target: Any) -> tuple[Checkpoint, Plan]:
    checkpoint = Checkpoint(directory)
    return checkpoint, make_plan(checkpoint, method, Target.parse(**target), calibration(ids))


def naive_reconstruction(
    dense: PreTrainedModel, pruned: PreTrainedModel, masks: dict[str, Tensor], channels: Tensor, ids: Tensor, steps: int
) -> None:
    """Tune the blocks of a Llama in place; each step sees all windows."""
    places = torch.arange(ids.shape[1])[None]
    target, states = dense.model.embed_tokens(ids).detach(), pruned.model.embed_tokens(ids).detach()
    rotary, cut_rotary = dense.model.rotary_emb(target, places), pruned.model.rotary_emb(states, places)

    def attention(layer: Any, x: Tensor, angles: Any) -> Tensor:
        return x + layer.self_attn(layer.input_layernorm(x), position_embeddings=angles, attention_mask=None)[0]

    def whole(layer: Any, x: Tensor, angles: Any) -> Tensor:
        x = attention(layer, x, angles)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    for number, (full, cut) in enumerate(zip(dense.model.layers, pruned.model.layers, strict=True)):
        with torch.no_grad():
            middle, output = attention(full, target, rotary), whole(full, target, rotary)
        for run, goal, modules in (
            (attention, middle, (cut.input_layernorm, cut.self_attn)),
            (whole, output, (cut.post_attention_layernorm, cut.mlp)),
        ):
            tuned = {n: p for n, p in cut.named_parameters() if any(p is q for m in modules for q in m.parameters())}
            optimizer = torch.optim.AdamW([{"params": [p]} for p in tuned.values()], weight_decay=0.0)
            keep = {n: masks.get(f"model.layers.{number}.{n}", torch.ones_like(p)).bool() for n, p in tuned.items()}
            scales = [float(p.detach()[keep[n]].double().square().mean().sqrt()) for n, p in tuned.items()]
            for step in range(steps):
                loss = nn.functional.mse_loss(run(cut, states, cut_rotary), goal[..., channels])
                gradients = torch.autograd.grad(loss, list(tuned.values()))
                warm = max(1, round(steps / 10))
                share = min((step + 1) / warm, (steps - step) / max(1, steps - warm + 1))
                for (name, parameter), gradient, group, scale in zip(
                    tuned.items(), gradients, optimizer.param_groups, scales, strict=True
                ):
                    parameter.grad = gradient * keep[name]
                    group["lr"] = 0.02 * scale * share
                optimizer.step()
                for name, parameter in tuned.items():
                    parameter.data *= keep[name]
        with torch.no_grad():
            states, target = whole(cut, states, cut_rotary), output


@pytest.mark.parametrize(("method", "target"), [("wanda", {"ratio": 0.5}), ("minitron-width", {"ratio": 0.4})])
def test_it_is_the_plain_loop(method: str, target: Any, model: Path) -> None:
    ids = windows(4, 16)
    checkpoint, plan = plan_of(model, method, ids, **target)
    expected = cut_model(checkpoint, plan).requires_grad_(True)
    naive_reconstruction(hf(model), expected, dict(plan.masks), plan.keep_hidden, ids, 12)
    tuned = reconstruct_plan(checkpoint, plan, ids, Reconstruction(steps=12), held_out=0, batch=2)
    assert all(block["tuned"] for block in tuned.summary["reconstruction"]["blocks"])
    result, before = cut_model(checkpoint, tuned).state_dict(), cut_model(checkpoint, plan).state_dict()
    for name, weight in expected.state_dict().items():
        close = 1e-5 if name.startswith("model.layers.0.") else 1e-3  # rounding grows from block to block
        torch.testing.assert_close(result[name], weight, rtol=0, atol=close, msg=name)
        assert torch.equal(result[name], before[name]) != name.startswith("model.layers.")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_falls_on_windows_held_out(method: str, model: Path, tmp_path: Path) -> None:
    target: Any = METHODS[method]
    pruned = secateur.prune(
        model, tmp_path / "out", method=method, calibration=windows(16, 16), reconstruct=6, batch=4, **target
    )
    record = pruned.plan.summary["reconstruction"]
    assert record["held_out_windows"] == 2 and record["tokens"] == 6 * 14 * 16
    assert len(record["blocks"]) == 3
    for block in record["blocks"]:
        assert (
            block["tuned"] and block["held_out_after"] < block["held_out_before"] and block["after"] < block["before"]
        )
    weights = hf(tmp_path / "out").state_dict()
    masks = load_masks(tmp_path / "out")
    assert bool(masks) == ("pattern" in target)
    for name, mask in masks.items():
        assert not weights[name][~mask].any() and weights[name][mask].all()
    assert Checkpoint(tmp_path / "out").provenance["reconstruction"] == record  # type: ignore[index]
    assert "reconstructed: 6 steps" in (tmp_path / "out" / "README.md").read_text()


def test_flap_keeps_its_biases_beside_what_is_tuned(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path, num_hidden_layers=2, attention_bias=True, mlp_bias=True, dtype=torch.bfloat16)
    ids = windows(8, 16)
    common: Any = {"method": "flap", "ratio": 0.3, "calibration": ids}
    plain = secateur.prune(model, tmp_path / "plain", **common)
    tuned = secateur.prune(model, tmp_path / "tuned", reconstruct=4, **common)
    assert plain.plan.biases.keys() == tuned.plan.biases.keys() != set()
    for name, bias in plain.plan.biases.items():
        assert torch.equal(bias, tuned.plan.biases[name])
    first, second = (Checkpoint(tmp_path / name) for name in ("plain", "tuned"))
    for name in first.tensors():
        assert second.dtype_of(name) == torch.bfloat16
        if "layers" in name and not name.endswith("k_proj.bias"):  # which attention does not depend on
            assert not torch.equal(first.tensor(name), second.tensor(name)), name


def successors(model: PreTrainedModel, count: int, length: int, seed: int) -> Tensor:
    """Windows in which a token mostly fixes the one after the next: attention has to look back."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (count, length), generator=generator)
    for position in range(2, length):
        noise = torch.rand(count, generator=generator) < 0.1
        follows = (7 * ids[:, position - 2] + 3) % model.config.vocab_size
        ids[:, position] = torch.where(noise, ids[:, position], follows)
    return ids


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_the_loss_of_a_trained_model_falls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: Any = {"num_hidden_layers": 2, "vocab_size": 31, "hidden_size": 32, "intermediate_size": 64}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": None, "bos_token_id": None}
    trained: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    for step in range(150):
        loss_of(trained, successors(trained, 16, 16, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.eval()
    tuning, test = successors(trained, 32, 16, 1000), successors(trained, 32, 16, 1001)
    with torch.no_grad():
        dense = float(loss_of(trained, test))
        assert dense < 1.6  # against log 31 = 3.4
        for method, ratio in (("wanda", 0.7), ("minitron-width", 0.4)):
            common: Any = {"method": method, "ratio": ratio, "calibration": tuning}
            variants: tuple[dict[str, Any], ...] = ({}, {"reconstruct": 20})
            losses = [float(loss_of(secateur.prune(trained, **common, **more), test)) for more in variants]
            assert dense < losses[0] and losses[1] < losses[0] - 0.3 * (losses[0] - dense), (method, dense, losses)


def test_it_resumes_to_the_same_weights(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, how = windows(8, 16), Reconstruction(steps=3)
    checkpoint, plan = plan_of(model, "wanda", ids, ratio=0.5)
    pruned = CutCheckpoint(checkpoint, plan)
    whole, record = reconstruct(checkpoint, pruned, ids, how, held_out=1)
    finish, calls = Journal.finish, 0

    def interrupted(self: Journal, step: int) -> None:
        nonlocal calls
        finish(self, step)
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "finish", interrupted)
        reconstruct(checkpoint, pruned, ids, how, held_out=1, journal=Journal(tmp_path / "steps"))
    tuned_layers: list[int] = []
    tune = block_reconstruction._Tuner._tune
    monkeypatch.setattr(
        block_reconstruction._Tuner,
        "_tune",
        lambda self, block, *rest: (tuned_layers.append(block.index), tune(self, block, *rest))[1],
    )
    again, second = reconstruct(checkpoint, pruned, ids, how, held_out=1, journal=Journal(tmp_path / "steps"))
    assert tuned_layers == [2] and second == record and again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_the_command_resumes_and_repeats_to_the_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", windows(8, 16).numpy())

    def run(out: str, *more: str) -> int:
        line = [
            "prune",
            str(model),
            str(tmp_path / out),
            "--method",
            "magnitude",
            "--ratio",
            "0.5",
            "--reconstruct",
            "3",
        ]
        return main([*line, "--calibration", f"tokens:{tmp_path / 'ids.npy'}", *more])

    assert run("first") == 0 and run("second", "--states", "disk") == 0
    text = capsys.readouterr().out
    assert "tuned        3 steps of attention and of FFN" in text and "  block 2" in text
    finish = Journal.finish

    def interrupted(self: Journal, step: int) -> None:
        finish(self, step)
        if "reconstruct" in str(self.directory):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", interrupted)
        assert run("third") != 0
    assert run("third", "--resume", "--reconstruct-rate", "0.01") == 2
    assert "another request: --reconstruct or --reconstruct-rate" in capsys.readouterr().err
    assert run("third", "--resume") == 0
    assert files(tmp_path / "first") == files(tmp_path / "second") == files(tmp_path / "third")


def test_a_block_whose_error_grows_keeps_its_weights(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = windows(8, 16)
    checkpoint, plan = plan_of(model, "wanda", ids, ratio=0.5)
    tuned = reconstruct_plan(checkpoint, plan, ids, Reconstruction(steps=2, rate=50.0))
    blocks = tuned.summary["reconstruction"]["blocks"]
    assert not any(block["tuned"] for block in blocks) and not tuned.tuned
    assert all(block["held_out_after"] > block["held_out_before"] for block in blocks)
    assert capsys.readouterr().err.count("keeps its weights from before") == 3
    weights, record = reconstruct(checkpoint, checkpoint, ids, Reconstruction(steps=2))  # nothing is pruned
    assert [block["before"] for block in record["blocks"]] == [0.0] * 3 and not weights


def test_one_block_of_each_model_is_in_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present: list[tuple[int, int]] = []
    tune = block_reconstruction.tune_part

    def loaded(layers: Any) -> int:
        return sum(any(not p.is_meta for p in layer.parameters()) for layer in layers)

    def counted(self: Any, block: Any, *rest: Any) -> Any:
        monkeypatch.setattr(
            block_reconstruction,
            "tune_part",
            lambda *a, **k: (present.append((loaded(self.dense.layers), loaded(self.pruned.layers))), tune(*a, **k))[1],
        )
        return original(self, block, *rest)

    original = block_reconstruction._Tuner._tune
    monkeypatch.setattr(block_reconstruction._Tuner, "_tune", counted)
    ids = windows(4, 16)
    checkpoint, plan = plan_of(model, "magnitude", ids, ratio=0.5)
    reconstruct_plan(checkpoint, plan, ids, Reconstruction(steps=1))
    assert present == [(0, 1)] * 6  # two parts of three blocks; the dense block is gone by then


def test_the_estimate_has_moments_and_gradients_of_one_block() -> None:
    shapes = [Shape(4096, 14336, layers, 32, 8, 128, 128256) for layers in (8, 32)]
    needs = []
    for shape in shapes:
        plain = estimate_memory(get_method("magnitude"), shape, 0, 0, 1, torch.bfloat16, 1, [shape])
        needs.append(with_reconstruction(plain, shape, [shape], 128, 2048, 8, torch.bfloat16))
    ffn, block = 3 * 4096 * 14336, 3 * 4096 * 14336 + 2 * 4096 * 4096 * 5 // 4 + 2 * 4096
    assert needs[0].block == needs[1].block and needs[0].states == needs[1].states == 3 * 128 * 2048 * 4096 * 2
    assert needs[0].block >= 4 * block + 12 * ffn


def test_flops_are_those_of_the_passes() -> None:
    """Against a count of the products of all linears and of attention over the positions that a window sees."""
    before = Shape(64, 172, 3, 8, 4, 8, 100)
    after = before.narrowed("ffn", 80)
    context = 33

    def forward(shape: Shape) -> tuple[float, float]:
        attention = 2 * 64 * (64 + 32 + 32 + 64) + 4 * 8 * 8 * (context + 1) / 2
        return 3 * attention, 3 * 2 * 3 * 64 * shape.ffn

    (a, f), (dense_a, dense_f) = forward(after), forward(before)
    expected = 1000 * (3 * a + (a + 3 * f)) + 500 * (dense_a + dense_f + a + f)
    assert reconstruction_flops(before, after, 1000, 500, context) == pytest.approx(expected)


def test_a_schedule_reads_each_window_once_in_a_pass() -> None:
    ids = torch.arange(22)[:, None].expand(-1, 8).contiguous()
    schedule = Schedule.of(ids, 12, 4, batch=3, held_out=2, seed=0)
    assert [len(batch) for batch in schedule.batches] == [2] * 11  # the largest divisor of four that is at most three
    steps = list(schedule.numbers())
    for start in (0, 5):
        read = torch.cat([schedule.batches[n][:, 0] for group in steps[start : start + 5] for n in group])
        assert len(read.unique()) == len(read) == 20
    assert steps[:5] != steps[5:10] and schedule.tokens == 12 * 4 * 8
    tuned, held_out = ({int(i) for n in part for i in schedule.batches[n][:, 0]} for part in schedule.measured)
    assert len(held_out) == 2 and held_out.isdisjoint(tuned)


@pytest.mark.parametrize("family", ["phi", "gemma2", "olmo2", "qwen3_5", "lfm2"])
def test_families_with_other_blocks(family: str, tmp_path: Path) -> None:
    """Parallel attention and FFN, norms behind them, layers without attention."""
    ids = windows(8, 16)
    checkpoint, plan = plan_of(tiny_family(tmp_path, family), "magnitude", ids, ratio=0.5)
    tuned = reconstruct_plan(checkpoint, plan, ids, Reconstruction(steps=4))
    blocks = tuned.summary["reconstruction"]["blocks"]
    assert all(block["tuned"] and block["held_out_after"] < block["held_out_before"] for block in blocks)
    assert tuned.tuned.keys() <= checkpoint.tensors().keys()


BAD = [
    ({"method": "shortgpt", "ratio": 0.5, "reconstruct": 3}, "`reconstruct`: does not go with shortgpt"),
    ({"method": "magnitude", "ratio": 0.5, "reconstruct": 3, "calibration": None}, "`calibration`: blocks are tuned"),
    ({"method": "wanda", "ratio": 0.5, "reconstruct_rate": 0.1}, "`reconstruct_rate`: no block is tuned"),
    ({"method": "wanda", "ratio": 0.5, "reconstruct": 0}, "reconstruct"),
    ({"method": "wanda", "ratio": 0.5, "reconstruct": 3, "reconstruct_rate": -1.0}, "reconstruct_rate"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_requests(fields: dict[str, Any], message: str, model: Path) -> None:
    with pytest.raises(UserError, match=message):
        PruneRequest(**{"model": str(model), "calibration": windows(2), **fields})


def test_a_mixture_and_several_processes_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture, ids, out = tiny_mixture(tmp_path, "mixtral"), tmp_path / "ids.npy", tmp_path / "out"
    np.save(ids, windows(2).numpy())
    common = ["--method", "magnitude", "--ratio", "0.5", "--calibration", f"tokens:{ids}", "--reconstruct", "2"]

    def refusal(directory: Path) -> str:
        assert main(["prune", str(directory), str(out), *common]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not list(tmp_path.glob("out*"))
        return line

    capsys.readouterr()
    assert "--reconstruct: not of this model: it needs whole blocks in memory" in refusal(mixture)
    monkeypatch.setattr("secateur.distributed.world_size", lambda: 2)
    assert "--reconstruct: blocks are tuned in one process; start it without torchrun" in refusal(model)
