"""Model cards: what the Hub reads of a checkpoint, and what a person reads first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import first_line
from secateur.files import read_json
from secateur.formatting import count
from secateur.model.shapes import Shape
from secateur.progress import notify

__all__ = ["Ancestry", "family_change", "model_card", "pruning_method", "short_source"]

CARD = "README.md"
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Ancestry:
    """What the card of a checkpoint says about the model that it was made from."""

    base_model: tuple[str, ...] = ()  #: names on the Hub
    metadata: Mapping[str, Any] = field(default_factory=dict)  #: licence and language

    @classmethod
    def read(cls, directory: Path, repository: str | None = None) -> Ancestry:
        """Read the card of the checkpoint in ``directory``; nothing is known where it has none.

        Args:
            repository: its name on the Hub; None to take the base model that its card or config.json names.
        """
        card = _read_card(directory / CARD)
        names = [repository] if repository else _strings(card.get("base_model"))
        if not names and (directory / "config.json").is_file():
            config = read_json(directory / "config.json")
            names = _strings(config.get("_name_or_path")) if isinstance(config, dict) else []
        licences = {key: _strings(card.get(key)) for key in _LICENCE_KEYS}  # cards of old list even a single one
        metadata: dict[str, Any] = {key: v[0] if len(v) == 1 else v for key, v in licences.items() if v}
        language = ["no" if code is False else code for code in _list(card.get("language"))]  # YAML reads no as False
        if language := _strings(language):
            metadata["language"] = language
        return cls(tuple(name for name in names if name == repository or _is_repository(name)), metadata)

    @property
    def name(self) -> str | None:
        """The base model's own name, without its organisation; None where there is not exactly one."""
        return self.base_model[0].rpartition("/")[2] if len(self.base_model) == 1 else None

    def subject(self, shape: Shape) -> str:
        """What to call the model: its name, or its family and size."""
        return self.name or f"{shape.family.name.capitalize()} of {count(shape.total)} parameters"


def model_card(
    title: str,
    ancestry: Ancestry | None,
    lines: Iterable[str],
    *,
    tags: Sequence[str] = (),
    repository: str | None = None,
    image_text: bool = False,
) -> str:
    """Write a model card: metadata, a title, what was done, how to open the model.

    Args:
        ancestry: of the model that this one was made from; None where it was made from none.
        repository: where it will be on the Hub; None if it stays on disk.
        image_text: whether it reads images as well.
    """
    from huggingface_hub import ModelCard, ModelCardData

    ancestry = ancestry or Ancestry()
    base: Any = ancestry.base_model if len(ancestry.base_model) > 1 else next(iter(ancestry.base_model), None)
    data = ModelCardData(
        base_model=list(base) if isinstance(base, tuple) else base,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if image_text else "text-generation",
        tags=["secateur", *tags],
        **ancestry.metadata,
    )
    model, inputs = ("ImageTextToText", "Processor") if image_text else ("CausalLM", "Tokenizer")
    usage = [
        "```python",
        f"from transformers import AutoModelFor{model}, Auto{inputs}",
        "",
        f'path = "{repository or "path/to/this/directory"}"',
        f"model = AutoModelFor{model}.from_pretrained(path)",
        f"{inputs.lower()} = Auto{inputs}.from_pretrained(path)",
        "```",
    ]
    text = "\n".join([f"---\n{data.to_yaml()}\n---\n", f"# {title}", "", *lines, "", *usage, ""])
    return str(ModelCard(text))  # which parses the metadata again


def family_change(before: Shape, after: Shape) -> str | None:
    """A sentence about the family that an output is written as; None where that is the model's own."""
    if before.family == after.family:  # by value: worker processes have copies
        return None
    old, new = before.family.name.capitalize(), after.family.name.capitalize()
    if before.family.heads_span_hidden:
        reason = f"{after.heads} heads of {after.head_dim} channels do not add up to a hidden size of {after.hidden}"
        return f"written as {new} instead of {old}, the same function: {reason}, as {old} demands"
    return (
        f"written as {new} instead of {old}, the same function: the configuration of {old} refuses {after.heads} heads "
        f"for a hidden size of {after.hidden}, which they do not divide"
    )


def pruning_method(provenance: Mapping[str, Any] | None) -> str | None:
    """The method that a checkpoint, or one that it was trained from, was pruned with; None for none."""
    while isinstance(provenance, Mapping):
        if provenance.get("kind") == "pruned":
            return str(provenance.get("method"))
        provenance = provenance.get("origin")
    return None


def short_source(source: str) -> str:
    """A source of text without the folders of its path, which say nothing to a reader elsewhere."""
    scheme, colon, rest = source.partition(":")
    return f"{scheme}:{Path(rest).name}" if colon and scheme != "hf" else source


def _read_card(path: Path) -> dict[str, Any]:
    """The metadata of a model card; a card that cannot be read is reported and has none."""
    if not path.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        return ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # YAML of any kind of damage, or no text at all
        notify(
            f"{path}: its metadata cannot be read ({first_line(error)}); the new card names no licence or base model"
        )
        return {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _strings(value: Any) -> list[str]:
    return [entry for entry in _list(value) if isinstance(entry, str) and entry]


def _is_repository(name: str) -> bool:
    """Whether ``name`` can be that of a model on the Hub, with its organisation, and is no path here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()
