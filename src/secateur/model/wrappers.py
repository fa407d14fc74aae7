"""Image-text models around a language model: which of their tensors and configuration keys follow its hidden size.

A cut touches the language model and the last layers of what feeds it; the vision tower is copied. A row of
:data:`WRAPPERS` names the tensors outside the language model that have its hidden size as an axis, by the end of their
name in the file, since files differ in what stands before. Besides ``hidden`` there is one more space, ``projector``:
the inner width of a projector of two linears whose configuration takes that width from the language model.

Example: LLaVA's ``multi_modal_projector.linear_2.weight`` is ``("hidden", "projector")``: its rows go into the residual
stream, and its columns are read from ``linear_1``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from secateur.model.families import Axis, Family

__all__ = ["WRAPPERS", "Wrapper", "tower_names", "wrapper_of"]


@dataclass(frozen=True)
class Wrapper:
    """The tensors and keys of one kind of image-text model that depend on its language model."""

    model_types: tuple[str, ...]  #: values of ``model_type`` in config.json
    #: end of a tensor's name, where ``*`` is a number -> the space of each axis, None where it has none
    tensors: Mapping[str, tuple[Axis, ...]]
    vision_keys: tuple[str, ...] = ()  #: keys of ``vision_config`` that equal the language model's hidden size
    #: key of ``vision_config`` with one entry for each of the first layers of the language model that get features of
    #: the vision tower added to their output; these layers stay
    deepstack_key: str = ""
    #: modules of the projector, from end to end, where its inner width is cut: the linear before and the one behind it
    projector: tuple[str, ...] = field(default=())

    def axes(self, stored: str) -> tuple[Axis, ...] | None:
        """The space of each axis of a tensor by its stored name; None where a cut leaves it as it is."""
        return next((axes for name, axes in self.tensors.items() if re.fullmatch(_pattern(name), stored)), None)

    def missing(self, stored: Iterable[str]) -> list[str]:
        """The weights of the row that a file with these names lacks."""
        names = list(stored)
        weights = [name for name in self.tensors if not name.endswith("bias") and "*" not in name]
        return [name for name in weights if not any(re.fullmatch(_pattern(name), full) for full in names)]


def _pattern(name: str) -> str:
    return r"(.*\.)?" + re.escape(name).replace(r"\*", r"\d+")


_PROJECTOR: Mapping[str, tuple[Axis, ...]] = {
    "multi_modal_projector.linear_1.weight": ("projector", None),
    "multi_modal_projector.linear_1.bias": ("projector",),
    "multi_modal_projector.linear_2.weight": ("hidden", "projector"),
    "multi_modal_projector.linear_2.bias": ("hidden",),
}
_LINEARS = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
_MERGER: Mapping[str, tuple[Axis, ...]] = {
    "visual.merger.mlp.2.weight": ("hidden", None),
    "visual.merger.mlp.2.bias": ("hidden",),
}
_MERGER_3: Mapping[str, tuple[Axis, ...]] = {
    "visual.merger.linear_fc2.weight": ("hidden", None),
    "visual.merger.linear_fc2.bias": ("hidden",),
}
_DEEPSTACK: Mapping[str, tuple[Axis, ...]] = {
    "visual.deepstack_merger_list.*.linear_fc2.weight": ("hidden", None),
    "visual.deepstack_merger_list.*.linear_fc2.bias": ("hidden",),
}

WRAPPERS: tuple[Wrapper, ...] = (
    Wrapper(("gemma3",), {"multi_modal_projector.mm_input_projection_weight": (None, "hidden")}),
    Wrapper(("llava", "mistral3", "internvl"), _PROJECTOR, projector=_LINEARS),
    Wrapper(("llava_next",), {**_PROJECTOR, "image_newline": ("hidden",)}, projector=_LINEARS),
    Wrapper(("smolvlm",), {"connector.modality_projection.proj.weight": ("hidden", None)}),
    Wrapper(("qwen2_vl",), _MERGER, vision_keys=("hidden_size",)),
    Wrapper(("qwen2_5_vl",), _MERGER, vision_keys=("out_hidden_size",)),
    Wrapper(
        ("qwen3_vl",),
        {**_MERGER_3, **_DEEPSTACK},
        vision_keys=("out_hidden_size",),
        deepstack_key="deepstack_visual_indexes",
    ),
    Wrapper(("qwen3_5",), _MERGER_3, vision_keys=("out_hidden_size",)),
)

#: what the names of the language model's tensors begin with, in files and in memory; the first that a model has
_PREFIXES = (
    "language_model.model",
    "model.language_model",
    "model.text_model",
    "language_model",
    "text_model",
    "model",
)


def wrapper_of(model_type: object) -> Wrapper | None:
    """The row of a ``model_type``; None for a language model, or for a type that is not known."""
    return next((row for row in WRAPPERS if model_type in row.model_types), None)


def tower_names(stored: Iterable[str], family: Family) -> dict[str, str]:
    """Map the names of a language model's tensors to the names that an image-text model's file has for them.

    Names outside the language model are left out. The result is empty where the file holds no language model.
    """
    names = set(stored)
    blocks = family.layers.removeprefix(f"{family.prefix}.")
    for prefix in _PREFIXES:
        if any(name.startswith(f"{prefix}.{blocks}.") for name in names):
            tower = {f"{family.prefix}{n.removeprefix(prefix)}": n for n in names if n.startswith(f"{prefix}.")}
            heads = (f"{prefix.removesuffix('.model')}.{family.head}", family.head, f"model.{family.head}")
            head = next((name for name in heads if name in names), None)
            return tower | ({family.head: head} if head else {})
    return {}
