"""The arguments of every verb: what ``--help`` shows, and what is refused before anything is read."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from secateur import manual
from secateur.errors import UserError, did_you_mean
from secateur.version import __version__

__all__ = ["parser"]


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest name."""

    write_epilog: Callable[[], str] | None = None  #: for an epilog that it takes a moment to write

    def format_help(self) -> str:
        if self.write_epilog is not None:
            self.epilog = self.write_epilog()
        return super().format_help()

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        # The parser of the verb tells what is left over, since it knows the options; argparse lets the outermost one.
        found, left = super().parse_known_args(*args, **kwargs)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        if "invalid choice: " in message and "choose from" in message:
            given = message.split("invalid choice: ")[1].split(" (")[0].strip("'\"")
            options = [o.strip(" '\")") for o in message.split("choose from")[1].split(",")]
            message = f"{message.split(': invalid')[0]}: {given!r} is not known{did_you_mean(given, options)}"
        elif message.startswith("unrecognized arguments: "):
            given = message.removeprefix("unrecognized arguments: ").split()[0]
            options = [o for action in self._actions for o in action.option_strings]
            near = did_you_mean(given.partition("=")[0], options)
            message = (
                f"{given} is not an option{near}" if given.startswith("-") else f"{given!r} is one argument too many"
            )
        raise UserError(f"{message} (see {self.prog} --help)")


class _Formatter(argparse.HelpFormatter):
    """Keeps the lines of a text that has several, and says a default where there is one."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in (action.help or "")
        return f"{action.help} (default: %(default)s)" if told else action.help


def _verb(verbs: Any, name: str, summary: str, detail: str, epilog: str | None = None) -> _Parser:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {detail}",
        epilog=epilog,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def _computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--batch", type=_positive, help="windows at once; execution only (default: about 512 tokens, 16384 on a GPU)"
    )


def _windows(parser: argparse.ArgumentParser, most: str, seqlen: str = "2048") -> None:
    # The defaults are those of verbs.ids: it has to know what was said and what was not.
    parser.add_argument("--field", help="field that holds the text, for .jsonl, .parquet and hf: (default: text)")
    parser.add_argument("--windows", type=_positive, help=f"windows at most (default: {most})")
    parser.add_argument(
        "--seqlen", type=_positive, help=f"tokens in a window, or the model's limit if less (default: {seqlen})"
    )


def _amount(parser: argparse.ArgumentParser, several: str) -> None:
    parser.add_argument(
        "--ratio", type=_ratios, metavar="R[,R...]", help=f"share to remove, between 0 and 1; several {several}"
    )
    parser.add_argument(
        "--of",
        choices=("total", "non-embedding"),
        help="parameters that the ratio counts (default: non-embedding; for sparse methods always the weights of the "
        "blocks' linears)",
    )
    parser.add_argument(
        "--shape",
        metavar="SIZES",
        help="sizes to reach instead: hidden=3072,ffn=9216 or layers=16 or heads=20,ffn=6528",
    )
    parser.add_argument(
        "--axes",
        metavar="AXES",
        help="what a width method narrows: hidden, ffn, kv (KV heads with their query heads), e.g. kv,ffn; for sheared "
        "also layers (default: the method's own choice)",
    )


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _count(text: str) -> int:
    from secateur.spec import parse_count  # imported late, since it loads pydantic

    try:
        value = parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
    return value


def _count_or_none(text: str) -> int:
    return 0 if text.strip() == "0" else _count(text)


def _holdout(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0, for no held-out split, to below 1")
    return value


def _ratios(text: str) -> list[float]:
    ratios = [_ratio(part.strip()) for part in text.split(",")]
    if len(set(ratios)) < len(ratios):
        raise argparse.ArgumentTypeError(f"{text!r} names a ratio twice")
    return ratios


def _amount_above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio between 0 and 1, both excluded")
    return value


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    outermost = _Parser(
        prog="secateur",
        description="Prune a large language model, or train a small one from scratch? secateur measures, and says.",
        epilog=manual.EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    outermost.add_argument("--version", action="version", version=f"secateur {__version__}")
    verbs = outermost.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for add in (_demo, _inspect, _shapes, _data, _prune, _train, _eval, _compare, _study, _recommend):
        add(verbs)
    return outermost


def _demo(verbs: Any) -> None:
    demo = _verb(
        verbs,
        "demo",
        "run the demonstration study",
        "It pretrains a small parent on the standard library's sources, prunes it at three granularities, retrains, "
        "trains the from-scratch twins, evaluates everything and writes a report. Run again, it finds what is done.",
    )
    demo.add_argument("--out", default="runs/demo", help="directory of the study's stages and report")
    _running(demo)
    demo.set_defaults(only=[], keep_going=False, dry_run=False, launcher="local", slurm=[])


def _context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=_positive,
        help="window that FLOPs per token are averaged over (default: 2048, or the model's limit if less)",
    )


def _inspect(verbs: Any) -> None:
    inspect = _verb(
        verbs,
        "inspect",
        "describe a checkpoint",
        "It reads the weights to count zeros and to look for NaN; nothing is run.",
    )
    inspect.add_argument("model", help="Hugging Face checkpoint directory")
    _context(inspect)


def _shapes(verbs: Any) -> None:
    shapes = _verb(
        verbs,
        "shapes",
        "say what a model comes to, and what it would come to pruned",
        "It counts parameters, FLOPs and KV cache from config.json alone; no weights are needed. With a ratio it shows "
        "the legal shapes nearest to it, and how far off they are.",
        manual.SHAPES,
    )
    shapes.add_argument("model", metavar="CONFIG_OR_DIR", help="config.json, or a directory that has one")
    _amount(shapes, "are shown one after the other")
    shapes.add_argument("--method", help="the shape that this method would reach")
    _context(shapes)


def _data(verbs: Any) -> None:
    data = _verb(
        verbs,
        "data",
        "turn text into token shards for training",
        "It encodes documents in several processes, leaves out those that repeat an earlier one, holds some out, and "
        "writes the rest in a shuffled order. A document's side and place follow from the hash of its text and the "
        "seed. Kill it at any moment and run it again to go on.",
        manual.DATA,
    )
    data.add_argument("source", metavar="SOURCE", help=manual.DOCUMENTS)
    data.add_argument("out", metavar="OUT", help="new directory to write")
    data.add_argument("--tokenizer", required=True, metavar="DIR", help="directory with the tokenizer, or a checkpoint")
    data.add_argument("--field", help="field that holds the text, for .jsonl, .parquet and hf: (default: text)")
    data.add_argument("--split", help="split to read, for hf: and arrow: (default: train)")
    data.add_argument(
        "--domain",
        metavar="FIELD",
        help="field that names a document's domain (default: the first subfolder that its file lies in)",
    )
    data.add_argument(
        "--holdout", type=_holdout, default=0.05, metavar="SHARE", help="share of the documents held out; 0 for none"
    )
    data.add_argument("--documents", type=_count, metavar="N", help="read at most so many, e.g. 200k (default: all)")
    data.add_argument("--seed", type=int, default=0, help="of the order of documents")
    data.add_argument("--workers", type=_positive, help="processes; execution only (default: one for each core)")
    data.add_argument("--shard-tokens", type=_count, metavar="N", help="tokens in a file (default: 67108864)")


def _prune(verbs: Any) -> None:
    prune = _verb(
        verbs,
        "prune",
        "prune a checkpoint",
        "It scores the model block by block, most methods on calibration text, decides what to keep (plan.json, "
        "plan.safetensors) and writes a checkpoint that plain transformers opens. Shapes are rounded to steps; what "
        "was removed is printed beside what was asked.",
    )
    prune.write_epilog = manual.prune
    prune.add_argument("model", help="Hugging Face checkpoint directory")
    prune.add_argument("out", help="new directory to write")
    prune.add_argument("--method", required=True, help="one of the methods below")
    _amount(prune, "give one checkpoint each, OUT/ratio-R, scored once where the scores do not depend on it")
    prune.add_argument(
        "--pattern",
        metavar="N:M",
        help="zeros of sparse methods: keep N weights of each M in a row, e.g. 2:4 or 4:8 (default: unstructured)",
    )
    prune.add_argument(
        "--allocation",
        choices=("uniform", "global"),
        default="uniform",
        help="width methods: every layer keeps as many channels, or layers compete",
    )
    prune.add_argument(
        "--option", metavar="KEY=VALUE", action="append", default=[], help="an option of the method; may be repeated"
    )
    prune.add_argument("--tasks-data", metavar="DIR", help="minitron-depth: where the task's data lies")
    prune.add_argument("--task-limit", metavar="N", type=_positive, help="minitron-depth: examples of the task at most")
    prune.add_argument("--calibration", metavar="SOURCE", help=f"{manual.SOURCES}; for sheared also shards:DIR")
    _windows(prune, "128")
    _computing(prune)
    prune.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the forward passes; statistics and scores are float32 or better (auto: bfloat16 on a GPU)",
    )
    prune.add_argument(
        "--states",
        choices=("auto", "device", "ram", "disk"),
        default="auto",
        help="where hidden states between blocks lie: on the device that computes them, which saves copies; in memory; "
        "or on disk, where a resumed run need not run finished blocks again (auto: on a GPU if it then needs at most "
        "8 GB and half of what is free there; else in memory, or on disk where that is short)",
    )
    prune.add_argument("--resume", action="store_true", help="go on with a run that was killed, at its last block")


def _train(verbs: Any) -> None:
    train = _verb(
        verbs,
        "train",
        "train a model on an exact number of tokens",
        "It reads a slice of the data once, to the last token, in an order that a seed fixes, whatever the number of "
        "processes. A sparse model keeps its masks. After a kill, the same command goes on from its last checkpoint.",
        manual.TRAIN,
    )
    train.add_argument("out", help="new directory to write")
    train.add_argument("--init", required=True, metavar="scratch|DIR", help="fresh weights, or those of a checkpoint")
    train.add_argument("--like", metavar="DIR", help="checkpoint or config.json of the shape, for --init scratch")
    train.add_argument("--tokens", required=True, type=_count, help="budget: 700k, 7e5, 50B ...")
    train.add_argument("--data", required=True, metavar="shards:DIR", help="what `secateur data` has written")
    train.add_argument("--skip", type=_count_or_none, default=0, metavar="TOKENS", help="tokens to leave out before")
    train.add_argument("--recipe", metavar="FILE", help="YAML with the keys below")
    train.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a key of the recipe; repeatable"
    )
    train.add_argument("--teacher", metavar="DIR", help="checkpoint to distil from, of the model's vocabulary")
    for name, reading, what in (
        ("--temperature", float, "softens both distributions (default: 1)"),
        ("--alpha", float, "share of the divergence from the teacher; the rest is the usual loss (default: 1)"),
        ("--top-k", _positive, "compare the teacher's likeliest N ids, all others as one (default: all apart)"),
    ):
        train.add_argument(
            name, type=reading, metavar="N" if reading is _positive else "X", help=f"with --teacher: {what}"
        )
    train.add_argument("--points", type=_positive, default=8, help="measurements of the held-out loss along the run")
    train.add_argument("--heldout-windows", type=_positive, default=256, help="windows that it is measured on, at most")
    train.add_argument("--device", default="auto", help="auto, cpu or cuda")
    train.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of what is computed; weights, moments and sums stay float32 (auto: bfloat16 on a GPU)",
    )
    train.add_argument("--micro-batch", type=_positive, metavar="N", help="windows at once in a process (default: 8)")
    train.add_argument("--recompute", action="store_true", help="hold no activations within blocks: a third more time")
    train.add_argument("--compile", action="store_true", help="compile the blocks (torch.compile)")
    train.add_argument("--replicas", type=_positive, default=1, help="groups of processes that each hold the model")
    train.add_argument("--save-every", type=_positive, default=100, metavar="STEPS", help="steps between checkpoints")
    train.add_argument("--keep", type=_positive, default=2, metavar="N", help="checkpoints of the run that stay")
    train.add_argument("--track", action="append", choices=("tensorboard", "wandb"), help="send the metrics there too")


def _eval(verbs: Any) -> None:
    evaluate = _verb(
        verbs,
        "eval",
        "measure held-out loss, perplexity, accuracy on tasks, and cost",
        "Text is encoded with the checkpoint's own tokenizer and cut into windows, whose first token is context only. "
        "Several checkpoints give one table, if their figures were measured in the same way.",
        manual.EVAL,
    )
    evaluate.add_argument("model", nargs="+", help="Hugging Face checkpoint directory; several for one table")
    evaluate.add_argument(
        "--data", metavar="SOURCE", help=f"held-out text: {manual.SOURCES}, shards:DIR (its held-out split)"
    )
    evaluate.add_argument("--suite", metavar="NAME[,NAME...]", help="what to measure besides; see below")
    evaluate.add_argument(
        "--tasks-data", metavar="DIR", help="folder with <task>.jsonl (default: the Hugging Face Hub)"
    )
    evaluate.add_argument("--task-limit", type=_positive, metavar="N", help="documents of each task, from the first")
    evaluate.add_argument("--text-data", metavar="DIR", help="folder with c4.jsonl ... (default: the Hugging Face Hub)")
    evaluate.add_argument("--protocol", default="heldout", help="of the perplexities: heldout or paper-train-split")
    _windows(evaluate, "the whole text; 256 for perplexities", "2048; 8192 for perplexities")
    evaluate.add_argument(
        "--stride", type=_positive, metavar="N", help="tokens from window to window (default: windows side by side)"
    )
    evaluate.add_argument("--out", metavar="DIR", help="write results, and those of every item, for `secateur compare`")
    _computing(evaluate)
    evaluate.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of weights and products; losses are summed in float64 (auto: bfloat16 on a GPU)",
    )


def _compare(verbs: Any) -> None:
    compare = _verb(
        verbs,
        "compare",
        "say which of two evaluated models is better, if that can be told",
        "It reads what `secateur eval --out` has written and compares item by item: windows or documents of text, "
        "documents of tasks. Nothing is run.",
        manual.COMPARE,
    )
    compare.add_argument("a", metavar="A.json[,A.json...]", help="results of one model, one file for each seed")
    compare.add_argument("b", metavar="B.json[,B.json...]", help="results of the other, seeds in the same order")


_STUDY_ACTIONS = {
    "plan": (
        "print the stages with tokens and FLOPs",
        "It tells what a study costs before anything starts. Nothing is run or written.",
    ),
    "run": ("run what is not done, then report", "Kill it at any moment and run it again to go on."),
    "status": ("say where each stage stands", "Nothing is run or written; any host that sees the directory can ask."),
    "explain": ("say why a stage is done or not", "It names what differs from the nearest stage that is done."),
    "report": ("write the report from the records", "Nothing is trained; what is missing is shown as missing."),
    "stage": ("do one stage", "Launchers call it; study run is the way to run a study."),
}


def _study(verbs: Any) -> None:
    study = verbs.add_parser(
        "study",
        help="plan, run and report a study file",
        description="A study file (YAML) declares a parent, methods, ratios and budgets; see studies/demo.yaml.",
        allow_abbrev=False,
    )
    actions = study.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Parser)
    for name, (summary, detail) in _STUDY_ACTIONS.items():
        action = _verb(actions, name, summary, detail, manual.STUDY.get(name))
        action.add_argument("file", help="study file")
        if name == "plan":
            help_ = "what a device does, for the hours (default: 4e14, an H100 at about 40%% of its peak)"
            action.add_argument("--flops-per-second", type=_count, metavar="X", help=help_)
        else:
            action.add_argument("--out", help="directory of the stages (default: runs/NAME)")
        _OF_ACTION.get(name, lambda _: None)(action)
    # Not for people: it is in no list. argparse has no word for that.
    actions._choices_actions = [found for found in actions._choices_actions if found.dest != "stage"]


def _running(run: argparse.ArgumentParser) -> None:
    run.add_argument("--jobs", type=_positive, help="stages at once (default: one for each core, or GPU)")
    run.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="each stage gets a core, or a GPU, of its own (default: the study's compute.device)",
    )


def _study_run(run: argparse.ArgumentParser) -> None:
    _running(run)
    run.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="run stages of these names and what they are made from, e.g. 'wanda-*/P-R'; repeatable",
    )
    run.add_argument(
        "--launcher", choices=("local", "slurm"), default="local", help="processes here, or jobs of SLURM (submitit)"
    )
    run.add_argument(
        "--slurm", metavar="KEY=VALUE", action="append", default=[], help="what a job asks for, see below; repeatable"
    )
    run.add_argument("--keep-going", action="store_true", help="after a failure, run all that does not depend on it")
    run.add_argument("--dry-run", action="store_true", help="say what would run, and why; run and write nothing")


def _study_status(status: argparse.ArgumentParser) -> None:
    status.add_argument("--watch", action="store_true", help="show a table that follows the study until it is done")


def _study_explain(explain: argparse.ArgumentParser) -> None:
    explain.add_argument("stage", metavar="STAGE", help="its name, as study plan prints it, also with its kind before")


def _study_stage(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("fingerprint", help="of the stage")
    stage.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    stage.add_argument("--parent", type=_positive, metavar="PID", help="end when this process does")


_OF_ACTION = {"run": _study_run, "status": _study_status, "explain": _study_explain, "stage": _study_stage}


def _recommend(verbs: Any) -> None:
    recommend = _verb(
        verbs,
        "recommend",
        "say which path pays, by published figures or by a study's",
        "It fits both paths' losses against tokens, and tells who is ahead at a budget and from where on the other "
        "catches up, with intervals, how far the question lies from what was run, and what both paths cost.",
        manual.RECOMMEND,
    )
    size = recommend.add_mutually_exclusive_group(required=True)
    size.add_argument("--params", type=_count, metavar="N", help="parameters of the parent: 8e9, 8B ...")
    size.add_argument("--model", metavar="CONFIG_OR_DIR", help="the parent's config.json instead, for exact FLOPs")
    recommend.add_argument("--ratio", type=_ratio, required=True, metavar="R", help="share to remove, between 0 and 1")
    recommend.add_argument("--tokens", type=_count, required=True, metavar="N", help="budget after pruning: 50B ...")
    recommend.add_argument("--granularity", choices=tuple(manual.METHODS), help="what is removed (default: any)")
    recommend.add_argument("--method", help="pruning method, as for prune (default: any)")
    recommend.add_argument(
        "--parent",
        choices=("have", "must-train"),
        default="have",
        help="whether the parent is there, its cost sunk, or has to be trained",
    )
    recommend.add_argument("--parent-tokens", type=_count, metavar="N", help="tokens that the parent is trained on")
    recommend.add_argument(
        "--children", type=_positive, default=1, metavar="K", help="pruned models that share the parent's cost"
    )
    recommend.add_argument("--study", metavar="DIR", help="folder of a study of your own (default: published figures)")
    recommend.add_argument(
        "--noise",
        type=_amount_above_zero,
        metavar="NATS",
        help="standard deviation of a run's loss between seeds (default: what the runs show, with 0.01 as a prior)",
    )
    recommend.add_argument("--cost-per-hour", type=_amount_above_zero, metavar="X", help="price of an accelerator")
    recommend.add_argument(
        "--flops-per-second", type=_amount_above_zero, metavar="F", help="what it sustains in training, e.g. 4e14"
    )
    recommend.add_argument("--pilot", metavar="FILE", help="write the study that would tell more")
    recommend.add_argument(
        "--like", metavar="STUDY", help="study file whose corpus, parent and recipe the pilot takes over"
    )
