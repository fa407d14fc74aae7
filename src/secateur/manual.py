"""What ``--help`` teaches: the methods and examples. Texts only, so that help does not wait for PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.errors import UserError
from secateur.plugins import announced

__all__ = ["EPILOG", "METHODS", "SHAPES", "SOURCES", "memory", "prune"]


def memory(given: Sequence[str]) -> str:
    """What is offered to someone who ran out of memory with these arguments: nothing that they have taken already."""
    said = f"{' '.join(given)} ".replace("=", " ")
    lower = [option for option in ("--batch", "--windows") if f"{option} 1 " not in said]
    if " tokens:" in said:  # all its windows are used
        lower = [option for option in lower if option != "--windows"]
    more = [option for option in ("--states disk", "--dtype bfloat16") if given[0] == "prune" and option not in said]
    offers = [f"{verb} {' or '.join(options)}" for verb, options in (("lower", lower), ("take", more)) if options]
    return ", or ".join(offers) or "take a machine with more"


EPILOG = """\
examples:
  secateur demo                                  the whole journey in minutes, on any machine
  secateur inspect DIR                           shape, parameters, sparsity, FLOPs, provenance
  secateur shapes DIR --ratio 0.5                what half of it would be, from config.json alone
  secateur prune DIR OUT --method minitron-width --ratio 0.5 --calibration text:FILE
  secateur eval OUT --data text:FILE             held-out loss and perplexity
  secateur study plan studies/demo.yaml          what a study will run, with tokens and FLOPs

`secateur VERB --help` explains a verb. Exit codes: 0 done, 1 a stage failed, 2 bad input, 130 interrupted.
"""

SOURCES = (
    "stdlib, text:PATH (file or folder of .txt, .jsonl, .parquet), hf:NAME[:config], "
    "or tokens:FILE.npy (ids [windows, tokens], used as they are)"
)

#: granularity -> method -> what goes, and its options
METHODS: dict[str, dict[str, tuple[str, str]]] = {
    "depth": {
        "shortgpt": ("layers that turn the hidden state least", ""),
        "minitron-depth": (
            "the contiguous run of layers that the loss, or a task's accuracy, misses least",
            "task=NAME",
        ),
        "shortened-llama": ("layers of the least first-order effect on the loss", "keep_first=N, keep_last=N"),
        "shortened-llama-ppl": ("layers whose removal, each alone, raises perplexity least", ""),
        "random-depth": ("layers at random", "seed=N"),
    },
    "width": {
        "llm-pruner": (
            "FFN channels and heads by a Taylor expansion of the loss in their weights",
            "order=first|second|mixed, aggregate=element|vector",
        ),
        "minitron-width": ("hidden and FFN channels, heads if asked, by the magnitude of activations", ""),
        "wanda-sp": ("FFN channels and heads by Wanda's score of their weights", ""),
        "flap": ("FFN channels and heads that fluctuate least; their mean becomes a bias", "bias=auto|require|none"),
        "random-width": ("hidden and FFN channels, heads if asked, at random", "seed=N"),
    },
    "sparse": {
        "magnitude": ("the smallest weights of each linear", ""),
        "wanda": ("weights by magnitude times the norm of their input, in each row", ""),
        "sparsegpt": ("weights whose removal the others can make up for best", "block=N, damping=X"),
        "random-weight": ("weights at random, as many in every row", "seed=N"),
    },
}

_HEADINGS = {
    "depth": "depth: whole layers go; --ratio or --shape layers=N",
    "width": "width: channels of every layer go; --ratio or --shape hidden=N,ffn=N,heads=N,kv_heads=N",
    "sparse": "sparse: single weights become zero; --ratio or --pattern N:M",
}


def _methods() -> str:
    width = max(len(name) for methods in METHODS.values() for name in methods)
    lines = []
    for granularity, methods in METHODS.items():
        lines.append(f"  {_HEADINGS[granularity]}")
        for name, (what, options) in methods.items():
            lines.append(f"    {name:{width}}  {what}")
            lines += [f"    {'':{width}}  --option {option}" for option in options.split(", ") if option]
    return "\n".join(lines)


def _of_packages() -> str:
    """The methods of installed packages; they are not loaded, so that none can stand in the way."""
    built_in = {name for methods in METHODS.values() for name in methods}
    try:
        lines = [f"    {name}  ({found.value.strip()})" for name, found in sorted(announced(built_in).items())]
    except UserError as error:
        lines = [f"    {error}"]
    return "\n".join(["", "  of installed packages", *lines]) if lines else ""


def prune() -> str:
    """The methods, those of installed packages among them, which it takes a moment to find; and examples."""
    return f"""\
methods, by what they remove (packages may bring more):
{_methods()}{_of_packages()}

Of these, magnitude and the random ones, the controls, read no calibration text. Several ratios take about as long as
one, except with wanda, sparsegpt, wanda-sp and minitron-depth: their scores follow from what was cut before, or from
how much is to go, so that each ratio takes as long as alone.

examples:
  secateur prune DIR OUT --method minitron-width --ratio 0.5 --calibration text:FILE
  secateur prune DIR OUT --method minitron-width --shape hidden=3072,ffn=9216 --calibration text:FILE
  secateur prune DIR OUT --method minitron-depth --ratio 0.25 --option task=winogrande --tasks-data DIR
  secateur prune DIR OUT --method flap --ratio 0.2 --axes ffn --allocation global --calibration stdlib
  secateur prune DIR OUT --method wanda --pattern 2:4 --calibration tokens:ids.npy
  secateur prune DIR OUT --method minitron-width --ratio 0.5,0.6,0.7 --calibration text:FILE    three outputs
  secateur prune DIR OUT --method sparsegpt --ratio 0.5 --calibration text:FILE --states disk --resume
  secateur prune DIR OUT --method magnitude --ratio 0.5
  torchrun --nproc-per-node 8 -m secateur prune DIR OUT --method wanda --ratio 0.5 --calibration text:FILE

Under torchrun the processes, each on a GPU of its own, share the calibration windows; the result is the same up to
rounding. The first one decides and writes: OUT must lie where all can read it. Resume with as many processes.
"""


SHAPES = """\
examples:
  secateur shapes config.json                              parameters, FLOPs, KV cache
  secateur shapes DIR --ratio 0.5                          fewer layers, narrower, or fewer heads: side by side
  secateur shapes DIR --ratio 0.5 --of total --axes kv,ffn
  secateur shapes DIR --shape layers=16,ffn=9216           any shape, before any method is chosen
"""
