"""Base models: loading them, and where their parts are."""
