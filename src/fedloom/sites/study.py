"""The file of a study, ``study.toml``: an ordinary recipe without rows of its own, and the table ``[sites]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import Field, ValidationError

from fedloom import config
from fedloom.config import Settings
from fedloom.config.client_names import resolve_names
from fedloom.config.loading import frozen, merge, read
from fedloom.config.privacy_checks import masked
from fedloom.config.problems import Problem, refuse, schema_problems
from fedloom.config.schema import PER_CLIENT
from fedloom.config.setting import Count, Name, NonNegative, PathOrName, Positive, Table, setting
from fedloom.data.templates import AUTO
from fedloom.federation.sum_terms import threshold_of
from fedloom.run_folder.manifest import flatten
from fedloom.run_folder.writer import MAY_CHANGE
from fedloom.sites.frame_parts import Members
from fedloom.sites.members import settings_hash
from fedloom.sites.site_settings import Address

SITES = "sites"
VERSIONED = (*PER_CLIENT, "federation.num_clients")
"""Settings that say something of each site, and so may grow with ``sites.names``."""
_LARGEST_LIST = 48 << 10
_AT_THE_SITES = (
    *("path", "split", "subset", "revision", "columns", "eval_rows", "eval_fraction", "max_rows"),
    *("validation_fraction", "scored_seeds", "canaries", "canary_clients", "canary_repetitions"),
)


class Sites(Table):
    """Who takes part, where the server listens, and how long it waits."""

    names: Annotated[tuple[Name, ...], MinLen(1)] = Field(
        description="The sites' names, as in their certificates; a site's position is its client number."
    )
    version: Count = setting(1, "Of the study; a site that joins or withdraws under a run needs the next, signed one.")
    withdrawn: tuple[Name, ...] = setting((), "Those of `names` that take part no more; their numbers stay theirs.")
    quorum: Count = setting(
        1,
        "Usable updates after which the sites that are still at work get `grace_s` more; with masked sums at least the "
        "sites that must stay.",
    )
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

    @property
    def present(self) -> tuple[str, ...]:
        """The sites that have not withdrawn."""
        return tuple(name for name in self.names if name not in self.withdrawn)


@dataclass(frozen=True)
class Study:
    """A study: the recipe as the server runs it, with a value per client, and the sites.

    Attributes:
        written: the recipe as it is written down in the run folder.
        settings: the recipe with tables by site name turned into lists.
        signature: of its members, as `fedloom sites sign` wrote it; empty where there is none.
    """

    written: Settings
    settings: Settings
    sites: Sites
    signature: str = ""

    @property
    def members(self) -> Members:
        """Who takes part by this version of the study, with the signature that was given."""
        hashed = settings_hash(unchanging(self.written.as_dict()))
        sites, signature = self.sites, self.signature
        return Members(
            version=sites.version,
            names=sites.names,
            withdrawn=sites.withdrawn,
            settings_sha256=hashed,
            signature=signature,
        )

    @property
    def cohort_size(self) -> int:
        """Sites drawn for a round, of those present."""
        return _of(self.settings, len(self.sites.present)).cohort_size

    @property
    def quorum(self) -> int:
        """Sites that a round waits for until its deadline: of masked sums those at least that must stay."""
        privacy, quorum = self.settings.privacy, self.sites.quorum
        return max(quorum, threshold_of(privacy.threshold, self.cohort_size)) if privacy.sum != "plain" else quorum

    def on(self, date: str) -> Study:
        """Return the study of a run that began on ``date``, which every site's chat template is told."""
        return replace(self, written=self.written.on(date), settings=self.settings.on(date))


def load_study(path: Path | str, overrides: Sequence[str] = ()) -> Study:
    """Read a study and apply ``--set`` overrides, those of ``sites.`` too.

    Raises:
        SettingsError: a line per problem.
    """
    path = Path(path)
    return replace(resolve_study(read(path), str(path), overrides), signature=_signature_beside(path))


def signed_file(study: Path) -> Path:
    """Return where the signature of a study's version lies: beside its file."""
    return study.with_suffix(".signed.json")


def unchanging(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that no version of a study changes, by dotted name.

    The day that templates are told is none of them: who signs does not know on which the run began. It is in the sheet.
    """
    free = (*MAY_CHANGE, *VERSIONED, "data.date")
    return {
        name: value
        for name, value in flatten(settings).items()
        if not any(name == one or name.startswith(f"{one}.") for one in free)
    }


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
    refuse([*_method_problems(settings, sites), *_split_problems(settings, sites, merged)], origins)
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
    strangers = [name for name in sites.withdrawn if name not in sites.names]
    if strangers:
        action = "keep a withdrawn site in sites.names too: its number stays its own"
        found.append(Problem("sites.withdrawn", "names of sites.names", str(strangers), action))
    if sites.quorum > len(sites.present):
        wanted = f"at most the {len(sites.present)} sites" + (" that take part" if sites.withdrawn else "")
        found.append(Problem("sites.quorum", wanted, str(sites.quorum), "lower it"))
    if sum(len(name.encode()) + 3 for name in (*sites.names, *sites.withdrawn)) > _LARGEST_LIST:
        wanted, got = f"at most {_LARGEST_LIST} bytes of names in all", f"{len(sites.names)} sites"
        found.append(Problem("sites.names", wanted, got, "use shorter names, or fewer sites"))
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
    model = merged.get("model", {})
    if isinstance(model, Mapping) and "adapter" in model:
        wanted, action = (
            "a study without model.adapter",
            "merge it into the base: fedloom export ADAPTER --merge --to DIR",
        )
        found.append(Problem("model.adapter", wanted, str(model["adapter"]), action))
    evaluation = merged.get("evaluation", {})
    if isinstance(evaluation, Mapping) and "patience" in evaluation:
        wanted, action = "a study without evaluation.patience", "remove it: validation rows would be the sites'"
        found.append(Problem("evaluation.patience", wanted, str(evaluation["patience"]), action))
    if sites.evaluate == "sites" and isinstance(data, Mapping) and "eval_path" in data:
        action = "remove it, or set sites.evaluate = server"
        found.append(Problem("data.eval_path", "none with sites.evaluate = sites", str(data["eval_path"]), action))
    return found


def _method_problems(settings: Settings, sites: Sites) -> list[Problem]:
    found = []
    if not settings.traits.sends_adapters:
        wanted = "a method whose clients train adapters in rounds"
        found.append(Problem("method.name", wanted, settings.method.name, "choose such a method for a study"))
    elif settings.traits.is_personal:
        wanted = "a method whose result is one adapter for all"
        action = "choose another, or run this one in one process: what stays with a site is not scored or written there"
        found.append(Problem("method.name", wanted, settings.method.name, action))
    if settings.federation.num_clients != len(settings.client_ranks):
        found.append(Problem("method.ranks", "a rank per site", str(settings.method.ranks), "give one per site"))
    found += _present_problems(settings, sites)
    if settings.federation.participation is not None:
        found.append(Problem("federation.participation", "none in a study", "one", "remove it: sites take part or not"))
    if settings.federation.sampling == "poisson":
        wanted = "uniform in a study: sites' logs and the network show who was asked, so the draw is no secret"
        found.append(Problem("federation.sampling", wanted, "poisson", "remove it: ε is counted without a draw"))
    if settings.evaluation.clients > 0.0:
        wanted = "0 in a study: its sites hold rows out themselves (sites.evaluate = sites)"
        found.append(Problem("evaluation.clients", wanted, str(settings.evaluation.clients), "remove it"))
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
    if sites.withdrawn:
        wanted, action = "nobody in a study of a cut model", "keep its sites, or begin another run without them"
        found.append(Problem("sites.withdrawn", wanted, str(list(sites.withdrawn)), action))
    if sites.version > 1:
        wanted, action = "1 in a study of a cut model, which keeps its sites", "begin another run with other sites"
        found.append(Problem("sites.version", wanted, str(sites.version), f"set it back, or {action}"))
    return found


def _present_problems(settings: Settings, sites: Sites) -> list[Problem]:
    """What a round of those present needs; the recipe's own checks count the withdrawn ones too."""
    if not sites.withdrawn or not sites.present:
        return []
    drawn, there = settings.federation.clients_per_round, len(sites.present)
    if isinstance(drawn, int) and drawn > there:
        wanted = f"at most the {there} sites that take part"
        return [Problem("federation.clients_per_round", wanted, str(drawn), "lower it")]
    if settings.federation.min_clients > (drawn := _of(settings, there).cohort_size):
        wanted = f"at most the {drawn} sites of a round"
        return [Problem("federation.min_clients", wanted, str(settings.federation.min_clients), "lower it")]
    return list(masked(_of(settings, there)))


def _of(settings: Settings, num_clients: int) -> Settings:
    federation = settings.federation.model_copy(update={"num_clients": num_clients})
    return settings.model_copy(update={"federation": federation})


def _signature_beside(study: Path) -> str:
    """Return the signature that lies beside a study, or none; whether it fits is for whoever uses it to check."""
    try:
        return Members.model_validate_json(signed_file(study).read_bytes()).signature
    except (OSError, ValidationError):
        return ""
