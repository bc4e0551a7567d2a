"""What tools that serve an adapter make of its files: the rules of each, and what it has to be told.

peft reads everything that is written here. vLLM reads one rank and one alpha for the whole file and no pattern, and
takes its largest rank from a short list. llama.cpp keeps one alpha and divides it by each tensor's own rank, so that a
module of half the rank would count twice. A file of one rank means the same to all of them.

Source: ``vllm/lora/peft_helper.py`` and ``vllm/config/lora.py`` of vLLM (0.10 to 0.26); ``convert_lora_to_gguf.py`` and
``llama-adapter.h`` (``get_scale``) of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from fedloom.errors import AdapterError
from fedloom.lora.algebra import pad
from fedloom.lora.base_reference import BaseReference
from fedloom.lora.pair import Adapter

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` can be."""


class Tool(StrEnum):
    """A tool that serves adapters."""

    PEFT = "peft"
    VLLM = "vllm"
    GGUF = "gguf"


def tool_named(name: str | None) -> Tool | None:
    """Return the tool of that name; None for none.

    Raises:
        AdapterError: there is no such tool.
    """
    if name is None or name in list(Tool):
        return None if name is None else Tool(name)
    raise AdapterError(f"--for: expected one of {', '.join(Tool)}, got {name!r}; choose one of these")


def fitted(adapter: Adapter, tool: Tool | None, *, conv1d: bool) -> Adapter:
    """Return the adapter as the tool takes it: of one rank where it knows one, padded with zeros.

    ``conv1d``: whether the base holds its weights transposed, as GPT-2 does.

    Raises:
        AdapterError: the tool cannot take it.
    """
    if tool is None or tool is Tool.PEFT:
        return adapter
    rank = max(adapter.ranks.values())
    if tool is Tool.VLLM and rank > VLLM_RANKS[-1]:
        raise AdapterError(
            f"--for vllm: expected a rank of at most {VLLM_RANKS[-1]}, the largest that it serves, got {rank}; "
            f"choose --rank {VLLM_RANKS[-1]} or less, or a merged model (--merge without --for)"
        )
    if tool is Tool.GGUF and conv1d:
        raise AdapterError(
            "--for gguf: expected a base of linear layers, got one of transposed weights (GPT-2), whose adapters "
            "llama.cpp's converter turns around; export a merged model (--merge without --for) and convert that"
        )
    return pad(Adapter({name: pair for name, pair in adapter.items() if pair.rank > 0}), rank)


def refuse_unread(tool: Tool | None, unread: str | None) -> None:
    """Reject an adapter of which stock peft loads a part only, where it is for peft.

    Raises:
        AdapterError: it is.
    """
    if tool is Tool.PEFT and unread is not None:
        raise AdapterError(
            f"--for peft: expected modules that it loads, got others: {unread}; drop --for to write them all the same"
        )


def needs_of(tool: Tool | None, adapter: Adapter, folder: Path, base: BaseReference | None) -> Sequence[str]:
    """Return what the tool has to be told to serve the adapter from ``folder``, in lines."""
    rank = max(adapter.ranks.values())
    place = f"path/to/{'its-base' if base is None else base.name.rpartition('/')[2]}"
    match tool:
        case Tool.VLLM:
            largest = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
            served = base.name if base is not None and base.is_public else place
            adapter_name = f"--lora-modules {folder.name}={folder.name}"
            return (f"vLLM: vllm serve {served} --enable-lora --max-lora-rank {largest} {adapter_name}",)
        case Tool.GGUF:
            return (
                f"llama.cpp: python convert_lora_to_gguf.py --base {place} {folder.name} --outfile {folder.name}.gguf",
                f"llama.cpp: llama-server -m {place}.gguf --lora {folder.name}.gguf",
            )
        case _:
            return ()
