"""The protocol: who takes part, what crosses in bytes, and the loops over rounds and split steps."""
