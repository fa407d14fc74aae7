"""The token ids that scores are computed on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.calibration.image_walk import Sample
from secateur.data.conversations import RowFormat
from secateur.data.documents import OnBadRow
from secateur.data.token_files import is_token_file
from secateur.data.tokenizer import load_tokenizer, token_hash
from secateur.errors import UserError
from secateur.evaluation.token_windows import CALIBRATION_WINDOWS, calibration_windows
from secateur.hub import is_hub_name, local_checkpoint
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.progress import notify
from secateur.pruning.image_samples import IMAGES, ImageSamples, encoded_samples, read_image_samples

if TYPE_CHECKING:
    from secateur.pruning.request import PruneRequest

__all__ = ["Calibration", "load_request_tokenizer", "read_calibration", "save_tokenizer"]


@dataclass(frozen=True)
class Calibration:
    """The token ids that scores are computed on."""

    windows: Tensor  #: int64 [windows, positions]
    source: str  #: where they are from

    @property
    def size(self) -> tuple[int, int]:
        """Number of windows, and positions in each."""
        count, length = self.windows.shape
        return count, length

    def record(self) -> dict[str, Any]:
        """What identifies them."""
        count, length = self.windows.shape
        return {
            "source": self.source,
            "windows": count,
            "seqlen": length,
            "tokens": count * length,
            "hash": token_hash(self.windows.numpy()),
        }

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        source: Calibration | ImageSamples | Tensor | str | Iterable[str] | Iterable[Sample],
        *,
        field: str | None = None,
        format: RowFormat | None = None,
        on_bad_row: OnBadRow | None = None,
        windows: int | None = None,
        seqlen: int | None = None,
        tokenizer: Any = None,
    ) -> Calibration | ImageSamples:
        """Read calibration windows from a source of text, ids [windows, positions], or an iterable of texts.

        Or images with text: ``images:FILE.jsonl``, or a sequence of what the model's processor returns for each
        conversation.

        Raises:
            UserError: if the source cannot be read, does not fit the model, or is shorter than one window.
        """
        if isinstance(source, Calibration | ImageSamples):
            return source
        is_mapping = isinstance(source, Sequence) and bool(source) and isinstance(source[0], Mapping)
        if is_mapping or (isinstance(source, str) and source.startswith(IMAGES)):
            idle = {"field": field, "format": format, "on_bad_row": on_bad_row}
            idle |= {"seqlen": seqlen, "tokenizer": tokenizer}
            if names := [f"`{name}`" for name, value in idle.items() if value is not None]:
                notify(f"images with text: {', '.join(names)} does not apply; conversations stay whole")
            count = windows or CALIBRATION_WINDOWS
            if isinstance(source, str):
                return read_image_samples(checkpoint, source, count)
            samples: Any = source
            return encoded_samples(checkpoint, samples[:count], "samples")
        if not isinstance(source, str) and hasattr(source, "shape"):
            return cls(_checked_ids(checkpoint, torch.as_tensor(source)), "token ids")
        if isinstance(source, bytes) or not isinstance(source, Iterable):
            kind = type(source).__name__
            raise UserError(f"`calibration`: {kind} is no source; give 'text:PATH', ids [windows, positions] or texts")
        texts = source if isinstance(source, str) else _checked_texts(source)
        options: dict[str, Any] = {"windows": windows, "seqlen": seqlen, "tokenizer": tokenizer}
        options |= {"field": field, "format": format, "on_bad_row": on_bad_row}
        try:
            cut = calibration_windows(checkpoint, texts, **options)
        except UserError as error:  # a fault of the source is one of this field
            raise UserError(str(error), error.field or "calibration") from None
        return cls(cut, source if isinstance(source, str) else "texts")


def _checked_texts(texts: Iterable[Any]) -> Iterator[str]:
    """Yield the texts, and refuse anything else."""
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"`calibration`: texts must be str, got {type(text).__name__}; give ids as a tensor")
        yield text


def _checked_ids(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    if ids.dim() != 2 or ids.shape[1] < 2 or not len(ids) or ids.is_floating_point():
        raise UserError(
            f"`calibration`: ids must be whole numbers of size [windows, positions] with two positions or more, got "
            f"{str(ids.dtype).removeprefix('torch.')} of size {list(ids.shape)}"
        )
    positions = max_positions(checkpoint.config)
    if positions and ids.shape[1] > positions:
        raise UserError(f"`calibration`: windows of {ids.shape[1]} tokens, but the model has {positions} positions")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= checkpoint.shape.vocabulary:
        raise UserError(
            f"`calibration`: ids lie between {low} and {high}, but the model's vocabulary is "
            f"{checkpoint.shape.vocabulary}"
        )
    return ids.to("cpu", torch.int64)


def read_calibration(request: PruneRequest, checkpoint: Checkpoint, windows: int | None) -> Calibration | ImageSamples:
    """Read at most ``windows`` calibration windows, or conversations with images, of a request."""
    tokenizer = load_request_tokenizer(request)
    fields: dict[str, Any] = {name: getattr(request, name) for name in ("field", "format", "on_bad_row")}
    fields |= {"windows": windows, "seqlen": request.seqlen}
    return Calibration.of(checkpoint, request.calibration, tokenizer=tokenizer, **fields)


def save_tokenizer(request: PruneRequest, out: Path) -> None:
    """Write the tokenizer that a request names into a pruned checkpoint; nothing where it names none."""
    if request.tokenizer is not None:
        load_request_tokenizer(request).save_pretrained(out)


def load_request_tokenizer(request: PruneRequest) -> Any:
    """The tokenizer of the request: an object, or loaded from a directory or the Hub; None where it names none."""
    tokenizer = request.tokenizer
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(local_checkpoint(tokenizer, weights=False))
    if tokenizer is None and isinstance(request.model, torch.nn.Module):
        name = str(getattr(request.model, "name_or_path", ""))
        texts = request.calibration is not None and not hasattr(request.calibration, "shape")
        if texts and not (
            is_token_file(str(request.calibration)) or (name and Path(name).is_dir()) or is_hub_name(name)
        ):
            raise UserError("`tokenizer`: calibration texts need one, and this model in memory names none")
    return tokenizer
