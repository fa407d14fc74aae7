"""The plan: which parts of a model to keep. It cuts the model and gives the shape of its from-scratch twin."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import UserError
from secateur.files import read_json, sha256_file, write_json
from secateur.model.families import SPACE_OF, Axis, Granularity
from secateur.model.safetensors_io import Stored, TensorFile, write_tensors
from secateur.model.shapes import Shape
from secateur.runtime import environment

__all__ = ["JSON_FILE", "TENSOR_FILE", "Plan", "load_masks", "stored_masks"]

JSON_FILE = "plan.json"
TENSOR_FILE = "plan.safetensors"


@dataclass(frozen=True)
class Plan:
    """The parts of a model that a method keeps.

    Attributes:
        keep_layers: sorted indices of the kept layers.
        keep_hidden: sorted indices of the kept hidden channels.
        keep_ffn: for each kept layer of the *old* numbering, sorted indices of its kept FFN channels.
        keep_kv: likewise its kept KV heads; the query heads that share a KV head go with it.
        keep_projector: sorted indices of the kept channels within an image-text model's projector, where its width is
            the hidden size; None otherwise.
        keep_experts: likewise its kept routed experts, for layers that have any.
        keep_expert_ffn: likewise the kept FFN channels of each of its experts, [experts before, channels].
        masks: name of a tensor of the output -> bool of its size, True where kept; empty for a dense output.
        weights: tensor name -> new values of a weight, where a method updates those that stay; not saved with the plan.
        tuned: name of a tensor of the output -> its final values, where they were tuned after the cut; not saved with
            the plan.
        biases: tensor name -> what is added to a bias to make up for removed channels.
        scores: name -> float32 scores, as evidence: ``layers``, ``hidden``, ``ffn.<layer>``, ``kv.<layer>``.
        calibration: what the scores were computed on, with the hash of the token ids.
        summary: the scores and the selection in a few plain values.
    """

    method: str
    granularity: Granularity
    request: dict[str, Any]  #: the target: ratio, shape or pattern, and the options
    before: Shape
    after: Shape
    keep_layers: Tensor
    keep_hidden: Tensor
    keep_ffn: dict[int, Tensor]
    keep_kv: dict[int, Tensor]
    keep_projector: Tensor | None = None
    keep_experts: dict[int, Tensor] = field(default_factory=dict)
    keep_expert_ffn: dict[int, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    tuned: Mapping[str, Tensor] = field(default_factory=dict)
    zeroed: int = 0  #: weights that the masks drop
    biases: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    source: str = ""  #: digest of the checkpoint that was scored

    @classmethod
    def keeping_all(
        cls, method: str, granularity: Granularity, request: dict[str, Any], shape: Shape, **fields: Any
    ) -> Plan:
        """Make a plan that keeps everything, except for ``fields``."""
        everything: dict[str, Any] = {
            "after": shape,
            "keep_layers": torch.arange(shape.layers),
            "keep_hidden": torch.arange(shape.hidden),
            "keep_ffn": {layer: torch.arange(shape.ffn) for layer in range(shape.layers)},
            "keep_kv": {layer: torch.arange(shape.kv_heads) for layer in range(shape.layers)},
        }
        if shape.experts:
            routed = shape.layers_with("experts")
            channels = torch.arange(shape.expert_ffn).expand(shape.experts, -1)
            everything["keep_experts"] = {layer: torch.arange(shape.experts) for layer in routed}
            everything["keep_expert_ffn"] = dict.fromkeys(routed, channels)
        fields = everything | fields
        if shape.kinds:
            kinds = shape.of_layers(fields["keep_layers"].tolist()).kinds
            fields["after"] = dataclasses.replace(fields["after"], kinds=kinds)
        return cls(method=method, granularity=granularity, request=request, before=shape, **fields)

    def indices(self, axis: Axis, layer: int) -> Tensor | None:
        """The indices to keep of an axis in a layer; None for all."""
        if isinstance(axis, tuple):
            return self._end_to_end(axis, layer)
        if axis == "hidden":
            return _unless_all(self.keep_hidden, self.before.hidden)
        if axis == "projector":
            return None if self.keep_projector is None else _unless_all(self.keep_projector, self.before.hidden)
        if axis == "ffn":
            return _unless_all(self.keep_ffn[layer], self.before.ffn)
        if axis == "experts":
            return _unless_all(self.keep_experts[layer], self.before.experts)
        if axis is None or SPACE_OF.get(axis, axis) != "kv":  # never cut
            return None
        groups = _unless_all(self.keep_kv[layer], self.before.kv_heads)
        if groups is None:
            return None
        width = self.before.axis_size(axis) // self.before.kv_heads
        return (groups[:, None] * width + torch.arange(width)).reshape(-1)

    def expert_indices(self, axis: Axis, layer: int, expert: int) -> Tensor | None:
        """The indices to keep of an axis of one expert's tensor; None for all."""
        parts = axis if isinstance(axis, tuple) else (axis,)
        if all(SPACE_OF.get(str(part), part) != "expert_ffn" for part in parts):
            return self.indices(axis, layer)
        channels = self.keep_expert_ffn[layer][expert]
        if len(channels) == self.before.expert_ffn:
            return None
        pieces, start = [], 0
        for part in parts:
            width = self.before.axis_size(part) // self.before.expert_ffn
            pieces.append(start + (channels[:, None] * width + torch.arange(width)).reshape(-1))
            start += self.before.axis_size(part)
        return torch.cat(pieces)

    def _end_to_end(self, axis: tuple[str, ...], layer: int) -> Tensor | None:
        pieces, start = [], 0
        for part in axis:
            size = self.before.axis_size(part)
            indices = self.indices(part, layer)
            pieces.append(start + (torch.arange(size) if indices is None else indices))
            start += size
        return _unless_all(torch.cat(pieces), start)

    def parts(self, axis: Axis, layer: int) -> list[tuple[int, int]]:
        """For each part of an axis: the channels kept, and the zeros behind them where other layers keep more."""
        parts = []
        for part in axis if isinstance(axis, tuple) else (axis,):
            indices = self.indices(part, layer)
            count = self.before.axis_size(part) if indices is None else len(indices)
            parts.append((count, self.after.axis_size(part) - count))
        return parts

    @property
    def padded(self) -> bool:
        """Whether layers keep different numbers of units, which zeros fill up."""
        ffn = any(len(self.keep_ffn[layer]) < self.after.ffn for layer in self.keep_layers.tolist())
        return ffn or any(len(self.keep_kv[layer]) < self.after.kv_heads for layer in self.keep_layers.tolist())

    def removed(self) -> dict[str, float]:
        """The share of parameters removed (zeroed, for masks): ``total`` and ``non_embedding``."""
        if self.granularity == "sparse":
            return {"total": self.zeroed / self.before.total, "non_embedding": self.zeroed / self.before.non_embedding}
        zeros = self.before.total - self.after.total
        for new, layer in enumerate(self.keep_layers.tolist()):
            for space, keep in (("ffn", self.keep_ffn), ("kv", self.keep_kv)):
                missing = self.after.units(space) - len(keep[layer])
                zeros += max(0, missing) * (self.after.unit_parameters(space, new) if missing > 0 else 0)
        embedding = self.before.embedding - self.after.embedding
        return {"total": zeros / self.before.total, "non_embedding": (zeros - embedding) / self.before.non_embedding}

    def by_layer(self) -> list[dict[str, Any]]:
        """Describe each layer of the old numbering.

        Returns:
            ``kept`` for each layer; for a kept layer also ``ffn`` and ``kv``, the units that stay, and ``sparsity``,
            the share of the weights of its linears that a mask drops.
        """
        layers, rows = {old: new for new, old in enumerate(self.keep_layers.tolist())}, []
        for layer in range(self.before.layers):
            if layer not in layers:
                rows.append({"kept": False})
                continue
            names = map(self._linear(layers[layer]), self.before.linears(layer))
            masks = [self.masks[name] for name in names if name in self.masks]
            dropped = 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks) if masks else 0.0
            spaces = {"ffn": self.keep_ffn, "kv": self.keep_kv}
            units = {space: len(keep[layer]) for space, keep in spaces.items() if self.before.has_space(space, layer)}
            if layer in self.keep_experts:
                units |= {"experts": len(self.keep_experts[layer]), "expert_ffn": self.keep_expert_ffn[layer].shape[1]}
            rows.append({"kept": True, **units, "sparsity": dropped})
        return rows

    def then(self, later: Plan) -> Plan:
        """The plan that cuts at once what this one and a plan for its output cut one after the other.

        Everything but the selection, the biases, the model before and its digest is the later plan's. Its scores have
        the numbering of the model that it was made for. Neither plan may be padded.
        """
        pairs = [(int(self.keep_layers[new]), new) for new in later.keep_layers.tolist()]

        def through(first: Mapping[int, Tensor], second: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {old: first[old][second[new]] for old, new in pairs if old in first}

        expert_ffn = {}
        for old, new in pairs if self.keep_expert_ffn else ():
            channels, experts = self.keep_expert_ffn[old], self.keep_experts[old]
            expert_ffn[old] = channels[:, : later.keep_expert_ffn[new].shape[1]].clone()
            expert_ffn[old][experts] = channels[experts].gather(1, later.keep_expert_ffn[new])
        biases = dict(self.biases)
        for name, bias in later.biases.items():
            total = biases.get(name, bias.new_zeros(self.before.hidden))
            biases[name] = total.index_add(0, self.keep_hidden, bias.to(total.dtype))
        projector = (self.keep_projector, later.keep_projector)
        return dataclasses.replace(
            later,
            before=self.before,
            keep_layers=self.keep_layers[later.keep_layers],
            keep_hidden=self.keep_hidden[later.keep_hidden],
            keep_ffn=through(self.keep_ffn, later.keep_ffn),
            keep_kv=through(self.keep_kv, later.keep_kv),
            keep_projector=None if projector[0] is None or projector[1] is None else projector[0][projector[1]],
            keep_experts=through(self.keep_experts, later.keep_experts),
            keep_expert_ffn=expert_ffn,
            biases=biases,
            source=self.source,
        )

    @classmethod
    def load_selection(cls, directory: Path, before: Shape, after: Shape) -> Plan:
        """Read a saved plan without its masks and scores.

        Args:
            before: the shape of the model that it was made for.
            after: the shape of its output.
        """
        content, file = read_json(directory / JSON_FILE), TensorFile(directory / TENSOR_FILE)
        tensors = {name: file.tensor(name) for name in file.names if name.startswith(("keep.", "bias."))}
        everything = cls.keeping_all("", "width", {}, before)

        def by_layer(space: str, default: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: tensors.get(f"keep.{space}.{layer}", whole) for layer, whole in default.items()}

        return cls.keeping_all(
            content["method"],
            content["granularity"],
            content["asked"],
            before,
            after=after,
            keep_layers=tensors["keep.layers"],
            keep_hidden=tensors["keep.hidden"],
            keep_ffn=by_layer("ffn", everything.keep_ffn),
            keep_kv=by_layer("kv", everything.keep_kv),
            keep_projector=tensors.get("keep.projector"),
            keep_experts=by_layer("experts", everything.keep_experts),
            keep_expert_ffn=by_layer("expert_ffn", everything.keep_expert_ffn),
            biases={name.removeprefix("bias."): tensors[name] for name in tensors if name.startswith("bias.")},
            calibration=content["calibration"],
            summary=content["summary"],
            source=content["source"],
        )

    def _linear(self, layer: int) -> Callable[[str], str]:
        return lambda linear: self.before.family.block_tensor(layer, linear)

    def save(self, directory: Path) -> dict[str, Any]:
        """Write ``plan.json`` and ``plan.safetensors`` into ``directory`` and return the former's content."""
        tensors = {"keep.layers": self.keep_layers, "keep.hidden": self.keep_hidden}
        if self.keep_projector is not None:
            tensors["keep.projector"] = self.keep_projector
        for layer in self.keep_layers.tolist():
            tensors |= {f"keep.ffn.{layer}": self.keep_ffn[layer], f"keep.kv.{layer}": self.keep_kv[layer]}
        for name, keep in (("experts", self.keep_experts), ("expert_ffn", self.keep_expert_ffn)):
            if self.before.units(name) != self.after.units(name):
                tensors |= {f"keep.{name}.{layer}": keep[layer] for layer in self.keep_layers.tolist() if layer in keep}
        tensors |= {f"bias.{name}": bias.float() for name, bias in self.biases.items()}
        tensors |= {f"score.{name}": score.float() for name, score in self.scores.items()}
        stored = [Stored.of(name, tensor) for name, tensor in tensors.items()]
        for layer in range(self.after.layers) if self.masks else ():
            for rest, axes in self.after.block_tensors(layer).items():  # as large as the model: read one at a time
                if (name := self.before.family.block_tensor(layer, rest)) in self.masks:
                    size = self.after.tensor_size(axes)
                    stored.append(Stored(f"mask.{name}", torch.bool, size, lambda name=name: (self.masks[name],)))
        write_tensors(directory / TENSOR_FILE, stored)
        content = {
            "method": self.method,
            "granularity": self.granularity,
            "asked": self.request,
            "ratio": {"asked": self.request.get("ratio"), **self.removed()},
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "calibration": self.calibration,
            "summary": self.summary,
            "source": self.source,
            "tensors": sha256_file(directory / TENSOR_FILE),
        }
        content["fingerprint"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        content["versions"] = environment()  # beside the identity: other versions may decide the same
        write_json(directory / JSON_FILE, content)
        return content


def load_masks(directory: Path) -> dict[str, Tensor]:
    """Read the masks of a saved plan: tensor name -> bool; empty where it has none.

    They are views into the mapped file, not to be written to.

    Raises:
        UserError: if the plan is missing or its tensors are not those that were saved with it.
    """
    content, file = read_json(directory / JSON_FILE), directory / TENSOR_FILE
    if not isinstance(content, dict) or "tensors" not in content:
        raise UserError(f"{directory / JSON_FILE}: is not a plan")
    if not file.is_file() or sha256_file(file) != content["tensors"]:
        raise UserError(
            f"{file}: is not the file that {JSON_FILE} was written with; copy both from the pruned checkpoint, or "
            "remove both to go on without masks"
        )
    tensors = TensorFile(file)
    return {name.removeprefix("mask."): tensors.tensor(name) for name in tensors.names if name.startswith("mask.")}


def stored_masks(directory: Path) -> dict[str, Tensor]:
    """Read the masks beside a checkpoint (:func:`load_masks`); empty where no plan lies there."""
    return load_masks(directory) if (directory / JSON_FILE).is_file() else {}


def _unless_all(indices: Tensor, size: int) -> Tensor | None:
    return None if indices.numel() == size else indices
