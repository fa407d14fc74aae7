"""Calibration of a method's own: what is planned, what is read, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cells import common, ran, record
from test_plan import named, planned, study

from secateur.data.encode import encode_texts
from secateur.data.tokenizer import load_tokenizer, token_hash
from secateur.errors import UserError
from secateur.study.planner import stages_of
from secateur.study.resolve import resolve
from secateur.study.spec import StudySpec
from secateur.study.stage import Stage, unique


def resolved(of: StudySpec) -> list[Stage]:
    return unique(stages_of(of, resolve(of)))


def write_texts(folder: Path, *texts: str) -> Path:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_a_methods_own_source_is_known_by_what_it_holds(tmp_path: Path) -> None:
    corpus = {"vocabulary": 280, "source": f"text:{write_texts(tmp_path / 'corpus', 'one', 'two')}"}
    places = [write_texts(tmp_path / name, text) for name, text in (("a", "words"), ("b", "words"), ("c", "others"))]

    def stages(place: Path, **changes: Any) -> list[Stage]:
        own = {"source": f"text:{place}", "windows": 4, "seqlen": 16, **changes}
        methods = [{"method": "wanda", "calibration": own}, "flap"]
        return resolved(study(tmp_path, corpus=corpus, methods=methods, seeds=[0, 1]))

    first, moved, changed = (stages(place) for place in places)
    name = "wanda-0.5~s0"
    pruned = named(first, name, "prune")
    assert pruned.identity["seqlen"] == 16 and pruned.tokens == 64 and "slice" not in pruned.identity
    assert pruned.identity["calibration"].keys() == {"windows", "source"}
    assert str(tmp_path) not in str(pruned.identity) and pruned.runtime["calibration"] == f"text:{places[0]}"
    assert named(moved, name, "prune").fingerprint == pruned.fingerprint
    assert named(changed, name, "prune").fingerprint != pruned.fingerprint
    other = named(first, "flap-0.5~s0", "prune")
    assert other.identity["seqlen"] == 32 and other.identity["calibration"] == {"windows": 8, "seed": 42}
    seeds = [
        named(stages(places[0], protocol="documents"), f"wanda-0.5~s{seed}", "prune").identity["calibration"]["seed"]
        for seed in (0, 1)
    ]
    assert seeds[0] == 42 and seeds[1] != 42


def test_a_study_without_sources_of_its_own_is_planned_as_before(tmp_path: Path) -> None:
    plain = named(planned(study(tmp_path, methods="wanda")), "wanda-0.5", "prune")
    own = {"method": "wanda", "calibration": {"windows": 8}}
    same = named(planned(study(tmp_path, methods=[own], calibration={"windows": 4})), "wanda-0.5", "prune")
    assert same.fingerprint == plain.fingerprint
    short = named(
        planned(study(tmp_path, methods="wanda", calibration={"windows": 8, "seqlen": 16})), "wanda-0.5", "prune"
    )
    assert short.tokens == plain.tokens / 2 and short.identity["seqlen"] == 16


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"seqlen": 64}, "methods[0].calibration.seqlen: 64 is more than recipe.sequence"),
        ({"windows": 501}, "methods[0].calibration.windows: 501 windows of 32 tokens are more than parent.tokens"),
        ({"protocol": "documents"}, "calibration.protocol: goes with calibration.source"),
        ({"field": "text"}, "calibration.field: goes with calibration.source"),
        ({"source": "text:nowhere"}, "nowhere"),
        ({"source": "tokens:x.npy"}, "tokens:x.npy"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, own: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(study(tmp_path, methods=[{"method": "wanda", "calibration": own}]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_scores_are_of_the_methods_own_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = " ".join(["barn fist", "logo lull"] * 60)
    source = write_texts(tmp_path / "own", "bar", long, long[::-1], "fist", long[3:], long[5:])
    entries = [
        {"method": "wanda", "name": protocol, "calibration": {"source": f"text:{source}", "windows": 3} | extra}
        for protocol, extra in (("stream", {}), ("documents", {"protocol": "documents", "seqlen": 24, "seed": 5}))
    ]
    out = tmp_path / "out"
    answer = ran(tmp_path / "a.yaml", out, capsys, **common(text, methods=entries, settings=[]))
    assert not answer["failed"]
    (model,) = out.glob("stages/train-parent-*/model")
    tokenizer = load_tokenizer(model)
    documents = encode_texts(tokenizer, [path.read_text() for path in sorted(source.iterdir())])
    stream = np.concatenate(documents)[: 3 * 32].reshape(3, 32)
    draw = np.random.default_rng(5)
    windows = []
    for document in [document for document in documents if len(document) > 24][:3]:
        start = int(draw.integers(len(document) - 24))
        windows.append(document[start : start + 24])
    for name, expected in (("stream", stream), ("documents", np.stack(windows))):
        calibration = record(out, f"prune-{name}-0.5-*")["result"]["calibration"]
        assert calibration["source"] == "text" and calibration["windows"] == 3
        assert calibration["hash"] == token_hash(expected.astype(np.int64)), name
