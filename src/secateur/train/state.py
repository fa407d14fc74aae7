"""Training checkpoints: safetensors and JSON, whole or absent, the last two kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn, optim

from secateur.errors import UserError
from secateur.files import read_json, sha256_file, sync_tree, write_json

__all__ = ["load_latest", "save_state"]

_WEIGHTS, _MOMENTS, _STATE = "weights.safetensors", "moments.safetensors", "state.json"
_KEEP = 2


def save_state(folder: Path, model: nn.Module, optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Write weights, moments and ``state`` as ``folder/step-N``; a kill at any moment leaves the older one usable."""
    work = folder / "writing"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_file({n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}, work / _WEIGHTS)
    save_file(_moments(model, optimizer), work / _MOMENTS)
    hashes = {name: sha256_file(work / name) for name in (_WEIGHTS, _MOMENTS)}
    write_json(work / _STATE, {**state, "hashes": hashes})
    sync_tree(work)
    final = folder / f"step-{state['step']:08}"
    shutil.rmtree(final, ignore_errors=True)
    os.rename(work, final)
    for old in sorted(folder.glob("step-*"))[:-_KEEP]:
        shutil.rmtree(old)


def load_latest(folder: Path, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest undamaged checkpoint into ``model`` and ``optimizer``; return its state, None without one."""
    for found in sorted(folder.glob("step-*"), reverse=True):
        state = _undamaged(found)
        if state is None:
            continue
        with torch.no_grad():
            weights = load_file(found / _WEIGHTS)
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        moments = load_file(found / _MOMENTS)
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {
                "step": moments[f"step.{name}"],
                "exp_avg": moments[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": moments[f"exp_avg_sq.{name}"].to(parameter.device),
            }
        return state
    return None


def _undamaged(found: Path) -> dict[str, Any] | None:
    """The state of a checkpoint whose files are those it was written with; None for any other."""
    try:
        state = read_json(found / _STATE)
        hashes = state.pop("hashes")
        whole = all(sha256_file(found / name) == hashes[name] for name in (_WEIGHTS, _MOMENTS))
    except (UserError, OSError, LookupError, AttributeError, TypeError):
        return None
    return state if whole else None


def _moments(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
