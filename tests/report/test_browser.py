"""The page as a browser lays it out. A headless window has a minimum width, so the page is put into a frame."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from example import broken, example

from secateur.report.build import build_report
from secateur.report.verdict import judge

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

FRAME = """<!doctype html><title>frame</title><body style="margin:0">
<iframe id="frame" src="report.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="found"></pre>
<script>
document.getElementById("frame").addEventListener("load", (event) => {{
  const view = event.target.contentWindow, page = view.document, root = page.documentElement;
  const box = (element) => {{ const r = element.getBoundingClientRect(); return [r.width, r.height]; }};
  const outside = (element) => {{
    const r = element.getBoundingClientRect();
    return r.right > root.clientWidth + 1 && !element.closest(".scroll, pre, .skip");
  }};
  const parse = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = (colour) => parse(colour)
    .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = luminance(view.getComputedStyle(page.body).backgroundColor);
  const contrast = (colour) => {{
    const [high, low] = [luminance(colour), paper].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  }};
  const texts = [...page.querySelectorAll("p, li, td, th, dt, dd, h1, h2, h3, a:not(.skip), .mark, .cost")]
    .filter((element) => !element.closest(".notice")).map((element) => view.getComputedStyle(element).color);
  const labels = [...page.querySelectorAll("svg text")].map((element) => view.getComputedStyle(element).fill);
  page.querySelectorAll("details").forEach((details) => {{ details.open = true; }});
  const head = page.querySelector("#models th[data-key=loss]"), sort = head.querySelector("button");
  sort.click();
  const rows = [...page.querySelectorAll("#models tbody tr")];
  const losses = rows.map((row) => row.cells[head.cellIndex].dataset.value);
  const search = page.querySelector("#models .filter input");
  search.value = "p-r WANDA";
  search.dispatchEvent(new Event("input"));
  const visible = rows.filter((row) => box(row)[1] > 0).map((row) => row.textContent.replace(/\\s+/g, " "));
  const status = page.querySelector("#models .filter output").textContent;
  document.getElementById("found").textContent = JSON.stringify({{
    client: root.clientWidth,
    scroll: root.scrollWidth,
    outside: [...page.querySelectorAll("body *")].filter(outside).map((e) => e.tagName + "." + e.className),
    headings: [...page.querySelectorAll("h1, h2, h3")].map(box),
    figures: [...page.querySelectorAll("svg[role=img]")].map(box),
    contrast: Math.min(...[...texts, ...labels].map(contrast)),
    dark: paper < 0.2,
    sorted: sort.closest("th").getAttribute("aria-sort"),
    losses,
    rows: rows.length,
    visible,
    status,
    labelled: search.closest("label") !== null,
  }});
}});
</script>
"""

pytestmark = [pytest.mark.browser, pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")]


def chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measured(folder: Path, width: int, *arguments: str) -> dict[str, Any]:
    """Lay the report out at ``width`` and return what the frame's script found; fail on any console message."""
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(width=width))
    done = chromium(
        folder / "profile", f"--window-size={max(width, 600)},1000", *arguments, "--dump-dom", frame.as_uri()
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stdout[-2000:]
    return json.loads(unescape(found[1]))


@pytest.fixture(scope="module")
def pages(ladder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a whole study's report, of a broken one's and of a large one's."""
    folders = {make.__name__: tmp_path_factory.mktemp(make.__name__) for make in (example, broken)}
    for make in (example, broken):
        build_report(judge(make()), folders[make.__name__])
    return {**folders, "ladder": ladder}


@pytest.mark.parametrize("width", [1440, 768, 360])
@pytest.mark.parametrize("name", ["example", "broken", "ladder"])
def test_layout(pages: dict[str, Path], name: str, width: int):
    found = measured(pages[name], width)
    assert found["client"] <= width
    assert found["scroll"] <= found["client"]
    assert found["outside"] == []
    assert found["headings"] and all(w > 20 and h > 10 for w, h in found["headings"])
    assert found["figures"] and all(w > 200 and h > 60 for w, h in found["figures"])
    assert found["contrast"] >= 4.5
    assert found["sorted"] == "ascending"
    numbers = [float(value) for value in found["losses"] if value]
    assert numbers == sorted(numbers)
    assert "" not in found["losses"][: len(numbers)]  # what was not measured sorts last
    assert found["visible"] and all("P-R" in row and "Wanda" in row for row in found["visible"])
    assert found["status"] == f"{len(found['visible'])} of {found['rows']} rows" and found["labelled"]


def test_dark_mode(pages: dict[str, Path]):
    light = measured(pages["example"], 390, "--blink-settings=preferredColorScheme=1")
    dark = measured(pages["example"], 390, "--blink-settings=preferredColorScheme=0")
    assert (light["dark"], dark["dark"]) == (False, True)
    assert dark["contrast"] >= 4.5


def test_screenshot(pages: dict[str, Path], tmp_path: Path):
    page, shot = pages["example"] / "report.html", tmp_path / "shot.png"
    chromium(tmp_path / "profile", "--window-size=1280,2000", f"--screenshot={shot}", page.as_uri())
    assert shot.stat().st_size > 20_000
