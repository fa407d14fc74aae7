"""Documents of held-out windows, for records of older versions that name none."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.errors import RunError, UserError
from secateur.files import read_json, write_json
from secateur.progress import notify
from secateur.study.stage import Stage
from secateur.study.store import Store

if TYPE_CHECKING:
    from secateur.data.shards import TokenStore
    from secateur.evaluation.loss import Protocol

__all__ = ["WindowDocuments", "window_clusters"]

CLUSTERS = "window-documents.json"  #: in the study's folder: protocol's fingerprint -> cluster of each window
_LARGEST_TEXT = 2**30  # bytes; a corpus of more text is not built again for a report


class WindowDocuments:
    """The documents of held-out windows, looked up in the study's corpus.

    Where the corpus is not there any more and its text is local, it is built again in a temporary folder. What was
    found is kept in ``window-documents.json``.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.path = store, store.out / CLUSTERS
        try:
            self.clusters: dict[str, list[int]] = read_json(self.path)
        except UserError:
            self.clusters = {}

    def of(self, stage: Stage, record: Mapping[str, Any]) -> tuple[int, ...]:
        """The cluster of each window of an evaluation; empty if no corpus gives the windows of its protocol.

        Args:
            record: the result of the stage.
        """
        key = record["protocol"]["fingerprint"]
        if key not in self.clusters:
            try:
                self.clusters[key] = list(self._look_up(stage, key))
            except (UserError, RunError, OSError) as error:
                notify(f"the documents of held-out windows are unknown ({error}); each window counts as a document")
                self.clusters[key] = []
            else:
                self._save()
        return tuple(self.clusters[key])

    def _look_up(self, stage: Stage, key: str) -> tuple[int, ...]:
        from secateur.data.shards import TokenStore
        from secateur.study.stages.execute import run_stage

        corpus = stage.inputs["corpus"]
        try:
            return _clusters(TokenStore(self.store.folder(corpus)), stage, key)
        except (UserError, OSError):
            record = self.store.record(corpus)
            if record is None or not _is_local(record):
                raise
        notify("the records name no documents, and the corpus is gone: it is built again to look them up")
        with tempfile.TemporaryDirectory(prefix="corpus-", dir=self.store.out) as folder:
            run_stage(corpus, self.store, Path(folder))
            return _clusters(TokenStore(Path(folder)), stage, key)

    def _save(self) -> None:
        nonempty = {key: clusters for key, clusters in self.clusters.items() if clusters}
        with contextlib.suppress(OSError, UserError):  # a folder that is read only: they are looked up each time
            write_json(self.path, nonempty)


def _is_local(corpus: Mapping[str, Any]) -> bool:
    """Whether a corpus can be built again from text on this machine, in minutes."""
    local = corpus["source"].partition(":")[0] in ("stdlib", "python", "text")
    return local and sum(corpus["bytes"].values()) <= _LARGEST_TEXT


def _clusters(tokens: TokenStore, stage: Stage, key: str) -> tuple[int, ...]:
    from secateur.study.stages.inputs import holdout_protocol

    protocol = holdout_protocol(tokens, stage.identity["windows"], stage.identity["seqlen"])
    if protocol.record()["fingerprint"] != key:
        raise UserError(f"{tokens.folder}: gives other windows than the records")
    return window_clusters(protocol)


def window_clusters(protocol: Protocol) -> tuple[int, ...]:
    """The cluster of each window: windows with predicted tokens of one document share a cluster.

    Windows are in the order of the text, where a document's tokens follow each other, so only neighbours can share one.
    """
    parts = zip(protocol.parts(), protocol.documents, strict=True)
    ends = np.concatenate([numbers[:, [context, -1]].numpy() for (_, context), numbers in parts])
    return tuple(np.cumsum([0, *(ends[1:, 0] != ends[:-1, 1])]).tolist())
