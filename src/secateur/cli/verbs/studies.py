"""demo and study: from a study file to its plan, its run, where it stands, and its report."""

from __future__ import annotations

import signal
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path

from secateur import distributed, progress
from secateur.cli.verbs.answer import Answer
from secateur.errors import REQUEUE, RunError, UserError, did_you_mean
from secateur.evaluation.lm_eval.harness import import_harness
from secateur.progress import notify
from secateur.report.judgement import answer_json, judge
from secateur.report.page import build_report, build_versus
from secateur.report.studies import compare_studies
from secateur.report.tables import versus_rows
from secateur.report.terminal import text_table, text_versus
from secateur.runtime import pick_device
from secateur.study.collect import collect
from secateur.study.explain import explain_stage
from secateur.study.planner import stages_of
from secateur.study.resolve import resolve
from secateur.study.runner.local import exit_with_parent
from secateur.study.runner.scheduler import Outcome, run_stages, survey
from secateur.study.runner.slurm import parse_slurm, run_on_slurm
from secateur.study.spec import StudySpec, load_study
from secateur.study.stage import Stage, unique, with_inputs
from secateur.study.status import rows, summary, watch
from secateur.study.store import Store

__all__ = ["demo", "open_study", "study_explain", "study_report", "study_run", "study_stage", "study_status"]


def demo(arguments: Namespace) -> Answer:
    """``secateur demo``."""
    package = Path(__file__).parents[2]
    places = (package / "studies" / "demo.yaml", package.parents[1] / "studies" / "demo.yaml")
    arguments.file = str(next(path for path in places if path.is_file()))
    return study_run(arguments)


def open_study(arguments: Namespace) -> tuple[StudySpec, list[Stage], Store]:
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
    study, stages, store = open_study(arguments)
    runs = _chosen(unique(stages), arguments.only)
    if arguments.dry_run:
        return _dry_run(study, runs, stages, store)
    if study.evaluation.asked.tasks:
        import_harness("lm_eval")  # what is missing is told now, not after hours of training
    slurm = parse_slurm(arguments.slurm)
    if arguments.slurm and arguments.launcher != "slurm":
        raise UserError("--slurm: says what jobs ask for; give --launcher slurm with it")
    device = arguments.device or study.compute.device
    if arguments.launcher == "local":
        device = pick_device(device)
    cells = sum(s.kind == "train" for s in runs)
    notify(f"{study.name}: {len(runs)} stages ({cells} training runs) in {store.out}")
    file, keep_going = Path(arguments.file), arguments.keep_going
    if arguments.launcher == "slurm":
        outcome = run_on_slurm(runs, store.out, file, options=slurm, device=device, keep_going=keep_going)
    else:
        outcome = run_stages(runs, store.out, jobs=arguments.jobs, device=device, file=file, keep_going=keep_going)
    _tell(outcome, study, store)
    if "corpus" in outcome.failed:  # nothing can be reported without one, and it is the study file that is at fault
        raise UserError(f"{arguments.file}: corpus: {outcome.failed['corpus']}")
    if outcome.stopped:
        raise RunError(f"{outcome.stopped} ({outcome.already + outcome.ran} of {len(runs)} stages done)", REQUEUE)
    answer, text, _ = _report(arguments, study, stages, store)
    answer |= {
        "ran": outcome.ran,
        "already_done": outcome.already,
        "elsewhere": outcome.elsewhere,
        "failed": outcome.failed,
        "skipped": outcome.skipped,
        "not_started": outcome.left,
    }
    return answer, text, 1 if outcome.failed else 0


def _tell(outcome: Outcome, study: StudySpec, store: Store) -> None:
    parts = [f"{outcome.already} stages found done", f"{outcome.ran - len(outcome.failed)} run"]
    parts += [f"{outcome.elsewhere} done by other processes"] if outcome.elsewhere else []
    notify(", ".join([*parts, f"{len(outcome.failed)} failed"]))
    if outcome.left:
        notify(
            f"{len(outcome.left)} stages were not started after the failure; --keep-going runs what does not need it"
        )
    if outcome.failed:
        notify(f"what each stage said is in {store.out / 'logs'}")


def _chosen(stages: list[Stage], patterns: list[str]) -> list[Stage]:
    """The stages whose names match one of the patterns, and what they are made from; all without patterns.

    Raises:
        UserError: if nothing matches a pattern.
    """
    if not patterns:
        return stages
    names = {stage.name for stage in stages}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--only {pattern}: no stage has such a name{did_you_mean(pattern, names)}")
    return with_inputs(s for s in stages if any(fnmatchcase(s.name, pattern) for pattern in patterns))


def _dry_run(study: StudySpec, runs: list[Stage], stages: list[Stage], store: Store) -> Answer:
    """What ``study run`` would do, and why; nothing is run or written."""
    found = survey(runs, store)
    told = [
        (s, explain_stage(s, stages, store, found.damaged.get(s.fingerprint)))
        for s in runs
        if s.fingerprint not in found.done
    ]
    rows = [{"kind": s.kind, "name": s.name, "state": w.state, "reason": w.reason} for s, w in told]
    answer = {"study": study.name, "out": str(store.out), "already_done": len(found.done), "would_run": rows}
    lines = [f"{study.name} in {store.out}: {len(found.done)} stages are done, {len(rows)} would run"]
    lines += [f"{row['kind']:8}  {row['name']}  {row['reason']}" for row in rows]
    return answer, "\n".join(lines), 0


def study_status(arguments: Namespace) -> Answer:
    """``secateur study status FILE``."""
    study, stages, store = open_study(arguments)
    title = f"{study.name} in {store.out}"
    found = watch(lambda: rows(stages, store), title) if arguments.watch else rows(stages, store)
    told = [{"kind": r.kind, "name": r.name, "state": r.state, "note": r.note} for r in found]
    answer = {"study": study.name, "out": str(store.out), "done": sum(r.state == "done" for r in found), "stages": told}
    lines = [f"{title}: {summary(found)}"]
    lines += [f"{row.state:11}  {row.kind:8}  {row.name}  {row.note}".rstrip() for row in found]
    return answer, "\n".join(lines), 0


def study_explain(arguments: Namespace) -> Answer:
    """``secateur study explain FILE STAGE``."""
    _, stages, store = open_study(arguments)
    named = [s for s in unique(stages) if arguments.stage in (s.name, f"{s.kind} {s.name}", s.fingerprint)]
    if not named:
        names = {s.name for s in stages} | {f"{s.kind} {s.name}" for s in stages}
        raise UserError(f"{arguments.stage}: no stage of {arguments.file}{did_you_mean(arguments.stage, names)}")
    told, lines = [], []
    for stage in named:
        found = explain_stage(stage, stages, store, store.damage(stage) if store.done(stage) else None)
        changes = [{"field": c.field, "old": c.old, "new": c.new} for c in found.changes]
        told.append({"kind": stage.kind, "name": stage.name, "fingerprint": stage.fingerprint, "state": found.state})
        told[-1] |= {"reason": found.reason, "nearest": found.nearest, "changes": changes}
        lines.append(f"{stage.kind} {stage.name}: {found.state}: {found.reason}")
        if found.nearest:
            lines += [f"  nearest that is done: {found.nearest}", *(f"    {change}" for change in found.changes)]
        if store.log(stage).is_file():
            lines.append(f"  log: {store.log(stage)}")
    return {"stages": told}, "\n".join(lines), 0


def study_stage(arguments: Namespace) -> Answer:
    """``secateur study stage FILE FINGERPRINT``: do one stage, as launchers ask for it."""
    from secateur.study.runner.worker import on_device, run_stage_attempt

    if arguments.parent:
        exit_with_parent(arguments.parent)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which a scheduler sends to the job as a whole
    _, stages, store = open_study(arguments)
    stage = next((s for s in stages if s.fingerprint == arguments.fingerprint), None)
    if stage is None:
        raise UserError(
            f"{arguments.fingerprint}: no stage of {arguments.file}, which has changed; run the study again"
        )
    progress.set_listener(progress.SilentListener())  # the stage has a log
    ended = run_stage_attempt(on_device(stage, pick_device(arguments.device)), store)
    if ended.how == "done":
        return {"stage": stage.name, "how": ended.how}, f"{stage.kind} {stage.name}: done", 0
    if ended.how == "elsewhere" and not distributed.is_main():
        return {}, "", 0
    raise RunError(f"{stage.kind} {stage.name}: {ended.text}", REQUEUE if ended.how == "stopped" else 1)


def study_report(arguments: Namespace) -> Answer:
    """``secateur study report FILE [OTHER]``."""
    if arguments.other is None:
        if arguments.other_out:
            raise UserError("--other-out: says where a second study lies; name its file")
        return _report(arguments, *open_study(arguments))
    sides = []
    for file, out in ((arguments.file, arguments.out), (arguments.other, arguments.other_out)):
        study, stages, store = open_study(Namespace(file=file, out=out))
        sides.append((judge(collect(study, stages, store, Path(file).read_text(encoding="utf-8"))), store))
    (a, store), (b, _) = sides
    found = compare_studies(a, b)
    page = build_versus(found, store.out)
    rows = versus_rows(found)
    answer = {"a": a.results.name, "b": b.results.name, "page": str(page), "answer": found.answer, "rows": rows}
    return answer, f"{text_versus(found)}\npage: {page.resolve()}", 0


def _report(arguments: Namespace, study: StudySpec, stages: list[Stage], store: Store) -> Answer:
    results = collect(study, stages, store, Path(arguments.file).read_text(encoding="utf-8"))
    judgement = judge(results)
    page = build_report(judgement, store.out)
    answer = {"study": study.name, "report": str(page), **answer_json(judgement)}
    return answer, f"{text_table(judgement)}\n\nreport: {page.resolve()}", 0
