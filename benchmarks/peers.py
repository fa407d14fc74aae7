"""Prune a checkpoint with another tool: ``python benchmarks/peers.py TOOL METHOD MODEL OUT --tokens FILE.npy``.

It runs under an interpreter of its own, which has the tools and not secateur. What a tool leaves open stays at its
defaults, one window at a time among them; weights are loaded as float32 and written densely.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

#: tool -> methods of the benchmark that it has; a name with N:M is for that pattern alone
OFFERED = {
    "llmcompressor": ("wanda", "sparsegpt", "sparsegpt-2:4"),
    "modelopt": ("sparsegpt-2:4",),
}


def main() -> None:
    """Load, prune, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=OFFERED)
    parser.add_argument("method")
    parser.add_argument("model", nargs="?", help="none: import the tool and stop")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--tokens", help="token ids [windows, positions]")
    parser.add_argument("--windows", type=int)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    prune = {"llmcompressor": _llmcompressor, "modelopt": _modelopt}[asked.tool](asked.method, asked.ratio)
    if asked.model is None:
        return
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval().to(asked.device)
    windows = torch.from_numpy(np.load(asked.tokens)[: asked.windows].astype(np.int64))
    model = prune(model, windows)
    model.save_pretrained(asked.out, **({"save_compressed": False} if asked.tool == "llmcompressor" else {}))


def _llmcompressor(method: str, ratio: float) -> Any:
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.pruning import (  # pyright: ignore[reportMissingImports]
        SparseGPTModifier,
        WandaPruningModifier,
    )
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    def prune(model: PreTrainedModel, windows: torch.Tensor) -> PreTrainedModel:
        name, _, pattern = method.partition("-")
        made = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[name]
        modifier = made(sparsity=ratio, mask_structure=pattern or "0:0", ignore=["re:.*lm_head"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
        rows = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
        loader = torch.utils.data.DataLoader(rows, batch_size=1)  # pyright: ignore[reportArgumentType]
        return oneshot(
            model=model, processor=tokenizer, recipe=modifier, dataset=loader, num_calibration_samples=len(windows)
        )

    return prune


def _modelopt(method: str, ratio: float) -> Any:
    import modelopt.torch.sparsity as mts  # pyright: ignore[reportMissingImports]

    def prune(model: PreTrainedModel, windows: torch.Tensor) -> PreTrainedModel:
        def run(model: Any) -> None:
            for window in windows.to(model.device):
                model(input_ids=window[None], use_cache=False)

        assert (method, ratio) == ("sparsegpt-2:4", 0.5), "2:4 is all that it has"
        sparse = mts.sparsify(model, "sparsegpt", config={"forward_loop": run, "device": str(model.device)})
        return mts.export(sparse)

    return prune


if __name__ == "__main__":
    main()
