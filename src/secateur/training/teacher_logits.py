"""A teacher's log-probabilities on disk: the k likeliest next ids at each position of a slice, and the remaining mass.

A folder has ``manifest.json``, written last, and shards ``logits-00000.safetensors`` ... of whole windows. A window of
T tokens has T - 1 rows, one for each predicted token. Tensors of a shard, of R rows:

    ids     uint16 or uint32 [R, k]   by falling probability
    top     float32 [R]               log-probability of the first id
    deltas  float16 [R, k - 1]        each further log-probability less the one before it, as that is read back
    rest    float32 [R]               log of the mass of all other ids

Log-probabilities as float16 would be off by up to 0.004 at -10. Neighbours differ by little, so that a delta is rounded
by little; and since each is taken to the value that a reader has, errors do not add up along a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeInt
from safetensors import SafetensorError, safe_open

from secateur import distributed
from secateur.config import RUNTIME, Positive, fingerprint, parse, spec
from secateur.data.manifest import smallest_dtype
from secateur.errors import UserError
from secateur.files import read_json, sha256_file
from secateur.losses.top_k import TopK
from secateur.progress import track
from secateur.training.batches import Span

__all__ = [
    "MANIFEST",
    "LogitsManifest",
    "LogitsShard",
    "TeacherLogits",
    "decode",
    "encode",
    "open_logits",
]

FORMAT = 1  #: version of the folder's format; other versions are refused
MANIFEST = "manifest.json"

_OPEN_FILES = 128
_FLOOR = -1e4  #: log-probabilities below it, as of ids that a model masks, are raised to it

Columns = dict[str, NDArray[Any]]


@spec
class LogitsShard:
    """A file of rows."""

    file: str
    rows: Positive
    bytes: Positive
    sha256: str


@spec
class LogitsManifest:
    """What a folder of log-probabilities holds; ``provenance`` is no part of its identity."""

    version: int = FORMAT
    teacher: str  #: digest of its checkpoint
    corpus: str  #: fingerprint of the token shards
    first: NonNegativeInt  #: token of the training split
    stop: Positive  #: the token after the last
    sequence: Positive
    attention: Literal["window", "document"]
    vocabulary: Positive
    tokens_sha256: str | None  #: of the tokenizer's tokens by id; None without a tokenizer
    top_k: Positive
    temperature: float
    dtype: Literal["float32", "bfloat16"]  #: of the teacher's forward pass
    windows_per_shard: Positive
    shards: tuple[LogitsShard, ...]
    provenance: Annotated[dict[str, Any], RUNTIME] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)


def encode(top: TopK, vocabulary: int) -> Columns:
    """Turn rows into the columns of a shard, on the host."""
    values = top.log_probs.float().clamp_min(_FLOOR)
    current = values[:, 0].clone()
    deltas = torch.empty(len(values), top.k - 1, dtype=torch.float16, device=values.device)
    for number in range(1, top.k):
        delta = (values[:, number] - current).half()
        deltas[:, number - 1] = delta
        current += delta.float()
    columns = {"top": values[:, 0], "deltas": deltas, "rest": top.log_rest[:, 0].float()}
    dtype = smallest_dtype(vocabulary)
    return {"ids": top.ids.cpu().numpy().astype(dtype), **{k: v.cpu().numpy() for k, v in columns.items()}}


def decode(columns: Columns) -> TopK:
    """Turn the columns of a shard into rows whose probabilities, the remaining mass among them, sum up to one."""
    steps = np.concatenate([columns["top"][:, None], columns["deltas"].astype(np.float32)], axis=1)
    log_probs = torch.from_numpy(np.cumsum(steps, axis=1, dtype=np.float32))
    rest = torch.from_numpy(columns["rest"][:, None].astype(np.float32))
    total = torch.cat([log_probs, rest], dim=1).logsumexp(dim=1, keepdim=True)
    return TopK(torch.from_numpy(columns["ids"].astype(np.int64)), log_probs - total, rest - total)


class TeacherLogits:
    """Rows of a folder by the windows of its slice.

    Raises:
        UserError: if the folder has no manifest, or a malformed one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(f"`teacher`: {folder} holds no log-probabilities; write them with `secateur teach`")
        raw = read_json(path)
        if isinstance(raw, dict) and raw.get("version", FORMAT) != FORMAT:
            raise UserError(
                f"`teacher`: {path} has format {raw['version']!r}, but this secateur reads {FORMAT}; save them again"
            )
        self.manifest = parse(LogitsManifest, raw, origin=str(path))
        self._open = functools.lru_cache(maxsize=_OPEN_FILES)(self._open_shard)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the manifest without its provenance, and so of all rows."""
        return fingerprint(self.manifest)

    def read(self, spans: Sequence[Span]) -> TopK:
        """The rows of windows, each from its first predicted token on; a window may end early."""
        parts = [self._read_window(span) for span in spans]
        return decode({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    @staticmethod
    def empty() -> TopK:
        """A row for the batch without a loss of a process that has no windows."""
        half = torch.full((1, 1), 0.5).log()
        return TopK(torch.zeros(1, 1, dtype=torch.int64), half, half.clone())

    def verify(self, start: int, stop: int) -> None:
        """Compare the shards of the tokens ``[start, stop)`` with their hashes; each process reads its share.

        Raises:
            UserError: in every process, at a shard that is missing or differs.
        """
        size = self.manifest.sequence * self.manifest.windows_per_shard
        first, last = (start - self.manifest.first) // size, -(-(stop - 1 - self.manifest.first) // size)
        shards = self.manifest.shards[first:last][distributed.rank() :: distributed.world_size()]
        problem = ""
        with track(f"check {self.folder.name}", sum(shard.bytes for shard in shards)) as progress:
            for shard in shards:
                problem = problem or self._problem(shard)
                progress.advance(shard.bytes)
        if not distributed.all_true(not problem):
            raise UserError(problem or f"`teacher`: a shard of {self.folder} is missing or damaged; save them again")

    def _problem(self, shard: LogitsShard) -> str:
        path = self.folder / shard.file
        if not path.is_file():
            return f"`teacher`: {path} is missing; save the log-probabilities again with `secateur teach`"
        if path.stat().st_size != shard.bytes or sha256_file(path) != shard.sha256:
            return f"`teacher`: {path} is damaged; save the log-probabilities again with `secateur teach`"
        return ""

    def _read_window(self, span: Span) -> Columns:
        manifest, (start, stop) = self.manifest, span
        window = (start - manifest.first) // manifest.sequence
        number, at = divmod(window, manifest.windows_per_shard)
        row = at * (manifest.sequence - 1)
        shard = self._open(number)
        return {name: shard.get_slice(name)[row : row + stop - start - 1] for name in ("ids", "top", "deltas", "rest")}

    def _open_shard(self, number: int) -> Any:
        path = self.folder / self.manifest.shards[number].file
        try:
            return safe_open(path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise UserError(f"`teacher`: {path} cannot be read: {error}; save the log-probabilities again") from None


def open_logits(source: Any) -> TeacherLogits | None:
    """Open the folder that ``logits:DIR`` names; None where the source names a checkpoint."""
    scheme, _, path = str(source).partition(":")
    return TeacherLogits(Path(path)) if scheme == "logits" else None
