"""Sentences about verdicts with weights as they would be served. ASCII, except for the minus sign."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.comparison.naming import BUDGETS, group_name
from secateur.comparison.served import STORED, ServedVerdict
from secateur.formatting import plural

__all__ = ["SERVED_TITLE", "served_sentences"]

SERVED_TITLE = "As served: the verdicts with the weights of both models in other forms"


def served_sentences(rows: Sequence[ServedVerdict]) -> list[str]:
    """For each form of weights, how many verdicts are those with stored weights, and which are not."""
    among = [row.verdict.group for row in rows]
    stored = {(row.verdict.setting, row.verdict.group): row.verdict for row in rows if row.weights == STORED}
    sentences = []
    for form in dict.fromkeys(row.weights for row in rows if row.weights != STORED):
        verdicts = [row.verdict for row in rows if row.weights == form]
        pairs = [(stored[verdict.setting, verdict.group], verdict) for verdict in verdicts]
        changes = [
            f"{group_name(after.group, among, target=True)} at equal {BUDGETS[after.setting]}, {before.winner} to "
            f"{after.winner}"
            for before, after in pairs
            if before.winner != after.winner
        ]
        same = len(pairs) - len(changes)
        text = f"With {form} weights {same} of {plural(len(pairs), 'verdict')} {'is' if same == 1 else 'are'} the same"
        sentences.append("; ".join([text, *([f"changed: {'; '.join(changes)}"] if changes else [])]) + ".")
    return sentences
