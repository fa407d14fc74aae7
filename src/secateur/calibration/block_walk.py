"""The block walk: calibration states stream through the decoder while one block's weights are in memory.

The walk knows blocks, states and statistics, but no method: the caller says what to observe and computes the scores.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur import distributed
from secateur.calibration.hooks import Observer, StopForward
from secateur.calibration.journal import Journal, StateStore
from secateur.calibration.lm_head import LMHead
from secateur.calibration.malloc import map_tensors, release_memory, reserve_heap
from secateur.calibration.prefetch import on_demand, prefetch
from secateur.calibration.routed import ExpertOutputs, ExpertVisits, RoutedExpert, RoutedInputs, StreamedExperts
from secateur.calibration.shared_keys import key_sources, run_with_keys
from secateur.calibration.statistics import StateStatistic, Statistic, join
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint, is_finite, skeleton
from secateur.model.families import Family, Site
from secateur.progress import notify, track
from secateur.runtime import pick_batch

__all__ = ["Block", "BlockWalk", "States", "default_batch"]

_EXPERT_BATCH = 8  #: batches of a dense model that make one of a mixture

States = list[Tensor]  #: hidden states, one tensor [windows of the batch, positions, hidden] for each batch
_Item = TypeVar("_Item")


def default_batch(family: Family, positions: int, device: str) -> int:
    """The number of windows that go through a block at once, where nothing else is said.

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
        if windows is not None:
            batch = batch or default_batch(self.family, windows.shape[1], device)
            self.batches, self.main_batches = (
                _batches(distributed.shard(windows), batch),
                _batches(distributed.shard(windows, 0), batch),
            )
            self.targets = windows.shape[0] * (windows.shape[1] - 1)
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
        table = self.checkpoint.tensor(self.family.embedding)
        tokens, indices = ids.unique(return_inverse=True)
        rows = table[tokens]
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
                states = self.store.load(_state_name(index, i), torch.Size([*batch.shape, hidden]), self.dtype)
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


def _state_name(block: int, batch: int) -> str:
    """The file of a batch's states. Two sets alternate: states that enter a block, and states that leave it."""
    return f"{block % 2}-{batch:05}"


def _is_present(site: Site, modules: Collection[str]) -> bool:
    """Whether a block has a site: its module, and one of its readers if it has any."""
    return site.module in modules and (not site.readers or any(reader in modules for reader in site.readers))


class Block:
    """A decoder block with its weights loaded."""

    def __init__(self, walk: BlockWalk, index: int, module: nn.Module) -> None:
        self.walk, self.index, self.module = walk, index, module
        self.windows = 0  #: windows of the batches before the present one

    def forward(self, batch: Tensor, number: int = 0) -> Tensor:
        """Run the block on one batch of states, with the arguments that the model would pass.

        Args:
            number: of the batch, among those of the walk's last start.
        """
        batch, arguments = batch.to(self.walk.device), self.walk.arguments(batch, number)[self.index]
        if self.walk.key_sources:
            return run_with_keys(self.module, self.index, batch, self.walk.key_sources, arguments)
        out = self.module(batch, **arguments)
        return self.walk.behind(out[0] if isinstance(out, tuple) else out, self.index, number)

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
        """Run the block on all states.

        Args:
            states: inputs, batch by batch.
            key: index of the block to store the outputs for, so that a killed run can resume there; None for no file.
            keep: whether to return the outputs; otherwise an empty list is returned.
            consume: whether to free each batch of ``states`` once its output exists.
            watch: statistics to update with inputs and outputs.

        Raises:
            UserError: if an output is not finite.
        """
        outputs: States = []
        with reserve_heap(self._activation(states)):
            self.windows = 0
            for i in range(len(states)):
                out = self.forward(states[i], i)
                self.windows += len(out)
                if not is_finite(out):
                    where = f"{self.walk.checkpoint.directory}: block {self.index}"
                    raise UserError(f"{where} has NaN or infinity in its output on this calibration text")
                for statistic in watch:
                    hidden = self.walk.checkpoint.shape.hidden
                    statistic.update(states[i][..., :hidden].to(out.device), out[..., :hidden])
                if keep:
                    outputs.append(self.walk.store.save(out, None if key is None else _state_name(key, i)))
                if consume:
                    states[i] = out.new_empty(0)
        return outputs

    @torch.no_grad()
    def observe(
        self,
        states: States,
        kinds: Mapping[str, Sequence[type[Statistic]]],
        state_kinds: Sequence[type[StateStatistic]] = (),
        *,
        experts: bool = False,
        inputs: RoutedInputs | None = None,
        keep: bool = True,
    ) -> tuple[dict[str, dict[type, Tensor]], States]:
        """Run the block on all states and gather statistics.

        Args:
            states: inputs, batch by batch; freed if ``keep``.
            kinds: site -> kinds of statistics to gather there.
            state_kinds: kinds of statistics of the inputs and outputs.
            experts: whether to gather :class:`ExpertOutputs` of the routed experts.
            inputs: takes what enters the module of experts; None to leave that.
            keep: whether to return the outputs; otherwise each batch stops at the last site.

        Returns:
            site -> kind -> value, and the outputs.
        """
        family, modules = self.walk.family, dict(self.module.named_modules())
        kinds = {site: at_site for site, at_site in kinds.items() if _is_present(family.sites[site], modules)}
        widths = {"query": self.walk.checkpoint.shape.head_dim}
        gathered = {
            site: [kind(widths.get(family.sites[site].space, 1)) for kind in at_site] for site, at_site in kinds.items()
        }
        watch = [kind() for kind in state_kinds]
        pending: set[str] = set()
        outputs: States = []
        with contextlib.ExitStack() as hooks:
            for name, statistics in gathered.items():
                site = family.sites[name]
                module = modules[site.module]
                observer = Observer(name, statistics, pending if not (keep or watch) else None)
                hook = (
                    module.register_forward_hook(observer.output)
                    if site.output
                    else module.register_forward_pre_hook(observer.input)
                )
                hooks.callback(hook.remove)
            routed = hooks.enter_context(self._watch_experts(states)) if experts else None
            if inputs is not None:
                hooks.enter_context(self._record_inputs(inputs, None if keep or watch else pending))
            if keep or watch or routed:
                outputs = self.run(states, key=self.index + 1, keep=keep, consume=keep, watch=watch)
            else:
                hooks.enter_context(reserve_heap(self._activation(states)))
                for number, batch in enumerate(states if kinds or inputs is not None else ()):
                    pending.update(kinds, () if inputs is None else ("experts",))
                    with contextlib.suppress(StopForward):
                        self.forward(batch, number)
        join([*itertools.chain(*gathered.values()), *watch], self.walk.device)
        values: dict[str, dict[type, Tensor]] = {
            site: {type(s): s.value() for s in statistics} for site, statistics in gathered.items()
        }
        if routed is not None:
            routed.join()
            values["experts"] = {ExpertOutputs: routed.sums}
        if watch:
            values["states"] = {type(s): s.value() for s in watch}
        return values, outputs

    @property
    def experts(self) -> StreamedExperts | None:
        """The block's routed experts; None for a block without any."""
        walk = self.walk
        has_experts = walk.checkpoint.shape.has_space("experts", self.index)
        return self.module.get_submodule(walk.family.experts) if has_experts else None  # type: ignore[return-value]

    @contextlib.contextmanager
    def _watch_experts(self, states: States) -> Iterator[ExpertOutputs | None]:
        """Gather the outputs of routed experts while the block runs; None for a block without any."""
        if (experts := self.experts) is None:
            yield None
            return
        statistic = ExpertOutputs(experts.count, self.walk.device)
        positions = states[0].shape[1] if states else 1

        def update(expert: int, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
            window = self.windows + tokens // positions
            statistic.update(expert, window % 2 == 1, weights, outputs)

        experts.watch = update
        try:
            yield statistic
        finally:
            experts.watch = None

    def keep_experts(self, keep: Tensor) -> None:
        """Route tokens to these experts alone from now on, as the cut model will: cut the router's tensors in place.

        Args:
            keep: sorted indices of the experts, as many in each of the router's groups.
        """
        experts = self.experts
        assert experts is not None
        for name, axes in self.walk.checkpoint.shape.block_tensors(self.index).items():
            if "experts" not in axes or name.startswith(f"{self.walk.family.experts}."):
                continue
            owner, _, attribute = name.rpartition(".")
            module = self.module.get_submodule(owner)
            tensor = getattr(module, attribute)
            cut = tensor.detach().index_select(axes.index("experts"), keep.to(tensor.device))
            setattr(module, attribute, nn.Parameter(cut, False) if isinstance(tensor, nn.Parameter) else cut)
            if hasattr(module, "num_experts"):
                module.num_experts = len(keep)  # type: ignore[assignment]
        experts.numbers = keep

    def routed_inputs(self, states: States) -> RoutedInputs | None:
        """An empty record of what enters the block's module of experts; None without experts or calibration."""
        if (experts := self.experts) is None or not self.walk.calibrated:
            return None
        return RoutedInputs(experts.count, states[0].shape[1] if states else 1, self.walk.store)

    @contextlib.contextmanager
    def _record_inputs(self, inputs: RoutedInputs, pending: set[str] | None) -> Iterator[None]:
        """Record what enters the module of experts while the block runs.

        Args:
            pending: as in :class:`Observer`; outputs of experts are zero then, since nothing reads them.
        """
        experts = self.experts
        assert experts is not None

        def record(states: Tensor, index: Tensor) -> Tensor | None:
            inputs.add(states, index)
            if pending is None:
                return None
            pending.discard("experts")
            if not pending:
                raise StopForward
            return torch.zeros_like(states)

        experts.record = record
        try:
            yield
        finally:
            experts.record = None

    @torch.no_grad()
    def visit_experts(self, inputs: RoutedInputs | None, visits: ExpertVisits | None) -> None:
        """Visit the block's routed experts with statistics of the tokens routed to each: a collective call.

        Args:
            inputs: what entered the module of experts; None without calibration.
            visits: what to do with each; None to visit none.
        """
        if visits is None:
            return
        experts = self.experts
        counts = inputs.counts() if inputs is not None else None
        for number in range(experts.count) if experts is not None else ():
            tensors = self.walk.read_expert(self.index, number)
            expert = RoutedExpert(number, counts[number] if counts else 0, tensors)
            if inputs is not None and expert.tokens >= visits.least:
                assert experts is not None
                gathered = [kind() for kind in visits.input], [kind() for kind in visits.hidden]
                for states, windows, size in inputs.tokens(number):
                    states = states.to(self.walk.device)
                    values = (states, experts.hidden(tensors, states) if visits.hidden else states)
                    for x, statistics in zip(values, gathered, strict=True):
                        for statistic in statistics:
                            statistic.update_routed(x, windows.to(x.device), size)
                join(itertools.chain(*gathered), self.walk.device)
                expert.input, expert.hidden = ({type(s): s.value() for s in group} for group in gathered)
            if distributed.is_main():
                visits.visit(self, expert)

    def _activation(self, states: States) -> int:
        """Bytes of the largest activation of a batch within the block."""
        channels = max(self.walk.checkpoint.shape.hidden, self.walk.checkpoint.shape.ffn)
        return max((batch[..., 0].numel() * channels * batch.itemsize for batch in states), default=0)

    def weight(self, linear: str) -> Tensor:
        """A tensor of the block as stored, in float32, e.g. a linear's weight [out, in]."""
        if self.walk.dtype == torch.float32:
            return self.module.get_parameter(linear).data
        name = self.walk.family.block_tensor(self.index, linear)
        return self.walk.checkpoint.tensor(name).to(self.walk.device, torch.float32)

    def set_weight(self, linear: str, weight: Tensor) -> None:
        """Replace a linear's weight until the block is freed."""
        self.module.get_parameter(linear).data = weight.to(self.walk.device, self.walk.dtype)
