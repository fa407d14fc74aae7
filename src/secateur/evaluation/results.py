"""Results of evaluations: figures with their protocols and items, in files.

A results file is JSON. Its items are in a ``.jsonl.gz`` file beside it, one a line; the JSON holds the hash of that
file. The same results give the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur.config import fingerprint
from secateur.errors import UserError
from secateur.files import read_json, write_bytes, write_json
from secateur.model.quantisation import WEIGHT_FORMATS, WeightKind
from secateur.version import __version__

__all__ = [
    "LOSS",
    "EvaluationResults",
    "Measurement",
    "MeasurementKind",
    "check_same_protocols",
    "items_file",
    "served_protocol",
]

#: a score is any other metric of a task, mostly the higher the better
MeasurementKind = Literal["loss", "accuracy", "score"]

LOSS = "loss"  #: name of the held-out loss, beside perplexities and tasks


@dataclass(frozen=True)
class Measurement:
    """One figure of one model.

    Two measurements are comparable if their names and the fingerprints of their protocols are the same; then they have
    the same items in the same order, and can be compared in pairs.
    """

    name: str  #: e.g. ``loss``, ``heldout/c4`` or ``arc_easy``
    kind: MeasurementKind
    value: float  #: nats per predicted token, share of documents, or value of the metric
    protocol: Mapping[str, Any]  #: identity of the data and requests, with its ``fingerprint``
    unit: str  #: of items: ``documents`` or ``windows``
    #: each with its ``value``, None if only all items together have one, and with ``tokens`` if it is a mean over
    #: tokens; a group of tasks has no items, and its protocol names its tasks
    items: Sequence[Mapping[str, Any]]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks of a group; empty for anything else."""
        return self.protocol.get("tasks", ())

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value is better."""
        return self.kind == "loss" or bool(self.details.get("lower_is_better"))

    @property
    def scale(self) -> str:
        """The unit of the value."""
        if self.kind == "loss":
            return f"nats per {self.details.get('per', 'token')}"
        return "share of documents" if self.kind == "accuracy" else str(self.protocol["metric"])

    def record(self) -> dict[str, Any]:
        """Everything but the items, as plain values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "value": self.value,
            "unit": self.scale,
            "items": {"unit": self.unit, "count": len(self.items)},
            **self.details,
            "protocol": dict(self.protocol),
        }


@dataclass(frozen=True)
class EvaluationResults:
    """All figures of one model."""

    model: str
    measurements: Sequence[Measurement] = ()
    cost: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)  #: digest of the checkpoint, device, versions
    name: str = ""  #: of the model in tables and file names; by default its path

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.model)

    def record(self) -> dict[str, Any]:
        """Everything but the items, as plain values."""
        return {
            "secateur": __version__,
            "model": self.model,
            **({"name": self.name} if self.name != self.model else {}),
            **self.about,
            "measurements": [measurement.record() for measurement in self.measurements],
            **({"cost": dict(self.cost)} if self.cost else {}),
        }

    def of(self, name: str) -> Measurement | None:
        """The measurement with a name; None if it is missing."""
        return next((measurement for measurement in self.measurements if measurement.name == name), None)

    def save(self, path: Path) -> None:
        """Write the items, then ``path``."""
        rows = [{"measurement": m.name, **item} for m in self.measurements for item in m.items]
        text = "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows)
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as file:  # the same bytes every time
            file.write(text.encode())
        write_bytes(items_file(path), packed.getvalue())
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_json(path, {**self.record(), "items": {"file": items_file(path).name, "sha256": digest}})

    @classmethod
    def load(cls, path: Path) -> EvaluationResults:
        """Read results that :meth:`save` has written.

        Raises:
            UserError: if a file is missing, damaged or no results file, or the items belong to other results.
        """
        content, packed = read_json(path), items_file(path)
        if not isinstance(content, dict) or "measurements" not in content or "items" not in content:
            raise UserError(f"{path}: holds no results; name a file that `secateur eval` has written")
        try:
            text = gzip.decompress(packed.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{packed}: no such file; the items must lie beside {path.name}") from None
        except (OSError, EOFError) as error:
            raise UserError(f"{packed}: cannot be read: {error}; measure again") from None
        if hashlib.sha256(text).hexdigest() != content["items"].get("sha256"):
            raise UserError(f"{packed}: is not the file that {path.name} was written with; measure again")
        items: dict[str, list[dict[str, Any]]] = {}
        for line in text.splitlines():
            row = json.loads(line)
            items.setdefault(row.pop("measurement"), []).append(row)
        fields = ("name", "kind", "value", "unit", "items", "protocol")
        measurements = [
            Measurement(
                m["name"],
                m["kind"],
                m["value"],
                m["protocol"],
                m["items"]["unit"],
                items.get(m["name"], []),
                {key: value for key, value in m.items() if key not in fields},
            )
            for m in content["measurements"]
        ]
        own_fields = ("secateur", "model", "name", "measurements", "cost", "items")
        about = {key: value for key, value in content.items() if key not in own_fields}
        return cls(content["model"], measurements, content.get("cost"), about, content.get("name", ""))


def served_protocol(protocol: Mapping[str, Any], weights: WeightKind | None) -> Mapping[str, Any]:
    """The protocol of a figure of a model with such weights, whose form enters the fingerprint; None: unchanged."""
    if weights is None:
        return protocol
    form = f"{weights}, {WEIGHT_FORMATS[weights]}"
    return {**protocol, "weights": form, "fingerprint": fingerprint([protocol["fingerprint"], form])}


def items_file(path: Path) -> Path:
    """The file with the items of the results in ``path``."""
    return path.with_suffix(".jsonl.gz")


def check_same_protocols(figures: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """Check that figures of the same name were measured in the same way.

    Args:
        figures: the model, name and protocol of each figure.

    Returns:
        The names of the figures, in the order of their first appearance.

    Raises:
        UserError: if two models have a figure of the same name under protocols of different fingerprints.
    """
    first: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for model, name, protocol in figures:
        first_model, first_protocol = first.setdefault(name, (model, protocol))
        if first_protocol["fingerprint"] != protocol["fingerprint"]:
            raise UserError(
                f"{name}: {first_model} and {model} are measured under different protocols "
                f"({_difference(first_protocol, protocol)}); such figures share no table: measure both on the same "
                "text, with the same tokenizer, windows and versions"
            )
    return list(first)


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    keys = [k for k in {**a, **b} if a.get(k) != b.get(k) and k not in ("fingerprint", "source")]
    differences = [f"{key} {_shorten(a.get(key))} and {_shorten(b.get(key))}" for key in keys]
    return ", ".join(differences[:3]) or "the requests"


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12]
