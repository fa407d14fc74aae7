"""Hugging Face checkpoint directories: read lazily, written shard by shard, opened with plain transformers.

Only safetensors are read, nothing is unpickled, no code from a checkpoint is run, and no index may name a file outside
its directory.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from secateur.errors import UserError
from secateur.files import read_json, sha256_file, write_json, write_text
from secateur.model.config_file import load_config, read_json_config
from secateur.model.config_spelling import with_old_spelling
from secateur.model.families import Axis, Family
from secateur.model.plan import JSON_FILE, TENSOR_FILE, stored_masks
from secateur.model.safetensors_io import CONVERT, Stored, TensorFile, write_order, write_tensors
from secateur.model.shapes import Shape
from secateur.progress import track
from secateur.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "Checkpoint",
    "in_write_order",
    "is_finite",
    "max_positions",
    "read_config",
    "skeleton",
    "write_checkpoint",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PROVENANCE = "secateur.json"
SHARD_BYTES = 4 * 2**30


def read_config(path: Path) -> tuple[dict[str, Any], PreTrainedConfig, Shape]:
    """Read a config.json of a known family; no weights are needed.

    Returns:
        The plain JSON, the configuration object of transformers, and the shape.

    Raises:
        UserError: if the file is missing, transformers refuses it, or its family or sizes are not supported.
    """
    raw, _ = read_json_config(path)
    config = load_config(path)
    return raw, config, Shape.of_config(config, where=str(path))


def max_positions(config: PreTrainedConfig) -> int | None:
    """How many positions the model has; None where its configuration sets no limit."""
    return getattr(config, "max_position_embeddings", None)


class Checkpoint:
    """A checkpoint directory whose tensors are read on demand.

    Raises:
        UserError: when opened, if the directory is no checkpoint of a known family, its index points outside it, a
            shard is missing or truncated, or a tensor that its configuration promises is absent, of another size, or
            of a type that is not read here.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such directory; name a Hugging Face checkpoint directory")
        self.raw_config, self.config, self.shape = read_config(self.directory / "config.json")
        self.family: Family = self.shape.family
        self._paths: list[Path] = []
        self._files = self._locate()
        self._check_tensors()

    def _locate(self) -> dict[str, TensorFile]:
        """Map every tensor to its file."""
        index = self.directory / INDEX
        if not index.exists():
            single = self.directory / SINGLE
            if not single.exists():
                pickled = next(self.directory.glob("*.bin"), None)
                hint = "; convert its .bin files to safetensors first, secateur unpickles nothing" if pickled else ""
                raise UserError(f"{self.directory}: holds no {SINGLE} and no {INDEX}{hint}")
            file = self._open(SINGLE)
            return dict.fromkeys(file.names, file)
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: has no weight_map")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise UserError(f"{index}: names {file!r}, which is not a file in the same directory")
        files = {file: self._open(file) for file in sorted(set(weight_map.values()))}
        names = {file: set(opened.names) for file, opened in files.items()}
        for name, file in weight_map.items():
            if name not in names[file]:
                raise UserError(f"{self.directory / file}: lacks the tensor {name} that the index promises")
        return {name: files[file] for name, file in weight_map.items()}

    def _open(self, file: str) -> TensorFile:
        path = self.directory / file
        if not path.is_file():
            raise UserError(f"{path}: this shard is missing")
        self._paths.append(path)
        try:
            return TensorFile(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read, probably truncated: {_one_line(error)}") from None

    def _check_tensors(self) -> None:
        beyond = self.family.block_tensor(self.shape.layers, "")
        if any(name.startswith(beyond) for name in self._files):
            raise UserError(f"{self.directory}: holds more layers than the {self.shape.layers} that config.json names")
        for name, axes in self.tensors().items():
            if name not in self._files:
                raise UserError(f"{self.directory}: lacks the tensor {name}")
            dtype = self._files[name].dtype(name)
            if not dtype.is_floating_point:  # checked before the size, which differs for quantised weights
                raise UserError(f"{self.directory}: {name} is stored as {dtype}, a type of whole numbers; {CONVERT}")
            size, want = self._files[name].size(name), self.shape.tensor_size(axes)
            if size != want:
                raise UserError(f"{self.directory}: {name} has size {size}, but config.json implies {want}")

    def tensors(self) -> dict[str, tuple[Axis, ...]]:
        """Every tensor that the configuration implies -> the spaces of its axes; a tied head is left out."""
        tensors = self.outer_tensors()
        for layer in range(self.shape.layers):
            tensors |= {self.family.block_tensor(layer, n): a for n, a in self.shape.block_tensors().items()}
        return tensors

    def outer_tensors(self) -> dict[str, tuple[Axis, ...]]:
        """The tensors outside the blocks -> the spaces of their axes; a tied head is left out."""
        return {n: a for n, a in self.family.outer.items() if not (self.shape.tied and n == self.family.head)}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, as stored: a view into the mapped file, not to be written to."""
        name = self._stored_name(name)
        return self._files[name].tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some rows of a matrix, as stored."""
        name = self._stored_name(name)
        return self._files[name].rows(name, start, stop)

    def dtype_of(self, name: str) -> torch.dtype:
        """The type that a tensor is stored in."""
        name = self._stored_name(name)
        return self._files[name].dtype(name)

    def _stored_name(self, name: str) -> str:
        return self.family.embedding if name == self.family.head and self.shape.tied else name

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Refuse NaN and infinity in values of the tensor ``name``."""
        if not is_finite(tensor):
            raise UserError(f"{self.directory}: {name} holds NaN or infinity")

    def block(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one decoder block, by their names within it."""
        return {n: self.tensor(self.family.block_tensor(layer, n)) for n in self.shape.block_tensors()}

    @property
    def dtype(self) -> torch.dtype:
        """The type of the stored embedding, taken as that of the checkpoint."""
        return self.dtype_of(self.family.embedding)

    @property
    def stored_bytes(self) -> int:
        """Size of the weight files."""
        return sum(path.stat().st_size for path in self._paths)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the bytes of every weight file and the configuration."""
        files = sorted(self._paths)
        parts = []
        with track("hash the weights", len(files)) as progress:
            for path in files:
                parts.append(sha256_file(path))
                progress.advance()
        parts.append(json.dumps(self.raw_config, sort_keys=True))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def masks_digest(self) -> str:
        """SHA-256 of the masks, which the ``digest`` of the weights leaves out; empty without masks."""
        return str(read_json(self.directory / JSON_FILE)["tensors"]) if self.masks else ""

    @property
    def masks_identity(self) -> dict[str, str]:
        """What the masks add to the identity of a run on the checkpoint: nothing without masks."""
        return {"masks": digest} if (digest := self.masks_digest) else {}

    @cached_property
    def masks(self) -> Mapping[str, Tensor]:
        """The masks of a sparse model: name of a block linear's weight -> bool, True where kept; empty without masks.

        Raises:
            UserError: if they are damaged, or belong to another model.
        """
        return self._check_masks(stored_masks(self.directory), self.directory / TENSOR_FILE)

    def _check_masks(self, masks: Mapping[str, Tensor], where: Path | str) -> Mapping[str, Tensor]:
        tensors = self.tensors() if masks else {}
        for name, mask in masks.items():
            size = self.shape.tensor_size(tensors[name]) if name in tensors else None
            if tuple(mask.shape) != size:
                raise UserError(
                    f"{where}: has a mask of {name} of size {tuple(mask.shape)}, but the model's tensor is "
                    f"{size or 'missing'}; remove the masks if they belong to another model"
                )
        return masks

    @property
    def provenance(self) -> dict[str, Any] | None:
        """The content of ``secateur.json``, the origin of the checkpoint; None if secateur did not write it."""
        path = self.directory / PROVENANCE
        content = read_json(path) if path.exists() else None
        if content is not None and not isinstance(content, dict):
            raise UserError(f"{path}: should hold a mapping; delete it if secateur did not write it")
        return content

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model in memory, in evaluation mode.

        Raises:
            UserError: if transformers cannot build it.
        """
        from transformers import AutoModelForCausalLM  # takes seconds to import

        with _blame_config(self.directory):
            return AutoModelForCausalLM.from_pretrained(
                self.directory, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()


@contextlib.contextmanager
def _blame_config(directory: Path) -> Iterator[None]:
    """Blame the configuration for any error that transformers raises while it builds a model."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        text = f"{type(error).__name__}: {_one_line(error)}"
        raise UserError(f"{directory}/config.json: transformers cannot build this model: {text}") from None


def skeleton(config: Any, directory: Path) -> PreTrainedModel:
    """The model of a configuration without weights: parameters on the meta device, buffers real and in float32.

    Buffers follow the type that a model is made in, and those of some families (Gemma's scale of embeddings) would lose
    digits in the type that the checkpoint is stored in. The configuration is left as it is.

    Raises:
        UserError: naming ``directory``, where the configuration lies, if transformers cannot build it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with _blame_config(directory), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
        ).eval()


def write_checkpoint(
    out: Path,
    config: dict[str, Any],
    tensors: Iterable[Stored],
    *,
    provenance: dict[str, Any],
    card: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint into the existing directory ``out``, one tensor, or part of one, at a time.

    Args:
        out: an existing directory, usually from :func:`secateur.files.resumable_directory`.
        tensors: in any order.
        shard_bytes: largest size of a shard with more than one tensor.
    """
    shards = _shards(tensors, shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    total = sum(stored.bytes for shard in shards for stored in shard)
    with track("write the weights", total) as progress:
        for name, shard in zip(names, shards, strict=True):
            write_tensors(out / name, shard, {"format": "pt"}, progress.advance)
    if count > 1:
        weight_map = {stored.name: name for name, shard in zip(names, shards, strict=True) for stored in shard}
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(out / "config.json", with_old_spelling({k: v for k, v in config.items() if k != "auto_map"}))
    write_json(out / PROVENANCE, {"secateur": __version__, **provenance})
    write_text(out / "README.md", card)


def in_write_order(tensors: Iterable[Stored], shard_bytes: int = SHARD_BYTES) -> Iterator[Stored]:
    """The tensors in the order in which :func:`write_checkpoint` reads them."""
    for shard in _shards(tensors, shard_bytes):
        yield from write_order(shard)


def _shards(tensors: Iterable[Stored], limit: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    size = 0
    for stored in tensors:
        if shards[-1] and size + stored.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(stored)
        size += stored.bytes
    return shards


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, computed without a copy of the tensor."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
