"""data: from text, or from ids, to a folder of token shards that training reads."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from secateur.cli.verbs.answer import Answer, request_of
from secateur.data.request import CorpusRequest
from secateur.formatting import byte_size, count, percent, plural
from secateur.progress import clock_time

__all__ = ["data"]


def data(arguments: Namespace) -> Answer:
    """``secateur data SOURCE OUT``."""
    request = request_of(CorpusRequest, arguments)
    from secateur.data import job

    answer = job.build(request).record
    return answer, "\n".join(_lines(answer)), 0


def _lines(answer: dict[str, Any]) -> list[str]:
    documents, total = sum(answer["documents"].values()), sum(answer["tokens"].values())
    lines = [
        f"{answer['out']}: {plural(documents, 'document')}, {plural(answer['duplicates'], 'repeated one')} left out, "
        f"{plural(total, 'token')}"
    ]
    for split, tokens in answer["tokens"].items():
        rate = answer["bytes_per_token"][split]
        text = f", {rate:.3f} bytes of text a token" if rate else ""
        if "targets" in answer:
            share = answer["targets"][split] / tokens
            text += f", of which {plural(answer['targets'][split], 'target')} ({percent(share)})"
        digest = answer["sha256"][split][:16]
        documents = plural(answer["documents"][split], "document")
        lines.append(f"{split:12} {documents}, {plural(tokens, 'token')}{text}, hash {digest}")
    if answer["domains"]:
        sums = {name: sum(part["tokens"] for part in splits.values()) for name, splits in answer["domains"].items()}
        largest = sorted(sums, key=lambda name: -sums[name])
        shares = [f"{name} {percent(sums[name] / total)} ({count(sums[name])})" for name in largest[:12]]
        more = f" and {len(largest) - 12} more" if len(largest) > 12 else ""
        lines.append(f"domains      {', '.join(shares)}{more}, by tokens")
    return [
        *lines,
        f"vocabulary   {answer['vocabulary']:,}, ids as {answer['dtype']}",
        f"identity     {answer['fingerprint']}",
        f"used         {clock_time(answer['seconds'])}, {byte_size(answer['disk'])} of disk",
    ]
