"""How a model is spread over processes and computed: FSDP2, bfloat16 over float32 weights, recomputing, compiling.

One process that computes in float32 needs none of it and holds a plain model. Otherwise each block, and what is left
around the blocks, is sharded over the processes (``fully_shard``, arXiv:2304.11277): weights, gradients and moments
are float32 and lie with the process that owns them, gradients are summed in float32, and what a block computes with is
gathered, in bfloat16 if asked, when its turn comes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from secateur import distributed
from secateur.errors import UserError
from secateur.model.families import family_of
from secateur.training.objective import BatchLosses, LanguageModel, Objective

__all__ = ["Execution", "TrainModule", "full_tensor", "local_part", "part_like", "place_model", "place_teacher"]


@dataclass(frozen=True)
class Execution:
    """How a run computes.

    Raises:
        UserError: if the processes do not divide into ``replicas`` groups.
    """

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"  #: of what is computed; weights and sums are float32
    replicas: int = 1  #: groups of processes that hold the model once each and share its gradients (HSDP)
    recompute: bool = False  #: blocks run forward again in the backward pass, and hold no activations until then
    compile: bool = False  #: blocks are compiled

    @property
    def sharded(self) -> bool:
        """Whether parameters become DTensors."""
        return distributed.world_size() > 1 or self.dtype != "float32"

    def __post_init__(self) -> None:
        if distributed.world_size() % self.replicas:
            raise UserError(
                f"--replicas {self.replicas}: {distributed.world_size()} processes do not divide into so many groups; "
                "start a multiple of it with torchrun, or leave it out"
            )

    @property
    def shares(self) -> bool:
        """Whether no process holds a whole model."""
        return distributed.world_size() > self.replicas

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """All processes: those that shard the model, in as many groups as there are replicas."""
        world = distributed.world_size()
        kind = self.device.partition(":")[0]
        if kind == "cuda":
            torch.cuda.set_device(self.device)  # or a mesh of one would take the first
        distributed.ensure_group()
        if self.replicas == 1:
            return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (self.replicas, world // self.replicas), mesh_dim_names=("replicate", "shard"))


class TrainModule(nn.Module):
    """A model as training sees it: token ids in, losses out."""

    def __init__(self, model: PreTrainedModel, device: str = "cpu", objective: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective or LanguageModel()
        self.device = torch.device(device)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter: the model's under their own names, the objective's with a prefix."""
        found = {name.removeprefix("model."): parameter for name, parameter in self.named_parameters()}
        return {name: parameter for name, parameter in found.items() if parameter.requires_grad}

    def forward(self, ids: Tensor, positions: Tensor | None = None, targets: Tensor | None = None) -> BatchLosses:
        """The losses of a batch.

        Args:
            ids: int64 [windows, positions].
            positions: of each token in its document, int64 of the same size; attention stays within documents then.
            targets: int64 [windows, positions - 1]; None for the token that follows.
        """
        sent = [None if t is None else t.to(self.device, non_blocking=True) for t in (ids, positions, targets)]
        return self.objective(self.model, cast(Tensor, sent[0]), sent[1], sent[2])


def place_model(
    model: PreTrainedModel,
    weights: Callable[[str], Tensor],
    execution: Execution,
    objective: Objective | None = None,
) -> TrainModule:
    """Give a model without weights its weights; one block is whole in memory, then each process keeps its part.

    Args:
        model: parameters on the meta device, buffers real (:func:`secateur.model.checkpoint.skeleton`).
        weights: name of a parameter -> its value, whole, the same in all processes.
        execution: where and how to compute.
        objective: what is minimised; None for the language-model loss. Of its parameters those that are not trained
            stay as and where they are, and the others are spread as the model is, but stay float32 in computing.
    """
    module = TrainModule(model, execution.device, objective)
    dtype = None if execution.dtype == "float32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    read = {parameter for parameter in module.objective.parameters() if not parameter.requires_grad}
    shard = _sharder(execution, policy, read) if execution.sharded else _leave
    _fill_blocks(model, weights, execution, shard)
    if any(parameter.requires_grad for parameter in module.objective.parameters()):
        module.objective.to(execution.device)
        if execution.sharded:
            _sharder(execution, MixedPrecisionPolicy(), read)(module.objective)
    shard(module)
    return module


def place_teacher(model: PreTrainedModel, weights: Callable[[str], Tensor], execution: Execution) -> PreTrainedModel:
    """Give a model that is only read its weights, in the type that is computed in; in evaluation mode.

    It is spread as one that is trained is, but where each process would hold all of it: then it is a plain model, which
    needs no copies to be gathered.

    Args:
        model: as in :func:`place_model`.
        weights: as there.
        execution: where and how to compute; recomputing is left out, since nothing goes back through it.
    """
    shard = _sharder(execution, MixedPrecisionPolicy(), set()) if execution.shares else _leave
    model.requires_grad_(False).eval()
    reading = dataclasses.replace(execution, recompute=False)
    _fill_blocks(model, weights, reading, shard, getattr(torch, execution.dtype))
    shard(model)
    return model


def _fill_blocks(
    model: PreTrainedModel,
    weights: Callable[[str], Tensor],
    execution: Execution,
    shard: Callable[[nn.Module], object],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give each block its weights and place it, then what is around the blocks its weights."""
    layers = family_of(model.config.model_type, where="the model").layers
    for number, block in enumerate(cast(nn.ModuleList, model.get_submodule(layers))):
        _fill(block, f"{layers}.{number}.", weights, execution.device, dtype)
        inner: Any = block
        if execution.recompute:
            inner.forward = functools.partial(recomputed, inner.forward, use_reentrant=False)
        if execution.compile:
            inner.forward = torch.compile(inner.forward)
        shard(block)
    model.tie_weights()  # so that a head that is tied is not filled
    _fill(model, "", weights, execution.device, dtype)
    model.tie_weights()


def _fill(module: nn.Module, prefix: str, weights: Callable[[str], Tensor], device: str, dtype: torch.dtype) -> None:
    """Put what has no weights yet, and buffers, on the device."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = weights(prefix + name).to(device, dtype, copy=True)  # what is stored is not to be written
            new = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module.get_submodule(owner)._parameters[leaf] = new
    for part in module.modules():
        part._buffers.update({name: b.to(device) for name, b in part._buffers.items() if b is not None})


def _leave(module: nn.Module) -> None:
    """Leave a module plain."""


def _sharder(
    execution: Execution, policy: MixedPrecisionPolicy, left: set[nn.Parameter]
) -> Callable[[nn.Module], object]:
    """What spreads a module over the processes, but for parameters that are left as they are."""

    def shard(module: nn.Module) -> None:
        # Whoever holds the whole model has nothing to free. What is not a block is used first and last, so that it
        # stays gathered; a teacher's is given back by whoever asks for it.
        again = execution.shares and not isinstance(module, TrainModule | PreTrainedModel)
        fully_shard(module, mesh=execution.mesh, mp_policy=policy, reshard_after_forward=again, ignored_params=left)

    return shard


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in place: what is written to it is written to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's part of ``value``, which is whole and of the parameter's size, on the parameter's device."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):  # without a source each process cuts its own: nothing is sent
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return local_part(value)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor; every process has to ask for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
