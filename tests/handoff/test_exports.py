"""Pruned checkpoints in the tools that people use next: the same logits as in transformers, or a failure on record.

Needs the extra ``handoff`` (``pip install -c constraints.txt -e '.[handoff]'``); what is not installed is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtimes import RUNTIMES, transformers_logits
from torch import Tensor

import secateur
from helpers import hf, tiny_family, windows
from secateur.evaluation.cost import sparsity
from secateur.model.checkpoint import Checkpoint
from secateur.model.layer_pattern import follows_period, layer_kinds

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of the tools themselves

IDS = windows(3, 20)
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
PERIOD = 6  #: of Gemma 3: five layers with a window, one without

#: family -> what its tiny model has besides ``SIZES``
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 6},
    "qwen3": {"num_hidden_layers": 6},
    "gemma3": {
        "num_hidden_layers": 12,
        "layer_types": [*["sliding_attention"] * (PERIOD - 1), "full_attention"] * 2,
        "query_pre_attn_scalar": 16,
    },
}

#: kind of pruning -> arguments of ``secateur.prune``
PRUNINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "depth": {"method": "shortgpt", "ratio": 0.5},
    "depth off the period": {"method": "random-depth", "ratio": 0.33, "keep_pattern": False},
    "depth below one period": {"method": "random-depth", "shape": "layers=5", "keep_pattern": False},
    "width": {"method": "minitron-width", "shape": "hidden=48,ffn=64"},
    "heads": {"method": "llm-pruner", "shape": "heads=2,kv_heads=1"},
    "flap": {"method": "flap", "ratio": 0.3},
    "sparse": {"method": "wanda", "pattern": "2:4"},
    "merge and mask": {"method": "wanda", "pattern": "2:4"},
}

#: (runtime, family, pruning) -> how it fails. A tool that has learned to read such a model fails its test; strike it
#: out here and in docs/next-steps.md then.
DIFFERS, REFUSES = "other logits", "an error"
FAILURES = {
    ("llama.cpp", "gemma3", "depth off the period"): DIFFERS,
    ("mlx-lm", "gemma3", "depth off the period"): DIFFERS,
    ("llama.cpp", "gemma3", "depth below one period"): REFUSES,  # no layer without a window: it ends its process
    ("mlx-lm", "gemma3", "depth below one period"): REFUSES,
    **{(tool, family, "flap"): REFUSES for tool in ("llama.cpp", "mlx-lm") for family in ("qwen3", "gemma3")},
}

#: largest difference, as a share of the largest logit. llama.cpp takes Gemma's GELU from a table in float16, mlx-lm
#: rounds the root of the hidden size, which multiplies the embeddings, to bfloat16.
TOLERANCE = {("llama.cpp", "gemma3"): 2e-3, ("mlx-lm", "gemma3"): 3e-3}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Tensor]]:
    """A function of family and pruning: the directory, made once, and its logits in transformers."""
    folder, made = tmp_path_factory.mktemp("handoff"), {}

    def output(family: str, pruning: str) -> tuple[Path, Tensor]:
        if (family, "dense") not in made:
            made[family, "dense"] = tiny_family(folder, family, **SIZES, **MODELS[family])
        if (family, pruning) not in made:
            fields = dict(PRUNINGS[pruning])
            out = folder / f"{family}-{pruning.replace(' ', '-')}"
            path = secateur.prune(made[family, "dense"], out, calibration=IDS, **fields).path
            made[family, pruning] = merge_and_mask(path) if pruning == "merge and mask" else path
        path = made[family, pruning]
        return path, transformers_logits(path, IDS)

    return output


def merge_and_mask(pruned: Path) -> Path:
    """Merge random adapters into a sparse checkpoint, and set its zeros again."""
    peft = pytest.importorskip("peft", reason="peft is not installed (the extra handoff)")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    merged = pruned.with_name(f"{pruned.name}-merged")
    peft.get_peft_model(hf(pruned), config).merge_and_unload().save_pretrained(merged)
    assert sparsity(Checkpoint(merged)) < 0.001
    masked = secateur.mask(merged, pruned)
    assert sparsity(Checkpoint(masked.path)) == 0.5
    return masked.path


@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_logits_are_those_of_transformers(
    runtime: str, family: str, pruning: str, outputs: Callable[[str, str], tuple[Path, Tensor]], tmp_path: Path
) -> None:
    modules, compute = RUNTIMES[runtime]
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is not installed (the extra handoff)", exc_type=ImportError)
    folder, reference = outputs(family, pruning)
    failure = FAILURES.get((runtime, family, pruning))
    if failure == REFUSES:
        with pytest.raises(Exception):  # noqa: B017 - each tool has errors of its own
            compute(folder, IDS, tmp_path)
        return
    logits = compute(folder, IDS, tmp_path)
    error = float((logits - reference).abs().max() / reference.abs().max())
    agreement = float((logits.argmax(-1) == reference.argmax(-1)).float().mean())
    print(f"{runtime}, {family}, {pruning}: difference {error:.1e} of the largest logit, agreement {agreement:.2f}")
    if failure == DIFFERS:
        assert error > 0.1
    else:
        assert error < TOLERANCE.get((runtime, family), 3e-5)
        assert agreement == 1.0


def test_the_period_is_kept_unless_it_is_not_wanted(outputs: Callable[[str, str], tuple[Path, Tensor]]) -> None:
    from transformers import AutoConfig

    for pruning, follows in (("depth", True), ("depth off the period", False)):
        config = AutoConfig.from_pretrained(outputs("gemma3", pruning)[0])
        assert follows_period(layer_kinds(config), PERIOD) is follows


@pytest.mark.parametrize(("shape", "agrees"), [("", True), ("layers=60", False), ("hidden=40", False)])
def test_llama_cpp_takes_the_attention_scale_of_gemma_27b_from_its_layers(
    shape: str, agrees: bool, tmp_path: Path
) -> None:
    """With 62 layers llama.cpp divides by the root of hidden / heads, whatever query_pre_attn_scalar says."""
    for module in RUNTIMES["llama.cpp"][0]:
        pytest.importorskip(module, reason=f"{module} is not installed (the extra handoff)")
    kinds = (["sliding_attention"] * (PERIOD - 1) + ["full_attention"]) * 11
    sizes: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 2}
    path = tiny_family(
        tmp_path,
        "gemma3",
        **sizes,
        intermediate_size=32,
        num_hidden_layers=62,
        layer_types=kinds[:62],
        query_pre_attn_scalar=12,
    )
    if shape:
        method = "shortgpt" if "layers" in shape else "minitron-width"
        path = secateur.prune(path, tmp_path / "out", method=method, shape=shape, calibration=IDS).path
    reference = transformers_logits(path, IDS)
    logits = RUNTIMES["llama.cpp"][1](path, IDS, tmp_path)
    error = float((logits - reference).abs().max() / reference.abs().max())
    print(f"{shape or 'dense'}: difference {error:.1e} of the largest logit")
    assert (error < 3e-3) is agrees
