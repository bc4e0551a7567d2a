"""A run's folder: how it is claimed, written so that a kill loses at most one round, and read."""
