"""demo and study: arguments to a :class:`Study` and its answers to text."""

from __future__ import annotations

import signal
import sys
from argparse import Namespace
from typing import Any

from secateur.cli.verbs.answer import Answer
from secateur.errors import REQUEUE, RunError, UserError, spell
from secateur.runtime import core_count, has_accelerator
from secateur.study.plan import CORE_FLOPS, FLOPS_PER_SECOND
from secateur.study.session import Study
from secateur.study.status import watch

__all__ = [
    "demo",
    "study_explain",
    "study_new",
    "study_plan",
    "study_report",
    "study_run",
    "study_stage",
    "study_status",
]


def demo(arguments: Namespace) -> Answer:
    """``secateur demo``."""
    arguments.file = "demo"
    return study_run(arguments)


_QUESTIONS = {
    "checkpoint": "Folder of the parent (empty: pretrain a small one)",
    "corpus": "Text: text:PATH, hf:NAME, python or stdlib (empty: python)",
    "methods": "Methods, with commas (empty: minitron-depth,minitron-width,wanda)",
    "hours": "Budget in hours of one device (empty: 1)",
}


def study_new(arguments: Namespace) -> Answer:
    """``secateur study new FILE``."""
    from secateur.study.new import NewStudy, write_study

    names = ("checkpoint", "corpus", "methods", "ratio", "hours", "seeds")
    fields = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if sys.stdin.isatty() and not arguments.json:
        fields |= {name: text for name, ask in _QUESTIONS.items() if name not in fields and (text := input(f"{ask}: "))}
    if "methods" in fields:
        fields["methods"] = tuple(name.strip() for name in fields["methods"].split(",") if name.strip())
    if isinstance(fields.get("hours"), str):
        try:
            fields["hours"] = float(fields["hours"])
        except ValueError:
            raise UserError(f"`hours`: must be a number, got {fields['hours']}") from None
    speed = arguments.flops_per_second or (FLOPS_PER_SECOND if has_accelerator() else CORE_FLOPS * core_count())
    _, plan = write_study(NewStudy(file=arguments.file, flops_per_second=float(speed), **fields))
    answer: dict[str, Any] = {"file": arguments.file, "flops_per_second": float(speed), "plan": plan.as_dict()}
    return answer, f"{plan}\nwritten: {arguments.file}", 0


def study_plan(arguments: Namespace) -> Answer:
    """``secateur study plan FILE``, with ``--power`` its power."""
    options = ("pilot", "seed_sd", "document_sd", "documents", "margin")
    fields = {name: getattr(arguments, name) for name in options if getattr(arguments, name) is not None}
    if arguments.power is not None:
        if arguments.flops_per_second:
            fields["flops_per_second"] = float(arguments.flops_per_second)
        power = Study.load(arguments.file).power(power=arguments.power, **fields)
        return power.as_dict(), str(power), 0
    for name in fields:
        raise UserError(f"`{name}`: goes with `power`, which computes how many seeds tell a difference")
    cluster = {name: value for name in ("cluster", "mfu", "price") if (value := getattr(arguments, name)) is not None}
    if "cluster" in cluster:
        if arguments.flops_per_second:
            raise UserError("`flops_per_second`: the cluster has the speed of its devices; set `mfu`")
        schedule = Study.load(arguments.file).simulate(**cluster)
        return schedule.as_dict(), str(schedule), 0
    for name in cluster:
        raise UserError(f"`{name}`: goes with `cluster`, which simulates the study on many devices")
    plan = Study.load(arguments.file).plan(arguments.flops_per_second or FLOPS_PER_SECOND)
    return plan.as_dict(), str(plan), 0


def study_run(arguments: Namespace) -> Answer:
    """``secateur study run FILE``."""
    study = Study.load(arguments.file, arguments.out)
    if arguments.dry_run:
        preview = study.preview(arguments.only)
        return preview.as_dict(), str(preview), 0
    if arguments.slurm and arguments.launcher != "slurm":
        raise UserError("--slurm: describes the jobs of SLURM; add --launcher slurm")
    slurm = None
    if arguments.launcher == "slurm":
        from secateur.study.runner.slurm import parse_slurm

        slurm = parse_slurm(arguments.slurm)
    outcome = study.run(arguments.jobs, arguments.device, arguments.only, arguments.keep_going, slurm)
    answer, text, _ = _report(study, verbose=arguments.verbose)
    return answer | outcome.as_dict(), text, 1 if outcome.failed else 0


def study_status(arguments: Namespace) -> Answer:
    """``secateur study status FILE``."""
    study = Study.load(arguments.file, arguments.out)
    status = watch(study.status) if arguments.watch else study.status()
    return status.as_dict(), str(status), 0


def study_explain(arguments: Namespace) -> Answer:
    """``secateur study explain FILE STAGE``."""
    explanations = Study.load(arguments.file, arguments.out).explain(arguments.stage)
    return {"stages": [e.as_dict() for e in explanations]}, "\n".join(map(str, explanations)), 0


def study_report(arguments: Namespace) -> Answer:
    """``secateur study report FILE [OTHER]``."""
    study = Study.load(arguments.file, arguments.out)
    if arguments.other is not None:
        try:
            second = Study.load(arguments.other, arguments.other_out)
        except UserError as error:
            raise UserError(spell(str(error), {"out": "`other_out`"}.get)) from None
        return _versus(study, second)
    if arguments.other_out:
        raise UserError("--other-out: is the folder of a second study; name its file too")
    return _report(study, verbose=arguments.verbose)


def _report(study: Study, *, verbose: bool) -> Answer:
    from secateur.report.judgement import answer_json
    from secateur.report.page import build_report
    from secateur.report.terminal import text_summary, text_table

    judgement = study.judgement()
    page = build_report(judgement, study.out)
    answer: dict[str, Any] = {"study": study.spec.name, "report": str(page), **answer_json(judgement)}
    text = text_table(judgement) if verbose else text_summary(judgement)
    note = "" if verbose else " (--verbose prints more)"
    return answer, f"{text}\nreport: {page.resolve()}{note}", 0


def _versus(a: Study, b: Study) -> Answer:
    from secateur.report.page import build_versus
    from secateur.report.studies import compare_studies
    from secateur.report.tables import versus_rows
    from secateur.report.terminal import text_versus

    comparison = compare_studies(a.judgement(), b.judgement())
    page = build_versus(comparison, a.out)
    answer: dict[str, Any] = {"a": a.spec.name, "b": b.spec.name, "page": str(page), "answer": comparison.answer}
    answer |= {"rows": versus_rows(comparison)}
    return answer, f"{text_versus(comparison)}\npage: {page.resolve()}", 0


def study_stage(arguments: Namespace) -> Answer:
    """``secateur study stage FILE FINGERPRINT``: run one stage. Launchers call it."""
    from secateur import distributed, progress
    from secateur.runtime import pick_device
    from secateur.study.runner.local import exit_with_parent
    from secateur.study.runner.worker import on_device, run_stage_attempt

    if arguments.parent:
        exit_with_parent(arguments.parent)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a scheduler's warning to the whole job, which submitit handles
    study = Study.load(arguments.file, arguments.out)
    stage = next((s for s in study.stages if s.fingerprint == arguments.fingerprint), None)
    if stage is None:
        raise UserError(
            f"{arguments.fingerprint}: no stage of {arguments.file}, which has changed; run the study again"
        )
    progress.set_listener(progress.SilentListener())  # the stage writes to its log
    outcome = run_stage_attempt(on_device(stage, pick_device(arguments.device)), study.store)
    if outcome.state == "done":
        return {"stage": stage.name, "how": outcome.state}, f"{stage.kind} {stage.name}: done", 0
    if outcome.state == "elsewhere" and not distributed.is_main():
        return {}, "", 0
    raise RunError(f"{stage.kind} {stage.name}: {outcome.text}", REQUEUE if outcome.state == "stopped" else 1)
