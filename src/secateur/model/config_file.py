"""The shape of a model from its config.json, without transformers where the file states every key that counts."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from secateur.errors import UserError
from secateur.files import read_json
from secateur.model.families import Family, family_of
from secateur.model.shapes import Shape
from secateur.model.weight_files import holds_own_head, other_format

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["leftovers", "load_config", "read_json_config", "read_shape", "unties"]

#: settings of a run, not of a model -> values that change nothing. transformers would obey any other value, and fail
#: or compute more than is asked of it.
_RUN_SETTINGS: Mapping[str, tuple[object, ...]] = {
    "return_dict": (True, None),
    "use_return_dict": (),  # a name of release 4, which release 5 refuses
    "torchscript": (False, None),
    "output_hidden_states": (False, None),
    "output_attentions": (False, None),
    "_output_attentions": (False, None),
    "attn_implementation": ("eager", "sdpa", None),  # others need a package or a GPU
    "_attn_implementation": ("eager", "sdpa", None),
}
_TYPE = re.compile(r"b?float(8|16|32|64)(_\w+)?")  #: names of types of torch that a model can have
_QUANTIZATION = ("quantization_config", "compression_config", "quantization")  #: of transformers, vLLM and MLX


def leftovers(raw: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a config.json that secateur drops, each with the reason."""
    settings = [key for key, harmless in _RUN_SETTINGS.items() if key in raw and raw[key] not in harmless]
    quantization = [key for key in _QUANTIZATION if raw.get(key) is not None]
    types = [key for key in ("dtype", "torch_dtype") if isinstance(raw.get(key), str) and not _TYPE.fullmatch(raw[key])]
    return {
        **dict.fromkeys(types, "no name of a type; the weights have theirs"),
        **dict.fromkeys(settings, "a setting of a run, not of the model"),
        **dict.fromkeys(quantization, "only float weights are read"),
    }


def read_json_config(path: Path) -> tuple[dict[str, Any], Family]:
    """Read a config.json as plain JSON.

    Raises:
        UserError: if the file is missing, is no configuration of a model, or is of an unknown family.
    """
    if path.name == "config.json" and not path.exists():
        raise UserError(f"{path}: no such file{other_format(path.parent)}")
    raw = read_json(path)
    if key := next((key for key, value in raw.items() if _is_infinite(value)), None) if isinstance(raw, dict) else None:
        raise UserError(f"{path}: {key} holds NaN or Infinity, which is no JSON; replace or remove it")
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise UserError(f"{path}: has no model_type; this is no Hugging Face checkpoint")
    return raw, family_of(raw["model_type"], where=str(path))


def _is_infinite(value: Any) -> bool:
    """Whether a value read from JSON is, or holds, a number that JSON cannot hold."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (isinstance(value, float) and not math.isfinite(value)) or any(map(_is_infinite, values))


def load_config(path: Path) -> PreTrainedConfig:
    """Read a config.json with transformers, which fills in missing keys and checks the values.

    Raises:
        UserError: if transformers refuses the file.
    """
    from transformers import CONFIG_MAPPING

    raw, _ = read_json_config(path)
    dropped = leftovers(raw)
    content = {key: value for key, value in raw.items() if key not in dropped}
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(content))
    except Exception as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None


def read_shape(path: Path) -> tuple[Shape, int | None]:
    """Read a model's shape and number of positions from its config.json.

    transformers is imported only for a file that lacks a key, or has a value that needs checking: no default is
    repeated here. Weights beside the file decide whether the head is the embedding.

    Raises:
        UserError: if the file is missing, or is no configuration of a known family.
    """
    raw, family = read_json_config(path)
    config: Any = SimpleNamespace(**raw) if _is_complete(raw, family) else load_config(path)
    shape = Shape.of_config(config, where=str(path))
    if shape.refused_by_config:
        load_config(path)  # reports it
    if unties(path, shape):
        shape = dataclasses.replace(shape, tied=False)
    return shape, getattr(config, "max_position_embeddings", None)


def unties(path: Path, shape: Shape) -> bool:
    """Whether weights beside a config.json hold a head of their own, although the file says that there is none."""
    return shape.tied and path.name == "config.json" and holds_own_head(path.parent, shape.family)


def _is_complete(raw: dict[str, Any], family: Family) -> bool:
    """Whether every key that a shape depends on is present, with a value of its plain type."""
    numbers = {*family.config_keys.values(), "vocab_size", "max_position_embeddings"}
    if family.derives_head_dim:
        numbers -= {family.config_keys["head_dim"]} - raw.keys()
    numbers |= {key for factors in family.fixed.values() for key in factors if isinstance(key, str)}
    if family.kinds or family.derived:
        return False
    flags = {*(switch.removeprefix("!") for switch in family.optional.values()), "tie_word_embeddings"}
    return all(type(raw.get(key)) is int for key in numbers) and all(type(raw.get(key)) is bool for key in flags)
