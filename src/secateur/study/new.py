"""A new study file from a parent, a corpus, methods and a budget of hours."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from secateur.config import AnyPath, Positive, spec
from secateur.errors import UserError
from secateur.files import read_json, write_text
from secateur.formatting import duration, scientific
from secateur.methods.registry import get_method
from secateur.study.plan import FLOPS_PER_SECOND, StudyPlan
from secateur.study.session import Study

__all__ = ["NewStudy", "write_study"]

#: hidden size, layers, heads, key-value heads and vocabulary of the parents to choose from, small to large
_PARENTS = (
    (40, 6, 2, 1, 512),
    (64, 6, 2, 1, 1024),
    (128, 6, 4, 2, 2048),
    (192, 8, 6, 2, 4096),
    (256, 8, 8, 4, 4096),
    (384, 10, 12, 4, 8192),
    (512, 12, 16, 4, 8192),
    (768, 14, 12, 3, 8192),
)
_PER_PARAMETER = 26  # tokens of a parent, as in the published study
_STEPS = 200  # of retraining, where the budget allows
_MOST_TOKENS_PER_STEP = 131_072
_TEMPLATE = """\
# Written by `secateur study new`. Keys that are not here have their defaults: see docs/study-files.md.
#   secateur study plan {{ file }}     what will run, with tokens and FLOPs
#   secateur study run {{ file }}      run it; run again after a kill, it resumes
name: {{ name }}

question: # declared before the first stage; these comparisons decide, all others are exploratory
  ask: At equal {{ equal }} tokens, is pruning and retraining below training from scratch?
  comparisons: equal_{{ equal }}_tokens
  margin: 0.02 # nats per token that count as equal

corpus:
  source: {{ corpus }} # stdlib, python, text:PATH, shards:PATH or hf:NAME[:config]
{% if not checkpoint %}
  vocabulary: {{ vocabulary }} # of the tokenizer that is trained on the training documents
{% endif %}

parent:
{% if checkpoint %}
  checkpoint: {{ checkpoint }}
{% else %}
  # pretrained by the study on {{ per_parameter }} tokens for each of its parameters: the largest that the budget allows
  tokens: {{ parent_tokens }}
  hidden: {{ hidden }}
  ffn: {{ ffn }}
  layers: {{ layers }}
  heads: {{ heads }}
  kv_heads: {{ kv_heads }}
  tied: true
{% endif %}

methods: [{{ methods|join(", ") }}]
ratios: [{{ ratio }}] # share of the parameters to remove
retrain:
  tokens: {{ retrain_tokens }} # R, by the budget of {{ hours }} h
settings: [equal_training_tokens{{ "" if checkpoint else ", equal_total_tokens" }}]
seeds: [{{ seeds|join(", ") }}]{{ " # one seed says nothing of the noise of training" if seeds|length == 1 }}

recipe:
  sequence: {{ sequence }}
  tokens_per_step: {{ tokens_per_step }}
  micro_batch: {{ micro_batch }} # execution only: lower it if memory runs out
  peak_rate: {{ peak_rate }} # see `sweep` to choose it by trials
{% if not checkpoint %}
  init: {std: {{ std }}}
{% endif %}

evaluation:
  windows: 256 # held out
  points: 5
"""


@spec
class NewStudy:
    """What a new study file is made from.

    Attributes:
        file: where to write it.
        checkpoint: the parent: a folder, or None for a parent that the study pretrains.
        corpus: source of the text, as ``corpus.source`` of a study file.
        hours: of all devices together, for the whole study.
        flops_per_second: of training on this machine.
    """

    file: AnyPath
    checkpoint: str | None = None
    corpus: str = "python"
    methods: tuple[str, ...] = ("minitron-depth", "minitron-width", "wanda")
    ratio: float = 0.5
    hours: float = 1.0
    seeds: Positive = 1
    flops_per_second: float = FLOPS_PER_SECOND

    def __post_init__(self) -> None:
        path = Path(self.file)
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"`file`: must end in .yaml, got {path}")
        if path.exists():
            raise UserError(f"`file`: {path} exists; choose another name")
        if not 0 < self.ratio < 1:
            raise UserError(f"`ratio`: must be between 0 and 1, got {self.ratio:g}")
        if self.hours <= 0 or self.flops_per_second <= 0:
            raise UserError("`hours` and `flops_per_second`: must be above 0")
        if not self.methods:
            raise UserError("`methods`: name at least one, such as wanda")
        for method in self.methods:
            get_method(method, {})

    @property
    def budget(self) -> float:
        """FLOPs of the whole study."""
        return self.hours * 3600 * self.flops_per_second


def write_study(request: NewStudy) -> tuple[str, StudyPlan]:
    """Write the largest study within the budget; return its text and its plan.

    Raises:
        UserError: if even the smallest study needs more, or a file of the parent cannot be read.
    """
    make = _with_checkpoint if request.checkpoint else _with_own_parent
    fields = make(request)
    text, plan = _render(request, fields), _plan(request, fields)
    if plan.flops > 1.02 * request.budget:
        raise UserError(
            f"`hours`: the smallest study takes {duration(plan.flops / request.flops_per_second)} at "
            f"{scientific(request.flops_per_second)} FLOPs a second; allow more"
        )
    write_text(Path(request.file), text)
    return text, plan


def _with_checkpoint(request: NewStudy) -> dict[str, Any]:
    """Retraining tokens that use up the budget: the FLOPs of a study are linear in them."""
    sequence = _sequence(Path(str(request.checkpoint)))
    low, high = 64 * sequence, 128 * sequence
    base = {"sequence": sequence, "micro_batch": 8, "peak_rate": 1e-4}
    costs = [_plan(request, base | _retraining(tokens, sequence)).flops for tokens in (low, high)]
    slope = (costs[1] - costs[0]) / (high - low)
    tokens = int((request.budget - (costs[0] - slope * low)) / slope)
    return base | _retraining(max(tokens, low), sequence)


def _sequence(checkpoint: Path) -> int:
    """Tokens of a sequence: 512, or the positions of a checkpoint in a folder if they are fewer."""
    config = read_json(checkpoint / "config.json") if checkpoint.is_dir() else {}
    return min(512, int(config.get("max_position_embeddings") or 512))


def _with_own_parent(request: NewStudy) -> dict[str, Any]:
    """The largest parent whose study fits, retrained on a quarter of its tokens."""
    fields: dict[str, Any] = {}
    for number, (hidden, layers, heads, kv_heads, vocabulary) in enumerate(_PARENTS):
        sequence = 128 if hidden < 192 else 512
        ffn = 8 * round(hidden / 3)
        linears = layers * (hidden * hidden * (2 + 2 * kv_heads / heads) + 3 * hidden * ffn)
        retraining = _retraining(int(_PER_PARAMETER * (linears + vocabulary * hidden) / 4), sequence)
        candidate = retraining | {
            "parent_tokens": 4 * retraining["retrain_tokens"],
            "per_parameter": _PER_PARAMETER,
            "hidden": hidden,
            "ffn": ffn,
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "vocabulary": vocabulary,
            "sequence": sequence,
            "micro_batch": 16,
            "peak_rate": 5e-3 if hidden < 192 else 2e-3,
            "std": 0.06 if hidden < 192 else 0.03,
        }
        if number and _plan(request, candidate).flops > request.budget:
            break
        fields = candidate
    return fields


def _retraining(tokens: int, sequence: int) -> dict[str, int]:
    """R in whole steps, and the size of a step."""
    step = sequence * max(1, min(tokens // _STEPS, _MOST_TOKENS_PER_STEP) // sequence)
    return {"retrain_tokens": max(1, tokens // step) * step, "tokens_per_step": step}


def _render(request: NewStudy, fields: dict[str, Any]) -> str:
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    path = Path(request.file)
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in path.stem.lower()).lstrip("._-") or "study"
    checkpoint = request.checkpoint
    if checkpoint and Path(checkpoint).is_dir():
        checkpoint = str(Path(checkpoint).resolve())
    words: dict[str, Any] = {
        "file": path,
        "name": name,
        "checkpoint": checkpoint,
        "equal": "training" if checkpoint else "total",
        "corpus": request.corpus,
        "methods": request.methods,
        "ratio": f"{request.ratio:g}",
        "hours": f"{request.hours:g}",
        "seeds": range(request.seeds),
    }
    return environment.from_string(_TEMPLATE).render(words | fields)


def _plan(request: NewStudy, fields: dict[str, Any]) -> StudyPlan:
    """The plan of the study with ``fields``, from a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "study.yaml"
        file.write_text(_render(request, fields), encoding="utf-8")
        return Study.load(file, Path(folder) / "out").plan(request.flops_per_second)
