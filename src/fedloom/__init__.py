"""fedloom: federated and split fine-tuning of large language models with low-rank adapters.

The names below are the library's own front door; whatever they return comes from the packages behind it, which may be
used as well. A name is loaded when it is first asked for, so ``import fedloom`` is quick and imports no torch.

An adapter maps module names to low-rank pairs, whose product is what is added to the module's weight:

>>> import torch
>>> import fedloom
>>> pair = fedloom.Pair(b_OR=torch.ones(3, 1), a_RI=torch.ones(1, 2))
>>> adapter = fedloom.Adapter({"model.layers.0.self_attn.q_proj": pair})
>>> adapter
Adapter(1 modules, ranks [1], 5 parameters)
>>> stacked = fedloom.aggregate([adapter, adapter.scaled(3.0)], method="flora")
>>> stacked.ranks
{'model.layers.0.self_attn.q_proj': 2}
>>> stacked["model.layers.0.self_attn.q_proj"].delta()[0].tolist()
[2.0, 2.0]
>>> fedloom.compress(stacked, rank=1).error < 1e-6
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.cli.experiments import load_settings
    from fedloom.errors import FedloomError
    from fedloom.experiment.comparison import compare
    from fedloom.experiment.session import run
    from fedloom.explanation.explain import explain
    from fedloom.lora.algebra import compress
    from fedloom.lora.layer import LoRAModel
    from fedloom.lora.pair import Adapter, Pair
    from fedloom.lora.peft_files import load_peft, save_peft
    from fedloom.methods.combination import aggregate
    from fedloom.methods.table import Method, register_method, unregister_method
    from fedloom.methods.traits import Traits
    from fedloom.models.load import load_base
    from fedloom.preview.description import describe
    from fedloom.results.aggregation import aggregate_adapters
    from fedloom.results.conversation import Sampling, generate
    from fedloom.results.export import export_adapter
    from fedloom.results.held_out import RowChoice, evaluate
    from fedloom.results.merged_export import export_merged
    from fedloom.results.opened_result import open_result
    from fedloom.results.suite_scores import score_suite

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "lora.pair",
    "FedloomError": "errors",
    "LoRAModel": "lora.layer",
    "Method": "methods.table",
    "Pair": "lora.pair",
    "RowChoice": "results.held_out",
    "Sampling": "results.conversation",
    "Traits": "methods.traits",
    "aggregate": "methods.combination",
    "aggregate_adapters": "results.aggregation",
    "compare": "experiment.comparison",
    "compress": "lora.algebra",
    "describe": "preview.description",
    "evaluate": "results.held_out",
    "explain": "explanation.explain",
    "export_adapter": "results.export",
    "export_merged": "results.merged_export",
    "generate": "results.conversation",
    "load_base": "models.load",
    "load_peft": "lora.peft_files",
    "load_settings": "cli.experiments",
    "open_result": "results.opened_result",
    "register_method": "methods.table",
    "run": "experiment.session",
    "save_peft": "lora.peft_files",
    "score_suite": "results.suite_scores",
    "unregister_method": "methods.table",
}

__all__ = [
    "Adapter",
    "FedloomError",
    "LoRAModel",
    "Method",
    "Pair",
    "RowChoice",
    "Sampling",
    "Traits",
    "__version__",
    "aggregate",
    "aggregate_adapters",
    "compare",
    "compress",
    "describe",
    "evaluate",
    "explain",
    "export_adapter",
    "export_merged",
    "generate",
    "load_base",
    "load_peft",
    "load_settings",
    "open_result",
    "register_method",
    "run",
    "save_peft",
    "score_suite",
    "unregister_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedloom' has no attribute {name!r}")
    found = getattr(import_module(f"fedloom.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
