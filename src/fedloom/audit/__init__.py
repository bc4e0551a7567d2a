"""The laws of aggregation, measured on a method or on a function of the user's own: ``fedloom audit``."""
