"""Measures how far a pruned checkpoint is from the model that its plan describes, for every family and kind of pruning.

Each figure is the largest difference between the logits of two models, as a share of the largest logit. The pruned
checkpoint is opened by transformers alone, in a process that has never imported secateur. The other model is the whole
one, changed in memory (:mod:`reference`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from helpers import hf, logits, windows
from reference import Pruned, Zoo, calibration_means, channels, compensated, norms_over_heads, silenced
from secateur.model.checkpoint import Checkpoint
from secateur.model.shapes import Shape
from secateur.pruning.target import Target

IDS = windows(2, 20, seed=4)  # longer than any window of attention
SCORERS = ("wanda-sp", "minitron-width", "llm-pruner")  #: each scores dead units of FFN and heads as zero

SERVER = """
import json, sys, traceback
import torch, transformers
from safetensors.torch import load_file, save_file
assert not any(name.startswith("secateur") for name in sys.modules)
def write_logits(directory, ids, out):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        values = model.float().eval()(input_ids=load_file(ids)["ids"], use_cache=False).logits.contiguous()
    save_file({"logits": values}, out)
for line in sys.stdin:
    try:
        write_logits(*json.loads(line))
        answer = "written"
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


class PlainTransformers:
    """A process that knows transformers alone and opens one checkpoint after the other."""

    def __init__(self, folder: Path) -> None:
        self.ids, self.out, self.errors = folder / "ids.safetensors", folder / "logits.safetensors", folder / "errors"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        self._stderr = self.errors.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
        )  # fmt: skip

    def logits(self, directory: Path, ids: Tensor) -> Tensor:
        """The logits of a checkpoint's model."""
        save_file({"ids": ids}, self.ids)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(directory), str(self.ids), str(self.out)]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.errors.read_text()[-3000:]
        assert json.loads(answer) == "written", f"{directory}: {json.loads(answer)}"
        return load_file(self.out)["logits"]

    def close(self) -> None:
        self._process.communicate()
        self._stderr.close()


@dataclasses.dataclass(frozen=True)
class Proof:
    """One kind of pruning on one checkpoint.

    Attributes:
        difference: from the model that the plan describes, as a share of the largest logit.
        exact: whether that model is the whole one, unchanged, of which units that do nothing were removed.
        pruned: what was compared.
    """

    difference: float
    exact: bool
    pruned: Pruned


class Prover:
    """Proves the kinds of pruning on one checkpoint.

    Args:
        name: of the checkpoint in the zoo.
        scorer: the width method that is to find the units that do nothing.
    """

    def __init__(self, zoo: Zoo, plain: PlainTransformers, name: str, scorer: str) -> None:
        self.zoo, self.plain, self.name, self.scorer = zoo, plain, name, scorer
        self.checkpoint = Checkpoint(zoo.directory(name))
        self.shape, self.axes = self.checkpoint.shape, self.checkpoint.family.axes
        self.model = hf(zoo.directory(name))
        self.whole = logits(self.model, IDS)
        self.dead = DeadUnits(self.shape)
        self.over_heads = any(norms_over_heads(b, self.shape) for b in self.model.get_submodule("model.layers"))
        planted = self.dead.plant(copy.deepcopy(self.model))
        self.planted, self.planted_logits = zoo.add(f"{name} planted", planted), logits(planted, windows())

    def layers(self) -> Proof:
        """Remove layers, off any period."""
        keep = self._layers()
        return self._by_hand(after=self.shape.of_layers(keep), keep_layers=torch.tensor(keep))

    def ffn(self) -> Proof:
        """Remove the FFN channels that do nothing."""
        return self._without_dead_units(ffn=self.dead.ffn_left)

    def kv(self) -> Proof:
        """Remove the KV heads that do nothing; any head where a norm runs over all heads together."""
        sizes = {"kv_heads": self.dead.kv_left}
        if not self.over_heads:
            return self._without_dead_units(**sizes)
        return self._against_reference(self.zoo.prune(self.name, self.scorer, Target(sizes=sizes)))

    def hidden(self) -> Proof:
        """Remove hidden channels; norms of the other model leave them out."""
        sizes = {"hidden": narrower(self.shape, "hidden", self.shape.hidden * 5 // 6)}
        return self._against_reference(self.zoo.prune(self.name, "minitron-width", Target(sizes=sizes)))

    def bias(self) -> Proof:
        """Replace removed FFN channels and KV heads by biases."""
        sizes, fewer_heads = {"ffn": self.dead.ffn_left}, self.shape.narrowed("kv", self.dead.kv_left)
        if "kv" in self.axes and not fewer_heads.refused_by_config:
            sizes["kv_heads"] = self.dead.kv_left
        pruned = self.zoo.prune(self.name, "flap", Target(sizes=sizes))
        return self._against_reference(pruned, calibration_means(pruned))

    def sparse(self) -> Proof:
        """Set half of the weights to zero."""
        return self._against_reference(self.zoo.prune(self.name, "wanda", Target(ratio=0.5)))

    def each_kind(self) -> dict[str, Proof]:
        """Prove every kind of pruning that the family allows."""
        kinds: list[Callable[[], Proof]] = [self.layers, self.ffn]
        kinds += [self.kv] if "kv" in self.axes and self.dead.kv_left else []
        kinds += [self.hidden] if "hidden" in self.axes else []
        kinds += [self.bias] if compensated(self.checkpoint.family) else []
        return {kind.__name__: kind() for kind in (*kinds, self.sparse)}

    def together(self) -> dict[str, Proof]:
        """Prove the same in three cuts: dead units of all spaces, all axes at once with uneven layers, and zeros."""
        sizes = {"ffn": self.dead.ffn_left}
        if "kv" in self.axes and self.dead.kv_left and not self.over_heads:
            sizes["kv_heads"] = self.dead.kv_left
        pruned = self.zoo.prune(self.name, "magnitude", Target(ratio=0.5))
        return {
            "dead units": self._without_dead_units(**sizes),
            "all axes": self._all_axes(),
            "sparse": self._against_reference(pruned),
        }

    def _all_axes(self) -> Proof:
        """Remove what the planted model lacks, more of it in one layer, and layers and hidden channels."""
        shape, keep, fields = self.shape, self._layers(), dict[str, Any]()
        after = shape.narrowed("ffn", self.dead.ffn_left)
        fields["keep_ffn"] = {n: _complement(gone, shape.ffn) for n, gone in self.dead.ffn.items()}
        fields["keep_ffn"][keep[0]] = fields["keep_ffn"][keep[0]][:-3]  # three zeros fill the layer up
        if "kv" in self.axes and self.dead.kv_left:
            after = after.narrowed("kv", self.dead.kv_left)
            everything = {n: torch.arange(shape.kv_heads) for n in range(shape.layers)}
            fields["keep_kv"] = everything | {n: _complement(gone, shape.kv_heads) for n, gone in self.dead.kv.items()}
            last = next(layer for layer in reversed(keep) if layer in self.dead.kv)
            fields["keep_kv"][last] = fields["keep_kv"][last][: max(1, self.dead.kv_left - 1)]  # likewise
        if "hidden" in self.axes:
            after = after.narrowed("hidden", narrower(after, "hidden", shape.hidden * 5 // 6))
            fields["keep_hidden"] = _complement(_spread(1, shape.hidden - after.hidden, shape.hidden), shape.hidden)
        after = dataclasses.replace(after, layers=len(keep))
        return self._by_hand(after=after, keep_layers=torch.tensor(keep), **fields)

    def _layers(self) -> list[int]:
        """All layers but the second and the last but one of those that may go."""
        layers = range(self.shape.layers)
        free = [layer for layer in layers if layer not in self.checkpoint.pinned_layers]
        return [layer for layer in layers if layer not in {free[1], free[-2]}]

    def _by_hand(self, **fields: Any) -> Proof:
        fields["after"] = fields["after"].openable(where=self.name)
        return self._against_reference(self.zoo.cut(self.name, self.zoo.keeping_all(self.name, **fields)))

    def _without_dead_units(self, **sizes: int) -> Proof:
        """Compare with the whole planted model, after units that do nothing on the calibration text have been cut.

        These are the dead units, and channels behind a ReLU that this text never activates.
        """
        pruned = self.zoo.prune(self.planted, self.scorer, Target(sizes=sizes))
        plan = pruned.plan
        for space, keep, dead in (("ffn", plan.keep_ffn, self.dead.ffn), ("kv", plan.keep_kv, self.dead.kv)):
            if plan.after.units(space) < plan.before.units(space):
                for layer, units in dead.items():
                    scores = plan.scores[f"{space}.{layer}"]
                    idle = scores <= 1e-5 * scores.max()
                    assert idle[units].all() and idle.sum() < len(idle), (space, layer)
                    assert idle[_complement(keep[layer].tolist(), len(idle))].all(), (space, layer)
        return self._proof(pruned, self.planted_logits, windows(), exact=True)

    def _against_reference(self, pruned: Pruned, filled: Mapping[str, Tensor] | None = None) -> Proof:
        """Compare with the model that the plan describes, which is another function than the whole one."""
        expected = logits(silenced(copy.deepcopy(self.model), pruned.plan, filled=filled), IDS)
        assert float((expected - self.whole).abs().max()) > 0.01 * float(self.whole.abs().max())
        return self._proof(pruned, expected, IDS, exact=False)

    def _proof(self, pruned: Pruned, expected: Tensor, ids: Tensor, *, exact: bool) -> Proof:
        assert Checkpoint(pruned.out).shape == pruned.plan.after
        largest = float(expected.abs().max())
        assert float(expected.std()) > 0.01 * largest
        differences = (self.plain.logits(pruned.out, ids) - expected).abs()
        if exact:  # the last position has no loss, so gradients never see a channel that only this one activates
            differences = differences[:, :-1]
        return Proof(float(differences.max()) / largest, exact, pruned)


class DeadUnits:
    """FFN channels and KV heads, other ones in each layer, that are to do nothing.

    Attributes:
        ffn: layer -> FFN channels.
        kv: layer -> KV heads; empty where the model has one alone.
        ffn_left, kv_left: how many units of a layer are left; 0 KV heads where none can be cut.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.ffn_left = shape.ffn - shape.ffn // 4
        self.kv_left = narrower(shape, "kv", shape.kv_heads - max(1, shape.kv_heads // 4))
        layers = range(shape.layers)
        self.ffn = {n: _spread(n, shape.ffn - self.ffn_left, shape.ffn) for n in layers}
        heads = [n for n in layers if shape.has_space("kv", n)] if self.kv_left else []
        self.kv = {n: _spread(n, shape.kv_heads - self.kv_left, shape.kv_heads) for n in heads}

    @torch.no_grad()
    def plant(self, model: PreTrainedModel) -> PreTrainedModel:
        """Set every weight of these units to zero."""
        shape = self.shape
        for layer, block in enumerate(model.get_submodule(shape.family.layers)):
            heads, group = torch.tensor(self.kv.get(layer, []), dtype=torch.long), shape.heads // shape.kv_heads
            indices = {"ffn": torch.tensor(self.ffn[layer])}
            for space, width in (("kv", 1), ("query", group), ("gated_query", 2 * group)):
                indices[space] = channels(heads, width * shape.head_dim)
            for name, axes in shape.block_tensors(layer).items():
                for dimension, axis in enumerate(axes):
                    start = 0
                    for space in axis if isinstance(axis, tuple) else (axis,):
                        if space in indices:
                            block.get_parameter(name).index_fill_(dimension, start + indices[space], 0)
                        start += shape.axis_size(space)
        return model


def _complement(units: list[int], size: int) -> Tensor:
    return torch.tensor([unit for unit in range(size) if unit not in units])


def _spread(layer: int, count: int, size: int) -> list[int]:
    return sorted((layer + unit * size // count) % size for unit in range(count))


def narrower(shape: Shape, space: str, most: int) -> int:
    """The largest number of units up to ``most`` that the family's config accepts; 0 for none.

    If it accepts none, a family that can stand in for it may.
    """
    counts = range(most, 0, -1)
    relaxed = counts if shape.family.relaxed and not shape.switches else ()
    return next((n for n in counts if not shape.narrowed(space, n).refused_by_config), next(iter(relaxed), 0))
