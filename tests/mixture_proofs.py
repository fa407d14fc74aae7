"""Measures how far a pruned mixture of experts is from the model that its plan describes, for every kind of pruning."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expert_loops import experts_of, matrices
from expert_models import random_mixture, without_experts
from helpers import hf, logits
from proofs import IDS, PlainTransformers, Proof
from reference import Pruned, Zoo, silenced
from secateur.model.checkpoint import Checkpoint
from secateur.pruning.target import Target

EXPERTS = 8  #: of each tiny mixture


class MixtureProver:
    """Proves the kinds of pruning on a tiny mixture.

    Args:
        name: of the family.
    """

    def __init__(self, zoo: Zoo, plain: PlainTransformers, name: str) -> None:
        self.zoo, self.plain = zoo, plain
        model = random_mixture(name)
        self.name = zoo.add(f"{name} mixture", model)
        self.checkpoint = Checkpoint(zoo.directory(self.name))
        self.shape, self.axes = self.checkpoint.shape, self.checkpoint.family.axes
        self.model = hf(zoo.directory(self.name))

    def layers(self) -> Proof:
        """Remove the second and the third of four layers."""
        fields = {"keep_layers": torch.tensor([0, 3]), "after": dataclasses.replace(self.shape, layers=2)}
        pruned = self.zoo.cut(self.name, self.zoo.keeping_all(self.name, **fields))
        return self._proof(pruned, silenced(copy.deepcopy(self.model), pruned.plan))

    def experts(self) -> Proof:
        """Remove half of the experts; the other model's router cannot choose them."""
        pruned = self.zoo.prune(self.name, "reap", Target(ratio=0.5))
        return self._proof(pruned, without_experts(copy.deepcopy(self.model), pruned.plan))

    def expert_ffn(self) -> Proof:
        """Remove the channels of each expert that do nothing; the other model is the whole one, unchanged."""
        planted, dead = copy.deepcopy(self.model), self.shape.expert_ffn // 2
        plant(planted, dead)
        name = self.zoo.add(f"{self.name} planted", planted)
        pruned = self.zoo.prune(name, "minitron-width", Target(sizes={"expert_ffn": self.shape.expert_ffn - dead}))
        for keep in pruned.plan.keep_expert_ffn.values():
            assert all(not {*row.tolist()} & {*silent(expert, 2 * dead)} for expert, row in enumerate(keep))
        return self._proof(pruned, planted, exact=True)

    def kv(self) -> Proof:
        """Remove KV heads; where the hidden size is that of the heads, hidden channels as well."""
        return self._narrowed(heads=4, kv_heads=2)

    def hidden(self) -> Proof:
        """Remove hidden channels; where the hidden size is that of the heads, KV heads as well."""
        return self._narrowed(hidden=36)

    def sparse(self) -> Proof:
        """Set half of the weights to zero."""
        pruned = self.zoo.prune(self.name, "wanda", Target(ratio=0.5))
        return self._proof(pruned, silenced(copy.deepcopy(self.model), pruned.plan))

    def each_kind(self) -> dict[str, Proof]:
        """Prove every kind of pruning that the family allows."""
        kinds: list[Callable[[], Proof]] = [self.layers, self.experts, self.sparse]
        kinds += [method for method in (self.expert_ffn, self.kv, self.hidden) if method.__name__ in self.axes]
        return {kind.__name__: kind() for kind in kinds}

    def _narrowed(self, **sizes: int) -> Proof:
        if self.checkpoint.family.heads_span_hidden:
            sizes = {"hidden": 32, "heads": 4, "kv_heads": 2}
        pruned = self.zoo.prune(self.name, "minitron-width", Target(sizes=sizes))
        return self._proof(pruned, silenced(copy.deepcopy(self.model), pruned.plan))

    def _proof(self, pruned: Pruned, model: PreTrainedModel, *, exact: bool = False) -> Proof:
        expected: Tensor = logits(model, IDS)
        assert Checkpoint(pruned.out).shape == pruned.plan.after
        if not exact:
            assert float((expected - logits(self.model, IDS)).abs().max()) > 0.01 * float(expected.abs().max())
        difference = float((self.plain.logits(pruned.out, IDS) - expected).abs().max())
        return Proof(difference / float(expected.abs().max()), exact, pruned)


def silent(expert: int, width: int) -> list[int]:
    """The channels of an expert that :func:`plant` silences, half of them: others in each expert."""
    return sorted((expert + 2 * channel) % width for channel in range(width // 2))


@torch.no_grad()
def plant(model: PreTrainedModel, count: int) -> None:
    """Set every weight and bias of ``count`` channels of each expert to zero, half of the channels."""
    for module in experts_of(model).values():
        experts: Any = module
        for expert in range(EXPERTS):
            gate, up, down = matrices(experts, expert)
            lost = silent(expert, 2 * count)
            gate[lost], up[lost] = 0, 0
            down[:, lost] = 0
            if hasattr(experts, "gate_up_proj_bias"):
                for side in (0, 1):
                    experts.gate_up_proj_bias[expert, [2 * channel + side for channel in lost]] = 0
