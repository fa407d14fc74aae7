"""Model names: local checkpoint directories, and models of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from secateur.errors import UserError, disk_full, first_line
from secateur.files import read_json
from secateur.progress import notify

__all__ = ["cached_positions", "is_hub_name", "local_checkpoint"]

_PREFIX = "hf:"
_PART = r"(?![-.])[\w.-]{1,96}(?<![-.])"
_NAME = re.compile(rf"(?!.*(?:--|\.\.))(?:{_PREFIX}(?:{_PART}/)?|{_PART}/){_PART}(?<!\.git)", re.ASCII)

_CONFIGURATION = ["*.json", "*.jinja", "merges.txt", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]
_UNUSED = ["*/*", "consolidated*"]  # other formats in subfolders, and the same weights under other tensor names


def is_hub_name(name: str) -> bool:
    """Whether ``name`` means a model of the Hub: ``hf:org/name``, or ``org/name`` if no such path exists.

    Both forms may end in ``@REVISION``, a branch, a tag or a commit.
    """
    model, at, revision = name.partition("@")
    legal = bool(_NAME.fullmatch(model)) and bool(revision) == bool(at)
    return legal and (name.startswith(_PREFIX) or not Path(name).exists())


def local_checkpoint(name: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """Return a checkpoint's directory; a model of the Hub is first downloaded into the cache of ``huggingface_hub``.

    Args:
        name: a directory, or a model of the Hub, see :func:`is_hub_name`.
        weights: whether to download the weights (safetensors only) besides the configuration and the tokenizer.

    Raises:
        UserError: if there is no such directory or model, or the download fails.
    """
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"a model is a directory, a Hub name or an earlier result, not {type(name).__name__}", "model")
    name = os.fspath(name)
    directory = Path(name).expanduser()
    if directory.is_dir() and not name.startswith(_PREFIX):
        return directory
    if not is_hub_name(name):
        problem = "not a directory" if directory.exists() else "no such directory"
        raise UserError(f"{name}: {problem}; name a checkpoint directory or a Hub model as org/name")
    from huggingface_hub import snapshot_download

    model, _, revision = name.removeprefix(_PREFIX).partition("@")
    notify(f"{model}: fetching from the Hugging Face Hub, unless cached")
    patterns = _CONFIGURATION + _WEIGHTS * weights
    try:
        return Path(
            snapshot_download(model, revision=revision or None, allow_patterns=patterns, ignore_patterns=_UNUSED)
        )
    except Exception as error:  # the client also raises the errors of its transports, of any class
        if disk_full(error):
            raise
        place = "" if name.startswith(_PREFIX) else "no such directory, and it "
        raise UserError(f"{name}: {place}cannot be downloaded: {_reason(error, model, revision)}") from None


def cached_positions(name: str) -> int | None:
    """Return the positions of a model of the Hub from its configuration in the cache; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    model, _, revision = name.removeprefix(_PREFIX).partition("@")
    path = try_to_load_from_cache(model, "config.json", revision=revision or None)
    if not isinstance(path, str):
        return None
    config = read_json(Path(path))
    return config.get("max_position_embeddings") if isinstance(config, dict) else None


def _reason(error: Exception, model: str, revision: str) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted; accept the terms at https://huggingface.co/{model} and run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such model, or it is private; check the name, or run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}; name a branch, a tag or a commit"
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "it is not in the cache, and HF_HUB_OFFLINE is set; unset it, or name a checkpoint directory"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = first_line(error.__cause__ or error)
        return f"the Hub cannot be reached ({cause}); check the network, or name a checkpoint directory"
    return f"{first_line(error)}; try again, or name a checkpoint directory"
