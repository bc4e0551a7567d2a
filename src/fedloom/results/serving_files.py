"""What a user of stock transformers needs beside an adapter or in a merged model: how to ask, and where answers end."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.data.answer_frame import plain_frame
from fedloom.data.records import Turn
from fedloom.data.templates import ChatTemplate
from fedloom.errors import DataError
from fedloom.models.causal import causal_lm, end_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig
from fedloom.results.conversation import Wording

GENERATION, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
"""Named as transformers names them in a model's folder."""


def write_serving_files(folder: Path, model: Any, tokenizer: Any, wording: Wording | None) -> None:
    """Write the chat template that asks, and a generation config with the tokens that end an answer.

    Nothing is written that the base's own folder says already: without a chat template, where it names these tokens.
    """
    stops = stop_ids(model, tokenizer, wording)
    is_chat = wording is not None and isinstance(wording.template, ChatTemplate)
    if is_chat or not set(stops) <= set(end_ids(model)):
        written = generation_config(model, stops).to_json_string()  # save_pretrained would judge the base's own values
        (folder / GENERATION).write_text(written, encoding="utf-8")
    if is_chat and isinstance(tokenizer.chat_template, str):
        (folder / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")


def copy_serving_files(source: Path, folder: Path) -> None:
    """Take over what stands beside an adapter already."""
    for name in (GENERATION, CHAT_TEMPLATE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def copy_agreed_serving_files(sources: Sequence[Path], folder: Path) -> None:
    """Take over what stands beside all of several adapters alike, or beside some where the others have none."""
    for name in (GENERATION, CHAT_TEMPLATE):
        contents = {(source / name).read_bytes() for source in sources if (source / name).is_file()}
        if len(contents) == 1:
            (folder / name).write_bytes(contents.pop())


def generation_config(model: Any, stops: Sequence[int]) -> GenerationConfig:
    """Return the base's own with these tokens to stop at."""
    config = copy.deepcopy(causal_lm(model).generation_config)
    config.eos_token_id = list(stops) if len(stops) > 1 else stops[0]
    return config


def stop_ids(model: Any, tokenizer: Any, wording: Wording | None, beside: Path | None = None) -> list[int]:
    """Return every token that ends an answer, the base's own first; those that files in ``beside`` name too."""
    frame, own = plain_frame(tokenizer, end_ids(model)), list(end_ids(model))
    if wording is not None:
        with suppress(DataError):  # a template that takes no such question says nothing
            frame = wording.frame([Turn("user", "a")], model, tokenizer)
    if beside is not None and (beside / GENERATION).is_file():
        from transformers import GenerationConfig

        named = GenerationConfig.from_pretrained(beside).eos_token_id
        own += named if isinstance(named, list) else [named]
        frame = replace(frame, stop_ids=(*frame.stop_ids, *own))
    return sorted(set(frame.stop_ids), key=lambda token: (token not in own, token))
