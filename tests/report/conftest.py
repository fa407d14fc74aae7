from __future__ import annotations

from pathlib import Path

import pytest
from example import judged, large

from secateur.report.page import build_report


@pytest.fixture(scope="session")
def ladder(quick_fonts: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study with a ladder, ratios, seeds, controls and objectives."""
    return build_report(judged(large), tmp_path_factory.mktemp("ladder")).parent
