"""Which runtimes compute what transformers computes: logits of tiny checkpoints of each family, whole and pruned.

python benchmarks/runtimes.py [FAMILY ...]     # needs any of mlx-lm, ctranslate2, onnxruntime with onnxscript

The results are in the table of `secateur.model.runtimes`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from family_configs import FAMILIES, FAMILY_CONFIGS
from helpers import hf, logits, tiny_family, windows
from secateur.cli import main
from secateur.model.families import FAMILIES as FAMILY_TABLE

#: name of a cut -> arguments of `secateur prune`; none: the model as it is
CUTS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "hidden": ("--method", "random-width", "--ratio", "0.4"),
    "heads": ("--method", "random-width", "--ratio", "0.4", "--axes", "kv,ffn"),
    "depth": ("--method", "random-depth", "--ratio", "0.4", "--no-keep-pattern"),
    "period": ("--method", "random-depth", "--ratio", "0.4"),
    "FLAP": ("--method", "flap", "--ratio", "0.4"),
    "2:4": ("--method", "magnitude", "--pattern", "2:4"),
}
IDS = windows(1, 20, seed=9)


def add_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 50 words, which converters read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 50)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def run_mlx(folder: Path) -> np.ndarray:
    """Logits [positions, vocabulary] of mlx-lm."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model = load_model(folder)[0]
    return np.array(model(mx.array(IDS.tolist())).astype(mx.float32))[0]


def run_onnx(folder: Path) -> np.ndarray:
    """Logits of ONNX Runtime, after torch.onnx."""
    import onnxruntime

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = hf(folder)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    path = folder / "model.onnx"
    torch.onnx.export(Logits(), (IDS,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: IDS.numpy()})[0][0]


def run_ctranslate2(folder: Path) -> np.ndarray:
    """Logits of CTranslate2."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    out = folder / "ctranslate2"
    TransformersConverter(str(folder)).convert(str(out), force=True)
    ids = ctranslate2.StorageView.from_array(IDS.numpy().astype(np.int32))
    lengths = ctranslate2.StorageView.from_array(np.array([IDS.shape[1]], dtype=np.int32))
    return np.array(ctranslate2.Generator(str(out), device="cpu").forward_batch(ids, lengths))[0]


RUNTIMES: dict[str, Callable[[Path], np.ndarray]] = {
    "mlx-lm": run_mlx,
    "CTranslate2": run_ctranslate2,
    "ONNX Runtime": run_onnx,
}


def compare(runtime: Callable[[Path], np.ndarray], folder: Path) -> str:
    """The largest difference of logits as a share of their spread, and the share of equal choices; or the error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = runtime(folder)
    except ImportError as error:
        return f"not installed: {error.name}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:110]}"
    reference = logits(hf(folder), IDS)[0].numpy()
    difference = float(np.abs(result - reference).max() / reference.std())
    return f"{difference:.1e}, {(result.argmax(-1) == reference.argmax(-1)).mean():.2f}"


def published_kinds(name: str) -> dict[str, Any]:
    """Changes that give a tiny config the layer kinds, windows and RoPE of published models."""
    period = next(family.pattern for family in FAMILY_TABLE if family.name == name)
    if name in ("mistral", "starcoder2", "smollm3"):
        changes: dict[str, Any] = {"sliding_window": None, "use_sliding_window": False}
    elif name.startswith("gemma"):  # llama.cpp takes head_dim for it
        changes = {"query_pre_attn_scalar": FAMILY_CONFIGS[name].get("head_dim", 8)}
    else:
        changes = {"rope_parameters": None} if name in ("olmo3", "hunyuan_v1_dense") else {}
    lists = {"layer_types": None, "no_rope_layers": None, "num_hidden_layers": 2 * max(period, 4)}
    return changes | (lists if period else {})


def run(families: list[str]) -> None:
    """Print a line for each family, cut and runtime."""
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        np.save(root / "ids.npy", windows(8, 16).numpy())
        for family in families:
            model = tiny_family(root, family, **published_kinds(family))
            add_tokenizer(model)
            for cut, arguments in CUTS.items():
                folder = root / f"{family}-{cut}" if arguments else model
                source = ("--calibration", f"tokens:{root / 'ids.npy'}") if cut == "FLAP" else ()
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as log:
                    code = arguments and main(["prune", str(model), str(folder), *arguments, *source])
                if code:
                    print(f"{family:<12} {cut:<7} {log.getvalue().splitlines()[-1]}", flush=True)
                    continue
                for title, runtime in RUNTIMES.items():
                    if title != "ONNX Runtime" or cut in ("whole", "FLAP"):  # it runs what torch traces
                        print(f"{family:<12} {cut:<7} {title:<13} {compare(runtime, folder)}", flush=True)


if __name__ == "__main__":
    run(sys.argv[1:] or list(FAMILIES))
