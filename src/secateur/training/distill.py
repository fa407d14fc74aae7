"""Distillation: a student learns a teacher's distribution over the next token (arXiv:1503.02531).

The teacher reads the same tokens without gradients, and the two are compared in chunks of tokens
(:mod:`secateur.losses.kl`). They may differ in family and in every size but the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.data.tokenizer import load_tokenizer
from secateur.data.tokenizer_match import has_tokenizer
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


class Distillation(LanguageModel):
    """``alpha`` times the divergence from a teacher, plus ``1 - alpha`` times the language-model loss.

    In evaluation mode it is the language-model loss alone, and the teacher does not run.

    Args:
        teacher: a model with the student's vocabulary (:func:`secateur.training.parallel.place_teacher`). As a part of
            the objective FSDP gathers its blocks ahead; it is neither trained nor saved.
    """

    def __init__(self, spec: Distill, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.spec = spec
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Distillation:
        """Set the mode of the objective; the teacher stays in evaluation mode, without dropout."""
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
        from torch.distributed.fsdp import (
            FSDPModule,
        )  # imported late: it takes a second, and study files import this module

        sharded = self.teacher if isinstance(self.teacher, FSDPModule) else None
        if sharded is not None:
            # Embedding and head are used outside the forward pass of the whole model, which would gather them.
            sharded.unshard()
        with torch.no_grad():
            teacher_readout = readout(self.teacher, ids, positions)
        total, each = summed_divergence(
            readout(model, ids, positions),
            teacher_readout,
            targets.flatten(),
            temperature=self.spec.temperature,
            alpha=self.spec.alpha,
            top_k=self.spec.top_k,
        )
        if sharded is not None:
            sharded.reshard()
        return BatchLosses(total, each.view(targets.shape))


def check_teacher(teacher: Checkpoint, student: Shape, directory: Path, sequence: int) -> None:
    """Check that a teacher can teach a student.

    Args:
        directory: folder of the student's tokenizer, which may be missing.

    Raises:
        UserError: if the vocabularies differ in size, or in their tokens where both have a tokenizer; or if a window
            is longer than the teacher's positions.
    """
    where = f"`teacher` {teacher.directory}"
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
            f"{where}: its tokenizer and that of {directory} have different tokens under one id; name a teacher with "
            "the student's tokenizer"
        )


def _same_tokens(first: Path, second: Path) -> bool:
    """Whether two tokenizers have the same token for each id, whatever their rules for cutting text.

    A directory without a tokenizer matches any.
    """
    if not (has_tokenizer(first) and has_tokenizer(second)):
        return True
    files = [folder / "tokenizer.json" for folder in (first, second)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    return load_tokenizer(first).get_vocab() == load_tokenizer(second).get_vocab()
