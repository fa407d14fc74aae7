"""Groups of tasks, tasks that write, texts as a whole, and examples in prompts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from helpers import hf, logits, tiny_llama
from secateur.comparison.items import AVERAGE, compare_results
from secateur.data.tokenizer import load_tokenizer, train_tokenizer
from secateur.errors import UserError
from secateur.evaluation.layer_removal import removal_accuracies
from secateur.evaluation.lm_eval.accuracy import check_tasks, language_model, measure_task
from secateur.evaluation.lm_eval.groups import TaskGroup, check_groups, expand, measure_groups
from secateur.evaluation.lm_eval.tasks import Task
from secateur.evaluation.measure import measure
from secateur.evaluation.results import EvaluationResults, Measurement
from secateur.evaluation.suite import Suite
from secateur.model.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval, of the extra tasks")

Row = dict[str, Any]
WORDS = ("frost", "pear", "ladder", "soil", "rope", "hedge", "saw", "twine", "a man", "the roots")


def write(folder: Path, name: str, rows: list[Row]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def question(draw: random.Random) -> Row:
    return {"question": draw.choice(WORDS), "subject": "frost", "choices": draw.sample(WORDS, 4), "answer": 2}


def sum_of(draw: random.Random) -> Row:
    a, b = draw.randrange(9), draw.randrange(9)
    return {"question": f"{a} saws and {b} saws?", "answer": f"{a} + {b} saws.\n#### {a + b}"}


@pytest.fixture(scope="module", autouse=True)
def few_folders() -> Iterator[None]:
    """The harness's index of the folders that these tests name, since that of all of them takes many seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    names = ("mmlu/default", "arc", "gsm8k", "bbh/cot_fewshot", "hellaswag", "truthfulqa", "winogrande")
    folders: list[str | Path] = [root / name for name in names]
    with pytest.MonkeyPatch.context() as patch:
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*folders, root / "benchmarks"])
        patch.setattr("secateur.evaluation.lm_eval.groups.index", lambda: manager.task_index)
        yield


@pytest.fixture(scope="module")
def others() -> list[str]:
    """The tasks of the group ``mmlu_other``."""
    return [member.name for member in expand(["mmlu_other"], where="--suite").members]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, others: list[str]) -> Path:
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    for number, name in enumerate(others):
        write(folder, name, [question(draw) for _ in range(2 + number % 4)])
    write(folder, "gsm8k", [sum_of(draw) for _ in range(5)])
    write(folder, "gsm8k.examples", [sum_of(draw) for _ in range(9)])
    write(folder, "wikitext", [{"page": " ".join(draw.choice(WORDS) for _ in range(n))} for n in (9, 70, 30, 200)])
    write(folder, "cola", [{"sentence": draw.choice(WORDS), "label": n % 2, "idx": n} for n in range(6)])
    write(folder, "sciq", [science(draw) for _ in range(7)])
    return folder


def science(draw: random.Random) -> Row:
    right, *wrong = draw.sample(WORDS, 4)
    named = {f"distractor{n}": word for n, word in enumerate(wrong, start=1)}
    return {"question": draw.choice(WORDS), "support": draw.choice(WORDS), "correct_answer": right, **named}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([" ".join(WORDS), "Question: 3 saws and 4 saws?\nAnswer: 3 + 4 saws.\n#### 7"], 290)


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    def write_model(seed: int = 3, positions: int = 400) -> Path:
        directory = tiny_llama(tmp_path, seed=seed, vocab_size=300, max_position_embeddings=positions)
        tokenizer.save_pretrained(directory)
        return directory

    return write_model


def measured(directory: Path, tasks: list[Task], batch: int | None = None) -> list[Measurement]:
    return list(measure(Checkpoint(directory), hf(directory), {}, tasks, batch=batch))


def plain(directory: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=hf(directory), tokenizer=load_tokenizer(directory), batch_size=1)


def test_what_names_stand_for(others: list[str]) -> None:
    listed = expand(["mmlu", "ai2_arc", "mmlu_anatom?"], where="--suite")
    names = [member.name for member in listed.members]
    assert len(names) == 59 and names[-2:] == ["arc_challenge", "arc_easy"] and set(others) < set(names)
    groups = {group.name: group for group in listed.groups}
    assert list(groups) == ["mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities", "mmlu"]
    assert groups["mmlu"].tasks == tuple(names[:57]) and groups["mmlu_other"].tasks == tuple(others)
    assert groups["mmlu"].metric == "acc" and groups["mmlu"].by_size
    (by_filter,) = expand(["bbh"], where="--suite").groups
    assert by_filter.metric == "exact_match,get-answer" and len(by_filter.tasks) == 27


def test_a_group_changes_how_its_tasks_are_asked() -> None:
    listed = expand(["openllm"], where="--suite")
    changes = {member.name: member.changes for member in listed.members}
    assert changes["arc_challenge"] == {"fewshot_split": "train", "num_fewshot": 25}
    assert changes["gsm8k"] == {"num_fewshot": 5} and changes["mmlu_anatomy"] == {"num_fewshot": 5}
    with pytest.raises(UserError, match="--suite openllm: configures arc_challenge differently from another name"):
        expand(["arc_challenge", "openllm"], where="--suite")


@pytest.mark.parametrize("name", ["mmlu_othr", "zz*", "#@~"])
def test_a_name_that_nothing_has(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--suite {name}: lm-eval has no task, group or tag of that name")):
        expand([name], where="--suite")


@pytest.mark.parametrize("by_size", [True, False])
def test_the_figure_of_a_group_is_the_harness_s_own(
    by_size: bool, make: Callable[..., Path], data: Path, others: list[str]
) -> None:
    import lm_eval
    from lm_eval.api.group import Group as HarnessGroup
    from lm_eval.config.group import AggMetricConfig

    directory = make()
    (listed,) = expand(["mmlu_other"], where="--suite").groups
    group = replace(listed, by_size=by_size)
    tasks = [Task(name, str(data), metric="acc") for name in others]
    check_groups([group], tasks)
    measurements = measured(directory, tasks)
    (average,) = measure_groups([group], measurements)
    harness_group = HarnessGroup("mmlu_other", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=by_size)])
    for task in tasks:
        harness_group.add(task.requests.harness_task)
    loaded: Any = {"tasks": {t.name: t.requests.harness_task for t in tasks}, "groups": {"mmlu_other": harness_group}}
    result: Any = lm_eval.evaluate(plain(directory), loaded | {"group_map": {"mmlu_other": others}}, bootstrap_iters=0)
    assert average.value == pytest.approx(result["groups"]["mmlu_other"]["acc,none"], abs=1e-12)
    assert [m.value for m in measurements] == [result["results"][name]["acc,none"] for name in others]
    documents = [item["value"] for m in measurements for item in m.items]
    assert average.kind == "accuracy" and average.tasks == others and average.protocol["documents"] == len(documents)
    assert bool(average.value == pytest.approx(np.mean(documents))) is by_size
    with pytest.raises(UserError, match=r"mmlu_other: averages f1, and mmlu_[a-z_]+ reports acc,none; name its tasks"):
        check_groups([replace(group, metric="f1")], tasks)


def test_a_group_is_compared_on_its_documents_and_counts_once(
    make: Callable[..., Path], data: Path, others: list[str]
) -> None:
    (group,) = expand(["mmlu_other"], where="--suite").groups
    tasks = [Task(name, str(data)) for name in (*others, "sciq")]
    sides = []
    for seed in (0, 1):
        directory = make(seed)
        measurements = measured(directory, tasks)
        sides.append(EvaluationResults(directory.name, [*measurements, *measure_groups([group], measurements)]))
    compared = {c.name: c for c in compare_results(sides[:1], sides[1:])}
    values = [{m.name: m.value for m in side.measurements} for side in sides]
    whole, average = compared["mmlu_other"], compared[AVERAGE]
    assert whole.difference == pytest.approx(values[0]["mmlu_other"] - values[1]["mmlu_other"])
    assert whole.items == sum(compared[name].items or 0 for name in others) and whole.low <= whole.difference  # type: ignore[operator]
    assert average.a == pytest.approx((values[0]["mmlu_other"] + values[0]["sciq"]) / 2)
    assert average.items == (whole.items or 0) + 7
    part = TaskGroup("part", tuple(others[:3]), "acc", True)  # inside of the other one, as mmlu has groups
    nested = [replace(s, measurements=[*s.measurements, *measure_groups([part], s.measurements)]) for s in sides]
    with_part = {c.name: c for c in compare_results(nested[:1], nested[1:])}
    assert "part" in with_part and with_part[AVERAGE] == average
    assert average.low <= average.difference <= average.high  # type: ignore[operator]


def test_written_answers_are_the_harness_s_own(make: Callable[..., Path], data: Path) -> None:
    short = {"generation_kwargs": {"until": ["saws"], "do_sample": False, "max_gen_toks": 30}}
    directory, task = make(), Task("gsm8k", str(data), few_shot=1, changes=short)
    expected = plain(directory).generate_until(task.requests.harness_task.instances)
    for batch in (None, 1, 3):
        (measurement,) = measured(directory, [task], batch)
        assert [text for item in measurement.items for text in item["written"]] == expected
    assert len(set(expected)) > 1 and measurement.protocol["metric"] == "exact_match,strict-match"
    assert list(measurement.details["metrics"]) == ["exact_match,strict-match", "exact_match,flexible-extract"]


class Canned:
    """A model with fixed answers."""

    rank, world_size = 0, 1
    truncated_requests = truncated_choices = 0

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers

    def start(self, *_: Any) -> None:
        self.answered = len(self.answers)

    def generate_until(self, _: Any) -> list[str]:
        return self.answers


def test_the_score_of_written_answers(data: Path) -> None:
    task = Task("gsm8k", str(data), few_shot=0)
    rows = [document[0].doc for document in task.requests.documents]
    right = [row["answer"] for row in rows]
    loose = f"It is {right[1].split()[-1]}0, no, {right[1].split()[-1]}"
    model: Any = Canned([right[0], loose, right[2], "no idea", f"#### {10**6}"])
    score = measure_task(model, task)
    assert score.kind == "accuracy" and [item["value"] for item in score.items] == [1, 0, 1, 0, 0]
    assert score.value == score.details["metrics"]["exact_match,strict-match"] == 0.4
    assert score.details["metrics"]["exact_match,flexible-extract"] >= 0.4


def test_examples_in_the_prompt(data: Path, tmp_path: Path) -> None:
    default = Task("gsm8k", str(data))
    assert default.requests.protocol()["few_shot"] == 5  # as the task has it
    examples = [json.loads(line)["answer"] for line in (data / "gsm8k.examples.jsonl").read_text().splitlines()]
    for shots in (0, 1, 4):
        prompts = [document[0].args[0] for document in Task("gsm8k", str(data), few_shot=shots).requests.documents]
        assert all(prompt.count("Answer:") == shots + 1 for prompt in prompts)
        assert all(sum(prompt.count(a) for a in set(examples)) >= shots for prompt in prompts)
    prints = {Task("gsm8k", str(data), few_shot=n).requests.protocol()["fingerprint"] for n in (0, 1, 4)}
    assert len(prints) == 3
    (tmp_path / "gsm8k.jsonl").write_bytes((data / "gsm8k.jsonl").read_bytes())
    assert Task("gsm8k", str(tmp_path), few_shot=0).requests.documents
    with pytest.raises(UserError, match=r"gsm8k\.examples\.jsonl: no such file; the 5 examples in each prompt"):
        Task("gsm8k", str(tmp_path)).record()
    with pytest.raises(UserError, match="-1 examples in a prompt are not possible"):
        Task("gsm8k", str(data), few_shot=-1).record()


def test_examples_are_those_that_the_harness_draws(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import lm_eval.tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = {"test": str(data / "gsm8k.jsonl"), "train": str(data / "gsm8k.examples.jsonl")}
    changes = {"task": "gsm8k", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    root = Path(lm_eval.tasks.__file__).parent / "gsm8k"
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(root))
    harness_task: Any = manager.load({"group": "theirs", "task": [changes]})["tasks"]["gsm8k"]
    harness_task.set_fewshot_seed(1234)  # as the command line does
    harness_task.build_all_requests()
    requests = Task("gsm8k", str(data)).requests
    assert [request.args for request in requests.instances] == [request.args for request in harness_task.instances]


def test_a_text_as_a_whole(make: Callable[..., Path], data: Path) -> None:
    directory = make(positions=64)
    task = Task("wikitext", str(data))
    (measurement,) = measured(directory, [task])
    texts = [json.loads(line)["page"] for line in (data / "wikitext.jsonl").read_text().splitlines()]
    prompts = [document[0].args[0] for document in task.requests.documents]  # without the harness's marks
    tokenizer, model, expected = load_tokenizer(directory), hf(directory), []
    for text in prompts:
        ids, total = tokenizer(text)["input_ids"], 0.0
        for start in range(0, len(ids), 64):
            part = ids[start : start + 64]
            # Each window is as long as it can be: the last one goes back to have as much context as there is room for.
            begin = max(0, start + len(part) - 64)
            before = [tokenizer.bos_token_id] if begin == 0 else [ids[begin - 1]]
            window = before + ids[begin : start + len(part) - 1]
            every = logits(model, torch.tensor([window]))[0].double().log_softmax(-1)
            total += sum(float(every[-len(part) + i][token]) for i, token in enumerate(part))
        expected.append(total)
    words = [len(re.split(r"\s+", text)) for text in texts]
    assert [item["loglikelihoods"][0] for item in measurement.items] == pytest.approx(expected, rel=1e-4)
    assert [item["tokens"] for item in measurement.items] == words and measurement.unit == "documents"
    assert measurement.kind == "loss" and measurement.scale == "nats per word"
    assert measurement.value == pytest.approx(-sum(expected) / sum(words), rel=1e-4)
    assert measurement.details["perplexity"] == pytest.approx(measurement.details["metrics"]["word_perplexity,none"])
    harness_values = plain(directory).loglikelihood_rolling(task.requests.harness_task.instances)
    assert [item["loglikelihoods"][0] for item in measurement.items] == pytest.approx(harness_values, rel=1e-5)


def test_a_figure_of_all_documents_together(make: Callable[..., Path], data: Path) -> None:
    sides = [EvaluationResults("", measured(make(seed), [Task("cola", str(data))])) for seed in (0, 1)]
    (measurement,) = sides[0].measurements
    assert measurement.kind == "score" and measurement.scale == "mcc"
    assert {item["value"] for item in measurement.items} == {None}
    (compared,) = compare_results(sides[:1], sides[1:])
    assert compared.verdict == "not measured"
    assert compared.reason == "mcc is of all documents together, and single ones have none"


def test_what_a_model_cannot_be_asked(make: Callable[..., Path], data: Path) -> None:
    directory = make(positions=200)
    with pytest.raises(UserError, match="gsm8k lets a model write 256 tokens, and this one takes 200"):
        check_tasks(Checkpoint(directory), [Task("gsm8k", str(data))])
    with pytest.raises(UserError, match="squadv2: lm-eval fetches its documents with code of its own"):
        Task("squadv2", str(data)).record()
    with pytest.raises(UserError, match="wikitext: is measured by word_perplexity; name a task with an accuracy"):
        removal_accuracies(Checkpoint(directory), 1, Task("wikitext", str(data)), device="cpu")


@pytest.mark.parametrize(
    ("name", "rows", "shots", "message"),
    [
        ("humaneval", [], None, "humaneval: runs programs that the model writes, which is refused; leave it out"),
        ("mmmu_val_art", [], None, "mmmu_val_art: asks about pictures or sound; leave it out"),
        ("sst2", [{"sentence": "a", "label": "x", "idx": 0}], None, "document 0 has the answer 'x', which is none of"),
        ("wikitext", [{"page": "a"}, {"page": ""}], None, "document 1 is empty"),
        ("sciq", [science(random.Random(0))], 3, "sciq.examples.jsonl: holds 2 documents, too few to draw 3 examples"),
    ],
)
def test_what_cannot_be_asked_is_told_before(
    name: str, rows: list[Row], shots: int | None, message: str, tmp_path: Path
) -> None:
    if rows:
        write(tmp_path, name, rows)
        write(tmp_path, f"{name}.examples", [science(random.Random(n)) for n in range(2)])
    with pytest.raises(UserError, match=re.escape(message)):
        Task(name, str(tmp_path), few_shot=shots).record()


def test_a_metric_that_could_not_be_fetched_is_told_before(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api import task

    monkeypatch.setattr(task, "get_metric", lambda *_: None)  # as the harness has it where nothing was fetched
    with pytest.raises(UserError, match="gsm8k: lm-eval fetches its metric exact_match with the package evaluate"):
        Task("gsm8k", str(data)).record()


def test_what_is_drawn_depends_on_no_batch(make: Callable[..., Path], data: Path) -> None:
    settings = {"until": ["saws"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    directory, changes = make(), {"generation_kwargs": settings, "repeats": 3}
    texts = []
    for batch in (None, 4):
        task = Task("gsm8k", str(data), few_shot=0, changes=changes)
        (measurement,) = measured(directory, [task], batch)
        texts.append([item["written"] for item in measurement.items])
    assert texts[0] == texts[1]
    assert all(len(written) == 3 for written in texts[0]) and any(len(set(written)) > 1 for written in texts[0])


def test_a_suite_names_groups(others: list[str]) -> None:
    suite = Suite.parse("zero-shot,mmlu_other")
    names = [member.name for member in suite.task_list().members]
    assert names == [*suite.tasks[:8], *others] and len(suite.task_list().groups) == 1


def test_a_task_that_fails_to_score_is_told(make: Callable[..., Path], data: Path) -> None:
    directory, task = make(), Task("sciq", str(data))
    harness_model = language_model(Checkpoint(directory), hf(directory))

    def broken(*_: Any) -> None:
        raise KeyError("no such field")

    task.requests.harness_task.process_results = broken
    with pytest.raises(UserError, match=r"sciq: lm-eval cannot score the answers by acc \(KeyError: 'no such field'\)"):
        measure_task(harness_model, task)
