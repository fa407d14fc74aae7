"""Log-likelihoods of continuations, for lm-evaluation-harness: its Hugging Face model, computing less.

What is asked stays the harness's own (``HFLM``): where a context ends and its continuation begins, the token before an
empty context, what is left out of a request that is too long. It is computed otherwise:

- Requests that begin alike, as the choices of a question do, become one row: what they share, and then one branch for
  each. A token sees what is shared and its own branch, and its position is the one in its own request.
- Rows of about the same length go through the model together.
- Logits are taken of the tokens that are scored alone, and their softmax is in float32.
- Of several processes each takes its part of the batches.

Importing this module imports lm-eval, which takes seconds and is not always installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import ranks
from secateur.families import family_of
from secateur.runtime import pick_batch
from secateur.token_loss import bend

_HFLM: Any = importlib.import_module("lm_eval.models.huggingface").HFLM  # an optional dependency, without types

__all__ = ["Likelihoods", "Row", "rows_of"]

_ROW = 512  #: tokens that a row of several requests may hold, unless twice its longest request is more
_VALUES = 2**24  #: logits at once

#: the texts of a request, and the tokens of its context and its continuation
Tokenised = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass
class Row:
    """Requests that begin alike: ``shared`` ids, then a branch for each request, maybe an empty one."""

    shared: list[int]
    branches: list[list[int]]
    targets: list[list[int]]  #: what the last positions of each request are to predict
    requests: list[int] = field(default_factory=list)  #: their numbers

    def __len__(self) -> int:
        return len(self.shared) + sum(map(len, self.branches))

    def layout(self) -> tuple[list[int], list[int], list[int]]:
        """Of each token its id, its position in its own request, and its branch, from 1; 0 where it is shared."""
        ids, places, branches = [*self.shared], [*range(len(self.shared))], [0] * len(self.shared)
        for number, branch in enumerate(self.branches, start=1):
            ids += branch
            places += range(len(self.shared), len(self.shared) + len(branch))
            branches += [number] * len(branch)
        return ids, places, branches

    def scored(self) -> list[list[int]]:
        """For each request where in the row the tokens lie that predict its targets."""
        found, start = [], len(self.shared)
        for branch, targets in zip(self.branches, self.targets, strict=True):
            path = [*range(len(self.shared)), *range(start, start + len(branch))]
            found.append(path[len(path) - len(targets) :])
            start += len(branch)
        return found


class Likelihoods(_HFLM):
    """A model as the harness asks it.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: of the model.
        batch: rows at once; None for what suits the device.

    Attributes:
        beheaded: requests that were longer than the model's positions, so that their beginning was left out.
        clipped: those among them whose continuation alone was longer; only its last tokens were scored. The harness
            itself refuses these.
        advance: is told the number of requests after each batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int | None = None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch or 1)
        self.batch = batch
        self.beheaded = self.clipped = 0
        self.advance: Callable[[int], None] = lambda _: None
        self._encoded: dict[str, list[int]] = {}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation given its context (nats), and whether it is the greedy one.

        Raises:
            ValueError: if a continuation has no token of its own.
        """
        texts = dict.fromkeys(text for request in requests for text in _texts(*request.args[:2]))
        begin = self.tokenizer.decode(self.prefix_token_id)
        plain = [text for text in texts if not text.startswith(begin)]  # the others want a rule of the harness's own
        rows = self.tokenizer(plain, return_attention_mask=False, verbose=False)["input_ids"] if plain else []
        self._encoded = dict(zip(plain, rows, strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        except IndexError:
            raise ValueError("a continuation has no token of its own") from None
        finally:
            self._encoded = {}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text; those of one that was encoded with all others are at hand."""
        if add_special_tokens is None and left_truncate_len is None and string in self._encoded:
            return self._encoded[string]
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Tokenised], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The answers to requests in tokens, in their order; all processes together."""
        most = self.max_length
        if any(not continuation for _, _, continuation in requests):
            raise ValueError("a continuation has no token of its own")
        self.beheaded += sum(len(context) + len(continuation) > most + 1 for _, context, continuation in requests)
        self.clipped += sum(len(continuation) > most for _, _, continuation in requests)
        cut = [((context + continuation)[-most - 1 :], len(continuation)) for _, context, continuation in requests]
        rows = rows_of(((ids[:-1], ids[1:][-count:]) for ids, count in cut), share=self._shares(cut))
        rows.sort(key=len, reverse=True)  # what would not fit into memory fails at once; stable, so deterministic
        found = torch.zeros(len(requests), 2, dtype=torch.float64)
        batches = list(_batches(rows, self.batch, str(self.device)))
        for batch in batches[ranks.rank() :: ranks.world()]:
            numbers = [number for row in batch for number in row.requests]
            found[numbers] = self._answers(batch)
            self.advance(len(numbers) * ranks.world())
        return [(value, bool(greedy)) for value, greedy in ranks.add(found).tolist()]

    def _shares(self, cut: Sequence[tuple[list[int], int]]) -> bool:
        """Whether rows may hold several requests: layers that look back a few positions want masks of their own."""
        config: Any = self.config
        longest = max((len(ids) for ids, _ in cut), default=0)
        window = getattr(config, "sliding_window", None)
        return config._attn_implementation in ("sdpa", "eager") and (window is None or longest <= window)

    def _answers(self, rows: Sequence[Row]) -> Tensor:
        """Log-likelihood and greediness of the requests of some rows, one after the other: float64 [requests, 2]."""
        hidden = self._states(rows)
        every = [(r, row.scored(), row.targets) for r, row in enumerate(rows)]
        index = [(r, column) for r, scored, _ in every for columns in scored for column in columns]
        states = hidden[tuple(torch.tensor(index, device=hidden.device).T)]  # [targets, hidden]
        goals = torch.tensor([goal for _, _, targets in every for part in targets for goal in part])
        values, greedy = _logprobs(self.model, states, goals.to(hidden.device))
        counts = [len(part) for _, _, targets in every for part in targets]
        answers = zip(values.cpu().split(counts), greedy.cpu().split(counts), strict=True)
        return torch.tensor([[float(v.double().sum()), float(g.all())] for v, g in answers], dtype=torch.float64)

    def _states(self, rows: Sequence[Row]) -> Tensor:
        """What the head reads: [rows, tokens of the longest, hidden]."""
        width = max(map(len, rows))
        ids, places = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        branches = torch.full((len(rows), width), -1)  # behind a row's end
        for number, row in enumerate(rows):
            for tensor, values in zip((ids, places, branches), row.layout(), strict=True):
                tensor[number, : len(row)] = torch.tensor(values)
        decoder: Any = self.model.get_decoder()
        if all(len(row.requests) == 1 for row in rows):  # causality hides what stands behind a row's end
            return decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        branches = branches.to(self.device)
        seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
        seen &= torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        kind: torch.dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=kind, device=self.device).masked_fill_(~seen, torch.finfo(kind).min)
        return decoder(
            input_ids=ids.to(self.device),
            attention_mask=mask[:, None],
            position_ids=places.to(self.device),
            use_cache=False,
        ).last_hidden_state


def _texts(context: str, continuation: str) -> tuple[str, ...]:
    """What the harness encodes of a request: all of it, and the context without the spaces at its end."""
    return (context + continuation, context.rstrip()) if context else ()


def rows_of(requests: Iterable[tuple[list[int], list[int]]], *, share: bool = True) -> list[Row]:
    """Put requests that follow each other and begin alike into common rows.

    A request joins the row before it if a fourth of every request there would be shared still, and the row not too
    long: attention reads all of it.

    Args:
        requests: ids that the model reads, and what the last of them are to predict.
        share: whether requests may have common rows.
    """
    rows: list[Row] = []
    longest = 0  # request in the row
    for number, (ids, targets) in enumerate(requests):
        if rows and share:
            row = rows[-1]
            most = max(longest, len(ids))
            common = _common(row.shared, ids)
            left = len(row.shared) - common  # what every branch so far takes over
            size = len(row) + left * (len(row.branches) - 1) + len(ids) - common
            if 4 * common >= most and size <= max(_ROW, 2 * most):
                row.branches = [row.shared[common:] + branch for branch in row.branches] + [ids[common:]]
                row.shared = row.shared[:common]
                row.targets.append(targets)
                row.requests.append(number)
                longest = most
                continue
        rows.append(Row(ids, [[]], [targets], [number]))
        longest = len(ids)
    return rows


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return number
    return min(len(one), len(other))


def _batches(rows: Sequence[Row], batch: int | None, device: str) -> Iterable[Sequence[Row]]:
    """Rows, the longest first, as many at once as were asked for, or as suit the device."""
    start = 0
    while start < len(rows):
        stop = start + (batch or pick_batch(max(1, len(rows[start])), device))
        yield rows[start:stop]
        start = stop


def _logprobs(model: Any, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` [tokens] (float32, nats), and whether each is the likeliest id."""
    family = family_of(model.config.model_type, where="the model")
    cap = getattr(model.config, family.logit_cap, None) if family.logit_cap else None
    weight = model.get_output_embeddings().weight
    values, greedy = [], []
    for some, goals in zip(*(t.split(max(16, _VALUES // len(weight))) for t in (states, targets)), strict=True):
        logits = bend(linear(some, weight).float(), cap)[0]
        values.append(logits.gather(1, goals[:, None])[:, 0] - logits.logsumexp(1))
        greedy.append(logits.argmax(1) == goals)
    return torch.cat(values), torch.cat(greedy)
