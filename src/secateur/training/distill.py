"""Distillation: a student learns a teacher's distribution over the next token (arXiv:1503.02531).

The teacher reads the same tokens without gradients, and the two are compared in chunks of tokens
(:mod:`secateur.losses.kl`). They may differ in family and in every size but the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.config import fingerprint
from secateur.data.tokenizer import load_tokenizer
from secateur.data.tokenizer_match import has_tokenizer
from secateur.errors import UserError
from secateur.losses.kl import summed_divergence
from secateur.losses.next_token import Readout, readout
from secateur.losses.top_k import TopK
from secateur.model.checkpoint import Checkpoint, max_positions
from secateur.model.shapes import Shape
from secateur.training.batches import Slice
from secateur.training.objective import BatchLosses, LanguageModel
from secateur.training.recipe import Distill
from secateur.training.teacher_logits import TeacherLogits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Distillation", "LogitsDistillation", "check_logits", "check_teacher", "frozen_readout", "tokens_hash"]


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
        with frozen_readout(self.teacher, ids, positions) as teacher:
            total, each = divergence(self.spec, readout(model, ids, positions), teacher, targets)
        return BatchLosses(total, each)


class LogitsDistillation(LanguageModel):
    """The loss of :class:`Distillation` from a teacher's saved log-probabilities, which come with each batch.

    In evaluation mode it is the language-model loss alone.

    Args:
        spec: its temperature is that of the log-probabilities.
    """

    def __init__(self, spec: Distill) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        positions: Tensor | None,
        targets: Tensor | None,
        teacher: TopK | None = None,
    ) -> BatchLosses:
        """Losses in nats; in training those of :func:`secateur.losses.kl.summed_divergence`."""
        if not self.training:
            return super().forward(model, ids, positions, targets)
        assert teacher is not None, "batches of this objective have a teacher's distribution"
        targets = ids[:, 1:] if targets is None else targets
        return BatchLosses(*divergence(self.spec, readout(model, ids, positions), teacher, targets))


def divergence(spec: Distill, student: Readout, teacher: Readout | TopK, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of a batch's losses, and the loss of each target, of the size of ``targets`` [windows, positions - 1]."""
    options = {"temperature": spec.temperature, "alpha": spec.alpha, "top_k": spec.top_k}
    total, each = summed_divergence(student, teacher, targets.flatten(), **options)
    return total, each.view(targets.shape)


@contextlib.contextmanager
def frozen_readout(teacher: PreTrainedModel, ids: Tensor, positions: Tensor | None) -> Iterator[Readout]:
    """Yield the factors of a teacher's logits, without gradients; gathered if the teacher is sharded."""
    from torch.distributed.fsdp import (
        FSDPModule,
    )  # imported late: it takes a second, and study files import this module

    sharded = teacher if isinstance(teacher, FSDPModule) else None
    if sharded is not None:
        # Embedding and head are used outside the forward pass of the whole model, which would gather them.
        sharded.unshard()
    with torch.no_grad():
        factors = readout(teacher, ids, positions)
    yield factors
    if sharded is not None:
        sharded.reshard()


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


def check_logits(
    logits: TeacherLogits, spec: Distill, data: Slice, corpus: str, student: Shape, directory: Path
) -> None:
    """Check that a teacher's saved log-probabilities are those of a run's windows and of its student's vocabulary.

    Args:
        data: the tokens of the run; their windows may come in any order.
        corpus: fingerprint of the token shards.
        directory: folder of the student's tokenizer, which may be missing.

    Raises:
        UserError: at the first difference, or if a shard is missing or damaged.
    """
    saved, recipe = logits.manifest, data.recipe
    where, again = f"`teacher` {logits.folder}", "save them again with `secateur teach`"
    if saved.vocabulary != student.vocabulary:
        raise UserError(f"{where}: its vocabulary is {saved.vocabulary}, the student's {student.vocabulary}; {again}")
    tokens = tokens_hash(directory)
    if None not in (tokens, saved.tokens_sha256) and tokens != saved.tokens_sha256:
        raise UserError(
            f"{where}: the teacher's tokenizer and that of {directory} have different tokens under one id; save those "
            "of a teacher with the student's tokenizer"
        )
    if saved.corpus != corpus:
        raise UserError(f"{where}: was saved on other token shards; name those with `data`, or {again} on these")
    for name, value, expected in (
        ("sequence", saved.sequence, recipe.sequence),
        ("attention", saved.attention, recipe.attention),
    ):
        if value != expected:
            raise UserError(f"{where}: was saved with {name}={value}, not {expected}; set {name}={value}, or {again}")
    if not saved.first <= data.start < data.stop <= saved.stop:
        raise UserError(
            f"{where}: has tokens {saved.first:,} to {saved.stop:,}, but the run reads {data.start:,} to "
            f"{data.stop:,}; choose a slice within them, or {again}"
        )
    if (data.start - saved.first) % saved.sequence:
        raise UserError(
            f"{where}: its windows begin at token {saved.first:,}, one every {saved.sequence} tokens, and none at "
            f"{data.start:,}; begin the run at one of them, or {again}"
        )
    if saved.temperature != spec.temperature:
        raise UserError(
            f"{where}: was saved at temperature {saved.temperature:g}, not {spec.temperature:g}, and what remains of a "
            f"distribution cannot be softened afterwards; set temperature={saved.temperature:g}, or {again}"
        )
    if spec.top_k is not None and spec.top_k > saved.top_k:
        raise UserError(
            f"{where}: has the likeliest {saved.top_k} ids, fewer than top_k={spec.top_k}; lower it, or {again}"
        )
    logits.verify(data.start, data.stop)


def tokens_hash(directory: Path) -> str | None:
    """SHA-256 of a tokenizer's tokens with their ids, in hexadecimal; None without a tokenizer."""
    return fingerprint(load_tokenizer(directory).get_vocab()) if has_tokenizer(directory) else None


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
