from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.comparison.items import AVERAGE, Comparison, Comparisons, compare_results
from secateur.errors import UserError
from secateur.evaluation.results import EvaluationResults, Measurement, check_same_protocols, items_file


def task(values: list[int], name: str = "piqa", mark: str = "a") -> Measurement:
    items = [{"value": float(v), "document": f"{i}", "loglikelihoods": [-1.5, -2.0]} for i, v in enumerate(values)]
    protocol = {"metric": "acc", "version": 1.0, "fingerprint": mark}
    return Measurement(name, "accuracy", sum(values) / len(values), protocol, "documents", items)


def loss(values: list[float], tokens: list[int], mark: str = "a") -> Measurement:
    items = [{"value": v, "tokens": n} for v, n in zip(values, tokens, strict=True)]
    mean = sum(v * n for v, n in zip(values, tokens, strict=True)) / sum(tokens)
    protocol = {"source": "text", "windows": len(values), "fingerprint": mark}
    return Measurement("loss", "loss", mean, protocol, "documents", items, {"perplexity": float(np.exp(mean))})


def test_documents_and_windows_are_not_paired() -> None:
    document, windows = loss([3.0], [90]), replace(loss([3.0] * 30, [3] * 30), unit="windows")
    row = only(compare_results([EvaluationResults("a", [document])], [EvaluationResults("b", [windows])]))
    assert row.verdict == "not measured" and "by window" in row.reason
    row = only(compare_results([EvaluationResults("a", [document])], [EvaluationResults("b", [loss([2.0], [90])])]))
    assert row.verdict == "undecided" and "only 1 document " in row.reason


def only(comparisons: Comparisons) -> Comparison:
    (row,) = comparisons
    return row


def test_a_difference_beyond_the_noise() -> None:
    a, b = [1] * 70 + [0] * 30, [0] * 40 + [1] * 30 + [0] * 30
    found = only(compare_results([EvaluationResults("a", [task(a)])], [EvaluationResults("b", [task(b)])]))
    assert (found.verdict, found.a, found.b, found.difference) == ("A", 0.7, 0.3, pytest.approx(0.4))
    assert found.low is not None and found.high is not None and 0.29 < found.low < 0.31 and 0.49 < found.high < 0.51
    assert (found.above, found.below, found.items) == (40, 0, 100)
    assert found.p is not None and found.p < 1e-9
    turned = only(compare_results([EvaluationResults("b", [task(b)])], [EvaluationResults("a", [task(a)])]))
    assert turned.verdict == "B" and turned.difference == pytest.approx(-0.4)


def test_undecided_is_a_result() -> None:
    a, b = [1, 0] * 50, [1, 0] * 48 + [0, 1, 1, 0]
    row = only(compare_results([EvaluationResults("a", [task(a)])], [EvaluationResults("b", [task(b)])]))
    assert row.verdict == "undecided" and row.p == 1.0 and row.reason == "the interval includes zero"
    same = only(compare_results([EvaluationResults("a", [task(a)])], [EvaluationResults("a", [task(a)])]))
    assert (same.verdict, same.difference, same.low, same.high) == ("undecided", 0, 0, 0)  # accuracies have no margin


def test_losses_within_the_margin_are_equal_unless_it_is_switched_off() -> None:
    values = np.random.default_rng(0).normal(3, 1, 60)
    sides = [[EvaluationResults(n, [loss((values + by).tolist(), [9] * 60)])] for n, by in (("a", 0.0), ("b", 0.01))]
    assert compare_results(*sides).verdict == "equal within margin"
    assert compare_results(*sides, margin=0.005).verdict == "A" == compare_results(*sides, margin=None).verdict


@pytest.mark.parametrize(
    ("items", "gains", "verdict"), [(19, 19, "undecided"), (20, 20, "A"), (20, 5, "undecided"), (30, 6, "A")]
)
def test_few_items_need_the_sign_test(items: int, gains: int, verdict: str) -> None:
    """Five of twenty: the interval excludes zero (p = 0.02), the sign test does not agree (p = 0.06)."""
    a, b = [1] * gains + [0] * (items - gains), [0] * items
    if gains == items:
        b[0], a[1] = 0, 1
        a = [1] * (items - 1) + [0]
    row = only(compare_results([EvaluationResults("a", [task(a)])], [EvaluationResults("b", [task(b)])]))
    assert row.verdict == verdict


def test_a_lower_loss_is_better_and_tokens_count() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 90, 60).tolist()
    b = generator.normal(3, 1, 60)
    a = b - 0.2 + generator.normal(0, 0.02, 60)
    found = only(
        compare_results(
            [EvaluationResults("a", [loss(a.tolist(), tokens)])], [EvaluationResults("b", [loss(b.tolist(), tokens)])]
        )
    )
    wanted = float(((b - a) * tokens).sum() / sum(tokens))
    assert found.verdict == "A" and found.difference == pytest.approx(wanted)
    assert found.low is not None and found.high is not None and found.low < wanted < found.high < found.low + 0.03


def test_the_average_counts_a_task_once() -> None:
    sides = []
    for right in (0.9, 0.5):
        few, many = [1] * 10, [1] * int(1000 * right) + [0] * int(1000 * (1 - right) + 0.5)
        sides.append([EvaluationResults("x", [task(few, "piqa"), task(many, "sciq")])])
    average = compare_results(*sides)[-1]
    assert average.name == AVERAGE and average.items == 1010
    assert (average.a, average.b) == (pytest.approx(0.95), pytest.approx(0.75)) and average.verdict == "A"


def test_seeds_must_agree() -> None:
    def seeds(shares: list[float]) -> list[EvaluationResults]:
        return [EvaluationResults(f"{s}", [task([1] * int(100 * s) + [0] * int(100 - 100 * s))]) for s in shares]

    base = seeds([0.3, 0.3, 0.3])
    steady = only(compare_results(seeds([0.7, 0.72, 0.68]), base))
    assert steady.verdict == "A" and steady.seeds == pytest.approx((0.4, 0.42, 0.38))
    unsteady = only(compare_results(seeds([0.9, 0.31, 0.32]), base))  # far apart on documents, but it hangs on one seed
    assert unsteady.low is not None and unsteady.low < 0 and unsteady.verdict == "undecided"
    assert unsteady.decision.seed_share is not None and unsteady.decision.seed_share > 0.9
    with pytest.raises(UserError, match="A has 3 seeds and B has 2"):
        compare_results(base, base[:2])


def test_what_cannot_be_compared() -> None:
    one = EvaluationResults("a", [task([1, 0, 1]), task([1], "sciq")])
    found = {
        c.name: c for c in compare_results([one], [EvaluationResults("b", [task([1], "sciq"), task([1, 1], "boolq")])])
    }
    assert {name: c.verdict for name, c in found.items()} == {
        "piqa": "not measured",
        "sciq": "undecided",
        "boolq": "not measured",
    }
    assert found["piqa"].reason == "B has no piqa" and found["boolq"].reason == "A has no boolq"
    assert found["sciq"].reason == "only 1 item of the 20 that a verdict needs" and found["sciq"].low is None
    with pytest.raises(
        UserError, match=r"piqa: a and b are measured under different protocols \(version 1.0 and 2.0\)"
    ):
        other = task([1, 0, 1], mark="b")
        other.protocol["version"] = 2.0  # type: ignore[index]
        compare_results([one], [EvaluationResults("b", [other])])


def test_the_verdict_is_that_of_the_held_out_loss() -> None:
    a, b = [2.0 + i / 100 for i in range(40)], [2.5 + i / 100 for i in range(40)]
    sides = [EvaluationResults(n, [task([1, 0, 1]), loss(v, [9] * 40)]) for n, v in (("a", a), ("b", b))]
    comparisons = compare_results(sides[:1], sides[1:])
    assert [row.name for row in comparisons] == ["piqa", "loss"] and len(comparisons) == 2
    assert comparisons.verdict == comparisons[1].verdict == "A" and comparisons[:1] == (comparisons[0],)
    assert compare_results(sides[1:], sides[:1]).verdict == "B" and compare_results(sides[:1], sides[:1])
    without = EvaluationResults("c", [task([1, 0, 1])])
    with pytest.raises(UserError, match="no held-out loss was measured in both; evaluate both"):
        _ = compare_results([without], [without]).verdict
    with pytest.raises(UserError, match=r"no held-out loss was measured in both \(B has no loss\); evaluate both"):
        _ = compare_results(sides[:1], [without]).verdict
    assert not compare_results([EvaluationResults("a")], [EvaluationResults("b")])


def test_same_names_need_same_protocols() -> None:
    measured = [("a", "x", {"fingerprint": "1"}), ("b", "y", {"fingerprint": "2"}), ("b", "x", {"fingerprint": "1"})]
    assert check_same_protocols(measured) == ["x", "y"]
    with pytest.raises(UserError, match="share no table"):
        check_same_protocols([*measured, ("c", "y", {"fingerprint": "1"})])


def saved(folder: Path) -> tuple[Path, EvaluationResults]:
    results = EvaluationResults("m", [task([1, 0, 1]), loss([2.5, 3.5], [3, 4])], None, {"device": "cpu"})
    path = folder / "m.json"
    results.save(path)
    return path, results


def test_files_round_trip_to_the_same_bytes(tmp_path: Path) -> None:
    path, results = saved(tmp_path)
    loaded = EvaluationResults.load(path)
    assert loaded == results
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again" / "m.json")
    for one in (path, items_file(path)):
        assert one.read_bytes() == (tmp_path / "again" / one.name).read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(items_file(path).read_bytes()).splitlines()]
    assert len(rows) == 5 and rows[0] == {
        "measurement": "piqa",
        "value": 1.0,
        "document": "0",
        "loglikelihoods": [-1.5, -2.0],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: items_file(path).unlink(), "no such file; the items must lie beside m.json"),
        (lambda path: items_file(path).write_bytes(b"no gzip"), "cannot be read"),
        (lambda path: items_file(path).write_bytes(gzip.compress(b"{}\n")), "is not the file that m.json was written"),
        (lambda path: path.write_text("[]"), "holds no results"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_damaged_files(change: Any, message: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    change(path)
    with pytest.raises(UserError, match=message):
        EvaluationResults.load(path)
