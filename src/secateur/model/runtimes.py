"""Which runtimes compute a checkpoint: one table, read with the checkpoint's shape and layer kinds alone.

Each row is of one runtime, at the version that it was checked with: the families that gave the logits of transformers,
and rules for checkpoints that do not, each with its reason and the remedy. A checkpoint that no check covers is
reported as not checked. `benchmarks/runtimes.py` makes the checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from secateur.model.layer_pattern import Kinds, follows_period
from secateur.model.shapes import BLOCK, Shape

__all__ = ["Support", "Traits", "check_runtimes", "describe_runtimes"]

UNEVEN = "heads * head_dim is not hidden"
ANY = frozenset({"*"})  #: all traits
_FLOAT_BLOCK = 32  #: weights of a row that every quantisation of llama.cpp takes together


@dataclass(frozen=True)
class Traits:
    """What decides whether a runtime computes a checkpoint.

    Attributes:
        kinds: of its layers (:func:`secateur.model.layer_pattern.layer_kinds`).
        before: the shape that was cut; None where that is not known.
        kinds_before: of the layers that were cut.
        image_text: whether it is the language model within an image-text model, which few runtimes were checked with.
    """

    shape: Shape
    kinds: Kinds = ()
    before: Shape | None = None
    image_text: bool = False
    kinds_before: Kinds = ()

    @property
    def source(self) -> Traits | None:
        """The traits of the model that was cut; None where they are not known."""
        return Traits(self.before, self.kinds_before, self.before, self.image_text) if self.before else None

    @cached_property
    def unusual(self) -> frozenset[str]:
        """Traits that a runtime may not know: ``UNEVEN``, and config keys that switch optional tensors on."""
        shape = self.shape
        return frozenset({*shape.switches, *([UNEVEN] if shape.heads * shape.head_dim != shape.hidden else [])})

    @property
    def breaks_period(self) -> bool:
        """Whether layers have other kinds than the period of the family gives them."""
        period = self.shape.family.pattern
        return bool(period and self.kinds) and not follows_period(self.kinds, period)

    @property
    def rows(self) -> list[int]:
        """The lengths of the rows of the blocks' matrices."""
        return sorted({size[-1] for size in self.shape.linear_sizes().values()})


@dataclass(frozen=True)
class Rule:
    """A reason why a runtime does not compute a checkpoint; ``families`` is empty for all."""

    families: tuple[str, ...]
    applies: Callable[[Traits], bool]
    reason: str
    remedy: str


@dataclass(frozen=True)
class Runtime:
    """A row of the table.

    Attributes:
        version: that it was checked with; empty for one that was not.
        runs: family -> the unusual traits with which it gives the right logits; ``"*"`` stands for every family.
        rules: the first that applies decides, before ``runs``.
        quantises: whether rows of weights are quantised in blocks of 32 or 256.
    """

    name: str
    version: str = ""
    runs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    quantises: bool = False


@dataclass(frozen=True)
class Support:
    """What is known of one runtime and one checkpoint."""

    runtime: str
    version: str
    runs: Literal["yes", "no", "not checked"]
    reason: str = ""  #: of a no or of a limit
    remedy: str = ""  #: what avoids it; fields of a prune request in backticks
    quantisation: str = ""  #: of llama.cpp: ``K-quants``, ``no K-quants`` or ``none``

    def record(self) -> dict[str, Any]:
        """Plain values; empty ones are left out."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value or key == "version"}


_OTHER_WIDTH = "`axes` ffn, or a depth method"
_NO_BIAS = "flap: `options` bias=none"
_BIASES = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias")
_SHAPE = frozenset({UNEVEN})
_PLAIN: frozenset[str] = frozenset()


def _has(*traits: str) -> Callable[[Traits], bool]:
    return lambda facts: any(trait in facts.unusual for trait in traits)


def _off_period(*families: str) -> Rule:
    reason = "layer kinds are derived from layer numbers, so that logits differ without an error"
    return Rule(families, lambda facts: facts.breaks_period, reason, "`keep_pattern`")


def _square_attention(*families: str) -> Rule:
    return Rule(families, _has(UNEVEN), "heads * head_dim is taken for the hidden size", _OTHER_WIDTH)


def _without_biases(*families: str, keys: tuple[str, ...] = _BIASES) -> Rule:
    return Rule(families, _has(*keys), "biases of its linears are not read", _NO_BIAS)


def _of_62_layers(facts: Traits) -> bool:
    """Whether Gemma 3 27B, which llama.cpp knows by its 62 layers, has lost layers or hidden channels."""
    before, after = facts.before, facts.shape
    return before is not None and before.layers == 62 and (before.layers, before.hidden) != (after.layers, after.hidden)


def _unknown(*families: str) -> Rule:
    return Rule(families, lambda _: True, "the family is not known there", "")


RUNTIMES: tuple[Runtime, ...] = (
    Runtime("transformers", "5.23", {"*": ANY}),
    Runtime(
        "llama.cpp",
        "b9190",  # with the converter of llama-cpp-python 0.3.36
        {
            **dict.fromkeys(("llama", "mistral", "internlm3"), ANY),
            **dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3", "ernie4_5", "arcee", "glm4"), _SHAPE),
            **dict.fromkeys(("qwen2", "olmo2", "olmo3", "phi3", "granite"), _PLAIN),
            "seed_oss": frozenset({UNEVEN, "attention_bias"}),
        },
        (
            _off_period(),
            Rule(
                ("gemma3",),
                lambda facts: bool(facts.kinds) and not any(facts.kinds),
                "no layer has full attention, where it stops",
                "keep 6 layers or more",
            ),
            Rule(
                ("gemma3",),
                _of_62_layers,
                "62 layers decide the scale of attention, so that logits differ without an error",
                "`axes` kv,ffn",
            ),
            _square_attention("qwen2", "olmo2", "olmo3", "phi3", "granite", "nemotron"),
            _without_biases("qwen3", "gemma", "gemma2", "gemma3", "olmo2", "ernie4_5", "arcee"),
            _without_biases("seed_oss", keys=("attention_out_bias", "mlp_bias")),
            _unknown("helium", "ministral"),
        ),
        quantises=True,
    ),
    Runtime(
        "mlx-lm",
        "0.32.2",
        {
            **dict.fromkeys(("llama", "mistral", "olmo2", "olmo3", "seed_oss", "ernie4_5"), ANY),
            **dict.fromkeys(("qwen3", "gemma", "gemma3", "glm4", "nemotron"), _SHAPE),
            **dict.fromkeys(("qwen2", "phi3", "granite", "internlm3", "helium", "cohere2", "phi"), _PLAIN),
        },
        (
            _off_period("gemma3", "cohere2"),
            _square_attention("qwen2", "phi3", "granite", "internlm3", "cohere2", "phi"),
            _without_biases("qwen3", "gemma", "gemma3"),
            _unknown("arcee", "ministral"),
        ),
    ),
    Runtime("vLLM"),
    Runtime(  # it runs what torch.onnx traces, so that traits make no difference
        "ONNX Runtime",
        "1.32",
        dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3", "olmo2", "phi3"), ANY),
    ),
    Runtime(
        "CTranslate2",
        "4.8.5",
        {
            **dict.fromkeys(("llama", "qwen2"), _PLAIN),
            **dict.fromkeys(("mistral", "qwen3"), ANY),
            "gemma": _SHAPE,
        },
        (
            Rule(
                ("llama", "qwen2"), _has(UNEVEN), "head_dim is not read, and hidden / heads taken for it", _OTHER_WIDTH
            ),
            _without_biases("gemma"),
            _unknown(
                *("olmo2", "olmo3", "exaone4", "granite", "ministral", "ministral3", "seed_oss", "internlm3"),
                *("helium", "ernie4_5", "arcee", "cohere2", "hunyuan_v1_dense", "glm4", "nemotron"),
            ),
        ),
    ),
)

_ZEROS = (
    "zeros are for research: they are stored and multiplied as any weight, dense runtimes gain nothing (1.0x, "
    "measured), and vLLM, torchao and llm-compressor have removed their 2:4 kernels"
)


def check_runtimes(traits: Traits) -> tuple[Support, ...]:
    """Read the table: one entry for each runtime."""
    return tuple(_check(runtime, traits) for runtime in RUNTIMES)


def describe_runtimes(supports: Sequence[Support], *, sparse: bool) -> str:
    """Describe where a checkpoint runs in one line; ``sparse``: with what its zeros are worth."""
    titles = {s: f"{s.runtime} {s.version}".strip() for s in supports}
    reasons: dict[str, list[str]] = {}
    for support in supports:
        if support.runs == "no":
            reasons.setdefault(f"{support.reason}{_instead(support)}", []).append(titles[support])
    unchecked = [s.runtime for s in supports if s.runs == "not checked"]
    parts = [
        ", ".join(titles[s] + _limits(s) for s in supports if s.runs == "yes"),
        *(f"not in {' and '.join(names)} ({reason})" for reason, names in reasons.items()),
        *([f"not checked: {', '.join(unchecked)}"] if unchecked else []),
        *([_ZEROS] if sparse else []),
    ]
    return "; ".join(parts)


def _check(runtime: Runtime, traits: Traits) -> Support:
    name = traits.shape.family.name
    for rule in runtime.rules:
        if (not rule.families or name in rule.families) and rule.applies(traits):
            remedy = "" if traits.source and rule.applies(traits.source) else rule.remedy  # no option undoes the source
            return Support(runtime.name, runtime.version, "no", rule.reason, remedy)
    checked = runtime.runs.get("*") if traits.image_text else runtime.runs.get(name, runtime.runs.get("*"))
    if checked is None or not (checked is ANY or traits.unusual <= checked):
        return Support(runtime.name, runtime.version, "not checked")
    return Support(runtime.name, runtime.version, "yes", *(_quantisation(traits) if runtime.quantises else ()))


def _quantisation(traits: Traits) -> tuple[str, str, str]:
    """Reason, remedy and name of the limit that row lengths set to llama.cpp's quantisation."""
    shape, before = traits.shape, traits.before
    cut = [size for name in ("hidden", "ffn") if (size := getattr(shape, name)) != getattr(before, name, None)]
    for block, name in ((_FLOAT_BLOCK, "none"), (BLOCK, "no K-quants")):
        rows = [row for row in traits.rows if row % block]
        if rows:
            remedy = f"`step` {BLOCK}" if any(size in rows and size > BLOCK for size in cut) else ""
            return f"rows of {', '.join(map(str, rows))} weights are no multiples of {block}", remedy, name
    return "", "", "K-quants"


def _limits(support: Support) -> str:
    if not support.quantisation:
        return ""
    kind = {"none": "no quantisation"}.get(support.quantisation, support.quantisation)
    return f" ({kind}: {support.reason}{_instead(support)})" if support.reason else f" ({kind})"


def _instead(support: Support) -> str:
    return f"; instead: {support.remedy}" if support.remedy else ""
