"""Every row of the table of families, with every kind of pruning, and the page that says so: docs/families.md.

Each test measures one family, on a tiny checkpoint and on one with the ratios of a published one, and compares its rows
of the page. `make families` writes the page instead.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from expert_configs import MIXTURES as EXPERT_CONFIGS
from family_configs import FAMILIES, REALISTIC
from family_page import PAGE, FamilyPage, disagreements, fact_row, mixture_row, proof_row
from helpers import random_model
from mixture_proofs import MixtureProver
from proofs import SCORERS, PlainTransformers, Prover
from reference import Pruned, Zoo
from secateur.model.checkpoint import Checkpoint
from secateur.model.families import FAMILIES as TABLE

EXACT = 1e-5  #: limit of the difference from the whole model
MASKED = 5e-5  #: limit of the difference from a model changed in memory, which rounds otherwise
UPDATE = "UPDATE_FAMILIES" in os.environ
MIXTURES = [name for name in EXPERT_CONFIGS if "-" not in name]  #: families with routed experts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainTransformers]:
    process = PlainTransformers(tmp_path_factory.mktemp("plain"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def page() -> Iterator[FamilyPage]:
    page = FamilyPage(PAGE.read_text(encoding="utf-8"))
    yield page
    if UPDATE:
        PAGE.write_text(page.text([family.name for family in TABLE]), encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_pruning(name: str, zoo: Zoo, plain: PlainTransformers, page: FamilyPage) -> None:
    scorers = itertools.islice(itertools.cycle(SCORERS), FAMILIES.index(name), None)
    tiny = Prover(zoo, plain, name, next(scorers))
    model = random_model(REALISTIC[name], std=0.12)  # wider matrices, whose products are as large
    realistic = Prover(zoo, plain, zoo.add(f"{name} real", model), next(scorers))
    kinds, together = tiny.each_kind(), realistic.together()
    for kind, proof in [*kinds.items(), *together.items()]:
        assert proof.difference <= (EXACT if proof.exact else MASKED), (proof.pruned.name, kind)
        assert_lists_follow(proof.pruned)
    family = tiny.checkpoint.family
    assert set(kinds) >= {"sparse", *family.axes} and kinds["ffn"].exact
    rows = proof_row(family, kinds, together), fact_row(family, realistic.shape)
    if UPDATE:
        page.proofs[name], page.facts[name] = rows
    else:
        assert disagreements((*page.proofs[name], *page.facts[name]), (*rows[0], *rows[1])) == [], "make families"


@pytest.mark.parametrize("name", MIXTURES)
def test_every_kind_of_pruning_of_a_mixture(name: str, zoo: Zoo, plain: PlainTransformers, page: FamilyPage) -> None:
    prover = MixtureProver(zoo, plain, name)
    proofs = prover.each_kind()
    for kind, proof in proofs.items():
        assert proof.difference <= (EXACT if proof.exact else MASKED), (name, kind)
    assert set(proofs) == {"sparse", *prover.axes} - {"ffn"}
    row = mixture_row(prover.checkpoint.family, proofs)
    if UPDATE:
        page.mixtures[name] = row
    else:
        assert disagreements(page.mixtures[name], row) == [], "make families"


def test_the_page_and_the_tests_have_every_family() -> None:
    alone = [row for row in TABLE if not set(row.model_types).isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    # The rest only exist within image-text models.
    names = [row.name for row in alone if not row.experts]
    assert set(names) == set(FAMILIES) == set(REALISTIC) & set(names)
    mixtures = [row.name for row in alone if row.experts]
    assert set(mixtures) == set(MIXTURES)
    text = PAGE.read_text(encoding="utf-8")
    page = FamilyPage(text)
    assert UPDATE or (text == page.text([*names, *mixtures]) and set(page.mixtures) - {"family"} == set(MIXTURES)), (
        "make families"
    )


INDEX_LISTS = ("mlp_only_layers", "full_attn_idxs")


def assert_lists_follow(pruned: Pruned) -> None:
    """Whatever config.json lists by layer is that of the layers that stay."""
    checkpoint, keep = Checkpoint(pruned.directory), pruned.plan.keep_layers.tolist()
    before = {**checkpoint.config.to_dict(), **checkpoint.raw_config}
    for key, value in json.loads((pruned.out / "config.json").read_text()).items():
        if key in INDEX_LISTS and before[key] is not None:
            assert value == [new for new, old in enumerate(keep) if old in before[key]], key
        elif key == "per_layer_config":
            by_layer = {int(layer): values for layer, values in before[key].items()}
            assert {int(k): v for k, v in value.items()} == {
                new: by_layer[old] for new, old in enumerate(keep) if old in by_layer
            }
        elif key != "architectures" and isinstance(value, list) and isinstance(before.get(key), list):
            by_layer = len(before[key]) == pruned.plan.before.layers
            assert value == ([before[key][layer] for layer in keep] if by_layer else before[key]), key
