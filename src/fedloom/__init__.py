"""fedloom: federated and split fine-tuning of large language models with low-rank adapters."""

__version__ = "0.1.0"
