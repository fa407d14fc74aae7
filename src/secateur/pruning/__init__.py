"""Pruning, from a request to a written checkpoint.

``request`` says what to prune and ``job`` runs it. ``scoring`` asks the method and selects, ``pipeline`` makes the plan
and writes the result; ``learned`` does the same for methods that train.
"""
