"""What a study file may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from secateur.data.corpus import CorpusSpec
from secateur.errors import UserError, did_you_mean
from secateur.methods import LearnedMethod, get_method, known_methods
from secateur.shapes import Shape
from secateur.spec import Count, Fraction, Positive, load_yaml, parse, spec
from secateur.train.optim import Recipe

__all__ = ["Calibrate", "Measure", "Parent", "Retrain", "Setting", "Study", "load_study"]

Setting = Literal["equal_training_tokens", "equal_total_tokens"]


def _known_method(name: str) -> str:
    if name not in known_methods():
        raise ValueError(f"{name!r} is not a known method{did_you_mean(name, known_methods())}")
    return name


@spec
class Parent:
    """The model that is pretrained, then pruned: a Llama of this shape."""

    tokens: Count  #: P
    hidden: Positive
    ffn: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive | None = None  #: hidden / heads unless given
    tied: bool = False

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise UserError(f"parent.hidden: {self.hidden} is no multiple of parent.heads {self.heads}")
        if self.heads % self.kv_heads:
            raise UserError(f"parent.heads: {self.heads} is no multiple of parent.kv_heads {self.kv_heads}")

    def shape(self, vocabulary: int) -> Shape:
        """The model's sizes."""
        head_dim = self.head_dim or self.hidden // self.heads
        return Shape(self.hidden, self.ffn, self.layers, self.heads, self.kv_heads, head_dim, vocabulary, self.tied)


@spec
class Retrain:
    """The training of pruned models. Their from-scratch twins see the same tokens under the study's recipe."""

    tokens: Count  #: R
    peak_rate: Annotated[float, Field(gt=0)] | None = None  #: of the pruned runs; the recipe's unless given


@spec
class Calibrate:
    """What pruning scores are computed on: windows of the parent's own training slice."""

    windows: Positive = 128
    seed: int = 42  #: which windows


@spec
class Measure:
    """How held-out loss is measured."""

    windows: Positive = 256  #: of the held-out split, from its start
    points: Positive = 8  #: measurements along each training run


@spec
class Study:
    """A controlled comparison of pruning and training from scratch."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    title: str = ""
    corpus: CorpusSpec
    parent: Parent
    methods: Annotated[tuple[Annotated[str, AfterValidator(_known_method)], ...], Field(min_length=1)]
    ratios: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    retrain: Retrain
    settings: Annotated[tuple[Setting, ...], Field(min_length=1)] = ("equal_training_tokens", "equal_total_tokens")
    calibration: Calibrate = Calibrate()
    recipe: Recipe = Recipe()
    evaluation: Measure = Measure()

    def __post_init__(self) -> None:
        for key in ("methods", "ratios", "settings"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise UserError(f"{key}: an entry appears twice")
        if learned := next((name for name in self.methods if isinstance(get_method(name), LearnedMethod)), None):
            raise UserError(
                f"methods: {learned} learns what to cut in training, which studies do not run yet; leave it out, "
                "and use secateur prune"
            )
        if self.calibration.windows * self.recipe.sequence > self.parent.tokens:
            raise UserError(
                f"calibration.windows: {self.calibration.windows} windows of {self.recipe.sequence} tokens "
                f"are more than parent.tokens {self.parent.tokens}"
            )


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        UserError: if it is missing or says something that cannot be.
    """
    try:
        return parse(Study, load_yaml(path), origin=str(path))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None
