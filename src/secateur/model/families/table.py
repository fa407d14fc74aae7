"""The family table: every row that secateur knows, and the way to those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from secateur.errors import UserError
from secateur.model.families import dense, experts, hybrid, layernorm
from secateur.model.families.family import Family

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["FAMILIES", "family_of", "plugin_families"]

FAMILIES: tuple[Family, ...] = (
    dense.LLAMA,
    dense.MISTRAL,
    dense.QWEN2,
    dense.QWEN2_VL,
    dense.QWEN3,
    dense.GEMMA3,
    dense.OLMO2,
    dense.PHI3,
    dense.MINISTRAL,
    dense.MINISTRAL3,
    dense.SMOLLM3,
    dense.GRANITE,
    dense.GEMMA,
    dense.GEMMA2,
    dense.OLMO3,
    dense.EXAONE4,
    dense.SEED_OSS,
    dense.INTERNLM3,
    dense.HELIUM,
    dense.ERNIE4_5,
    dense.ARCEE,
    dense.HUNYUAN,
    dense.OLMO,
    experts.QWEN3_MOE,
    experts.QWEN2_MOE,
    experts.OLMOE,
    experts.MIXTRAL,
    experts.GRANITEMOE,
    experts.GPT_OSS,
    experts.GLM4_MOE,
    experts.DEEPSEEK_V3,
    experts.ERNIE4_5_MOE,
    dense.GLM,
    dense.GLM4,
    dense.APERTUS,
    layernorm.PHI,
    layernorm.COHERE2,
    layernorm.STARCODER2,
    layernorm.NEMOTRON,
    hybrid.QWEN3_5,
    hybrid.GEMMA4,
    hybrid.LFM2,
)

_GROUP = "secateur.families"  #: entry points of packages; each names a Family


def family_of(model_type: str, *, where: str, block: Callable[[], str] = str) -> Family:
    """Find the family of a ``model_type``: a row of the table, or of an installed package.

    Args:
        where: the model, for an error.
        block: describes the tensors of a block of the model, for an error; empty if they are unknown.

    Raises:
        UserError: if no family has it.
    """
    for rows in (lambda: FAMILIES, plugin_families):
        for family in rows():
            if model_type in family.model_types:
                return family
    names = ", ".join(t for family in (*FAMILIES, *plugin_families()) for t in family.model_types)
    tensors = f"; a block of it holds {text}" if (text := block()) else ""
    raise UserError(
        f"{where}: model_type {model_type!r} is not a known family (known: {names}); docs/families.md shows how to add "
        f"one row for it{tensors}"
    )


@cache
def plugin_families() -> tuple[Family, ...]:
    """The families of installed packages: entry points of the group ``secateur.families``.

    Raises:
        UserError: if a package cannot be imported, or its entry point is no :class:`Family`.
    """
    from importlib.metadata import entry_points  # slow to import, and most models need no package

    return tuple(_load(entry) for entry in entry_points(group=_GROUP))


def _load(entry: EntryPoint) -> Family:
    try:
        family = entry.load()
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{entry.name}: the package of this family cannot be loaded: {text}") from None
    if not isinstance(family, Family):
        raise UserError(f"{entry.name}: its entry point names {family!r}, which is no Family")
    return family
