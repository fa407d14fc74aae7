"""train: a model on an exact number of tokens. teach: save a teacher's log-probabilities to train on."""

from __future__ import annotations

from argparse import Namespace

from secateur import distributed
from secateur.cli.verbs.answer import Answer, request_of
from secateur.formatting import byte_size, fixed, plural, scientific
from secateur.progress import clock_time
from secateur.training.request import TrainRequest, read_recipe
from secateur.training.teach_request import TeachRequest

__all__ = ["teach", "train"]


def train(arguments: Namespace) -> Answer:
    """``secateur train OUT``."""
    recipe = read_recipe(arguments.recipe, tuple(arguments.set))
    request = request_of(TrainRequest, arguments, recipe=recipe, track=tuple(arguments.track or ()))
    from secateur.training import job

    trained = job.train(request)
    if not distributed.is_main():
        return {}, "", 0
    result = trained.result
    size = f"{plural(result['tokens'], 'token')} in {plural(result['steps'], 'step')}"
    lines = [f"{trained.path}: {size}, {plural(result['targets'], 'target')}"]
    if trained.heldout_loss is not None:
        lines.append(f"held-out loss  {fixed(trained.curve[0]['loss'])} -> {fixed(trained.heldout_loss)} nats a token")
    teaching = trained.teacher_flops
    teacher = "" if teaching is None else f", {scientific(teaching)} of them the teacher's"
    lines.append(f"FLOPs          {scientific(trained.flops)}{teacher}")
    if trained.speed:
        lines.append(f"speed          {trained.speed:,.0f} tokens/s, MFU {trained.mfu:.1%} ({trained.peak.source})")
    use = trained.use
    sizes = [f"{byte_size(use.memory)} of memory"] if use.memory else []
    sizes += [f"{byte_size(use.device)} on the device"] if use.device else []
    lines.append(f"took           {', '.join([clock_time(use.seconds), *sizes])}")
    return trained.record(), "\n".join(lines), 0


def teach(arguments: Namespace) -> Answer:
    """``secateur teach TEACHER CORPUS OUT``."""
    request = request_of(TeachRequest, arguments)
    from secateur.training import teach as job

    saved = job.teach(request)
    if not distributed.is_main():
        return {}, "", 0
    answer = saved.record()
    speed = f", {saved.speed:,.0f} tokens/s" if saved.speed else ""
    lines = [
        f"{saved.path}: the likeliest {answer['top_k']} ids at {plural(answer['predicted'], 'position')} of "
        f"{plural(answer['tokens'], 'token')}",
        f"size   {byte_size(answer['bytes'])} in {plural(answer['shards'], 'shard')}, "
        f"{answer['bytes_per_token']:.0f} bytes a token",
        f"FLOPs  {scientific(saved.flops)}",
        f"took   {clock_time(saved.seconds)}{speed}",
        f"next   secateur train OUT --teacher {saved} ...",
    ]
    return answer, "\n".join(lines), 0
