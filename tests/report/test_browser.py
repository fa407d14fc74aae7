"""The page in a browser. A headless window has a minimum width, so the page is shown in frames."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from example import R, broken, example, judged_page, large

from secateur.comparison.records import StudyResults

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--allow-file-access-from-files",  # lets the frame's script look into the page
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
]

#: The accessibility checker, if installed: npm install --no-save --no-package-lock --prefix . axe-core
AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
ALL = tuple(itertools.product((1440, 768, 360), ("light", "dark")))
SOME = ((1440, "light"), (768, "dark"), (360, "light"))
#: page -> widths and colour schemes to test the layout, and those for axe-core, which takes seconds
LOOKS: dict[str, tuple[tuple[tuple[int, str], ...], tuple[tuple[int, str], ...]]] = {
    "example": (ALL, ((1440, "light"), (360, "dark"))),
    "broken": (ALL, ((768, "light"), (1440, "dark"))),
    "part": (SOME, ((360, "light"), (768, "dark"))),
    "ladder": (SOME, ()),
}

pytestmark = [pytest.mark.browser, pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")]


def chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def inspect_page(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the frame's measurements at each look; fail on any console message."""
    looks, checked = LOOKS[name]
    request = {"looks": [(*look, look in checked) for look in looks], "axe": AXE.as_uri() if AXE.is_file() else None}
    shutil.copy(Path(__file__).with_name("frame.html"), folder)
    address = f"{(folder / 'frame.html').as_uri()}#{quote(json.dumps(request))}"
    process = chromium(folder / "profile", "--window-size=1500,1000", "--dump-dom", address)
    assert "CONSOLE" not in process.stderr, process.stderr
    match = re.search(r'<pre id="result">(.+?)</pre>', process.stdout, re.DOTALL)
    assert match, process.stdout[-2000:]
    return json.loads(unescape(match[1]))


@pytest.fixture(scope="module")
def pages(ladder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each page: a complete study, a broken one, a large one and a part of the large one."""
    folders = {make.__name__: tmp_path_factory.mktemp(make.__name__) for make in (example, broken, part)}
    for make in (example, broken, part):
        (folders[make.__name__] / "report.html").write_text(judged_page(make))
    return {**folders, "ladder": ladder}


def part() -> StudyResults:
    """One model of the ladder at one budget."""
    ladder = large()
    cells = [c for c in ladder.cells if (c.method, c.target) == ("wanda", "0.5") and c.retrain_tokens == R]
    pruned = tuple(p for p in ladder.pruned if (p.method, p.target) == ("wanda", "0.5"))
    return dataclasses.replace(ladder, cells=tuple(cells), pruned=pruned)


@pytest.fixture(scope="module", params=LOOKS)
def looks(pages: dict[str, Path], request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return inspect_page(pages[request.param], request.param)


def test_layout(looks: dict[str, dict[str, Any]]):
    for look, result in looks.items():
        width, scheme = look.split()
        assert result["client"] <= int(width) and result["scroll"] <= result["client"], look
        assert result["outside"] == [], look
        assert result["headings"] and all(w > 20 and h > 10 for w, h in result["headings"]), look
        assert result["figures"] and all(w > 200 and h > 60 for w, h in result["figures"]), look
        assert result["dark"] == (scheme == "dark") and result["contrast"] >= 4.5, look


def test_tables_sort_and_filter(looks: dict[str, dict[str, Any]]):
    for result in looks.values():
        assert (result["sorted"], result["turned"]) == ("ascending", "descending") and result["reached"] == 0
        for losses, falling in ((result["losses"], False), (result["falling"], True)):
            numbers = [float(value) for value in losses if value]
            assert numbers == sorted(numbers, reverse=falling)
            assert "" not in losses[: len(numbers)]  # missing values come last
        assert result["visible"] and all("P-R" in row and "Wanda" in row for row in result["visible"])
        assert result["status"] == f"{len(result['visible'])} of {result['rows']} rows" and result["labelled"]
        assert result["again"] == result["rows"]


def test_a_model_s_name_links_to_its_history(looks: dict[str, dict[str, Any]]):
    for result in looks.values():
        assert result["revealed"] == {"before": False, "shown": True, "focus": True, "back": True}


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed")
def test_accessibility(looks: dict[str, dict[str, Any]]):
    assert [result["barriers"] for result in looks.values() if result.get("barriers")] == []


def test_screenshot(pages: dict[str, Path], tmp_path: Path):
    page, shot = pages["example"] / "report.html", tmp_path / "shot.png"
    chromium(tmp_path / "profile", "--window-size=1280,2000", f"--screenshot={shot}", page.as_uri())
    assert shot.stat().st_size > 20_000
