"""A language model with its head, for configurations that transformers builds within an image-text model alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["TextModel"]


class TextModel(PreTrainedModel, GenerationMixin):
    """The decoder of a configuration, e.g. of type ``qwen2_5_vl_text``, and a head without bias.

    Without images its positions are those of a plain language model.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits [windows, positions, vocabulary] of token ids [windows, positions].

        Args:
            logits_to_keep: number of last positions to compute logits for; 0 for all.
            kwargs: arguments of the decoder.
        """
        outputs = self.model(input_ids=input_ids, **kwargs)
        logits: Any = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
