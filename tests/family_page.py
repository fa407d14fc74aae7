"""The tables of docs/families.md: what the tests measured, and what the rows of the table of families say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from proofs import Proof
from reference import compensated
from secateur.model.families import Family
from secateur.model.shapes import Shape

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
START, END = "<!-- tables: written by `make families` -->\n", "<!-- end of the tables -->\n"
PROOFS = ("family", "layers", "FFN", "KV heads", "hidden (masked norm)", "zeros", "FLAP's biases", "real ratios")
MIXTURES = ("family", "layers", "experts", "FFN of experts", "KV heads", "hidden (masked norm)", "zeros")
FACTS = ("family", "`model_type`", "sizes with real ratios", "period", "notes")
ROUNDING = 1e-6  #: differences up to this are rounding, which differs between CPUs

Row = tuple[str, ...]


class FamilyPage:
    """The tables of the page, by the name of the family.

    Attributes:
        proofs: largest differences of logits, or why an axis is not cut.
        mixtures: the same of families with routed experts.
        facts: what sets a family apart.
    """

    def __init__(self, text: str) -> None:
        self.head, _, rest = text.partition(START)
        tables, _, self.tail = rest.partition(END)
        rows = [tuple(cell.strip() for cell in line.strip("|\n").split(" | ")) for line in tables.splitlines()]
        self.proofs = {row[0]: row for row in rows if len(row) == len(PROOFS)}
        self.mixtures = {row[0]: row for row in rows if len(row) == len(MIXTURES)}
        self.facts = {row[0]: row for row in rows if len(row) == len(FACTS)}

    def text(self, order: list[str]) -> str:
        """The page with the rows in this order."""
        tables = [*_table(PROOFS, self.proofs, order), "", *_table(MIXTURES, self.mixtures, order), ""]
        tables += _table(FACTS, self.facts, order)
        return self.head + START + "\n" + "\n".join(tables) + "\n\n" + END + self.tail


def _table(header: Row, rows: Mapping[str, Row], order: list[str]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    yield from (f"| {' | '.join(rows[name])} |" for name in order if name in rows)


def proof_row(family: Family, tiny: Mapping[str, Proof], realistic: Mapping[str, Proof]) -> Row:
    """What was measured for a family, in the order of ``PROOFS``."""
    axes = (_axis_cell(family, tiny, axis) for axis in ("layers", "ffn", "kv", "hidden"))
    biases = ", ".join(f"`{module.rpartition('.')[2]}`" for module in compensated(family))
    return (
        family.name,
        *axes,
        magnitude(tiny["sparse"].difference),
        f"{magnitude(tiny['bias'].difference)} ({biases})" if "bias" in tiny else "none to use",
        magnitude(max(proof.difference for proof in realistic.values())),
    )


def mixture_row(family: Family, tiny: Mapping[str, Proof]) -> Row:
    """What was measured for a mixture, in the order of ``MIXTURES``."""
    axes = ("layers", "experts", "expert_ffn", "kv", "hidden")
    joint = " (with hidden)" if family.heads_span_hidden else ""
    cells = {axis: _axis_cell(family, tiny, axis, masked=False) for axis in axes}
    cells["kv"] += joint
    return (family.name, *cells.values(), magnitude(tiny["sparse"].difference))


def _axis_cell(family: Family, tiny: Mapping[str, Proof], axis: str, *, masked: bool = True) -> str:
    if reason := family.uncut.get(axis):
        return f"not cut: {reason}"
    masked = masked and axis == "kv" and not tiny[axis].exact
    return magnitude(tiny[axis].difference) + (" (masked norm)" if masked else "")


def fact_row(family: Family, shape: Shape) -> Row:
    """What a family's row says, in the order of ``FACTS``; ``shape`` is that of its realistic config."""
    types = ", ".join(f"`{name}`" for name in family.model_types)
    sizes = f"{shape}, {'tied' if shape.tied else 'untied'}"
    return family.name, types, sizes, str(family.pattern or "none"), "; ".join(_notes(family)) or "none"


def _notes(family: Family) -> Iterator[str]:
    names = {**family.block, **{name: axes for kind in family.kinds.values() for name, axes in kind.items()}}
    yield from (f"logits divided by `{key}`" for key in (family.logit_divisor,) if key)
    yield from (f"logits times `{key}`" for key in (family.logit_multiplier,) if key)
    yield from (f"logits capped by `{key}`" for key in (family.logit_cap,) if key)
    yield from (f"`{name}`" for name in ("lm_head.bias",) if name in family.outer)
    if family.norms_center:
        yield "norms subtract the mean"
    if family.norm_offset:
        yield f"norms multiply by their weight + {family.norm_offset:g}"
    if family.embedding_grows:
        yield "embeddings times sqrt(hidden)"
    fused = [name.split(".")[-2] for name, axes in names.items() if len(axes) == 2 and isinstance(axes[0], tuple)]
    if fused:
        yield f"fused: {', '.join(f'`{name}`' for name in fused)}"
    if any("gated_query" in axes for axes in names.values()):
        yield "query and gate side by side in `q_proj`"
    if family.kinds:
        yield f"kinds of layers: {', '.join(family.kinds)}"
    if family.heads_divide_hidden:
        written = f"; otherwise written as {family.relaxed[0]}" if family.relaxed else ""
        yield f"hidden must be a multiple of the heads{written}"
    if family.pinned:
        yield "some layers stay"


def magnitude(difference: float) -> str:
    """The power of ten next to a difference: 4e-7 -> ``1e-6``."""
    return f"1e{round(math.log10(difference))}" if difference else "0"


def disagreements(page: Row, measured: Row) -> list[str]:
    """Where a row of the page is not what was measured: other words, or a figure ten times too low."""
    return [f"{a!r} on the page, measured {b!r}" for a, b in zip(page, measured, strict=True) if not _agrees(a, b)]


def _agrees(page: str, measured: str) -> bool:
    (figure, _, words), (value, _, others) = page.partition(" "), measured.partition(" ")
    if words != others or not _is_number(figure) or not _is_number(value):
        return page == measured
    return float(value) <= max(10 * float(figure), ROUNDING)


def _is_number(word: str) -> bool:
    return word == "0" or word.startswith("1e")
