"""The JSON schema of study files, for editors: ``python -m secateur.study.schema`` prints it."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from secateur.study.spec import StudySpec

__all__ = ["schema_text", "study_schema"]

#: pydantic's words for bounds -> those of JSON schema
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_COUNT = r"^\s*[0-9._]+([eE]\+?[0-9]+)?\s*[kKmMbBgGtT]?\s*$"
_SHARE = r"^\s*[0-9.]+([eE][+-]?[0-9]+)?\s*%?\s*$"


def study_schema() -> dict[str, Any]:
    """Generate the schema from the dataclasses of a study file.

    It also takes the short spellings that a file may have: counts such as ``700k``, shares such as ``50%``, one entry
    in place of a list, and a name in place of a mapping. What spans several keys is checked by ``study plan`` alone.
    """
    schema = _widen(TypeAdapter(StudySpec).json_schema())
    seed = {"type": "integer"}
    schema["properties"]["seeds"] = {"anyOf": [schema["properties"]["seeds"], seed, {"type": "array", "items": seed}]}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Study file of secateur", **schema}


def schema_text() -> str:
    """The schema as the text of ``docs/study.schema.json``."""
    return json.dumps(study_schema(), indent=1, ensure_ascii=False) + "\n"


def _widen(node: Any) -> Any:
    """Replace each part of a schema by one that takes the short spellings too."""
    if isinstance(node, list):
        return [_widen(item) for item in node]
    if not isinstance(node, dict):
        return node
    # pydantic's titles repeat the keys, and its defaults of sections repeat those of their keys
    keep = {k: v for k, v in node.items() if k != "title" or isinstance(v, dict)}
    if isinstance(keep.get("default"), dict):
        del keep["default"]
    keep = {_BOUNDS.get(key, key): _widen(value) for key, value in keep.items()}
    if keep.get("type") == "integer":
        return _with_text(keep, {"type": "string", "pattern": _COUNT})
    if keep.get("type") == "number":
        return _with_text(keep, {"type": "string", "pattern": _SHARE})
    if keep.get("type") == "array" and isinstance(keep.get("items"), dict):
        item = keep["items"]
        item = {"anyOf": [item, {"type": "string"}]} if "$ref" in item else item
        array = {key: value for key, value in keep.items() if key != "default"} | {"items": item}
        default = {"default": keep["default"]} if "default" in keep else {}
        return {"anyOf": [array, item], **default}
    return keep


def _with_text(number: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    default = {"default": number.pop("default")} if "default" in number else {}
    return {"anyOf": [number, text], **default}


if __name__ == "__main__":
    print(schema_text(), end="")
