"""The published algorithms as they are published: the whole model in memory, plain loops, one short file for each.

Each module has ``prune(model, windows, ratio)``. It changes the Llama it is given, in float32, to the pruned one, and
returns what it keeps under the names of ``plan.safetensors``: ``keep.layers``, ``keep.hidden``, ``keep.ffn.<layer>``,
``keep.kv.<layer>`` (sorted indices) or ``mask.<tensor>`` (bool, True where kept). ``windows`` are token ids [windows,
positions]. A ratio is the share of the layers, of the units of each space, or of the weights that goes.
"""
