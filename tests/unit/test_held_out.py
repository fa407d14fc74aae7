"""The held-out windows of a study: spread over the split, each with its documents; a sweep's are others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_mixture import NAMES, SEQUENCE, corpus

from secateur.data.domains import evenly_spaced
from secateur.data.shards import TokenStore
from secateur.errors import UserError
from secateur.evaluation.loss import Protocol
from secateur.study.stages.inputs import holdout_protocol


def starts(store: TokenStore, protocol: Protocol) -> list[int]:
    """Where in the split each whole window lies."""
    every = store.read("heldout", 0, store.tokens("heldout"))
    count = len(every) // SEQUENCE
    at = {tuple(every[i * SEQUENCE : (i + 1) * SEQUENCE].tolist()): i for i in range(count)}
    assert len(at) == count  # no two alike
    return [at[tuple(window.tolist())] for window in protocol.windows[0]]


@pytest.mark.parametrize(("count", "of"), [(1, 1), (3, 10), (10, 3), (7, 7), (5, 1000)])
def test_spread_is_even(count: int, of: int) -> None:
    found = evenly_spaced(count, of)
    assert len(found) == min(count, of)
    assert found[0] == 0
    assert found[-1] < of
    gaps = np.diff([*found, of])
    assert gaps.max() - gaps.min() <= 1


def test_windows_are_spread_over_the_split(tmp_path: Path) -> None:
    store = corpus(tmp_path)
    count = store.tokens("heldout") // SEQUENCE
    found = starts(store, holdout_protocol(store, 10, SEQUENCE))
    assert found == [i * count // 10 for i in range(10)]


def test_each_token_knows_its_document_and_domain(tmp_path: Path) -> None:
    store = corpus(tmp_path)
    protocol = holdout_protocol(store, 10, SEQUENCE)
    offsets = store.offsets("heldout")
    seen: dict[int, int] = {}
    for number, window in zip(starts(store, protocol), protocol.documents[0], strict=True):
        for place, document in enumerate(window.tolist()):
            true = int(np.searchsorted(offsets, number * SEQUENCE + place, side="right")) - 1
            assert seen.setdefault(document, true) == true
            domain = int(store.domains_of("heldout", range(true, true + 1))[0])
            assert protocol.domains[document] == NAMES[domain]
    assert len(set(seen.values())) == len(seen) == len(protocol.domains)


def test_a_short_split_is_taken_whole(tmp_path: Path) -> None:
    store = corpus(tmp_path)
    protocol = holdout_protocol(store, 10_000, SEQUENCE)
    total = store.tokens("heldout")
    assert sum(part.numel() for part in protocol.windows) == total
    assert protocol.windows[-1].shape[1] == total % SEQUENCE


@pytest.mark.parametrize(("final", "chosen"), [(10, 5), (40, 40), (3, 1000)])
def test_a_sweep_chooses_on_windows_that_no_final_figure_uses(tmp_path: Path, final: int, chosen: int) -> None:
    store = corpus(tmp_path)
    ours = starts(store, holdout_protocol(store, final, SEQUENCE))
    theirs = starts(store, holdout_protocol(store, chosen, SEQUENCE, skip=final))
    assert theirs
    assert not set(ours) & set(theirs)
    count = store.tokens("heldout") // SEQUENCE
    assert len(theirs) == min(chosen, count - final)


def test_no_window_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to predict"):
        holdout_protocol(corpus(tmp_path), 4, SEQUENCE, skip=10_000)
