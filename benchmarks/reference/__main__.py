"""Prune a checkpoint with a reference: ``python -m benchmarks.reference METHOD MODEL OUT --tokens FILE.npy``.

Writes the pruned checkpoint, in the type that was stored, and ``kept.safetensors``.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging


def main() -> None:
    """Load, prune, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", required=True, help="token ids [windows, positions]")
    parser.add_argument("--windows", type=int, help="windows at most")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--group", type=int, help="sparsegpt: the share goes from each so many weights in a row")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    logging.disable_progress_bar()
    stored = AutoConfig.from_pretrained(asked.model).dtype
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval().to(asked.device)
    windows = torch.from_numpy(np.load(asked.tokens)[: asked.windows].astype(np.int64)).to(asked.device)
    prune = importlib.import_module(f"benchmarks.reference.{asked.method.replace('-', '_')}").prune
    kept = prune(model, windows, asked.ratio, **({"group": asked.group} if asked.group else {}))
    model.to(stored).save_pretrained(asked.out)
    save_file({name: value.cpu().contiguous() for name, value in kept.items()}, asked.out / "kept.safetensors")


if __name__ == "__main__":
    main()
