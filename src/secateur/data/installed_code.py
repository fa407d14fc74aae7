"""Python code that is installed along with secateur: a corpus that everybody has already.

The packages are a closed list, so that what else is installed has no say in it: what secateur needs to run, and what
that needs in turn on every platform. Left out are packages of less than 0.4 MB of code, extras, and what only some
platforms have, such as the libraries of GPUs. What is written when a package is built, tests, and bytes that are not
Python code are no part of it, so that two installations of the same versions agree.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from secateur.errors import UserError

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

#: folders of what other packages put into the library, and of tests, which some distributions do not ship
FOREIGN = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
#: what a build writes: the version with its variant, the compiler
_BUILT = {"version.py", "_version.py", "__config__.py"}


def package_source(name: str) -> dict[str, Path]:
    """The Python files of an installed package, by the path that it is imported from, sorted.

    Raises:
        UserError: if the package, the list of its files or one of them is not there.
    """
    mend = f"install it with: pip install -c constraints.txt --force-reinstall --no-deps {name}"
    try:
        listed = metadata.files(name)
    except metadata.PackageNotFoundError:
        raise UserError(f"python: the package {name} is not installed; {mend}") from None
    if listed is None:
        raise UserError(f"python: the package {name} has no list of its files (RECORD); {mend}")
    chosen = (f for f in listed if f.suffix == ".py" and f.name not in _BUILT and not FOREIGN & set(f.parts))
    found = {f.as_posix(): Path(str(f.locate())) for f in chosen if ".." not in f.parts}  # those above are scripts
    gone = next((file for file in found.values() if not file.is_file()), None)
    if gone or not found:
        raise UserError(f"python: {gone or f'any Python file of {name}'} is not there; {mend}")
    return dict(sorted(found.items()))
