"""Differential privacy: clipping and noise, what it costs by an accountant, and the ledger of what was spent."""
