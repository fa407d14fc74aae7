"""The divergence from a teacher in chunks, against the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from helpers import largest, near
from secateur.losses import next_token as token_loss
from secateur.losses.kl import summed_divergence
from secateur.losses.next_token import IGNORE_INDEX, Readout, summed_loss

TOKENS, HIDDEN, WIDE, VOCABULARY = 24, 16, 20, 61


@pytest.fixture(autouse=True, params=["one tile", "tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads' products whole, and some of their rows at a time."""
    if request.param == "tiles":
        monkeypatch.setattr(token_loss, "_CPU_TILE", 7 * HIDDEN)


def case(
    tokens: int = TOKENS, *, ignore: int = 0, scale: float = 1.0, caps: tuple[float | None, float | None] = (None, None)
) -> tuple[Readout, Readout, Tensor]:
    """A student, a wider teacher and targets, the first ``ignore`` and one in the middle not counted."""
    draw = torch.Generator().manual_seed(0)
    hidden = (torch.randn(tokens, HIDDEN, generator=draw) * scale).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw).requires_grad_()
    theirs = torch.randn(tokens, WIDE, generator=draw) * scale, torch.randn(VOCABULARY, WIDE, generator=draw)
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=draw)
    if ignore:
        targets[:ignore] = targets[tokens // 2] = IGNORE_INDEX
    return Readout(hidden, weight, caps[0]), Readout(*theirs, caps[1]), targets


def as_type(readout: Readout, dtype: torch.dtype) -> Readout:
    found = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in readout[:2])
    return Readout(*found, readout.cap)


def logits(readout: Readout) -> Tensor:
    z = readout.hidden @ readout.weight.T
    return z if readout.cap is None else readout.cap * torch.tanh(z / readout.cap)


def categories(z: Tensor, likeliest: Tensor | None) -> Tensor:
    """Log-probabilities of all ids, or of those and of the others together, by plain sums."""
    if likeliest is None:
        return z.log_softmax(0)
    p = z.softmax(0)
    others = p[[i for i in range(len(p)) if i not in likeliest.tolist()]].sum()
    return torch.cat([p[likeliest], others[None]]).log()


def naive(
    student: Readout,
    teacher: Readout,
    targets: Tensor,
    temperature: float = 1.0,
    alpha: float = 1.0,
    top_k: int | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and both gradients in float64, by autograd, one token at a time."""
    student, teacher = as_type(student, torch.float64), as_type(teacher, torch.float64)
    losses = []
    for s, t, target in zip(logits(student), logits(teacher), targets.tolist(), strict=True):
        top = None if top_k is None else t.topk(top_k).indices
        q, p = (categories(z / temperature, top) for z in (s, t))
        divergence = temperature**2 * kl_div(q, p, log_target=True, reduction="sum")
        usual = torch.logsumexp(s, 0) - s[max(target, 0)]
        losses.append(alpha * divergence + (1 - alpha) * usual if target >= 0 else 0 * s[0])
    every = torch.stack(losses)
    (every.sum() * factor).backward()
    assert student.hidden.grad is not None and student.weight.grad is not None
    return every.detach(), student.hidden.grad, student.weight.grad


#: temperature, alpha, top_k
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0, "alpha": 0.5, "top_k": 5},
    {"temperature": 0.7, "alpha": 0.25},
    {"temperature": 3.0},
    {"top_k": 1},
    {"alpha": 0.9, "top_k": VOCABULARY - 1},
]


# --- against the formula


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 5])  # 5 leaves a rest
@pytest.mark.parametrize("caps", [(None, None), (3.0, None), (3.0, 5.0)])
@pytest.mark.parametrize("ignore", [0, 7])
def test_against_the_formula(options: dict[str, Any], chunk: int | None, caps: Any, ignore: int) -> None:
    student, teacher, targets = case(ignore=ignore, caps=caps)
    total, losses = summed_divergence(student, teacher, targets, chunk=chunk, **options)
    (total * 0.37).backward()
    wanted, of_hidden, of_weight = naive(student, teacher, targets, **options, factor=0.37)
    assert total.dtype == losses.dtype == torch.float32 and not losses.requires_grad
    assert not losses[targets == IGNORE_INDEX].any() and (losses[targets != IGNORE_INDEX] > 0).all()
    near(losses, wanted, 2e-6)
    near(total, wanted.sum(), 1e-6)
    near(student.hidden.grad, of_hidden, 2e-6)
    near(student.weight.grad, of_weight, 2e-6)
    assert teacher.hidden.grad is None and teacher.weight.grad is None


@pytest.mark.parametrize("top_k", [VOCABULARY, VOCABULARY + 5])
def test_all_ids_apart_are_the_whole_divergence(top_k: int) -> None:
    found = []
    for k in (None, top_k):
        student, teacher, targets = case()
        total, losses = summed_divergence(student, teacher, targets, top_k=k)
        total.backward()
        found.append((losses, student.hidden.grad, student.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, TOKENS])
def test_chunks_are_execution_only(chunk: int) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.5, "top_k": 5}
    found = []
    for size in (10, chunk):
        student, teacher, targets = case(ignore=3)
        total, losses = summed_divergence(student, teacher, targets, chunk=size, **options)
        total.backward()
        found.append([losses, student.hidden.grad, student.weight.grad])
    for a, b in zip(*found, strict=True):
        near(a, b.double(), 1e-6)


def test_without_the_teacher_s_share_it_would_be_the_usual_loss() -> None:
    student, teacher, targets = case(ignore=3)
    _, losses = summed_divergence(student, teacher, targets, alpha=1e-9)
    near(losses, summed_loss(student.hidden, student.weight, targets)[1].double(), 1e-6)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("alpha", 1) == 1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_nothing_is_left_to_learn_of_oneself(options: dict[str, Any], dtype: torch.dtype, cap: float | None) -> None:
    student = as_type(case(caps=(cap, None))[0], dtype)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    total, losses = summed_divergence(student, as_type(student, dtype), targets, chunk=5, **options)
    total.backward()
    assert not losses.any() and student.hidden.grad is not None and student.weight.grad is not None
    assert not student.hidden.grad.any() and not student.weight.grad.any()


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_flat_and_extreme_logits(scale: float, top_k: int | None) -> None:
    """Logits up to a thousand: what is likely to one is impossible to the other, and the rest has no mass at all."""
    student, teacher, targets = case(scale=scale)
    total, losses = summed_divergence(student, teacher, targets, top_k=top_k, chunk=5)
    total.backward()
    # In float64, where the plain sum of the others' shares is not yet zero: their logarithms, by hand.
    s, t = (logits(as_type(r, torch.float64)).detach().log_softmax(1) for r in (student, teacher))
    if top_k is not None:
        top = t.topk(top_k, dim=1).indices
        s, t = (torch.cat([z.gather(1, top), z.scatter(1, top, -torch.inf).logsumexp(1)[:, None]], 1) for z in (s, t))
    wanted = (t.exp() * (t - s)).sum(1)
    assert scale < 1 or float(losses.max()) > 100
    # Logits of a thousand are rounded to 6e-5, which their exponentials show; logarithms of shares, about 4, to 2e-7.
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-4, atol=2e-6)
    for gradient in (student.hidden.grad, student.weight.grad):
        assert gradient is not None and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
@pytest.mark.parametrize("caps", [(None, None), (3.0, 3.0)])
def test_bfloat16(options: dict[str, Any], caps: Any) -> None:
    """Within what rounding logits of up to 16 to 8 bits gives."""
    student, teacher, targets = case(ignore=3, caps=caps)
    student, teacher = as_type(student, torch.bfloat16), as_type(teacher, torch.bfloat16)
    total, losses = summed_divergence(student, teacher, targets, chunk=7, **options)
    (total / TOKENS).backward()
    wanted, of_hidden, of_weight = naive(student, teacher, targets, **options, factor=1 / TOKENS)
    assert student.hidden.grad is not None and student.hidden.grad.dtype == torch.bfloat16
    assert float((losses.double() - wanted).abs().max()) < options.get("temperature", 1) * 4 * 16 * 2**-9
    near(student.hidden.grad, of_hidden, 0.02)
    near(student.weight.grad, of_weight, 0.02)


def test_types_may_differ_and_autocast_counts() -> None:
    student, teacher, targets = case()
    wanted, of_hidden, _ = naive(student, teacher, targets)
    for kinds in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        mine, theirs = as_type(student, kinds[0]), as_type(teacher, kinds[1])
        total, losses = summed_divergence(mine, theirs, targets)
        total.backward()
        near(losses, wanted, 0.02)
        near(mine.hidden.grad, of_hidden, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = summed_divergence(student, teacher, targets)
    total.backward()
    assert student.hidden.grad is not None and student.hidden.grad.dtype == torch.float32
    near(losses, wanted, 0.02)
    near(student.hidden.grad, of_hidden, 0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_on_a_gpu(options: dict[str, Any]) -> None:
    student, teacher, targets = case(ignore=3, caps=(3.0, None))
    wanted, of_hidden, of_weight = naive(student, teacher, targets, **options)
    mine, theirs = (Readout(*(t.detach().cuda() for t in r[:2]), r.cap) for r in (student, teacher))
    mine.hidden.requires_grad_(), mine.weight.requires_grad_()
    total, losses = summed_divergence(mine, theirs, targets.cuda(), chunk=5, **options)
    total.backward()
    for got, want in ((losses, wanted), (mine.hidden.grad, of_hidden), (mine.weight.grad, of_weight)):
        assert got is not None
        near(got.cpu(), want, 1e-5)


# --- what is asked for, and what is not


@pytest.mark.parametrize("tokens", [0, 1])
def test_next_to_no_tokens(tokens: int) -> None:
    student, teacher, targets = case(tokens)
    total, losses = summed_divergence(student, teacher, targets)
    total.backward()
    assert losses.shape == (tokens,) and bool(total > 0) == bool(tokens)


def test_a_frozen_side_gets_no_gradient() -> None:
    student, teacher, targets = case()
    _, of_hidden, _ = naive(student, teacher, targets)
    student.weight.requires_grad_(False)
    summed_divergence(student, teacher, targets)[0].backward()
    assert student.weight.grad is None
    near(student.hidden.grad, of_hidden, 2e-6)


def test_what_is_given_is_not_changed() -> None:
    student, teacher, targets = case(ignore=2, caps=(3.0, 3.0))
    given = [*student[:2], *teacher[:2], targets]
    before = [t.detach().clone() for t in given]
    summed_divergence(student, teacher, targets, temperature=2, alpha=0.5, top_k=5)[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


def test_what_does_not_fit() -> None:
    student, teacher, targets = case()
    with pytest.raises(ValueError, match="vocabularies of 61 and 60 ids do not fit"):
        summed_divergence(student, teacher._replace(weight=teacher.weight[1:]), targets)
    with pytest.raises(ValueError, match="24 and 23 states and 24 targets"):
        summed_divergence(student, teacher._replace(hidden=teacher.hidden[1:]), targets)
    with pytest.raises(ValueError, match="chunk 0 is not positive"):
        summed_divergence(student, teacher, targets, chunk=0)


# --- memory


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_are_never_held(dtype: torch.dtype, options: dict[str, Any]) -> None:
    student, teacher, targets = case(200, caps=(3.0, None))
    student, teacher = as_type(student, dtype), as_type(teacher, dtype)
    shapes = tuple(t.shape for t in (*student[:2], *teacher[:2]))
    with largest(exempt=shapes) as sizes:
        summed_divergence(student, teacher, targets, chunk=20, **options)[0].backward()
    assert sizes.most == 20 * VOCABULARY
    with largest(exempt=shapes) as sizes:
        plain(student, teacher).backward()
    assert sizes.most == 200 * VOCABULARY  # what the test would see


plain: Callable[[Readout, Readout], Tensor] = lambda student, teacher: cross_entropy(  # noqa: E731
    logits(student).float(), logits(teacher).float().softmax(1), reduction="sum"
)
