"""Study files by name: those that secateur ships, and any file by its path."""

from __future__ import annotations

import os
from pathlib import Path

from secateur.errors import UserError, did_you_mean

__all__ = ["find_study", "shipped_studies"]


def shipped_studies() -> dict[str, Path]:
    """Name -> file of each study that secateur ships: inside an installed package, beside ``src`` in a checkout."""
    package = Path(__file__).parents[1]
    folders = (package / "studies", package.parents[1] / "studies")
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_study(name_or_path: str | Path) -> Path:
    """Return the file at a path, or the shipped study of a name such as ``demo``. A file of that name comes first.

    Raises:
        UserError: if there is neither; a near name is suggested.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise UserError(
            f"a study is a file, or the name of a shipped one such as demo, not {type(name_or_path).__name__}"
        )
    path, name, shipped = Path(name_or_path), str(name_or_path), shipped_studies()
    if name in shipped and not path.is_file():
        return shipped[name]
    if path.exists():
        return path
    if path.suffix or len(path.parts) > 1:
        files = [str(file) for file in path.parent.glob("*.y*ml")] + ([path.stem] if path.stem in shipped else [])
        near = did_you_mean(path, files) if files else ""
        raise UserError(f"{path}: no such file{near.partition('; known')[0]}")
    raise UserError(f"{name}: no such file, and no shipped study has this name{did_you_mean(name, shipped)}")
