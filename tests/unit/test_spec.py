from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from secateur.config import (
    RUNTIME,
    Count,
    Fraction,
    Positive,
    canonical_json,
    fingerprint,
    identity,
    load_yaml,
    parse,
    parse_count,
    spec,
)
from secateur.errors import UserError, did_you_mean


@spec
class Leaf:
    ratio: Fraction
    tokens: Count = 10


@spec
class Root:
    name: str
    leaves: tuple[Leaf, ...] = ()
    single: Leaf | None = None
    kind: Literal["depth", "width"] = "depth"
    width: Positive = 3
    device: Annotated[str, RUNTIME] = "cpu"


def message(raw: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse(Root, raw, origin="study.yaml")
    text = str(caught.value)
    assert text.startswith("study.yaml: ") and "\n" not in text
    return text


def test_a_whole_file_parses() -> None:
    raw = {"name": "a", "leaves": [{"ratio": 0.5, "tokens": "2k"}, {"ratio": 0.25}], "kind": "width"}
    assert parse(Root, raw, origin="x") == Root(
        name="a", leaves=(Leaf(ratio=0.5, tokens=2000), Leaf(ratio=0.25)), kind="width"
    )


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"name": "a", "widht": 3}, ["widht", "unknown key", "'width'"]),
        ({"nmae": "a"}, ["nmae", "unknown key", "'name'"]),  # told before the required key that it leaves missing
        ({"name": "a", "leaves": [{"ratio": 0.5}, {"ratoi": 0.5}]}, ["leaves[1].ratoi", "unknown key", "'ratio'"]),
        ({"name": "a", "single": {"ratio": 0.5, "tokns": 1}}, ["single.tokns", "unknown key", "'tokens'"]),
        ({"name": "a", "leaves": [{"ratio": 1}]}, ["leaves[0].ratio", "less than 1"]),
        ({"name": "a", "leaves": [{"ratio": 0.0}]}, ["leaves[0].ratio", "greater than 0"]),
        ({"name": "a", "leaves": [{"ratio": -0.5}]}, ["leaves[0].ratio", "greater than 0"]),
        ({"name": "a", "leaves": [{}]}, ["leaves[0].ratio", "required"]),
        ({}, ["name", "required"]),
        ({"name": 3}, ["name: should be text (got 3)"]),
        ({"name": "a", "width": "3"}, ["width: should be a whole number (got '3')"]),
        ({"name": "a", "width": 0}, ["width", "greater than 0"]),
        ({"name": "a", "width": 2.5}, ["width: should be a whole number"]),
        ({"name": "a", "width": True}, ["width: should be a whole number"]),
        ({"name": "a", "kind": "widht"}, ["kind", "'widht'", "'width'"]),
        ({"name": "a", "leaves": [{"ratio": 0.5, "tokens": "5x"}]}, ["leaves[0].tokens", "'5x'", "50e9"]),
        ({"name": "a", "leaves": [{"ratio": 0.5, "tokens": 0}]}, ["leaves[0].tokens", "greater than 0"]),
        ({"name": "a", "leaves": {"ratio": 0.5}}, ["leaves"]),
        (["name"], ["mapping", "list"]),
        (None, ["mapping", "nothing"]),
        ({"name": "a", "device": {1, 2}}, ["not plain data"]),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(raw: Any, parts: list[str]) -> None:
    text = message(raw)
    for part in parts:
        assert part in text, text


@spec
class Choice:
    rates: Annotated[tuple[float, ...], Field(min_length=2)] = (1.0, 2.0)
    parent: bool | Annotated[tuple[float, ...], Field(min_length=2)] = False
    part: Literal["none"] | Leaf = "none"
    names: Mapping[Annotated[str, Field(pattern="^[a-z]+$")], str | float] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"rates": [1]}, "rates: needs at least 2 entries, got 1"),
        ({"rates": [1, "x", "y"]}, "rates[1]: should be a number (got 'x') (and 1 more)"),
        ({"parent": "yes"}, "parent: should be true or false, or a list (got 'yes')"),
        ({"parent": [1]}, "parent: needs at least 2 entries, got 1"),
        ({"parent": [1, None]}, "parent[1]: should be a number (got None)"),
        ({"part": {"ratio": 2}}, "part.ratio: should be less than 1 (got 2)"),
        ({"part": {"ratoi": 0.5}}, "part.ratoi: unknown key; did you mean 'ratio'? (and 1 more)"),
        ({"names": "a"}, "names: should be a mapping of keys to values (got 'a')"),
        ({"names": {"a": [1]}}, "names.a: should be text, or a number"),
        ({"names": {"A": 1}}, "names.A: should match pattern '^[a-z]+$' (got 'A')"),
    ],
)
def test_errors_are_in_plain_words_at_the_users_own_key(raw: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Choice, raw, origin="f")
    assert str(caught.value) == f"f: {text}"
    if "unknown" not in text and "part" not in text:  # a Python caller makes the parts himself
        with pytest.raises(UserError) as caught:
            Choice(**raw)
        name = next(iter(raw))
        assert str(caught.value) == f"`{name}`{text.removeprefix(name)}"


def test_more_errors_are_counted() -> None:
    assert "and 2 more" in message({"widht": 1, "knid": 2})


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Root(name="a").name = "b"  # type: ignore[misc]


def test_runtime_fields_stay_out_of_the_fingerprint() -> None:
    here = Root(name="a", leaves=(Leaf(ratio=0.5),))
    assert fingerprint(here) == fingerprint(dataclasses.replace(here, device="cuda"))
    assert "device" not in identity(here)
    for changed in ({"name": "b"}, {"width": 4}, {"leaves": (Leaf(ratio=0.25),)}, {"leaves": ()}):
        assert fingerprint(here) != fingerprint(dataclasses.replace(here, **changed)), changed


def test_canonical_json_is_one_text() -> None:
    assert canonical_json({"b": [1, 2.5], "a": {"d": None, "c": "é"}}) == '{"a":{"c":"é","d":null},"b":[1,2.5]}'
    assert canonical_json((1, 2)) == canonical_json([1, 2])
    # From sha256sum; a change of it would orphan every cached result.
    assert fingerprint({"b": 1, "a": 0.1}) == "158d35d8b578c605994d4b0984021488d8b22b831c36244c0097500a4d6f839b"
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("0.7M", 700_000),
        (50e9, 50_000_000_000),
        ("50B", 50_000_000_000),
        ("50e9", 50_000_000_000),
        ("700k", 700_000),
        ("700_000", 700_000),
        (12, 12),
        ("1.5 k", 1500),
        ("2T", 2 * 10**12),
        ("0.1M", 100_000),
    ],
)
def test_counts(given: object, wanted: int) -> None:
    assert parse_count(given) == wanted


@pytest.mark.parametrize(
    "given",
    ["5x", "", "k", "-5", -5, 0.5, "0.5", "1.2.3", True, None, [1], "1e-3", float("nan"), float("inf"), "1e999"],
)
def test_what_is_no_count(given: object) -> None:
    with pytest.raises(ValueError, match="count"):
        parse_count(given)


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 4e-3\nb: 50e9\nc: 1_000\nd: 0.5\ne: 4e-3x\nf: 1.5E+3\n")
    assert load_yaml(path) == {"a": 0.004, "b": 5e10, "c": 1000, "d": 0.5, "e": "4e-3x", "f": 1500.0}
    assert isinstance(load_yaml(path)["a"], float)


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: 1\nb: 2\na: 3\n", "line 3"), ("a:\n  b: 1\n  b: 2\n", 'duplicate key "b"'), ("a: [1\n", "not valid YAML")],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=part) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path)
    (tmp_path / "latin").write_bytes(b"a: \xff\n")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path / "latin")


@pytest.mark.parametrize(
    ("text", "ratio"), [("50%", 0.5), (" 12.5 % ", 0.125), ("33.3%", 0.333), (".5%", 0.005), ("70%", 0.7)]
)
def test_a_share_may_be_a_percentage(text: str, ratio: float) -> None:
    assert parse(Leaf, {"ratio": text}, origin="x") == Leaf(ratio=ratio) == Leaf(ratio=text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (50, "should be a share between 0 and 1, such as 0.5 or 50% (got 50)"),
        ("150%", "should be less than 1"),
        ("0%", "should be greater than 0"),
        ("half%", "should be a number (got 'half%')"),
        ("50", "should be a number (got '50')"),
    ],
)
def test_what_is_no_share(value: Any, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Leaf, {"ratio": value}, origin="x")
    assert str(caught.value).startswith(f"x: ratio: {problem}")


@pytest.mark.parametrize(
    ("name", "options", "near"),
    [
        ("lr", ["clip", "peak_rate", "seed"], "peak_rate"),
        ("learning_rate", ["peak_rate", "warmup"], "peak_rate"),
        ("batch_size", ["micro_batch", "tokens_per_step"], "tokens_per_step"),
        ("--batch-size", ["--batch", "--seqlen"], "--batch"),
        ("--sparsity", ["--states", "--ratio"], "--ratio"),
        ("--nsamples", ["--states", "--windows"], "--windows"),
        ("--samples", ["--shape", "--states", "--windows"], "--windows"),
        ("num_train_epochs", ["micro_batch", "tokens_per_step"], "tokens_per_step"),
        ("--max-steps", ["--tokens", "--skip"], "--tokens"),
        ("gradient_accumulation_steps", ["attention", "tokens_per_step"], "tokens_per_step"),
        ("adam_beta2", ["beta1", "beta2"], "beta2"),
        ("max_seq_length", ["sequence", "final_share"], "sequence"),
        ("lr", ["slr", "blr"], "slr"),  # no synonym is an option: by its spelling
    ],
)
def test_words_of_other_tools_lead_to_the_name_here(name: str, options: list[str], near: str) -> None:
    assert did_you_mean(name, options) == f"; did you mean {near!r}?"


def test_did_you_mean() -> None:
    assert did_you_mean("wnada", ["wanda", "depth"]) == "; did you mean 'wanda'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; known: a, b"
    assert did_you_mean("zzz", []) == ""


def test_of_many_options_the_nearest_come_first_and_the_list_only_on_request() -> None:
    options = [f"wanda-0.{ratio}/{run}" for ratio in range(1, 9) for run in ("P-R", "S_R", "S_{P+R}")]
    assert did_you_mean("0.3/p-r", options).startswith("; did you mean 'wanda-0.3/P-R', ")
    assert did_you_mean("wanda-0.7", options).startswith(
        "; did you mean 'wanda-0.7/P-R', 'wanda-0.7/S_R' or 'wanda-0.7/S_{P+R}'"
    )
    text = did_you_mean("typo", options, "`study status`")
    assert text.startswith("; the nearest of 24: ") and text.endswith(" (`study status` lists all)")
    assert text.count("wanda-") == 3
