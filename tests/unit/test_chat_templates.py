"""Chat templates of many shapes: the right targets, or one line; never the wrong ones in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch.nn.functional import cross_entropy

from chat_tokenizers import TEMPLATES, chat_tokenizer, turns
from helpers import hf, tiny_family
from secateur.data.chat import encode_conversation
from secateur.data.conversations import conversation_text
from secateur.data.documents import Document
from secateur.errors import UserError
from secateur.losses.next_token import model_loss

_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_end|>\n\n' }}"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)
_MISTRAL = (  # the system's text goes into the first turn of the user
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou prune.<|im_end|>\n' }}{% endif %}"
    + TEMPLATES["chatml"]
)
_MARKED_END = (  # the mark goes around the line break behind the answer as well
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '  ' }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}"
)

#: name -> template, and what each of the two answers of :data:`TALK` becomes
RIGHT: dict[str, tuple[str, tuple[str, str]]] = {
    "chatml": (TEMPLATES["chatml"], ("Sharp   shears.<|im_end|>\n", "Ja, größer 🍐.<|im_end|>\n")),
    "llama 3": (_LLAMA3, ("Sharp   shears.</s>", "Ja, größer 🍐.</s>")),
    "mistral": (_MISTRAL, (" Sharp   shears.</s>", " Ja, größer 🍐.</s>")),
    "gemma": (_GEMMA, ("Sharp   shears.<|im_end|>\n", "Ja, größer 🍐.<|im_end|>\n")),
    "default system": (_DEFAULT_SYSTEM, ("Sharp   shears.<|im_end|>\n", "Ja, größer 🍐.<|im_end|>\n")),
    "marks": (_MARKED_END, ("Sharp   shears.  ", "Ja, größer 🍐.  ")),
}
TALK = turns("What?", "Sharp   shears.", "Größer?", "Ja, größer 🍐.")


def tokenizer_of(template: str, *, trims: bool = False) -> Any:
    """A tokenizer with BOS; ``trims``: the places of its tokens leave spaces out, as Llama 3's do."""
    tokenizer = chat_tokenizer(None, bos=True)
    tokenizer.chat_template = template
    if trims:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=True), tokenizer.backend_tokenizer.post_processor]
        )
    return tokenizer


def encode(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
    """Ids, and the text of each run of targets."""
    text = conversation_text({"messages": messages}, "messages", "messages")
    encoded = encode_conversation(tokenizer, Document("row 1", text, format="messages"))
    assert encoded.targets is not None
    runs: list[list[int]] = []
    for number, (token, target) in enumerate(zip(encoded.ids.tolist(), encoded.targets.tolist(), strict=True)):
        if target:
            if not encoded.targets[number - 1]:
                runs.append([])
            runs[-1].append(token)
    return encoded.ids.tolist(), [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_targets_are_the_answers_to_the_letter(name: str, trims: bool) -> None:
    template, answers = RIGHT[name]
    ids, runs = encode(tokenizer_of(template, trims=trims), TALK)
    assert tuple(runs) == answers
    assert ids.count(1) == 1 and ids[0] == 1


WRONG: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "header without being asked": (
        TEMPLATES["chatml"].partition("{% if add_generation_prompt")[0],
        TALK,
        "writes '<|im_start|>assistant' before an answer",
    ),
    "answer changed": (
        TEMPLATES["chatml"].replace("message['content'] +", "message['content'].split('.')[0] +"),
        turns("Why", "So. And so."),
        "leaves out a part of message 1",
    ),
    "answer dropped": (
        TEMPLATES["chatml"].replace(
            "{{ message['content'] +", "{{ (message['content'] if message['role'] == 'user' else 'Yes.') +"
        ),
        turns("Why", "So."),
        "leaves out a part of message 1",
    ),
    "all in the other order": (
        TEMPLATES["chatml"].replace("in messages", "in messages[::-1]"),
        TALK,
        "renders the first 1 of its messages in another way",
    ),
    "end of the whole": (TEMPLATES["chatml"] + "{{ eos_token }}", TALK, "renders the first 1 of its messages"),
    "roles out of order": (_MISTRAL, turns("a", "b")[::-1], "roles must alternate|begins with the assistant"),
    "syntax": ("{% for %}", TALK, "row 1: the chat template refuses it"),
    "the last turn alone": (
        TEMPLATES["chatml"].replace("in messages", "in messages[-2:]"),
        TALK,
        "leaves out message 0",
    ),
    "no answer survives": (_GEMMA.replace("message in messages", "message in []"), TALK, "leaves out message 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_located_is_refused_in_one_line(name: str) -> None:
    template, messages, message = WRONG[name]
    with pytest.raises(UserError, match=message.replace("|im_", r"\|im_").replace("t|>", r"t\|>")) as caught:
        encode(tokenizer_of(template), messages)
    assert "\n" not in str(caught.value)


def test_an_empty_answer_teaches_its_end() -> None:
    _, runs = encode(tokenizer_of(TEMPLATES["chatml"]), turns("a", "", "b", "c"))
    assert runs == ["<|im_end|>\n", "c<|im_end|>\n"]


def test_rows_of_from_and_value_are_messages() -> None:
    rows = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hm?"},
        {"from": "gpt", "value": "Yes.", "weight": 1},
    ]
    content = json.loads(conversation_text({"conversations": rows}, "conversations", "messages"))
    assert content["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": "Yes.", "weight": 1},
    ]
    with pytest.raises(ValueError, match="message 0 of 'conversations' is from 'bing', not 'human', 'user', 'gpt'"):
        conversation_text({"conversations": [{"from": "bing", "value": "a"}]}, "conversations", "messages")


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5"])
def test_a_state_stays_within_a_document(family: str, tmp_path: Any) -> None:
    """Losses, and those of the same documents alone by plain transformers."""
    model = hf(tiny_family(tmp_path, family))
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    parts = [(0, 0, 5), (0, 5, 12), (1, 0, 3), (1, 3, 4), (1, 4, 12)]
    positions = torch.cat([torch.arange(stop - start) for _, start, stop in parts]).view(2, 12)
    losses = model_loss(model, ids, position_ids=positions)[1].detach()
    for window, start, stop in parts:
        alone = model(input_ids=ids[window : window + 1, start:stop]).logits[0, :-1].float()
        expected = cross_entropy(alone, ids[window, start + 1 : stop], reduction="none").detach()
        torch.testing.assert_close(losses[window, start : stop - 1], expected, atol=1e-4, rtol=1e-4)
