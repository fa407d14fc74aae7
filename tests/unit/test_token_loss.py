"""Losses and gradients in chunks, against the formula and against transformers' own logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from family_configs import FAMILY_CONFIGS
from helpers import hf, largest, near, tiny_family, windows
from secateur.errors import UserError
from secateur.evaluation.loss import token_losses
from secateur.losses import next_token as token_loss
from secateur.losses.next_token import IGNORE_INDEX, model_loss, summed_loss

TOKENS, HIDDEN, VOCABULARY = 24, 16, 61


@pytest.fixture(autouse=True, params=["one tile", "tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's products whole, and seven of its rows at a time."""
    if request.param == "tiles":
        monkeypatch.setattr(token_loss, "_CPU_TILE", 7 * HIDDEN)


def case(tokens: int = TOKENS, *, ignore: int = 0, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets, the first ``ignore`` and one in the middle not counted."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=draw) * scale
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw)
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=draw)
    if ignore:
        targets[:ignore] = targets[tokens // 2] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and both gradients in float64, by autograd, one token at a time."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    losses = []
    for state, target in zip(h, targets.tolist(), strict=True):
        z = w @ state
        z = z if cap is None else cap * torch.tanh(z / cap)
        losses.append(torch.log(torch.exp(z - z.max()).sum()) + z.max() - z[target] if target >= 0 else 0 * z[0])
    every = torch.stack(losses)
    (every.sum() * factor).backward()
    assert h.grad is not None and w.grad is not None
    return every.detach(), h.grad, w.grad


# --- against the formula


@pytest.mark.parametrize("chunk", [None, 1, 5, 8, 24, 100])  # 5 leaves a rest
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("ignore", [0, 7])
def test_against_the_formula(chunk: int | None, cap: float | None, ignore: int) -> None:
    hidden, weight, targets = case(ignore=ignore)
    total, losses = summed_loss(hidden, weight, targets, cap=cap, chunk=chunk)
    (total * 0.37).backward()
    wanted, of_hidden, of_weight = naive(hidden, weight, targets, cap, 0.37)
    assert total.shape == () and total.dtype == losses.dtype == torch.float32
    assert not losses.requires_grad and losses.shape == (TOKENS,)
    assert (losses == 0).tolist() == (targets == IGNORE_INDEX).tolist()
    near(losses, wanted, 2e-6)
    near(total, wanted.sum(), 1e-6)
    near(hidden.grad, of_hidden, 2e-6)
    near(weight.grad, of_weight, 2e-6)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_flat_and_extreme_logits(scale: float, cap: float | None) -> None:
    """Logits up to a thousand, whose exponentials overflow, and targets whose probability underflows."""
    hidden, weight, targets = case(scale=scale)
    total, losses = summed_loss(hidden, weight, targets, cap=cap, chunk=5)
    total.backward()
    wanted, of_hidden, of_weight = naive(hidden, weight, targets, cap)
    assert scale < 1 or float(losses.max()) > (100 if cap is None else 55)
    # Logits of a thousand are rounded to 6e-5, which their exponentials show.
    tolerance = 2e-6 if scale < 1 else 1e-4
    near(losses, wanted, tolerance)
    near(hidden.grad, of_hidden, tolerance)
    near(weight.grad, of_weight, tolerance)


@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_bfloat16(chunk: int | None, cap: float | None) -> None:
    """Within what rounding to 8 bits gives: logits by 2^-9 of up to 16, slopes and results by 2^-9 of themselves."""
    hidden, weight, targets = case(ignore=3)
    hidden, weight = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    total, losses = summed_loss(hidden, weight, targets, cap=cap, chunk=chunk)
    (total / TOKENS).backward()
    wanted, of_hidden, of_weight = naive(hidden, weight, targets, cap, 1 / TOKENS)
    assert total.dtype == losses.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert float((losses.double() - wanted).abs().max()) < 2 * 16 * 2**-9
    near(hidden.grad, of_hidden, 0.02)
    near(weight.grad, of_weight, 0.02)


def test_bfloat16_sums_over_chunks_in_float32() -> None:
    """A thousand chunks that all add the same to the head's gradient: in bfloat16 the sum would stop growing."""
    hidden = torch.ones(1000, HIDDEN, dtype=torch.bfloat16)
    weight = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    summed_loss(hidden, weight, torch.zeros(1000, dtype=torch.int64), chunk=1)[0].backward()
    assert weight.grad is not None
    near(weight.grad[0], torch.full((HIDDEN,), 1000 * (1 / VOCABULARY - 1), dtype=torch.float64), 0.01)


def test_bfloat16_is_as_exact_as_the_plain_way() -> None:
    hidden, weight, targets = case(512)
    hidden, weight = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    wanted = naive(hidden, weight, targets, None)[1:]
    errors = []
    for way in (lambda h, w: summed_loss(h, w, targets, chunk=64)[0], plain_sum(targets)):
        found = torch.autograd.grad(way(hidden, weight), (hidden, weight))
        errors.append([float((f.double() - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)])
    assert all(ours < 1.25 * plain for ours, plain in zip(*errors, strict=True)), errors


def plain_sum(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda h, w: cross_entropy((h @ w.T).float(), targets, reduction="sum")


def test_autocast_rounds_products_and_gives_gradients_in_float32() -> None:
    hidden, weight, targets = case(512)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = summed_loss(hidden, weight, targets, chunk=100)
    found = torch.autograd.grad(total, (hidden, weight))
    rounded, plain = naive(hidden.bfloat16(), weight.bfloat16(), targets, None), naive(hidden, weight, targets, None)
    near(total, rounded[0].sum(), 1e-3)
    for gradient, wanted in zip(found, plain[1:], strict=True):
        assert gradient.dtype == torch.float32
        near(gradient, wanted, 0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_on_a_gpu(dtype: torch.dtype, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_loss._TILE, "cuda", 7 * HIDDEN)
    hidden, weight, targets = (t.detach().cuda() for t in case(ignore=7))
    hidden, weight = (t.to(dtype).requires_grad_() for t in (hidden, weight))
    _, losses = found = summed_loss(hidden, weight, targets, cap=cap, chunk=5)
    (found[0] * 0.37).backward()
    wanted, of_hidden, of_weight = naive(hidden.cpu(), weight.cpu(), targets.cpu(), cap, 0.37)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for got, want in ((losses, wanted), (hidden.grad, of_hidden), (weight.grad, of_weight)):
        assert got is not None
        near(got.cpu(), want, tolerance)


# --- what is asked for, and what is not


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = case(ignore=2)
    _, of_hidden, of_weight = naive(hidden, weight, targets, None)
    if frozen == "weight":
        weight.requires_grad_(False)
        monkeypatch.setattr(token_loss, "_add_product", None)  # it must not be called
    else:
        hidden.requires_grad_(False)
    with largest(exempt=()) as sizes:
        summed_loss(hidden, weight, targets, chunk=4)[0].backward()
    if frozen == "weight":
        near(hidden.grad, of_hidden, 2e-6)
        assert weight.grad is None and sizes.most < weight.numel()
    else:
        near(weight.grad, of_weight, 2e-6)
        assert hidden.grad is None


def test_without_gradients_only_losses_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = case(ignore=2)
    wanted, *_ = naive(hidden, weight, targets, None)
    monkeypatch.setattr(token_loss, "_add_product", None)
    with torch.no_grad(), largest(exempt=()) as sizes:
        total, losses = summed_loss(hidden, weight, targets, chunk=4)
    assert not total.requires_grad and sizes.products == -(-VOCABULARY * HIDDEN // token_loss._CPU_TILE) * 6
    near(losses, wanted, 2e-6)
    frozen, _ = summed_loss(hidden.detach(), weight.detach(), targets)
    assert not frozen.requires_grad


def test_as_many_products_as_the_plain_way() -> None:
    hidden, weight, targets = case()
    with largest(exempt=()) as sizes:
        summed_loss(hidden, weight, targets, chunk=TOKENS)[0].backward()
    tiles = -(-VOCABULARY * HIDDEN // token_loss._CPU_TILE)
    assert sizes.products == 1 + 2 * tiles


def test_tied_weights_get_both_gradients() -> None:
    _, weight, targets = case()
    ids = targets.roll(1)
    found = torch.autograd.grad(summed_loss(torch.tanh(weight[ids]), weight, targets, chunk=5)[0], weight)[0]
    exact = weight.detach().double().requires_grad_()
    wanted = torch.autograd.grad(plain_sum(targets)(torch.tanh(exact[ids]), exact), exact)[0]
    near(found, wanted, 1e-5)


@pytest.mark.parametrize("tokens", [0, 1])
def test_next_to_no_tokens(tokens: int) -> None:
    hidden, weight, targets = case(tokens)
    total, losses = summed_loss(hidden, weight, targets)
    total.backward()
    assert losses.shape == (tokens,) and bool(total > 0) == bool(tokens)
    assert hidden.grad is not None and hidden.grad.shape == (tokens, HIDDEN)
    assert weight.grad is not None and bool(weight.grad.any()) == bool(tokens)


def test_all_ignored() -> None:
    hidden, weight, targets = case(ignore=TOKENS)
    total, losses = summed_loss(hidden, weight, targets, chunk=5)
    total.backward()
    assert not total.any() and not losses.any()
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_what_is_given_is_not_changed() -> None:
    hidden, weight, targets = case(ignore=2)
    before = [t.detach().clone() for t in (hidden, weight, targets)]
    summed_loss(hidden, weight, targets, cap=3.0)[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, targets), strict=True))


def test_gradients_accumulate_over_calls() -> None:
    hidden, weight, targets = case()
    for part in (slice(0, 9), slice(9, TOKENS)):
        (summed_loss(hidden[part], weight, targets[part])[0] / TOKENS).backward()
    _, of_hidden, of_weight = naive(hidden, weight, targets, None, 1 / TOKENS)
    near(hidden.grad, of_hidden, 2e-6)
    near(weight.grad, of_weight, 2e-6)


def test_a_chunk_for_every_count() -> None:
    assert token_loss._pick_chunk(0, 61, "cpu") == 1
    assert token_loss._pick_chunk(300, 61, "cpu") == 300  # not 256 and 44
    assert token_loss._pick_chunk(2047, 61, "cpu") == 256
    assert token_loss._pick_chunk(8192, 2**17, "cuda") == 128
    assert token_loss._pick_chunk(8192, 2**22, "cuda") == 16


# --- errors


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets = case()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(summed_loss(hidden, weight, targets)[0], hidden, create_graph=True)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets = case()
    total, _ = summed_loss(hidden, weight, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        total.backward()


def test_shapes_that_do_not_fit() -> None:
    hidden, weight, targets = case()
    with pytest.raises(ValueError, match=r"hidden \[24, 16\] and weight \[61, 8\] do not fit"):
        summed_loss(hidden, weight[:, :8], targets)
    with pytest.raises(ValueError, match=r"targets \[23\] do not fit hidden \[24, 16\]"):
        summed_loss(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="chunk 0 is not positive"):
        summed_loss(hidden, weight, targets, chunk=0)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        summed_loss(hidden, weight, targets + VOCABULARY)


# --- memory


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_are_never_held(dtype: torch.dtype, cap: float | None) -> None:
    hidden, weight, targets = case(200)
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    with largest(exempt=(weight.shape, hidden.shape)) as sizes:
        summed_loss(hidden, weight, targets, cap=cap, chunk=20)[0].backward()
    assert sizes.most == 20 * VOCABULARY
    with largest(exempt=(weight.shape, hidden.shape)) as sizes:
        plain_sum(targets)(hidden, weight).backward()
    assert sizes.most == 200 * VOCABULARY  # what the test would see


def test_a_model_s_logits_are_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "_CPU_TOKENS", 10)
    model = hf(tiny_family(tmp_path, "gemma3-untied", vocab_size=2000))
    exempt = (model.get_output_embeddings().weight.shape,)
    for measure in (lambda ids: model_loss(model, ids)[0].backward(), lambda ids: token_losses(model, ids)):
        with largest(exempt) as sizes:
            measure(windows(8, 11))
        assert sizes.most == 10 * 2000
    with largest(exempt) as sizes:
        model(windows(8, 11))
    assert sizes.most == 8 * 11 * 2000


def test_the_head_s_gradient_is_not_copied() -> None:
    hidden, weight, targets = case()
    total, _ = summed_loss(hidden, weight, targets)
    made: Any = total.grad_fn
    place = made.gradients[1].data_ptr()
    (total / TOKENS).backward()
    assert weight.grad is not None and weight.grad.data_ptr() == place


# --- models


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_every_family_against_its_own_logits(name: str, tmp_path: Path) -> None:
    model, ids = hf(tiny_family(tmp_path, name)), windows(4, 12)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    (wanted.sum() / 44).backward()
    reference = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    total, losses = model_loss(model, ids)
    (total / 44).backward()
    assert losses.shape == (4, 11)
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(total.detach(), wanted.detach().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(token_losses(model, ids), wanted.detach(), rtol=1e-6, atol=4e-6)
    for parameter, gradient in reference.items():
        assert gradient is not None
        if float(gradient.abs().max()) > 1e-6:  # a bias of keys without RoPE has no gradient but rounding
            near(model.get_parameter(parameter).grad, gradient.double(), 1e-4)


@pytest.mark.parametrize("name", ["granite", "gemma2", "gemma3-untied", "cohere2", "phi"])
def test_likelihoods_of_tasks_follow_scales_caps_and_biases(name: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from secateur.evaluation.lm_eval.likelihoods import _target_logprobs

    model, ids = hf(tiny_family(tmp_path, name)), windows(2, 12)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        logprobs, greedy = _target_logprobs(model, states, ids[:, 1:].flatten())
    expected = logits.log_softmax(1).gather(1, ids[:, 1:].reshape(-1, 1))[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy, logits.argmax(1) == ids[:, 1:].flatten())


def test_positions_and_targets_can_be_given(tmp_path: Path) -> None:
    model, ids = hf(tiny_family(tmp_path, "llama")), windows(3, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(3, 8)  # two texts in a window
    targets = ids[:, 1:].clone()
    targets[:, 2] = IGNORE_INDEX  # what the second begins with cannot be known
    total, losses = model_loss(model, ids, position_ids=positions, targets=targets)
    apart = [token_losses(model, part) for part in (ids[:, :3], ids[:, 3:])]
    wanted = torch.cat([apart[0], torch.zeros(3, 1), apart[1]], dim=1)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    assert float(total.detach()) == pytest.approx(float(wanted.sum()), rel=1e-5)


def test_windows_of_one_token(tmp_path: Path) -> None:
    total, losses = model_loss(hf(tiny_family(tmp_path, "llama")), windows(3, 1))
    assert not total.any() and losses.shape == (3, 0)


def test_an_unknown_family_is_told(tmp_path: Path) -> None:
    model = hf(tiny_family(tmp_path, "llama"))
    model.config.model_type = "llamma"
    with pytest.raises(UserError, match="'llamma' is not a known family"):
        model_loss(model, windows(1, 4))
