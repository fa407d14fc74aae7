"""Masks in the trainers of other packages, and after a merge of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import secateur
from helpers import hf, tiny_family, windows
from secateur.errors import RunError, UserError
from secateur.formatting import plural
from secateur.model.plan import load_masks

# Of the trainers themselves, which warn of their own deprecations and of a missing GPU.
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = windows(16, 12)
#: where the masks come from -> what is given to ``KeepMasks``
SOURCES: dict[str, Callable[[secateur.Pruned], Any]] = {
    "directory": lambda pruned: str(pruned.path),
    "result": lambda pruned: pruned,
    "plan": lambda pruned: pruned.plan,
    "mapping": lambda pruned: dict(load_masks(pruned.path)),
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> secateur.Pruned:
    """A Llama with half of its weights masked."""
    folder = tmp_path_factory.mktemp("masks")
    out = secateur.prune(tiny_family(folder, "llama"), folder / "pruned", method="wanda", ratio=0.5, calibration=IDS)
    assert abs(zero_share(hf(out.path), load_masks(out.path)) - 0.5) < 1e-3
    return out


def zero_share(model: nn.Module, masks: dict[str, Tensor]) -> float:
    """Share of zeros in the matrices that have a mask, by their plain names."""
    parameters = {name: p for name, p in model.named_parameters() if name in masks}
    assert len(parameters) == len(masks)
    return sum(int((p == 0).sum()) for p in parameters.values()) / sum(p.numel() for p in parameters.values())


def rows() -> Dataset:
    return Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})


def settings(folder: Path, **fields: Any) -> dict[str, Any]:
    common = {"output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    common |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": 3}
    return common | {"logging_strategy": "no", **fields}


def train(model: Any, folder: Path, *callbacks: Any, **fields: Any) -> Any:
    """Six steps of the Trainer of transformers."""
    arguments = TrainingArguments(**settings(folder, **fields))
    Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=list(callbacks)).train()
    return model


@pytest.mark.parametrize("source", SOURCES)
def test_a_trainer_keeps_the_zeros_with_the_callback_alone(
    pruned: secateur.Pruned, tmp_path: Path, source: str
) -> None:
    masks, before = load_masks(pruned.path), hf(pruned.path)
    plain = train(hf(pruned.path), tmp_path / "plain", save_strategy="no")
    model = train(hf(pruned.path), tmp_path / "masked", secateur.KeepMasks(SOURCES[source](pruned)))
    assert zero_share(plain, masks) < 0.001
    assert zero_share(model, masks) == zero_share(before, masks)
    assert zero_share(hf(tmp_path / "masked" / "checkpoint-3"), masks) == zero_share(before, masks)
    changed = dict(before.named_parameters())
    for name, parameter in model.named_parameters():  # it trains all the same
        assert not torch.equal(parameter, changed[name]), name


def test_masked_steps_are_those_of_adam_on_masked_weights(pruned: secateur.Pruned, tmp_path: Path) -> None:
    """Compared with a loop of its own: a step of AdamW, then the weights times the mask."""
    masks = load_masks(pruned.path)
    fields = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 3, "save_strategy": "no"}
    fields |= {"per_device_train_batch_size": 16, "optim": "adamw_torch", "weight_decay": 0.0}
    model = train(hf(pruned.path), tmp_path, secateur.KeepMasks(pruned), **fields)
    reference = hf(pruned.path)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        reference(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if name in masks:
                    parameter[~masks[name]] = 0.0
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=2e-5, rtol=1e-4, msg=name)


def test_weights_that_the_masks_drop_are_zeroed_when_training_begins(
    pruned: secateur.Pruned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hf(pruned.path)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        weight.add_(1.0)
    train(model, tmp_path, secateur.KeepMasks(pruned), save_strategy="no")
    dropped = int((~load_masks(pruned.path)["model.layers.0.mlp.up_proj.weight"]).sum())
    assert f"KeepMasks: set {plural(dropped, 'weight')} to zero" in capsys.readouterr().err
    assert zero_share(model, load_masks(pruned.path)) >= 0.5 - 1e-3


class Meddler(TrainerCallback):
    """Changes a pruned weight behind the masks."""

    def __init__(self, name: str, mask: Tensor) -> None:
        self.name, self.mask = name, mask

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        with torch.no_grad():
            model.get_parameter(self.name)[~self.mask] = 1.0


def test_a_save_with_nonzero_pruned_weights_is_refused(pruned: secateur.Pruned, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    meddler = Meddler(name, load_masks(pruned.path)[name])
    with pytest.raises(RunError, match=rf"step 3: {name}: no longer zero: .* list KeepMasks last"):
        train(hf(pruned.path), tmp_path, secateur.KeepMasks(pruned), meddler)
    train(hf(pruned.path), tmp_path / "order", meddler, secateur.KeepMasks(pruned))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, inner)


@pytest.mark.parametrize("wrap", ["module", "_orig_mod", "module._orig_mod", "compile"])
def test_names_go_through_wrappers(pruned: secateur.Pruned, wrap: str) -> None:
    inner = hf(pruned.path)
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.fill_(1.0)
    model: Any = torch.compile(inner) if wrap == "compile" else inner
    for name in () if wrap == "compile" else reversed(wrap.split(".")):
        model = Wrapper(model, name)
    secateur.KeepMasks(pruned).on_train_begin(None, None, None, model=model)
    assert abs(zero_share(inner, load_masks(pruned.path)) - 0.5) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks, name: masks | {"model.layers.9.mlp.up_proj.weight": masks[name]}, "no parameter model.layers.9"),
        (lambda masks, name: masks | {name: masks[name][:-1]}, r"has size \(63, 48\), but the parameter .* \(64, 48\)"),
    ],
)
def test_masks_of_another_model_are_refused(pruned: secateur.Pruned, change: Any, message: str) -> None:
    masks = change(load_masks(pruned.path), "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(UserError, match=message):
        secateur.KeepMasks(masks).on_train_begin(None, None, None, model=hf(pruned.path))


def test_a_source_without_masks_is_refused(tmp_path: Path) -> None:
    dense = tiny_family(tmp_path, "llama")
    out = secateur.prune(dense, tmp_path / "cut", method="magnitude", ratio=0.5).path
    assert secateur.KeepMasks(out)
    cut = secateur.prune(dense, tmp_path / "depth", method="random-depth", shape="layers=3")
    with pytest.raises(UserError, match="has no masks; only sparse methods make some"):
        secateur.KeepMasks(cut)
    with pytest.raises(UserError, match="no such file"):
        secateur.KeepMasks(str(dense))


def tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w0`` ... ``w58``, a padding token and an end."""
    names = [f"w{number}" for number in range(59)] + ["<pad>", "<eos>"]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("keep", [True, False], ids=["with", "without"])
def test_trl_keeps_the_zeros_with_the_callback_alone(pruned: secateur.Pruned, tmp_path: Path, keep: bool) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (the extra handoff)")
    text = [" ".join(f"w{number % 59}" for number in row) for row in IDS.tolist()]
    model = hf(pruned.path)
    trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path, save_strategy="no"), max_length=16),
        train_dataset=Dataset.from_dict({"text": text}),
        processing_class=tokenizer(),
        callbacks=[secateur.KeepMasks(pruned)] if keep else [],
    ).train()
    share = zero_share(model, load_masks(pruned.path))
    assert abs(share - 0.5) < 1e-3 if keep else share < 0.001


def test_a_lora_merge_fills_the_zeros_and_mask_sets_them_again(
    pruned: secateur.Pruned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the extra handoff)")
    masks = load_masks(pruned.path)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = train(peft.get_peft_model(hf(pruned.path), config), tmp_path / "run", secateur.KeepMasks(pruned))
    assert "35 of 35 masked matrices have an adapter" in capsys.readouterr().err
    merged = model.merge_and_unload()
    assert zero_share(merged, masks) < 0.001
    merged.save_pretrained(tmp_path / "merged")
    out = secateur.mask(tmp_path / "merged", pruned)
    assert out.path == tmp_path / "merged-masked"
    result = dict(hf(out.path).named_parameters())
    for name, parameter in merged.named_parameters():
        assert torch.equal(result[name], parameter * masks[name] if name in masks else parameter), name


def test_a_layer_that_peft_trains_whole_is_masked(pruned: secateur.Pruned, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the extra handoff)")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = train(peft.get_peft_model(hf(pruned.path), config), tmp_path, secateur.KeepMasks(pruned))
    name = "model.layers.0.mlp.down_proj.weight"
    merged, before = model.merge_and_unload().get_parameter(name), hf(pruned.path).get_parameter(name)
    assert torch.equal(merged == 0, before == 0) and not torch.equal(merged, before)


def test_axolotl_loads_the_plugin(pruned: secateur.Pruned) -> None:
    base = pytest.importorskip("axolotl.integrations.base", reason="Axolotl is not installed", exc_type=ImportError)
    manager = base.PluginManager.get_instance()
    manager.register("secateur.training.axolotl_plugin.KeepMasksPlugin")
    callbacks = manager.add_callbacks_pre_trainer(SimpleNamespace(base_model=str(pruned.path)), None)
    model = hf(pruned.path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    (callback,) = callbacks
    assert isinstance(callback, TrainerCallback)
    callback.on_train_begin(None, None, None, model=model)  # type: ignore[arg-type]
    assert abs(zero_share(model, load_masks(pruned.path)) - 0.5) < 1e-3
