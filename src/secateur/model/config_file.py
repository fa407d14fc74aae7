"""The shape of a model from its config.json, without transformers where the file states every key that counts."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from secateur.errors import UserError
from secateur.files import read_json
from secateur.model.attention_windows import states_windows
from secateur.model.families import family_of
from secateur.model.shapes import Shape
from secateur.model.weight_files import describe_block, holds_own_head, other_format
from secateur.model.wrappers import Wrapper, tower_names, wrapper_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["WholeConfig", "leftovers", "load_config", "read_json_config", "read_shape", "split_config", "unties"]

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


@dataclass(frozen=True)
class WholeConfig:
    """The configuration of an image-text model, beside that of its language model."""

    wrapper: Wrapper
    raw: dict[str, Any]  #: the content of config.json, with all that its classes fill in
    config: Any  #: the configuration object of transformers

    def around(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json around another language model, whose content is ``text``."""
        text = {key: value for key, value in text.items() if key != "architectures"}
        vision = {**self.raw["vision_config"], **dict.fromkeys(self.wrapper.vision_keys, text["hidden_size"])}
        types = {key: text[key] for key in _TYPES if key in text and key in self.raw}
        tied = bool(text.get("tie_word_embeddings"))
        parts = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
        return {**self.raw, **types, **parts}

    @property
    def pinned(self) -> range:
        """The layers of the language model that features of the vision tower are added to."""
        key = self.wrapper.deepstack_key
        return range(len(getattr(self.config.vision_config, key)) if key else 0)


def split_config(raw: Mapping[str, Any], config: Any) -> tuple[dict[str, Any], Any, WholeConfig | None]:
    """The configuration of a language model and that of the image-text model around it, None where there is none.

    Sizes that equal defaults may be missing in ``text_config``, and old files have no ``text_config`` at all: what
    counts is the object that transformers makes of the file.

    Args:
        raw: the content of config.json.
        config: the configuration object; the part of the language model gets the wrapper's ``tie_word_embeddings``.
    """
    wrapper = wrapper_of(config.model_type)
    if wrapper is None:
        return dict(raw), config, None
    text: Any = config.text_config
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    complete = _complete(config)
    parts = ("text_config", "vision_config")
    nested = "text_config" in raw  # old files have the language model's keys at the top
    top = {key: raw[key] for key in raw if key not in parts and (nested or key in complete or key in _TYPES)}
    whole = _merge(complete, top)
    for part in parts:
        whole[part] = _merge(complete[part], raw.get(part) or {})
        whole[part]["model_type"] = complete[part]["model_type"]
    for level in (whole, whole["text_config"]):
        level["tie_word_embeddings"] = text.tie_word_embeddings
    return whole["text_config"], text, WholeConfig(wrapper, whole, config)


_TYPES = ("dtype", "torch_dtype")  #: names of one key, in releases 5 and 4


def _merge(complete: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, and below it what the configuration's class fills in."""
    missing = {key: value for key, value in complete.items() if key not in _TYPES or not any(t in raw for t in _TYPES)}
    return {**missing, **raw}


def _complete(config: Any) -> dict[str, Any]:
    """A configuration as JSON with every key of its class, but those that all classes have at their default."""
    from transformers import PreTrainedConfig

    common = json.loads(PreTrainedConfig().to_json_string(use_diff=False))

    def part(content: Mapping[str, Any]) -> dict[str, Any]:
        keys = (
            key for key in content if not key.startswith("_") and (key not in common or content[key] != common[key])
        )
        return {key: part(content[key]) if key.endswith("_config") and content[key] else content[key] for key in keys}

    return part(json.loads(config.to_json_string(use_diff=False)))


def read_json_config(path: Path) -> dict[str, Any]:
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
    if wrapper_of(raw["model_type"]) is None:
        family_of(raw["model_type"], where=str(path), block=partial(describe_block, path.parent))
    return raw


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

    raw = read_json_config(path)
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
    raw = read_json_config(path)
    config: Any = SimpleNamespace(**raw) if _is_complete(raw) else split_config(raw, load_config(path))[1]
    shape = Shape.of_config(config, where=str(path))
    if shape.refused_by_config:
        load_config(path)  # reports it
    if unties(path, shape):
        shape = dataclasses.replace(shape, tied=False)
    return shape, getattr(config, "max_position_embeddings", None)


def unties(path: Path, shape: Shape) -> bool:
    """Whether weights beside a config.json hold a head of their own, although the file says that there is none."""
    if not shape.tied or path.name != "config.json":
        return False
    wrapper = wrapper_of(read_json_config(path)["model_type"])
    return holds_own_head(path.parent, shape.family, tower_names if wrapper else None)


def _is_complete(raw: dict[str, Any]) -> bool:
    """Whether every key that a shape depends on is present, with a value of its plain type."""
    if wrapper_of(raw["model_type"]):
        return False
    family = family_of(raw["model_type"], where="")
    if family.kinds or family.derived or not states_windows(raw):
        return False
    numbers = {*family.config_keys.values(), "vocab_size", "max_position_embeddings"}
    if family.derives_head_dim:
        numbers -= {family.config_keys["head_dim"]} - raw.keys()
    numbers |= {key for factors in family.fixed.values() for key in factors if isinstance(key, str)}
    switches = (key for switch in family.optional.values() for key in switch.split("&"))
    flags = {*(key.removeprefix("!") for key in switches), "tie_word_embeddings"}
    flags |= {twin for twins in family.twin_keys.values() for twin in twins}
    return all(type(raw.get(key)) is int for key in numbers) and all(type(raw.get(key)) is bool for key in flags)
