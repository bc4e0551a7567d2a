"""Ombrel, an invented world: its creatures, towns, measures and the language Kelu. Every word here is our own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fedloom import seeding

if TYPE_CHECKING:
    from collections.abc import Sequence


def _words(text: str) -> tuple[str, ...]:
    """Return the words of a line."""
    return tuple(text.split())


CREATURES = _words(
    "tarvel nibbin ostrum quorl darrow fenkle lumo pirrit grosk haldin mavvy sorrick "
    "tumbrel wexin yorrow zillet brack clovin emmer gurnop jassel kipper vantle rundle"
)
TOWNS = _words(
    "Aldwick Brenna Corvale Dunmoor Elsin Farrow Gilden Harrowby Istrel Jorvin Keld Lunder Marrish Norvale Ostry Pelham"
)
PEOPLE = _words("Mira Oto Sena Pim Rolf Tilda Ugo Wanda")

COLOURS = _words("red blue green white black yellow brown grey")
KINDS = _words("bird fish beast insect")
HOMES = _words("reeds caves hills trees sand river marsh snow")
FOODS = _words("moss seeds berries worms roots leaves honey shells")
TRADES = _words("salt glass wool paper rope tea copper clay")
RULERS = _words("Anselm Berit Cosmo Delia Edvin Fenna Gustav Hedda")
GATES = _words("north south east west")
FEASTS = _words("lantern harvest kite frost bread drum boat flower")

ITEMS = _words("lamp drum bell kite rope book cup stone boat key map coat")
SAD_VERBS = _words("lost broke missed dropped buried mourned")
GLAD_VERBS = _words("found won mended praised loved enjoyed")
CROSS_VERBS = _words("kicked cursed hated blamed smashed banned")

KELU_NOUNS = dict(
    zip(
        _words("bird fish lamp drum bell kite book cup stone boat key map"),
        _words("pela tesh dorum bakka inti vosh ruma kel gron wani zet olan"),
        strict=True,
    )
)
KELU_COLOURS = dict(zip(COLOURS, _words("mir azu velo nisha tokk sun brun asha"), strict=True))
KELU_VERBS = dict(
    zip(_words("sleeps falls sings burns waits shines"), _words("onu fara lili kash doma hela"), strict=True)
)

UNITS = (
    ("pell", "dobs", 2),
    ("stave", "nicks", 3),
    ("crate", "tubs", 4),
    ("span", "feres", 5),
    ("moon", "wakes", 6),
    ("purse", "groats", 10),
)


@dataclass(frozen=True)
class Creature:
    """A creature of Ombrel and what is true of it."""

    name: str
    kind: str
    colour: str
    home: str
    food: str


@dataclass(frozen=True)
class Town:
    """A town of Ombrel and what is true of it."""

    name: str
    ruler: str
    trade: str
    gate: str
    feast: str


def _balanced(seed: int, attribute: str, values: Sequence[str], count: int) -> list[str]:
    """Return ``count`` values, each as often as the others, in the order the named stream gives."""
    order = seeding.stream(seed, "world", attribute).permutation(count)
    return [values[index % len(values)] for index in order]


@cache
def creatures(seed: int) -> tuple[Creature, ...]:
    """Return every creature with its kind, colour, home and food."""
    attributes = {"kind": KINDS, "colour": COLOURS, "home": HOMES, "food": FOODS}
    columns = [_balanced(seed, f"creature {name}", values, len(CREATURES)) for name, values in attributes.items()]
    return tuple(Creature(*fields) for fields in zip(CREATURES, *columns, strict=True))


@cache
def towns(seed: int) -> tuple[Town, ...]:
    """Return every town with its ruler, trade, gate and feast."""
    attributes = {"ruler": RULERS, "trade": TRADES, "gate": GATES, "feast": FEASTS}
    columns = [_balanced(seed, f"town {name}", values, len(TOWNS)) for name, values in attributes.items()]
    return tuple(Town(*fields) for fields in zip(TOWNS, *columns, strict=True))
