"""Figures of the report, drawn with matplotlib.

`collection` lists the figures of a study and saves or inlines them. Each other module draws one kind of figure
(`curves`, `differences`, `forecast`, `ladder`, `model`, `pareto`, `sweep`) or what all of them use (`frame`, `palette`,
`svg`).
"""
