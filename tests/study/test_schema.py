from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from secateur.config import load_yaml
from secateur.study.schema import schema_text, study_schema
from secateur.study.shipped import shipped_studies

FILE = Path(__file__).parents[2] / "docs" / "study.schema.json"
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether ``value`` is valid, by the keywords that the schema uses."""
    if "$ref" in schema and not fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root):
        return False
    if "anyOf" in schema and not any(fits(value, choice, root) for choice in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        return False
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _number_fits(value, schema)
    if kind and not isinstance(value, TYPES[kind]):
        return False
    if kind == "array":
        return all(fits(item, schema.get("items", {}), root) for item in value)
    return not isinstance(value, dict) or _keys_fit(value, schema, root)


def _number_fits(value: Any, schema: dict[str, Any]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if schema["type"] == "integer" else int | float):
        return False
    low, high = schema.get("exclusiveMinimum", -1e99), schema.get("exclusiveMaximum", 1e99)
    return low < value < high and schema.get("minimum", -1e99) <= value <= schema.get("maximum", 1e99)


def _keys_fit(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any]) -> bool:
    keys, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    if set(schema.get("required", ())) - set(value):
        return False
    for key, item in value.items():
        part = keys.get(key) or next((part for p, part in patterns.items() if re.search(p, key)), None)
        if part is None and schema.get("additionalProperties") is False:
            return False
        if part is not None and not fits(item, part, root):
            return False
    return True


def test_the_file_is_the_schema_of_the_code():
    assert FILE.read_text(encoding="utf-8") == schema_text(), "run make schema"


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_fit_and_name_the_schema(name: str):
    path = shipped_studies()[name]
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=../docs/study.schema.json\n")
    assert fits(json.loads(json.dumps(load_yaml(path))), study_schema(), study_schema())


@pytest.mark.parametrize(
    "change",
    [{"methodz": []}, {"ratios": [1.5]}, {"recipe": {"seqence": 8}}, {"twin_init": "new"}, {"corpus": None}],
)
def test_mistakes_do_not_fit(change: dict[str, Any]):
    content = json.loads(json.dumps(load_yaml(shipped_studies()["demo"])))
    assert fits(content, study_schema(), study_schema())
    assert not fits(content | change, study_schema(), study_schema())
