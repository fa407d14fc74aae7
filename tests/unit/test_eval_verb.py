"""secateur eval and secateur compare, from the command line."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import secateur
from helpers import tiny_llama
from processes import together
from secateur.cli import main
from secateur.cli.arguments import parser
from secateur.cli.verbs.evaluation import evaluate
from secateur.data.shards import TokenStore
from secateur.data.tokenizer import train_tokenizer
from secateur.evaluation.lm_eval.tasks import METRICS
from secateur.evaluation.names import check_names, distinct_names
from secateur.evaluation.results import EvaluationResults, items_file
from secateur.study.stages.inputs import holdout_protocol

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval, of the extra tasks")

WORDS = ("frost", "pear", "ladder", "soil", "rope", "hedge", "saw", "twine", "a man", "the roots")
DOCUMENTS = 6
WMDP = ("wmdp_bio", "wmdp_chem", "wmdp_cyber")


def made_up(draw: random.Random, name: str) -> dict[str, Any]:
    """A document of each of the eight tasks, in the fields of its dataset."""

    def phrase() -> str:
        return f"{draw.choice(WORDS)} and {draw.choice(WORDS)}"

    choices = {"text": [phrase() for _ in range(4)], "label": list("ABCD")}
    return {
        "winogrande": {"sentence": f"{phrase()} _ {phrase()}", "option1": "saw", "option2": "rope", "answer": "1"},
        "arc_easy": {"id": "0", "question": phrase(), "choices": choices, "answerKey": draw.choice("ABCD")},
        "arc_challenge": {"id": "0", "question": phrase(), "choices": choices, "answerKey": draw.choice("ABCD")},
        "openbookqa": {"id": "0", "question_stem": phrase(), "choices": choices, "answerKey": draw.choice("ABCD")},
        "piqa": {"goal": phrase(), "sol1": phrase(), "sol2": phrase(), "label": draw.randrange(2)},
        "boolq": {"question": phrase(), "passage": phrase(), "idx": 0, "label": draw.randrange(2)},
        "sciq": {"question": phrase(), "support": phrase(), "correct_answer": phrase(), "distractor1": phrase()}
        | {"distractor2": phrase(), "distractor3": phrase()},
        "hellaswag": {"ind": 0, "activity_label": "Pruning", "ctx_a": phrase(), "ctx_b": "he", "ctx": phrase()}
        | {"endings": [phrase() for _ in range(4)], "label": str(draw.randrange(4))},
    }[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with one tokenizer, texts and tasks."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 285)
    for seed in (0, 1):
        directory = tiny_llama(folder, seed=seed, vocab_size=300, max_position_embeddings=64)
        tokenizer.save_pretrained(directory)
    draw = random.Random(0)
    (folder / "tasks").mkdir()
    for name in METRICS:
        rows = [made_up(draw, name) for _ in range(DOCUMENTS)]
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, name in enumerate(WMDP, start=4):
        rows = [
            {"question": draw.choice(WORDS), "choices": WORDS[:4], "answer": draw.randrange(4)} for _ in range(number)
        ]
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, count in (("gsm8k", 3), ("gsm8k.examples", 8)):
        rows = [{"question": f"{n} saws?", "answer": f"{n} saws.\n#### {n}"} for n in range(count)]
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"page": " ".join(draw.choice(WORDS) for _ in range(10 * n))} for n in range(1, 5)]
    (folder / "tasks" / "wikitext.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts").mkdir()
    documents = [" ".join(draw.choice(WORDS) for _ in range(40)) for _ in range(20)]
    for name, field in (("c4", "text"), ("wikitext", "text"), ("cnn_dailymail", "article")):
        text = "".join(json.dumps({field: document}) + "\n" for document in documents)
        (folder / "texts" / f"{name}.jsonl").write_text(text)
    for domain in ("web", "books"):
        (folder / "corpus" / domain).mkdir(parents=True)
        text = "".join(json.dumps({"text": f"{domain} {document}"}) + "\n" for document in documents)
        (folder / "corpus" / domain / "part.jsonl").write_text(text)
    line = ["data", f"text:{folder / 'corpus'}", str(folder / "shards"), "--tokenizer", str(folder / "llama-0")]
    assert main([*line, "--holdout", "0.5", "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def roomy(world: Path) -> Path:
    """A model with positions for what it is to write."""
    directory = tiny_llama(world, seed=2, vocab_size=300, max_position_embeddings=400)
    for file in world.glob("llama-0/token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture
def call(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Any]:
    def run(line: str, *, code: int = 0, text: bool = False) -> Any:
        capsys.readouterr()
        words = line.format(w=world, t=tmp_path).split()
        assert main(words if text else [*words, "--json"]) == code
        output = capsys.readouterr()
        return output.err.splitlines()[-1] if code else output.out if text else json.loads(output.out)

    return run


PAPER = "eval {w}/llama-0 --suite paper --data shards:{w}/shards --tasks-data {w}/tasks --text-data {w}/texts"


@needs_lm_eval
def test_the_suite_of_the_paper(call: Callable[..., Any], world: Path, tmp_path: Path) -> None:
    (result,) = call(PAPER + " --out {t}/out")["results"]
    measured = {m["name"]: m for m in result["measurements"]}
    assert set(measured) == {"loss", "heldout/c4", "heldout/wikitext", "heldout/cnn_dailymail", *METRICS}
    assert {p["domain"] for p in measured["loss"]["by_domain"]} == {"books", "web"}
    assert measured["loss"]["items"]["unit"] == "documents"
    for name, metric in METRICS.items():
        assert measured[name]["protocol"]["metric"] == metric and measured[name]["items"]["count"] == DOCUMENTS
        assert measured[name]["protocol"]["lm_eval"] and measured[name]["protocol"]["version"]
    written = json.loads((tmp_path / "out" / "llama-0.json").read_text())
    assert written["measurements"] == result["measurements"] and written["digest"]
    items = items_file(tmp_path / "out" / "llama-0.json")
    before = items.read_bytes()
    assert "exists; remove it" in call(PAPER + " --out {t}/out", code=2)
    call(PAPER + " --out {t}/again")
    assert (tmp_path / "again" / items.name).read_bytes() == before
    assert (tmp_path / "again" / "llama-0.json").read_text() == (tmp_path / "out" / "llama-0.json").read_text()


@needs_lm_eval
def test_several_models_share_a_table_and_are_compared(call: Callable[..., Any], world: Path) -> None:
    line = "eval {w}/llama-0 {w}/llama-1 --suite perplexity,piqa,sciq --tasks-data {w}/tasks --text-data {w}/texts"
    table = call(line + " --out {t}/out", text=True)
    head, *rows = table.splitlines()
    assert head.split() == ["llama-0", "llama-1"]
    titles = ["heldout/c4,", "perplexity", "heldout/wikitext,", "perplexity", "heldout/cnn_dailymail,", "perplexity"]
    assert [row.split()[0] for row in rows[:8]] == [*titles, "piqa,", "sciq,"]
    assert all(len(row) == len(rows[0]) for row in rows[:8])
    compared = call("compare {t}/out/llama-0.json {t}/out/llama-1.json")
    names = [c["name"] for c in compared["comparisons"]]
    assert names[-1] == "average of tasks" and len(names) == 6
    for comparison in compared["comparisons"]:
        assert comparison["low"] <= comparison["difference"] <= comparison["high"]
    text = call("compare {t}/out/llama-0.json {t}/out/llama-0.json", text=True)
    assert text.count("undecided: ") + text.count("equal within 0.02") == 6
    text = call(
        "compare {t}/out/llama-0.json,{t}/out/llama-1.json {t}/out/llama-1.json,{t}/out/llama-0.json", text=True
    )
    assert "intervals cover the choice of items and 2 seeds" in text


def test_figures_of_different_protocols_share_no_table(call: Callable[..., Any], world: Path, tmp_path: Path) -> None:
    short = tiny_llama(tmp_path, vocab_size=300, max_position_embeddings=32)
    for file in world.glob("llama-0/token*"):
        (short / file.name).write_bytes(file.read_bytes())
    message = call(f"eval {{w}}/llama-1 {short} --suite perplexity --text-data {{w}}/texts", code=2)
    assert "heldout/c4:" in message and "different protocols" in message and "seqlen 64 and 32" in message
    call("eval {w}/llama-1 --suite perplexity --text-data {w}/texts --out {t}/a")
    call("eval {w}/llama-1 --suite perplexity --text-data {w}/texts --out {t}/b --stride 16")
    message = call("compare {t}/a/llama-1.json {t}/b/llama-1.json", code=2)
    assert "different protocols" in message and "share no table" in message


def folders_called_model(world: Path, root: Path) -> tuple[str, str]:
    """The two models under names as a study has them."""
    for number, stage in enumerate(("wanda-0.5", "S_R")):
        (root / stage).mkdir()
        (root / stage / "model").symlink_to(world / f"llama-{number}")
    return f"{root}/wanda-0.5/model", f"{root}/S_R/model"


def test_models_of_one_name_are_told_apart_by_their_folders(
    call: Callable[..., Any], world: Path, tmp_path: Path
) -> None:
    a, b = folders_called_model(world, tmp_path)
    table = call(f"eval {a} {b} --data shards:{{w}}/shards --out {{t}}/out", text=True)
    assert table.splitlines()[0].split() == ["wanda-0.5", "S_R"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{name}.{end}" for name in ("wanda-0.5", "S_R") for end in ("json", "jsonl.gz")}
    line = "compare {t}/out/wanda-0.5.json {t}/out/S_R.json"
    assert call(line, text=True).splitlines()[:2] == ["A: wanda-0.5", "B: S_R"]
    assert (call(line)["a"], call(line)["b"]) == (["wanda-0.5"], ["S_R"])
    written = EvaluationResults.load(tmp_path / "out" / "wanda-0.5.json")
    assert (written.name, written.model) == ("wanda-0.5", a) and written.record()["name"] == "wanda-0.5"


@pytest.mark.parametrize("option", ["--name pruned --name fresh", "--name pruned,fresh"])
def test_names_may_be_chosen(option: str, call: Callable[..., Any], world: Path, tmp_path: Path) -> None:
    a, b = folders_called_model(world, tmp_path)
    table = call(f"eval {a} {b} {option} --data shards:{{w}}/shards --out {{t}}/out", text=True)
    assert table.splitlines()[0].split() == ["pruned", "fresh"]
    text = call("compare {t}/out/pruned.json {t}/out/fresh.json", text=True)
    assert text.splitlines()[:2] == ["A: pruned", "B: fresh"]
    assert "fresh.json: exists; remove it, or name another --out, or another name with --name" in call(
        f"eval {b} --name fresh --data shards:{{w}}/shards --out {{t}}/out", code=2
    )


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["A/model", "B/model"], ["A", "B"]),
        (["runs/x/A/model", "runs/y/A/model", "B/model"], ["x-A", "y-A", "B"]),
        (["A/model"], ["model"]),
        (["A/model", "A"], ["model", "A"]),
        (["org/small", "other/small"], ["org-small", "other-small"]),
        (["hf:org/small@v1.0", "small"], ["small@v1.0", "small"]),
        (["Small", "x/small"], None),
        (["a b/model", "a,b/model"], None),
        ([".hidden"], ["hidden"]),
    ],
)
def test_names_of_models(models: list[str], names: list[str] | None) -> None:
    result = distinct_names(models)
    assert names is None or result == names
    assert len({name.casefold() for name in result}) == len(models)
    check_names(result, len(models))


def test_results_in_python_have_names(world: Path, tmp_path: Path) -> None:
    models = folders_called_model(world, tmp_path)
    text = f"shards:{world / 'shards'}"
    results = secateur.evaluate(models, data=text, windows=2, names=("A", "B"), out=tmp_path / "out")
    assert [result.name for result in results] == ["A", "B"] and (tmp_path / "out" / "A.json").is_file()
    (result,) = secateur.evaluate(models[0], data=text, windows=2, names="mine")
    assert result.name == "mine"
    with pytest.raises(secateur.UserError) as caught:
        secateur.evaluate(models, data=text, names="mine")
    assert caught.value.field == "names"


def test_a_perplexity_of_many_digits_is_a_power_of_ten(call: Callable[..., Any], world: Path, tmp_path: Path) -> None:
    loud = tiny_llama(tmp_path, vocab_size=300, max_position_embeddings=64)
    weights = loud / "model.safetensors"
    save_file({name: tensor * 1e3 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    lines = call(f"eval {loud} --data shards:{{w}}/shards", text=True).splitlines()
    (row,) = [line.split() for line in lines if line.startswith("  perplexity")]
    assert re.fullmatch(r"\d\.\d\de\+\d+", row[1]), row


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eval {w}/llama-0", "--data: there is nothing to measure; name held-out text"),
        ("eval {w}/llama-0 --suite paper", "--data: the suite paper measures the held-out loss too"),
        ("eval {w}/llama-0 --suite a,,b", "has an empty or repeated name"),
        ("eval {w}/llama-0 --suite zero-shoot", "--suite zero-shoot: is not known; did you mean 'zero-shot'?"),
        ("eval {w}/llama-0 --suite perplexity --protocol heldou", "did you mean 'heldout'?"),
        ("eval {w}/llama-0 --suite perplexity --text-data {t}", "holds no c4.txt, c4.jsonl, c4.json"),
        ("eval {w}/llama-0 --data stdlib --tasks-data {w}", "--tasks-data: nothing that is measured reads it"),
        ("eval {w}/llama-0 --data stdlib --few-shot 0", "--few-shot: nothing that is measured reads it"),
        ("eval {w}/llama-0 --suite sciq --few-shot x", "'x' is not a whole count"),
        ("eval {w}/llama-0 {w}/llama-0 --data stdlib --out {t}", "--out: two of the models have the same name"),
        ("eval {w}/llama-0 --data stdlib --name a,b", "--name: 2 for 1 model; give each model one, in order"),
        ("eval {w}/llama-0 --data stdlib --name ../a", "--name: '../a' is no name of a file"),
        ("eval {w}/llama-0 {w}/llama-1 --data stdlib --name a,A", "--name: two models are called 'a'"),
        ("eval {w}/llama-0 --data shards:{t}", "holds no token shards; write them with `secateur data"),
        ("compare {t}/a.json {t}/b.json", "a.json: no such file"),
    ],
)
def test_bad_input_is_told_in_a_line(line: str, message: str, call: Callable[..., Any]) -> None:
    assert message in call(line, code=2)


@needs_lm_eval
def test_missing_tasks_are_told_before_anything_runs(call: Callable[..., Any]) -> None:
    assert "piqa.jsonl: no such file" in call("eval {w}/llama-0 --suite piqa --tasks-data {t}", code=2)
    message = call("eval {w}/llama-0 --suite arc_eazy --tasks-data {t}", code=2)
    assert "--suite arc_eazy: lm-eval has no task, group or tag of that name; did you mean 'arc_easy'?" in message
    message = call("eval {w}/llama-0 --suite sciq,gsm8k --tasks-data {w}/tasks", code=2)
    assert "gsm8k lets a model write 256 tokens, and this one takes 64 with the question; leave the task out" in message


@needs_lm_eval
def test_a_group_of_tasks(call: Callable[..., Any], world: Path) -> None:
    line = "eval {w}/llama-0 {w}/llama-1 --suite wmdp,sciq --tasks-data {w}/tasks"
    table = call(line + " --out {t}/out", text=True)
    rows = [row.split() for row in table.splitlines()]
    assert [row[:2] for row in rows[1:6]] == [[f"{name},", "acc"] for name in (*WMDP, "sciq", "wmdp")]
    assert "wmdp: mean of 3 tasks over documents, 15 documents, lm-eval" in table
    compared = call("compare {t}/out/llama-0.json {t}/out/llama-1.json")["comparisons"]
    assert [c["name"] for c in compared] == [*WMDP, "sciq", "wmdp", "average of tasks"]
    assert [c["items"] for c in compared] == [4, 5, 6, DOCUMENTS, 15, 15 + DOCUMENTS]
    message = call("eval {w}/llama-0 --suite wmdp,sciq --tasks-data {w}/tasks --few-shot 2", code=2)  # wmdp stays at 0
    assert "sciq.examples.jsonl: no such file; the 2 examples in each prompt of sciq are drawn from it" in message


def test_without_the_harness_all_but_tasks_are_measured(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models.utils", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    line = "eval {w}/llama-0 --suite perplexity,cost --text-data {w}/texts --data shards:{w}/shards"
    assert len(call(line)["results"][0]["measurements"]) == 4


def test_few_windows_are_spread_over_the_held_out_split(call: Callable[..., Any], world: Path) -> None:
    line = "eval {w}/llama-0 --data shards:{w}/shards --seqlen 32 --windows 3"
    (spread,), (first,) = (call(line + more)["results"] for more in ("", " --stride 16"))
    protocols = [result["measurements"][0]["protocol"] for result in (spread, first)]
    of_a_study = holdout_protocol(TokenStore(world / "shards"), 3, 32).record()
    assert protocols[0]["fingerprint"] == of_a_study["fingerprint"] and protocols[0]["windows"] == 3
    assert {part["domain"] for part in spread["measurements"][0]["by_domain"]} == {"books", "web"}
    assert "by_domain" not in first["measurements"][0] and protocols[1]["stride"] == 16


@needs_lm_eval
def test_a_killed_command_goes_on(call: Callable[..., Any], world: Path, tmp_path: Path) -> None:
    line = "eval {w}/llama-0 {w}/llama-1 --data shards:{w}/shards --suite piqa,sciq,arc_easy --tasks-data {w}/tasks"
    call(line + " --out {t}/whole")
    measured: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        from secateur.evaluation import measure

        measure_task = measure.measure_task

        def killed(model: Any, task: Any, *rest: Any, **more: Any) -> Any:
            measured.append(task.name)
            if len(measured) == 5:  # the second task of the second model
                raise KeyboardInterrupt
            return measure_task(model, task, *rest, **more)

        patch.setattr(measure, "measure_task", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(parser().parse_args([*line.format(w=world).split(), "--out", str(tmp_path / "out")]))
        assert not (tmp_path / "out" / "llama-0.json").exists()
        call(line + " --out {t}/out")
    assert measured == ["piqa", "sciq", "arc_easy", "piqa", "sciq", "sciq", "arc_easy"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} and len(files) == 4


def test_models_are_timed_on_one_workload(call: Callable[..., Any], world: Path, roomy: Path) -> None:
    results = call(f"eval {{w}}/llama-0 {roomy} --suite cost")["results"]
    assert [result["cost"]["workload"]["prompt"] for result in results] == [48, 48]  # and 16 new ones


def test_cost_in_the_table(call: Callable[..., Any]) -> None:
    table = call("eval {w}/llama-0 --suite cost", text=True)
    assert "decode, batch 8, tokens/s" in table and "KV cache, bytes/token" in table and "medians of 7" in table


@needs_lm_eval
def test_several_processes_give_the_same(world: Path, roomy: Path, tmp_path: Path) -> None:
    line = [
        "--suite",
        "perplexity,piqa,sciq,gsm8k,wikitext",
        "--tasks-data",
        str(world / "tasks"),
        "--text-data",
        str(world / "texts"),
    ]
    command = [str(roomy), *line, "--device", "cpu", "--out"]
    assert main(["eval", *command, str(tmp_path / "one")]) == 0
    together(2, [["eval", *command, str(tmp_path / "two")]], tmp_path)
    single, parallel = (EvaluationResults.load(tmp_path / folder / f"{roomy.name}.json") for folder in ("one", "two"))
    written = [[item["written"] for item in m.items] for r in (single, parallel) if (m := r.of("gsm8k"))]
    assert len(written) == 2 and written[0] == written[1] and len(written[0]) == 3
    for a, b in zip(single.record()["measurements"], parallel.record()["measurements"], strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-6) and a["protocol"] == b["protocol"]


@needs_lm_eval
@pytest.mark.slow
def test_scores_are_those_of_the_harness_s_own_command(world: Path, roomy: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from evaluate import harness_task

    names = (*METRICS, "gsm8k", "wikitext")
    tasks = {name: harness_task(name, world / "tasks" / f"{name}.jsonl", tmp_path) for name in names}
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    line += ["--model_args", f"pretrained={roomy},dtype=float32", "--tasks", ",".join(tasks.values())]
    line += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "theirs"), "--log_samples"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(line, check=True, env=environment, capture_output=True, timeout=300)
    reference = json.loads(next((tmp_path / "theirs").rglob("results*.json")).read_text())["results"]
    command = ["eval", str(roomy), "--suite", "zero-shot,gsm8k,wikitext", "--tasks-data", str(world / "tasks")]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "ours")]) == 0
    measurements = {
        m["name"]: m for m in json.loads((tmp_path / "ours" / f"{roomy.name}.json").read_text())["measurements"]
    }
    for name, local in tasks.items():
        for metric, value in measurements[name]["metrics"].items():
            assert value == pytest.approx(reference[local][metric], rel=1e-5, abs=1e-12), (name, metric)
    for name, metric in METRICS.items():
        assert measurements[name]["value"] == measurements[name]["metrics"][f"{metric},none"]
