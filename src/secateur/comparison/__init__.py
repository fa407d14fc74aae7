"""Compare models and say how sure the difference is.

:mod:`secateur.comparison.decision` has the one rule, :func:`decide`. `items` applies it to two evaluated models, figure
by figure. The other modules compare the pruned and the from-scratch models of a study: `records` and `index` hold its
results; `twins` pairs runs; `findings`, `ablation`, `objectives` and `quality` answer further questions; `ledger` and
`serving_cost` count costs. All return values; :mod:`secateur.report` puts them into words.
"""

from secateur.comparison.decision import Decision, adjust, decide

__all__ = ["Decision", "adjust", "decide"]
