"""Colours by role, and settings that make matplotlib's output reproducible."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["LIGHT", "RC", "ROLES", "Palette", "themed"]


@dataclass(frozen=True)
class Palette:
    """A colour for each role; the roles are also the names of the page's CSS variables."""

    ink: str
    muted: str
    rule: str
    paper: str
    pruned: str
    scratch: str


#: For standalone files. The two paths differ in lightness as well as hue.
LIGHT = Palette("#1c1b19", "#5c584f", "#d9d4c7", "#ffffff", "#17609e", "#b0470b")

#: For the page: placeholder colours, which ``themed`` replaces by CSS variables.
ROLES = Palette("#010a01", "#010a02", "#010a03", "#010a04", "#010a05", "#010a06")

RC: Any = {
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so the layout is the same on every machine
    "font.size": 9.5,
    "lines.linewidth": 1.7,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",  # text stays text: searchable, scalable, in the page's own font
    "svg.hashsalt": "secateur",
    "text.parse_math": False,  # method names may contain "$"
    "text.usetex": False,
}


def themed(svg: str) -> str:
    """Replace each role's colour by its CSS variable, so that the page's light and dark themes apply."""
    roles = {getattr(ROLES, field.name): f"var(--{field.name})" for field in fields(Palette)}
    return re.sub("|".join(roles), lambda match: roles[match[0]], svg)
