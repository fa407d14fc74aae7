"""The page as a browser lays it out. A headless window has a minimum width, so the page is put into frames."""

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
from example import R, broken, example, large

from secateur.comparison.records import StudyResults
from secateur.report.judgement import judge
from secateur.report.page import render

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

#: The checker of accessibility, where it is installed: npm install --no-save --no-package-lock --prefix . axe-core
AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
ALL = tuple(itertools.product((1440, 768, 360), ("light", "dark")))
SOME = ((1440, "light"), (768, "dark"), (360, "light"))
#: page -> the looks at which it is laid out, and those at which axe-core checks it, which takes seconds: each once
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


def looked(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """What the frame finds in the report at each look; fail on any console message."""
    looks, checked = LOOKS[name]
    asked = {"looks": [(*look, look in checked) for look in looks], "axe": AXE.as_uri() if AXE.is_file() else None}
    shutil.copy(Path(__file__).with_name("frame.html"), folder)
    address = f"{(folder / 'frame.html').as_uri()}#{quote(json.dumps(asked))}"
    done = chromium(folder / "profile", "--window-size=1500,1000", "--dump-dom", address)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(unescape(found[1]))


@pytest.fixture(scope="module")
def pages(ladder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a whole study's page, of a broken one's, of a large one's and of a part of that."""
    folders = {make.__name__: tmp_path_factory.mktemp(make.__name__) for make in (example, broken, part)}
    for make in (example, broken, part):
        (folders[make.__name__] / "report.html").write_text(render(judge(make())))
    return {**folders, "ladder": ladder}


def part() -> StudyResults:
    """One model of the ladder, with everything that there is of it at one budget."""
    whole = large()
    cells = [c for c in whole.cells if (c.method, c.target) == ("wanda", "0.5") and c.retrain_tokens == R]
    pruned = tuple(p for p in whole.pruned if (p.method, p.target) == ("wanda", "0.5"))
    return dataclasses.replace(whole, cells=tuple(cells), pruned=pruned)


@pytest.fixture(scope="module", params=LOOKS)
def looks(pages: dict[str, Path], request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return looked(pages[request.param], request.param)


def test_layout(looks: dict[str, dict[str, Any]]):
    for look, found in looks.items():
        width, scheme = look.split()
        assert found["client"] <= int(width) and found["scroll"] <= found["client"], look
        assert found["outside"] == [], look
        assert found["headings"] and all(w > 20 and h > 10 for w, h in found["headings"]), look
        assert found["figures"] and all(w > 200 and h > 60 for w, h in found["figures"]), look
        assert found["dark"] == (scheme == "dark") and found["contrast"] >= 4.5, look


def test_tables_sort_and_filter(looks: dict[str, dict[str, Any]]):
    for found in looks.values():
        assert (found["sorted"], found["turned"]) == ("ascending", "descending") and found["reached"] == 0
        for losses, falling in ((found["losses"], False), (found["falling"], True)):
            numbers = [float(value) for value in losses if value]
            assert numbers == sorted(numbers, reverse=falling)
            assert "" not in losses[: len(numbers)]  # what was not measured comes last
        assert found["visible"] and all("P-R" in row and "Wanda" in row for row in found["visible"])
        assert found["status"] == f"{len(found['visible'])} of {found['rows']} rows" and found["labelled"]
        assert found["again"] == found["rows"]


def test_a_model_s_name_leads_to_how_it_came_about(looks: dict[str, dict[str, Any]]):
    for found in looks.values():
        assert found["revealed"] == {"before": False, "shown": True, "focus": True, "back": True}


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed")
def test_nothing_is_a_serious_barrier(looks: dict[str, dict[str, Any]]):
    assert [found["barriers"] for found in looks.values() if found.get("barriers")] == []


def test_screenshot(pages: dict[str, Path], tmp_path: Path):
    page, shot = pages["example"] / "report.html", tmp_path / "shot.png"
    chromium(tmp_path / "profile", "--window-size=1280,2000", f"--screenshot={shot}", page.as_uri())
    assert shot.stat().st_size > 20_000
