"""Distillation: a student learns a teacher's distribution over the next token (arXiv:1503.02531).

The teacher reads what the student reads, without gradients, and each chunk of tokens is compared at once (see
:mod:`secateur.losses.kl`). The two may differ in every size but the vocabulary, and in their family.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.data.tokenizer import load_tokenizer
from secateur.errors import UserError
from secateur.losses.kl import summed_divergence
from secateur.losses.next_token import readout
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.model.shapes import Shape
from secateur.training.objective import BatchLosses, LanguageModel
from secateur.training.recipe import Distill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Distillation", "check_teacher"]

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  #: files that say which token has which id


class Distillation(LanguageModel):
    """The divergence from a teacher, and the language-model loss as far as ``alpha`` leaves room for it.

    In evaluation mode it is the language-model loss alone, and the teacher is not asked.

    Args:
        spec: temperature, share and categories.
        teacher: with the student's vocabulary, placed (:func:`secateur.training.parallel.place_teacher`). It is a part
            of the objective, so that FSDP gathers its blocks ahead; it is neither trained nor saved.
    """

    def __init__(self, spec: Distill, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.spec = spec
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Distillation:
        """The teacher stays in evaluation mode: its dropout would blur what is to be learned."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, model: PreTrainedModel, ids: Tensor, positions: Tensor | None, targets: Tensor | None
    ) -> BatchLosses:
        """Losses in nats; in training those of :func:`secateur.losses.kl.summed_divergence`."""
        if not self.training:
            return super().forward(model, ids, positions, targets)
        targets = ids[:, 1:] if targets is None else targets
        from torch.distributed.fsdp import FSDPModule  # takes a second, which reading a study file does not have

        spread = self.teacher if isinstance(self.teacher, FSDPModule) else None
        if spread is not None:
            # Embedding and head are read apart from a forward pass of the whole model, which would gather them.
            spread.unshard()
        with torch.no_grad():
            taught = readout(self.teacher, ids, positions)
        total, each = summed_divergence(
            readout(model, ids, positions),
            taught,
            targets.flatten(),
            temperature=self.spec.temperature,
            alpha=self.spec.alpha,
            top_k=self.spec.top_k,
        )
        if spread is not None:
            spread.reshard()
        return BatchLosses(total, each.view(targets.shape))


def check_teacher(teacher: Checkpoint, student: Shape, directory: Path, sequence: int) -> None:
    """Check that a teacher can teach a student.

    Args:
        teacher: the checkpoint.
        student: its shape.
        directory: where the student's tokenizer lies, if it has one.
        sequence: tokens in a window.

    Raises:
        UserError: if the vocabularies differ in size, or in their tokens where both have a tokenizer; or if a window
            is longer than the teacher's positions.
    """
    where = f"teacher {teacher.directory}"
    if teacher.shape.vocabulary != student.vocabulary:
        raise UserError(
            f"{where}: its vocabulary is {teacher.shape.vocabulary}, the student's {student.vocabulary}; name a "
            "teacher with the student's vocabulary, such as the model that the student was pruned from"
        )
    limit = max_positions(teacher.config)
    if limit and sequence > limit:
        raise UserError(f"{where}: it has {limit} positions, fewer than sequence={sequence}; set sequence={limit}")
    if not _same_tokens(teacher.directory, directory):
        raise UserError(
            f"{where}: its tokenizer and that of {directory} give an id to different tokens; name a teacher with the "
            "student's tokenizer"
        )


def _same_tokens(one: Path, other: Path) -> bool:
    """Whether two tokenizers have the same token for each id, so that a model of the one can read ids of the other.

    How text is cut into tokens does not matter. A directory without a tokenizer goes with any.
    """
    if not all(any((folder / name).is_file() for name in _VOCABULARIES) for folder in (one, other)):
        return True
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    return load_tokenizer(one).get_vocab() == load_tokenizer(other).get_vocab()
