"""The logits of one checkpoint in transformers and in the tools that people use next."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def transformers_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits [windows, positions, vocabulary] of plain transformers in float32."""
    from helpers import hf

    return hf(folder)(input_ids=ids, use_cache=False).logits


def onnx_logits(folder: Path, ids: Tensor, work: Path) -> Tensor:
    """Logits of ONNX Runtime, from a graph that ``torch.onnx`` exports for any number of windows and positions."""
    import onnxruntime

    from helpers import hf

    path, dimensions = work / "model.onnx", {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    fields: dict[str, Any] = {"input_names": ["input_ids"], "dynamo": True, "dynamic_shapes": dimensions}
    torch.onnx.export(_Logits(hf(folder)), (ids[:2, :7],), path, **fields, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


class _Logits(torch.nn.Module):
    """A model whose forward pass takes ids and returns logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def mlx_logits(folder: Path, ids: Tensor, work: Path) -> Tensor:
    """Logits of mlx-lm, which reads the Hugging Face directory itself."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return torch.from_numpy(np.array(model(mx.array(ids.numpy())).astype(mx.float32)))


def llama_cpp_logits(folder: Path, ids: Tensor, work: Path) -> Tensor:
    """Logits of llama.cpp, from a GGUF file in float32."""
    from gguf_file import write_gguf

    return gguf_logits(write_gguf(folder, work / "model.gguf"), ids)


def gguf_logits(path: Path, ids: Tensor) -> Tensor:
    """Logits of llama.cpp for a GGUF file, in a process of its own: it may end its process on a model it cannot run."""
    inputs, outputs = path.with_suffix(".ids.npy"), path.with_suffix(".logits.npy")
    np.save(inputs, ids.numpy())
    done = subprocess.run([sys.executable, __file__, path, inputs, outputs], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}")
    return torch.from_numpy(np.load(outputs))


def _run_llama_cpp(path: str, inputs: str, outputs: str) -> None:
    """Compute logits through cyllama, with a cache in float32 and without flash attention, which is in float16."""
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):
        """With the attribute that ``get_logits_ith`` of cyllama 0.2.18 reads and its models lack."""

        @property
        def n_vocab(self) -> int:
            return self.get_vocab().n_vocab

    model = Model(path, llama_cpp.LlamaModelParams(), verbose=False)
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx, settings.n_batch, settings.type_k, settings.type_v = 64, 64, 0, 0  # 0: float32
    settings.flash_attn_type = 0
    settings.n_threads = settings.n_threads_batch = 1
    rows = []
    for window in np.load(inputs).tolist():
        context = llama_cpp.LlamaContext(model, settings, verbose=False)
        batch = llama_cpp.LlamaBatch(n_tokens=len(window), embd=0, n_seq_max=1)
        for position, token in enumerate(window):
            batch.add(token, position, [0], True)
        context.decode(batch)
        rows.append([list(context.get_logits_ith(position)) for position in range(len(window))])
    np.save(outputs, np.array(rows, dtype=np.float32))


#: name -> the packages that it needs, and the function of a directory, ids and a folder to work in
RUNTIMES: dict[str, tuple[tuple[str, ...], Callable[[Path, Tensor, Path], Tensor]]] = {
    "ONNX Runtime": (("onnxscript", "onnxruntime"), onnx_logits),
    "mlx-lm": (("mlx.core", "mlx_lm"), mlx_logits),
    "llama.cpp": (("gguf", "cyllama"), llama_cpp_logits),
}

if __name__ == "__main__":
    _run_llama_cpp(*sys.argv[1:])
