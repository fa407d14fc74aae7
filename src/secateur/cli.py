"""The command line: verbs that explain themselves, one line and exit code 2 on bad input, ``--json`` everywhere."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from secateur.errors import UserError, did_you_mean
from secateur.version import __version__

__all__ = ["main"]

_EPILOG = """\
examples:
  secateur demo                                  the whole journey in minutes, on any machine
  secateur inspect DIR                           shape, parameters, sparsity, FLOPs, provenance
  secateur prune DIR OUT --method minitron-width --ratio 0.5 --calibration text:FILE
  secateur eval OUT --data text:FILE             held-out loss and perplexity
  secateur study plan studies/demo.yaml          what a study will run, with tokens and FLOPs

`secateur VERB --help` explains a verb. Exit codes: 0 done, 1 a stage failed, 2 bad input, 130 interrupted.
"""
_SOURCES = "text: stdlib, text:PATH (file or folder of .txt, .jsonl, .parquet) or hf:NAME[:config]"


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest name."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice: " in message and "choose from" in message:
            given = message.split("invalid choice: ")[1].split(" (")[0].strip("'\"")
            options = [o.strip(" '\")") for o in message.split("choose from")[1].split(",")]
            message = f"{message.split(': invalid')[0]}: {given!r} is not known{did_you_mean(given, options)}"
        elif message.startswith("unrecognized arguments: "):
            given = message.removeprefix("unrecognized arguments: ").split()[0]
            options = [o for action in self._actions for o in action.option_strings]
            message = f"{given} is not an option{did_you_mean(given.split('=')[0], options)}"
        raise UserError(f"{message} (see {self.prog} --help)")


def _verb(verbs: Any, name: str, summary: str, detail: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {detail}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def _computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batch", type=_positive, default=8, help="windows at once: lower it to save memory")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio between 0 and 1, both excluded")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="secateur",
        description="Prune a large language model, or train a small one from scratch? secateur measures, and says.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"secateur {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    demo = _verb(
        verbs,
        "demo",
        "run the demonstration study",
        "It pretrains a small parent on the standard library's sources, prunes it at three granularities, retrains, "
        "trains the from-scratch twins, evaluates everything and writes a report. Run again, it finds what is done.",
    )
    demo.add_argument("--out", default="runs/demo", help="directory of the study's stages and report")
    demo.add_argument("--jobs", type=_positive, help="worker processes, one thread each (default: one for each core)")

    inspect = _verb(verbs, "inspect", "describe a checkpoint", "It reads the weights to count zeros; nothing is run.")
    inspect.add_argument("model", help="Hugging Face checkpoint directory")
    inspect.add_argument(
        "--context", type=_positive, default=2048, help="window that FLOPs per token are averaged over"
    )

    prune = _verb(
        verbs,
        "prune",
        "prune a checkpoint",
        "It scores the model block by block on calibration text, decides what to keep (plan.json, plan.safetensors) "
        "and writes a checkpoint that plain transformers opens. The ratio counts parameters outside the embeddings; "
        "for sparse methods, weights of the block linears.",
    )
    prune.add_argument("model", help="Hugging Face checkpoint directory (Llama architecture)")
    prune.add_argument("out", help="new directory to write")
    prune.add_argument("--method", required=True, help="minitron-depth, minitron-width or wanda")
    prune.add_argument("--ratio", type=_ratio, required=True, help="share to remove, between 0 and 1")
    prune.add_argument("--calibration", required=True, metavar="SOURCE", help=_SOURCES)
    prune.add_argument("--field", default="text", help="field that holds the text, for .jsonl, .parquet and hf:")
    prune.add_argument("--windows", type=_positive, default=128, help="calibration windows at most")
    prune.add_argument(
        "--seqlen", type=_positive, default=2048, help="tokens in a window, or the model's limit if less"
    )
    _computing(prune)

    evaluate = _verb(
        verbs,
        "eval",
        "measure held-out loss and perplexity",
        "Documents are encoded with the checkpoint's own tokenizer, joined, and cut into windows that do not overlap; "
        "each window's first token is context only.",
    )
    evaluate.add_argument("model", help="Hugging Face checkpoint directory")
    evaluate.add_argument("--data", required=True, metavar="SOURCE", help=_SOURCES)
    evaluate.add_argument("--field", default="text", help="field that holds the text, for .jsonl, .parquet and hf:")
    evaluate.add_argument("--windows", type=_positive, help="windows at most (default: the whole text)")
    evaluate.add_argument(
        "--seqlen", type=_positive, default=2048, help="tokens in a window, or the model's limit if less"
    )
    _computing(evaluate)

    study = verbs.add_parser(
        "study",
        help="plan, run and report a study file",
        description="A study file (YAML) declares a parent, methods, ratios and budgets; see studies/demo.yaml.",
        allow_abbrev=False,
    )
    actions = study.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Parser)
    for name, summary, detail in (
        (
            "plan",
            "print the stages with tokens and FLOPs",
            "It tells what a study costs before anything starts. Nothing is run or written.",
        ),
        ("run", "run what is not done, then report", "Kill it at any moment and run it again to go on."),
        ("status", "say which stages are done", "Nothing is run or written."),
        ("report", "write the report from the records", "Nothing is trained; what is missing is shown as missing."),
    ):
        action = _verb(actions, name, summary, detail)
        action.add_argument("file", help="study file")
        if name != "plan":
            action.add_argument("--out", help="directory of the stages (default: runs/NAME)")
        if name == "run":
            action.add_argument("--jobs", type=_positive, help="worker processes (default: one for each core)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        # Imported late: --help must not wait for torch.
        from secateur import verbs

        action = f"study_{arguments.action}" if arguments.verb == "study" else arguments.verb
        answer, text, code = getattr(verbs, action.replace("eval", "evaluate"))(arguments)
        print(json.dumps(answer, ensure_ascii=False) if arguments.json else text, flush=True)
        return code
    except UserError as error:
        print(f"secateur: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output, e.g. head, has enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nsecateur: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
