from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import hf, logits, tiny_family, tiny_llama, without_layers
from secateur.data.tokenizer import load_tokenizer, train_tokenizer
from secateur.errors import UserError
from secateur.evaluation.layer_removal import removal_accuracies
from secateur.evaluation.lm_eval.accuracy import language_model, measure_task, report_truncation
from secateur.evaluation.lm_eval.tasks import METRICS, Task
from secateur.model.checkpoint import Checkpoint
from secateur.progress import set_listener

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval, of the extra tasks")

Row = dict[str, Any]
#: context and continuation of each choice, the divisor of each log-likelihood, and the index of the right choice
ChoiceRequests = tuple[list[tuple[str, str]], list[int], int]

THINGS = ("the pear tree", "a rope", "the old ladder", "wet soil", "a sharp saw", "green twine", "the hedge", "frost")
DEEDS = ("keeps the roots warm", "was cut in spring", "cannot carry a man", "stops the rain", "bears fruit twice")


def arc_easy(draw: random.Random) -> Row:
    labels = draw.choice(["ABCD", "1234", "ABC"])
    texts = draw.sample(THINGS, len(labels))
    choices = {"text": texts, "label": list(labels)}
    question = f"What {draw.choice(DEEDS)} when {draw.choice(THINGS)} {draw.choice(DEEDS)}?"
    row = {"id": f"made up {draw.random()}", "question": question, "choices": choices}
    return {**row, "answerKey": draw.choice(labels)}


def piqa(draw: random.Random) -> Row:
    ends = [f"{draw.choice(THINGS)} with {draw.choice(THINGS)}" for _ in range(2)]
    return {"goal": f"Mend {draw.choice(THINGS)}.", "sol1": ends[0], "sol2": ends[1], "label": draw.randrange(2)}


def winogrande(draw: random.Random) -> Row:
    first, second, third = draw.sample(THINGS, 3)
    sentence = f"Beside {third} stood {first} and {second}, and _ {draw.choice(DEEDS)}."
    return {"sentence": sentence, "option1": first, "option2": second, "answer": draw.choice("12")}


def arc_easy_requests(row: Row) -> ChoiceRequests:
    texts = row["choices"]["text"]
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {text}") for text in texts]
    return pairs, [len(text) for text in texts], row["choices"]["label"].index(row["answerKey"])


def piqa_requests(row: Row) -> ChoiceRequests:
    texts = [row["sol1"], row["sol2"]]
    pairs = [(f"Question: {row['goal']}\nAnswer:", f" {text}") for text in texts]
    return pairs, [len(text) for text in texts], row["label"]


def winogrande_requests(row: Row) -> ChoiceRequests:
    before, after = row["sentence"].split("_")
    pairs = [(before + option, after) for option in (row["option1"], row["option2"])]
    return pairs, [1, 1], int(row["answer"]) - 1


#: task -> how to make up a document, and how to ask it
TASKS: dict[str, tuple[Callable[[random.Random], Row], Callable[[Row], ChoiceRequests]]] = {
    "arc_easy": (arc_easy, arc_easy_requests),
    "piqa": (piqa, piqa_requests),
    "winogrande": (winogrande, winogrande_requests),
}
DOCUMENTS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each task."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (make, _) in TASKS.items():
        draw = random.Random(name)
        write(folder, name, [make(draw) for _ in range(DOCUMENTS)])
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([f"Question: {a} {b}\nAnswer:" for a in THINGS for b in DEEDS], 290)


@pytest.fixture
def llama(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    directory = tiny_llama(tmp_path, seed=3, vocab_size=300, max_position_embeddings=128)
    tokenizer.save_pretrained(directory)
    return directory


def write(folder: Path, name: str, rows: list[Row]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(folder: Path, name: str) -> list[Row]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def naive_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], name: str
) -> list[list[float]]:
    """For each document the log-likelihood of each choice, one choice and one token at a time, in float64."""
    documents = []
    for row in rows:
        likelihoods = []
        for context, continuation in TASKS[name][1](row)[0]:
            ids, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
            every = logits(model, torch.tensor([ids]))[0].double()
            steps = [float(every[i - 1][ids[i]] - every[i - 1].logsumexp(0)) for i in range(start, len(ids))]
            likelihoods.append(sum(steps))
        documents.append(likelihoods)
    return documents


def naive_accuracy(likelihoods: list[list[float]], rows: list[Row], name: str) -> float:
    """The share of documents whose likeliest choice, by its length where the task says so, is the right one."""
    right = 0
    for row, values in zip(rows, likelihoods, strict=True):
        _, sizes, answer = TASKS[name][1](row)
        scores = [value / size for value, size in zip(values, sizes, strict=True)]
        right += scores.index(max(scores)) == answer
    return right / len(rows)


def check(directory: Path, length: int, name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Compare likelihoods and accuracies with naive ones; return the accuracies, that of the full model first."""
    from lm_eval.models.huggingface import HFLM

    recorded: list[list[float]] = []
    loglikelihood = HFLM.loglikelihood

    def recording(*args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        answers = loglikelihood(*args, **kwargs)
        recorded.append([likelihood for likelihood, _ in answers])
        return answers

    monkeypatch.setattr(HFLM, "loglikelihood", recording)
    full, without = removal_accuracies(Checkpoint(directory), length, Task(name, str(data)), device="cpu")

    tokenizer, layers, rows = load_tokenizer(directory), hf(directory).config.num_hidden_layers, read(data, name)
    runs = [range(0), *(range(first, first + length) for first in range(layers - length + 1))]
    expected = [naive_likelihoods(without_layers(hf(directory), run), tokenizer, rows, name) for run in runs]
    assert len(recorded) == len(runs) == len({str(likelihoods) for likelihoods in expected})
    for measured, likelihoods in zip(recorded, expected, strict=True):
        assert measured == pytest.approx([value for values in likelihoods for value in values], rel=1e-4)
    assert [full, *without] == pytest.approx([naive_accuracy(likelihoods, rows, name) for likelihoods in expected])
    return [full, *without]


@needs_lm_eval
@pytest.mark.parametrize(("name", "length"), [("arc_easy", 1), ("piqa", 2), ("winogrande", 1), ("winogrande", 3)])
def test_removals_against_a_naive_loop(
    name: str, length: int, llama: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = check(llama, length, name, data, monkeypatch)
    assert len(accuracies) == 1 + 5 - length + 1
    assert len(set(accuracies)) > 1  # so that one candidate taken for another would show


@needs_lm_eval
@pytest.mark.parametrize("family", ["gemma3", "qwen2-mixed"])
def test_each_kept_layer_keeps_its_own_attention(
    family: str, tokenizer: PreTrainedTokenizerBase, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_family(tmp_path, family, vocab_size=300, max_position_embeddings=128)
    tokenizer.save_pretrained(directory)
    kinds = hf(directory).config.layer_types
    assert set(kinds) == {"full_attention", "sliding_attention"} and kinds[1:] != kinds[:-1]
    check(directory, 2, "winogrande", data, monkeypatch)


@needs_lm_eval
def test_the_full_model_s_accuracy_is_the_harness_s_own(llama: Path, data: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    task = Task("piqa", str(data), limit=10)
    full, _ = removal_accuracies(Checkpoint(llama), 4, task, device="cpu")
    model = HFLM(pretrained=hf(llama), tokenizer=load_tokenizer(llama), batch_size=3)
    loaded = {"tasks": {"piqa": task.requests.harness_task}}
    results = lm_eval.evaluate(lm=model, task_dict=loaded, limit=10, bootstrap_iters=0)
    assert results is not None
    assert full == results["results"]["piqa"]["acc_norm,none"]
    assert results["n-samples"]["piqa"]["effective"] == 10


@needs_lm_eval
def test_the_same_every_time_and_in_any_batch(llama: Path, data: Path) -> None:
    checkpoint, task = Checkpoint(llama), Task("arc_easy", str(data), limit=9)
    accuracies = removal_accuracies(checkpoint, 1, task, device="cpu")
    assert accuracies == removal_accuracies(checkpoint, 1, task, device="cpu")  # its requests are used again
    assert accuracies == removal_accuracies(checkpoint, 1, Task("arc_easy", str(data), limit=9), device="cpu", batch=1)
    rows = read(data, "arc_easy")[:9]
    expected = naive_likelihoods(hf(llama), load_tokenizer(llama), rows, "arc_easy")
    assert accuracies[0] == pytest.approx(naive_accuracy(expected, rows, "arc_easy"))


@needs_lm_eval
@pytest.mark.parametrize("name", TASKS)
def test_record(name: str, data: Path) -> None:
    import lm_eval

    record = Task(name, str(data)).record()
    assert record == {
        "name": name,
        "version": 1.0,
        "lm_eval": lm_eval.__version__,
        "metric": "acc" if name == "winogrande" else "acc_norm",
        "documents": DOCUMENTS,
        "sha256": sha256((data / f"{name}.jsonl").read_bytes()).hexdigest(),
    }
    json.dumps(record, allow_nan=False)
    assert Task(name, str(data), limit=5).record() == record | {"documents": 5}
    assert Task(name, str(data), limit=5000).record() == record


#: a document of each further task that has a metric of its own, made up
OTHERS: dict[str, Row] = {
    "boolq": {"question": "is frost cold", "passage": "Frost is cold.", "idx": 0, "label": 1},
    "hellaswag": {
        "ind": 0,
        "activity_label": "Pruning",
        "ctx_a": "A man climbs.",
        "ctx_b": "he",
        "ctx": "A man climbs. he",
        "endings": ["falls.", "cuts the tree.", "sings.", "is frost."],
        "label": "1",
    },
    "openbookqa": {
        "id": "0",
        "question_stem": "Frost is",
        "choices": {"text": ["cold", "hot", "green", "old"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
    "sciq": {
        "question": "What grows?",
        "distractor1": "a rope",
        "distractor2": "a saw",
        "distractor3": "iron",
        "correct_answer": "a tree",
        "support": "",
    },
}
OTHERS["arc_challenge"] = {**OTHERS["openbookqa"], "question": "Frost is?"}
OTHERS["lambada_openai"] = {"text": "the ladder was old"}


@needs_lm_eval
@pytest.mark.parametrize("name", OTHERS)
def test_the_metric_of_each_task(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, [OTHERS[name]] * 2)
    record = Task(name, str(tmp_path)).record()
    assert (record["metric"], record["documents"]) == (METRICS.get(name, "acc"), 2)


@needs_lm_eval
def test_a_task_without_choices(llama: Path, tmp_path: Path) -> None:
    write(tmp_path, "lambada_openai", [OTHERS["lambada_openai"]])
    full, without = removal_accuracies(Checkpoint(llama), 4, Task("lambada_openai", str(tmp_path)), device="cpu")
    assert {full, *without} <= {0.0, 1.0} and len(without) == 2


@needs_lm_eval
def test_progress_and_silence(llama: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Listener:
        def __init__(self) -> None:
            self.updates: list[tuple[str, float, float]] = []
            self.messages: list[str] = []

        def update(self, key: str, done: float, total: float, note: str) -> None:
            self.updates.append((key, done, total))

        def finish(self, key: str) -> None:
            self.updates.append((key, -1, -1))

        def message(self, text: str) -> None:
            self.messages.append(text)

    listener = Listener()
    set_listener(listener)
    capfd.readouterr()
    try:
        task = Task("winogrande", str(data), limit=3)
        task.record()
        assert capfd.readouterr() == ("", "")
        removal_accuracies(Checkpoint(llama), 3, task, device="cpu")
    finally:
        set_listener(None)  # type: ignore[arg-type]
    key = "score by winogrande"
    assert listener.updates == [*((key, done, 4.0) for done in range(5)), (key, -1, -1)]
    assert listener.messages == []
    out, err = capfd.readouterr()
    assert out == "" and "loglikelihood" not in err and "WARNING" not in err


@needs_lm_eval
def test_requests_beyond_the_context_are_told(
    tokenizer: PreTrainedTokenizerBase, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [pair for row in read(data, "winogrande") for pair in winogrande_requests(row)[0]]
    sizes = sorted(len(tokenizer("".join(pair))["input_ids"]) for pair in pairs)
    room = sizes[len(sizes) // 2]
    directory = tiny_llama(tmp_path, vocab_size=300, max_position_embeddings=room)
    tokenizer.save_pretrained(directory)
    removal_accuracies(Checkpoint(directory), 4, Task("winogrande", str(data)), device="cpu")
    long = sum(size > room + 1 for size in sizes)  # the last token is only predicted
    assert 0 < long < len(sizes)
    message = f"winogrande: left out the beginning of {long} of {len(sizes)} requests, longer than the {room} tokens"
    assert message in capsys.readouterr().err


def fails(task: Task) -> str:
    with pytest.raises(UserError) as caught:
        task.record()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@needs_lm_eval
def test_a_name_that_is_no_task(data: Path) -> None:
    assert fails(Task("winogrand", str(data))).endswith("no single task 'winogrand'; did you mean 'winogrande'?")
    assert "no single task 'ai2_arc'" in fails(Task("ai2_arc", str(data)))  # a tag


GOOD = '{"sentence": "The rope held _ up.", "option1": "frost", "option2": "it", "answer": "2"}'
UNFIT = ": winogrande cannot be built from it"


@needs_lm_eval
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n{{oops\n", ":2: not valid JSON: Expecting property name"),
        (f"\n{GOOD}\n\n[1]\n", ":4: not a JSON object"),
        (f"{GOOD}\n".encode() + b'{"sentence": "\xff"}', ":2: not valid JSON: invalid start byte"),
        (f"{GOOD}\n" + GOOD.replace("n2", "n3"), ":2: differs from the first document in its fields: option2, option3"),
        ("\n", ": holds no documents"),
        (GOOD.replace("sentence", "phrase"), f"{UNFIT} (KeyError: 'sentence'); it must have the fields"),
        (GOOD.replace("_", "-"), f"{UNFIT} (ValueError: substring not found)"),
        (GOOD.replace('"2"', '""'), f"{UNFIT} (KeyError: '')"),
        (f"{GOOD}\n" + GOOD.replace('"2"', "2"), f"{UNFIT} (Arrow"),
    ],
)
def test_a_malformed_file(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "winogrande.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"{path}{message}" in fails(Task("winogrande", str(tmp_path)))


@needs_lm_eval
def test_withheld_answers(data: Path, tmp_path: Path) -> None:
    write(tmp_path, "piqa", [row | {"label": -1} for row in read(data, "piqa")])
    assert "document 0 has the answer -1, but 2 choices" in fails(Task("piqa", str(tmp_path)))


@needs_lm_eval
def test_a_missing_file(tmp_path: Path) -> None:
    assert f"{tmp_path / 'piqa.jsonl'}: no such file" in fails(Task("piqa", str(tmp_path)))
    (tmp_path / "piqa.jsonl").mkdir()
    assert f"{tmp_path / 'piqa.jsonl'}: cannot be read" in fails(Task("piqa", str(tmp_path)))
    (tmp_path / "file").touch()
    assert "cannot be read" in fails(Task("piqa", str(tmp_path / "file")))


@needs_lm_eval
@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_without_documents(limit: int, data: Path) -> None:
    assert f"a limit of {limit} leaves no document" in fails(Task("piqa", str(data), limit))


@needs_lm_eval
def test_the_hub_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = fails(Task("winogrande"))
    dataset = "allenai/winogrande:winogrande_xl"
    assert f"winogrande: {dataset} cannot be loaded from the Hugging Face Hub (Connection" in message
    assert message.endswith("connect to the network, or name a folder that holds winogrande.jsonl")
    assert "winogrande: asking the Hugging Face Hub for allenai/winogrande" in capsys.readouterr().err


def test_without_the_harness(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    message = fails(Task("winogrande", str(data)))
    assert "lm-eval, which cannot be imported" in message and message.endswith("pip install 'secateur[tasks]'")


def refuses(directory: Path, task: Task) -> str:
    with pytest.raises(UserError) as caught:
        removal_accuracies(Checkpoint(directory), 1, task, device="cpu")
    return str(caught.value)


@needs_lm_eval
def test_a_broken_model_is_told(llama: Path, data: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    message = refuses(llama, Task("winogrande", str(data)))
    assert message == f"{llama}: the log-likelihoods on winogrande are NaN or infinite"


@needs_lm_eval
def test_a_tokenizer_that_does_not_serve(llama: Path, data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = Task("winogrande", str(data), limit=2)
    config = json.loads((llama / "tokenizer_config.json").read_text())
    bare = {key: value for key, value in config.items() if key not in ("bos_token", "eos_token")}
    (llama / "tokenizer_config.json").write_text(json.dumps(bare))
    assert "neither a BOS nor an EOS token" in refuses(llama, task)
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in refuses(llama, task)


@needs_lm_eval
def test_a_choice_beyond_the_context(
    tokenizer: PreTrainedTokenizerBase, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_llama(tmp_path, vocab_size=300, max_position_embeddings=8)
    tokenizer.save_pretrained(directory)
    rows = read(data, "arc_easy")
    model, task = hf(directory), Task("arc_easy", str(data))
    harness_model = language_model(Checkpoint(directory), model)
    likelihoods = [value for item in measure_task(harness_model, task).items for value in item["loglikelihoods"]]
    expected, long = [], 0
    for row in rows:
        for context, continuation in arc_easy_requests(row)[0]:
            ids, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
            window, start = ids[-9:], max(1, start - max(0, len(ids) - 9))  # eight are read, and the ninth is predicted
            long += len(ids) - len(tokenizer(context)["input_ids"]) > 8
            every = logits(model, torch.tensor([window]))[0].double()
            expected.append(
                sum(float(every[i - 1][window[i]] - every[i - 1].logsumexp(0)) for i in range(start, len(window)))
            )
    assert likelihoods == pytest.approx(expected, rel=1e-4)
    assert 0 < long == harness_model.truncated_choices < harness_model.truncated_requests == len(likelihoods)
    report_truncation(harness_model, task)
    assert f"in {long} of them the choice alone is longer, so that only its last 8 tokens" in capsys.readouterr().err


@needs_lm_eval
def test_the_home_folder_stays_clean(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Task("piqa", str(data)).record()
    assert not (tmp_path / "cache").exists()


@needs_lm_eval
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("batch", [None, 1, 7])
def test_likelihoods_are_the_harness_s_own(name: str, batch: int | None, llama: Path, data: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    task = Task(name, str(data))
    model, tokenizer = hf(llama), load_tokenizer(llama)
    measurement = measure_task(language_model(Checkpoint(llama), model, batch), task)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    expected = [value for value, _ in plain.loglikelihood(task.requests.harness_task.instances)]
    assert [v for item in measurement.items for v in item["loglikelihoods"]] == pytest.approx(expected, rel=1e-5)
    tasks = {"tasks": {name: task.requests.harness_task}}
    results: Any = lm_eval.evaluate(lm=plain, task_dict=tasks, bootstrap_iters=0)
    assert measurement.value == results["results"][name][task.requests.key]
    assert measurement.value == sum(item["value"] for item in measurement.items) / DOCUMENTS
    assert measurement.details["truncated"] == {"requests": 0, "choices": 0}
    assert len({item["document"] for item in measurement.items}) == DOCUMENTS


@needs_lm_eval
def test_choices_share_what_they_have_in_common(llama: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.evaluation.lm_eval.likelihoods import Likelihoods

    sizes = []
    states = Likelihoods._states

    def counting(self: Likelihoods, rows: Any) -> torch.Tensor:
        sizes.append(sum(map(len, rows)))
        return states(self, rows)

    monkeypatch.setattr(Likelihoods, "_states", counting)
    task, harness_model = Task("arc_easy", str(data)), language_model(Checkpoint(llama), hf(llama))
    measure_task(harness_model, task)
    monkeypatch.setattr(Likelihoods, "_can_share_rows", lambda self, cut: False)
    shared, sizes[:] = sum(sizes), []
    measure_task(harness_model, task)
    assert 1.5 * shared < sum(sizes)


@needs_lm_eval
def test_rows_hold_every_request_once() -> None:
    from secateur.evaluation.lm_eval.likelihoods import rows_of

    draw = random.Random(0)
    requests = []
    for _ in range(40):
        begin = [draw.randrange(9) for _ in range(draw.randrange(1, 12))]
        for _ in range(draw.randrange(1, 5)):
            ids = begin + [draw.randrange(9) for _ in range(draw.randrange(0, 9))]
            requests.append((ids, [draw.randrange(9) for _ in range(draw.randrange(1, len(ids) + 1))]))
    rows = rows_of(requests)
    assert sorted(number for row in rows for number in row.requests) == [*range(len(requests))]
    assert len(rows) < len(requests) == len(rows_of(requests, share=False))
    for row in rows:
        ids, places, branches = row.layout()
        assert len(row) == len(ids) == len(places) == len(branches)
        for branch, (number, scored) in enumerate(zip(row.requests, row.scored(), strict=True), start=1):
            path = [i for i, b in enumerate(branches) if b in (0, branch)]
            assert [ids[i] for i in path] == requests[number][0]
            assert [places[i] for i in path] == [*range(len(path))]
            assert scored == path[len(path) - len(requests[number][1]) :]


@needs_lm_eval
def test_the_fingerprint_is_of_what_is_asked(data: Path, tmp_path: Path) -> None:
    whole, repeated = (Task("piqa", str(data)).requests.protocol() for _ in range(2))
    assert whole == repeated and whole["few_shot"] == 0
    rows = read(data, "piqa")
    write(tmp_path, "piqa", [{**rows[0], "sol1": "another end"}, *rows[1:]])
    others = [Task("piqa", str(data), limit=5), Task("winogrande", str(data)), Task("piqa", str(tmp_path))]
    prints = {whole["fingerprint"], *(task.requests.protocol()["fingerprint"] for task in others)}
    assert len(prints) == 4
