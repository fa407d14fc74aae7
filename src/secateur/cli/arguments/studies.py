"""The arguments of the verbs about studies and recommendations."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from secateur.cli import manual
from secateur.cli.arguments.common import Parser, above_zero, add_verb, positive, ratio, token_count, zero_or_more
from secateur.model.families import Granularity

__all__ = ["add_demo", "add_recommend", "add_study"]


def add_demo(verbs: Any) -> None:
    """``secateur demo``."""
    demo = add_verb(
        verbs,
        "demo",
        "run the demonstration study",
        "It pretrains a small parent on the standard library's sources, prunes it at three granularities, retrains, "
        "trains the from-scratch twins, evaluates everything and writes a report. Run again, it finds what is done.",
    )
    demo.add_argument("--out", default="runs/demo", help="directory of the study's stages and report")
    _running(demo)
    demo.set_defaults(only=[], keep_going=False, dry_run=False, launcher="local", slurm=[])


_STUDY_ACTIONS = {
    "new": (
        "write a study file for a parent, a corpus and a budget",
        "It writes the largest study that the hours allow, with comments, and prints its plan. On a terminal it asks "
        "for what the arguments leave out.",
    ),
    "plan": (
        "print the stages with tokens and FLOPs",
        "It prices a study before anything starts. Nothing is run or written.",
    ),
    "run": ("run the stages that are not done, then report", "After a kill, the same command resumes."),
    "status": ("list the state of each stage", "Nothing is run or written; any host that sees the directory can ask."),
    "explain": ("explain why a stage is done or not", "It names what differs from the nearest stage that is done."),
    "report": (
        "write the report from the records, or compare two studies",
        "Nothing is trained; missing figures are shown as missing.",
    ),
    "stage": ("run one stage", "Launchers call it; to run a study, use `study run`."),
}


def add_study(verbs: Any) -> None:
    """``secateur study`` and its actions."""
    study = verbs.add_parser(
        "study",
        help="plan, run and report a study file",
        description="A study file (YAML) declares a parent, methods, ratios and budgets; see studies/demo.yaml.",
        allow_abbrev=False,
    )
    actions = study.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    for name, (summary, detail) in _STUDY_ACTIONS.items():
        action = add_verb(actions, name, summary, detail, manual.STUDY_EPILOGS.get(name))
        if name == "new":
            _study_new(action)
            continue
        action.add_argument("file", help="study file, or the name of a shipped study such as demo")
        if name == "plan":
            help_ = "speed of a device, for the hours (default: 4e14, an H100 at about 40%% of its peak)"
            action.add_argument("--flops-per-second", type=token_count, metavar="X", help=help_)
            _study_cluster(action)
            _study_power(action)
        else:
            action.add_argument("--out", help="directory of the stages (default: runs/NAME)")
        _OF_ACTION.get(name, lambda _: None)(action)
    # Not for people: it is in no list. argparse has no word for that.
    actions._choices_actions = [action for action in actions._choices_actions if action.dest != "stage"]


def _study_new(new: argparse.ArgumentParser) -> None:
    add = new.add_argument
    add("file", help="file to write, such as mine.yaml")
    add("--checkpoint", metavar="DIR", help="the parent (default: a small one that the study pretrains)")
    add("--corpus", metavar="SOURCE", help="text:PATH, hf:NAME, python or stdlib (default: python)")
    add("--methods", metavar="A,B", help="methods to compare (default: minitron-depth,minitron-width,wanda)")
    add("--ratio", type=ratio, help="share of the parameters to remove (default: 0.5)")
    add("--hours", type=above_zero, metavar="H", help="budget of the whole study, in hours of one device (default: 1)")
    add("--seeds", type=positive, metavar="N", help="runs of each cell (default: 1)")
    help_ = "speed of training (default: 4e14 with a GPU, 1e10 for each core without)"
    add("--flops-per-second", type=token_count, metavar="X", help=help_)


def _study_cluster(plan: argparse.ArgumentParser) -> None:
    group = plan.add_argument_group("cluster: the wall time and device-hours of the study on many devices, simulated")
    add = group.add_argument
    add("--cluster", metavar="NxMODEL", help="number and model of the devices, such as 64xH100")
    add("--mfu", type=ratio, metavar="SHARE", help="share of the bfloat16 peak that training reaches (default: 0.4)")
    add("--price", type=above_zero, metavar="X", help="price of a device-hour, for the cost")


def _study_power(plan: argparse.ArgumentParser) -> None:
    group = plan.add_argument_group("power: how many seeds and held-out documents tell a difference")
    add = group.add_argument
    help_ = "print that instead of the stages, for this share of power (default: 0.8)"
    add("--power", type=ratio, nargs="?", const=0.8, metavar="SHARE", help=help_)
    add("--pilot", metavar="DIR", help="folder of a study with a report, whose comparisons show how far they vary")
    add("--seed-sd", type=zero_or_more, metavar="NATS", help="standard deviation of a difference between seeds")
    add("--document-sd", type=zero_or_more, metavar="NATS", help="standard deviation of a difference between documents")
    add("--documents", type=above_zero, metavar="K", help="effective held-out documents (default: the pilot's)")
    add("--margin", type=above_zero, metavar="NATS", help="difference to tell (default: the question's margin)")


def _verbose(verb: argparse.ArgumentParser) -> None:
    help_ = "print every verdict, finding, control, forecast and the ranking, not only answer and table"
    verb.add_argument("--verbose", action="store_true", help=help_)


def _running(run: argparse.ArgumentParser) -> None:
    _verbose(run)
    run.add_argument("--jobs", type=positive, help="stages at once (default: one for each core, or GPU)")
    run.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="each stage gets a core, or a GPU, of its own (default: the study's compute.device)",
    )


def _study_run(run: argparse.ArgumentParser) -> None:
    _running(run)
    add = run.add_argument
    add(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="run stages of these names and their inputs, e.g. 'wanda-*/P-R'; repeatable",
    )
    add("--launcher", choices=("local", "slurm"), default="local", help="processes here, or jobs of SLURM (submitit)")
    add(
        "--slurm",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a resource that jobs request, see below; repeatable",
    )
    add("--keep-going", action="store_true", help="after a failure, run all stages that do not depend on it")
    add("--dry-run", action="store_true", help="print what would run, and why; run and write nothing")


def _study_status(status: argparse.ArgumentParser) -> None:
    status.add_argument("--watch", action="store_true", help="show a table that follows the study until it is done")


def _study_report(report: argparse.ArgumentParser) -> None:
    help_ = "a second study file: compare the two, by what they have in common, in versus-NAME.html"
    _verbose(report)
    report.add_argument("other", nargs="?", metavar="OTHER", help=help_)
    report.add_argument("--other-out", metavar="DIR", help="directory of its stages (default: runs/NAME)")


def _study_explain(explain: argparse.ArgumentParser) -> None:
    explain.add_argument("stage", metavar="STAGE", help="its name, as study plan prints it, also with its kind before")


def _study_stage(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("fingerprint", help="of the stage")
    stage.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    stage.add_argument("--parent", type=positive, metavar="PID", help="end when this process does")


_OF_ACTION = {
    "run": _study_run,
    "status": _study_status,
    "explain": _study_explain,
    "report": _study_report,
    "stage": _study_stage,
}


def add_recommend(verbs: Any) -> None:
    """``secateur recommend``."""
    recommend = add_verb(
        verbs,
        "recommend",
        "recommend a path, by published figures or by a study's",
        "It fits both paths' losses against tokens and prints who is ahead at a budget, where the other path catches "
        "up, with intervals, the distance of the question from the evidence, and the cost of both paths.",
        manual.RECOMMEND_EPILOG,
    )
    size = recommend.add_mutually_exclusive_group(required=True)
    size.add_argument("--params", type=token_count, metavar="N", help="parameters of the parent: 8e9, 8B ...")
    size.add_argument("--model", metavar="CONFIG_OR_DIR", help="the parent's config.json instead, for exact FLOPs")
    add = recommend.add_argument
    add("--ratio", type=ratio, required=True, metavar="R", help="share to remove: 0.5 or 50%%")
    add("--tokens", type=token_count, required=True, metavar="N", help="budget after pruning: 50B ...")
    add("--granularity", choices=get_args(Granularity), help="what is removed (default: any)")
    add("--method", help="pruning method, as for prune (default: any)")
    add(
        "--parent",
        choices=("have", "must-train"),
        default="have",
        help="whether the parent exists, its cost sunk, or must be trained",
    )
    add("--parent-tokens", type=token_count, metavar="N", help="tokens that the parent is trained on, or was")
    add("--children", type=positive, default=1, metavar="K", help="pruned models that share the parent's cost")
    add("--distill", action="store_true", help="the pruned model learns from the parent's outputs")
    add("--study", metavar="DIR", help="folder of a study of your own (default: published figures)")
    add(
        "--noise",
        type=above_zero,
        metavar="NATS",
        help="standard deviation of a run's loss between seeds (default: what the runs show, with 0.01 as a prior)",
    )
    add("--cost-per-hour", type=above_zero, metavar="X", help="price of an accelerator")
    add("--flops-per-second", type=above_zero, metavar="F", help="what it sustains in training, e.g. 4e14")
    add("--currency", metavar="TEXT", help="of that price: EUR ... (default: USD)")
    add("--pilot", metavar="FILE", help="write a study whose results would sharpen the answer")
    add("--like", metavar="STUDY", help="study file whose corpus, parent and recipe the pilot takes over")
