from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from secateur.errors import UserError
from secateur.methods.registry import METHODS, get_method
from secateur.model.families import FAMILIES
from secateur.model.families.dense import MISTRAL, PHI3
from secateur.model.shapes import Shape
from secateur.pruning.pattern import Pattern
from secateur.pruning.target import Target

PARENT = Shape(hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=128_256)


def ask(method: str, before: Shape = PARENT, **said: Any) -> Shape:
    return Target.parse(**said).shape(before, get_method(method), method)


@pytest.mark.parametrize(
    ("text", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4), ("3:4", 3, 4), ("1:16", 1, 16)]
)
def test_patterns(text: str, kept: int, of: int) -> None:
    pattern = Pattern.parse(text)
    assert pattern == Pattern(kept, of) and str(pattern) == text
    assert Target(pattern=pattern).sparsity == 1 - kept / of


def test_unstructured_is_no_pattern() -> None:
    assert Pattern.parse("unstructured") is None
    assert Target.parse(ratio=0.3, pattern="unstructured").sparsity == 0.3


@pytest.mark.parametrize(
    "text",
    ["", "2", "2:", ":4", "0:4", "5:4", "-2:4", "2:4:8", "2 :4", "a:b", "2.0:4", "٢:٤", "1:" + "9" * 5000],
)
def test_malformed_patterns(text: str) -> None:
    with pytest.raises(UserError, match=r"^`pattern`: .* is neither unstructured nor N:M"):
        Pattern.parse(text)


def test_sizes_and_axes_are_read() -> None:
    target = Target.parse(shape="hidden=3072, ffn=9216", allocation="uniform")
    assert target.sizes == {"hidden": 3072, "ffn": 9216}
    assert Target.parse(ratio=0.5, axes="kv,ffn").axes == ("kv", "ffn")
    assert Target.parse(ratio=0.5, of="non-embedding").of == "non_embedding"


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ({"shape": ""}, "`shape`: '' is not SIZE=NUMBER, as in hidden=3072,ffn=9216"),
        ({"shape": "hidden"}, "`shape`: 'hidden' is not SIZE=NUMBER"),
        ({"shape": "hidden=3072,"}, "`shape`: '' is not SIZE=NUMBER"),
        ({"shape": "hidden=x"}, "`shape`: 'hidden=x' is not SIZE=NUMBER"),
        ({"shape": "hidden=-1"}, "`shape`: 'hidden=-1' is not SIZE=NUMBER"),
        ({"shape": "hidden=1e3"}, "`shape`: 'hidden=1e3' is not SIZE=NUMBER"),
        ({"shape": "hidden=" + "9" * 5000}, "is not SIZE=NUMBER"),
        ({"shape": "hiden=3"}, "`shape`: 'hiden' is not a size; did you mean 'hidden'?"),
        ({"shape": "ffn=3,ffn=3"}, "`shape`: ffn appears twice"),
        (
            {"axes": "kv,heads"},
            "`axes`: 'heads' is not one of layers, hidden, ffn, kv, experts, expert_ffn (kv: KV heads with",
        ),
        ({"axes": ""}, "`axes`: '' is not one of"),
        ({"axes": "kv, ffn,kv"}, "`axes`: kv,ffn,kv names an axis twice"),
    ],
)
def test_what_cannot_be_read(said: dict[str, str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        Target.parse(**said)  # type: ignore[arg-type]
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "said", "want"),
    [
        ("shortgpt", {"ratio": 0.5}, {"layers": 16}),
        ("shortgpt", {"shape": "layers=5"}, {"layers": 5}),
        ("shortgpt", {"ratio": 0.435, "of": "total"}, {"layers": 16}),
        ("wanda", {"ratio": 0.5}, {}),
        ("wanda", {"pattern": "2:4"}, {}),
        ("wanda", {"ratio": 0.5, "pattern": "4:8"}, {}),
        ("minitron-width", {"shape": "hidden=3072,ffn=9216"}, {"hidden": 3072, "ffn": 9216}),
        ("minitron-width", {"ratio": 0.5}, {"hidden": 2816, "ffn": 9728}),
        ("minitron-width", {"ratio": 0.5, "axes": "ffn,kv"}, {"ffn": 7168, "kv_heads": 4, "heads": 16}),
        ("wanda-sp", {"ratio": 0.5}, {"ffn": 7168, "kv_heads": 4, "heads": 16}),
        ("flap", {"ratio": 0.5}, {"ffn": 7168, "kv_heads": 4, "heads": 16, "switches": ("attention_bias", "mlp_bias")}),
        ("flap", {"ratio": 0.3, "axes": "ffn"}, {"ffn": 8960, "switches": ("mlp_bias",)}),
        ("flap", {"ratio": 0.3, "axes": "ffn", "allocation": "global"}, {"ffn": 8960, "switches": ("mlp_bias",)}),
    ],
)
def test_what_a_target_comes_to(method: str, said: dict[str, Any], want: dict[str, int]) -> None:
    assert ask(method, **said) == dataclasses.replace(PARENT, **want)


def test_a_shape_that_the_family_refuses_goes_to_its_sibling() -> None:
    after = ask("llm-pruner", shape="heads=20,kv_heads=5,ffn=6528")
    assert after == dataclasses.replace(PARENT, heads=20, kv_heads=5, ffn=6528, family=MISTRAL)


@pytest.mark.parametrize(
    ("method", "said", "part"),
    [
        ("wanda", {}, "`ratio`: how much should wanda remove? Pass `ratio`, or `pattern` N:M"),
        ("shortgpt", {}, "Pass `ratio`, or `shape` layers=N"),
        ("flap", {}, "Pass `ratio`, or `shape` hidden=N,ffn=N"),
        ("wanda", {"shape": "layers=3"}, "`shape`: wanda zeroes single weights"),
        ("wanda", {"ratio": 0.5, "of": "total"}, "`of`: a ratio for wanda always counts the weights"),
        ("wanda", {"ratio": 0.5, "axes": "ffn"}, "`axes`: wanda prunes no channels"),
        (
            "sparsegpt",
            {"ratio": 0.5, "allocation": "global"},
            "`allocation` global: needs scores that all",
        ),
        ("wanda", {"ratio": 0.3, "pattern": "2:4"}, "`ratio` 0.3: `pattern` 2:4 removes 0.5; leave one out"),
        ("shortgpt", {"pattern": "2:4"}, "`pattern`: shortgpt removes layers, not weights"),
        ("flap", {"pattern": "2:4"}, "`pattern`: flap removes channels, not weights"),
        (
            "shortgpt",
            {"ratio": 0.5, "shape": "layers=3"},
            "`shape` and `ratio` both say how much to remove; leave one out",
        ),
        (
            "shortgpt",
            {"shape": "layers=3", "of": "total"},
            "`of` says what a `ratio` counts, and there is no ratio; leave it out",
        ),
        ("flap", {"shape": "ffn=3", "axes": "ffn"}, "`axes`: `shape` already says what to narrow; leave it out"),
        ("shortgpt", {"shape": "hidden=64,ffn=64"}, "`shape`: shortgpt does not change ffn, hidden"),
        ("shortgpt", {"ratio": 0.5, "axes": "kv"}, "`axes`: shortgpt prunes no channels"),
        ("flap", {"shape": "layers=3"}, "`shape`: flap does not change layers"),
        ("flap", {"ratio": 0.5, "axes": "hidden"}, "`axes`: flap scores ffn, kv, not hidden"),
        ("flap", {"shape": "hidden=64"}, "`shape`: flap scores ffn, kv, so it cannot narrow hidden"),
        ("flap", {"shape": "ffn=64", "allocation": "global"}, "`allocation` global: needs a `ratio`"),
        ("minitron-width", {"ratio": 0.5, "allocation": "global"}, "`axes` of ffn and kv alone"),
        ("minitron-width", {"shape": "ffn=14336"}, "`shape`: is the model's own shape"),
        ("minitron-width", {"shape": "ffn=14337"}, "`shape`: ffn=14337 is not between 1 and the model's 14336"),
        ("minitron-width", {"shape": "heads=21"}, "`shape`: heads=21 splits a KV group"),
        ("shortgpt", {"shape": "layers=0"}, "`shape`: layers must be a whole number above zero, got 0"),
        (
            "wanda",
            {"pattern": "3:7"},
            "`pattern` 3:7: the rows of self_attn.q_proj.weight have 4096 weights, not a multiple of 7",
        ),
        ("shortgpt", {"ratio": 1e-9}, "`ratio` 1e-09: of 32 layers it would keep 32; possible: 0.0312"),
        ("flap", {"ratio": 1e-9}, "`ratio` 1e-09: too small; narrowing this model in steps of"),
        ("shortgpt", {"ratio": 0.999}, "`ratio` 0.999: of 32 layers it would keep 0; possible: 0.0312"),
        ("flap", {"ratio": 0.999}, "`ratio` 0.999: too large; narrowing this model in steps of 128 FFN channels, 1 KV"),
    ],
)
def test_what_cannot_be_asked_for(method: str, said: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(method, **said)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("wanda", 14336),
        ("random-weight", 14336),
        ("magnitude", 14336 * 4096),
        ("sparsegpt", 14336 * 128),  # the rows of the FFN, in blocks of columns
    ],
)
def test_a_ratio_that_removes_nothing(method: str, most: int) -> None:
    with pytest.raises(UserError, match=rf"`ratio` 1e-09: removes nothing: {method} compares {most:,}") as caught:
        ask(method, ratio=1e-9)
    least = re.search(r"the smallest ratio is (\S+)$", str(caught.value))
    assert least and float(least[1]) == pytest.approx(1 / most, rel=0.01)
    assert ask(method, ratio=float(least[1])) == PARENT
    with pytest.raises(UserError, match="removes nothing"):
        ask(method, ratio=0.99 / most)


def test_a_pattern_has_to_divide_the_rows_of_every_linear() -> None:
    odd = dataclasses.replace(PARENT, ffn=14340)
    with pytest.raises(UserError, match=r"`pattern` 4:8: the rows of mlp.down_proj.weight have 14340 weights"):
        ask("wanda", odd, pattern="4:8")
    assert ask("wanda", odd, pattern="2:4") == odd
    fused = dataclasses.replace(PARENT, family=PHI3, ffn=14340)
    with pytest.raises(UserError, match=r"the rows of mlp.down_proj.weight"):
        ask("magnitude", fused, pattern="4:8")


@pytest.mark.parametrize(
    "family", [row for row in FAMILIES if not (row.experts or row.fixed)], ids=lambda row: row.name
)
@pytest.mark.parametrize("method", [name for name in METHODS if get_method(name).granularity != "experts"])
def test_every_method_reaches_a_ratio_in_every_family(method: str, family: Any) -> None:
    shape = dataclasses.replace(PARENT, family=family)
    found = get_method(method)
    after = ask(method, shape, ratio=0.5)
    gone = 1 - after.non_embedding / shape.non_embedding
    assert gone == (0 if found.granularity == "sparse" else pytest.approx(0.5, abs=0.02))
    assert not after.refused_by_config


def test_the_record() -> None:
    width, sparse = get_method("flap"), get_method("wanda")
    assert Target.parse(ratio=0.5).record(width) == {"ratio": 0.5, "of": "non_embedding"}
    assert Target.parse(ratio=0.5, of="total").record(width) == {"ratio": 0.5, "of": "total"}
    assert Target.parse(ratio=0.5).record(sparse) == {"ratio": 0.5, "of": "block_weights"}
    assert Target.parse(pattern="2:4").record(sparse) == {"pattern": "2:4"}
    assert Target.parse(shape="ffn=3").record(width) == {"shape": {"ffn": 3}}
    said = Target.parse(ratio=0.5, axes="ffn", allocation="global").record(width)
    assert said == {"ratio": 0.5, "of": "non_embedding", "axes": ["ffn"], "allocation": "global"}


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        *(({"ratio": ratio}, f"`ratio` must be between 0 and 1, got {ratio}") for ratio in (1.5, 0, 1, -0.1, math.nan)),
        ({"ratio": "0.5"}, "`ratio` must be between 0 and 1, got '0.5'"),
        ({"ratio": 0.5, "of": "totl"}, "`of`: 'totl' is not known; did you mean 'total'?"),
        ({"ratio": 0.5, "allocation": "globl"}, "`allocation`: 'globl' is not known; did you mean 'global'?"),
        ({"pattern": "2:4"}, "`pattern` must be a Pattern, e.g. Pattern(2, 4), got '2:4'"),
        ({"sizes": {"ffn": -3}}, "`shape`: ffn must be a whole number above zero, got -3"),
        ({"sizes": {"ffn": 2.5}}, "`shape`: ffn must be a whole number above zero, got 2.5"),
        ({"sizes": {"fnn": 3}}, "`shape`: 'fnn' is not a size; did you mean 'ffn'?"),
        ({"ratio": 0.5, "axes": ("heads",)}, "`axes`: 'heads' is not one of layers, hidden, ffn, kv"),
        ({"sizes": {"ffn": 3}, "pattern": Pattern(2, 4)}, "`shape` and `pattern` both say how much to remove"),
    ],
)
def test_a_target_checks_itself(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        Target(**fields)
    assert part in str(caught.value) and caught.value.field == part.split("`")[1]


@pytest.mark.parametrize(("keep", "group"), [(0, 4), (5, 4), (-1, 4)])
def test_a_pattern_checks_itself(keep: int, group: int) -> None:
    with pytest.raises(UserError, match=f"^`pattern`: {keep}:{group} must keep at least 1 weight, and at most all 4"):
        Pattern(keep, group)


@pytest.mark.parametrize(
    "target",
    [
        Target(ratio=0.5, of="total", axes=("kv", "ffn"), allocation="global"),
        Target(sizes={"ffn": 3, "hidden": 8}),
        Target(pattern=Pattern(2, 4)),
    ],
)
def test_a_target_as_plain_values(target: Target) -> None:
    fields = json.loads(json.dumps(target.as_dict()))
    assert list(fields) == ["ratio", "of", "sizes", "pattern", "axes", "allocation"]
    assert Target.from_dict(fields) == target


def test_spaces_come_in_one_order() -> None:
    assert Target(axes=("kv", "ffn")).spaces(get_method("flap")) == ("ffn", "kv")
    assert Target(sizes={"kv_heads": 2, "hidden": 8}).spaces(get_method("minitron-width")) == ("hidden", "kv")
    assert Target(ratio=0.5).spaces(get_method("minitron-width")) == ("hidden", "ffn")
