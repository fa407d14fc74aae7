"""Log-likelihoods and continuations for lm-evaluation-harness: its Hugging Face model, with less to compute.

The harness (``HFLM``) defines the requests: where a context ends and its continuation begins, the token before an empty
context, what is left out of a request that is too long. The computation differs:

- Requests with the same beginning, such as the choices of a question, become one row: the common tokens, then a branch
  for each request. A token sees the common tokens and its own branch, and its position is that in its own request.
- Rows of similar length share a batch.
- Logits are computed only where tokens are scored, and their softmax is in float32.
- Several processes share the batches.

The harness itself generates text, in batches that suit the device.

Importing this module imports lm-eval, which takes seconds and is not always installed.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import distributed
from secateur.data.tokenizer import missing_row
from secateur.errors import UserError
from secateur.losses.next_token import head_factors, softcap
from secateur.model.families import family_of
from secateur.runtime import pick_batch

_HFLM: Any = importlib.import_module("lm_eval.models.huggingface").HFLM  # an optional dependency, without types
normalize_gen_kwargs: Any = importlib.import_module("lm_eval.models.utils").normalize_gen_kwargs

__all__ = ["Likelihoods", "RequestRow", "rows_of"]

_SEED = 1234
_ROW_TOKENS = 512  #: the most in a row of several requests, unless twice its longest request is more
_LOGITS = 2**24  #: computed at once

#: the texts of a request, and the tokens of its context and its continuation
TokenizedRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass
class RequestRow:
    """Requests with the same beginning: ``shared`` ids, then a branch for each request, maybe an empty one."""

    shared: list[int]
    branches: list[list[int]]
    targets: list[list[int]]  #: for each request the ids that its last positions predict
    requests: list[int] = field(default_factory=list)  #: their numbers

    def __len__(self) -> int:
        return len(self.shared) + sum(map(len, self.branches))

    def layout(self) -> tuple[list[int], list[int], list[int]]:
        """For each token its id, its position in its own request, and its branch from 1 (0 for shared tokens)."""
        ids, positions, branches = [*self.shared], [*range(len(self.shared))], [0] * len(self.shared)
        for number, branch in enumerate(self.branches, start=1):
            ids += branch
            positions += range(len(self.shared), len(self.shared) + len(branch))
            branches += [number] * len(branch)
        return ids, positions, branches

    def scored(self) -> list[list[int]]:
        """For each request the places in the row of the tokens that predict its targets."""
        places, start = [], len(self.shared)
        for branch, targets in zip(self.branches, self.targets, strict=True):
            path = [*range(len(self.shared)), *range(start, start + len(branch))]
            places.append(path[len(path) - len(targets) :])
            start += len(branch)
        return places


class Likelihoods(_HFLM):
    """A model that answers the harness's requests.

    Args:
        model: in evaluation mode, on its device.
        batch: rows at once; None for what suits the device.

    Attributes:
        answered: number of requests answered since :meth:`start`, counted at the end of each method.
        truncated_requests: number of requests longer than the model's positions; their beginning was left out.
        truncated_choices: number of those whose continuation alone was longer; only its last tokens were scored. The
            harness itself fails on these.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "", batch: int | None = None
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch or 1)
        self.name = name
        self.batch = batch
        self._rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, assignment]
        if (padding := self.tokenizer.pad_token_id) is not None and padding >= self._rows:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.bos_token  # masked, but looked up
        self._encoded: dict[str, list[int]] = {}
        self.start("")

    def start(self, task: str, advance: Callable[[float], None] | None = None) -> None:
        """Begin a task: reset the counters.

        Args:
            advance: called with the number of answered requests after each batch; it may be a fraction.
        """
        self.task = task
        self.advance = advance or (lambda _: None)
        self.answered = self.truncated_requests = self.truncated_choices = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation given its context (nats), and whether it is the greedy one.

        Raises:
            UserError: if a continuation has no token of its own, or a log-likelihood is NaN or infinite.
        """
        texts = dict.fromkeys(text for request in requests for text in _encoded_texts(*request.args[:2]))
        bos = self.tokenizer.decode(self.prefix_token_id)
        texts = [text for text in texts if not text.startswith(bos)]  # the harness encodes these differently
        rows = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []
        self._encoded = dict(zip(texts, rows, strict=True))
        try:
            answers = super().loglikelihood(requests, disable_tqdm=True)
        except IndexError:  # from the harness, for an empty context and continuation
            raise self._tokenless() from None
        finally:
            self._encoded = {}
        self._check([value for value, _ in answers])
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text as a whole (nats), in windows that do not overlap; all processes together.

        Raises:
            UserError: if a log-likelihood is NaN or infinite.
        """
        advance, batch = self.advance, self.batch_size_per_gpu
        sizes = [len(self.tok_encode(request.args[0])) for request in requests]
        windows = sum(max(1, -(-size // self.max_length)) for size in sizes)
        self.advance = lambda count: advance(count * len(requests) / windows)
        self.batch_size_per_gpu = windows  # so that the harness passes all windows at once
        try:
            answers = super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.advance, self.batch_size_per_gpu = advance, batch
        self._check(answers)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that the model writes after each context, until the task's stop; all processes together."""
        texts: dict[int, str] = {}
        batch = self.batch_size_per_gpu
        for numbers in self._generation_batches(requests)[distributed.rank() :: distributed.world_size()]:
            self.batch_size_per_gpu = len(numbers)
            torch.manual_seed(_SEED + numbers[0])
            written = super().generate_until([requests[n] for n in numbers], disable_tqdm=True)
            texts |= dict(zip(numbers, written, strict=True))
            self.advance(len(numbers) * distributed.world_size())
        self.batch_size_per_gpu = batch
        answers = distributed.gather_texts(texts, len(requests))
        self.answered += len(answers)
        return answers

    def _check(self, values: Sequence[float]) -> None:
        if not all(map(math.isfinite, values)):
            raise UserError(f"{self.name}: the log-likelihoods on {self.task} are NaN or infinite")
        self.answered += len(values)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if ids and max(ids) >= self._rows:
            raise UserError(f"{self.name}: {self.task}: {missing_row(max(ids), self._rows, self.tokenizer)}")

    def _tokenless(self) -> UserError:
        return UserError(f"{self.name}: {self.task} has a choice without a token of its own; use another task")

    def _generation_batches(self, requests: Sequence[Any]) -> list[list[int]]:
        """Batches of request numbers with the same settings of generation, the longest requests first.

        Sampled requests get a batch each, so that their random numbers do not depend on other requests.
        """
        by_settings: dict[str, list[tuple[int, int]]] = {}
        for number, (context, settings) in enumerate(request.args[:2] for request in requests):
            ids = self.tok_encode(context)
            self._check_ids(ids)
            size, room = len(ids), self.max_length - self._new_tokens(settings)
            self.truncated_requests += size > room
            by_settings.setdefault(repr(sorted(settings.items())), []).append((min(size, room), number))
        batches = []
        for group in by_settings.values():
            rows = sorted(group, key=lambda row: (-row[0], row[1]))
            while rows:
                longest, first = rows[0]
                settings = requests[first].args[1]
                tokens = longest + self._new_tokens(settings)
                count = 1 if settings.get("do_sample", False) else self.batch or pick_batch(tokens, str(self.device))
                batches.append([number for _, number in rows[:count]])
                rows = rows[count:]
        return batches

    def _new_tokens(self, settings: dict[str, Any]) -> int:
        """The most tokens that a request lets the model write."""
        return normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text, or look it up among the texts that were encoded together."""
        if add_special_tokens is None and left_truncate_len is None and string in self._encoded:
            return self._encoded[string]
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[TokenizedRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The answers to tokenized requests, in their order; all processes together."""
        limit = self.max_length
        if any(not continuation for _, _, continuation in requests):
            raise self._tokenless()
        self.truncated_requests += sum(
            len(context) + len(continuation) > limit + 1 for _, context, continuation in requests
        )
        self.truncated_choices += sum(len(continuation) > limit for _, _, continuation in requests)
        cut = [((context + continuation)[-limit - 1 :], len(continuation)) for _, context, continuation in requests]
        for ids, _ in cut:
            self._check_ids(ids)
        rows = rows_of(((ids[:-1], ids[1:][-count:]) for ids, count in cut), share=self._can_share_rows(cut))
        rows.sort(key=len, reverse=True)  # rows too large for the memory fail at once; stable, so deterministic
        answers = torch.zeros(len(requests), 2, dtype=torch.float64)
        batches = list(_batches(rows, self.batch, str(self.device)))
        for batch in batches[distributed.rank() :: distributed.world_size()]:
            numbers = [number for row in batch for number in row.requests]
            answers[numbers] = self._answers(batch)
            self.advance(len(numbers) * distributed.world_size())
        return [(value, bool(greedy)) for value, greedy in distributed.all_reduce(answers).tolist()]

    def _can_share_rows(self, cut: Sequence[tuple[list[int], int]]) -> bool:
        """Whether rows may hold several requests: layers with a short sliding window need masks of their own."""
        config: Any = self.config
        longest = max((len(ids) for ids, _ in cut), default=0)
        window = getattr(config, "sliding_window", None)
        return config._attn_implementation in ("sdpa", "eager") and (window is None or longest <= window)

    def _answers(self, rows: Sequence[RequestRow]) -> Tensor:
        """Log-likelihood and greediness of each request of some rows, in order: float64 [requests, 2]."""
        hidden = self._states(rows)
        index = [(r, place) for r, row in enumerate(rows) for places in row.scored() for place in places]
        states = hidden[tuple(torch.tensor(index, device=hidden.device).T)]  # [targets, hidden]
        targets = [ids for row in rows for ids in row.targets]
        ids = torch.tensor([token for part in targets for token in part], device=hidden.device)
        values, greedy = _target_logprobs(self.model, states, ids)
        counts = [len(part) for part in targets]
        answers = zip(values.cpu().split(counts), greedy.cpu().split(counts), strict=True)
        return torch.tensor([[float(v.double().sum()), float(g.all())] for v, g in answers], dtype=torch.float64)

    def _states(self, rows: Sequence[RequestRow]) -> Tensor:
        """The last hidden states: [rows, tokens of the longest row, hidden]."""
        width = max(map(len, rows))
        ids, positions = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        branches = torch.full((len(rows), width), -1)  # padding after a row's end
        for number, row in enumerate(rows):
            for tensor, values in zip((ids, positions, branches), row.layout(), strict=True):
                tensor[number, : len(row)] = torch.tensor(values)
        decoder: Any = self.model.get_decoder()
        if all(len(row.requests) == 1 for row in rows):  # causal attention hides the padding
            return decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        branches = branches.to(self.device)
        visible = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
        visible &= torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        dtype: torch.dtype = self.model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=self.device)
        mask = mask.masked_fill_(~visible, torch.finfo(dtype).min)
        return decoder(
            input_ids=ids.to(self.device),
            attention_mask=mask[:, None],
            position_ids=positions.to(self.device),
            use_cache=False,
        ).last_hidden_state


def _encoded_texts(context: str, continuation: str) -> tuple[str, ...]:
    """The texts that the harness encodes for a request: all of it, and the context without the spaces at its end."""
    return (context + continuation, context.rstrip()) if context else ()


def rows_of(requests: Iterable[tuple[list[int], list[int]]], *, share: bool = True) -> list[RequestRow]:
    """Put consecutive requests with the same beginning into common rows.

    A request joins the row before it if a quarter of every request there would still be shared, and if the row stays
    short: attention reads all of it.

    Args:
        requests: ids that the model reads, and the ids that the last of them predict.
    """
    rows: list[RequestRow] = []
    longest = 0  # request in the row
    for number, (ids, targets) in enumerate(requests):
        if rows and share:
            row = rows[-1]
            length = max(longest, len(ids))
            common = _common_prefix(row.shared, ids)
            unshared = len(row.shared) - common  # ids that every branch so far takes over
            size = len(row) + unshared * (len(row.branches) - 1) + len(ids) - common
            if 4 * common >= length and size <= max(_ROW_TOKENS, 2 * length):
                row.branches = [row.shared[common:] + branch for branch in row.branches] + [ids[common:]]
                row.shared = row.shared[:common]
                row.targets.append(targets)
                row.requests.append(number)
                longest = length
                continue
        rows.append(RequestRow(ids, [[]], [targets], [number]))
        longest = len(ids)
    return rows


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of equal ids at the beginning of two sequences."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _batches(rows: Sequence[RequestRow], batch: int | None, device: str) -> Iterable[Sequence[RequestRow]]:
    """Split rows, the longest first, into batches of ``batch`` rows; None for what suits the device."""
    start = 0
    while start < len(rows):
        stop = start + (batch or pick_batch(max(1, len(rows[start])), device))
        yield rows[start:stop]
        start = stop


def _target_logprobs(model: Any, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` [tokens] (float32, nats), and whether each is the likeliest id."""
    family = family_of(model.config.model_type, where="the model")
    scale = family.logit_scale(model.config)
    states, weight, cap = head_factors(states, model.get_output_embeddings(), scale, family.cap(model.config))
    values, greedy = [], []
    size = max(16, _LOGITS // len(weight))
    for part, ids in zip(states.split(size), targets.split(size), strict=True):
        logits = softcap(linear(part, weight).float(), cap)[0]
        values.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1))
        greedy.append(logits.argmax(1) == ids)
    return torch.cat(values), torch.cat(greedy)
