"""The block walk: calibration states stream through the decoder while one block's weights are in memory.

The engine knows blocks, states and statistics. It knows no method: what to observe, and what a score is made of, is
said by the caller.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur import distributed
from secateur.calibration.hooks import Observer, StopForward
from secateur.calibration.journal import Journal, StateStore
from secateur.calibration.lm_head import LMHead
from secateur.calibration.malloc import map_tensors, release_memory, reserve_heap
from secateur.calibration.prefetch import on_demand, prefetch
from secateur.calibration.statistics import StateStatistic, Statistic, join
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint, is_finite, skeleton
from secateur.progress import notify, track
from secateur.runtime import pick_batch

__all__ = ["Block", "BlockWalk", "States"]

States = list[Tensor]  #: hidden states, one tensor [windows of the batch, positions, hidden] for each batch
_Shown = TypeVar("_Shown")


class _Recorder(nn.Module):
    """Stands in for a block: passes the states on and keeps the keyword arguments that the model gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        self.seen = kwargs
        return states


class BlockWalk:
    """One pass over the decoder blocks of a checkpoint; of several processes each sends its share of the windows.

    Args:
        checkpoint: where the weights lie.
        windows: token ids [windows, positions], int64; None to visit weights alone.
        batch: windows that go through a block at once; execution only, but sums are rounded in another order. None for
            what suits the device.
        device: where blocks run.
        label: what progress is shown as.
        dtype: of the forward pass and the states; statistics and weights to be scored are float32 or better.
        store: where the states between blocks are held.
        journal: where what was found is kept, block by block.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Tensor | None,
        *,
        batch: int | None = None,
        device: str = "cpu",
        label: str = "calibrate",
        dtype: torch.dtype = torch.float32,
        store: StateStore | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.calibrated = windows is not None
        self.batches: list[Tensor] = []  #: of this process
        self.main_batches: list[Tensor] = []  #: of the first process; none has more, and one may have none
        self.targets = 0  #: tokens that a loss is measured on, in all processes: all but each window's first
        if windows is not None:
            batch = batch or pick_batch(windows.shape[1], device)
            self.batches, self.main_batches = (
                _batches(distributed.shard(windows), batch),
                _batches(distributed.shard(windows, 0), batch),
            )
            self.targets = windows.shape[0] * (windows.shape[1] - 1)
        self.device, self.dtype = device, dtype
        self.label = label
        self.store = store or StateStore()
        self.journal = Journal() if journal is None else journal  # an empty one is false
        map_tensors()
        self.model: nn.Module = skeleton(checkpoint.config, checkpoint.directory)
        self.layers: nn.ModuleList = self.model.get_submodule(self.family.layers)  # type: ignore[assignment]
        self._padding: int | None = getattr(self.embedding, "padding_idx", None)  # a token without a gradient
        self._kwargs: dict[int, list[dict[str, Any]]] = {}  # windows in a batch -> keyword arguments of each block

    @torch.no_grad()
    def start(self, batches: Sequence[Tensor] | None = None) -> States:
        """Embed the windows, or some of them: the states that enter the first block."""
        batches = self.batches if batches is None else batches
        self._place(self.family.final_norm, self.checkpoint.tensor(self.family.final_norm).float())
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
            for batch in batches:
                embedded = decoder(input_ids=self.load_embeddings(batch), use_cache=False).last_hidden_state
                states.append(self.store.save(embedded))
                seen = [recorder.seen for recorder in recorders]  # type: ignore[union-attr]
                self._kwargs.setdefault(batch.shape[0], seen)  # type: ignore[arg-type]
        finally:
            setattr(decoder, attribute, self.layers)
            setattr(decoder, norm_name, norm)
        return states

    def load_embeddings(self, ids: Tensor) -> Tensor:
        """Load the embeddings of these tokens and of no others; return the ids [windows, positions] of their rows."""
        table = self.checkpoint.tensor(self.family.embedding)
        present, renumbered = ids.unique(return_inverse=True)
        rows = table[present]
        self._place(self.family.embedding, rows.to(self.dtype))
        at = (present == self._padding).nonzero() if self._padding is not None else present[:0]
        self.embedding.padding_idx = int(at[0]) if at.numel() else None  # type: ignore[assignment]
        return renumbered.to(self.device)

    def observe(
        self,
        wanted: Mapping[str, Sequence[type[Statistic]]],
        state_kinds: Sequence[type[StateStatistic]] = (),
        *,
        replay: Callable[[Block], None] | None = None,
    ) -> Iterator[tuple[Block, dict[str, dict[type, Tensor]]]]:
        """Yield the blocks in order, each with statistics of what goes through it; finished ones are left out.

        Where the journal is complete there are none. Only the first process is shown any, as by :meth:`yield_on_main`.

        Args:
            wanted: site -> kinds of statistics to gather there.
            state_kinds: statistics of the states that enter and leave a block, told under the site ``states``.
            replay: given where blocks are changed while they are out, each of which is then run again, so that the next
                one sees its new outputs: does to a block, by what the journal says, what was done to it when it was
                finished before, or by the first process.
        """
        if self.journal.complete:
            return
        runs = self.calibrated and bool(wanted or state_kinds)
        finished = self.journal.finished_steps
        states = self.start() if runs else []
        found = self._kept_states(finished) if runs and finished else None
        for block in self.blocks(start=finished if found is not None or not runs else 0):
            if found is not None:
                states, found = found, None
            again = block.index < finished
            if again and replay:
                replay(block)
            elif not again:
                stats: dict[str, dict[type, Tensor]] = {}
                left: States = []
                if runs:
                    onwards = replay is None and block.index + 1 < len(self.layers)
                    stats, left = block.observe(states, wanted, state_kinds, keep=onwards)
                yield from self.yield_on_main(block.index, (block, stats))
                if runs and replay and not distributed.is_main():
                    replay(block)
                if runs and replay is None:
                    states = left
            if runs and (again or replay) and block.index + 1 < len(self.layers):
                # No name for what a resumed run must not go on with: it is beyond a block that was finished before.
                states = block.run(states, key=None if again else block.index + 1, consume=True)
            if not again:
                self.journal.finish(block.index)
                if self.store.directory:  # the next block writes over the states that an older note asks for
                    self.journal.flush()

    def yield_on_main(self, step: int, shown: _Shown) -> Iterator[_Shown]:
        """Yield to the first process what is to be decided on; the others take up what it then put into the journal."""
        if distributed.is_main():
            yield shown
        distributed.barrier()
        if not distributed.is_main():
            self.journal.load_step(step)

    def _kept_states(self, index: int) -> States | None:
        """The states that enter a block, as an earlier run left them on disk; None if a process lacks some.

        Where some are damaged, which is said, all are as good as lost.
        """
        hidden = self.checkpoint.shape.hidden
        held: States = []
        damage = ""
        for i, batch in enumerate(self.batches):
            try:
                states = self.store.load(_state_name(index, i), torch.Size([*batch.shape, hidden]), self.dtype)
            except ValueError as error:
                damage = str(error)
                break
            if states is None:
                break
            held.append(states)
        if not distributed.all_true(not damage):
            notify(f"{damage or 'states of another process are damaged'}; blocks that were finished are run once more")
        return held if distributed.all_true(len(held) == len(self.batches)) else None

    def blocks(self, *, start: int = 0, backwards: bool = False, part: str = "") -> Iterator[Block]:
        """Yield the blocks in order, each with its weights loaded; they are freed when the next one is asked for.

        Args:
            start: index of the first block.
            backwards: from the last block to the first.
            part: what progress is told besides.
        """
        order = list(enumerate(self.layers))[start:]
        with contextlib.ExitStack() as held, track(f"{self.label}{part}", len(self.layers)) as progress:
            progress.advance(start)
            order = order[::-1] if backwards else order
            load = prefetch if self.device.startswith("cuda") else on_demand
            weights = load([index for index, _ in order], self._read_block, self.device, self.dtype)
            held.enter_context(contextlib.closing(weights))
            for index, module in order:
                module.load_state_dict(next(weights), assign=True)
                yield Block(self, index, module)
                module.to("meta")
                release_memory()
                progress.advance(1, f"block {index + 1} of {len(self.layers)}")

    def _read_block(self, index: int) -> dict[str, Tensor]:
        tensors = self.checkpoint.block(index)
        for name, tensor in tensors.items():
            self.checkpoint.check_finite(self.family.block_tensor(index, name), tensor)
        return tensors

    def loss(self, states: States) -> float:
        """Mean next-token loss (nats) of states that left the last block."""
        losses = torch.tensor(self.head().losses(self.batches, [states]), dtype=torch.float64)
        return float(distributed.all_reduce(losses)) / self.targets

    @property
    def norm(self) -> nn.Module:
        """The final norm; its weight is there after :meth:`start`."""
        return self.model.get_submodule(self.family.final_norm.removesuffix(".weight"))

    @property
    def embedding(self) -> nn.Module:
        """The embedding; it holds rows of those tokens that :meth:`load_embeddings` saw last."""
        return self.model.get_submodule(self.family.embedding.removesuffix(".weight"))

    def head(self) -> LMHead:
        """What turns states into losses; after :meth:`start`."""
        return LMHead(self.checkpoint, self.norm, self.device)

    def _place(self, name: str, tensor: Tensor) -> None:
        self.checkpoint.check_finite(name, tensor)
        module = self.model.get_submodule(name.rpartition(".")[0])
        module.register_parameter(name.rpartition(".")[2], nn.Parameter(tensor.to(self.device), requires_grad=False))


def _batches(windows: Tensor, batch: int) -> list[Tensor]:
    return list(windows.split(batch)) if len(windows) else []


def _state_name(block: int, batch: int) -> str:
    """Two sets of files take turns: what enters a block, and what leaves it."""
    return f"{block % 2}-{batch:05}"


class Block:
    """A decoder block whose weights are loaded."""

    def __init__(self, walk: BlockWalk, index: int, module: nn.Module) -> None:
        self.walk, self.index, self.module = walk, index, module

    def forward(self, batch: Tensor) -> Tensor:
        """Send one batch of states through the block, with the arguments that the model would give it."""
        out = self.module(batch.to(self.walk.device), **self.walk._kwargs[batch.shape[0]][self.index])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def run(
        self,
        states: States,
        *,
        key: int | None = None,
        keep: bool = True,
        consume: bool = False,
        watch: Sequence[StateStatistic] = (),
    ) -> States:
        """Send states through the block.

        Args:
            states: what enters.
            key: the block that what leaves is kept for, so that a killed run can go on there; None where none will.
            keep: whether what leaves is wanted; else an empty list is returned.
            consume: give up each batch of ``states`` once what it became is there.
            watch: sees what enters and what leaves.

        Raises:
            UserError: if what comes out is not finite.
        """
        left: States = []
        with reserve_heap(self._activation(states)):
            for i in range(len(states)):
                out = self.forward(states[i])
                if not is_finite(out):
                    where = f"{self.walk.checkpoint.directory}: block {self.index}"
                    raise UserError(f"{where} puts out NaN or infinity on this calibration text")
                for statistic in watch:
                    statistic.update(states[i].to(out.device), out)
                if keep:
                    left.append(self.walk.store.save(out, None if key is None else _state_name(key, i)))
                if consume:
                    states[i] = out.new_empty(0)
        return left

    @torch.no_grad()
    def observe(
        self,
        states: States,
        wanted: Mapping[str, Sequence[type[Statistic]]],
        state_kinds: Sequence[type[StateStatistic]] = (),
        *,
        keep: bool = True,
    ) -> tuple[dict[str, dict[type, Tensor]], States]:
        """Send states through the block and gather statistics on the way.

        Args:
            states: what enters the block; given up where ``keep``.
            wanted: site -> the kinds of statistics to gather there.
            state_kinds: of statistics of what enters and leaves.
            keep: whether what leaves the block is wanted; else each batch goes no further than the last site.

        Returns:
            site -> kind -> value, and the states that leave the block.
        """
        family = self.walk.family
        widths = {"query": self.walk.checkpoint.shape.head_dim}
        gathered = {
            site: [kind(widths.get(family.sites[site].space, 1)) for kind in kinds] for site, kinds in wanted.items()
        }
        watch = [kind() for kind in state_kinds]
        pending: set[str] = set()
        left: States = []
        with contextlib.ExitStack() as hooks:
            for name, statistics in gathered.items():
                site = family.sites[name]
                module = self.module.get_submodule(site.module)
                see = Observer(name, statistics, pending if not (keep or watch) else None)
                hook = (
                    module.register_forward_hook(see.output)
                    if site.output
                    else module.register_forward_pre_hook(see.input)
                )
                hooks.callback(hook.remove)
            if keep or watch:
                left = self.run(states, key=self.index + 1, keep=keep, consume=keep, watch=watch)
            else:
                hooks.enter_context(reserve_heap(self._activation(states)))
                for batch in states:
                    pending.update(wanted)
                    with contextlib.suppress(StopForward):
                        self.forward(batch)
        join([*itertools.chain(*gathered.values()), *watch], self.walk.device)
        found: dict[str, dict[type, Tensor]] = {}
        for site, statistics in gathered.items():
            found[site] = {type(s): s.value() for s in statistics}
        if watch:
            found["states"] = {type(s): s.value() for s in watch}
        return found, left

    def _activation(self, states: States) -> int:
        """Bytes of the largest activation that a batch becomes."""
        channels = max(self.walk.checkpoint.shape.hidden, self.walk.checkpoint.shape.ffn)
        return max((batch[..., 0].numel() * channels * batch.itemsize for batch in states), default=0)

    def weight(self, linear: str) -> Tensor:
        """A linear's weight [out, in], or another tensor of the block, as stored but in float32."""
        if self.walk.dtype == torch.float32:
            return self.module.get_parameter(linear).data
        name = self.walk.family.block_tensor(self.index, linear)
        return self.walk.checkpoint.tensor(name).to(self.walk.device, torch.float32)

    def set_weight(self, linear: str, weight: Tensor) -> None:
        """Replace a linear's weight for the rest of this block's life."""
        self.module.get_parameter(linear).data = weight.to(self.walk.device, self.walk.dtype)
