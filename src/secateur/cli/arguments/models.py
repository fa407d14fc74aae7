"""The arguments of verbs about single models, and the data for them."""

from __future__ import annotations

import argparse
from typing import Any

from secateur.cli import manual
from secateur.cli.arguments.common import (
    above_zero,
    add_verb,
    amount,
    computing,
    count_or_none,
    dtype,
    goals,
    holdout,
    positive,
    push_to_hub,
    share,
    text_fields,
    token_count,
    whole_number,
    windows,
    zero_or_more,
)

__all__ = [
    "add_compare",
    "add_data",
    "add_evaluate",
    "add_inspect",
    "add_mask",
    "add_prune",
    "add_search",
    "add_shapes",
    "add_teach",
    "add_train",
]


def _context(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--context",
        type=positive,
        help=f"window that FLOPs per token are averaged over{more} (default: 2048, or the model's limit if less)",
    )


def add_inspect(verbs: Any) -> None:
    """``secateur inspect``."""
    inspect = add_verb(
        verbs,
        "inspect",
        "describe a checkpoint",
        "It reads the weights to count zeros and to look for NaN; nothing is run.",
    )
    inspect.add_argument("model", help="checkpoint directory, or Hub name (org/name[@revision])")
    _context(inspect)


def add_shapes(verbs: Any) -> None:
    """``secateur shapes``."""
    shapes = add_verb(
        verbs,
        "shapes",
        "show a model's size and cost, before and after pruning",
        "It counts parameters, FLOPs and KV cache from config.json alone; no weights are needed. With a ratio it shows "
        "the legal shapes nearest to it, and how far off they are.",
        manual.SHAPES_EPILOG,
    )
    shapes.add_argument("model", metavar="CONFIG_OR_DIR", help="config.json, a directory that has one, or a Hub name")
    amount(shapes, "are listed one after the other")
    goals(shapes, latency=False)
    shapes.add_argument("--method", help="the shape that this method would reach")
    _context(shapes, "; with --memory also the tokens of each sequence")


def add_data(verbs: Any) -> None:
    """``secateur data``."""
    data = add_verb(
        verbs,
        "data",
        "turn text into token shards for training",
        "It encodes documents in several processes, leaves out those that repeat an earlier one, holds some out, and "
        "writes the rest in a shuffled order. The hash of its text and the seed decide a document's split "
        "and place. After a kill, the same command resumes.",
        manual.DATA_EPILOG,
    )
    add = data.add_argument
    add("source", metavar="SOURCE", help=manual.DOCUMENTS)
    add("out", metavar="OUT", help="new directory to write")
    add("--tokenizer", required=True, metavar="DIR", help="directory with the tokenizer, a checkpoint, or a Hub name")
    text_fields(data)
    add("--split", help="split to read, for hf: and arrow: (default: train)")
    add(
        "--domain",
        metavar="FIELD",
        help="field that names a document's domain (default: the first subfolder that its file lies in)",
    )
    add("--holdout", type=holdout, default=0.05, metavar="SHARE", help="share of the documents held out; 0 for none")
    add("--documents", type=token_count, metavar="N", help="documents to read at most, e.g. 200k (default: all)")
    add("--seed", type=whole_number, default=0, help="of the order of documents")
    add("--workers", type=positive, help="processes; execution only (default: one for each core)")
    add("--shard-tokens", type=token_count, metavar="N", help="tokens in a file (default: 67108864)")


def add_prune(verbs: Any) -> None:
    """``secateur prune``."""
    prune = add_verb(
        verbs,
        "prune",
        "prune a checkpoint",
        "It scores the model block by block, most methods on calibration text, decides what to keep (plan.json, "
        "plan.safetensors) and writes a checkpoint that plain transformers opens. Shapes are rounded to steps; the "
        "shares that were removed are printed beside the request.",
    )
    prune.write_epilog = manual.prune_epilog
    add = prune.add_argument
    add("model", help="checkpoint directory, or Hub name (org/name[@revision])")
    add("out", help="new directory to write")
    add("--method", required=True, help="one of the methods below")
    amount(prune, "give one checkpoint each, OUT/ratio-R, scored once where the scores do not depend on it")
    goals(prune, latency=True)
    add(
        "--pattern",
        metavar="N:M",
        help="zeros of sparse methods: keep N weights of each M in a row, e.g. 2:4 or 4:8 (default: unstructured)",
    )
    add(
        "--allocation",
        choices=("uniform", "global", "owl", "alpha", "evolve"),
        default="uniform",
        help="width methods: every layer keeps as many channels, or layers compete (global); sparse methods: a "
        "layer's zeros are as many, or by one threshold (global), outliers (owl), spectra (alpha) or a search (evolve)",
    )
    add(
        "--ratios-by-layer",
        metavar="FILE",
        help="sparse methods: the share of zeros of each layer instead of --ratio, a JSON or YAML list",
    )
    add(
        "--keep-pattern",
        action=argparse.BooleanOptionalAction,
        help="depth methods: keep the period of the layer kinds, which llama.cpp takes from a constant for some "
        "families (default: where the family has one and the model follows it)",
    )
    add(
        "--propagate",
        choices=("unpruned", "pruned"),
        default="unpruned",
        help="methods that remove experts: score a block on what the blocks before it put out as they are, or with "
        "their kept experts alone",
    )
    add(
        "--option",
        dest="options",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the method; may be repeated",
    )
    add(
        "--iterations",
        metavar="N",
        type=positive,
        default=1,
        help="prune in N steps, each scored on what the one before left; --reconstruct is divided among them. To train "
        "between steps, give the method iterations: N in a study",
    )
    add(
        "--iteration-schedule",
        choices=("linear", "cubic"),
        default="linear",
        help="the share of the removal that is done after step t of N: t / N, or 1 - (1 - t / N)^3, fast at first",
    )
    add(
        "--reconstruct",
        metavar="STEPS",
        type=positive,
        help="sparse and width methods: afterwards tune each block, attention and then FFN for so many steps of AdamW, "
        "to put out what the dense block puts out; memory holds one block, and zeros stay (default: none)",
    )
    add(
        "--reconstruct-rate",
        metavar="RATE",
        type=float,
        help="peak rate of these steps over the root mean square of a tensor's weights (default: 0.02)",
    )
    add("--tasks-data", metavar="DIR", help="minitron-depth: folder of the task's data")
    add("--task-limit", metavar="N", type=positive, help="minitron-depth: examples of the task at most")
    more_sources = "for sheared also shards:DIR; for image-text models also images:FILE.jsonl"
    add("--calibration", metavar="SOURCE", help=f"{manual.SOURCES}; {more_sources}")
    windows(prune, "128")
    computing(prune)
    dtype(prune, "of the forward passes; statistics and scores are float32 or better")
    add(
        "--states",
        choices=("auto", "device", "ram", "disk"),
        default="auto",
        help="where hidden states between blocks lie: on the device that computes them, in memory, or on disk, where a "
        "resumed run does not repeat finished blocks (auto: on a GPU if they fit into 8 GB and half of its free "
        "memory; else in memory, or on disk if memory is short)",
    )
    add("--resume", action="store_true", help="continue a killed run at its last finished block")
    push_to_hub(prune)


def add_mask(verbs: Any) -> None:
    """``secateur mask``."""
    mask = add_verb(
        verbs,
        "mask",
        "set the pruned weights of a sparse model to zero again",
        "A merge of adapters (LoRA), or a trainer that knows no masks, fills the zeros of a sparse model. This verb "
        "applies the masks of the pruned checkpoint to the result, writes it to a new directory with the plan beside "
        "it, and prints how many weights it set to zero. It refuses a model of other names, sizes or family.",
        manual.MASK_EPILOG,
    )
    mask.add_argument("model", metavar="MERGED", help="checkpoint to mask: a directory, or Hub name")
    mask.add_argument("--plan", required=True, metavar="PRUNED", help="pruned checkpoint whose masks apply, likewise")
    mask.add_argument("--out", metavar="OUT", help="new directory to write (default: MERGED-masked)")


def add_search(verbs: Any) -> None:
    """``secateur search``."""
    search = add_verb(
        verbs,
        "search",
        "try several shapes at a goal with a little retraining each, and rank the best",
        "It scores the model once, cuts it to several legal shapes at the goal, and retrains them in rungs: the better "
        "half goes on with twice the FLOPs, from the cut weights again. The finalists are compared on held-out text. "
        "The cost is printed first. After a kill, the same command resumes.",
        manual.SEARCH_EPILOG,
    )
    add = search.add_argument
    add("model", help="checkpoint directory, or Hub name (org/name[@revision])")
    add("out", help="new directory to write: OUT/1 is the best finalist, OUT/search.json the record")
    add("--budget", required=True, type=token_count, help="tokens of all trainings together, at most: 200M, 1e9 ...")
    add("--data", required=True, metavar="shards:DIR", help="what `secateur data` has written, with held-out documents")
    goals(search, latency=False)
    add("--context", type=positive, metavar="N", help="for --memory: tokens of each sequence (default: 2048)")
    add("--method", default="minitron-width", help="a method that changes the shape, as for `secateur prune`")
    add("--axes", metavar="AXES", help="spaces that are narrowed: hidden,ffn,kv (default: the method's own choice)")
    add("--step", type=positive, metavar="N", help="round hidden and FFN sizes to multiples of N")
    add("--candidates", type=positive, default=12, metavar="N", help="shapes to cut, at most")
    add("--finalists", type=positive, default=3, metavar="N", help="models that the last rung trains")
    add("--calibration", metavar="SOURCE", help=manual.SOURCES)
    add("--windows", type=positive, help="calibration windows at most (default: 128)")
    add("--seqlen", type=positive, help="tokens in one, or the model's limit if less (default: 2048)")
    search.spellings = {"recipe": "--recipe or --set"}
    search.setting_keys = _recipe_keys
    add("--recipe", metavar="FILE", help="YAML with the recipe of every training; `secateur train --help` has the keys")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="a key of the recipe; repeatable")
    add("--teacher", metavar="DIR|logits:DIR", help="distil from this checkpoint; its forward passes count as FLOPs")
    add("--skip", type=count_or_none, default=0, metavar="TOKENS", help="tokens of the data to leave out")
    add("--heldout-windows", type=positive, default=256, help="windows that losses are measured on, at most")
    computing(search)
    dtype(search, "of what is computed; weights that are trained stay float32")


def _recipe_keys() -> list[str]:
    import dataclasses

    from secateur.training.recipe import Recipe  # imported late, since it loads pydantic

    return [field.name for field in dataclasses.fields(Recipe)]


def add_train(verbs: Any) -> None:
    """``secateur train``."""
    train = add_verb(
        verbs,
        "train",
        "train a model on an exact number of tokens",
        "It reads a slice of the data once, to the last token, in an order that a seed fixes, whatever the number of "
        "processes. A sparse model keeps its masks. After a kill, the same command resumes from its last checkpoint.",
        manual.TRAIN_EPILOG,
    )
    add = train.add_argument
    add("out", help="new directory to write")
    add("--init", required=True, metavar="scratch|DIR", help="fresh weights, or those of a checkpoint")
    add("--like", metavar="DIR", help="checkpoint or config.json of the shape, for --init scratch")
    add("--keep-zeros", action="store_true", help="mask the block linears' weights that are zero in --init DIR")
    add("--only", choices=("router",), help="train this part alone: router, of a mixture of experts (default: all)")
    add("--tokens", required=True, type=token_count, help="budget: 700k, 7e5, 50B ...")
    add("--data", required=True, metavar="shards:DIR", help="what `secateur data` has written")
    add(
        "--skip",
        type=count_or_none,
        default=0,
        metavar="TOKENS",
        help="tokens of the data to leave out before the first",
    )
    train.spellings = {"recipe": "--recipe or --set", "adapter": "--lora"}
    train.setting_keys = _recipe_keys
    add("--recipe", metavar="FILE", help="YAML with the keys below")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="a key of the recipe; repeatable")
    add(
        "--teacher",
        metavar="DIR|logits:DIR",
        help="checkpoint to distil from, of the model's vocabulary, or what `secateur teach` has saved of one",
    )
    for name, convert, meaning in (
        ("--temperature", float, "softens both distributions (default: 1)"),
        ("--alpha", share, "share of the divergence from the teacher; the rest is the usual loss (default: 1)"),
        ("--top-k", positive, "compare the teacher's likeliest N ids, all others as one (default: all apart)"),
    ):
        add(name, type=convert, metavar="N" if convert is positive else "X", help=f"with --teacher: {meaning}")
    add(
        "--lora",
        dest="adapter",
        metavar="KEY=VALUE,...",
        help="train an adapter alone: rank=16,alpha=32,targets=all (see below)",
    )
    add("--merge", action="store_true", help="with --lora: write merged weights, and the adapter in OUT/adapter")
    add("--points", type=positive, default=8, help="measurements of the held-out loss along the run")
    add("--heldout-windows", type=positive, default=256, help="windows that it is measured on, at most")
    add("--device", default="auto", help="auto, cpu or cuda")
    dtype(train, "of the computation; weights, moments and sums stay float32")
    add("--micro-batch", type=positive, metavar="N", help="windows at once in a process (default: 8)")
    add("--recompute", action="store_true", help="recompute activations within blocks: less memory, a third more time")
    add("--compile", action="store_true", help="compile the blocks (torch.compile)")
    add("--replicas", type=positive, default=1, help="groups of processes that each hold the model")
    add(
        "--save-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the trained model on disk (default: as --init DIR is stored; for scratch, as computed)",
    )
    add("--save-every", type=positive, default=100, metavar="STEPS", help="steps between checkpoints")
    add("--save-minutes", type=above_zero, default=20, metavar="N", help="and minutes, whichever come first")
    add("--keep", type=positive, default=2, metavar="N", help="checkpoints of the run to keep")
    add("--track", action="append", choices=("tensorboard", "wandb"), help="also send the metrics to this tracker")
    push_to_hub(train)


def add_teach(verbs: Any) -> None:
    """``secateur teach``."""
    teach = add_verb(
        verbs,
        "teach",
        "save a teacher's likeliest next tokens, to distil without it",
        "At each position of a slice it saves the ids that the teacher finds likeliest, their log-probabilities, and "
        "the remaining mass as one number. `secateur train --teacher logits:OUT` reads them, for any student. "
        "After a kill, the same command resumes at its last shard.",
        manual.TEACH_EPILOG,
    )
    add = teach.add_argument
    add("teacher", metavar="TEACHER", help="checkpoint directory, or Hub name (org/name[@revision])")
    add("data", metavar="CORPUS", help="what `secateur data` has written")
    add("out", metavar="OUT", help="new directory to write")
    add("--tokens", type=token_count, help="tokens to read: 700k, 7e5, 50B ... (default: all behind --skip)")
    add("--skip", type=count_or_none, default=0, metavar="TOKENS", help="tokens to leave out before the first")
    add("--top-k", type=positive, default=64, metavar="N", help="ids to save at each position")
    add("--temperature", type=above_zero, default=1.0, metavar="X", help="of the distribution; training uses the same")
    add("--sequence", type=positive, default=8192, metavar="N", help="tokens in a window, as in the recipe of training")
    add("--attention", choices=("window", "document"), default="window", help="as in the recipe of training")
    computing(teach)
    dtype(teach, "of the forward pass; probabilities are float32")
    add("--replicas", type=positive, default=1, help="groups of processes that each hold the teacher")


def add_evaluate(verbs: Any) -> None:
    """``secateur eval``."""
    evaluate = add_verb(
        verbs,
        "eval",
        "measure held-out loss, perplexity, accuracy on tasks, and cost",
        "Text is encoded with the checkpoint's own tokenizer and cut into windows, whose first token is context only. "
        "Several checkpoints give one table, if their figures were measured in the same way.",
        manual.EVAL_EPILOG,
    )
    add = evaluate.add_argument
    add("models", metavar="model", nargs="+", help="checkpoint directory or Hub name; several for one table")
    add("--data", metavar="SOURCE", help=f"held-out text: {manual.SOURCES}, shards:DIR (its held-out split)")
    add("--suite", metavar="NAME[,NAME...]", help="further figures to measure; see below")
    add("--tasks-data", metavar="DIR", help="folder with <task>.jsonl (default: the Hugging Face Hub)")
    add("--task-limit", type=positive, metavar="N", help="documents of each task, from the first")
    add(
        "--few-shot",
        type=count_or_none,
        metavar="N",
        help="examples in each prompt of a task (default: as the task says)",
    )
    add("--text-data", metavar="DIR", help="folder with c4.jsonl ... (default: the Hugging Face Hub)")
    add("--protocol", default="heldout", help="of the perplexities: heldout or paper-train-split")
    windows(evaluate, "the whole text; 256 for perplexities", "2048; 8192 for perplexities")
    add("--stride", type=positive, metavar="N", help="tokens from window to window (default: windows side by side)")
    add("--out", metavar="DIR", help="write results, and those of every item, for `secateur compare`")
    add(
        "--name",
        dest="names",
        metavar="NAME[,NAME...]",
        action="append",
        default=[],
        help="names in tables and files, one for each model, in order; repeatable (default: the shortest ends of their "
        "paths that differ)",
    )
    computing(evaluate)
    dtype(evaluate, "of weights and products; losses are summed in float64")
    add(
        "--weights",
        choices=("bf16", "int8", "int4"),
        help="measure the model as it would be served with such weights: rounded, weight-only; int8 and int4 are of "
        "the blocks' matrices and need the extra quantisation (default: the stored weights)",
    )


def add_compare(verbs: Any) -> None:
    """``secateur compare``."""
    compare = add_verb(
        verbs,
        "compare",
        "compare two evaluated models item by item",
        "It reads the results that `secateur eval --out` has written and compares windows or documents of text, and "
        "documents of tasks. Nothing is run.",
        manual.COMPARE_EPILOG,
    )
    compare.add_argument("a", metavar="A.json[,A.json...]", help="results of one model, one file for each seed")
    compare.add_argument("b", metavar="B.json[,B.json...]", help="results of the other, seeds in the same order")
    margin = "losses that differ by less are equal, in nats per token (default: 0.02; 0: never equal)"
    compare.add_argument("--margin", type=zero_or_more, default=0.02, metavar="X", help=margin)
