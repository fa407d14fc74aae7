"""The layout: imports between packages point one way, each file is in its place, and names are nouns and verbs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "secateur"
FILES = sorted(SOURCE.rglob("*.py"))

#: names that say nothing of the value: participles and pronouns (docs/architecture.md, "Names")
RIDDLES = {
    "found",
    "told",
    "asked",
    "said",
    "held",
    "kept",
    "given",
    "shown",
    "gone",
    "known",
    "seen",
    "wanted",
    "meant",
    "begun",
    "left",
    "taken",
    "drawn",
    "chosen",
    "ours",
    "theirs",
    "mine",
    "own",
    "one",
    "other",
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of secateur that a file imports, and whether within a function, which is not when it is imported."""
    tree = ast.parse(path.read_text())
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    inside = {id(x) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for x in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in checking or not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("secateur."):
                yield name, id(node) in inside


def package(module: str) -> str:
    """The package below secateur that a module or a name in it belongs to; a loose module is its own."""
    return module.split(".")[1]


def test_packages_import_in_one_direction() -> None:
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        own = path.relative_to(SOURCE).with_suffix("").parts[0]
        if own in ("__init__", "__main__"):
            continue
        for name, _ in imports(path):
            if package(name) not in (own, "__version__"):
                arrows.setdefault(own, set()).add(package(name))
    list(TopologicalSorter(arrows).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("own", "forbidden"),
    [
        ("comparison", {"report", "study", "cli"}),
        ("forecast", {"report", "study", "cli"}),
        ("methods", {"pruning", "study", "training", "report", "cli"}),
        ("calibration", {"methods", "pruning", "study", "cli"}),
        ("model", {"methods", "pruning", "training", "data", "cli"}),
        ("training", {"study", "report", "cli", "pruning"}),
        ("report", {"study", "cli", "training", "pruning"}),
        ("study", {"cli"}),
        ("searching", {"study", "report", "forecast", "cli"}),
    ],
)
def test_what_a_package_may_not_know(own: str, forbidden: set[str]) -> None:
    known = {(path.name, package(name)) for path in (SOURCE / own).rglob("*.py") for name, _ in imports(path)}
    assert not {pair for pair in known if pair[1] in forbidden}


def test_every_package_says_what_lives_there() -> None:
    for folder in {path.parent for path in FILES}:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text and len(text) > 40, folder


def test_names_are_nouns_and_verbs() -> None:
    riddles = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = ""
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg) and node.arg != "other":  # of ``__add__``
                name = node.arg
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                name = node.name
            if name.strip("_").lower() in RIDDLES:
                riddles.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {name}")  # type: ignore[attr-defined]
    assert not riddles


def test_public_names_are_of_one_module_each() -> None:
    homes: dict[str, list[str]] = {}
    for path in FILES:
        if path.name == "__init__.py" or path.name == "api.py" or "verbs" in path.parts:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for entry in ast.literal_eval(node.value):
                    homes.setdefault(entry, []).append(str(path.relative_to(SOURCE)))
    assert not {name: files for name, files in homes.items() if len(files) > 1}
