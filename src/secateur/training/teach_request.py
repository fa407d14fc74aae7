"""What a teacher saves of its predictions, and how: the request that Python and the command line share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from secateur.config import AnyPath, Count, Offset, Positive, spec
from secateur.errors import UserError
from secateur.training.recipe import Recipe

__all__ = ["TeachRequest"]


@spec
class TeachRequest:
    """Log-probabilities of a teacher to save, for training without it.

    Attributes:
        teacher: a checkpoint directory, a Hub name, or an earlier result.
        data: token shards, as ``secateur data`` writes them: ``shards:DIR``, or the folder alone.
        out: new directory to write.
        tokens: tokens of the data to read; None for all behind ``skip``.
        skip: tokens of the data to leave out before the first.
        top_k: likeliest ids to save at each position; the mass of all others is saved as one number.
        temperature: of the distribution; a student that is trained on it must use the same.
        sequence: tokens in a window, as in the recipe of the student.
        attention: how far attention reaches back, as in the recipe of the student.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of the forward pass; probabilities are float32.
        batch: windows at once in a process; None to suit the device.
        replicas: groups of processes that each hold the teacher.

    Raises:
        UserError: if a field is out of range.
    """

    teacher: Any
    data: Any
    out: AnyPath
    tokens: Count | None = None
    skip: Offset = 0
    top_k: Positive = 64
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    sequence: Annotated[int, Field(ge=2)] = Recipe.sequence
    attention: Literal["window", "document"] = "window"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch: Positive | None = None
    replicas: Positive = 1

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 2:
            raise UserError("`tokens`: one token predicts nothing; read two or more")
        name = str(self.data)
        object.__setattr__(self, "data", name if ":" in name else f"shards:{name}")
