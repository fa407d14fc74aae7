"""Prune a checkpoint on disk, and a model in memory.

Run: python examples/prune.py MODEL TEXT OUT
MODEL is a checkpoint directory or a Hub name; TEXT a file of calibration text; OUT a new directory.
"""

import sys

from transformers import AutoModelForCausalLM

import secateur

model, text, out = sys.argv[1:]

# On disk: block by block, so that the model need not fit in memory.
pruned = secateur.prune(model, out, method="wanda", ratio=0.5, calibration=f"text:{text}", windows=16)
print(f"{pruned.path}: {pruned.removed['block_weights']:.1%} of the block weights are zero")

# In memory: the model is left unchanged, and a smaller one is returned.
live = AutoModelForCausalLM.from_pretrained(model)
with open(text) as file:
    small = secateur.prune(
        live, method="minitron-width", ratio=0.3, calibration=[file.read()], tokenizer=model, windows=16
    )
print(f"{live.num_parameters():,} parameters before, {small.num_parameters():,} after: {small.plan.after}")
