"""Every error fedloom raises on purpose.

    FedloomError
    ├── SettingsError        a recipe or a --set that cannot be used            (ValueError)
    ├── MethodError          a method that cannot be registered, found or made  (ValueError)
    ├── DataError            a file, a row or a column that cannot be used      (ValueError)
    │   └── PartitionError   rows that cannot be split among clients as asked   (ValueError)
    ├── ModelError           a base model that is absent, foreign or unsuitable (ValueError)
    │   └── CutError         a place where a model cannot be cut in two         (ValueError)
    ├── AdapterError         an adapter that is corrupt or does not fit         (ValueError)
    ├── UpdateError          a message between client and server cannot be used (ValueError)
    │   └── BehindError      news that do not continue the side a client holds  (ValueError)
    ├── RunError             a run folder that cannot be created or resumed     (RuntimeError)
    │   └── TooFewClientsError   fewer usable updates than the set minimum      (RuntimeError)
    ├── PrivacyError         steps that would pass privacy.max_epsilon          (RuntimeError)
    ├── EvaluationError      outputs, references or questions that do not fit   (ValueError)
    │   └── EndpointError    a judge's endpoint that is down, slow or rejects   (ConnectionError)
    └── MissingExtraError    an optional dependency that is not installed       (ImportError)

A message says what was expected, what came, where, and what to do, in one line. The command line prints it
after ``error:`` and exits with code 2; any other exception keeps its traceback. Names and rows that a message quotes
are other people's text: what a terminal would obey is spelt out.
"""

from fedloom.wording import printable


class FedloomError(Exception):
    """Base of every error raised on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SettingsError(FedloomError, ValueError):
    """A setting that cannot be used."""


class MethodError(FedloomError, ValueError):
    """A method that cannot be registered, found or made."""


class DataError(FedloomError, ValueError):
    """A file, row or column that cannot be used."""


class PartitionError(DataError):
    """Rows that cannot be split among clients as asked."""


class ModelError(FedloomError, ValueError):
    """A base model that is absent, foreign or unsuitable."""


class CutError(ModelError):
    """A place where a model cannot be cut."""


class AdapterError(FedloomError, ValueError):
    """An adapter that is corrupt or does not fit its model."""


class UpdateError(FedloomError, ValueError):
    """A message between client and server that cannot be used."""


class BehindError(UpdateError):
    """News that do not continue the side that a client holds; ``held`` is the version it holds."""

    def __init__(self, held: int, what: str) -> None:
        super().__init__(
            f"expected news that continue what this client holds, got others: {what}; send it the whole side"
        )
        self.held = held


class RunError(FedloomError, RuntimeError):
    """A run folder that cannot be created, resumed or read."""


class TooFewClientsError(RunError):
    """Fewer usable updates arrived than the minimum."""


class PrivacyError(FedloomError, RuntimeError):
    """Steps that would cost more privacy than may be spent."""


class EvaluationError(FedloomError, ValueError):
    """Outputs, references or questions that cannot be scored."""


class EndpointError(EvaluationError, ConnectionError):
    """A judge's endpoint that is down, slow or rejects a request."""


class MissingExtraError(FedloomError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the extra '{extra}'; install it: pip install 'fedloom[{extra}]'")
        self.extra = extra
