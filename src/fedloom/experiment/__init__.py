"""The composition root: settings become objects, objects a loop, the loop a run folder."""

from fedloom.experiment.comparison import MethodsComparison, compare
from fedloom.experiment.run_summary import RunSummary
from fedloom.experiment.session import run
from fedloom.preview.description import Description, describe

__all__ = ["Description", "MethodsComparison", "RunSummary", "compare", "describe", "run"]
