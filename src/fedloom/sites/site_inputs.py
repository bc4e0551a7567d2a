"""What lies at a site and a run is made of: its base, and its rows as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedloom.data.encoding import Encoded, encode
from fedloom.data.groups import by_unit
from fedloom.data.holdout import hold_out, with_units
from fedloom.data.records import read_records
from fedloom.data.sources import load_rows
from fedloom.data.tokens import TokenSet
from fedloom.models.causal import context_of, longest_row
from fedloom.models.load import Base, BaseFolder, find_base, load_base
from fedloom.seeding import stream
from fedloom.sites.sheet import Sheet
from fedloom.sites.site_settings import SiteSettings


def find_site_base(site: SiteSettings) -> BaseFolder:
    """Find the base that lies at the site, without reading its weights.

    Raises:
        ModelError: it cannot be used.
    """
    model = site.model
    return find_base(
        model.base, tokenizer=model.tokenizer, device=model.device, trust_remote_code=model.trust_remote_code
    )


def load_site_base(site: SiteSettings) -> Base:
    """Load the base that lies at the site.

    Raises:
        ModelError: it cannot be loaded.
    """
    model = site.model
    return load_base(
        model.base,
        tokenizer=model.tokenizer,
        dtype=model.dtype,
        device=model.device,
        quantization=model.quantization,
        trust_remote_code=model.trust_remote_code,
    )


def encoded_rows(site: SiteSettings, sheet: Sheet, tokenizer: Any, config: Any) -> Encoded:
    """Return the site's rows as tokens, as the sheet says.

    Raises:
        DataError: they cannot be read or used.
    """
    rows = by_unit(load_rows(str(Path(site.data.path)), site.data.split), sheet.unit_column)
    return encode(
        read_records(rows, sheet.shape, site.data.columns),
        tokenizer,
        template=sheet.template.template(),
        date=sheet.template.day,
        max_length=longest_row(sheet.max_length, config),
        at_most=context_of(config),
        loss_on=sheet.loss_on,
        overlong=sheet.overlong,
        unanswered=sheet.unanswered,
    )


def divided(encoded: Encoded, fraction: float | None, seed: int) -> tuple[TokenSet, TokenSet | None]:
    """Return the rows that the site trains on, and those that it holds out, if any: a unit is not divided."""
    rows = encoded.tokens
    if fraction is None:
        return rows, None
    numbers = encoded.kept if rows.units is None else rows.units
    whole, units = np.unique(numbers, return_inverse=True)
    split = with_units(hold_out(len(whole), fraction, stream(seed, "hold-out")), units)
    return rows.select(split.kept), rows.select(split.held)
