"""A client: what it holds and keeps, and how it answers a message in bytes."""
