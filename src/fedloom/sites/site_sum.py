"""A site's part in the masked sums of a run: what it adds, and what it never does twice.

    runs/<run>/sums.json   the newest round that was summed, attempts at it that were begun, the list that was signed

Secrets are in memory alone, and an attempt that was begun is on disk before its first answer leaves: a site that ends
within a sum takes part in no more of it, and no mask is ever put on other numbers. Of one round it signs one list of
sites, over all attempts: two sums that differ by a site would give that site's numbers away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, MaxLen
from safetensors.torch import save
from torch import Tensor

from fedloom.assembly.round_plan import asked_of
from fedloom.clients.client import Assignment
from fedloom.errors import FedloomError, RunError, UpdateError
from fedloom.federation.blob import read_tensors, sealed, unsealed
from fedloom.federation.buffers import Buffers
from fedloom.federation.sum_terms import SumTerms, check_hides, numbers_added
from fedloom.federation.update_checks import check_update
from fedloom.lora.pair import Adapter
from fedloom.methods.masked_sums import MaskedSums
from fedloom.methods.state import Broadcast, News, Update
from fedloom.methods.strategy import Weighting
from fedloom.privacy.secure_sum.fixed_point import Ring, to_ring
from fedloom.privacy.secure_sum.steps import Member, Step
from fedloom.run_folder import durable
from fedloom.sites import policy
from fedloom.sites.frame_parts import Members, Part, Refusal, RunId
from fedloom.sites.kit import read_kit
from fedloom.sites.members import read_members
from fedloom.sites.sheet import Sheet
from fedloom.sites.site_identity import identity_of, named
from fedloom.sites.site_settings import SiteSettings
from fedloom.sites.sum_frames import SumAnswered, SumAsked

_FILE = "sums.json"
_NOISE = "noise/"
_RETRY = "free space or mend the disk; the site takes part again from the next round"
_MOST_ATTEMPTS = 1 << 12


class _Record(Part):
    """What a site must not forget of its sums."""

    round: Annotated[int, Ge(0)] = 0
    begun: Annotated[tuple[RunId, ...], MaxLen(_MOST_ATTEMPTS)] = ()
    signed: Annotated[tuple[int, ...], MaxLen(4096)] | None = None


class _LeftError(FedloomError):
    """The site takes no further part in a sum."""

    def __init__(self, code: str, **numbers: int) -> None:
        self.refusal = Refusal(code=code, numbers={name.replace("_", "-"): value for name, value in numbers.items()})
        super().__init__(policy.in_words(self.refusal))


@dataclass(eq=False)
class SiteSums:
    """The sums of one run at a site.

    Attributes:
        shapes: (out, in) of the target modules.
        num_rows: rows as the server was told them, by which the site weighs.
        stored: gives what :meth:`kept` made of the answer to a task of a round, where it is on disk.
    """

    site: SiteSettings
    sheet: Sheet
    shapes: dict[str, tuple[int, int]]
    num_rows: int
    stored: Callable[[str, int], bytes | None]
    note: Callable[[str], None]
    _token: str = ""
    _member: Member | None = None
    _record: _Record = field(init=False)

    def __post_init__(self) -> None:
        strategy = self.sheet.strategy(self.shapes)
        if not isinstance(strategy, MaskedSums):
            raise UpdateError(f"expected a method whose updates can be summed, got {self.sheet.method}; send another")
        self._strategy = strategy
        self._path = self.site.folder / "runs" / self.sheet.run / _FILE
        self._record = _read(self._path)

    def kept(self, update: Update, assignment: Assignment) -> Buffers:
        """Check an update as a server does that sees it, and return it as it is kept on disk until it is summed.

        Raises:
            UpdateError: it is none that could be used.
        """
        task = assignment.task
        assert isinstance(task.start, Adapter)
        asked = Broadcast(assignment.round, update.client, task.rank, task.scale, News(), task.start)
        check_update(update, asked, assignment.work, self.shapes, None)
        both = {"start": task.start, "trained": update.adapter}
        tensors = {f"{name}/{k}": t.contiguous() for name, one in both.items() for k, t in one.as_tensors().items()}
        # Drawn once and kept: a second attempt at the sum adds the same numbers, and averages no noise away.
        noise = self._strategy.rule.noise_share(task.start, assignment.round, update.client)
        tensors |= {f"{_NOISE}{key}": tensor.contiguous() for key, tensor in noise.items()}
        return [sealed(save(tensors))]

    def answer(self, asked: SumAsked, body: bytes) -> tuple[SumAnswered, bytes]:
        """Answer a message of a sum, or say why the site takes no further part in it."""
        place = {"run": asked.run, "round": asked.round, "token": asked.token, "step": asked.step}
        head, step = SumAnswered(**place), Step(asked.step)  # type: ignore[arg-type]
        try:
            if step is Step.KEYS and asked.token != self._token:
                self._begin(asked)
            if asked.token != self._token or self._member is None:
                raise _LeftError(policy.SUM_LOST)
            answer = self._member.answer(step, body)
        except (FedloomError, MemoryError) as error:
            refusal = error.refusal if isinstance(error, _LeftError) else Refusal(code=_code_of(error))
            self.note(f"round {asked.round}: left the sum: {error}")
            return head.model_copy(update={"refusal": refusal}), b""
        return head, answer

    def _begin(self, asked: SumAsked) -> None:
        """Begin an attempt at a round's sum; what is left of another one is forgotten.

        Raises:
            FedloomError: the site takes no part in it.
        """
        self._token, self._member = "", None
        record = self._record
        if asked.round < record.round:
            raise _LeftError("sum-older", seen=record.round, asked=asked.round)
        if asked.round == record.round and asked.token in record.begun:
            raise _LeftError(policy.SUM_LOST)
        members = read_members(self.site.folder, self.sheet.run)
        if asked.terms is None or members is None:
            raise UpdateError("expected the terms of a sum and the study's list of sites, got none; send them")
        terms = SumTerms(named(asked.run, members.names), asked.round, asked.token, **dict(asked.terms))
        self._check(terms, members)
        numbers = self._numbers(asked.task, terms)
        identity = identity_of(read_kit(self.site.site.kit, "client"), members.names)
        try:
            session = terms.session(self._strategy)
        except ValueError as error:
            raise UpdateError(f"expected a sum that hides its members, got another ({error}); take no part") from error
        new = record if asked.round == record.round else _Record(round=asked.round)
        self._keep(new.model_copy(update={"begun": (*new.begun, asked.token)}))
        self._token = asked.token
        self._member = Member(session, self.sheet.client, identity, lambda: numbers, promise=self._promise)

    def _check(self, terms: SumTerms, members: Members) -> None:
        assert self.sheet.sum is not None
        own = self.site.policy.min_sites_in_sum
        if terms.threshold < own:
            raise _LeftError("sum-few", allowed=own, asked=terms.threshold)
        if len(set(members.names)) < len(members.names):
            raise UpdateError("expected a study with each site once, got one twice; take no part")
        present = [number for number, name in enumerate(members.names) if name not in members.withdrawn]
        check_hides(terms, self.sheet.client, present, self.sheet.sum.fewest)

    def _numbers(self, task: str, terms: SumTerms) -> Ring:
        """Return what the site adds, from what it keeps on disk of its answer to a task.

        Raises:
            UpdateError: it keeps nothing of it, or the numbers are too large.
        """
        stored = self.stored(task, terms.round)
        if stored is None:
            raise _LeftError("sum-untrained")
        tensors = read_tensors(unsealed(stored))
        start, trained = _adapter_in(tensors, "start/"), _adapter_in(tensors, "trained/")
        share = terms.share(self._weight())
        noise = {key.removeprefix(_NOISE): one for key, one in tensors.items() if key.startswith(_NOISE)}
        if not noise and self.sheet.sum is not None and self.sheet.sum.noise_multiplier is not None:
            raise _LeftError("sum-untrained")
        added = numbers_added(self._strategy, terms.round, start, trained, share, noise)
        return to_ring(added, len(terms.members))

    def _weight(self) -> float:
        """Return the site's own weight, as the server counts it too."""
        asked = asked_of(self.sheet.local_training, {self.sheet.client: self.num_rows}, 1, self.sheet.client)
        match self._strategy.weighting:
            case Weighting.ROWS:
                return float(asked.num_rows)
            case Weighting.WORK:
                return float(asked.work)
            case _:
                return 1.0

    def _promise(self, members: tuple[int, ...]) -> None:
        """Sign one list of a round, over all attempts, and remember it first.

        Raises:
            UpdateError: another one was signed.
            RunError: the disk refused.
        """
        if self._record.signed is not None and self._record.signed != members:
            raise _LeftError("sum-again", signed=len(self._record.signed), asked=len(members))
        self._keep(self._record.model_copy(update={"signed": members}))

    def _keep(self, record: _Record) -> None:
        with durable.explained(str(self._path), _RETRY):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            durable.write_bytes(self._path, record.model_dump_json().encode())
        self._record = record


def _adapter_in(tensors: Mapping[str, Tensor], beginning: str) -> Adapter:
    own = {key.removeprefix(beginning): tensor for key, tensor in tensors.items() if key.startswith(beginning)}
    return Adapter.from_tensors(own)


def _read(path: Path) -> _Record:
    """Return what is remembered.

    Raises:
        RunError: the file is damaged: the site cannot know what it signed.
    """
    try:
        return _Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Record()
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: expected what the site has signed in this run, got a damaged file; take no further part in it"
        ) from error


def _code_of(error: BaseException) -> str:
    return policy.DISK if isinstance(error, RunError) else "memory" if isinstance(error, MemoryError) else "sum"
