"""Suites: selections of held-out losses, perplexities, tasks and costs."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from secateur.errors import UserError, did_you_mean
from secateur.evaluation.lm_eval.groups import TaskList, expand
from secateur.evaluation.lm_eval.tasks import METRICS
from secateur.evaluation.protocols import PROTOCOLS, Text

__all__ = ["SUITES", "Suite"]

#: the eight zero-shot tasks of arXiv:2606.14150, in the order of the paper
ZERO_SHOT = ("winogrande", "arc_challenge", "arc_easy", "hellaswag", "piqa", "sciq", "boolq", "openbookqa")
assert set(ZERO_SHOT) == set(METRICS)

SUITES = ("paper", "perplexity", "zero-shot", "cost")


@dataclass(frozen=True)
class Suite:
    """A selection of measurements."""

    loss: bool  #: whether to measure the held-out loss, on text that is named separately
    texts: tuple[Text, ...] = ()  #: for perplexities
    tasks: tuple[str, ...] = ()  #: names in lm-eval: single tasks, groups, tags, patterns
    cost: bool = False  #: whether to measure size, speed and memory

    def task_list(self, where: str = "") -> TaskList:
        """Look up the single tasks and groups that the names stand for.

        Raises:
            UserError: as :func:`secateur.evaluation.lm_eval.groups.expand`.
        """
        return expand(self.tasks, where=_field("suite", where))

    @classmethod
    def parse(cls, text: str, protocol: str = "heldout", *, where: str = "") -> Suite:
        """Parse a list of suites and lm-eval tasks, joined by commas; ``paper`` is loss, perplexity and zero-shot.

        Args:
            text: e.g. ``paper``, ``perplexity,cost`` or ``arc_easy,mmlu``.
            where: put before the fields ``suite`` and ``protocol`` in errors, e.g. ``evaluation.``; empty for fields in
                backticks.

        Raises:
            UserError: for an empty or repeated name, or an unknown protocol.
        """
        field, names = _field("suite", where), [name.strip() for name in text.split(",")]
        if "" in names or len(set(names)) < len(names):
            raise UserError(f"{field} {text}: has an empty or repeated name; name {', '.join(SUITES)} or lm-eval tasks")
        for name in names:
            if name not in SUITES and difflib.get_close_matches(name, SUITES, cutoff=0.8):
                raise UserError(f"{field} {name}: is not known{did_you_mean(name, SUITES)}")
        if protocol not in PROTOCOLS:
            raise UserError(f"{_field('protocol', where)} {protocol}: is not known{did_you_mean(protocol, PROTOCOLS)}")
        paper = "paper" in names
        tasks = [*(ZERO_SHOT if paper or "zero-shot" in names else ()), *(n for n in names if n not in SUITES)]
        texts = PROTOCOLS[protocol] if paper or "perplexity" in names else ()
        return cls(paper, texts, tuple(dict.fromkeys(tasks)), "cost" in names)


def _field(name: str, where: str) -> str:
    return f"{where}{name}" if where else f"`{name}`"
