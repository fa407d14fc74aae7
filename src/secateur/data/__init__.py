"""From text to exact slices of tokens: sources, documents, ids, shards, and the tokenizer of a study."""
