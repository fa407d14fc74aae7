from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example import METHODS, broken, example, judged, judged_page

from secateur.comparison.provenance import spark
from secateur.comparison.records import Point, StudyResults
from secateur.report.figures.palette import ROLES
from secateur.report.judgement import judge
from secateur.report.page import build_report, render
from secateur.report.tables import cell_rows, rows_csv

SECTIONS = ("verdict", "findings", "figures", "models", "before", "each", "ledger", "method", "provenance", "caveats")
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """The page's elements, and a check that its tags are balanced."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str):
        assert self.open.pop() == tag

    def handle_data(self, data: str):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get(name)) is not None]

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def rendered(results: StudyResults) -> str:
    return render(judge(results))


def build(results: StudyResults, folder: Path) -> Path:
    return build_report(judge(results), folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(example(), tmp_path_factory.mktemp("report")).parent


@pytest.fixture(scope="module")
def page(built: Path) -> Page:
    return Page((built / "report.html").read_text())


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_page_loads_no_files(page: Page, built: Path):
    for name in ("src", "srcset", "data", "action", "poster", "xlink:href"):
        assert not page.values(name)
    links = {value for value in page.values("href") if not value.startswith("#")}
    records = {f"{stage.folder}/record.json" for stage in example().stages}
    assert links == {"data:,", *records}  # no figure elsewhere
    html = (built / "report.html").read_text()
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)]*)", html))
    addresses = set(re.findall(r"https?://[^\s\"'<]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a namespace is a name, not an address


@pytest.mark.parametrize("name", ["example", "broken", "ladder"])
def test_ids_are_unique_and_every_reference_has_its_target(name: str, ladder: Path):
    html = (
        (ladder / "report.html").read_text()
        if name == "ladder"
        else judged_page({"example": example, "broken": broken}[name])
    )
    page = Page(html)
    ids = Counter(page.values("id"))
    assert [value for value, times in ids.items() if times > 1] == []
    references = [value[1:] for value in page.values("href") if value.startswith("#")]
    for attribute in ("aria-labelledby", "aria-describedby"):
        references += [part for value in page.values(attribute) for part in value.split()]
    references += [v[5:-1] for _, attrs in page.elements for v in attrs.values() if v and v.startswith("url(#")]
    assert set(references) <= set(ids)


def test_all_sections_and_figures_are_there(page: Page):
    ids = page.values("id")
    assert [name for name in SECTIONS if name not in ids] == []
    roles = [attrs.get("role") for tag, attrs in page.elements if tag == "svg"]
    assert roles.count("img") == 3 + 2 * len(METHODS)
    assert roles.count(None) == len(example().cells), "an unlabelled line for each curve; its caption describes it"
    assert [tag for tag, _ in page.elements].count("h1") == 1


def test_the_page_works_with_a_screen_reader_and_a_keyboard(page: Page):
    for tag, attrs in page.elements:
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-labelledby"])
        if "scroll" in (attrs.get("class") or "").split():
            assert attrs["tabindex"] == "0" and attrs["role"] == "region" and attrs["aria-label"]
    assert page.elements[[tag for tag, _ in page.elements].index("body") + 1][1]["class"] == "skip"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_every_model_has_a_history(page: Page):
    """A model's row and its history link to each other."""
    results = example()
    ids = page.values("id")
    text = page.words
    for number, cell in enumerate(results.cells, 1):
        assert {f"row-{number}", f"run-{number}"} <= set(ids)
        assert {f"#row-{number}", f"#run-{number}"} <= set(page.values("href"))
        stage = next(s for s in results.stages if s.fingerprint == cell.stages[-2])
        assert stage.kind == "train" and text.count(f"fingerprint{stage.fingerprint}") >= 1
    assert text.count("first weightsnew, under the parent's mask") == 2  # both twins of Wanda
    assert text.count("Removed: layers 2-4 of 6 removed; 34.6% of all parameters, 50.0% of those outside") == 1
    assert "held-out loss 5.660 at first, 5.350 after 200 k tokens" in text


def test_stages_that_are_not_done_have_no_link():
    results = broken()
    failed = next(stage for stage in results.stages if stage.state == "failed")
    cells = (dataclasses.replace(results.cells[0], stages=(failed.fingerprint,)), *results.cells[1:])
    page = Page(rendered(dataclasses.replace(results, cells=cells)))
    assert f"train {failed.name}: failed" in page.words
    assert not [value for value in page.values("href") if value.startswith(failed.folder)]


def test_a_line_fills_its_box_and_needs_two_points():
    curve = (Point(0, 6.0), Point(50, 5.0), Point(100, 4.0))
    assert spark(curve) == "0,0 120,24 240,48"
    assert spark(curve[:1]) == "" and spark((Point(0, 5.0), Point(10, 5.0))) == "0,0 240,0"


def test_the_verdict_comes_first_and_in_full(page: Page):
    assert "is not complete" not in page.words
    judgement = judged(example)
    texts = [judgement.answer, *judgement.headlines.values()]
    places = [page.words.index(text) for text in texts]
    assert places == sorted(places)
    assert all(text.split(", ", 1)[1] in page.words for text in judgement.sentences)


def test_subscripts_replace_the_plain_symbols(page: Page, built: Path):
    assert "S_R" not in page.words and "S_{P+R}" not in page.words
    assert "<sub>P+R</sub>" in (built / "report.html").read_text()


def test_a_large_study_is_folded_and_its_page_stays_small(ladder: Path):
    html = (ladder / "report.html").read_text()
    page = Page(html)
    assert len(html) < 1_250_000
    names = {path.stem for path in (ladder / "figures").glob("*.svg")}
    assert {"differences-training-flops", "ladder-01", "ratios-02", "controls-02", "layers-04", "curves-15"} <= names
    inlined = [value for value in page.values("id") if re.fullmatch(r"curves-\d\d-title", value)]
    assert len(inlined) == 12
    links = [value for value in page.values("href") if value.startswith("figures/")]
    assert links and all((ladder / link).is_file() for link in links)
    assert [tag for tag, _ in page.elements].count("details") > 4
    assert "objectives" in page.values("id")
    assert not re.search(r"\b(None|nan|inf)\b", page.words)


def test_a_large_study_reports_seeds_controls_and_findings(ladder: Path):
    words = Page((ladder / "report.html").read_text()).words
    assert "Intervals cover held-out text and seeds (which share one parent)" in words
    assert "Wanda at ratio 0.5 (R = 50 k, seed 1) ends" in words
    assert "The mask alone, beside a random one, saves 0.10 nats" in words
    assert "That gap narrows with more tokens." in words


def test_no_placeholder_colour_is_left(built: Path):
    html = (built / "report.html").read_text()
    assert not [colour for colour in dataclasses.astuple(ROLES) if colour in html]
    assert "var(--pruned)" in html


def test_the_same_results_give_the_same_bytes(tmp_path: Path, built: Path):
    build(example(), tmp_path)
    first = digests(tmp_path)
    assert first == digests(built)
    assert {"report.html", "cells.csv", "curves.csv", "figures/curves-01.svg", "figures/curves-01.pdf"} <= set(first)


def test_standalone_figures_are_well_formed(built: Path):
    for path in (built / "figures").glob("*.svg"):
        assert "var(--" not in ET.tostring(ET.parse(path).getroot(), encoding="unicode")
    assert all(path.read_bytes().startswith(b"%PDF") for path in (built / "figures").glob("*.pdf"))


def test_a_rebuild_replaces_files_and_removes_stale_ones(tmp_path: Path):
    page = build(broken(), tmp_path)
    assert page == tmp_path / "report.html"
    (tmp_path / "figures" / "notes.svg").write_text("somebody else's")
    build(example(), tmp_path)
    assert "not complete" not in page.read_text()
    assert not list(tmp_path.rglob(".*"))
    assert len(list((tmp_path / "figures").glob("curves-*.svg"))) == len(METHODS)
    assert (tmp_path / "figures" / "notes.svg").exists()


def test_missing_values_are_named_and_never_a_number():
    html = judged_page(broken)
    page = Page(html)
    assert "This study is not complete" in page.words
    assert "minitron-depth/0.5/S_R/train (train): failed. loss is NaN" in page.words
    assert "missing" in page.words
    assert html.count("not measured") > 10
    assert not re.search(r"\b(None|nan|inf)\b", page.words)


def test_a_parent_without_evaluation():
    results = dataclasses.replace(example(), parents=(dataclasses.replace(example().parents[0], evaluation=None),))
    page = Page(rendered(results))
    assert "a held-out loss of not measured." in page.words
    assert "the parent, after P tokens: not measured" in page.words


def test_a_study_with_nothing_measured_still_has_a_page():
    cells = tuple(dataclasses.replace(cell, curve=(), evaluation=None) for cell in example().cells)
    for results in (
        dataclasses.replace(example(), cells=cells),
        dataclasses.replace(example(), cells=(), pruned=(), stages=(), corpus={}, study_yaml=""),
    ):
        assert "There is no answer yet" in rendered(results)


def test_hostile_names_are_escaped():
    evil = '<script>alert("x")</script>$\\frac&'
    methods = {method: f"{evil}{i}" for i, method in enumerate(METHODS)}
    results = dataclasses.replace(
        example(),
        name=evil,
        title=evil,
        cells=tuple(dataclasses.replace(cell, method=methods[cell.method]) for cell in example().cells),
        pruned=tuple(dataclasses.replace(p, method=methods[p.method], detail=evil) for p in example().pruned),
        corpus={evil: evil},
        study_yaml=f"</code></pre>{evil}",
    )
    html = rendered(results)
    assert "<script>alert" not in html
    page = Page(html)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert evil in page.words


def test_cells_csv_holds_the_records_as_they_are():
    results = broken()
    rows = list(csv.DictReader(rows_csv(cell_rows(judge(results))).splitlines()))
    assert len(rows) == len(results.cells)
    for row, cell in zip(rows, results.cells, strict=True):
        assert (row["name"], row["method"], int(row["seed"])) == (cell.name, cell.method, cell.seed)
        assert float(row["train_flops"]) == cell.training.flops
        assert row["loss"] == (repr(cell.evaluation.loss) if cell.evaluation else "")
    differences = {row["difference"] for row in rows if row["name"] == "P-R"}
    assert differences == {""}


def test_curves_csv_holds_every_point(built: Path):
    results = example()
    with (built / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = [*results.parents[0].curve, *(point for cell in results.cells for point in cell.curve)]
    assert [(int(row["tokens"]), float(row["loss"])) for row in rows] == [(p.tokens, p.loss) for p in points]
