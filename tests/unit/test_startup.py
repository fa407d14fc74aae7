"""Commands that compute nothing start without the libraries that compute, which take seconds to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from family_configs import FAMILY_CONFIGS, FAMILY_SIZES
from helpers import tiny_llama
from secateur.errors import UserError
from secateur.model import config_file
from secateur.model.attention_windows import states_windows
from secateur.model.checkpoint import read_config
from secateur.model.config_file import read_shape

SHTAB = 0 if find_spec("shtab") else 2  # exit code of what needs it
DEMO = Path(__file__).parents[2] / "studies" / "demo.yaml"
HEAVY = ("torch", "transformers", "matplotlib", "scipy", "datasets", "lm_eval")
RUN = """
import json, sys
from secateur.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, [name for name in %r if name in sys.modules]]))
"""


def run(code: str, *arguments: str, cwd: Path | None = None) -> Any:
    """Run Python code in a new process and return the JSON value of the last line that it prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=os.environ.copy(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_imports_no_library() -> None:
    libraries = (*HEAVY, "numpy", "pydantic", "yaml")
    code = f"import json, sys, secateur; print(json.dumps([m for m in {libraries!r} if m in sys.modules]))"
    assert run(code) == []


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("prune --help", 0),
        ("shapes {config}", 0),
        ("shapes {config} --ratio 0.5", 0),
        ("shapes {config} --ratio 0.5 --method flap", 0),
        ("study plan {demo}", 0),
        ("study status {demo}", 0),
        ("prune a b --method wandda --ratio 0.5", 2),
        ("prune a b --method wanda --ratio 1.5", 2),
        ("prune a b --method wanda", 2),
        ("prune a b --method wanda --ratio 0.5 --option block=3 --calibration text:x", 2),
        ("train x", 2),
        ("train x --init scratch --tokens 10 --data shards:x", 2),
        ("eval a --suite zero-shott", 2),
        ("compare a b c", 2),
        ("study plan none.yaml", 2),
        ("completion bash", SHTAB),
        ("train x --init y --tokens 10 --data shards:x --lr 1", 2),
        ("recommend --params 8B --ratio 0.8 --tokens 50B", 0),
        ("recommend --params 8B --ratio 0.5 --tokens 50B --parent-tokens 15T", 0),
        ("recommend --model {config} --ratio 0.5 --tokens 50B --granularity depth", 0),
    ],
)
def test_no_heavy_library_is_imported(line: str, code: int, tmp_path: Path) -> None:
    config = tiny_llama(tmp_path) / "config.json"
    arguments = line.format(config=config, demo=DEMO).split()
    script = RUN % (HEAVY,)
    if code == 0 and "--help" in arguments:
        script = script.replace(
            "code = main(sys.argv[1:])", "code = 0\ntry: main(sys.argv[1:])\nexcept SystemExit: pass"
        )
    assert run(script, *arguments, cwd=tmp_path) == [code, []]


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_shapes_equal_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a complete file, and for the same file with any one key missing."""
    path = tmp_path / "config.json"
    values = {**FAMILY_SIZES, **FAMILY_CONFIGS[name]}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    complete = AutoConfig.for_model(**{**ids, **values}).to_dict()
    loaded: list[Path] = []
    load = config_file.load_config
    monkeypatch.setattr(config_file, "load_config", lambda file: (loaded.append(file), load(file))[1])
    for missing in (None, *complete):
        if missing in ("model_type", "layer_types"):  # the second is no part of a shape
            continue
        path.write_text(json.dumps({key: value for key, value in complete.items() if key != missing}))
        try:
            _, config, shape, _ = read_config(path)
        except UserError:  # such as a default number of heads that does not divide the hidden size
            with pytest.raises(UserError):
                read_shape(path)
            continue
        expected = shape, getattr(config, "max_position_embeddings", None)
        loaded.clear()
        assert read_shape(path) == expected, missing
        plain_sizes = not (shape.family.kinds or shape.family.derived)
        is_plain = plain_sizes and states_windows(complete)  # the others need transformers' defaults
        assert missing is not None or not loaded or not is_plain


@pytest.mark.parametrize(
    "change", [{"hidden_size": "48"}, {"attention_bias": "false"}, {"num_attention_heads": 7}, {"head_dim": None}]
)
def test_transformers_judges_unusual_values(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**AutoConfig.for_model(**{**FAMILY_SIZES, "model_type": "llama"}).to_dict(), **change}))
    if change == {"head_dim": None}:
        assert read_shape(path)[0].head_dim == 8
    else:
        with pytest.raises(UserError):
            read_shape(path)
