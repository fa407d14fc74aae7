"""Controls keep what they promise of a pruned model, and nothing else."""

from __future__ import annotations

import torch

from secateur.pruning.pattern import Pattern
from secateur.study.stages.controls import permuted_mask, random_mask, shuffle_weights

MASK = torch.rand(24, 32, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.1, 0.9, 32)
CHOSEN = torch.rand(24, 8, 4, generator=torch.Generator().manual_seed(1)).argsort(2)[..., :2]
PAIRS = torch.zeros(24, 8, 4).scatter_(2, CHOSEN, 1).bool().reshape(24, 32)  # 2:4


def test_a_permuted_mask_keeps_the_counts_of_rows_and_columns_but_not_their_places() -> None:
    found = permuted_mask(MASK, "a", 0)
    for axis in (0, 1):
        assert found.sum(axis).sort().values.tolist() == MASK.sum(axis).sort().values.tolist()
        assert found.sum(axis).tolist() != MASK.sum(axis).tolist()
    assert torch.equal(found, permuted_mask(MASK, "a", 0))
    assert not torch.equal(found, permuted_mask(MASK, "b", 0)) and not torch.equal(found, permuted_mask(MASK, "a", 1))


def test_a_random_mask_keeps_the_count_of_the_linear_alone() -> None:
    found = random_mask(MASK, "a", 0)
    assert int(found.sum()) == int(MASK.sum())
    ours, theirs = found.sum(0).float(), MASK.sum(0).float()
    assert float(ours.std()) < float(theirs.std()) / 2  # the columns' densities are gone
    places = torch.stack([random_mask(MASK, str(i), 0) for i in range(400)]).float().mean(0)
    assert float((places - MASK.float().mean()).abs().max()) < 0.12  # every place is as likely


def test_a_pattern_survives() -> None:
    pattern = Pattern(2, 4)
    for found in (permuted_mask(PAIRS, "a", 0, pattern), random_mask(PAIRS, "a", 0, pattern)):
        assert set(found.reshape(24, 8, 4).sum(2).flatten().tolist()) == {2}
        assert not torch.equal(found, PAIRS)


def test_shuffled_weights_are_the_same_values_elsewhere() -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(2)) * MASK
    read = shuffle_weights(lambda name: weight, {"a": MASK}, 0)
    found = read("a")
    assert torch.equal(found != 0, MASK)
    assert torch.equal(found[MASK].sort().values, weight[MASK].sort().values)
    assert not torch.equal(found, weight)
    whole = read("b")  # a tensor without a mask
    assert torch.equal(whole.flatten().sort().values, weight.flatten().sort().values)
