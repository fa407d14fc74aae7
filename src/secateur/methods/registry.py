"""The registry of pruning methods: one row for each. It imports no torch, so that ``--help`` can list them at once.

A method is one file in this package and one row here. Methods of installed packages are found by their entry points.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from secateur.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from secateur.model.families import Granularity

__all__ = ["METHODS", "MethodInfo", "Option", "get_method", "known_methods", "method_name", "plugin_methods"]

ENTRY_POINTS = "secateur.methods"  #: the group of entry points in which installed packages announce methods


@dataclass(frozen=True)
class Option:
    """An option of a method: a field of its class."""

    name: str
    default: int | float | str
    meaning: str
    choices: tuple[str, ...] = ()  #: the only values allowed, where there are few

    @property
    def usage(self) -> str:
        """``steps=320``, ``order=first|second|mixed`` or, without a default, ``task=NAME``."""
        number = isinstance(self.default, int | float)
        return f"{self.name}={'|'.join(self.choices) or (f'{self.default:g}' if number else self.default or 'NAME')}"


@dataclass(frozen=True)
class MethodInfo:
    """A row of the registry."""

    class_path: str  #: ``module:Class``
    granularity: Granularity
    title: str  #: the authors' spelling of the name
    source: str  #: arXiv number of the paper; empty without one
    summary: str  #: what it removes, in a line
    options: tuple[Option, ...] = ()


_SEED = Option("seed", 42, "seed of the random numbers")

METHODS: dict[str, MethodInfo] = {
    "shortgpt": MethodInfo(
        "secateur.methods.shortgpt:ShortGPT", "depth", "ShortGPT", "2403.03853",
        "layers that change the hidden state least",
    ),
    "minitron-depth": MethodInfo(
        "secateur.methods.minitron_depth:MinitronDepth", "depth", "Minitron-depth", "2408.11796",
        "the contiguous run of layers whose removal raises the loss least, or costs least accuracy on a task",
        (Option("task", "", "lm-eval task to measure, e.g. winogrande (default: the loss)"),),
    ),
    "shortened-llama": MethodInfo(
        "secateur.methods.shortened_llama:ShortenedLlama", "depth", "Shortened LLaMA", "2402.02834",
        "layers with the least first-order effect on the loss",
        (
            Option("keep_first", 0, "layers at the start that always stay"),
            Option("keep_last", 0, "layers at the end that always stay"),
        ),
    ),
    "shortened-llama-ppl": MethodInfo(
        "secateur.methods.shortened_llama:ShortenedLlamaPerplexity", "depth", "Shortened LLaMA (PPL)", "2402.02834",
        "layers whose removal, each alone, raises perplexity least",
    ),
    "sleb": MethodInfo(
        "secateur.methods.sleb:SLEB", "depth", "SLEB", "2402.09025",
        "layers one by one, each time the one whose removal raises the loss least",
        (
            Option("keep_first", 1, "layers at the start that always stay"),
            Option("keep_last", 1, "layers at the end that always stay"),
        ),
    ),
    "random-depth": MethodInfo(
        "secateur.methods.random:RandomDepth", "depth", "random-depth", "", "layers at random", (_SEED,)
    ),
    "llm-pruner": MethodInfo(
        "secateur.methods.llm_pruner:LLMPruner", "width", "LLM-Pruner", "2305.11627",
        "FFN channels and heads by a Taylor expansion of the loss in their weights",
        (
            Option("order", "first", "terms of the expansion", ("first", "second", "mixed")),
            Option("aggregate", "element", "what is summed over a unit", ("element", "vector")),
        ),
    ),
    "minitron-width": MethodInfo(
        "secateur.methods.minitron_width:MinitronWidth", "width", "Minitron-width", "2407.14679",
        "hidden and FFN channels (heads on request) by the magnitude of activations",
        (
            Option("batch", "l2", "aggregate over windows", ("l2", "mean")),
            Option("sequence", "mean", "aggregate over a window's positions", ("l2", "mean")),
        ),
    ),
    "wanda-sp": MethodInfo(
        "secateur.methods.wanda_sp:WandaSP", "width", "Wanda-sp", "2312.11983",
        "FFN channels and heads by Wanda's score of their weights",
    ),
    "flap": MethodInfo(
        "secateur.methods.flap:FLAP", "width", "FLAP", "2312.11983",
        "FFN channels and heads that fluctuate least",
        (Option("bias", "auto", "put their mean output into biases (auto: where possible)",
                ("auto", "require", "none")),),
    ),
    "random-width": MethodInfo(
        "secateur.methods.random:RandomWidth", "width", "random-width", "",
        "hidden and FFN channels (heads on request) at random", (_SEED,),
    ),
    "sheared": MethodInfo(
        "secateur.methods.sheared:Sheared", "depth+width", "Sheared LLaMA", "2310.06694",
        "layers, hidden and FFN channels and heads by gates learned in training",
        (
            Option("steps", 320, "training steps"),
            Option("windows", 16, "windows in a step"),
            Option("rate", 1e-4, "peak learning rate of the weights; 0 freezes them"),
            Option("mask_rate", 1.0, "peak learning rate of the gates"),
            Option("multiplier_rate", 60.0, "peak learning rate of the multipliers"),
            Option("phi", 200.0, "quadratic multiplier at the start"),
            Option("warmup", 0.2, "share of the steps in which the target falls to the requested shape"),
            Option("seed", 42, "seed of the gates' noise and of the order of the windows"),
        ),
    ),
    "magnitude": MethodInfo(
        "secateur.methods.magnitude:Magnitude", "sparse", "Magnitude", "1506.02626",
        "the smallest weights of each linear",
    ),
    "wanda": MethodInfo(
        "secateur.methods.wanda:Wanda", "sparse", "Wanda", "2306.11695",
        "weights by magnitude times the norm of their input, within each row",
    ),
    "ria": MethodInfo(
        "secateur.methods.ria:RIA", "sparse", "RIA", "",
        "weights by their share of their row and column times the norm of their input",
        (Option("exponent", 0.5, "power of the input's norm"),),
    ),
    "sparsegpt": MethodInfo(
        "secateur.methods.sparsegpt:SparseGPT", "sparse", "SparseGPT", "2301.00774",
        "weights whose removal the others can best make up for",
        (
            Option("block", 128, "columns in a block"),
            Option("damping", 0.01, "added to the Hessian's diagonal, as a share of its mean"),
        ),
    ),
    "alps": MethodInfo(
        "secateur.methods.alps:ALPS", "sparse", "ALPS", "2406.07831",
        "weights and mask found together by ADMM, then refined by conjugate gradients",
        (
            Option("damping", 0.01, "added to the Hessian's diagonal, as a share of its mean"),
            Option("rho", 0.1, "penalty of the split at the start"),
            Option("steps", 300, "ADMM steps, at most"),
            Option("refinement", 10, "steps of conjugate gradients under the mask"),
        ),
    ),
    "random-weight": MethodInfo(
        "secateur.methods.random:RandomWeight", "sparse", "random-weight", "",
        "weights at random, as many in every row", (_SEED,),
    ),
    "reap": MethodInfo(
        "secateur.methods.reap:REAP", "experts", "REAP", "2510.13999",
        "routed experts whose weighted output is smallest on the tokens routed to them",
    ),
    "expert-frequency": MethodInfo(
        "secateur.methods.expert_baselines:ExpertFrequency", "experts", "expert-frequency", "",
        "routed experts that are chosen least often",
    ),
    "expert-activation": MethodInfo(
        "secateur.methods.expert_baselines:ExpertActivation", "experts", "expert-activation", "",
        "routed experts whose output is smallest on the tokens routed to them",
    ),
    "random-expert": MethodInfo(
        "secateur.methods.random:RandomExpert", "experts", "random-expert", "", "routed experts at random", (_SEED,)
    ),
}  # fmt: skip


def method_name(name: str) -> str:
    """Spell a method as its authors do, ``"shortgpt"`` -> ``"ShortGPT"``; any other name is returned unchanged."""
    return METHODS[name].title if name in METHODS else name


@functools.cache
def plugin_methods() -> dict[str, EntryPoint]:
    """The methods of installed packages, by name, without loading them; a built-in name cannot be taken.

    Raises:
        UserError: if the entry points of a package cannot be read.
    """
    from importlib.metadata import entry_points  # slow to import, and every command imports this module

    try:
        return {entry.name: entry for entry in sorted(entry_points(group=ENTRY_POINTS)) if entry.name not in METHODS}
    except Exception as error:  # any package may have written them
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the entry points of an installed package cannot be read: {text}") from None


def known_methods() -> list[str]:
    """The names of all methods: the built-in ones, then those of installed packages."""
    return [*METHODS, *plugin_methods()]


def get_method(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Make the method ``name``. This imports torch.

    Args:
        options: values of its fields; a string is read as YAML.

    Raises:
        UserError: if no such method or option exists, a value is out of range, or a package's method cannot be loaded.
    """
    from secateur.config import parse, parse_value

    cls = _load(name)
    names = [field.name for field in fields(cls)]
    for key in options or {}:
        if key not in names:
            near = did_you_mean(key, names).partition("; known")[0]  # the message lists them all
            raise UserError(f"`options`: {name} has no option {key!r} (it has {', '.join(names) or 'none'}){near}")
    values = {key: parse_value(v) if isinstance(v, str) and v else v for key, v in (options or {}).items()}
    return parse(cls, values, origin=f"`options` of {name}")


def _load(name: str) -> type[Any]:
    if name in METHODS:
        module, _, attribute = METHODS[name].class_path.partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in (plugins := plugin_methods()):
        from secateur.methods.plugins import load_plugin

        return load_plugin(plugins[name])
    raise UserError(f"`method`: {name!r} is not a known method{did_you_mean(name, known_methods())}")
