from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from example import large

from secateur.report import palette
from secateur.report.build import build_report
from secateur.report.verdict import judge


@pytest.fixture(scope="session", autouse=True)
def quick_fonts() -> Iterator[None]:
    """Fonts embedded as outlines: a PDF then takes a fifth of the time, and what it shows is the same."""
    kind = palette.RC["pdf.fonttype"]
    palette.RC["pdf.fonttype"] = 3
    yield
    palette.RC["pdf.fonttype"] = kind


@pytest.fixture(scope="session")
def ladder(quick_fonts: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study with a ladder, ratios, seeds, controls and objectives."""
    return build_report(judge(large()), tmp_path_factory.mktemp("ladder")).parent
