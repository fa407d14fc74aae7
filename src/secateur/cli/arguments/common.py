"""What the arguments of several verbs have in common: parsers, their errors, and types."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from secateur.errors import UserError, did_you_mean, nearest

__all__ = [
    "Formatter",
    "Parser",
    "above_zero",
    "add_verb",
    "amount",
    "computing",
    "count_or_none",
    "dtype",
    "goals",
    "holdout",
    "positive",
    "push_to_hub",
    "ratio",
    "ratios",
    "share",
    "text_fields",
    "token_count",
    "whole_number",
    "windows",
    "zero_or_more",
]


class Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest name."""

    write_epilog: Callable[[], str] | None = None  #: for an epilog that it takes a moment to write
    #: fields that several options, or an option of another verb, stand for
    spellings: Mapping[str, str] = MappingProxyType({"merge": "secateur train --merge"})
    setting_keys: Callable[[], Sequence[str]] | None = None  #: the keys of ``--set``, where the verb has that option

    def format_help(self) -> str:
        if self.write_epilog is not None:
            self.epilog = self.write_epilog()
        return super().format_help()

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        # The verb's parser reports unknown arguments, since it knows the options; argparse leaves it to the outermost.
        arguments, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return arguments, unknown

    def spelling(self, field: str) -> str | None:
        """The option or metavar that stands for a field of a request; None where the verb has none."""
        if field in self.spellings:
            return self.spellings[field]
        action = next((action for action in self._actions if action.dest == field), None)
        if action is None:
            return None
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0]  # the last says no
        return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest.upper())

    def error(self, message: str) -> NoReturn:
        if "invalid choice: " in message and "choose from" in message:
            value = message.split("invalid choice: ")[1].split(" (")[0].strip("'\"")
            options = [o.strip(" '\")") for o in message.split("choose from")[1].split(",")]
            message = f"{message.split(': invalid')[0]}: {value!r} is not known{did_you_mean(value, options)}"
        elif message.startswith("unrecognized arguments: "):
            value = message.removeprefix("unrecognized arguments: ").split()[0]
            message = self._unknown_option(value) if value.startswith("-") else f"{value!r} is one argument too many"
        raise UserError(f"{message} (see {self.prog} --help)")

    def _unknown_option(self, text: str) -> str:
        """What is wrong with an option that the verb does not have, with what it may stand for."""
        name = text.partition("=")[0]
        options = [option for action in self._actions for option in action.option_strings]
        arguments = {f"--{a.dest}": a.metavar or a.dest.upper() for a in self._actions if not a.option_strings}
        settings = {f"--{key}": key for key in (self.setting_keys() if self.setting_keys else ())}
        near = nearest(name, [*settings, *arguments, *options])
        if near in arguments and near not in options:
            return f"{name} is not an option: name {arguments[near]} without it, as in the usage"
        if near in settings and near not in options:
            return f"{name} is not an option; did you mean --set {settings[near]}=VALUE?"
        return f"{name} is not an option{did_you_mean(name, options)}"


class Formatter(argparse.HelpFormatter):
    """Keep the line breaks of texts that have some, and print defaults."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in (
            action.help or ""
        )
        return f"{action.help} (default: %(default)s)" if has_default else action.help


def add_verb(verbs: Any, name: str, summary: str, detail: str, epilog: str | None = None) -> Parser:
    """Add a verb: its line in the list, its description, and ``--json``."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {detail}",
        epilog=epilog,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.set_defaults(spelling=parser.spelling)
    return parser


def computing(parser: argparse.ArgumentParser) -> None:
    """Add the device and the batch."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--batch", type=positive, help="windows at once; execution only (default: about 512 tokens, 16384 on a GPU)"
    )


def dtype(parser: argparse.ArgumentParser, use: str) -> None:
    """Add the dtype and what it is used for."""
    choices = ("auto", "float32", "bfloat16")
    parser.add_argument("--dtype", choices=choices, default="auto", help=f"{use} (auto: bfloat16 on a GPU)")


def push_to_hub(parser: argparse.ArgumentParser) -> None:
    """Add where the output is uploaded to."""
    parser.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="also upload the output to this repository of the Hugging Face Hub, which is created, private, if it does "
        "not exist; needs a token (`hf auth login` or HF_TOKEN)",
    )


def windows(parser: argparse.ArgumentParser, most: str, seqlen: str = "2048") -> None:
    """Add how text is cut into windows; ``most`` describes the default of ``--windows``."""
    # No argparse defaults: a file of ids must know which options were set.
    text_fields(parser)
    parser.add_argument("--windows", type=positive, help=f"windows at most (default: {most})")
    parser.add_argument(
        "--seqlen", type=positive, help=f"tokens in a window, or the model's limit if less (default: {seqlen})"
    )


def text_fields(parser: argparse.ArgumentParser) -> None:
    """Add which field of a record is its text, what it holds, and what becomes of a record without."""
    parser.add_argument(
        "--field",
        help="field that holds the text, in all but .txt files (default: text; messages with --format messages)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "messages", "prompt-completion"),
        help="what a record holds: text, a conversation, or a pair of a prompt and its completion; the last two go "
        "through the tokenizer's chat template (default: text)",
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("error", "skip"),
        help="a record that is malformed or not of the format: stop, or skip and count it, as null is (default: error)",
    )


def amount(parser: argparse.ArgumentParser, several: str) -> None:
    """Add how much to remove, and from which parameters."""
    add = parser.add_argument
    add("--ratio", type=ratios, metavar="R[,R...]", help=f"share to remove: 0.5 or 50%%; several {several}")
    add(
        "--of",
        choices=("total", "non-embedding"),
        help="parameters that the ratio counts (default: non-embedding; for sparse methods always the weights of the "
        "blocks' linears)",
    )
    add(
        "--shape",
        metavar="SIZES",
        help="sizes to reach instead: hidden=3072,ffn=9216 or layers=16 or heads=20,ffn=6528",
    )
    add(
        "--axes",
        metavar="AXES",
        help="spaces that a width method narrows: hidden, ffn, kv (KV heads with their query heads), e.g. kv,ffn; for "
        "sheared also layers (default: the method's own choice)",
    )
    add(
        "--step",
        type=positive,
        metavar="N",
        help="round hidden and FFN sizes to multiples of N (default: of a power of two up to 128, or of 256, which "
        "llama.cpp's K-quants need, where such a shape lies within 1%% of the ratio)",
    )


def goals(parser: argparse.ArgumentParser, *, latency: bool) -> None:
    """Add parameters, memory and, where something is run, latency to reach."""
    add = parser.add_argument
    add("--params", metavar="N", help="parameters to reach instead of a ratio, all of them: 4B, 350M")
    add("--active-params", metavar="N", help="parameters of a mixture that a token uses, likewise")
    add(
        "--memory",
        metavar="SIZE",
        help="memory to serve the model in, never exceeded: 8GiB, 500MB; weights, KV cache and activations",
    )
    serves = "--memory and --latency" if latency else "--memory"
    add("--sequences", type=positive, metavar="N", help=f"for {serves}: sequences served at once (default: 1)")
    add(
        "--weights",
        metavar="TYPE",
        help=f"for {serves}: type of the stored weights: bf16, float32, int8 or int4 (default: bf16"
        + ("; for --latency that of the device, and never int8 or int4)" if latency else ")"),
    )
    if latency:
        add(
            "--context",
            type=positive,
            metavar="N",
            help="for --memory and --latency: tokens of each sequence (default: 2048 and 512, or the model's limit if "
            "less)",
        )
        add(
            "--latency",
            metavar="SHARE",
            help="share of the model's own latency to reach: 0.7x; blocks are timed on --device, the result is checked",
        )
        add("--latency-of", metavar="PHASE", help="decode or prefill (default: decode)")


def positive(text: str) -> int:
    """A whole number above zero."""
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def whole_number(text: str) -> int:
    """A whole number, which may lie below zero."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def token_count(text: str) -> int:
    """A count above zero, such as 700k."""
    from secateur.config import parse_count  # imported late, since it loads pydantic

    try:
        value = parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
    return value


def count_or_none(text: str) -> int:
    """A count, or zero."""
    return 0 if text.strip() == "0" else token_count(text)


def _number(text: str) -> float:
    """NaN, which lies in no range, for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _share(text: str) -> float:
    """A number or a percentage; NaN for what is neither."""
    from secateur.config import as_share  # imported late, since it loads pydantic

    share = as_share(text)
    return _number(text) if share is text else share


def share(text: str) -> float:
    """A number or a percentage, whose range the request checks."""
    value = _share(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0.5 or 50%")
    return value


def holdout(text: str) -> float:
    """A share that may be zero."""
    value = _share(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a share from 0, for no held-out split, to below 1, such as 0.05 or 5%"
        )
    return value


def ratios(text: str) -> list[float]:
    """Ratios, each once."""
    ratios = [ratio(part.strip()) for part in text.split(",")]
    if len(set(ratios)) < len(ratios):
        raise argparse.ArgumentTypeError(f"{text!r} names a ratio twice")
    return ratios


def above_zero(text: str) -> float:
    """A finite number above zero."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value


def zero_or_more(text: str) -> float:
    """A finite number, zero or above."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of zero or more")
    return value


def ratio(text: str) -> float:
    """A share between 0 and 1."""
    value = _share(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio between 0 and 1, such as 0.5 or 50%")
    return value
