"""Images with text to calibrate on: conversations with local images, encoded by the model's own processor.

A file has one conversation a line. The paths of images are relative to its folder, and stay in it::

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.png"},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.image_walk import Sample, image_token_ids
from secateur.errors import UserError, first_line
from secateur.formatting import plural
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.progress import notify, track

__all__ = ["IMAGES", "ImageSamples", "encoded_samples", "read_image_samples"]

IMAGES = "images:"  #: what the source begins with
_PATH_KEYS = ("path", "image", "url")  #: of an image in a message


@dataclass(frozen=True)
class ImageSamples:
    """Inputs of an image-text model to calibrate on."""

    samples: Sequence[Sample]
    source: str

    @property
    def size(self) -> tuple[int, int]:
        """Number of conversations, and tokens of the longest."""
        return len(self.samples), max(sample["input_ids"].shape[1] for sample in self.samples)

    def record(self) -> dict[str, Any]:
        """What identifies them."""
        count, longest = self.size
        digest = hashlib.sha256()
        for sample in self.samples:
            for name, value in sorted(sample.items()):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return {
            "source": self.source,
            "windows": count,
            "seqlen": longest,
            "tokens": sum(sample["input_ids"].shape[1] for sample in self.samples),
            "hash": digest.hexdigest(),
        }


def read_image_samples(checkpoint: Checkpoint, source: str, limit: int) -> ImageSamples:
    """Read at most ``limit`` conversations of ``images:FILE.jsonl``.

    Raises:
        UserError: if the file, an image or the model's processor cannot be read, or the model reads no images.
    """
    path = Path(source.removeprefix(IMAGES))
    if not path.is_file():
        raise UserError(f"`calibration`: {path}: no such file; name a .jsonl file with a conversation on each line")
    _check_wrapper(checkpoint)
    processor = _processor(checkpoint.directory)
    samples = []
    with track("encode images and text", limit) as progress:
        for number, row in _rows(path):
            if len(samples) == limit:
                break
            where = f"`calibration`: {path}:{number}"
            messages = _with_images(row, path.parent, where)
            try:
                inputs = processor.apply_chat_template(
                    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=False
                )
            except Exception as error:  # processors raise any class
                text = f"{type(error).__name__}: {first_line(error)[:200]}"
                raise UserError(f"{where}: the model's processor cannot encode it: {text}") from None
            samples.append({key: torch.as_tensor(value) for key, value in inputs.items()})
            progress.advance()
    return encoded_samples(checkpoint, samples, source)


def encoded_samples(checkpoint: Checkpoint, samples: Sequence[Mapping[str, Any]], source: str) -> ImageSamples:
    """Check inputs of an image-text model, each as its processor returns it for one conversation.

    Raises:
        UserError: if there are none, or one does not fit the model.
    """
    _check_wrapper(checkpoint)
    if not samples:
        raise UserError(f"`calibration`: {source} holds no conversation")
    positions, rows = max_positions(checkpoint.config), checkpoint.shape.vocabulary
    pieces = 0
    for number, sample in enumerate(samples, start=1):
        ids = sample.get("input_ids")
        where = f"`calibration`: {source}: conversation {number}"
        if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1 or ids.shape[1] < 2:
            raise UserError(f"{where} needs `input_ids` [1, positions] with two positions or more")
        if not all(isinstance(value, Tensor) for value in sample.values()):
            raise UserError(f"{where}: all inputs must be tensors")
        if positions and ids.shape[1] > positions:
            raise UserError(f"{where} has {ids.shape[1]} tokens, but the model has {positions} positions; shorten it")
        if int(ids.min()) < 0 or int(ids.max()) >= rows:
            raise UserError(f"{where} has ids up to {int(ids.max())}, but the model's vocabulary is {rows}")
        pieces += int(torch.isin(ids, image_token_ids(checkpoint)).sum())
    total = sum(sample["input_ids"].shape[1] for sample in samples)
    notify(
        f"{source}: {plural(len(samples), 'conversation')}, {plural(total, 'token')}, of which images have {pieces:,}"
    )
    return ImageSamples(tuple(samples), source)


def _check_wrapper(checkpoint: Checkpoint) -> None:
    if checkpoint.whole is None:
        raise UserError(f"`calibration`: {checkpoint.directory} is a language model and reads no images; name text")


def _processor(directory: Path) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of files, packages and classes
        raise UserError(
            f"`calibration`: {directory}: its processor cannot be loaded; its files (preprocessor_config.json "
            "and others) belong beside config.json: "
            f"{first_line(error)[:200]}"
        ) from None
    if not hasattr(processor, "image_processor"):
        raise UserError(f"`calibration`: {directory} has no processor of images (preprocessor_config.json)")
    return processor


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError:
                raise UserError(f"`calibration`: {path}:{number} is no JSON") from None


def _with_images(row: Any, folder: Path, where: str) -> list[dict[str, Any]]:
    """The messages of a row, with images in place of their paths."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} has no list of `messages`")
    content = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or not isinstance(message.get("content"), str | list):
            raise UserError(f"{where}: a message needs `role` and `content`")
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        content.append({**message, "content": [_part(part, folder, where) for part in parts]})
    return content


def _part(part: Any, folder: Path, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part
    if kind != "image":
        raise UserError(f"{where}: a part of a message is of type image or text, not {kind!r}")
    name = next((part[key] for key in _PATH_KEYS if isinstance(part.get(key), str)), "")
    path = folder / name
    if not name or "://" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: {name or 'an image without a path'} is no file in {folder}; images are local files")
    try:
        from PIL import Image

        with Image.open(path) as image:
            return {"type": "image", "image": image.convert("RGB")}
    except ImportError:
        raise UserError(f"{where}: reading images needs the package pillow; install it") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where}: {path} cannot be read as an image: {first_line(error)}") from None
