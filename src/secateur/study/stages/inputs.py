"""Tokens, checkpoints and protocols that stages read from their inputs."""

from __future__ import annotations

from pathlib import Path

from secateur.data.domains import heldout_stream
from secateur.data.shards import TokenStore
from secateur.data.tokenizer import load_tokenizer, missing_row
from secateur.data.tokenizer_match import check_encoded_for
from secateur.errors import UserError
from secateur.evaluation.loss import Protocol
from secateur.formatting import plural
from secateur.hub import is_hub_name
from secateur.model.config_file import read_shape
from secateur.study.stage import Stage
from secateur.study.store import Store

__all__ = ["check_parents", "corpus_tokens", "holdout_protocol", "model_of"]


def corpus_tokens(stage: Stage, store: Store, rows: int | None = None) -> TokenStore:
    """Open the tokens of the study's corpus.

    Args:
        rows: of the embedding of the model that reads them; None where an input of the stage has read them.

    Raises:
        UserError: if the corpus is too short for the stage's slice, or has an id without a row.
    """
    tokens = TokenStore(store.folder(stage.inputs["corpus"]))
    if rows is not None and tokens.vocabulary > rows and tokens.largest_id >= rows:
        reason = missing_row(tokens.largest_id, rows, load_tokenizer(tokens.tokenizer))
        raise UserError(f"the corpus does not fit {stage.name}: {reason}")
    _, stop = stage.identity.get("slice", (0, 0))
    if tokens.tokens("train") < stop:
        raise UserError(
            f"the corpus has {plural(tokens.tokens('train'), 'training token')}, but the budgets need {stop:,}; "
            "give more text, or lower parent.tokens or retrain.tokens"
        )
    return tokens


def model_of(stage: Stage, store: Store, role: str = "model") -> Path:
    """The checkpoint directory of an input."""
    return store.folder(stage.inputs[role]) / "model"


def check_parents(stage: Stage, store: Store, sequence: int) -> None:
    """Refuse an existing checkpoint among the inputs that is too short for the windows, or has another tokenizer.

    What is on this machine is checked when the study is planned; here those follow that a run fetches from the Hub.

    Raises:
        UserError: naming the key and the positions, or what differs.
    """
    corpus = stage.inputs.get("corpus")
    fetches_tokenizer = corpus is not None and is_hub_name(corpus.identity["tokenizer"] or "")
    for source in stage.inputs.values():
        name = source.runtime["checkpoint"] if source.kind == "fetch" else ""
        if not name or not (is_hub_name(name) or fetches_tokenizer):
            continue
        directory = store.folder(source) / "model"
        limit = read_shape(directory / "config.json")[1]
        if limit and sequence > limit:
            raise UserError(
                f"recipe.sequence: is {sequence}, but {name} has {limit} positions; set recipe.sequence: {limit}"
            )
        if corpus is not None:
            encoder = TokenStore(store.folder(corpus)).tokenizer
            remedy = f"set corpus.tokenizer: {name}"
            check_encoded_for(directory, encoder, "the corpus", "corpus.tokenizer", name=name, remedy=remedy)


def holdout_protocol(tokens: TokenStore, windows: int, seqlen: int, skip: int = 0) -> Protocol:
    """The held-out windows that losses are measured on (:func:`secateur.data.domains.heldout_stream`).

    Args:
        windows: number of windows; the whole split if it has fewer.
        skip: exclude the windows that a protocol of ``skip`` windows would take.

    Raises:
        UserError: if the split has no window.
    """
    return Protocol.of_stream(heldout_stream(tokens, windows, seqlen, skip), seqlen, "held-out documents")
