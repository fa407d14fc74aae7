"""demo and study: from a study file to its plan, its run, where it stands, and its report."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from secateur.data.sources import open_source
from secateur.errors import UserError
from secateur.progress import say
from secateur.report.build import build_report
from secateur.report.text import text_table
from secateur.report.verdict import answer_json, judge
from secateur.report.words import count, scientific
from secateur.study.collect import collect
from secateur.study.run import default_jobs, run_stages
from secateur.study.spec import Study, load_study
from secateur.study.stages import Stage, stages_of, unique
from secateur.study.store import Store
from secateur.verbs.answer import Answer

__all__ = ["demo", "study_plan", "study_report", "study_run", "study_status"]


def demo(arguments: Namespace) -> Answer:
    """``secateur demo``."""
    package = Path(__file__).parents[1]
    places = (package / "studies" / "demo.yaml", package.parents[1] / "studies" / "demo.yaml")
    arguments.file = str(next(path for path in places if path.is_file()))
    return study_run(arguments)


def _open(arguments: Namespace) -> tuple[Study, list[Stage], Store]:
    study = load_study(Path(arguments.file))
    try:
        source = open_source(study.corpus.source, field=study.corpus.field, split=study.corpus.split)
        stages = stages_of(study, source.digest())
    except UserError as error:
        told = str(error).replace("--ratio ", "ratio ")  # a target speaks of options; a study file has keys
        raise UserError(f"{arguments.file}: {told}") from None
    out = getattr(arguments, "out", None) or f"runs/{study.name}"
    return study, stages, Store(Path(out))


def study_plan(arguments: Namespace) -> Answer:
    """``secateur study plan FILE``."""
    study, stages, _ = _open(arguments)
    stages = unique(stages)
    rows = [
        {"kind": s.kind, "name": s.name, "tokens": s.tokens, "flops": s.flops, "fingerprint": s.fingerprint}
        for s in stages
    ]
    trained = sum(s.tokens for s in stages if s.kind == "train")
    flops = sum(s.flops for s in stages)
    answer = {"study": study.name, "stages": rows, "training_tokens": trained, "flops": flops}
    width = max(len(s.name) for s in stages)
    lines = [f"{study.name}: {len(stages)} stages", ""]
    lines.append(f"{'kind':8}  {'stage':{width}}  {'tokens':>10}  {'FLOPs':>10}")
    for s in stages:
        tokens, cost = (count(s.tokens), f"{s.flops:.2e}") if s.tokens else ("-", "-")
        lines.append(f"{s.kind:8}  {s.name:{width}}  {tokens:>10}  {cost:>10}")
    lines += ["", f"{trained:,} training tokens, {scientific(flops)} FLOPs in all. Nothing has been run."]
    return answer, "\n".join(lines), 0


def study_run(arguments: Namespace) -> Answer:
    """``secateur study run FILE``."""
    study, stages, store = _open(arguments)
    runs = unique(stages)
    cells = sum(s.kind == "train" for s in runs)
    jobs = arguments.jobs or default_jobs()
    say(f"{study.name}: {len(runs)} stages ({cells} training runs), {jobs} at a time, in {store.out}")
    outcome = run_stages(stages, store.out, jobs=jobs)
    say(f"{outcome.already} stages found done, {outcome.ran - len(outcome.failed)} run, {len(outcome.failed)} failed")
    if "corpus" in outcome.failed:  # nothing can be reported without one, and it is the study file that is at fault
        raise UserError(f"{arguments.file}: corpus: {outcome.failed['corpus']}")
    answer, text, _ = _report(arguments, study, stages, store)
    answer |= {
        "ran": outcome.ran,
        "already_done": outcome.already,
        "failed": outcome.failed,
        "skipped": outcome.skipped,
    }
    return answer, text, 1 if outcome.failed else 0


def study_status(arguments: Namespace) -> Answer:
    """``secateur study status FILE``."""
    study, stages, store = _open(arguments)
    rows = []
    for stage in unique(stages):
        error = store.runtime(stage).get("error", "")
        rows.append({"kind": stage.kind, "name": stage.name, "state": _state(store, stage, error), "error": error})
    done = sum(row["state"] == "done" for row in rows)
    answer = {"study": study.name, "out": str(store.out), "done": done, "stages": rows}
    lines = [f"{study.name} in {store.out}: {done} of {len(rows)} stages done"]
    lines += [f"{row['state']:11}  {row['kind']:8}  {row['name']}  {row['error']}".rstrip() for row in rows]
    return answer, "\n".join(lines), 0


def _state(store: Store, stage: Stage, error: str) -> str:
    if store.done(stage):
        return "done"
    if store.held(stage):
        return "running"
    return "failed" if error else "interrupted" if store.partial(stage).is_dir() else "to do"


def study_report(arguments: Namespace) -> Answer:
    """``secateur study report FILE``."""
    return _report(arguments, *_open(arguments))


def _report(arguments: Namespace, study: Study, stages: list[Stage], store: Store) -> Answer:
    results = collect(study, stages, store, Path(arguments.file).read_text(encoding="utf-8"))
    judgement = judge(results)
    page = build_report(judgement, store.out)
    answer = {"study": study.name, "report": str(page), **answer_json(judgement)}
    return answer, f"{text_table(judgement)}\n\nreport: {page.resolve()}", 0
