"""The shape of a model from its config.json, without transformers where the file states every key that counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from secateur.errors import UserError
from secateur.files import read_json
from secateur.model.families import Family, family_of
from secateur.model.shapes import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["load_config", "read_json_config", "read_shape"]


def read_json_config(path: Path) -> tuple[dict[str, Any], Family]:
    """Read a config.json as plain JSON.

    Raises:
        UserError: if the file is missing, is no configuration of a model, or is of an unknown family.
    """
    raw = read_json(path)
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise UserError(f"{path}: has no model_type; this is no Hugging Face checkpoint")
    return raw, family_of(raw["model_type"], where=str(path))


def load_config(path: Path) -> PreTrainedConfig:
    """Read a config.json with transformers, which fills in missing keys and checks the values.

    Raises:
        UserError: if transformers refuses the file.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None


def read_shape(path: Path) -> tuple[Shape, int | None]:
    """Read a model's shape and number of positions from its config.json.

    transformers is imported only for a file that lacks a key, or has a value that needs checking: no default is
    repeated here.

    Raises:
        UserError: if the file is missing, or is no configuration of a known family.
    """
    raw, family = read_json_config(path)
    if _is_complete(raw, family):
        config: Any = SimpleNamespace(**raw)
        shape = Shape.of_config(config, where=str(path))
        if not shape.refused_by_config:
            return shape, config.max_position_embeddings
    config = load_config(path)
    return Shape.of_config(config, where=str(path)), getattr(config, "max_position_embeddings", None)


def _is_complete(raw: dict[str, Any], family: Family) -> bool:
    """Whether every key that a shape depends on is present, with a value of its plain type."""
    numbers = {*family.config_keys.values(), "vocab_size", "max_position_embeddings"}
    if family.derives_head_dim:
        numbers -= {family.config_keys["head_dim"]} - raw.keys()
    flags = {*family.optional.values(), "tie_word_embeddings"}
    return all(type(raw.get(key)) is int for key in numbers) and all(type(raw.get(key)) is bool for key in flags)
