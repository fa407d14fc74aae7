"""The block walk: calibration states stream through the decoder while one block's weights are in memory.

The engine knows blocks, states and statistics. It knows no method: what to observe, and what a score is made of, is
said by the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibrate.stats import StateStatistic, Statistic
from secateur.checkpoint import Checkpoint, skeleton
from secateur.errors import UserError
from secateur.progress import task

__all__ = ["Block", "BlockWalk", "States", "removal_losses"]

States = list[Tensor]  #: hidden states, one tensor [windows of the batch, positions, hidden] for each batch


class _Recorder(nn.Module):
    """Stands in for a block: passes the states on and keeps the keyword arguments that the model gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        self.seen = kwargs
        return states


class BlockWalk:
    """One pass over the decoder blocks of a checkpoint.

    Args:
        checkpoint: where the weights lie.
        windows: token ids [windows, positions], int64; None to visit weights alone.
        batch: windows that go through a block at once; execution only, but sums are rounded in another order.
        device: where blocks run.
        label: what progress is shown as.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Tensor | None,
        *,
        batch: int = 8,
        device: str = "cpu",
        label: str = "calibrate",
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.batches = [b.to(device) for b in windows.split(batch)] if windows is not None else []
        self.device = device
        self.label = label
        self.model: nn.Module = skeleton(checkpoint.config, checkpoint.directory)
        self.layers: nn.ModuleList = self.model.get_submodule(self.family.layers)  # type: ignore[assignment]
        self._outer = [n for n in self.family.outer if n != self.family.head]
        self._kwargs: dict[int, list[dict[str, Any]]] = {}  # windows in a batch -> keyword arguments of each block

    @torch.no_grad()
    def start(self) -> States:
        """Embed the windows: the states that enter the first block."""
        for name in self._outer:
            self._place(name, self.checkpoint.tensor(name))
        for _, buffer_owner in self.model.named_modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                buffer_owner._buffers[name] = buffer.to(self.device)
        recorders = nn.ModuleList(_Recorder() for _ in self.layers)
        parent_name, _, attribute = self.family.layers.rpartition(".")
        decoder = self.model.get_submodule(parent_name)
        norm_name = self.family.final_norm.removesuffix(".weight").removeprefix(f"{parent_name}.")
        norm = decoder.get_submodule(norm_name)
        setattr(decoder, attribute, recorders)
        setattr(decoder, norm_name, nn.Identity())  # so that what comes back is the embedding, not its norm
        try:
            states = []
            for batch in self.batches:
                states.append(decoder(input_ids=batch, use_cache=False).last_hidden_state)
                seen = [recorder.seen for recorder in recorders]  # type: ignore[union-attr]
                self._kwargs.setdefault(batch.shape[0], seen)  # type: ignore[arg-type]
        finally:
            setattr(decoder, attribute, self.layers)
            setattr(decoder, norm_name, norm)
        return states

    def observed(
        self,
        wanted: Mapping[str, Sequence[type[Statistic]]],
        state_kinds: Sequence[type[StateStatistic]] = (),
    ) -> Iterator[tuple[Block, dict[str, dict[type, Tensor]]]]:
        """Yield the blocks in order, each with statistics of what goes through it.

        A block whose weights are changed while it is out is run again, so that the next one sees its new outputs.

        Args:
            wanted: site -> kinds of statistics to gather there.
            state_kinds: statistics of the states that enter and leave a block, told under the site ``states``.
        """
        runs = bool(self.batches) and bool(wanted or state_kinds)
        states = self.start() if runs else []
        for block in self.blocks():
            stats, left = block.observe(states, wanted) if runs else ({}, states)
            for kind in state_kinds:
                statistic = kind()
                for before, after in zip(states, left, strict=True):
                    statistic.update(before, after)
                stats.setdefault("states", {})[kind] = statistic.value()
            yield block, stats
            states = block.run(states) if runs and block.changed else left

    def blocks(self, *, backwards: bool = False) -> Iterator[Block]:
        """Yield the blocks in order, each with its weights loaded; they are freed when the next one is asked for."""
        order = list(enumerate(self.layers))
        with task(self.label, len(self.layers)) as progress:
            for index, module in reversed(order) if backwards else order:
                tensors = self.checkpoint.block(index)
                for name, tensor in tensors.items():
                    self._check_finite(self.family.block_tensor(index, name), tensor)
                # A copy, because a stored float32 tensor is a view into the mapped file and blocks are pruned in place.
                loaded = {n: t.to(self.device, torch.float32, copy=True) for n, t in tensors.items()}
                module.load_state_dict(loaded, assign=True)
                yield Block(self, index, module)
                module.to("meta")
                release_memory()
                progress.advance(1, f"block {index + 1} of {len(self.layers)}")

    @torch.no_grad()
    def loss(self, states: States) -> float:
        """Mean next-token loss (nats) of states that left the last block."""
        head = self.head()
        total, count = 0.0, 0
        for ids, hidden in zip(self.batches, states, strict=True):
            for window, target in zip(self.norm(hidden), ids, strict=True):  # one window's logits at a time
                logits = self.capped(window[:-1] @ head.T)
                losses = nn.functional.cross_entropy(logits, target[1:], reduction="sum")
                total += float(losses)
                count += target.numel() - 1
        return total / count

    @property
    def norm(self) -> nn.Module:
        """The final norm; its weight is there after :meth:`start`."""
        return self.model.get_submodule(self.family.final_norm.removesuffix(".weight"))

    def capped(self, logits: Tensor) -> Tensor:
        """The logits as the model puts them out: some families bound what comes out of the head."""
        cap = getattr(self.checkpoint.config, self.family.logit_cap, None) if self.family.logit_cap else None
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def head(self) -> Tensor:
        """The weight [vocabulary, hidden] that turns states into logits, float32."""
        stored = self.checkpoint.tensor(self.family.head)
        self._check_finite(self.family.head, stored)
        return stored.to(self.device, torch.float32)

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.checkpoint.directory}: {name} holds NaN or infinity")

    def _place(self, name: str, tensor: Tensor) -> None:
        self._check_finite(name, tensor)
        module = self.model.get_submodule(name.rpartition(".")[0])
        module.register_parameter(
            name.rpartition(".")[2], nn.Parameter(tensor.to(self.device, torch.float32), requires_grad=False)
        )


class Block:
    """A decoder block whose weights are loaded."""

    def __init__(self, walk: BlockWalk, index: int, module: nn.Module) -> None:
        self.walk, self.index, self.module = walk, index, module
        self.changed = False  #: whether a weight was replaced

    def forward(self, batch: Tensor) -> Tensor:
        """Send one batch of states through the block, with the arguments that the model would give it."""
        out = self.module(batch, **self.walk._kwargs[batch.shape[0]][self.index])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def run(self, states: States) -> States:
        """Send states through the block.

        Raises:
            UserError: if what comes out is not finite.
        """
        left = []
        for batch in states:
            out = self.forward(batch)
            if not torch.isfinite(out).all():
                where = f"{self.walk.checkpoint.directory}: block {self.index}"
                raise UserError(f"{where} puts out NaN or infinity on this calibration text")
            left.append(out)
        return left

    def observe(
        self, states: States, wanted: Mapping[str, Sequence[type[Statistic]]]
    ) -> tuple[dict[str, dict[type, Tensor]], States]:
        """Send states through the block and gather statistics on the way.

        Args:
            states: what enters the block.
            wanted: site -> the kinds of statistics to gather there.

        Returns:
            site -> kind -> value, and the states that leave the block.
        """
        family = self.walk.family
        widths = {"query": self.walk.checkpoint.shape.head_dim}
        gathered = {
            site: [kind(widths.get(family.sites[site].space, 1)) for kind in kinds] for site, kinds in wanted.items()
        }
        with contextlib.ExitStack() as hooks:
            for name, statistics in gathered.items():
                site = family.sites[name]
                module = self.module.get_submodule(site.module)
                hook = _hook(statistics, site.output)
                register = module.register_forward_hook if site.output else module.register_forward_pre_hook
                hooks.callback(register(hook).remove)
            left = self.run(states)
        return {site: {type(s): s.value() for s in found} for site, found in gathered.items()}, left

    def weight(self, linear: str) -> Tensor:
        """A linear's weight [out, in], or another tensor of the block, float32."""
        return self.module.get_parameter(linear).data

    def set_weight(self, linear: str, weight: Tensor) -> None:
        """Replace a linear's weight for the rest of this block's life."""
        self.module.get_parameter(linear).data = weight
        self.changed = True


def _hook(statistics: Sequence[Statistic], output: bool) -> Callable[..., None]:
    def observe(_module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor | None = None) -> None:
        values = result if output else arguments[0]
        assert values is not None
        for statistic in statistics:
            statistic.update(values)

    return observe


def removal_losses(walk: BlockWalk, length: int) -> tuple[float, list[float]]:
    """The loss with each contiguous run of ``length`` blocks bypassed, in one walk.

    The states before a run are those of the full model, so candidate ``i`` costs only the blocks after its run. At most
    ``layers - length + 1`` sets of states are held.

    Returns:
        The full model's loss, and the loss of each candidate, by the index of the run's first block.
    """
    full = walk.start()
    candidates: dict[int, States] = {}  # first bypassed block -> states so far
    last = len(walk.layers) - length
    for block in walk.blocks():
        if block.index <= last:
            candidates[block.index] = full
        full = block.run(full)
        for first in candidates:
            if block.index >= first + length:
                candidates[first] = block.run(candidates[first])
    return walk.loss(full), [walk.loss(candidates[first]) for first in range(last + 1)]


def release_memory() -> None:
    """Give freed memory back to the system; glibc keeps it otherwise and a long walk would creep upwards."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
