"""A decoder block with its weights loaded: it runs on states, and its activations are observed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur import distributed
from secateur.calibration.hooks import Observer, StopForward
from secateur.calibration.malloc import reserve_heap
from secateur.calibration.routed import ExpertOutputs, ExpertVisits, RoutedExpert, RoutedInputs, StreamedExperts
from secateur.calibration.shared_keys import run_with_keys
from secateur.calibration.statistics import StateStatistic, Statistic, join
from secateur.errors import UserError
from secateur.model.checkpoint import is_finite
from secateur.model.families import Site

if TYPE_CHECKING:
    from secateur.calibration.block_walk import BlockWalk

__all__ = ["Block", "States", "state_name"]

States = list[Tensor]  #: hidden states, one tensor [windows of the batch, positions, hidden] for each batch


def state_name(block: int, batch: int) -> str:
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
                    outputs.append(self.walk.store.save(out, None if key is None else state_name(key, i)))
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
            window = self.walk.first_window + self.windows + tokens // positions
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
