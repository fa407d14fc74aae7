"""Placing a model on processes: FSDP2, bfloat16 over float32 weights, recomputation, compilation.

One process that computes in float32 holds a plain model. Otherwise each block, and the modules around the blocks, are
sharded over the processes (``fully_shard``, arXiv:2304.11277). Each process stores its part of weights, gradients and
moments in float32; gradients are summed in float32; the weights of a block are gathered, optionally in bfloat16, while
it computes.
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
from secateur.losses.next_token import IGNORE_INDEX
from secateur.losses.top_k import TopK
from secateur.model.families import family_of
from secateur.training.dropout import disable_dropout
from secateur.training.objective import BatchLosses, LanguageModel, Objective
from secateur.training.routing import RouterBalance, balance_of, router_modules

__all__ = ["Execution", "TrainModule", "full_tensor", "local_part", "part_like", "place_model", "place_teacher"]


@dataclass(frozen=True)
class Execution:
    """How a run computes.

    Raises:
        UserError: if the processes do not divide into ``replicas`` groups.
    """

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"  #: dtype of activations; weights and sums are float32
    replicas: int = 1  #: groups of processes that each hold the model; gradients are summed over all (HSDP)
    recompute: bool = False  #: recompute the activations of blocks in the backward pass
    compile: bool = False  #: compile the blocks

    @property
    def sharded(self) -> bool:
        """Whether parameters become DTensors."""
        return distributed.world_size() > 1 or self.dtype != "float32"

    def __post_init__(self) -> None:
        if distributed.world_size() % self.replicas:
            raise UserError(
                f"`replicas` {self.replicas}: {distributed.world_size()} processes do not divide into so many groups; "
                "start a multiple of it with torchrun, or leave it out"
            )

    @property
    def splits_model(self) -> bool:
        """Whether a process holds a part of the model only."""
        return distributed.world_size() > self.replicas

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """All processes: [replicas, processes of a replica], or one axis for one replica."""
        world = distributed.world_size()
        kind = self.device.partition(":")[0]
        if kind == "cuda":
            torch.cuda.set_device(self.device)  # or a mesh of one process would take the first device
        distributed.ensure_group()
        if self.replicas == 1:
            return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (self.replicas, world // self.replicas), mesh_dim_names=("replicate", "shard"))


class TrainModule(nn.Module):
    """A model and an objective: token ids in, losses out."""

    def __init__(self, model: PreTrainedModel, device: str = "cpu", objective: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective or LanguageModel()
        routers = router_modules(model)
        #: of a mixture's routers; None for a dense model
        self.balance = RouterBalance(routers, balance_of(model.config)) if routers else None
        self.device = torch.device(device)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter: the model's under their own names, the objective's with a prefix."""
        parameters = {name.removeprefix("model."): parameter for name, parameter in self.named_parameters()}
        return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        teacher: TopK | None = None,
    ) -> BatchLosses:
        """The losses of a batch.

        Args:
            ids: int64 [windows, positions].
            positions: of each token in its document, int64 of the same size; attention stays within documents then.
            targets: int64 [windows, positions - 1]; None for the token that follows.
            teacher: a teacher's distribution at the positions of the targets, for an objective that takes it.
        """
        tensors = [None if t is None else t.to(self.device, non_blocking=True) for t in (ids, positions, targets)]
        if self.balance is not None:
            self.balance.begin()
        more = () if teacher is None else (teacher.to(self.device),)
        losses = self.objective(self.model, cast(Tensor, tensors[0]), tensors[1], tensors[2], *more)
        if self.balance is not None and self.training:
            weight = losses.each.numel() if tensors[2] is None else (tensors[2] != IGNORE_INDEX).sum()
            losses = losses._replace(total=losses.total + weight * self.balance.loss())
        return losses

    def figures(self) -> dict[str, float]:
        """Numbers to record after a step, besides the loss."""
        return {**self.objective.figures(), **(self.balance.figures() if self.balance is not None else {})}


def place_model(
    model: PreTrainedModel, weights: Callable[[str], Tensor], execution: Execution, objective: Objective | None = None
) -> TrainModule:
    """Load weights into a model block by block; each process keeps its part. Dropout is off.

    Args:
        model: parameters on the meta device, buffers real (:func:`secateur.model.checkpoint.skeleton`).
        weights: name of a parameter -> its whole value, the same in all processes.
        objective: the loss; None for the language-model loss. Its trained parameters are sharded like the model but
            compute in float32; the others are not moved.
    """
    disable_dropout(model)
    module = TrainModule(model, execution.device, objective)
    dtype = None if execution.dtype == "float32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    frozen = {parameter for parameter in module.objective.parameters() if not parameter.requires_grad}
    shard = _sharder(execution, policy, frozen) if execution.sharded else _keep_whole
    _fill_blocks(model, weights, execution, shard)
    if any(parameter.requires_grad for parameter in module.objective.parameters()):
        module.objective.to(execution.device)
        if execution.sharded:
            _sharder(execution, MixedPrecisionPolicy(), frozen)(module.objective)
    shard(module)
    return module


def place_teacher(model: PreTrainedModel, weights: Callable[[str], Tensor], execution: Execution) -> PreTrainedModel:
    """Load weights into a frozen model, in the dtype of the computation and in evaluation mode.

    It is sharded like a trained model, except where each process would hold all of it: then it stays a plain model,
    and nothing is gathered.

    Args:
        execution: where and how to compute; nothing is recomputed, since there is no backward pass.
    """
    shard = _sharder(execution, MixedPrecisionPolicy(), set()) if execution.splits_model else _keep_whole
    model.requires_grad_(False).eval()
    forward_only = dataclasses.replace(execution, recompute=False)
    _fill_blocks(model, weights, forward_only, shard, getattr(torch, execution.dtype))
    shard(model)
    return model


def _fill_blocks(
    model: PreTrainedModel,
    weights: Callable[[str], Tensor],
    execution: Execution,
    shard: Callable[[nn.Module], object],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Load and shard each block, then load the modules around the blocks."""
    layers = family_of(model.config.model_type, where="the model").layers
    for number, block in enumerate(cast(nn.ModuleList, model.get_submodule(layers))):
        _fill(block, f"{layers}.{number}.", weights, execution.device, dtype)
        inner: Any = block
        if execution.recompute:
            inner.forward = functools.partial(recomputed, inner.forward, use_reentrant=False)
        if execution.compile:
            inner.forward = torch.compile(inner.forward)
        shard(block)
    model.tie_weights()  # so that a tied head is not loaded
    _fill(model, "", weights, execution.device, dtype)
    model.tie_weights()


def _fill(module: nn.Module, prefix: str, weights: Callable[[str], Tensor], device: str, dtype: torch.dtype) -> None:
    """Load the parameters that have no values yet and the stored buffers, and move all buffers to the device."""
    for name, parameter in list(module.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            kind = dtype if parameter.is_floating_point() else parameter.dtype  # an adapter's mask is of bools
            value = weights(prefix + name).to(device, kind, copy=True)  # the stored tensor must not change
            new = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module.get_submodule(owner)._parameters[leaf] = new
    for path, part in module.named_modules():
        for leaf, buffer in part._buffers.items():
            if buffer is not None:
                if leaf not in part._non_persistent_buffers_set:
                    buffer = weights(prefix + f"{path}.{leaf}".lstrip(".")).to(buffer.dtype, copy=True)
                part._buffers[leaf] = buffer.to(device)


def _keep_whole(module: nn.Module) -> None:
    """Do not shard a module."""


def _sharder(
    execution: Execution, policy: MixedPrecisionPolicy, ignored: set[nn.Parameter]
) -> Callable[[nn.Module], object]:
    """A function that shards a module over the processes, except the ``ignored`` parameters."""

    def shard(module: nn.Module) -> None:
        # A process that holds the whole model has nothing to free. Modules around the blocks are used first and last,
        # so they stay gathered; the distillation objective frees a teacher's.
        reshard = execution.splits_model and not isinstance(module, TrainModule | PreTrainedModel)
        mixed = policy
        if isinstance(module, TrainModule):  # it is given ids, and a teacher's distribution, which stays in float32
            mixed = dataclasses.replace(policy, cast_forward_inputs=False)
        fully_shard(module, mesh=execution.mesh, mp_policy=mixed, reshard_after_forward=reshard, ignored_params=ignored)

    return shard


def local_part(tensor: Tensor) -> Tensor:
    """A view of this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's part of the whole ``value``, which has the parameter's size, on the parameter's device."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):  # without a source rank each process cuts its own part: nothing is sent
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return local_part(value)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
