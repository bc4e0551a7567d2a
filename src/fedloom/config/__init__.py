"""Settings: one schema, TOML recipes, ``--set``. Imports no torch."""

from fedloom.config.compared_variants import compared_variants
from fedloom.config.loading import check, load, merge, parse, read, resolve
from fedloom.config.problems import Problem
from fedloom.config.schema import Settings, every_setting, tables
from fedloom.config.variants import with_method, with_seed

__all__ = [
    "Problem",
    "Settings",
    "check",
    "compared_variants",
    "every_setting",
    "load",
    "merge",
    "parse",
    "read",
    "resolve",
    "tables",
    "with_method",
    "with_seed",
]
