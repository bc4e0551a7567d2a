"""What a server does with adapters: one file per strategy, the server steps, and the validation of updates."""
