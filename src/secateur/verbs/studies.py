"""demo and study: from a study file to its plan, its run, where it stands, and its report."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from secateur.errors import UserError
from secateur.progress import say
from secateur.report.build import build_report
from secateur.report.text import text_table
from secateur.report.verdict import answer_json, judge
from secateur.study.build import stages_of
from secateur.study.collect import collect
from secateur.study.resolve import resolve
from secateur.study.run import default_jobs, run_stages
from secateur.study.spec import Study, load_study
from secateur.study.stages import Stage, unique
from secateur.study.store import Store
from secateur.verbs.answer import Answer

__all__ = ["demo", "opened", "study_report", "study_run", "study_status"]


def demo(arguments: Namespace) -> Answer:
    """``secateur demo``."""
    package = Path(__file__).parents[1]
    places = (package / "studies" / "demo.yaml", package.parents[1] / "studies" / "demo.yaml")
    arguments.file = str(next(path for path in places if path.is_file()))
    return study_run(arguments)


def opened(arguments: Namespace) -> tuple[Study, list[Stage], Store]:
    """The study of a file, its stages, and where they lie."""
    study = load_study(Path(arguments.file))
    try:
        stages = stages_of(study, resolve(study))
    except UserError as error:
        raise UserError(f"{arguments.file}: {error}") from None
    out = getattr(arguments, "out", None) or f"runs/{study.name}"
    return study, stages, Store(Path(out))


def study_run(arguments: Namespace) -> Answer:
    """``secateur study run FILE``."""
    study, stages, store = opened(arguments)
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
    study, stages, store = opened(arguments)
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
    return _report(arguments, *opened(arguments))


def _report(arguments: Namespace, study: Study, stages: list[Stage], store: Store) -> Answer:
    results = collect(study, stages, store, Path(arguments.file).read_text(encoding="utf-8"))
    judgement = judge(results)
    page = build_report(judgement, store.out)
    answer = {"study": study.name, "report": str(page), **answer_json(judgement)}
    return answer, f"{text_table(judgement)}\n\nreport: {page.resolve()}", 0
