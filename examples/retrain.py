"""Prune a checkpoint, retrain it, train its twin from scratch on as many tokens, and compare the two.

Run: python examples/retrain.py MODEL TEXT OUT
MODEL is a checkpoint directory with a tokenizer; TEXT a file or folder of text; OUT a new directory.
"""

import sys
from pathlib import Path

import secateur

model, text, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])

corpus = secateur.build_corpus(f"text:{text}", out / "corpus", tokenizer=model, holdout=0.2)
pruned = secateur.prune(model, out / "pruned", method="minitron-depth", ratio=0.4, calibration=f"text:{text}")

recipe = secateur.Recipe(sequence=64, tokens_per_step=512, peak_rate=1e-3)
budget = corpus.tokens["train"] // 2
common = {"tokens": budget, "data": corpus, "recipe": recipe, "points": 2}
retrained = secateur.train(out / "retrained", init=pruned, **common)
scratch = secateur.train(out / "scratch", init="scratch", like=pruned, **common)

results = secateur.evaluate([retrained, scratch], data=corpus, seqlen=64)
comparisons = secateur.compare(*results)
for comparison in comparisons:
    print(f"{comparison.name}: retrained {comparison.a:.3f}, from scratch {comparison.b:.3f}")
print(f"lower held-out loss at {budget:,} training tokens: {comparisons.verdict}")
