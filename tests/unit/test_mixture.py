"""Domains in training: the view by domain, the mixture of their windows, their losses, and runs that read them."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import hf, naive_loss, tiny_llama, windows
from secateur.data.domains import DomainTokens
from secateur.data.manifest import write_manifest
from secateur.data.shards import ShardWriter, TokenStore
from secateur.errors import RunError, UserError
from secateur.training.batches import Data, Span, WindowTokens, micro_batches
from secateur.training.heldout import domain_losses, domain_protocols, heldout_loss
from secateur.training.loop import RunOptions, train_loop
from secateur.training.metrics import Metrics
from secateur.training.mixture import Mixture
from secateur.training.parallel import TrainModule
from secateur.training.recipe import Recipe
from secateur.training.throughput import Meter
from secateur.training.watchdog import StopSignal

NAMES = ("books", "code", "web", "none", "rare")
SEQUENCE = 8
RECIPE = Recipe(sequence=SEQUENCE, tokens_per_step=5 * SEQUENCE, micro_batch=2, peak_rate=1e-2)


def corpus(folder: Path, *, named: bool = True, held_out: bool = True, documents: int = 120) -> TokenStore:
    """Documents of 0 to 29 tokens: most of ``web``, none of ``none``, one short one of ``rare``."""
    generator = np.random.default_rng(2)
    splits = {}
    for split, count in (("train", documents), *([("heldout", documents // 2)] if held_out else [])):
        writer = ShardWriter(folder, split, "uint16", 100, domains=named)
        for number in range(count):
            domain = 4 if number == 11 else int(generator.choice(3, p=[0.2, 0.3, 0.5]))
            length = 5 if domain == 4 else int(generator.integers(0, 30))
            writer.append(generator.integers(0, 61, length), domain=domain)
        splits[split] = writer.close()
    write_manifest(folder, 61, splits, domains=NAMES if named else ())
    return TokenStore(folder)


def by_token(store: TokenStore, split: str, start: int, stop: int) -> dict[str, list[tuple[int, int, int]]]:
    """domain -> (id, document, place in it inside the slice) of each token of the slice, one at a time."""
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in NAMES}
    offsets = [*store.offsets(split).tolist(), store.tokens(split)]
    for document in range(store.documents(split)):
        name = store.document_name(split, document).rpartition("domain ")[2].rstrip(")")
        inside = [at for at in range(offsets[document], offsets[document + 1]) if start <= at < stop]
        found[name] += [(int(store.read(split, at, at + 1)[0]), document, at - inside[0]) for at in inside]
    return found


# --- the view by domain


@pytest.mark.parametrize(
    ("split", "start", "stop"), [("train", 0, None), ("train", 37, 1403), ("train", 500, 571), ("heldout", 0, None)]
)
def test_domains_lie_end_to_end(tmp_path: Path, split: str, start: int, stop: int | None) -> None:
    store = corpus(tmp_path)
    stop = stop or store.tokens(split)
    view, wanted = DomainTokens(store, split, start, stop, SEQUENCE), by_token(store, split, start, stop)
    kept = [name for name in NAMES if len(wanted[name]) >= SEQUENCE]
    assert list(view.ranges) == kept
    assert view.short_domains == {name: len(wanted[name]) for name in NAMES if name not in kept}
    line = [token for name in kept for token in wanted[name]]
    assert view.tokens == len(line)
    assert view.read(split, 0, view.tokens).tolist() == [token for token, _, _ in line]
    at = 0
    for name in kept:
        assert view.ranges[name] == (at, at := at + len(wanted[name]))
    for first in range(0, view.tokens - 12, 5):
        part = line[first : first + 12]
        ids = view.read(split, first, first + 12)
        assert ids.dtype == np.int64 and ids.tolist() == [token for token, _, _ in part]
        cut = {document: place for _, document, place in reversed(part)}  # where each begins inside the part
        assert view.positions(split, first, first + 12).tolist() == [place - cut[d] for _, d, place in part]
        named = [view.document_name(split, number) for number in view.documents_in(split, first, first + 12)]
        assert {store.document_name(split, document) for _, document, _ in part} <= set(named)
        assert len(set(named)) == len(named)


def test_a_corpus_without_domains_has_one(tmp_path: Path) -> None:
    store = corpus(tmp_path, named=False)
    view = DomainTokens(store, "train", 10, 500, SEQUENCE)
    assert (view.ranges, view.short_domains, view.tokens) == ({"": (0, 490)}, {}, 490)
    assert (view.read("train", 3, 400) == store.read("train", 13, 410)).all()
    assert (view.positions("train", 3, 400) == store.positions("train", 13, 410)).all()


def test_what_is_no_slice_of_the_view(tmp_path: Path) -> None:
    store = corpus(tmp_path)
    view = DomainTokens(store, "train", 0, 800, SEQUENCE)
    for split, start, stop in (("heldout", 0, 8), ("train", -1, 8), ("train", 9, 8), ("train", 0, view.tokens + 1)):
        for ask in (view.read, view.positions, view.documents_in):
            with pytest.raises(ValueError, match="not a slice"):
                ask(split, start, stop)
    assert len(view.read("train", 5, 5)) == len(view.positions("train", 5, 5)) == len(view.documents_in("train", 5, 5))
    with pytest.raises(UserError, match="lower the token budget"):
        DomainTokens(store, "train", 0, 10**6, SEQUENCE)
    empty = DomainTokens(store, "train", 8, 8, SEQUENCE)
    assert (empty.ranges, empty.tokens, set(empty.short_domains)) == ({}, 0, set(NAMES))


def test_a_domain_without_a_name_is_damage(tmp_path: Path) -> None:
    corpus(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "domains": ["books", "code"]}))
    with pytest.raises(UserError, match=r"domains\.train\.npy: a document of domain 4, but the manifest names 2"):
        DomainTokens(TokenStore(tmp_path), "train", 0, 1000, SEQUENCE)


def test_the_view_holds_little_for_a_document_and_nothing_for_a_token(tmp_path: Path) -> None:
    writer, documents = ShardWriter(tmp_path, "train", "uint16", domains=True), 20_000
    lengths = np.full(documents, 100)
    writer.extend(np.zeros(lengths.sum(), "u2"), lengths, np.zeros(documents, "u8"), np.arange(documents) % 7)
    write_manifest(tmp_path, 10, {"train": writer.close()}, domains="abcdefg")
    store = TokenStore(tmp_path)
    tracemalloc.start()
    view = DomainTokens(store, "train", 0, store.tokens("train"), SEQUENCE)
    view.read("train", 123_456, 123_956)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 8 * 4 * documents and most < 8 * 12 * documents


# --- what is read


class Numbers:
    """Tokens that are their own indices."""

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    positions = read

    def documents_in(self, split: str, start: int, stop: int) -> range:
        return range(start, stop)

    def document_name(self, split: str, index: int) -> str:
        return f"document {index}"


def of_sizes(sizes: list[int], *, batch: int = 5, steps: int = 40, seed: int = 0, **references: float) -> Mixture:
    """A mixture of domains ``a``, ``b``, ... of so many tokens, with gaps between them."""
    ends = np.cumsum(sizes) + 3 * np.arange(len(sizes))
    ranges = {chr(97 + i): (int(e) - n, int(e)) for i, (e, n) in enumerate(zip(ends, sizes, strict=True))}
    recipe = Recipe(sequence=SEQUENCE, tokens_per_step=batch * SEQUENCE, data_seed=seed)
    return Mixture(Numbers(), ranges, recipe, steps, references)


def domain_of(mixture: Mixture, span: Span) -> str:
    (name,) = [n for n, (start, stop) in mixture.ranges.items() if start <= span[0] < span[1] <= stop]
    return name


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(SEQUENCE, 3000), min_size=1, max_size=9),
    batch=st.integers(1, 9),
)
def test_every_domain_has_its_share_to_the_window(sizes: list[int], batch: int) -> None:
    mixture = of_sizes(sizes, batch=batch)
    counts: Counter[str] = Counter()
    for step in range(mixture.steps):
        spans = mixture.spans(step)
        assert len(spans) == batch and all(b - a == SEQUENCE for a, b in spans)
        counts.update(domain_of(mixture, span) for span in spans)
        for name, (start, stop) in mixture.ranges.items():
            due = Fraction((step + 1) * batch * (stop - start), sum(sizes))
            assert abs(counts[name] - due) < 1 + 1e-9
        assert mixture.read == {name: counts[name] for name in mixture.ranges}
    assert mixture.tokens == counts.total() * SEQUENCE == mixture.steps * mixture.recipe.tokens_per_step


def test_counts_by_hand() -> None:
    """Shares of 1/2, 1/3, 1/6 and four windows a step: whole again after three steps."""
    mixture = of_sizes([240, 160, 80], batch=4)
    orders = ["".join(domain_of(mixture, span) for span in mixture.spans(step)) for step in range(6)]
    assert Counter("".join(orders[:3])) == Counter("".join(orders[3:])) == {"a": 6, "b": 4, "c": 2}
    # Due by the end of slot a: 2 4 6, b: 3 6, c: 6; not before slot a: 0 2 4, b: 0 3, c: 0; the first of equals.
    assert orders[0] + orders[1][:2] == "ababac"


def test_a_pass_reads_every_window_once_in_an_order_of_its_own() -> None:
    mixture = of_sizes([7 * SEQUENCE + 3, 2 * SEQUENCE], steps=30)
    read: dict[str, list[Span]] = {"a": [], "b": []}
    for step in range(mixture.steps):
        for span in mixture.spans(step):
            read[domain_of(mixture, span)].append(span)
    for name, count in (("a", 7), ("b", 2)):
        start = mixture.ranges[name][0]
        every = {(start + i * SEQUENCE, start + (i + 1) * SEQUENCE) for i in range(count)}
        passes = [read[name][at : at + count] for at in range(0, len(read[name]), count)]
        assert all(set(one) == every for one in passes[:-1]) and set(passes[-1]) <= every
        assert mixture.passes[name] == len(read[name]) / count > 10
        assert len({tuple(one) for one in passes}) > (10 if name == "a" else 1)


def test_the_order_is_that_of_the_seed() -> None:
    def order(seed: int) -> list[list[Span]]:
        mixture = of_sizes([900, 400], seed=seed)
        return [mixture.spans(step) for step in range(20)]

    assert order(1) == order(1) != order(2)


def test_steps_are_asked_for_in_order() -> None:
    mixture = of_sizes([900, 400])
    first = mixture.spans(0)
    assert mixture.spans(0) == first
    mixture.spans(0).clear()
    assert mixture.spans(0) == first and mixture.spans(1) != first
    for step in (0, 3):
        with pytest.raises(AssertionError, match="step 2 is next"):
            mixture.spans(step)


def test_resumed_at_any_step_it_reads_the_same() -> None:
    def losses(step: int) -> dict[str, float]:
        return {"a": 2.0 + 0.1 * step, "c": 1.5}

    def run(mixture: Mixture, first: int) -> list[list[Span]]:
        read = []
        for step in range(first, 24):
            read.append(mixture.spans(step))
            if step % 5 == 4:
                mixture.update(losses(step))
        return read

    references = {"a": 2.2, "b": 1.0, "c": 1.4}
    whole = run(of_sizes([300, 170, 90], **references), 0)
    for cut in range(24):
        first = of_sizes([300, 170, 90], **references)
        for step in range(cut):
            first.spans(step)
            if step % 5 == 4:
                first.update(losses(step))
        state = json.loads(json.dumps(kept := first.state(), allow_nan=False))
        first.spans(cut)
        assert kept == state  # what was given does not change behind the caller's back
        again = of_sizes([300, 170, 90], **references)
        again.spans(0)
        again.restore(state)
        assert again.state() == state and run(again, cut) == whole[cut:]
    again.restore(None)
    assert run(again, 0) == whole
    with pytest.raises(UserError, match="over other domains"):
        of_sizes([300, 170]).restore(state)


@given(size=st.integers(1, 4), batch=st.integers(1, 9))
def test_two_processes_share_a_step(size: int, batch: int) -> None:
    mixture = of_sizes([400, 90], batch=batch)
    for step in range(3):
        spans = mixture.spans(step)
        shares = [micro_batches(spans, size, rank=rank, world=2) for rank in range(2)]
        assert [span for share in shares for group in share for span in group] == spans
        assert len(shares[0]) == len(shares[1])


def test_a_domain_without_a_window_is_refused() -> None:
    recipe = Recipe(sequence=SEQUENCE, tokens_per_step=SEQUENCE)
    for ranges, told in (({"a": (0, 90), "b": (90, 97)}, "domain 'b': less than one window of 8"), ({}, "^less than")):
        with pytest.raises(UserError, match=told):
            Mixture(Numbers(), ranges, recipe, 3)
    with pytest.raises(UserError, match="reference loss of domain 'a' is inf"):
        of_sizes([100], a=math.inf)


def test_windows_never_mix_domains(tmp_path: Path) -> None:
    store = corpus(tmp_path)
    view = DomainTokens(store, "train", 40, 1500, SEQUENCE)
    mixture = Mixture(view, view.ranges, RECIPE, 60)
    data: Data = mixture
    seen: Counter[str] = Counter()
    for step in range(data.steps):
        for span in data.spans(step):
            names = data.documents([span])
            (domain,) = {name.rpartition("domain ")[2].rstrip(")") for name in names}
            seen[domain] += 1
            assert (data.batch([span]).ids[0].numpy() == view.read("train", *span)).all()
    assert seen == Counter(mixture.read) and set(seen) == {"books", "code", "web"}
    within = Mixture(view, view.ranges, Recipe(sequence=8, tokens_per_step=40, attention="document"), 1)
    spans = within.spans(0)
    positions = within.batch(spans).positions
    assert positions is not None
    assert positions.tolist() == [view.positions("train", *span).tolist() for span in spans]
    assert within.batch([]).targets is not None


# --- shares


def test_the_rule() -> None:
    mixture = of_sizes([500, 300, 200], a=2.0, b=2.5, c=1.0)
    wanted = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert mixture.weights == pytest.approx(wanted)
    for losses in ({"a": 2.4, "b": 2.4, "c": 1.7}, {"a": 1.9, "b": 2.6, "c": 1.0}, {"a": 9.0, "b": 3.0, "c": 2.0}):
        mixture.update(losses)
        grown = {name: w * math.exp(max(losses[name] - mixture.references[name], 0)) for name, w in wanted.items()}
        wanted = {name: value / sum(grown.values()) for name, value in grown.items()}
        assert mixture.weights == pytest.approx(wanted, rel=1e-12)


def test_without_an_excess_nothing_changes() -> None:
    mixture = of_sizes([500, 300, 200], a=2.0, b=2.5, c=1.0)
    before = mixture.weights
    for losses in ({}, {"a": 2.0, "b": 2.5, "c": 1.0}, {"a": 1.0, "b": None}, {"unread": math.inf}):
        mixture.update(losses)
        assert mixture.weights == before


def test_an_unmeasured_domain_keeps_its_share() -> None:
    mixture = of_sizes([500, 300, 100, 100], a=2.0, b=2.5, c=1.0)
    mixture.update({"a": 3.0, "b": None, "d": 7.0, "c": 1.0})  # b is not measured, d has nothing to compare with
    weights, measured = mixture.weights, 0.5 * math.e + 0.1
    assert (weights["b"], weights["d"]) == (0.3, 0.1)
    assert weights["a"] == pytest.approx(0.6 * 0.5 * math.e / measured)
    assert weights["c"] == pytest.approx(0.6 * 0.1 / measured)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss: float) -> None:
    mixture = of_sizes([500, 300], a=2.0, b=2.5)
    before = mixture.weights
    with pytest.raises(RunError, match=r"the loss of domain 'b' is -?(nan|inf)"):
        mixture.update({"a": 3.0, "b": loss})
    assert mixture.weights == before


def test_extreme_losses_leave_numbers() -> None:
    """Also where a share becomes nothing: the domain is not read, and comes back when its loss is in excess."""
    mixture = of_sizes([500, 300, 100], a=0.0, b=0.0, c=0.0)
    step = 0
    for losses in ({"a": 1e6, "b": 0.0, "c": 1.0}, {"a": 0.0, "b": 1e308, "c": 0.0}, {"a": 1e6, "b": 1e6 + 1, "c": 0}):
        mixture.update(losses)
        assert all(0 <= w <= 1 for w in mixture.weights.values())
        assert sum(mixture.weights.values()) == pytest.approx(1)
        top = max(losses, key=lambda name: losses[name])
        before = mixture.read
        for _ in range(4):
            mixture.spans(step)
            step += 1
        assert mixture.read[top] - before[top] > 12
        json.dumps(mixture.state(), allow_nan=False)


def test_shares_that_change_all_the_time_are_kept_too() -> None:
    """A step without a window of some domain, too: 40 domains, three windows a step."""
    names = [chr(97 + i) for i in range(26)]
    mixture = of_sizes([SEQUENCE * (i + 1) for i in range(26)], batch=3, steps=400, **dict.fromkeys(names, 2.0))
    generator, due = np.random.default_rng(0), np.zeros(26)
    for step in range(mixture.steps):
        due += 3 * np.array(list(mixture.weights.values()))
        mixture.spans(step)
        assert np.abs(due - list(mixture.read.values())).max() < 2
        mixture.update(dict(zip(names, (2 + 0.1 * generator.standard_normal(26)).tolist(), strict=True)))


# --- windows in memory


def test_windows_in_memory() -> None:
    ids = windows(6, 12)
    tokens = WindowTokens(ids)
    assert tokens.tokens == 72
    assert (tokens.read("any", 12, 36) == ids[1:3].flatten().numpy()).all()
    assert tokens.positions("any", 9, 26).tolist() == [0, 1, 2, *range(12), 0, 1]
    assert [tokens.documents_in("any", *s) for s in ((0, 12), (11, 13), (5, 5))] == [range(1), range(2), range(0)]
    assert tokens.document_name("any", 17) == "window 17"
    with pytest.raises(ValueError, match="not a slice of 72 tokens"):
        tokens.read("any", 70, 73)
    mixture = Mixture(tokens, {"": (0, tokens.tokens)}, Recipe(sequence=12, tokens_per_step=48), 3)
    assert mixture.weights == {"": 1.0}
    read = [span for step in range(3) for span in mixture.spans(step)]
    assert sorted(read[:6]) == sorted(read[6:]) == [(12 * i, 12 * i + 12) for i in range(6)]
    assert mixture.passes == {"": 2.0}
    assert mixture.documents(read[:1]) == [f"window {read[0][0] // 12}"]


# --- losses by domain


def test_losses_by_domain(tmp_path: Path) -> None:
    store, model = corpus(tmp_path), hf(tiny_llama(tmp_path))
    wanted = by_token(store, "heldout", 0, store.tokens("heldout"))
    protocols = domain_protocols(store, SEQUENCE, 4)
    assert list(protocols) == ["books", "code", "web"]  # one has no document, one no whole window
    losses = domain_losses(TrainModule(model), protocols, batch=3)
    for name, protocol in protocols.items():
        count = min(4, len(wanted[name]) // SEQUENCE)
        ids = torch.tensor([token for token, _, _ in wanted[name][: count * SEQUENCE]]).reshape(count, SEQUENCE)
        (found,) = protocol.windows
        assert torch.equal(found, ids) and protocol.source == f"held-out documents of domain {name}"
        assert losses[name] == pytest.approx(naive_loss(model, ids), rel=1e-5)


def test_losses_without_domains_or_held_out_documents(tmp_path: Path) -> None:
    for name in ("plain", "none"):
        (tmp_path / name).mkdir()
    plain = domain_protocols(corpus(tmp_path / "plain", named=False), SEQUENCE, 3)
    assert {name: len(protocol.windows[0]) for name, protocol in plain.items()} == {"": 3}
    assert plain[""].source == "held-out documents"
    assert domain_protocols(corpus(tmp_path / "none", held_out=False), SEQUENCE, 3) == {}
    assert domain_losses(TrainModule(hf(tiny_llama(tmp_path))), {}, batch=3) == {}


# --- runs


def run(folder: Path, model: Any, store: TokenStore, references: dict[str, float], **settings: Any) -> Any:
    """Twelve steps; shares follow the held-out losses at the start and at each of six points."""
    view = DomainTokens(store, "train", 0, 1200, SEQUENCE)
    data = Mixture(view, view.ranges, RECIPE, 12, references)
    protocols, shares = domain_protocols(store, SEQUENCE, 3), list[dict[str, float]]()

    def measure(module: TrainModule) -> float:
        shares.append(data.weights)
        losses = domain_losses(module, protocols, batch=2)
        data.update(losses)
        return sum(losses.values()) / len(losses)

    settings = {"save_every": 2, **settings}
    result = train_loop(
        TrainModule(model), data, masks={}, measure=measure, points=6, options=RunOptions(folder, "run", **settings)
    )
    return result, data, shares


def test_a_killed_run_ends_at_the_same_bits(tmp_path: Path) -> None:
    directory, store = tiny_llama(tmp_path), corpus(tmp_path)
    whole, cut = hf(directory), hf(directory)
    protocols = domain_protocols(store, SEQUENCE, 3)
    start = domain_losses(TrainModule(whole), protocols, batch=2)
    references = {name: loss - 0.4 * number for number, (name, loss) in enumerate(start.items())}
    result, data, shares = run(tmp_path / "whole", whole, store, references)
    natural = Mixture(data.store, data.ranges, RECIPE, 12).weights
    assert shares[0] == natural != shares[1]  # what is measured before the first step counts
    assert result["tokens"] == data.tokens == 12 * RECIPE.tokens_per_step
    assert data.weights["web"] > 1.5 * natural["web"] and data.weights["books"] < natural["books"]
    stop = StopSignal()

    class Early(Meter):
        def step(self, tokens: int, seconds: float) -> None:
            super().step(tokens, seconds)
            stop.is_set = self.tokens >= 4 * RECIPE.tokens_per_step

    with pytest.raises(RunError, match="run the same command to resume"):
        run(tmp_path / "cut", cut, store, references, stop=stop, meter=Early())
    again = hf(tiny_llama(tmp_path, seed=5))
    resumed, data_again, shares_again = run(tmp_path / "cut", again, store, references)
    assert shares_again == shares[-len(shares_again) :] and len(shares_again) < len(shares)
    assert resumed == result and data_again.state() == data.state()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_window_twice_in_a_step_counts_twice(tmp_path: Path) -> None:
    model, ids = hf(tiny_llama(tmp_path)), windows(2, SEQUENCE)
    tokens = WindowTokens(ids)
    data = Mixture(tokens, {"": (0, tokens.tokens)}, Recipe(sequence=8, tokens_per_step=48, micro_batch=4), 1)
    assert set(Counter(data.spans(0)).values()) == {3}
    wanted = naive_loss(model, ids)
    seen: list[dict[str, Any]] = []

    class Kept(Metrics):
        def write(self, entry: dict[str, Any]) -> None:
            seen.append(entry)

    settings = RunOptions(tmp_path / "steps", "run", metrics=Kept(None))
    train_loop(TrainModule(model), data, masks={}, measure=lambda t: None, points=1, options=settings)
    assert [entry["loss"] for entry in seen] == [pytest.approx(wanted, rel=1e-5)]


def test_held_out_loss_is_the_mean_over_domains(tmp_path: Path) -> None:
    """Weighted by their predicted tokens: a domain's loss is nothing but the loss of its windows."""
    store, module = corpus(tmp_path), TrainModule(hf(tiny_llama(tmp_path)))
    protocols = domain_protocols(store, SEQUENCE, 5)
    losses = domain_losses(module, protocols, batch=4)
    together = type(protocols["web"])(tuple(p.windows[0] for p in protocols.values()), "all")
    mean = sum(losses[name] * p.tokens for name, p in protocols.items()) / together.tokens
    assert heldout_loss(module, together, batch=4) == pytest.approx(mean, rel=1e-6)
