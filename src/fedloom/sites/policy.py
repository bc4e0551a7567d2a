"""What a site refuses, by its owner's policy and by what does not fit; and the words for what crosses of it.

A refusal is a code, numbers and hashes: a message of an error may quote rows and paths, so its text stays in the site's
own log.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.data.batches import num_batches
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.frames import FORMAT
from fedloom.sites.sheet import Sheet
from fedloom.sites.site_settings import Policy

UNCONFIRMED = "unconfirmed"
BEHIND = "behind"
SUPERSEDED = "superseded"
ENDED = "trainer-ended"
LOST = "period-lost"
DISK = "disk"
SUM_LOST = "sum-lost"
BUDGET = "budget"

_WORDS: Mapping[str, str] = {
    "method": "its policy (policy.methods) does not allow the study's method",
    "rank": "its policy (policy.max_rank) allows ranks up to {allowed}, the study asks for {asked}",
    "rounds": "its policy (policy.max_rounds) allows {allowed} rounds, the study asks for {asked}",
    "steps": "its policy (policy.max_steps_per_round) allows {allowed} steps a round, the study asks for {asked}",
    "tokens": "its policy (policy.max_tokens_per_pass) allows {allowed} tokens a pass, the study asks for {asked}",
    "split": "its policy (policy.split) does not let activations cross",
    "labels": "its policy (policy.split) lets no labels cross, the study wants them at the server (split.labels)",
    "base-not-allowed": "its policy (policy.bases) does not list the study's base {asked}",
    "rows": "its policy (policy.min_rows) takes part from {allowed} rows on, it has {rows}",
    "rows-hidden": "its policy (policy.hide_row_count) wants training.local_steps: epochs would tell its rows",
    "unhidden": "its policy (policy.max_epsilon) wants its rows hidden (privacy.unit = row)",
    "units": "its policy (policy.unit_column) wants all rows of one hidden together, by its column (data.unit_column)",
    BUDGET: "its rows have cost what they may (privacy.max_epsilon, or policy.max_epsilon of the site)",
    "extra": "fedloom lacks an extra there that the study needs; its own log says which",
    UNCONFIRMED: "its owner has not agreed to this run yet (fedloom site confirm)",
    "base-differs": "expected base {study}, it has {site}",
    "tokenizer-differs": "expected tokenizer {study}, it has {site}",
    "format": "expected frames of format {server}, it has {site}: run the same version of fedloom on both sides",
    "members-unsigned": "version {asked} of the study is not signed by its project's coordinator (fedloom sites sign)",
    "members-older": "it has seen version {seen} of the study, and is served version {asked}",
    "members-other": "the sites of version {asked} of the study do not go on from those that it has seen",
    "members-number": "the study's list of sites (sites.names) does not have it as client {client}",
    "sheet": "it could not read the sheet: run the same version of fedloom on both sides",
    "method-missing": "the study's method is not installed there",
    "data": "its rows could not be read or used; its own log says why",
    "model": "its base could not be loaded or used; its own log says why",
    "diverged": "its training diverged: lower training.learning_rate",
    "message": "it could not read the task; its own log says why",
    BEHIND: "its side does not lead to the server's",
    SUPERSEDED: "a newer round took its place",
    LOST: "it ended within the period and came back; it takes part again from the next one",
    ENDED: "its training process ended with code {code}; its own log says why",
    "unusable": "its update could not be used; its own log says why",
    "unmasked": "its policy (policy.sum) wants its update in masked sums alone (privacy.sum = masked or sketch)",
    "sum-few": "its policy (policy.min_sites_in_sum) wants {allowed} sites in a sum at least, the study has {asked}",
    "sum": "it left the secure sum; its own log says why",
    SUM_LOST: "it ended within the secure sum and came back; it takes part again from the next round",
    "sum-untrained": "it keeps no update of this round to be summed",
    "sum-older": "it has been in a sum of round {seen}, and is asked for one of round {asked}",
    "sum-again": "it has signed a sum of {signed} sites for this round, and signs none of other sites",
    "memory": "it ran out of memory",
    "held-out": "it has no held-out rows (data.eval_fraction in its file)",
    DISK: "it could not write its folder; its own log says why",
}
_HASH_SHOWN = 12


def in_words(refusal: Refusal) -> str:
    """Return a refusal as a clause about the site; a code that is not known is shown as it is."""
    words = _WORDS.get(refusal.code)
    shown = {**{k: f"{v:g}" for k, v in refusal.numbers.items()}}
    shown |= {k: v[:_HASH_SHOWN] for k, v in refusal.hashes.items()}
    try:
        return words.format(**shown) if words is not None else f"it refuses: {refusal.code}"
    except (KeyError, IndexError):
        return f"it refuses: {refusal.code}"


def lost() -> Refusal:
    """Return what is said of a site that has ended within a period, with all it had done in it."""
    return Refusal(code=LOST)


def of_format(format: int) -> Refusal | None:
    """Refuse frames of another format."""
    return None if format == FORMAT else Refusal(code="format", numbers={"server": format, "site": FORMAT})


def of_sheet(policy: Policy, sheet: Sheet) -> Refusal | None:
    """Return the first line of the policy that a study goes beyond, as far as its sheet alone shows."""
    training, split = sheet.training, sheet.split
    if policy.methods and sheet.method not in policy.methods:
        return Refusal(code="method")
    if policy.bases and sheet.base_sha256 not in {base.removeprefix("sha256:") for base in policy.bases}:
        return Refusal(code="base-not-allowed", hashes={"asked": sheet.base_sha256})
    if split is not None and policy.split == "no":
        return Refusal(code="split")
    if split is not None and policy.split == "labels-stay" and split.tail_blocks is None:
        return Refusal(code="labels")
    if policy.hide_row_count and training.steps is None:
        return Refusal(code="rows-hidden")
    if policy.max_epsilon is not None and training.privacy is None:
        return Refusal(code="unhidden")
    if policy.unit_column is not None and sheet.unit_column != policy.unit_column:
        return Refusal(code="units")
    if policy.sum == "masked" and sheet.sum is None:
        return Refusal(code="unmasked")
    if sheet.sum is not None and sheet.sum.fewest < policy.min_sites_in_sum:
        return Refusal(code="sum-few", numbers={"allowed": policy.min_sites_in_sum, "asked": sheet.sum.fewest})
    rounds, steps = training.start_rounds + training.total_rounds, training.steps or 0
    budget = training.token_budget
    if split is not None:  # a round is a period, and a pass has the rows of a micro-batch: see of_inputs
        rounds, steps, budget = split.num_periods, split.aggregate_every, 0
    limits = (
        ("rank", max(sheet.rank, sheet.sketch_rank or 0), policy.max_rank),
        ("rounds", rounds, policy.max_rounds),
        ("steps", steps, policy.max_steps_per_round),
        ("tokens", max(budget, sheet.max_length or 0), policy.max_tokens_per_pass),
        ("tokens", sheet.batch_tokens if sheet.scores else 0, policy.max_tokens_per_pass),
    )
    for code, asked, allowed in limits:
        if asked > allowed:
            return Refusal(code=code, numbers={"asked": asked, "allowed": allowed})
    return None


def of_base(sheet: Sheet, base_sha256: str, tokenizer_sha256: str) -> Refusal | None:
    """Refuse a base or a tokenizer that is not the study's, before a row is read with it."""
    if base_sha256 != sheet.base_sha256:
        return Refusal(code="base-differs", hashes={"study": sheet.base_sha256, "site": base_sha256})
    if tokenizer_sha256 != sheet.tokenizer_sha256:
        return Refusal(code="tokenizer-differs", hashes={"study": sheet.tokenizer_sha256, "site": tokenizer_sha256})
    return None


def of_inputs(policy: Policy, sheet: Sheet, num_rows: int, longest: int) -> Refusal | None:
    """Return what does not fit once the rows are loaded; ``longest`` is the longest row in tokens."""
    if num_rows < policy.min_rows:
        return Refusal(code="rows", numbers={"allowed": policy.min_rows, "rows": told_rows(policy, num_rows)})
    training, in_a_pass = sheet.training, longest
    if sheet.split is not None:
        in_a_pass *= -(-training.batch_size // sheet.split.micro_batches)
    if in_a_pass > policy.max_tokens_per_pass:
        return Refusal(code="tokens", numbers={"asked": in_a_pass, "allowed": policy.max_tokens_per_pass})
    if training.steps is None:
        steps = num_batches(num_rows, training.batch_size, epochs=training.epochs or 0.0)
        if steps > policy.max_steps_per_round:
            return Refusal(code="steps", numbers={"asked": steps, "allowed": policy.max_steps_per_round})
    return None


def told_rows(policy: Policy, num_rows: int) -> int:
    """Return the number of rows that the server is told; it is the site's weight too, where rows weigh."""
    if not policy.hide_row_count:
        return num_rows
    return max(1, min(num_rows, policy.row_cap) // 100 * 100)
