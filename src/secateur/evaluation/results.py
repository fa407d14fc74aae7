"""What was measured: figures with the protocol that they hold under and the items that they are made of, in files.

A file of results is JSON; its items lie beside it, one a line, in ``.jsonl.gz``, whose hash the JSON has. The same
results give the same bytes.
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

from secateur.errors import UserError
from secateur.files import read_json, write_bytes, write_json
from secateur.version import __version__

__all__ = ["LOSS", "EvaluationResults", "Measurement", "MeasurementKind", "check_same_protocols", "items_file"]

MeasurementKind = Literal[
    "loss", "accuracy", "score"
]  # a score is another metric of a task, mostly the higher the better

LOSS = "loss"  #: what the held-out loss is called, beside perplexities and tasks


@dataclass(frozen=True)
class Measurement:
    """One figure of one model.

    Two of them may stand side by side if they have the same name and their protocols the same fingerprint; then they
    have the same items in the same order, so that they can be compared in pairs.
    """

    name: str  #: e.g. ``loss``, ``heldout/c4`` or ``arc_easy``
    kind: MeasurementKind
    value: float  #: nats per predicted token, the share of documents, or what the metric gives
    protocol: Mapping[str, Any]  #: what it is measured on, with its ``fingerprint``
    unit: str  #: what an item is: ``documents`` or ``windows``
    #: each with its ``value``, None where it has none of its own, and with ``tokens`` where it is a mean over them; a
    #: group of tasks has no items but those of its tasks, which its protocol names
    items: Sequence[Mapping[str, Any]]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks that this is the mean of; empty for what is measured by itself."""
        return self.protocol.get("tasks", ())

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller figure is a better one."""
        return self.kind == "loss" or bool(self.details.get("lower_is_better"))

    @property
    def scale(self) -> str:
        """What the figure is counted in."""
        if self.kind == "loss":
            return f"nats per {self.details.get('per', 'token')}"
        return "share of documents" if self.kind == "accuracy" else str(self.protocol["metric"])

    def record(self) -> dict[str, Any]:
        """All but the items, as plain values."""
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

    def record(self) -> dict[str, Any]:
        """All but the items, as plain values."""
        return {
            "secateur": __version__,
            "model": self.model,
            **self.about,
            "measurements": [measurement.record() for measurement in self.measurements],
            **({"cost": dict(self.cost)} if self.cost else {}),
        }

    def of(self, name: str) -> Measurement | None:
        """The measurement of that name; None where there is none."""
        return next((found for found in self.measurements if found.name == name), None)

    def save(self, path: Path) -> None:
        """Write ``path`` and, before it, the items beside it."""
        rows = [{"measurement": m.name, **item} for m in self.measurements for item in m.items]
        text = "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows)
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as file:  # neither name nor time within
            file.write(text.encode())
        write_bytes(items_file(path), packed.getvalue())
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_json(path, {**self.record(), "items": {"file": items_file(path).name, "sha256": digest}})

    @classmethod
    def load(cls, path: Path) -> EvaluationResults:
        """Read what :meth:`save` has written.

        Raises:
            UserError: if a file is missing or damaged, is none of these, or the items are not those of the results.
        """
        content, beside = read_json(path), items_file(path)
        if not isinstance(content, dict) or "measurements" not in content or "items" not in content:
            raise UserError(f"{path}: holds no results; name a file that `secateur eval --out` has written")
        try:
            text = gzip.decompress(beside.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{beside}: no such file; the items must lie beside {path.name}") from None
        except (OSError, EOFError) as error:
            raise UserError(f"{beside}: cannot be read: {error}; measure again") from None
        if hashlib.sha256(text).hexdigest() != content["items"].get("sha256"):
            raise UserError(f"{beside}: is not the file that {path.name} was written with; measure again")
        items: dict[str, list[dict[str, Any]]] = {}
        for line in text.splitlines():
            row = json.loads(line)
            items.setdefault(row.pop("measurement"), []).append(row)
        known = ("name", "kind", "value", "unit", "items", "protocol")
        found = [
            Measurement(
                m["name"],
                m["kind"],
                m["value"],
                m["protocol"],
                m["items"]["unit"],
                items.get(m["name"], []),
                {key: value for key, value in m.items() if key not in known},
            )
            for m in content["measurements"]
        ]
        about = {k: v for k, v in content.items() if k not in ("secateur", "model", "measurements", "cost", "items")}
        return cls(content["model"], found, content.get("cost"), about)


def items_file(path: Path) -> Path:
    """Where the items of the results in ``path`` lie."""
    return path.with_suffix(".jsonl.gz")


def check_same_protocols(measured: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """Refuse to put figures side by side that were measured in different ways.

    Args:
        measured: of each figure the model, the figure's name and its protocol.

    Returns:
        The names of the figures, in the order in which they first appear.

    Raises:
        UserError: if two models have a figure of the same name under protocols of different fingerprints.
    """
    first: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for model, name, protocol in measured:
        other, before = first.setdefault(name, (model, protocol))
        if before["fingerprint"] != protocol["fingerprint"]:
            raise UserError(
                f"{name}: {other} and {model} are measured under different protocols "
                f"({_difference(before, protocol)}); such figures share no table: measure both on the same text, with "
                "the same tokenizer, windows and versions"
            )
    return list(first)


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    keys = [k for k in {**one, **other} if one.get(k) != other.get(k) and k not in ("fingerprint", "source")]
    told = [f"{key} {_short(one.get(key))} and {_short(other.get(key))}" for key in keys]
    return ", ".join(told[:3]) or "what is asked"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12]
