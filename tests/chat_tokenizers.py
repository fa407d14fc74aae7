"""Tiny tokenizers with chat templates of the main shapes, and conversations to encode with them."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SIZE = 256 + len(SPECIAL)

_TURN = "{{ '<|im_start|>' + message['role'] + '\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

#: name -> template
TEMPLATES = {
    # ChatML as Qwen 2.5 has it
    "chatml": "{% for message in messages %}"
    + _TURN
    + "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    + _PROMPT,
    # the same, with marks around what the assistant generates
    "marked": "{% for message in messages %}"
    + _TURN
    + "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + _PROMPT,
    # Llama 2: writes BOS and EOS itself, and has no header before an answer
    "bos": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
    # Gemma: refuses the role system, and roles that do not alternate
    "strict": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}" + _PROMPT,
    # Qwen 3: the reasoning of earlier turns is left out, so that a prefix is rendered in another way
    "forgetful": "{% for message in messages %}"
    + _TURN
    + "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n</think>\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}" + _PROMPT,
}


def chat_tokenizer(template: str | None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes.

    Args:
        template: a name of :data:`TEMPLATES`, or None for a tokenizer without one.
        bos: whether it begins texts with ``<s>``, as Llama's does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    options: dict[str, Any] = {"bos_token": "<s>"} if bos or template in ("bos", "strict") else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", **options)
    wrapped.chat_template = TEMPLATES[template] if template else None
    return wrapped


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CONVERSATIONS = [
    turns("Name a pear.", "Conference."),
    turns("What prunes a vine?", "A secateur.", "And a hedge?", "Shears, mostly.", system="Be brief."),
    turns("Zählst du?", "Eins, zwei, drei."),
    turns("a", "b", "c", "d", "e", "f"),
]

PAIRS = [
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"prompt": "The pear is ", "completion": "ripe in October."},
    {"prompt": "prune", "completion": " in winter"},
]
MESSAGE_PAIRS = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in CONVERSATIONS]
