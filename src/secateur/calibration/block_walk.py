"""The block walk: calibration states stream through the decoder while one block's weights are in memory.

The walk knows blocks, states and statistics, but no method: the caller says what to observe and computes the scores.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur import distributed
from secateur.calibration.block import Block, States, state_name
from secateur.calibration.journal import Journal, StateStore
from secateur.calibration.lm_head import LMHead
from secateur.calibration.malloc import map_tensors, release_memory
from secateur.calibration.prefetch import on_demand, prefetch
from secateur.calibration.routed import ExpertVisits, StreamedExperts
from secateur.calibration.shared_keys import key_sources
from secateur.calibration.statistics import StateStatistic, Statistic
from secateur.model.checkpoint import Checkpoint, skeleton
from secateur.model.families import Family
from secateur.progress import notify, track
from secateur.runtime import pick_batch

__all__ = ["BlockWalk", "default_batch"]

_EXPERT_BATCH = 8  #: batches of a dense model that make one of a mixture

_Item = TypeVar("_Item")


def default_batch(family: Family, positions: int, device: str) -> int:
    """The number of windows that go through a block at once, unless the caller chooses.

    An expert sees a small share of the tokens, and its weights are read for each batch, so mixtures get more.
    """
    return pick_batch(positions, device) * (_EXPERT_BATCH if family.experts else 1)


class _Recorder(nn.Module):
    """Replaces a block: returns the states and records the keyword arguments that the model passes."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        self.arguments = kwargs
        return states


class BlockWalk:
    """One pass over the decoder blocks of a checkpoint; with several processes, each runs its share of the windows.

    Args:
        windows: token ids [windows, positions], int64; None to visit only the weights.
        batch: windows that go through a block at once; it only affects rounding. None for a default of the device.
        dtype: type of the forward pass and the states; statistics and scored weights are float32 or better.
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
        self.batches: list[Tensor] = []  #: batches of this process
        self.main_batches: list[Tensor] = []  #: batches of the main process; no process has more, and one may have none
        self.targets = 0  #: tokens with a loss, over all processes: all but each window's first
        self.first_window = 0  #: number of this process's first window, among those of all processes
        if windows is not None:
            batch = batch or default_batch(self.family, windows.shape[1], device)
            self.batches, self.main_batches = (
                _batches(distributed.shard(windows), batch),
                _batches(distributed.shard(windows, 0), batch),
            )
            self.targets = windows.shape[0] * (windows.shape[1] - 1)
            self.first_window = sum(len(distributed.shard(windows, rank)) for rank in range(distributed.rank()))
        self.device, self.dtype = device, dtype
        self.key_sources = key_sources(checkpoint.config)  #: their keys and values lie behind the hidden channels
        self.label = label
        self.store = store or StateStore()
        self.journal = Journal() if journal is None else journal  # an empty journal is falsy
        map_tensors()
        self.model: nn.Module = skeleton(checkpoint.config, checkpoint.directory)
        self.layers: nn.ModuleList = self.model.get_submodule(self.family.layers)  # type: ignore[assignment]
        for index, layer in enumerate(self.layers if self.family.experts else ()):
            if checkpoint.shape.has_space("experts", index):
                parent, _, name = self.family.experts.rpartition(".")
                read = functools.partial(self.read_expert, index)
                experts = StreamedExperts(layer.get_submodule(self.family.experts), read, self._to_device)
                setattr(layer.get_submodule(parent), name, experts)
        self._padding: int | None = getattr(self.embedding, "padding_idx", None)  # its embedding has no gradient
        self._kwargs: dict[int, list[dict[str, Any]]] = {}  # windows in a batch -> keyword arguments of each block

    @torch.no_grad()
    def start(self, batches: Sequence[Tensor] | None = None) -> States:
        """Embed the windows, or only ``batches``: the states that enter the first block."""
        batches = self.batches if batches is None else batches
        self._load_ends()
        recorders = nn.ModuleList(_Recorder() for _ in self.layers)
        states = []
        with self.without_blocks(recorders) as decoder:
            for batch in batches:
                embedded = decoder(input_ids=self.load_embeddings(batch), use_cache=False).last_hidden_state
                states.append(self.store.save(embedded))
                arguments = [recorder.arguments for recorder in recorders]  # type: ignore[union-attr]
                self._kwargs.setdefault(batch.shape[0], arguments)  # type: ignore[arg-type]
        return states

    def _load_ends(self) -> None:
        """Load the last norm, and move buffers to the device."""
        for name in self.family.final_norm_tensors:
            self._place(name, self.checkpoint.tensor(name).float())
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    def arguments(self, states: Tensor, number: int) -> list[dict[str, Any]]:
        """The keyword arguments that the model passes to each block.

        Args:
            states: of a batch.
            number: of the batch, among those of the last :meth:`start`.
        """
        return self._kwargs[states.shape[0]]

    def behind(self, out: Tensor, index: int, number: int) -> Tensor:
        """The states behind block ``index``, where the model adds something to its output ``out``."""
        return out

    @contextlib.contextmanager
    def without_blocks(self, recorders: nn.ModuleList | None = None) -> Iterator[nn.Module]:
        """The decoder without its blocks and its last norm, so that it returns what enters the first block.

        Args:
            recorders: modules in place of the blocks, which return what they read.
        """
        parent_name, _, attribute = self.family.layers.rpartition(".")
        decoder = self.model.get_submodule(parent_name)
        norm_name = self.family.final_norm.removeprefix(f"{parent_name}.")
        norm = decoder.get_submodule(norm_name)
        setattr(decoder, attribute, nn.ModuleList() if recorders is None else recorders)
        setattr(decoder, norm_name, nn.Identity())
        try:
            yield decoder
        finally:
            setattr(decoder, attribute, self.layers)
            setattr(decoder, norm_name, norm)

    def load_embeddings(self, ids: Tensor) -> Tensor:
        """Load only the embeddings of these tokens; return the indices [windows, positions] of their rows."""
        tokens, indices = ids.unique(return_inverse=True)
        rows = self.checkpoint.embeddings(tokens)
        self._place(self.family.embedding, rows.to(self.dtype))
        padding = (tokens == self._padding).nonzero() if self._padding is not None else tokens[:0]
        self.embedding.padding_idx = int(padding[0]) if padding.numel() else None  # type: ignore[assignment]
        return indices.to(self.device)

    def observe(
        self,
        kinds: Mapping[str, Sequence[type[Statistic]]],
        state_kinds: Sequence[type[StateStatistic]] = (),
        *,
        experts: bool = False,
        visits: ExpertVisits | None = None,
        replay: Callable[[Block], None] | None = None,
    ) -> Iterator[tuple[Block, dict[str, dict[type, Tensor]]]]:
        """Yield each unfinished block in order, with statistics of its activations; nothing for a complete journal.

        Only the main process yields, as in :meth:`yield_on_main`.

        Args:
            kinds: site -> kinds of statistics to gather there.
            state_kinds: statistics of the states that enter and leave a block, yielded under the site ``states``.
            experts: whether to gather :class:`ExpertOutputs` of routed experts, yielded under the site ``experts``.
            visits: what to do with each routed expert of a block before the block is yielded.
            replay: if the caller changes blocks, a function that makes the same change from the journal: in other
                processes, and to blocks finished before a restart. Each block then runs again, so that the next block
                sees its new outputs.
        """
        if self.journal.complete:
            return
        runs = self.calibrated and bool(kinds or state_kinds or experts or visits)
        finished = self.journal.finished_steps
        states = self.start() if runs else []
        stored = self._load_states(finished) if runs and finished else None
        for block in self.blocks(start=finished if stored is not None or not runs else 0):
            if stored is not None:
                states, stored = stored, None
            is_finished = block.index < finished
            if is_finished and replay:
                replay(block)
            elif not is_finished:
                stats: dict[str, dict[type, Tensor]] = {}
                outputs: States = []
                inputs = block.routed_inputs(states) if visits else None
                if runs:
                    is_needed = replay is None and block.index + 1 < len(self.layers)
                    stats, outputs = block.observe(
                        states, kinds, state_kinds, experts=experts, inputs=inputs, keep=is_needed
                    )
                block.visit_experts(inputs, visits)
                del inputs
                yield from self.yield_on_main(block.index, (block, stats))
                if runs and replay and not distributed.is_main():
                    replay(block)
                if runs and replay is None:
                    states = outputs
            if runs and (is_finished or replay) and block.index + 1 < len(self.layers):
                # Without a key before the first unfinished block: no run may resume there.
                states = block.run(states, key=None if is_finished else block.index + 1, consume=True)
            if not is_finished:
                self.journal.finish(block.index)
                if self.store.directory:  # the next block overwrites the states that an older marker needs
                    self.journal.flush()

    def yield_on_main(self, step: int, item: _Item) -> Iterator[_Item]:
        """Yield ``item`` on the main process; the others then load what it put into the journal."""
        if distributed.is_main():
            yield item
        distributed.barrier()
        if not distributed.is_main():
            self.journal.load_step(step)

    def _load_states(self, index: int) -> States | None:
        """Load the states that enter a block from an earlier run; None if a process lacks some or has damaged ones."""
        hidden = self.checkpoint.shape.hidden + sum(s.channels for s in self.key_sources if s.layer < index)
        loaded: States = []
        damage = ""
        for i, batch in enumerate(self.batches):
            try:
                states = self.store.load(state_name(index, i), torch.Size([*batch.shape, hidden]), self.dtype)
            except ValueError as error:
                damage = str(error)
                break
            if states is None:
                break
            loaded.append(states)
        if not distributed.all_true(not damage):
            notify(f"{damage or 'states of another process are damaged'}; finished blocks run once more")
        return loaded if distributed.all_true(len(loaded) == len(self.batches)) else None

    def blocks(self, *, start: int = 0, backwards: bool = False, part: str = "") -> Iterator[Block]:
        """Yield the blocks in order with their weights loaded; the next iteration frees them.

        Args:
            backwards: whether to go from the last block to the first.
            part: addition to the label of the progress bar.
        """
        order = list(enumerate(self.layers))[start:]
        with contextlib.ExitStack() as stack, track(f"{self.label}{part}", len(self.layers)) as progress:
            progress.advance(start)
            order = order[::-1] if backwards else order
            load = prefetch if self.device.startswith("cuda") else on_demand
            weights = load([index for index, _ in order], self._read_block, self.device, self.dtype)
            stack.enter_context(contextlib.closing(weights))
            for index, module in order:
                module.load_state_dict(next(weights), assign=True)
                yield Block(self, index, module)
                module.to("meta")
                release_memory()
                progress.advance(1, f"block {index + 1} of {len(self.layers)}")

    @contextlib.contextmanager
    def block(self, index: int, dtype: torch.dtype | None = None) -> Iterator[Block]:
        """One block with its weights loaded; they are freed at the end.

        Args:
            dtype: of its weights; None for that of the walk.
        """
        module = self.layers[index]
        (tensors,) = on_demand([index], self._read_block, self.device, dtype or self.dtype)
        module.load_state_dict(tensors, assign=True)
        del tensors
        try:
            yield Block(self, index, module)
        finally:
            module.to("meta")
            release_memory()

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def read_expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The tensors of a routed expert as stored, by their names within the module of experts: [1, ...]."""
        tensors = self.checkpoint.expert(layer, expert)
        for name, tensor in tensors.items():
            full_name = self.family.block_tensor(layer, f"{self.family.experts}.{name}")
            self.checkpoint.check_finite(full_name, tensor)
        return tensors

    def _read_block(self, index: int) -> dict[str, Tensor]:
        tensors = self.checkpoint.block(index)
        for name, tensor in tensors.items():
            self.checkpoint.check_finite(self.family.block_tensor(index, name), tensor)
        return tensors

    def loss(self, states: States) -> float:
        """Mean next-token loss (nats) from the states that leave the last block."""
        losses = torch.tensor(self.head().losses(self.batches, [states]), dtype=torch.float64)
        return float(distributed.all_reduce(losses)) / self.targets

    @property
    def norm(self) -> nn.Module:
        """The final norm; :meth:`start` loads its weights."""
        return self.model.get_submodule(self.family.final_norm)

    @property
    def embedding(self) -> nn.Module:
        """The embedding; it holds the rows that :meth:`load_embeddings` loaded last."""
        return self.model.get_submodule(self.family.embedding.removesuffix(".weight"))

    def head(self) -> LMHead:
        """The head, which turns states into losses; call :meth:`start` first."""
        return LMHead(self.checkpoint, self.norm, self.device)

    def _place(self, name: str, tensor: Tensor) -> None:
        self.checkpoint.check_finite(name, tensor)
        module = self.model.get_submodule(name.rpartition(".")[0])
        module.register_parameter(name.rpartition(".")[2], nn.Parameter(tensor.to(self.device), requires_grad=False))


def _batches(windows: Tensor, batch: int) -> list[Tensor]:
    return list(windows.split(batch)) if len(windows) else []
