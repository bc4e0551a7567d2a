"""Local training: packed forwards, the loss on supervised tokens, the optimiser, a cohort of clients."""
