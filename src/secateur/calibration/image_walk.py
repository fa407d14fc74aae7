"""The block walk over images with text: states enter the first block as the whole image-text model embeds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur import distributed
from secateur.calibration.block import States
from secateur.calibration.block_walk import BlockWalk
from secateur.errors import UserError
from secateur.losses.next_token import IGNORE_INDEX
from secateur.model.checkpoint import Checkpoint
from secateur.progress import track

__all__ = ["ImageWalk", "Sample", "image_token_ids"]

Sample = Mapping[str, Tensor]  #: what a processor returns for one conversation: ``input_ids`` [1, positions] and others


class _Probe(nn.Module):
    """Replaces a block: records states and keyword arguments, and returns zeros.

    What reaches the next one is then what the model adds between the two blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        self.states, self.arguments = states, kwargs
        return torch.zeros_like(states)


class ProjectorInput:
    """A hook on the last linear of a projector: mean squares of its inputs, some of which it can silence."""

    def __init__(self) -> None:
        self.squares = torch.zeros(())  #: sum of squares of each channel, float32 [inner width]
        self.positions = 0
        self.keep: Tensor | None = None  #: bool [inner width], True for channels that pass; None for all

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = args[0].flatten(0, -2)
        self.squares = self.squares + inputs.float().square().sum(dim=0).cpu()
        self.positions += len(inputs)
        return args if self.keep is None else (args[0] * self.keep.to(args[0]), *args[1:])

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each channel."""
        return self.squares / self.positions


class ImageWalk(BlockWalk):
    """One pass over the decoder blocks of an image-text model, each sample by itself.

    Vision tower, projector and embedding run once, in :meth:`start`, with all of their weights in memory. Tokens that
    stand for an image are no targets of the loss.

    Args:
        samples: inputs of the whole model, without padding.
        options: as for :class:`BlockWalk`.

    Raises:
        UserError: with several processes.
    """

    def __init__(self, checkpoint: Checkpoint, samples: Sequence[Sample], **options: Any) -> None:
        if distributed.world_size() > 1:
            raise UserError("`calibration`: images are walked through in one process; run without torchrun")
        super().__init__(checkpoint, None, **options)
        self.calibrated = True
        self.samples = samples
        placeholders = image_token_ids(checkpoint)
        for sample in samples:
            ids = sample["input_ids"].long()
            self.batches.append(ids.masked_fill(torch.isin(ids, placeholders), IGNORE_INDEX))
        self.main_batches = self.batches
        self.targets = sum(int((ids[:, 1:] != IGNORE_INDEX).sum()) for ids in self.batches)
        self.projector = ProjectorInput()  #: what goes into the projector's last linear, where its width is cut
        self._arguments: list[list[dict[str, Any]]] = []  # of each batch of the last start, those of each block
        self._features: list[dict[int, Tensor]] = []  # block -> what the model adds behind it, batch by batch

    @torch.no_grad()
    def start(self, batches: Sequence[Tensor] | None = None) -> States:
        """Embed the samples, or those of ``batches``: the states that enter the first block."""
        self._load_ends()
        numbers = {id(batch): number for number, batch in enumerate(self.batches)}
        order = [numbers[id(batch)] for batch in (self.batches if batches is None else batches)]
        model: Any = self.checkpoint.load_without_blocks(self.dtype).to(self.device)  # type: ignore[arg-type]
        probes = [_Probe() for _ in self.layers]
        model.get_decoder().layers = nn.ModuleList(probes)
        if modules := self.checkpoint.whole and self.checkpoint.whole.wrapper.projector:
            reader = next(module for name, module in model.named_modules() if name.endswith(modules[-1]))
            reader.register_forward_pre_hook(self.projector)
        self._arguments, self._features = [], []
        states = []
        with track("embed images and text", len(order)) as progress:
            for number in order:
                model.base_model(**self._inputs(self.samples[number]), use_cache=False)
                states.append(self.store.save(probes[0].states))
                self._arguments.append([probe.arguments for probe in probes])
                behind = {index: probe.states for index, probe in enumerate(probes[1:])}
                self._features.append({index: added for index, added in behind.items() if bool(added.any())})
                progress.advance()
        return states

    @torch.no_grad()
    def measure(self) -> float:
        """Mean next-token loss (nats) of the samples, in a walk through all blocks."""
        states = self.start()
        for block in self.blocks():
            states = block.run(states, consume=True)
        return self.loss(states)

    def _inputs(self, sample: Sample) -> dict[str, Any]:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor)
            else value
            for name, value in sample.items()
        }

    def arguments(self, states: Tensor, number: int) -> list[dict[str, Any]]:
        return self._arguments[number]

    def behind(self, out: Tensor, index: int, number: int) -> Tensor:
        features = self._features[number].get(index)
        return out if features is None else out + features


def image_token_ids(checkpoint: Checkpoint) -> Tensor:
    """The ids that stand for a piece of an image or a video."""
    assert checkpoint.whole is not None
    keys = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = {getattr(checkpoint.whole.config, key, None) for key in keys}
    return torch.tensor(sorted(i for i in ids if i is not None), dtype=torch.int64)
