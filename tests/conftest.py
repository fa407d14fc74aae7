"""Shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from secateur.report.figures import palette


@pytest.fixture(scope="session", autouse=True)
def quick_fonts() -> Iterator[None]:
    """Fonts embedded as outlines: a PDF then takes a fifth of the time, and what it shows is the same."""
    kind = palette.RC["pdf.fonttype"]
    palette.RC["pdf.fonttype"] = 3
    yield
    palette.RC["pdf.fonttype"] = kind
