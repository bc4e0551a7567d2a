"""The file of a site, ``site.toml``: only its owner writes it, and nothing of it crosses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Le
from pydantic import AfterValidator, Field, ValidationError

from fedloom.config.loading import frozen, read
from fedloom.config.problems import Problem, refuse, schema_problems
from fedloom.config.setting import Count, Name, OpenFraction, PathOrName, Positive, Table, having, setting


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError("host:port")
    return text


Address = Annotated[Name, AfterValidator(_address)]


class Site(Table):
    """Who the site is and where it keeps what it must not lose."""

    name: Name = Field(description="The site's name, as in the study and in its certificate.")
    server: Address = Field(description="Where the server listens, as `host:port`.")
    kit: PathOrName = Field(
        description="Folder of the site's key and certificates: client.key, client.crt, rootCA.pem."
    )
    folder: PathOrName = Field(description="Folder for the held side, the last answer, the memory and the ledger.")
    threads: Count = setting(1, "Processor threads of the training; other numbers may round otherwise.")


class SiteData(Table):
    """The site's rows."""

    path: PathOrName = Field(description="Rows: a file (JSON, JSONL, CSV, Parquet) or a folder of them.")
    split: Literal["train", "eval", "test"] = setting("train", "Part of a folder.")
    columns: dict[str, str] = setting({}, "Columns under other names: the shape's name = the file's.")
    eval_fraction: OpenFraction | None = setting(
        None, "Rows held out, on which the site scores the common adapter where the study asks for it; default: none."
    )


class SiteModel(Table):
    """The base as it lies at the site; its hash must be the study's."""

    base: PathOrName = setting("embedded", "Base model: a folder, a hub name, or `embedded`.")
    tokenizer: PathOrName | None = setting(None, "Tokenizer folder, or `bytes`; default: the base's own.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting("auto", "Type the base computes in.")
    device: Name = setting("auto", "`auto`, `cpu`, `cuda`, `cuda:N` or `mps`.")
    quantization: Literal["none", "4bit", "8bit"] = setting("none", "Load the base quantized (extra `quantized`).")
    trust_remote_code: bool = setting(False, "Run the Python code that comes with the base or tokenizer.")


class Policy(Table):
    """What the site does for a study, whoever asks. A study that asks for more is refused, and told which line."""

    methods: tuple[Annotated[str, having("sends_adapters")], ...] = setting((), "Methods allowed; empty: any.")
    bases: tuple[Name, ...] = setting((), "SHA-256 of the bases allowed, as `site check` prints it; empty: any.")
    max_rank: Count = setting(64, "Largest rank.")
    max_rounds: Count = setting(1000, "Largest number of rounds of a run.")
    max_steps_per_round: Count = setting(1000, "Largest number of optimiser steps in a round.")
    max_tokens_per_pass: Count = setting(65536, "Largest number of tokens in a pass, which decides the memory.")
    max_message_mib: Annotated[Count, Le(1 << 20)] = setting(1024, "Largest message taken in.")
    min_rows: Count = setting(1, "With fewer usable rows the site does not take part.")
    hide_row_count: bool = setting(
        False, "Tell the number of rows rounded down to hundreds and at most `row_cap`; it is also the site's weight."
    )
    row_cap: Count = setting(20000, "Largest number of rows told with `hide_row_count`.")
    split: Literal["no", "labels-stay", "yes"] = setting(
        "no",
        "Training of a model that is cut, in which activations of the rows cross: `no`, `yes`, or `labels-stay`: only "
        "where the last blocks and the labels stay here (`split.labels = client`).",
    )
    max_epsilon: Positive | None = setting(
        None,
        "Most that all studies together may spend on the site's rows: ε at `delta`. A round that would pass it is "
        "refused, and so is a study that does not hide rows (`privacy.unit = row`); default: what a study says itself.",
    )
    delta: OpenFraction = setting(1e-5, "The δ at which ε is counted, or the study's where that is smaller.")
    unit_column: Name | None = setting(
        None,
        "Column of the site's rows, such as `patient`: a study is refused that does not hide all rows of each of its "
        "values together (`data.unit_column`). Then `max_epsilon` is a patient's, over all studies; default: a row's.",
    )
    sum: Literal["any", "masked"] = setting(
        "any",
        "`masked`: only studies whose server sees sums of updates and no update (`privacy.sum` = masked or sketch).",
    )
    min_sites_in_sum: Count = setting(
        3, "Least number of sites, this one among them, whose updates are in a masked sum with its own."
    )
    confirm: Literal["first", "always", "never"] = setting(
        "first",
        "`first`: a person agrees to each run once (`fedloom site confirm`), and again where the study changes or a "
        "site joins; `always`: besides, each time that `site run` takes the run up; `never`: nobody is asked.",
    )


class SiteSettings(Table):
    """A site's file."""

    site: Site
    data: SiteData
    model: SiteModel = Field(default_factory=SiteModel)
    policy: Policy = Field(default_factory=Policy)

    @property
    def folder(self) -> Path:
        """Where the site keeps what it must not lose."""
        return Path(self.site.folder)


def site_tables() -> dict[str, type[Table]]:
    """Return the tables by name, in the order of the documentation."""
    return {name: field.annotation for name, field in SiteSettings.model_fields.items()}  # type: ignore[misc]


def load_site(path: Path | str) -> SiteSettings:
    """Read a site's file.

    Raises:
        SettingsError: a line per problem.
    """
    return resolve_site(read(Path(path)), str(path))


def resolve_site(document: dict[str, Any], source: str) -> SiteSettings:
    """Turn a parsed file into settings.

    Raises:
        SettingsError: a line per problem.
    """
    origins = dict.fromkeys([*site_tables(), *document], source)
    try:
        settings = SiteSettings.model_validate(frozen(document))
    except ValidationError as error:
        refuse(schema_problems(error, document, site_tables()), origins)
        raise
    refuse(_file_problems(settings), origins)
    return settings


def _file_problems(settings: SiteSettings) -> list[Problem]:
    path = settings.data.path
    if path == "embedded" or Path(path).exists():
        return []
    return [Problem("data.path", "a file or folder", f"{path}, which does not exist", "check the path")]
