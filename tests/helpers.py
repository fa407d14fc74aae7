"""Tiny random checkpoints of every family, and naive references to compare with."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from family_configs import FAMILY_CONFIGS, FAMILY_SIZES, FILE_CHANGES
from secateur.calibration.journal import Journal
from secateur.data.manifest import Split, write_manifest
from secateur.data.shards import ShardWriter
from secateur.methods.base import ExpertMethod, LearnedMethod
from secateur.methods.registry import METHODS, get_method
from secateur.model.checkpoint import Checkpoint
from secateur.model.plan import Plan
from secateur.model.safetensors_io import Stored
from secateur.pruning.calibration import Calibration
from secateur.pruning.learned import learn, learning_recipe
from secateur.pruning.target import Target
from secateur.training.batches import WindowTokens
from secateur.training.loop import RunOptions
from secateur.training.metrics import Metrics
from secateur.training.mixture import Mixture
from secateur.training.parallel import Execution

#: name -> what to give :func:`tiny_llama`
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "sharded": {"shard": "20KB"},
    "bf16": {"dtype": torch.bfloat16},
    "no_head_dim": {"drop": ("head_dim",)},
    "wide_heads": {"head_dim": 16},
}

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def randomise(model: nn.Module, seed: int = 0, std: float = 0.25) -> None:
    """Draw every parameter anew, so that no norm is one and no bias zero; ``std`` is that of matrices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (1.0 if "embed_tokens" in name else std))
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith(("layer_scalar", "act_fn.beta")):  # of Gemma 4 and Apertus, stored with the weights
                buffer.copy_(0.5 + 0.5 * torch.rand(buffer.shape, generator=generator))


def tiny_llama(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    drop: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """Write a random Llama below ``directory`` and return its directory.

    Args:
        directory: an existing directory.
        seed: of the weights.
        dtype: that they are stored in.
        shard: largest shard.
        drop: keys to take out of config.json afterwards.
        config: what differs from ``SIZES``.
    """
    out = directory / f"llama-{seed}"
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **ids, **config}))
    randomise(model, seed)
    model.to(dtype).save_pretrained(out, max_shard_size=shard)
    if drop:
        edit_config(out, drop=drop)
    return out


def tiny_family(
    directory: Path, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Write a random checkpoint of ``FAMILY_CONFIGS[name]`` below ``directory`` and return its directory."""
    out = directory / f"{name}-{seed}"
    values = {**FAMILY_SIZES, **FAMILY_CONFIGS[name], **config}
    random_model(values, seed=seed).to(dtype).save_pretrained(out)
    if name in FILE_CHANGES:
        edit_config(out, **FILE_CHANGES[name])
    return out


def random_model(config: dict[str, Any], *, seed: int = 0, std: float = 0.25) -> PreTrainedModel:
    """A model of a configuration with random parameters, none of them the value that it is initialised with."""
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**ids, **config}))
    randomise(model, seed, std)
    return model


def edit_config(directory: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Change config.json in place."""
    path = directory / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(config | changes))


def hf(directory: Path) -> PreTrainedModel:
    """The model as plain transformers opens it, in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


def model_tensors(model: PreTrainedModel) -> Iterator[Stored]:
    """A model's parameters by name, tied ones once."""
    return (Stored.of(name, parameter.detach()) for name, parameter in model.named_parameters())


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def naive_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Mean next-token loss, one token at a time, in float64."""
    total, count = 0.0, 0
    for window in ids:
        for position, row in enumerate(logits(model, window[None])[0].double()[:-1]):
            total -= float(row[window[position + 1]] - row.logsumexp(0))
            count += 1
    return total / count


def windows(count: int = 5, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (count, length), generator=torch.Generator().manual_seed(seed))


def files(directory: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@torch.no_grad()
def seen_at(model: PreTrainedModel, module: str, ids: Tensor, *, output: bool) -> list[Tensor]:
    """What goes into a module, or comes out of it, in one pass of the whole model."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        value = out if output else args[0]
        seen.append(value[0] if isinstance(value, tuple) else value)

    handle = model.get_submodule(module).register_forward_hook(hook, with_kwargs=True)
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen


def without_layers(model: PreTrainedModel, gone: Iterable[int]) -> PreTrainedModel:
    """The model with those blocks bypassed; the others keep their kind of attention."""
    dropped = set(gone)
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for i, kind in enumerate(kinds) if i not in dropped]
    model.model.layers = nn.ModuleList(b for i, b in enumerate(model.model.layers) if i not in dropped)
    return model


def calibration(ids: Tensor, source: str = "test") -> Calibration:
    return Calibration(ids, source)


#: methods that score any model as it is; the others learn, and are run by :func:`learned`, or score routed experts
SCORED = [name for name in METHODS if not isinstance(get_method(name), LearnedMethod | ExpertMethod)]


def learned(
    checkpoint: Checkpoint, method: str, target: Target, ids: Tensor, folder: Path, *, batch: int = 2, **options: Any
) -> tuple[Plan, Checkpoint]:
    """Learn what to cut in a few steps, below an existing ``folder``; ``measure`` is taken out of the options."""
    measure = options.pop("measure", lambda _: None)
    found = get_method(method, {"steps": 60, "windows": 4, "phi": 1000.0, "multiplier_rate": 300.0, **options})
    tokens = WindowTokens(ids)
    recipe = learning_recipe(found, ids.shape[1], batch)
    (folder / "trained").mkdir(exist_ok=True)
    return learn(
        checkpoint,
        method,
        target,
        Mixture(tokens, {"": (0, tokens.tokens)}, recipe, found.steps),
        method=found,
        record=calibration(ids).record(),
        execution=Execution(),
        options=RunOptions(folder / "steps", "learn", save_every=5, metrics=Metrics(folder / "metrics.jsonl")),
        measure=measure,
        out=folder / "trained",
    )


@contextmanager
def killed_behind(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    """Interrupt a walk once its journal has finished this step."""
    finish = Journal.finish

    def interrupt(self: Journal, number: int) -> None:
        finish(self, number)
        if number == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", interrupt)
        yield


def token_corpus(folder: Path, *, tokens: int, vocabulary: int, seed: int = 0, domains: int = 0) -> Path:
    """A store of random documents of 5 to 60 tokens, in turn of each domain; a token is near the one before it."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)

    def split(name: str, least: int) -> Split:
        writer = ShardWriter(folder, name, "uint16", 5000, domains=domains > 0)
        while writer.tokens < least:
            steps = generator.integers(0, 3, generator.integers(5, 60))
            writer.append(np.cumsum(steps) % vocabulary, domain=writer.documents % max(1, domains))
        return writer.close()

    splits = {"train": split("train", tokens), "heldout": split("heldout", 1000)}
    write_manifest(folder, vocabulary, splits, domains=[f"d{number}" for number in range(domains)])
    return folder


def install_package(folder: Path, group: str, entries: dict[str, str], **modules: str) -> None:
    """Lay out what pip would install: modules, and beside them the entry points that announce them.

    Args:
        folder: an existing directory on the path.
        group: of the entry points.
        entries: name -> ``module:object``.
        modules: name -> text.
    """
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    about = folder / "example-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (about / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]), encoding="utf-8")


def documented_package(page: str, group: str) -> tuple[dict[str, str], str, str]:
    """The package of a page of docs/: the entry points, the module's name and its text."""
    text = (Path(__file__).resolve().parents[1] / "docs" / page).read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    package = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    module = re.search(r"`src/(\w+)\.py`", text)
    assert code and package and module
    return tomllib.loads(package[1])["project"]["entry-points"][group], module[1], code[1]


def near(found: Tensor | None, wanted: Tensor, tolerance: float) -> None:
    """Equal up to a share of the largest value."""
    assert found is not None and found.shape == wanted.shape
    error = float((found.detach().double() - wanted).abs().max())
    assert error <= tolerance * max(1e-30, float(wanted.abs().max())), error


class Sizes(TorchDispatchMode):
    """The most values in a tensor that an operation puts out, and how many matrix products there are."""

    def __init__(self, exempt: tuple[torch.Size, ...]) -> None:
        super().__init__()
        self.exempt, self.most, self.products = exempt, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        view = func.is_view  # of what has been seen, or was there before
        for value in () if view else out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.shape not in self.exempt:
                self.most = max(self.most, value.numel())
        return out


@contextmanager
def largest(exempt: tuple[torch.Size, ...]) -> Iterator[Sizes]:
    with Sizes(exempt) as sizes:
        yield sizes
