"""Masks in the trainers of other packages: a callback of transformers that keeps pruned weights at zero.

``Trainer``, TRL's trainers and whatever else takes a ``transformers.TrainerCallback`` know no masks: after a few steps
no pruned weight is zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from secateur.errors import RunError, UserError
from secateur.formatting import plural
from secateur.hub import local_checkpoint
from secateur.model.plan import load_masks
from secateur.progress import notify
from secateur.training.masks import Masks

__all__ = ["KeepMasks"]

#: What wrappers put into the names of parameters: PEFT, torch.compile, FSDP and DDP, and models of text and images.
_WRAPPERS = re.compile(
    r"^(base_model\.model\.|module\.|_orig_mod\.|_fsdp_wrapped_module\.)+"
    r"|(?<=\.)(base_layer|original_module|modules_to_save\.[^.]+|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    r"|\b(language_model|text_model)\."
)
_ADAPTED = ".base_layer."  #: PEFT's name of the frozen layer below an adapter


class KeepMasks(TrainerCallback):
    """Keep the pruned weights of a sparse model at zero in a trainer of transformers, TRL or another package.

    Weights are masked when training begins and after each step of the optimizer, and checked at each save and at the
    end::

        model = AutoModelForCausalLM.from_pretrained("PRUNED")
        Trainer(model=model, ..., callbacks=[secateur.KeepMasks("PRUNED")]).train()

    Masks find their parameters behind the wrappers of PEFT, torch.compile, DDP and FSDP2. An adapter (LoRA) leaves the
    weights as they are until it is merged; :func:`secateur.mask` sets the zeros again then.

    Args:
        source: a pruned checkpoint (directory or Hub name), the result of :func:`secateur.prune`, a ``Plan``, or a
            mapping of parameter name -> bool of the parameter's size, True where kept.

    Raises:
        UserError: if ``source`` has no masks; when training begins, if the model has no parameter for a mask, or one of
            another size.
    """

    def __init__(self, source: Any) -> None:
        self._source = _read_masks(source)
        self._masks: Masks | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self._masks = Masks(model, _match(model, self._source))
        if nonzero := self._masks.count_nonzero():
            notify(f"KeepMasks: set {plural(nonzero, 'weight')} to zero that the masks drop and the model has nonzero")
        self._masks.apply()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self._masks is not None
        self._masks.apply()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._check(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._check(state.global_step)

    def _check(self, step: int) -> None:
        """Refuse weights that something behind this callback has changed.

        Raises:
            RunError: naming a parameter with a nonzero pruned weight.
        """
        assert self._masks is not None
        try:
            self._masks.check()
        except RuntimeError as error:
            raise RunError(
                f"KeepMasks: step {step}: {error}; another callback changes weights after this one: list KeepMasks last"
            ) from None


def _read_masks(source: Any) -> Mapping[str, Tensor]:
    """The masks of whatever :class:`KeepMasks` takes."""
    plan = getattr(source, "plan", source)  # of a result of prune, on disk or in memory
    masks = getattr(plan, "masks", plan)
    if not isinstance(masks, Mapping):
        masks = load_masks(local_checkpoint(source))
    if not masks:
        raise UserError(
            f"{source if isinstance(source, str) else type(source).__name__}: has no masks; only sparse methods make "
            "some, and a cut in depth or width holds in any trainer"
        )
    return {str(name): torch.as_tensor(mask, dtype=torch.bool) for name, mask in masks.items()}


def _match(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map the model's own name of each masked parameter to its mask.

    Raises:
        UserError: naming a mask without a parameter, or with one of another size.
    """
    names: dict[str, list[str]] = {}  # without wrappers -> in this model
    parameters = dict(model.named_parameters())
    for name in parameters:
        names.setdefault(_WRAPPERS.sub("", name), []).append(name)
    matches = {}
    for name, mask in masks.items():
        places = names.get(_WRAPPERS.sub("", name), [])
        if not places:
            raise UserError(f"KeepMasks: the model has no parameter {name}; the masks belong to another model")
        for place in places:
            if parameters[place].shape != mask.shape:
                raise UserError(
                    f"KeepMasks: the mask of {name} has size {tuple(mask.shape)}, but the parameter {place} has "
                    f"{tuple(parameters[place].shape)}; the masks belong to another model, or a trainer that flattens "
                    "parameters (FSDP 1, DeepSpeed ZeRO-3) holds it: use FSDP 2 there"
                )
            matches[place] = mask
    if adapted := sum(_ADAPTED in place for place in matches):
        notify(
            f"KeepMasks: {adapted} of {plural(len(matches), 'masked matrix', 'masked matrices')} have an adapter: "
            "their weights are frozen, so training leaves the zeros and the merge fills them; apply the masks to the "
            "merged checkpoint with secateur.mask"
        )
    return matches
