"""The composition root: settings become objects, objects a loop, the loop a run folder."""

from fedloom.experiment.comparing import MethodsComparison, compare
from fedloom.experiment.describing import Description, describe
from fedloom.experiment.running import RunSummary, run

__all__ = ["Description", "MethodsComparison", "RunSummary", "compare", "describe", "run"]
