"""Models as files and numbers: families, shapes, checkpoints on disk and in memory, plans and the cut.

``families`` holds all knowledge of architectures, ``shapes`` counts and solves, ``plan`` lists what stays, and
``surgery`` cuts any checkpoint to any plan.
"""
