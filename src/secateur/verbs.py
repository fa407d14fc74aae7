"""What each verb does: arguments in; a JSON-able answer, its text for people, and the exit code out."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from secateur.checkpoint import Checkpoint
from secateur.data.sources import open_source
from secateur.data.tokenizer import check_vocabulary, encode_stream, load_tokenizer
from secateur.errors import UserError
from secateur.evaluate.loss import Protocol
from secateur.evaluate.loss import evaluate as measure
from secateur.files import atomic_directory
from secateur.methods import get_method
from secateur.progress import say, task
from secateur.prune import Calibration, make_plan, target_shape, write_pruned
from secateur.report.build import build_report
from secateur.report.verdict import judge, text_table
from secateur.report.words import count, scientific
from secateur.runtime import pick_device, quiet
from secateur.study.collect import collect
from secateur.study.execute import sparsity
from secateur.study.run import default_jobs, run_stages
from secateur.study.spec import Study, load_study
from secateur.study.stages import Stage, stages_of, unique
from secateur.study.store import Store

Answer = tuple[dict[str, Any], str, int]

quiet()


def inspect(arguments: Namespace) -> Answer:
    """``secateur inspect DIR``."""
    checkpoint = Checkpoint(arguments.model)
    shape = checkpoint.shape
    answer = {
        "model": str(arguments.model),
        "family": checkpoint.family.name,
        "shape": shape.as_dict(),
        "parameters": {"total": shape.total, "non_embedding": shape.non_embedding},
        "sparsity": sparsity(checkpoint),
        "flops_per_token": {"forward": shape.forward_flops(arguments.context), "context": arguments.context},
        "kv_cache_bytes_per_token": shape.kv_cache_bytes,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "digest": checkpoint.digest,
        "provenance": checkpoint.provenance,
    }
    provenance = checkpoint.provenance
    origin = "not written by secateur"
    if provenance:
        origin = ", ".join(f"{k} {v}" for k, v in provenance.items() if isinstance(v, str | int | float))
    lines = [
        f"{arguments.model}  ({checkpoint.family.name}, {answer['dtype']})",
        f"shape        {shape}, head size {shape.head_dim}, vocabulary {shape.vocabulary}"
        + (", tied" if shape.tied else ""),
        f"parameters   {shape.total:,} in total, {shape.non_embedding:,} outside the embeddings",
        f"sparsity     {100 * answer['sparsity']:.2f}% of the block linears' weights are zero",
        f"FLOPs        {shape.forward_flops(arguments.context):.4g} a token forwards, three times that in training "
        f"(windows of {arguments.context}: 2 x weights + attention)",
        f"KV cache     {shape.kv_cache_bytes:,} bytes a token at 16 bits",
        f"digest       {checkpoint.digest}",
        f"provenance   {origin}",
    ]
    return answer, "\n".join(lines), 0


def prune(arguments: Namespace) -> Answer:
    """``secateur prune MODEL OUT``."""
    found = get_method(arguments.method)
    checkpoint = Checkpoint(arguments.model)
    target_shape(checkpoint.shape, found.granularity, arguments.ratio)  # impossible ratios fail before any work
    device = pick_device(arguments.device)
    with atomic_directory(Path(arguments.out)) as work:
        seqlen = _window(checkpoint, arguments.seqlen)
        ids = _ids(checkpoint, arguments.calibration, arguments.field, arguments.windows * seqlen)
        windows = ids[: ids.size // seqlen * seqlen].reshape(-1, seqlen)
        if not len(windows):
            raise UserError(
                f"{arguments.calibration}: {ids.size} tokens are less than one calibration window of {seqlen}; "
                "give more text or a smaller --seqlen"
            )
        if len(windows) < arguments.windows:
            say(
                f"the calibration text gives {len(windows)} windows of {seqlen} tokens ({arguments.windows} were asked)"
            )
        calibration = Calibration(torch.from_numpy(windows), arguments.calibration)
        plan = make_plan(
            checkpoint, arguments.method, arguments.ratio, calibration, batch=arguments.batch, device=device
        )
        content = write_pruned(checkpoint, plan, work, base=Path(arguments.model).name)
    ratio = content["ratio"]
    answer = {
        "out": str(arguments.out),
        "method": arguments.method,
        "ratio": ratio,
        "shape": content["after"],
        "calibration": content["calibration"],
        "plan": content["fingerprint"],
        "summary": content["summary"],
    }
    lines = [
        f"{arguments.out}: {arguments.method}, {content['summary']['detail']}",
        f"asked {100 * ratio['asked']:.1f}%; removed {100 * ratio['non_embedding']:.1f}% of the parameters outside the "
        f"embeddings, {100 * ratio['total']:.1f}% of all",
        f"calibration  {content['calibration']['windows']} windows of {content['calibration']['seqlen']} tokens, "
        f"hash {content['calibration']['hash'][:16]}",
        f"next         secateur eval {arguments.out} --data text:FILE",
    ]
    return answer, "\n".join(lines), 0


def evaluate(arguments: Namespace) -> Answer:
    """``secateur eval MODEL``."""
    checkpoint = Checkpoint(arguments.model)
    device = pick_device(arguments.device)
    seqlen = _window(checkpoint, arguments.seqlen)
    limit = arguments.windows * seqlen if arguments.windows else None
    protocol = Protocol.of_stream(_ids(checkpoint, arguments.data, arguments.field, limit), seqlen, arguments.data)
    model: Any = checkpoint.load()
    model.to(device)
    with task("evaluate", protocol.tokens) as progress:
        result = measure(model, protocol, batch=arguments.batch, advance=progress.advance)
    answer = {"model": str(arguments.model), **{k: result[k] for k in ("loss", "perplexity", "tokens")}}
    answer["protocol"] = protocol.record()
    lines = [
        f"{arguments.model} on {arguments.data}",
        f"loss         {result['loss']:.4f} nats a token",
        f"perplexity   {result['perplexity']:.4f}",
        f"tokens       {result['tokens']:,} predicted, in {answer['protocol']['windows']} windows of {seqlen}",
        f"protocol     {answer['protocol']['fingerprint'][:16]}",
    ]
    return answer, "\n".join(lines), 0


def _window(checkpoint: Checkpoint, asked: int) -> int:
    """The window's length: what was asked, unless the model's positions end before. What is used is said aloud."""
    most = getattr(checkpoint.config, "max_position_embeddings", None) or asked
    if asked < 2:
        raise UserError("--seqlen: a window needs two tokens or more, one to see and one to predict")
    if most < asked:
        say(f"windows of {most} tokens: the model has no more positions (--seqlen is {asked})")
    return min(asked, most)


def _ids(checkpoint: Checkpoint, source: str, field: str, limit: int | None) -> np.ndarray:
    opened = open_source(source, field=field)
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(checkpoint.directory)
    check_vocabulary(tokenizer, checkpoint.shape.vocabulary, str(checkpoint.directory))
    return encode_stream(opened.documents(), tokenizer, limit)


def demo(arguments: Namespace) -> Answer:
    """``secateur demo``."""
    package = Path(__file__).parent
    places = (package / "studies" / "demo.yaml", package.parents[1] / "studies" / "demo.yaml")
    arguments.file = str(next(path for path in places if path.is_file()))
    return study_run(arguments)


def _open(arguments: Namespace) -> tuple[Study, list[Stage], Store]:
    study = load_study(Path(arguments.file))
    try:
        source = open_source(study.corpus.source, field=study.corpus.field, split=study.corpus.split)
        stages = stages_of(study, source.digest())
    except UserError as error:
        raise UserError(f"{arguments.file}: {error}") from None
    out = getattr(arguments, "out", None) or f"runs/{study.name}"
    return study, stages, Store(Path(out))


def study_plan(arguments: Namespace) -> Answer:
    """``secateur study plan FILE``."""
    study, stages, _ = _open(arguments)
    stages = unique(stages)
    rows = [
        {"kind": s.kind, "name": s.name, "tokens": s.tokens, "flops": s.flops, "fingerprint": s.fingerprint}
        for s in stages
    ]
    trained = sum(s.tokens for s in stages if s.kind == "train")
    flops = sum(s.flops for s in stages)
    answer = {"study": study.name, "stages": rows, "training_tokens": trained, "flops": flops}
    width = max(len(s.name) for s in stages)
    lines = [f"{study.name}: {len(stages)} stages", ""]
    lines.append(f"{'kind':8}  {'stage':{width}}  {'tokens':>10}  {'FLOPs':>10}")
    for s in stages:
        tokens, cost = (count(s.tokens), f"{s.flops:.2e}") if s.tokens else ("-", "-")
        lines.append(f"{s.kind:8}  {s.name:{width}}  {tokens:>10}  {cost:>10}")
    lines += ["", f"{trained:,} training tokens, {scientific(flops)} FLOPs in all. Nothing has been run."]
    return answer, "\n".join(lines), 0


def study_run(arguments: Namespace) -> Answer:
    """``secateur study run FILE``."""
    study, stages, store = _open(arguments)
    runs = unique(stages)
    cells = sum(s.kind == "train" for s in runs)
    jobs = arguments.jobs or default_jobs()
    say(f"{study.name}: {len(runs)} stages ({cells} training runs), {jobs} at a time, in {store.out}")
    outcome = run_stages(stages, store.out, jobs=jobs)
    say(f"{outcome.already} stages found done, {outcome.ran - len(outcome.failed)} run, {len(outcome.failed)} failed")
    if "corpus" in outcome.failed:  # nothing can be reported without one, and it is the study file that is at fault
        raise UserError(f"{arguments.file}: corpus: {outcome.failed['corpus']}")
    answer, text, _ = _report(arguments, study, stages, store)
    answer |= {
        "ran": outcome.ran,
        "already_done": outcome.already,
        "failed": outcome.failed,
        "skipped": outcome.skipped,
    }
    return answer, text, 1 if outcome.failed else 0


def study_status(arguments: Namespace) -> Answer:
    """``secateur study status FILE``."""
    study, stages, store = _open(arguments)
    rows = []
    for stage in unique(stages):
        error = store.runtime(stage).get("error", "")
        under_way = any(store.partial(stage).glob("checkpoints/step-*"))
        state = "done" if store.done(stage) else "failed" if error else "interrupted" if under_way else "to do"
        rows.append({"kind": stage.kind, "name": stage.name, "state": state, "error": error})
    done = sum(row["state"] == "done" for row in rows)
    answer = {"study": study.name, "out": str(store.out), "done": done, "stages": rows}
    lines = [f"{study.name} in {store.out}: {done} of {len(rows)} stages done"]
    lines += [f"{row['state']:11}  {row['kind']:8}  {row['name']}  {row['error']}".rstrip() for row in rows]
    return answer, "\n".join(lines), 0


def study_report(arguments: Namespace) -> Answer:
    """``secateur study report FILE``."""
    return _report(arguments, *_open(arguments))


def _report(arguments: Namespace, study: Study, stages: list[Stage], store: Store) -> Answer:
    results = collect(study, stages, store, Path(arguments.file).read_text(encoding="utf-8"))
    page = build_report(results, store.out)
    judgement = judge(results)
    verdicts = [
        {
            "setting": v.setting,
            "method": v.group.method,
            "ratio": v.group.ratio,
            "winner": v.winner,
            "difference": v.difference,
            "interval": None if v.low is None else [v.low, v.high],
            "flop_ratio": v.flop_ratio,
            "reason": v.reason,
            "sentence": sentence,
        }
        for v, sentence in zip(judgement.verdicts, judgement.sentences, strict=True)
    ]
    answer = {"study": study.name, "report": str(page), "answer": judgement.answer, "verdicts": verdicts}
    return answer, f"{text_table(results)}\n\nreport: {page.resolve()}", 0
