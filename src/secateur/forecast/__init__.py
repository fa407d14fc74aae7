"""Predict training runs that were not made, from finished ones.

`curve` and `fit` fit the training curves of a pruned model and its from-scratch twin; `crossover` finds where one
catches up with the other; `ratio_law` fits one law across pruning ratios. `ladder` and `ratios` apply them to a study;
`advice` answers a question from `evidence`, published or of a study.
"""
