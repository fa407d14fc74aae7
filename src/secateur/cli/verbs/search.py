"""search: shapes at a goal, retrained by successive halving and ranked."""

from __future__ import annotations

from argparse import Namespace

from secateur.cli.verbs.answer import Answer, request_of
from secateur.cli.verbs.scores import aligned
from secateur.formatting import fixed, scientific
from secateur.searching.request import SearchRequest
from secateur.training.request import read_recipe

__all__ = ["search"]


def search(arguments: Namespace) -> Answer:
    """``secateur search MODEL OUT``."""
    recipe = read_recipe(arguments.recipe, tuple(arguments.set))
    request = request_of(SearchRequest, arguments, recipe=recipe)
    from secateur.searching import job

    result = job.search(request)
    record = result.content
    sizes = {entry["shape"]: ",".join(f"{k}={v}" for k, v in entry["sizes"].items()) for entry in record["frontier"]}
    rungs = [{entry["shape"]: entry for entry in rung["results"]} for rung in record["rungs"]]
    last = {name: number for number, rung in enumerate(rungs) for name in rung}
    order = sorted(sizes, key=lambda name: (-last[name], rungs[last[name]][name]["loss"]))
    rows = [["shape", "sizes", "cut", *(f"rung {number}" for number in range(1, len(rungs) + 1))]]
    for name in order:
        losses = [fixed(rung[name]["loss"]) if name in rung else "" for rung in rungs]
        rows.append([name, sizes[name], fixed(rungs[0][name]["before"]), *losses])
    lines = ["held-out loss in nats per token", *aligned(rows), ""]
    for place, finalist in enumerate(record["finalists"], start=1):
        line = f"{place}  {result.path}/{place}  {finalist['shape']}  loss {fixed(finalist['loss'])}"
        if behind := finalist["behind"]:
            ends = behind["interval"]
            interval = f", 95% interval {ends[0]:+.4f} to {ends[1]:+.4f}" if ends else ""
            verdict = {"A": "the first is better"}.get(behind["verdict"], behind["verdict"])
            line += f"  behind by {behind['difference']:+.4f}{interval}: {verdict}"
        lines.append(line)
    for entry in record["rank_correlation"]:
        tau = "not defined" if entry["kendall"] is None else f"{entry['kendall']:+.2f} (p {entry['p']:.2g})"
        lines.append(f"order before and after rung {entry['rung']}, {entry['models']} models: Kendall's tau {tau}")
    flops = record["flops"]
    lines.append(f"FLOPs: {scientific(flops['spent'])} of {scientific(flops['planned'])} planned")
    lines.append(f"next   secateur eval {result.path}/1 --data text:FILE")
    return result.record(), "\n".join(lines), 0
