"""The file of a study, ``study.toml``: an ordinary recipe without rows of its own, and the table ``[sites]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import Field, ValidationError

from fedloom import config
from fedloom.config import Settings
from fedloom.config.client_names import resolve_names
from fedloom.config.loading import frozen, merge, read
from fedloom.config.problems import Problem, refuse, schema_problems
from fedloom.config.setting import Count, Name, NonNegative, PathOrName, Positive, Table, setting
from fedloom.data.templates import AUTO
from fedloom.sites.site_settings import Address

SITES = "sites"
_AT_THE_SITES = ("path", "split", "subset", "revision", "columns", "eval_rows", "eval_fraction", "max_rows")


class Sites(Table):
    """Who takes part, where the server listens, and how long it waits."""

    names: Annotated[tuple[Name, ...], MinLen(1)] = Field(
        description="The sites' names, as in their certificates; a site's position is its client number."
    )
    quorum: Count = setting(1, "Usable updates after which the sites that are still at work get `grace_s` more.")
    deadline_s: Positive = setting(3600.0, "A round waits no longer, and the start no longer for `quorum` sites.")
    grace_s: NonNegative = setting(120.0, "Seconds for those still at work once the quorum has answered.")
    step_deadline_s: Positive = setting(
        60.0, "A step of a model that is cut waits no longer; who misses it is dropped until the next round."
    )
    evaluate: Literal["server", "sites"] = setting(
        "server", "`server`: on `data.eval_path`; `sites`: each on its own held-out rows, of which two sums cross."
    )
    address: Address = setting("127.0.0.1:8002", "Where the server listens, as `host:port`.")
    kit: PathOrName = setting("kit", "Folder of the server's key and certificates: server.key, server.crt, rootCA.pem.")


@dataclass(frozen=True)
class Study:
    """A study: the recipe as the server runs it, with a value per client, and the sites.

    Attributes:
        written: the recipe as it is written down in the run folder.
        settings: the recipe with tables by site name turned into lists.
    """

    written: Settings
    settings: Settings
    sites: Sites


def load_study(path: Path | str, overrides: Sequence[str] = ()) -> Study:
    """Read a study and apply ``--set`` overrides, those of ``sites.`` too.

    Raises:
        SettingsError: a line per problem.
    """
    return resolve_study(read(Path(path)), str(path), overrides)


def resolve_study(document: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Study:
    """Turn a parsed study into settings.

    Raises:
        SettingsError: a line per problem.
    """
    merged, origins = merge(document, source, overrides)
    sites = _sites(merged, origins)
    refuse(_rows_problems(merged, sites), origins)
    # The overrides once more: a recipe knows which of them name another method. Tables per site name clients.
    recipe = {name: values for name, values in document.items() if name != SITES}
    federation = dict(recipe.get("federation", {})) | {"num_clients": len(sites.names)}
    # Left out, the template is the shape's own, whatever the rows: they are not this machine's embedded ones.
    data = {"template": AUTO, **recipe.get("data", {})}
    mine = [override for override in overrides if not override.lstrip().startswith(f"{SITES}.")]
    settings = config.resolve({**recipe, "federation": federation, "data": data}, source, mine)
    placed = resolve_names(settings, sites.names)
    refuse([*_method_problems(settings), *_split_problems(settings, sites, merged)], origins)
    return Study(settings, placed, sites)


def _sites(merged: Mapping[str, Any], origins: Mapping[str, str]) -> Sites:
    given = {SITES: merged.get(SITES, {})}
    try:
        sites = _SitesAlone.model_validate(frozen(given)).sites
    except ValidationError as error:
        refuse(schema_problems(error, given, {SITES: Sites}), origins)
        raise
    found = []
    if len(set(sites.names)) < len(sites.names):
        found.append(Problem("sites.names", "each name once", str(list(sites.names)), "remove the repeated one"))
    if sites.quorum > len(sites.names):
        found.append(Problem("sites.quorum", f"at most the {len(sites.names)} sites", str(sites.quorum), "lower it"))
    refuse(found, origins)
    return sites


class _SitesAlone(Table):
    sites: Sites


def _rows_problems(merged: Mapping[str, Any], sites: Sites) -> list[Problem]:
    found = []
    if "partition" in merged:
        found.append(
            Problem("partition", "no table [partition] in a study", "one", "remove it: each site has its rows")
        )
    data = merged.get("data", {})
    for key in _AT_THE_SITES if isinstance(data, Mapping) else ():
        if key in data:
            name = f"data.{key}"
            found.append(Problem(name, f"a study without {name}", str(data[key]), "remove it: the rows are the sites'"))
    if sites.evaluate == "sites" and isinstance(data, Mapping) and "eval_path" in data:
        action = "remove it, or set sites.evaluate = server"
        found.append(Problem("data.eval_path", "none with sites.evaluate = sites", str(data["eval_path"]), action))
    return found


def _method_problems(settings: Settings) -> list[Problem]:
    found = []
    if not settings.traits.sends_adapters:
        wanted = "a method whose clients train adapters in rounds"
        found.append(Problem("method.name", wanted, settings.method.name, "choose such a method for a study"))
    if settings.federation.num_clients != len(settings.client_ranks):
        found.append(Problem("method.ranks", "a rank per site", str(settings.method.ranks), "give one per site"))
    if settings.federation.participation is not None:
        found.append(Problem("federation.participation", "none in a study", "one", "remove it: sites take part or not"))
    if settings.evaluation.suites:
        wanted = "none in a study: score the finished run with `fedloom evaluate`"
        found.append(Problem("evaluation.suites", wanted, str(settings.evaluation.suites), "remove them"))
    return found


def _split_problems(settings: Settings, sites: Sites, merged: Mapping[str, Any]) -> list[Problem]:
    """A cut model wants what each side knows before a site has told its rows, and a base where it is scored."""
    if not settings.traits.is_cut:
        given = "step_deadline_s" in merged.get(SITES, {})
        told = "one"
        wanted = "none with a method that does not cut the model"
        return [Problem("sites.step_deadline_s", wanted, told, "remove it")] if given else []
    found = []
    if settings.training.local_steps is None:
        wanted, action = "a number of steps in a study of a cut model", "set it in place of training.local_epochs"
        found.append(Problem("training.local_steps", wanted, "none", action))
    if sites.evaluate == "sites":
        wanted, action = "server in a study of a cut model", "set it: no site holds the whole base"
        found.append(Problem("sites.evaluate", wanted, sites.evaluate, action))
    if settings.model.quantization != "none":
        wanted, action = "none in a study of a cut model", "set it: each side loads its part of the base as it is"
        found.append(Problem("model.quantization", wanted, settings.model.quantization, action))
    return found
