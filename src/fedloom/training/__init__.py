"""Local training: passes over rows, the loss on supervised tokens, the optimiser, a cohort of clients."""
