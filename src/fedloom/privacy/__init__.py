"""Privacy: clipping and noise, what it costs by an accountant, the ledger of what was spent, and secure sums."""
