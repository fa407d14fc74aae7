"""Look at a model, at what it could be pruned to, and at which path pays.

Run: python examples/choose.py MODEL
MODEL is a checkpoint directory; for shapes and advice its config.json is enough.
"""

import sys

import secateur

model = sys.argv[1]

inspection = secateur.inspect(model)
print(f"{inspection.shape}: {inspection.shape.total:,} parameters, {inspection.sparsity:.1%} zeros")

for way, target in secateur.shapes(model, ratio=0.4).outputs[0]["targets"].items():
    print(f"{way}: {target['error'] if 'error' in target else target['parameters']['total']}")

advice = secateur.recommend(params="8B", ratio=0.5, tokens="50B")
print(advice["recommendation"]["choice"])
