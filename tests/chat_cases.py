"""The cases that TRL's SFTTrainer and secateur are compared in: rows, tokenizer, model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from chat_tokenizers import CONVERSATIONS, MESSAGE_PAIRS, PAIRS, SIZE, chat_tokenizer
from helpers import tiny_llama

GOLDEN = Path(__file__).parent / "golden" / "chat.json"  #: what ``tests/handoff/sft_trainer.py`` writes


class Case(NamedTuple):
    """Rows of one format, and the tokenizer that encodes them."""

    format: str
    rows: list[dict[str, Any]]
    template: str
    bos: bool = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return chat_tokenizer(self.template, bos=self.bos)


CASES = {
    "messages": Case("messages", [{"messages": messages} for messages in CONVERSATIONS], "marked"),
    "pairs of messages": Case("prompt-completion", MESSAGE_PAIRS, "chatml"),
    "pairs of strings": Case("prompt-completion", PAIRS, "chatml", bos=True),
    "template with BOS": Case("prompt-completion", [MESSAGE_PAIRS[0], MESSAGE_PAIRS[3]], "bos", bos=True),
}


def chat_model(folder: Path) -> Path:
    """A tiny model of the tokenizers' vocabulary."""
    return tiny_llama(folder, vocab_size=SIZE, max_position_embeddings=1024, num_hidden_layers=2)
