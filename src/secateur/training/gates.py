"""Gates on a model's layers, channels and heads, learned along with its weights: an objective for the training loop.

A gate multiplies the signal of its unit. Gates of zero and one give the same outputs as the model cut accordingly.
Their places, in every family:

- a hidden channel, FFN channel or KV head: the input of every linear that reads it; hidden channels also the output of
  the final norm;
- a layer: its two additions to the residual stream, of attention and FFN, and its scale of the stream in some families.

A norm over partly closed channels takes the mean and the root mean square of the open ones, as in the cut model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UserError
from secateur.methods.base import LearnedMethod
from secateur.model.families import SPACE_OF
from secateur.model.shapes import SPACES, Shape
from secateur.training.objective import BatchLosses, LanguageModel, Objective
from secateur.training.parallel import full_tensor, local_part

__all__ = ["Gates"]


class Gates(Objective):
    """The language-model loss under gates whose expected number is driven to a shape.

    Args:
        model: its modules get hooks; its weights may still be missing.
        pinned: layers that stay besides those that the family names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: LearnedMethod,
        before: Shape,
        after: Shape,
        *,
        pinned: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.method, self.before, self.after = method, before, after
        self.loss = LanguageModel()
        self.spaces = [space for space in SPACES if after.units(space) < before.units(space)]
        if "hidden" in self.spaces and before.tied and not before.family.final_norm_tensors:
            raise UserError(
                f"`axes`: gates of hidden channels end in the last norm's weights, and a {before.family.name} has none "
                "and a tied head; cut other axes, or with another method"
            )
        rows = {space: 1 if space in ("layers", "hidden") else before.layers for space in self.spaces}

        def parameters(value: float, units: bool) -> nn.ParameterDict:
            sizes = {space: (n, before.units(space)) if units else (n,) for space, n in rows.items()}
            return nn.ParameterDict({space: nn.Parameter(torch.full(size, value)) for space, size in sizes.items()})

        self.a = parameters(method.START, units=True)  #: of the gates, [rows, units]
        self.linear = parameters(0.0, units=False)  #: the multiplier lambda of each constraint, [rows]
        self.quadratic = parameters(method.phi, units=False)  #: phi, likewise
        self.values: dict[str, Tensor] = {}  #: the gates that the hooks apply, [rows, units]
        self._expected: dict[str, Tensor] = {}  # share of open gates, its mean over the rows
        self._step, self._share = 0, 0.0  # share of the way from the full shape to the target
        stay = {*pinned, *(before.family.pinned(model.config) if before.family.pinned else ())}
        self.pinned = sorted(stay) if "layers" in self.spaces else []
        self._hook(model)

    # --- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, step: int, steps: int) -> None:
        self._step, self._share = step, min(1.0, (step + 1) / max(1.0, self.method.warmup * steps))
        for a in self.a.values():  # beyond the limit a gate's gradient vanishes
            local_part(a).clamp_(-self.method.LIMIT, self.method.LIMIT)
        if self.pinned:
            local_part(self.a["layers"])[:, self.pinned] = self.method.LIMIT

    def groups(self) -> list[dict[str, Any]]:
        # With an epsilon above any gradient Adam steps by its mean: d itself, and not its sign.
        multipliers = [*self.linear.values(), *self.quadratic.values()]
        return [
            {"params": list(self.a.values()), "peak_rate": self.method.mask_rate},
            {"params": multipliers, "peak_rate": self.method.multiplier_rate, "eps": 1.0, "maximize": True},
        ]

    def figures(self) -> Mapping[str, float]:
        """The mean expected size of each space, and its present target."""
        if not self._expected:
            return {}
        units = {space: self.before.units(space) for space in self.spaces}
        sizes = {space: float(self._expected[space]) * units[space] for space in self.spaces}
        return sizes | {f"{space}_target": self._target(space) * units[space] for space in self.spaces}

    def note(self) -> str:
        figures = self.figures()
        return "  ".join(f"{space} {figures[space]:.4g}/{figures[f'{space}_target']:.4g}" for space in self.spaces)

    def forward(
        self, model: PreTrainedModel, ids: Tensor, positions: Tensor | None, targets: Tensor | None
    ) -> BatchLosses:
        """The losses under drawn gates, and the penalty; in evaluation mode those under settled gates."""
        draw = self._draw_gates if self.training else (lambda space, a: self.method.eval_gates(a))
        self.values = {space: draw(space, a) for space, a in self.a.items()}
        if self.pinned:
            self.values["layers"] = self.values["layers"].index_fill(1, torch.tensor(self.pinned), 1.0)
        total, each, _ = self.loss(model, ids, positions, targets)
        return BatchLosses(total, each, self._penalty() if self.training else None)

    def _draw_gates(self, space: str, a: Tensor) -> Tensor:
        """The random gates of this step, equal for all its batches and in all processes."""
        seed = hashlib.sha256(f"{self.method.seed}:{space}:{self._step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        u = torch.rand(a.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        return self.method.sample_gates(a, u.to(a.device))

    def _penalty(self) -> Tensor:
        stands = float(self._share == 1)  # multipliers have no gradient until the target is final
        terms = []
        for space, a in self.a.items():
            open_share = self.method.open_probability(a).mean(dim=1)
            self._expected[space] = open_share.detach().mean()
            linear, quadratic = (m[space].detach().lerp(m[space], stands) for m in (self.linear, self.quadratic))
            terms.append(self.method.penalty(open_share - self._target(space), linear, quadratic))
        return torch.stack(terms).sum()

    def _target(self, space: str) -> float:
        removed = 1 - self.after.units(space) / self.before.units(space)
        return 1 - self._share * removed

    # --- hooks ------------------------------------------------------------------------------------------------------

    def _hook(self, model: PreTrainedModel) -> None:
        family = self.before.family
        for number, block in enumerate(cast(nn.ModuleList, model.get_submodule(family.layers))):
            modules = dict(block.named_modules())
            norms = {name.removesuffix(".weight"): axes for name, axes in self.before.block_tensors(number).items()}
            norms = {name: axes[0] for name, axes in norms.items() if len(axes) == 1 and name.endswith("norm")}
            outputs = {
                site.module: site.space for site in family.sites.values() if site.output
            }  # norms without weights
            for name, axis in {**outputs, **norms}.items():
                self._hook_norm(modules[name], str(axis), number)
            for site in family.sites.values():
                gate = partial(self._gate_input, axis=site.space, layer=number)
                readers = [reader for reader in site.readers if reader in modules]
                if readers and site.output:
                    block.get_submodule(site.module).register_forward_hook(partial(_after, gate))
                for reader in () if site.output else readers:
                    block.get_submodule(reader).register_forward_pre_hook(partial(_before, gate))
            for writer in (name for name in family.writers if name in modules):
                writes = partial(self._gate_layer, layer=number)
                block.get_submodule(writer).register_forward_hook(partial(_after, writes))
            if family.stream_scale:
                scales = partial(self._gate_scale, block=block, layer=number)
                block.register_forward_hook(partial(_after, scales))
        norm = model.get_submodule(family.final_norm)
        self._hook_norm(norm, "hidden", 0)
        norm.register_forward_hook(partial(_after, partial(self._gate_input, axis="hidden", layer=0)))

    def _hook_norm(self, norm: nn.Module, axis: str, layer: int) -> None:
        centers = self.before.family.norms_center

        def close_channels(x: Tensor) -> Tensor:
            gate = self._channel_gates(axis, layer)
            if gate is None:
                return x
            is_open = (gate > 0).to(x.dtype)
            return (x - (x * is_open).sum(-1, keepdim=True) / is_open.sum() if centers else x) * is_open

        def rescale(x: Tensor) -> Tensor:
            gate = self._channel_gates(axis, layer)
            if gate is None:
                return x
            share = (gate > 0).float().mean().sqrt().to(x.dtype)
            bias: Tensor | None = getattr(norm, "bias", None)
            return x * share if bias is None else x * share + bias.to(x.dtype) * (1 - share)

        norm.register_forward_pre_hook(partial(_before, close_channels))
        norm.register_forward_hook(partial(_after, rescale))  # before those that gate its output

    def _channel_gates(self, axis: str, layer: int) -> Tensor | None:
        """The gates of an axis's channels in a layer; None where the axis has no gates."""
        space = SPACE_OF.get(axis, axis)
        if space not in self.values:
            return None
        gates = self.values[space][layer if space != "hidden" else 0]
        return gates if space != "kv" else gates.repeat_interleave(self.before.axis_size(axis) // len(gates))

    def _gate_input(self, x: Tensor, *, axis: str, layer: int) -> Tensor:
        gate = self._channel_gates(axis, layer)
        return x if gate is None else x * gate.to(x.dtype)

    def _gate_layer(self, x: Tensor, *, layer: int) -> Tensor:
        return x * self.values["layers"][0, layer].to(x.dtype) if "layers" in self.values else x

    def _gate_scale(self, x: Tensor, *, block: nn.Module, layer: int) -> Tensor:
        """Undo a block's scale of the stream as far as the block is closed: of a removed one nothing is left."""
        if "layers" not in self.values:
            return x
        scale = block.get_buffer(self.before.family.stream_scale)
        return x * ((1 + self.values["layers"][0, layer] * (scale - 1)) / scale).to(x.dtype)

    # --- the end ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """``a`` of every gate, [rows, units] on the CPU, the most for layers that must stay; all processes together."""
        limit = self.method.LIMIT
        scores = {space: full_tensor(a.detach()).cpu().clamp(-limit, limit) for space, a in self.a.items()}
        if self.pinned:
            scores["layers"][:, self.pinned] = 2 * limit
        return scores


def _before(change: Callable[[Tensor], Tensor], _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return change(arguments[0]), *arguments[1:]


def _after(change: Callable[[Tensor], Tensor], _module: nn.Module, _arguments: Any, result: Tensor) -> Tensor:
    return change(result)
