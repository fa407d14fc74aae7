"""Hugging Face checkpoint directories: read lazily, written shard by shard, opened with plain transformers.

Only safetensors are read, nothing is unpickled, no code from a checkpoint is run, and no index may name a file outside
its directory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from secateur.errors import UserError
from secateur.files import read_json, refuse_pointer, sha256_file
from secateur.formatting import plural
from secateur.model.checkpoint_writing import PROVENANCE
from secateur.model.config_file import WholeConfig, leftovers, load_config, read_json_config, split_config, unties
from secateur.model.expert_files import PackedExperts, by_memory_name, stored_names
from secateur.model.families import Axis, Family
from secateur.model.image_text import ImageTextModel
from secateur.model.plan import JSON_FILE, TENSOR_FILE, stored_masks
from secateur.model.safetensors_io import CONVERT, TensorFile
from secateur.model.shapes import Shape
from secateur.model.weight_files import model_names, weight_files
from secateur.model.wrappers import tower_names, wrapper_of
from secateur.progress import notify_once, track

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "Checkpoint",
    "is_finite",
    "max_positions",
    "read_config",
    "skeleton",
    "untie",
    "without_leftovers",
]

_ADAPTER = "adapter_config.json"  #: transformers adds the adapter that it describes, where peft is installed
#: what is stored beside a quantized weight, or in its place
_QUANTIZED = {
    *("qweight", "qzeros", "scales", "g_idx"),  # GPTQ and AWQ
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point"),  # compressed-tensors and FP8
    *("SCB", "weight_format", "absmax", "quant_map"),  # bitsandbytes
}

#: what old releases stored although a model computes it
_OLD_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".masked_bias")


def read_config(path: Path) -> tuple[dict[str, Any], PreTrainedConfig, Shape, WholeConfig | None]:
    """Read a config.json of a known family, or of an image-text model around one; no weights are needed.

    What does not belong to a model with float weights is left out. Weights beside the file decide whether the head is
    the embedding.

    Returns:
        The plain JSON, the configuration object of transformers, and the shape: of the language model. And what is
        around it in an image-text model; None in others.

    Raises:
        UserError: if the file is missing, transformers refuses it, or its family or sizes are not supported.
    """
    raw = without_leftovers(read_json_config(path), str(path))
    raw, config, whole = split_config(raw, load_config(path))
    shape = Shape.of_config(config, where=str(path))
    if unties(path, shape):
        raw, shape = untie(raw, config, shape, str(path))
    return raw, config, shape, whole


def without_leftovers(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """A config.json without the keys that do not belong to a model with float weights; a notice names them."""
    dropped = leftovers(raw)
    # MXFP4 is reported when it is read.
    reported = {key: reason for key, reason in dropped.items() if _brief(raw[key]) != "mxfp4"}
    if reported:
        names = ", ".join(f"{key} {_brief(raw[key])} ({reason})" for key, reason in reported.items())
        notify_once(f"{where}: left out: {names}")
    return {key: value for key, value in raw.items() if key not in dropped}


def _brief(value: Any) -> str:
    """A value of a config.json in a word."""
    return str(value.get("quant_method", "{...}") if isinstance(value, dict) else value)


def untie(raw: dict[str, Any], config: Any, shape: Shape, where: str) -> tuple[dict[str, Any], Shape]:
    """Change a configuration that says that the head is the embedding, where the weights hold another one."""
    notify_once(
        f"{where}: says that the head is the embedding (tie_word_embeddings), but the weights hold another head; "
        "it is read as untied, as transformers reads it"
    )
    config.tie_word_embeddings = False
    return {**raw, "tie_word_embeddings": False}, dataclasses.replace(shape, tied=False)


def max_positions(config: PreTrainedConfig) -> int | None:
    """How many positions the model has; None where its configuration sets no limit."""
    return getattr(config, "max_position_embeddings", None)


class Checkpoint:
    """A checkpoint directory whose tensors are read on demand.

    Args:
        plan: directory of the plan that has the masks of a sparse model; None for the checkpoint's own.

    Raises:
        UserError: when opened, if the directory is no checkpoint of a known family, its index points outside it, a
            shard is missing or truncated, or a tensor that its configuration promises is absent, of another size, or
            of a type that is not read here.
    """

    plan: Path | None = None

    def __init__(self, directory: Path | str, plan: Path | None = None) -> None:
        self.directory, self.plan = Path(directory), plan
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such directory; name a Hugging Face checkpoint directory")
        if (self.directory / _ADAPTER).is_file():
            raise UserError(
                f"{directory}: holds an adapter ({_ADAPTER}), which changes the model's weights; merge it into them "
                f"(merge_and_unload of peft, or train it with `merge`), or remove {_ADAPTER} if they "
                "are merged"
            )
        self.raw_config, self.config, self.shape, self.whole = read_config(self.directory / "config.json")
        self.family: Family = self.shape.family
        _check_padding(self.config, self.directory)
        self._paths = weight_files(self.directory)
        self._places = self._find({name: file for file in map(_open, self._paths) for name in file.names})
        self._check_tensors()

    def _find(self, files: Mapping[str, TensorFile]) -> dict[str, tuple[TensorFile, str]]:
        """Map every tensor to its file and to its name there.

        Args:
            files: stored name -> file.
        """
        family = self.family
        self.image_text: ImageTextModel | None = None
        if self.whole:
            names = tower_names(files, family)
            self.image_text = ImageTextModel.of(self.whole, files, names, self.shape, str(self.directory))
        else:
            names = model_names(files, {*self.tensors(), *stored_names(self.shape), family.head}, family.prefix)
        if self.shape.tied and family.embedding not in names and family.head in names:  # one matrix, stored as the head
            names[family.embedding] = names[family.head]
        places = {name: (files[stored], stored) for name, stored in names.items()}
        places, self.spelled = by_memory_name(places, self.shape)
        if any(isinstance(file, PackedExperts) for file, _ in places.values()):
            notify_once(f"{self.directory}: its experts are stored in MXFP4; they are read, and written, as bfloat16")
        return self._without_further_layers(places)

    def _without_further_layers(self, places: dict[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
        """Leave out layers behind the last one that predict further tokens; transformers ignores them as well."""
        count = getattr(self.config, self.family.further_layers, None) or 0 if self.family.further_layers else 0
        layers = range(self.shape.layers, self.shape.layers + count)
        prefixes = tuple(self.family.block_tensor(layer, "") for layer in layers)
        further = {name for name in places if prefixes and name.startswith(prefixes)}
        if further:
            notify_once(
                f"{self.directory}: left out: {plural(count, 'layer')} behind the last one, which predict further "
                f"tokens ({plural(len(further), 'tensor')}); {self.family.further_layers} becomes 0"
            )
        return {name: place for name, place in places.items() if name not in further}

    def _check_tensors(self) -> None:
        beyond = self.family.block_tensor(self.shape.layers, "")
        if any(name.startswith((beyond, beyond.removeprefix(f"{self.family.prefix}."))) for name in self._places):
            raise UserError(f"{self.directory}: holds more layers than the {self.shape.layers} that config.json names")
        self._check_quantization()
        for name, axes in self.tensors().items():
            if name not in self._places:
                raise UserError(f"{self.directory}: lacks the tensor {name}{self._hint(name)}")
            file, stored = self._places[name]
            dtype = file.dtype(stored)
            if not dtype.is_floating_point:  # checked before the size, which differs for quantised weights
                raise UserError(f"{self.directory}: {name} is stored as {dtype}, a type of whole numbers; {CONVERT}")
            size, want = file.size(stored), self.shape.tensor_size(axes)
            if size != want:
                raise UserError(f"{self.directory}: {name} has size {size}, but config.json implies {want}")
        self._report_extras()

    def _check_quantization(self) -> None:
        """Refuse weights that are stored with scales or in packed form."""
        names = {name for name, axes in self.tensors().items() if len(axes) > 1} | stored_names(self.shape)
        linears = {name.removesuffix(".weight") for name in names}
        for name in self._places:
            module, _, last = name.rpartition(".")
            if last in _QUANTIZED and module.removesuffix(".weight") in linears:
                raise UserError(f"{self.directory}: holds {name}: its weights are quantized; {CONVERT}")

    def _report_extras(self) -> None:
        """Name stored tensors that the model has no place for, except the buffers of old files."""
        model_tensors = {*self.tensors(), self.family.head}
        extras = sorted(name for name in self._places if name not in model_tensors and not name.endswith(_OLD_BUFFERS))
        if extras:
            more = f" and {len(extras) - 2} more" if len(extras) > 2 else ""
            names = ", ".join(extras[:2])
            notify_once(f"{self.directory}: left out, the model of its config.json has no place for: {names}{more}")

    def _hint(self, name: str) -> str:
        """Why a tensor may be missing, for an error."""
        if name == self.family.head:
            return "; if the head is the embedding, set tie_word_embeddings to true in config.json"
        if f"{name.removesuffix('.weight')}.base_layer.weight" in self._places:
            return ", but an adapter around it; merge it (merge_and_unload of peft)"
        similar = next((stored for stored in self._places if stored.endswith(name)), None)
        return f", but holds {similar}; rename its tensors as transformers names them" if similar else ""

    def tensors(self) -> dict[str, tuple[Axis, ...]]:
        """Every tensor that the configuration implies -> the spaces of its axes; a tied head is left out."""
        tensors = self.outer_tensors()
        for layer in range(self.shape.layers):
            tensors |= {self.family.block_tensor(layer, n): a for n, a in self.shape.block_tensors(layer).items()}
        return tensors

    def outer_tensors(self) -> dict[str, tuple[Axis, ...]]:
        """The tensors outside the blocks -> the spaces of their axes; a tied head is left out."""
        return self.shape.outer_tensors()

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, as stored: a view into the mapped file, not to be written to."""
        file, stored = self._place(name)
        return file.tensor(stored)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some rows of a matrix, as stored."""
        file, stored = self._place(name)
        return file.rows(stored, start, stop)

    def embeddings(self, tokens: Tensor) -> Tensor:
        """The rows of the embedding for these tokens, as stored."""
        return self.tensor(self.family.embedding)[tokens]

    def dtype_of(self, name: str) -> torch.dtype:
        """The type that a tensor is stored in."""
        file, stored = self._place(name)
        return file.dtype(stored)

    def _place(self, name: str) -> tuple[TensorFile, str]:
        return self._places[self.family.embedding if name == self.family.head and self.shape.tied else name]

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Refuse NaN and infinity in values of the tensor ``name``."""
        if not is_finite(tensor):
            raise UserError(f"{self.directory}: {name} holds NaN or infinity")

    def block(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one decoder block, by their names within it, without those of its routed experts."""
        names = [name for name in self.shape.block_tensors(layer) if not self.shape.is_routed(name)]
        return {n: self.tensor(self.family.block_tensor(layer, n)) for n in names}

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The tensors of one routed expert, by their names within the module of experts: [1, ...]."""
        names = [name for name in self.shape.block_tensors(layer) if self.shape.is_routed(name)]
        return {
            self.family.within_experts(name): self.rows(self.family.block_tensor(layer, name), expert, expert + 1)
            for name in names
        }

    @property
    def pinned_layers(self) -> frozenset[int]:
        """The layers that no depth method may remove."""
        pinned = self.family.pinned(self.config) if self.family.pinned else ()
        return frozenset((*pinned, *(self.whole.pinned if self.whole else ())))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the stored embedding, taken as that of the checkpoint."""
        return self.dtype_of(self.family.embedding)

    @property
    def read_bytes(self) -> int:
        """Size of all tensors in the types that they are read in, larger than the files where these are packed."""
        sizes = ((name, self.shape.tensor_size(axes)) for name, axes in self.tensors().items())
        return sum(math.prod(size) * self.dtype_of(name).itemsize for name, size in sizes)

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
        parts.append(json.dumps(self.whole.raw if self.whole else self.raw_config, sort_keys=True))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def masks_digest(self) -> str:
        """SHA-256 of the masks, which the ``digest`` of the weights leaves out; empty without masks."""
        return str(read_json((self.plan or self.directory) / JSON_FILE)["tensors"]) if self.masks else ""

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
        folder = self.plan or self.directory
        return self._check_masks(stored_masks(folder), folder / TENSOR_FILE)

    def _check_masks(self, masks: Mapping[str, Tensor], where: Path | str) -> Mapping[str, Tensor]:
        if mismatch := self.mask_mismatch(masks):
            name, size, tensor_size = mismatch
            raise UserError(
                f"{where}: has a mask of {name} of size {size}, but the model's tensor is {tensor_size or 'missing'}; "
                "remove the masks if they belong to another model"
            )
        return masks

    def mask_mismatch(self, masks: Mapping[str, Tensor]) -> tuple[str, tuple[int, ...], tuple[int, ...] | None] | None:
        """The first mask that fits no tensor: its name and size, and the size of the tensor of that name if any."""
        tensors = self.tensors() if masks else {}
        for name, mask in masks.items():
            size = self.shape.tensor_size(tensors[name]) if name in tensors else None
            if tuple(mask.shape) != size:
                return name, tuple(mask.shape), size
        return None

    @property
    def provenance(self) -> dict[str, Any] | None:
        """The content of ``secateur.json``, the origin of the checkpoint; None if secateur did not write it."""
        path = self.directory / PROVENANCE
        content = read_json(path) if path.exists() else None
        if content is not None and not isinstance(content, dict):
            raise UserError(f"{path}: should hold a mapping; delete it if secateur did not write it")
        return content

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model in memory, in evaluation mode; an image-text model has its own class.

        Raises:
            UserError: if transformers cannot build it.
        """
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # takes seconds to import

        with _blame_config(self.directory):
            return (
                (AutoModelForImageTextToText if self.whole else AutoModelForCausalLM)
                .from_pretrained(
                    self.directory,
                    # without what was left out of the file
                    config=copy.deepcopy(self.whole.config if self.whole else self.config),
                    dtype=dtype,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
                .eval()
            )

    def load_language_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The language model in memory, in evaluation mode: for an image-text model, the part that text goes through.

        Raises:
            UserError: if transformers cannot build it.
        """
        if not self.whole:
            return self.load(dtype)
        notify_once(f"{self.directory}: the language model within an image-text model is measured, on text alone")
        model = skeleton(self.config, self.directory)
        weights = {name: self.tensor(name).to(dtype, copy=True) for name in self.tensors()}
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        return model

    def load_without_blocks(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The image-text model in memory without the blocks of its language model, in evaluation mode.

        Raises:
            UserError: if transformers cannot build it.
        """
        from transformers import AutoModelForImageTextToText

        assert self.whole is not None
        config = copy.deepcopy(self.whole.config)
        text, kinds = config.text_config, getattr(config.text_config, "layer_types", None)
        needed = list(dict.fromkeys(kinds or [""]))  # of each kind a block: positions are set up for kinds that exist
        text.num_hidden_layers = len(needed)
        if kinds:
            text.layer_types = needed
        with _blame_config(self.directory), _without_log():
            model: Any = AutoModelForImageTextToText.from_pretrained(
                self.directory, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
            ).eval()
        decoder = model.get_decoder()
        decoder.layers = torch.nn.ModuleList()
        decoder.config.num_hidden_layers = self.shape.layers
        if kinds:
            decoder.config.layer_types = kinds
        return model


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Suppress messages on weights that are left out on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _open(path: Path) -> TensorFile:
    if not path.is_file():
        raise UserError(f"{path}: this shard is missing")
    refuse_pointer(path)
    try:
        return TensorFile(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, probably truncated: {_one_line(error)}") from None


def _check_padding(config: Any, directory: Path) -> None:
    """Refuse a padding token without a row in the embedding, with which transformers builds no model."""
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and not -config.vocab_size <= padding < config.vocab_size:  # -1: the last row
        raise UserError(
            f"{directory}/config.json: pad_token_id is {padding}, but the embedding has {config.vocab_size} rows, and "
            "transformers refuses that; set it to null"
        )


@contextlib.contextmanager
def _blame_config(directory: Path) -> Iterator[None]:
    """Blame the configuration for any error that transformers raises while it builds a model."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, ImportError, AssertionError) as error:
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
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    whole = wrapper_of(config.model_type) is not None
    _check_padding(config.text_config if whole else config, directory)
    with _blame_config(directory), init_empty_weights(include_buffers=False):
        if not whole and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            from secateur.model.text_model import TextModel

            return TextModel(copy.deepcopy(config)).eval()
        auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
        return auto.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False).eval()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, computed without a copy of the tensor."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
