"""What the losses behind the last hidden state cost: secateur's beside the plain way.

    python benchmarks/loss.py [--loss entropy|divergence] [--cases 2048x256x4096,2048x512x32768,1024x1024x131072]
                              [--dtypes float32,bfloat16]

The plain way is ``cross_entropy((hidden @ weight.T).float(), targets)``, and its backward pass; of the divergence from
a teacher of the same size, ``kl_div`` of both models' log-softmaxes in float32. Every row is a process
of its own with one thread: forward and backward with gradients for hidden states and head, several times, of which the
fastest counts (CPU-seconds, since other work may keep the cores busy). Memory is the peak that is no mapped file, less
that of a process which makes the same inputs and their gradients' space, and computes nothing: what the loss itself
needs. Prints a Markdown table; ratios are plain over secateur, so above 1 secateur is cheaper.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import run
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from secateur.losses.kl import summed_divergence
from secateur.losses.next_token import Readout, summed_loss

CASES = {
    "entropy": "2048x256x4096,2048x512x32768,1024x1024x131072",
    "divergence": "2048x512x32768,2048x512x131072",
}
WAYS = ("inputs", "plain", "secateur")


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of losses, over logits [tokens, vocabulary]."""
    return cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def plain_divergence(student: Readout, teacher: Readout) -> Tensor:
    """The sum of divergences, over two logits [tokens, vocabulary]."""
    with torch.no_grad():
        log_p = (teacher.hidden @ teacher.weight.T).float().log_softmax(1)
    log_q = (student.hidden @ student.weight.T).float().log_softmax(1)
    return kl_div(log_q, log_p, log_target=True, reduction="sum")


def work(loss: str, way: str, case: str, dtype: str, repeats: int) -> float:
    """CPU-seconds of the fastest forward and backward pass."""
    tokens, size, vocabulary = (int(part) for part in case.split("x"))
    kind = getattr(torch, dtype)
    hidden = torch.randn(tokens, size, dtype=kind, requires_grad=True)
    weight = torch.randn(vocabulary, size, dtype=kind).div_(size**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    student = Readout(hidden, weight)
    teacher = Readout(*(torch.rand_like(t) - 0.5 for t in student[:2])) if loss == "divergence" else student
    calls = {
        ("entropy", "plain"): lambda: plain_loss(hidden, weight, targets),
        ("entropy", "secateur"): lambda: summed_loss(hidden, weight, targets)[0],
        ("divergence", "plain"): lambda: plain_divergence(student, teacher),
        ("divergence", "secateur"): lambda: summed_divergence(student, teacher, targets)[0],
    }
    if way == "inputs":
        hidden.grad, weight.grad = (torch.ones_like(t) for t in (hidden, weight))
        time.sleep(0.1)  # long enough to be seen
        return 0.0
    best = float("inf")
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        start = time.process_time()
        (calls[loss, way]() / tokens).backward()
        best = min(best, time.process_time() - start)
    return best


def row(loss: str, case: str, dtype: str, repeats: int) -> str:
    """A line of the table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seconds, memory = {}, {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "seconds"
            line = [sys.executable, __file__, "--work", loss, way, case, dtype, str(out), "--repeats", str(repeats)]
            taken = run(line, environment)
            if taken.failure:
                raise SystemExit(f"{way} {case} {dtype}: {taken.failure}")
            seconds[way], memory[way] = float(out.read_text()), taken.anonymous
    tokens, size, vocabulary = case.split("x")
    plain, ours = ((memory[way] - memory["inputs"]) / 1e6 for way in ("plain", "secateur"))
    cells = [tokens, size, vocabulary, dtype, f"{seconds['plain']:.3f}", f"{seconds['secateur']:.3f}"]
    cells += [f"{seconds['plain'] / seconds['secateur']:.2f}", f"{plain:,.0f}", f"{ours:,.0f}", f"{plain / ours:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=CASES, default="entropy")
    parser.add_argument("--cases", help="TOKENSxHIDDENxVOCABULARY, ...")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        *what, out = asked.work
        Path(out).write_text(str(work(*what, asked.repeats)))
        return
    print("| tokens | hidden | vocabulary | type | plain s | secateur s | ratio | plain MB | secateur MB | ratio |")
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for case in (asked.cases or CASES[asked.loss]).split(","):
        for dtype in asked.dtypes.split(","):
            print(row(asked.loss, case, dtype, asked.repeats), flush=True)


if __name__ == "__main__":
    main()
