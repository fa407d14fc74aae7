"""What a study's existing checkpoints allow: windows within their positions, and ids of their own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from secateur.data.tokenizer_match import check_encoded_for, has_tokenizer
from secateur.errors import UserError
from secateur.hub import is_hub_name
from secateur.study.resolve import SHARDS, ResolvedParent
from secateur.study.spec import StudySpec

__all__ = ["check_positions", "check_tokenizers", "clip_sequence"]


def clip_sequence(study: StudySpec, parents: Mapping[str, ResolvedParent]) -> tuple[StudySpec, str | None]:
    """Shorten the default ``recipe.sequence`` to the positions of local checkpoints.

    Returns:
        The study, and a sentence that says so; None where the default fits. The length is a power of two, so that it
        divides ``tokens_per_step``. Positions of a model of the Hub do not count: whether they are known depends on
        the cache, and the identity of a study must not.
    """
    local = {name: p for name, p in study.all_parents.items() if p.checkpoint and not is_hub_name(p.checkpoint)}
    limits = {name: limit for name in local if (limit := parents[name].positions)}
    default = study.recipe.sequence
    if not limits or min(limits.values()) >= default:
        return study, None
    name = min(limits, key=lambda name: limits[name])
    length = 1 << (limits[name].bit_length() - 1)
    note = (
        f"recipe.sequence: {length} instead of the default {default}, since {local[name].checkpoint} has "
        f"{limits[name]} positions"
    )
    return replace(study, recipe=replace(study.recipe, sequence=length)), note


def check_positions(study: StudySpec, parents: Mapping[str, ResolvedParent]) -> None:
    """Refuse windows that are longer than a checkpoint's positions, where these are known.

    Raises:
        UserError: naming the key and the positions.
    """
    windows = {"recipe.sequence": (study.recipe.sequence, tuple(study.all_parents))}
    if study.calibration.seqlen:
        windows["calibration.seqlen"] = (study.calibration.seqlen, tuple(study.all_parents))
    for number, entry in enumerate(study.methods):
        if entry.calibration and entry.calibration.seqlen:
            windows[f"methods[{number}].calibration.seqlen"] = (entry.calibration.seqlen, (study.parent_of(entry),))
    for key, (length, names) in windows.items():
        for name in names:
            limit = parents[name].positions
            if limit and length > limit:
                checkpoint = study.all_parents[name].checkpoint
                raise UserError(f"{key}: is {length}, but {checkpoint} has {limit} positions; set {key}: {limit}")


def check_tokenizers(study: StudySpec) -> None:
    """Refuse a corpus whose ids mean something else to a local checkpoint; those of the Hub are checked when they run.

    Raises:
        UserError: naming the key and the difference.
    """
    corpus = study.text
    for name, parent in study.all_parents.items():
        if parent.checkpoint is None or is_hub_name(parent.checkpoint):
            continue
        directory = Path(parent.checkpoint)
        remedy = f"set corpus.tokenizer: {directory}"
        if corpus.source.startswith(SHARDS):
            encoder = Path(corpus.source.removeprefix(SHARDS)) / "tokenizer"
            check_encoded_for(directory, encoder, corpus.source, "corpus.source")
        elif corpus.tokenizer is None:
            if has_tokenizer(directory):
                key = "parent" if study.parent else f"parents.{name}"
                raise UserError(
                    f"corpus.tokenizer: the corpus gets a tokenizer of its own, but {key}.checkpoint, {directory}, has "
                    f"another; {remedy}"
                )
        elif not is_hub_name(corpus.tokenizer) and Path(corpus.tokenizer).resolve() != directory.resolve():
            source = f"text of {corpus.tokenizer}"
            check_encoded_for(directory, Path(corpus.tokenizer), source, "corpus.tokenizer", remedy=remedy)
