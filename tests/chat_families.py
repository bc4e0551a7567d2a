"""Tokenizers of bytes with the special tokens and chat templates of families whose turns end in other ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedloom.data import TokenSet, byte_tokenizer
from tests.tiny_models import seeded_model

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' -}}{%- else -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class ChatFamily:
    """A chat template, its special tokens, those added without being special, and its end and beginning of text."""

    template: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    end_of_text: str = "\x00"
    beginning: str | None = None

    def tokenizer(self) -> Any:
        """Return a tokenizer of bytes with these tokens and this template."""
        made = byte_tokenizer()
        made.add_tokens(
            [AddedToken(text, special=True, normalized=False) for text in self.special], special_tokens=True
        )
        made.add_tokens([AddedToken(text, special=False, normalized=False) for text in self.added])
        made.eos_token, made.chat_template = self.end_of_text, self.template
        if self.beginning is not None:
            made.bos_token = self.beginning
        return made


FAMILIES = {
    "gemma": ChatFamily(
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role)"
        " + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        beginning="<bos>",
    ),
    "phi3": ChatFamily(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "chatml on a base": ChatFamily(CHATML, ("<|im_start|>", "<|im_end|>")),
    "chatml whose marks are not special": ChatFamily(CHATML, (), ("<|im_start|>", "<|im_end|>")),
    "chatml in letters": ChatFamily(CHATML),
    "chatml that ends the text": ChatFamily(CHATML, ("<|im_start|>", "<|im_end|>"), end_of_text="<|im_end|>"),
    "llama 3": ChatFamily(
        "{% for m in messages %}{{ '<|head|>' + m.role + '<|body|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|body|>\n\n' }}{% endif %}",
        ("<|head|>", "<|body|>", "<|eot_id|>"),
    ),
    "llama 2": ChatFamily(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("</s>",),
        end_of_text="</s>",
    ),
    "qwen3": ChatFamily(QWEN3, ("<|im_start|>", "<|im_end|>"), ("<think>", "</think>"), end_of_text="<|im_end|>"),
}


class Reciting(LlamaForCausalLM):
    """A model that goes on with the one of its rows that begins as the text does, and then with ``B`` for ever."""

    rows: tuple[list[int], ...] = ()

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> CausalLMOutputWithPast:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            text = ids[mask.bool()].tolist()
            following = [known[len(text)] for known in self.rows if known[: len(text)] == text and known != text]
            logits[row, -1, (following or [ord("B")])[0]] = 1.0
        return CausalLMOutputWithPast(logits=logits)


def reciting_model(rows: TokenSet, tokenizer: Any) -> Any:
    """Return a model that knows these rows by heart, without any training."""
    config = seeded_model("llama", vocab_size=len(tokenizer)).config
    model = Reciting(config).eval().requires_grad_(False)
    model.rows = tuple(rows.row(index)[0].tolist() for index in range(len(rows)))
    return model


def memorising_model(rows: TokenSet, tokenizer: Any, steps: int = 120) -> Any:
    """Return a tiny model that has learned what is supervised in these few rows by heart."""
    model = seeded_model("llama", vocab_size=len(tokenizer)).float().train()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
    batch = [rows.row(index) for index in range(len(rows))]
    width = max(len(ids) for ids, _ in batch)
    ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
    labels_BT = torch.full((len(batch), width), -100)
    for row, (ids, learned) in enumerate(batch):
        ids_BT[row, : len(ids)] = torch.tensor(ids.tolist())
        labels_BT[row, : len(ids)][learned.tolist()] = torch.tensor(ids[learned].tolist())
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        optimiser.step()
        if loss.item() < 0.02:
            break
    return model.eval().requires_grad_(False)
