"""Model names: local checkpoint directories, and models of the Hugging Face Hub, which are fetched and uploaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from secateur import distributed
from secateur.errors import RunError, UserError, disk_full, first_line
from secateur.files import read_json
from secateur.model.companions import COMPANION_FOLDERS, COMPANIONS
from secateur.progress import notify

__all__ = [
    "cached_positions",
    "check_repository",
    "check_token",
    "create_repository",
    "is_hub_name",
    "local_checkpoint",
    "repository_of",
    "upload",
]

_PREFIX = "hf:"
_PART = r"(?![-.])[\w.-]{1,96}(?<![-.])"
_NAME = re.compile(rf"(?!.*(?:--|\.\.))(?:{_PREFIX}(?:{_PART}/)?|{_PART}/){_PART}(?<!\.git)", re.ASCII)

_CONFIGURATION = ["*.json", *COMPANIONS, "README.md"]  # the model card names the licence
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
    try:  # in two calls, since a pattern that ignores subfolders has no exceptions
        for folder in COMPANION_FOLDERS if weights else ():
            snapshot_download(model, revision=revision or None, allow_patterns=[f"{folder}/*"])
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


def repository_of(model: Any, directory: Path) -> str | None:
    """The name on the Hub, ``org/name``, of a model that is read from ``directory``; None where nothing says it.

    Args:
        model: what the user named: a Hub name, or a directory, which may be a snapshot in the Hub's cache.
    """
    if isinstance(model, str | os.PathLike) and is_hub_name(name := os.fspath(model)):
        return name.removeprefix(_PREFIX).partition("@")[0]
    folder = directory.parent.parent.name  # models--org--name/snapshots/<commit>
    if directory.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return folder.removeprefix("models--").replace("--", "/")


def check_repository(name: str | None) -> None:
    """Check the name of a repository to upload to; None, for no upload, is one.

    Raises:
        UserError: if it is not ``org/name``.
    """
    if name is not None and ("/" not in name or name.startswith(_PREFIX) or not _NAME.fullmatch(name)):
        raise UserError(f"`push_to_hub`: {name!r} is no repository of the Hub; write ORG/NAME, such as my-org/my-model")


def check_token(name: str | None) -> None:
    """Check that there is a token to upload with, unless ``name`` is None; the Hub is not asked.

    Raises:
        UserError: if there is none.
    """
    if name is None or not distributed.is_main():
        return
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise UserError("`push_to_hub`: no token of the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")


def create_repository(name: str | None) -> None:
    """Create the repository that a run will be uploaded to, so that a lack of rights shows before any work.

    A new repository is private. Nothing happens in all processes but the first, or where ``name`` is None.

    Raises:
        UserError: if the Hub refuses, or cannot be reached.
    """
    if name is None or not distributed.is_main():
        return
    import huggingface_hub

    try:
        url = huggingface_hub.HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:  # of any class, as in a download
        reason = f"{first_line(error)}; check the name, the network, and that the token may write"
        raise UserError(f"`push_to_hub`: {name} cannot be created: {reason}") from None
    notify(f"the output will be uploaded to {url}; a new repository is private until you change it in its settings")


def upload(folder: Path, name: str | None, *, without: tuple[str, ...] = ()) -> None:
    """Upload a finished output to its repository; nothing where ``name`` is None.

    Args:
        without: subfolders that stay here.

    Raises:
        RunError: if it fails; the output stays.
    """
    if name is None or not distributed.is_main():
        return
    import huggingface_hub

    notify(f"{folder}: uploading to {name}")
    patterns = [f"{part}/**" for part in without]
    try:
        huggingface_hub.HfApi().upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload by secateur", ignore_patterns=patterns or None
        )
    except Exception as error:  # of any class, as in a download
        retry = f"{folder} is complete: upload it by `hf upload {name} {folder}`"
        raise RunError(f"{folder}: cannot be uploaded to {name}: {first_line(error)}; {retry}") from None
