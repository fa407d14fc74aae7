"""Tiny random checkpoints in the files, spellings and quirks of three public families, from a fixed seed.

``helpers.tiny_family`` writes what the installed transformers saves. These are what a user downloads: the configuration
of the release that the family came out with, a tokenizer of another size than the embedding, licences, templates, and
weights beside which older copies lie.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import randomise

NOUNS = ("pear", "hedge", "rope", "ladder", "root", "soil", "frost", "graft", "twine", "trunk")
VERBS = ("holds", "cuts", "bends", "feeds", "covers", "lifts")


def documents(count: int, *, seed: int = 0, sentences: int = 12) -> list[str]:
    """Short texts of few words, so that a tiny model learns something within seconds."""
    draw = random.Random(seed)
    sentence = "The {} {} the {}.".format
    return [
        " ".join(sentence(draw.choice(NOUNS), draw.choice(VERBS), draw.choice(NOUNS)) for _ in range(sentences))
        for _ in range(count)
    ]


def gemma3(out: Path) -> Path:
    """Write a checkpoint as Gemma 3 (text) has it, and return its directory.

    Tied, bfloat16, windows of attention by ``layer_types``, the keys of rotary embeddings at the top level. The
    tokenizer is that of the whole series: ``<image_soft_token>`` is one id more than the embedding has rows.
    """
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = _byte_level(special, 320)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken("<image_soft_token>", special=True)])
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = {
        "_sliding_window_pattern": 3,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_types": layers,
        "max_position_embeddings": 128,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 16,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.55.0.dev0",
        "use_bidirectional_attention": False,
        "use_cache": True,
        "vocab_size": rows,
    }
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write(out, config, torch.bfloat16)
    _write_tokenizer(out, tokenizer, {**roles, "padding_side": "left"})
    _write_texts(
        out,
        {
            "added_tokens.json": {"<image_soft_token>": rows},
            "special_tokens_map.json": roles,
            "generation_config.json": {
                "cache_implementation": "hybrid",
                "do_sample": True,
                "eos_token_id": [1, 5],
                "top_k": 64,
                "top_p": 0.95,
            },
            "processor_config.json": {"image_seq_length": 256, "processor_class": "Gemma3Processor"},
            "preprocessor_config.json": {"image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256},
            "chat_template.jinja": "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
            "{{ m['content'] }}<end_of_turn>\n{% endfor %}",
            "LICENSE": "Gemma Terms of Use\n",
            "README.md": "---\nlicense: gemma\nlibrary_name: transformers\nlanguage: [en]\n---\n# A model card\n",
        },
    )
    return out


def qwen3(out: Path) -> Path:
    """Write a checkpoint as Qwen3 has it, and return its directory.

    Several shards, whose last one repeats the tied embedding as ``lm_head.weight``; heads wider than hidden / heads,
    with a norm of queries and keys; more rows than the tokenizer has ids; ``vocab.json`` and ``merges.txt`` beside
    ``tokenizer.json``, and the chat template in ``tokenizer_config.json``.
    """
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = _byte_level((), 310)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    end, _, turn = (tokenizer.token_to_id(token) for token in special)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": turn,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "max_window_layers": 4,
        "model_type": "qwen3",
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 384,
    }

    def repeat_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _write(out, config, torch.bfloat16, edit=repeat_head, shards=3)
    _write_tokenizer(
        out,
        tokenizer,
        {
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "errors": "replace",
            "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        },
    )
    _write_texts(
        out,
        {
            "vocab.json": vocabulary,
            "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n",
            "generation_config.json": {
                "bos_token_id": end,
                "do_sample": True,
                "eos_token_id": [turn, end],
                "pad_token_id": end,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
            },
            ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
            "LICENSE": "Apache License, Version 2.0\n",
            "README.md": "---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n# Card\n",
        },
    )
    return out


def llama2(out: Path) -> Path:
    """Write a checkpoint as Llama 2 and its fine-tunes have it, and return its directory.

    Untied, float16, one file of safetensors beside an older pickle, buffers of the rotary embedding among the weights,
    a ``<pad>`` beyond the rows of the embedding, and a generation_config.json that transformers does not save again.
    """
    tokenizer = _sentence_piece(("<unk>", "<s>", "</s>"), 330)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])
    config = {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 6,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": rows,
    }

    def add_buffers(tensors: dict[str, Tensor]) -> None:
        frequencies = 1.0 / 50000.0 ** (torch.arange(0, 8, 2) / 8)
        for layer in range(4):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.clone()

    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write(out, config, torch.float16, edit=add_buffers)
    _write_tokenizer(out, tokenizer, {**roles, "legacy": False, "padding_side": "right"})
    _write_texts(
        out,
        {
            "added_tokens.json": {"<pad>": rows},
            "special_tokens_map.json": roles,
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": 1,
                "do_sample": False,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "temperature": 0.9,
                "top_p": 0.6,
                "transformers_version": "4.31.0.dev0",
            },
            "LICENSE.txt": "LLAMA 2 COMMUNITY LICENSE AGREEMENT\n",
            "USE_POLICY.md": "# Llama 2 Acceptable Use Policy\n",
            "README.md": "---\nlicense: llama2\nlanguage:\n- en\nextra_gated_heading: Access\n---\n# A card\n",
        },
    )
    (out / "pytorch_model.bin").write_bytes(b"PK\x03\x04 an older copy")
    return out


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {"gemma3": gemma3, "qwen3": qwen3, "llama2": llama2}


def _write(
    out: Path,
    config: dict[str, Any],
    dtype: torch.dtype,
    *,
    edit: Callable[[dict[str, Tensor]], None] | None = None,
    shards: int = 1,
) -> None:
    """Write config.json as it is, and random weights of that configuration.

    Args:
        edit: changes the tensors before they are written.
        shards: files that the weights are divided among.
    """
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out, local_files_only=True))
    randomise(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.1)  # a tied head then begins near the loss of a guess
    tensors = {name: parameter.detach().to(dtype).contiguous() for name, parameter in model.named_parameters()}
    if edit:
        edit(tensors)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, out / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_tokenizer(out: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30, **config}
    _write_texts(out, {"tokenizer_config.json": content})


def _write_texts(out: Path, texts: dict[str, Any]) -> None:
    """Write strings as they are and everything else as JSON."""
    for name, content in texts.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
        (out / name).write_text(text, encoding="utf-8")


def _byte_level(special: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer whose special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, special, vocabulary, pre_tokenizers.ByteLevel.alphabet())


def _sentence_piece(special: Iterable[str], vocabulary: int) -> Tokenizer:
    """A BPE tokenizer of words with ``▁`` before them, and of bytes for characters that it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _train(tokenizer, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], vocabulary, [])


def _train(tokenizer: Tokenizer, special: Iterable[str], vocabulary: int, alphabet: Iterable[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(40), trainer=trainer)
    return tokenizer
