"""Write checkpoint directories shard by shard, with the files that say how they came about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from secateur.files import write_json, write_text
from secateur.model.config_spelling import with_old_spelling
from secateur.model.safetensors_io import Stored, write_order, write_tensors
from secateur.model.weight_files import INDEX, SINGLE, WEIGHTS_KEY
from secateur.model.wrappers import wrapper_of
from secateur.progress import track
from secateur.version import __version__

__all__ = ["PROVENANCE", "in_write_order", "write_checkpoint"]

PROVENANCE = "secateur.json"  #: how a checkpoint came about
SHARD_BYTES = 4 * 2**30


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
    # One file has an index too: vLLM and SGLang read every .safetensors file, the plan among them, where there is none.
    weight_map = {stored.name: name for name, shard in zip(names, shards, strict=True) for stored in shard}
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(out / "config.json", _published(config))
    write_json(out / PROVENANCE, {"secateur": __version__, **provenance})
    write_text(out / "README.md", card)


def _published(config: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for weights under the usual names, of transformers' own class with a head.

    A source may have been a base model, or a class with code of its own; vLLM chooses what to run by this key.
    """
    from transformers.models.auto import modeling_auto

    classes = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if wrapper_of(config["model_type"]):
        classes = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        config = {**config, "text_config": with_old_spelling(config["text_config"])}
    rest = {key: value for key, value in config.items() if key not in ("auto_map", WEIGHTS_KEY)}
    return with_old_spelling({**rest, "architectures": [classes[config["model_type"]]]})


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
