"""Python code installed along with secateur: a corpus that needs no download.

The list of packages is fixed, so other installed packages do not matter: secateur's dependencies and theirs, on every
platform. It excludes packages with less than 0.4 MB of code, extras, and packages of single platforms, such as GPU
libraries. Files generated at build time, tests, and files other than Python code are excluded too, so that two
installations of the same versions agree.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from secateur.errors import UserError
from secateur.runtime import install_command

__all__ = ["FOREIGN", "PACKAGES", "package_source"]

PACKAGES = (
    "accelerate",
    "click",
    "datasets",
    "filelock",
    "fonttools",
    "fsspec",
    "huggingface-hub",
    "jinja2",
    "matplotlib",
    "mpmath",
    "networkx",
    "numpy",
    "packaging",
    "pandas",
    "pillow",
    "pyarrow",
    "pydantic",
    "pygments",
    "pyparsing",
    "pyyaml",
    "rich",
    "safetensors",
    "sympy",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
)

#: folders that belong to other packages, and tests, which some distributions do not ship
FOREIGN = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
#: files generated at build time: the version with its variant, the compiler
_GENERATED = {"version.py", "_version.py", "__config__.py"}


def package_source(name: str) -> dict[str, Path]:
    """Return the Python files of an installed package by import path, sorted.

    Raises:
        UserError: if the package, its file list or one of its files is missing.
    """
    constraints = Path(__file__).parents[3] / "constraints.txt"  # in a clone
    pins = ["-c", str(constraints)] if constraints.is_file() else []
    fix = f"install it with: {install_command(*pins, '--force-reinstall', '--no-deps', name)}"
    try:
        listed = metadata.files(name)
    except metadata.PackageNotFoundError:
        raise UserError(f"python: the package {name} is not installed; {fix}") from None
    if listed is None:
        raise UserError(f"python: the package {name} has no list of its files (RECORD); {fix}")
    sources = (f for f in listed if f.suffix == ".py" and f.name not in _GENERATED and not FOREIGN & set(f.parts))
    files = {f.as_posix(): Path(str(f.locate())) for f in sources if ".." not in f.parts}  # ".." is a script
    missing = next((file for file in files.values() if not file.is_file()), None)
    if missing or not files:
        raise UserError(f"python: {missing or f'any Python file of {name}'} is not there; {fix}")
    return dict(sorted(files.items()))
