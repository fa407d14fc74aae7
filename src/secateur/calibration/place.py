"""Places: the input of a method's formula, i.e. statistics, weights and gradients of one space in one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from secateur.calibration.statistics import GradientStatistic, StateStatistic, Statistic
from secateur.model.families import SPACE_OF, Axis
from secateur.model.shapes import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.calibration.block import Block
    from secateur.calibration.block_walk import BlockWalk
    from secateur.calibration.gradients import Gradients
    from secateur.calibration.routed import ExpertVisits

__all__ = ["Place", "walk_places"]

Tensors = Mapping[str, tuple["Tensor", tuple[Axis, ...]]]  #: name -> a tensor and the spaces of its axes


@dataclass
class Place:
    """The statistics, weights and gradients of one space at one place of the model.

    A *unit* stays or is removed as a whole: a hidden or FFN channel, a KV head with its query heads, or a layer.
    """

    space: str  #: ``hidden``, ``ffn``, ``kv``, ``expert_ffn`` (of one expert) or ``layer``
    units: int
    shape: Shape
    layer: int  #: the block's index; -1 outside the blocks
    stats: Mapping[type, Tensor] = field(default_factory=dict)  #: kind of statistic -> its value here
    reader: Tensor | None = None  #: weight [rows, channels] of the linear that reads these activations, if there is one
    tensors: Tensors = field(default_factory=dict)
    tensor_gradients: Gradients = field(default_factory=dict)

    _channels: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # channels of a unit, by weight

    def by_channel(self, name: str, values: Tensor) -> Tensor:
        """Lay out one of :attr:`weights`, or values of its size, by channel: [units, channels of a unit, values]."""
        return values.unflatten(1, (self._channels[name], -1))

    def by_unit(self, channels: Tensor) -> Tensor:
        """Lay out values of channels by unit: [channels] -> [units, channels of a unit]."""
        return channels.reshape(self.units, -1)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weights (without biases) that have this space as an axis: name -> [units, values of one unit]."""
        return self._by_unit({name: tensor for name, (tensor, _) in self.tensors.items()})

    def gradient(self, kind: type[GradientStatistic]) -> dict[str, Tensor]:
        """A statistic of the gradients with respect to :attr:`weights`, laid out the same way."""
        return self._by_unit(self.tensor_gradients[kind])

    def _by_unit(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {}
        for name, tensor in tensors.items():
            if not name.endswith(".weight"):
                continue
            if self.space == "layer":
                values[name] = tensor.reshape(1, -1)
                self._channels[name] = 1
                continue
            for dimension, axis in enumerate(self.tensors[name][1]):
                start = 0
                for part, space in enumerate(axis if isinstance(axis, tuple) else (axis,)):
                    size = self.shape.axis_size(space)
                    if self.space == SPACE_OF.get(str(space), space):
                        cut = tensor.narrow(dimension, start, size).movedim(dimension, 0)
                        key = f"{name}[{part}]" if isinstance(axis, tuple) else name
                        values[key] = cut.reshape(self.units, -1)
                        self._channels[key] = size // self.units
                    start += size
        return values


def walk_places(
    walk: BlockWalk,
    needs: Sequence[type],
    spaces: Sequence[str],
    *,
    visits: ExpertVisits | None = None,
    replay: Callable[[Block], None] | None = None,
) -> Iterator[tuple[Block | None, dict[str, list[Place]]]]:
    """Walk through the blocks and yield the places of each.

    Activations come from the first block to the last. If the caller changes a block's weights, the blocks after it see
    the outputs of the changed block. Gradients come from the last block to the first. For gradients, and without
    activations, a last item with None for the block holds the places outside the blocks. Only the
    main process yields, as in :meth:`BlockWalk.yield_on_main`. Places hold weights and gradients: drop them before
    asking for the next.

    Args:
        needs: kinds of statistics: of activations, of states, or of gradients.
        spaces: spaces to yield places of: ``hidden``, ``ffn``, ``kv``, or ``layer``.
        visits: as in :meth:`BlockWalk.observe`, as ``replay`` is.
    """
    if walk.journal.complete:
        return
    activations = [kind for kind in needs if issubclass(kind, Statistic)]
    gradient_kinds = [kind for kind in needs if issubclass(kind, GradientStatistic)]
    state_kinds = [kind for kind in needs if issubclass(kind, StateStatistic)]
    if gradient_kinds:
        from secateur.calibration.gradients import gradients_of

        for block, gradients in gradients_of(walk, gradient_kinds, outer="hidden" in spaces):
            yield block, _places(walk, block, spaces, {}, gradients)
            del gradients  # twice as large as the block; free them before the next block's
        return
    family = walk.family
    sites = {"hidden": family.hidden_sites, "ffn": (family.ffn_site,), "kv": (family.kv_site,)}
    kinds = {site: activations for space in spaces if activations for site in sites.get(space, ())}
    for block, stats in walk.observe(kinds, state_kinds, visits=visits, replay=replay):
        yield block, _places(walk, block, spaces, stats, {})
    if not activations and "hidden" in spaces:
        yield from walk.yield_on_main(len(walk.layers), (None, _places(walk, None, spaces, {}, {})))


def _places(
    walk: BlockWalk,
    block: Block | None,
    spaces: Sequence[str],
    stats: Mapping[str, Mapping[type, Tensor]],
    gradients: Gradients,
) -> dict[str, list[Place]]:
    """The places of one block, or outside the blocks if ``block`` is None; hidden channels have one at each norm."""
    family, shape = walk.family, walk.checkpoint.shape
    if block is None:
        outer = walk.checkpoint.outer_tensors()
        tensors = {name: (walk.checkpoint.tensor(name).to(walk.device).float(), axes) for name, axes in outer.items()}
        return {"hidden": [Place("hidden", shape.hidden, shape, -1, {}, None, tensors, gradients)]}
    # Routed experts are not in memory; secateur.pruning.target refuses methods that would score their weights.
    tensors = {
        name: (block.weight(name), axes)
        for name, axes in shape.block_tensors(block.index).items()
        if name not in family.buffers and not shape.is_routed(name)
    }
    places: dict[str, list[Place]] = {}
    for space in spaces:
        if space == "expert_ffn" or (space != "layer" and not shape.has_space(space, block.index)):
            continue
        if space == "hidden" and stats:
            places[space] = [
                Place(space, shape.hidden, shape, block.index, stats[s]) for s in family.hidden_sites if s in stats
            ]
            continue
        site = {"ffn": family.ffn_site, "kv": family.kv_site, "layer": "states"}.get(space, "")
        readers = family.sites[site].readers if site in family.sites else ()
        reader = block.weight(f"{readers[0]}.weight") if len(readers) == 1 else None
        units = 1 if space == "layer" else shape.units(space)
        places[space] = [Place(space, units, shape, block.index, stats.get(site, {}), reader, tensors, gradients)]
    return places
