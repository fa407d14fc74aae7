"""secateur search: cost before anything starts, one scoring, halving at matched FLOPs, resume, ranking, bad input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

import secateur
from helpers import hf, tiny_llama, token_corpus, windows
from secateur.calibration.block_walk import BlockWalk
from secateur.cli import main
from secateur.errors import UserError
from secateur.model.checkpoint import Checkpoint
from secateur.searching import job
from secateur.searching.rungs import plan_rungs

RECIPE = {"sequence": 32, "tokens_per_step": 128, "peak_rate": 3e-3}
BUDGET = 12_000


@dataclasses.dataclass
class Case:
    """A finished search, with how many walks it took."""

    root: Path
    fields: dict[str, Any]
    walks: int
    record: dict[str, Any]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    root = tmp_path_factory.mktemp("search")
    model = tiny_llama(root, hidden_size=48, intermediate_size=96, num_hidden_layers=2)
    np.save(root / "ids.npy", windows(4, 16).numpy())
    corpus = token_corpus(root / "corpus", tokens=12_000, vocabulary=61)
    params = int(Checkpoint(model).shape.total * 0.6)
    fields: dict[str, Any] = {"model": model, "budget": BUDGET, "data": f"shards:{corpus}", "params": params}
    fields |= {"calibration": f"tokens:{root}/ids.npy", "recipe": RECIPE, "candidates": 4, "finalists": 2, "step": 4}
    fields["axes"] = "hidden,ffn,kv"
    walks, walk = [], BlockWalk.__init__

    def counting(self: BlockWalk, *args: Any, **kwargs: Any) -> None:
        walk(self, *args, **kwargs)
        walks.append(not self.journal.complete)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockWalk, "__init__", counting)
        result = secateur.search(out=root / "out", **fields)
    yield Case(root, fields, sum(walks), result.record())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_scoring_serves_all_shapes(case: Case) -> None:
    assert case.walks == case.record["scoring"]["passes"] == 1
    assert len({json.dumps(entry["sizes"], sort_keys=True) for entry in case.record["frontier"]}) == 4
    for entry in case.record["frontier"]:
        assert entry["parameters"] == pytest.approx(case.fields["params"], rel=0.02)


def test_rungs_halve_at_matched_flops_and_spend_what_was_planned(case: Case) -> None:
    record, costs = case.record, {e["shape"]: e["flops_a_token"] for e in case.record["frontier"]}
    assert [len(rung["results"]) for rung in record["rungs"]] == [4, 2]
    spent = record["scoring"]["flops"]
    for rung in record["rungs"]:
        for result in rung["results"]:
            assert result["flops"] == pytest.approx(result["tokens"] * costs[result["shape"]])
            assert rung["flops_each"] - costs[result["shape"]] < result["flops"] <= rung["flops_each"] * (1 + 1e-9)
            spent += result["flops"]
    first, second = record["rungs"]
    assert second["flops_each"] == 2 * first["flops_each"]
    assert {r["shape"] for r in second["results"]} == {r["shape"] for r in first["results"][:2]}
    assert record["flops"]["spent"] == spent == pytest.approx(record["flops"]["planned"], rel=2e-3)
    assert sum(r["tokens"] for rung in record["rungs"] for r in rung["results"]) <= BUDGET


def test_the_winner_has_the_lowest_loss_of_plain_checkpoints(case: Case) -> None:
    finalists, out = case.record["finalists"], case.root / "out"
    assert sorted(path.name for path in out.iterdir()) == ["1", "2", "search.json"]
    held_out = secateur.evaluate([out / "1", out / "2"], data=case.fields["data"], seqlen=32, windows=256)
    for finalist, result in zip(finalists, held_out, strict=True):
        model = hf(out / finalist["folder"])
        assert sum(p.numel() for p in model.parameters()) == finalist["parameters"]
        assert result.measurements[0].value == pytest.approx(finalist["loss"], rel=1e-6)
    assert finalists[0]["loss"] == min(finalist["loss"] for finalist in finalists)
    row = secateur.compare(held_out[0], held_out[1])[0]
    assert finalists[1]["behind"]["difference"] == pytest.approx(row.difference)
    assert finalists[1]["behind"]["interval"] == pytest.approx([row.low, row.high])


def test_the_correlation_is_of_losses_before_and_after(case: Case) -> None:
    results = case.record["rungs"][0]["results"]
    tau: Any = kendalltau([r["before"] for r in results], [r["loss"] for r in results])
    first = case.record["rank_correlation"][0]
    assert first["models"] == 4 and first["kendall"] == pytest.approx(tau.statistic)


@pytest.mark.parametrize("moment", [1, 5])
def test_a_killed_search_ends_with_the_same_bytes(case: Case, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at the second cut, and between the last step of the last training and its output."""
    out, calls = case.root / f"again-{moment}", []
    name = "write_pruned" if moment == 1 else "write_trained"
    owner: Any = job if moment == 1 else job.training
    whole = getattr(owner, name)

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > moment:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            secateur.search(out=out, **case.fields)
    assert not out.exists()
    runs, train = [], job.training.train

    def counting(request: Any) -> Any:
        runs.append(request.out)
        return train(request)

    with monkeypatch.context() as patch:
        patch.setattr(job.training, "train", counting)
        secateur.search(out=out, **case.fields)
    assert len(runs) == (6 if moment == 1 else 6 - moment)  # what was finished is not trained again
    assert tree(out) == tree(case.root / "out")
    assert not out.with_name(f"{out.name}.partial").exists()


def test_rungs_divide_the_budget() -> None:
    rungs = plan_rungs(36_000, [10.0] * 12, 3, 100)
    assert [(rung.models, rung.tokens[0]) for rung in rungs] == [(12, 1000), (6, 2000), (3, 4000)]
    with pytest.raises(UserError, match="or more") as error:
        plan_rungs(1000, [10.0, 20.0, 15.0, 11.0], 2, 100)
    enough = int(str(error.value).split("give ")[1].split(" or")[0].replace(",", ""))
    assert min(plan_rungs(enough, [10.0, 20.0, 15.0, 11.0], 2, 100)[0].tokens) >= 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budget", "500"], "--budget: 500 tokens leave the first of 2 rungs"),
        (["--params", "1G"], "--params"),
        (["--method", "wanda"], "--params: wanda zeroes single weights"),
        (["--method", "sheared"], "--method: sheared learns"),
        (["--budget", "60k"], "--budget: the last rung reads up to token"),
        (["--set", "sequence=128"], "--recipe or --set: sequence is 128, but the model has 64 positions"),
        (["--candidates", "1", "--finalists", "1"], "--candidates"),
        (["--finalists", "5"], "--finalists: 5 of 4 --candidates"),
    ],
)
def test_bad_requests_are_one_line(
    changes: list[str], message: str, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    fields, out = case.fields, case.root / "bad"
    settings = [text for key, value in RECIPE.items() for text in ("--set", f"{key}={value}")]
    line = ["search", fields["model"], out, "--budget", BUDGET, "--data", fields["data"], "--params", fields["params"]]
    line += [
        "--calibration",
        fields["calibration"],
        "--candidates",
        4,
        "--finalists",
        2,
        "--step",
        4,
        "--axes",
        "hidden,ffn,kv",
        *settings,
    ]
    assert main([*map(str, line), *changes]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("secateur: error: ") and message in error[-1]
    assert not out.exists() and not out.with_name("bad.partial").exists()


def test_the_verb_prints_the_cost_first_and_a_table(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    fields, out = case.fields, case.root / "verb"
    settings = [text for key, value in RECIPE.items() for text in ("--set", f"{key}={value}")]
    line = ["search", fields["model"], out, "--budget", BUDGET, "--data", fields["data"], "--params", fields["params"]]
    line += [
        "--calibration",
        fields["calibration"],
        "--candidates",
        2,
        "--finalists",
        2,
        "--step",
        4,
        "--axes",
        "hidden,ffn,kv",
        *settings,
    ]
    assert main([*map(str, line)]) == 0
    printed = capsys.readouterr()
    assert printed.err.index("FLOPs in all") < printed.err.index(" steps, ")  # of the first training
    assert f"1  {out}/1  shape-0" in printed.out and "Kendall's tau" in printed.out
