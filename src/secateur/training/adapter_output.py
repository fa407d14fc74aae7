"""Write an adapter in the format of PEFT, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from secateur import distributed
from secateur.files import write_json, write_text
from secateur.formatting import plural
from secateur.model.card import CARD, Ancestry
from secateur.model.checkpoint_writing import PROVENANCE
from secateur.model.shapes import Shape
from secateur.progress import notify
from secateur.training.adapter import Adapter, adapted_linears
from secateur.training.lora import factors, peft_config
from secateur.version import __version__

__all__ = ["write_adapter"]


def write_adapter(
    folder: Path,
    model: Any,
    adapter: Adapter,
    base: str,
    ancestry: Ancestry | None,
    history: Mapping[str, Any],
    result: Mapping[str, Any],
    *,
    masks: bool,
) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors``, a card and ``secateur.json``.

    All processes give their parts of the factors, the first one writes.

    Args:
        base: name or directory of the model that the adapter belongs to.
        ancestry: of that model.
        history: how the adapter came about, for ``secateur.json``.
        result: of :func:`secateur.training.loop.train_loop`.
        masks: whether the update was masked, which PEFT does not do.
    """
    tensors = _peft_tensors(model)
    if not distributed.is_main():
        return
    folder.mkdir(exist_ok=True)
    config = peft_config(adapter, _short_names(adapter, Shape.of_config(model.config, where="the model")))
    config.base_model_name_or_path, config.inference_mode = base, True
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    write_json(folder / "adapter_config.json", dict(sorted(values.items())))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / PROVENANCE, {"secateur": __version__, "kind": "adapter", "masked": masks, **history})
    write_text(folder / CARD, _card(adapter, base, ancestry, result, masks))
    if masks:
        notify(f"{folder}: {_UNMASKED}")


_UNMASKED = (
    "PEFT knows no masks: loaded by PEFT, this adapter fills the zeros of its base; merge it, then apply the masks of "
    "the base with `secateur mask`"
)


_FOUR_BIT = (
    "The base was in 4 bits (NF4, blocks of 64) in training: load it with `BitsAndBytesConfig(load_in_4bit=True, "
    'bnb_4bit_quant_type="nf4")` for the losses of the training'
)


def _peft_tensors(model: nn.Module) -> dict[str, Any]:
    """The factors under PEFT's names, on the CPU; all processes together."""
    return {
        f"base_model.model.{name}.lora_{letter}.weight": factor.cpu().contiguous()
        for name, pair in factors(model)
        for letter, factor in zip("AB", pair, strict=True)
    }


def _short_names(adapter: Adapter, shape: Shape) -> list[str]:
    """The names of linears for PEFT: within a block where all blocks have an adapter there, else in full."""
    everywhere = adapted_linears(Adapter(rank=1), shape)
    names = adapted_linears(adapter, shape)

    def within(name: str) -> str:
        return name.removeprefix(f"{shape.family.layers}.").partition(".")[2]

    partial = {within(name) for name in everywhere if name not in names}
    return sorted({name if within(name) in partial else within(name) for name in names})


def _card(adapter: Adapter, base: str, ancestry: Ancestry | None, result: Mapping[str, Any], masks: bool) -> str:
    """The model card of an adapter."""
    from huggingface_hub import ModelCard, ModelCardData

    curve, ancestry = result["curve"], ancestry or Ancestry()
    names = list(ancestry.base_model)
    data = ModelCardData(
        base_model=names[0] if len(names) == 1 else names or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["secateur", "lora"],
        **ancestry.metadata,
    )
    lines = [f"Trained by secateur on {plural(result['tokens'], 'token')}: {adapter}."]
    if curve[-1]["loss"] is not None:
        lines += [
            "",
            f"- held-out loss: {curve[0]['loss']:.4f} before, {curve[-1]['loss']:.4f} after, in nats per token",
        ]
    if masks:
        lines += ["", f"The base is sparse, and the update was masked in training. {_UNMASKED}."]
    if adapter.base == "4bit":
        lines += ["", f"{_FOUR_BIT}."]
    usage = [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{names[0] if names else "path/to/the/base"}")',
        'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
        "```",
    ]
    title = f"# LoRA adapter of {Path(base).name}"
    return str(ModelCard("\n".join([f"---\n{data.to_yaml()}\n---\n", title, "", *lines, "", *usage, ""])))
