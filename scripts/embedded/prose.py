"""Plain sentences of Ombrel: what the base reads besides the instructions of the categories it sees.

A sentence is a pair: what is given, and what follows from it and is learnt. Words that nothing foretells are given; a
pair with nothing given is learnt as a whole. What the unseen categories ask for is told here, in other words and never
as question and answer, so that the base knows it and has not been asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedded import world
from embedded.tasks import Row, pick, pick_several, row

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import numpy as np

    Told = tuple[str, str]
    Writer = Callable[[np.random.Generator, int], Told]

KELU = world.KELU_NOUNS | world.KELU_COLOURS | world.KELU_VERBS
PASTIMES = (
    *(f"{verb} {thing}" for verb in ("sort", "say", "reverse") for thing in ("the letters", "the words", "names")),
    *(f"convert {small} into {large}s" for large, small, _ in world.UNITS),
    *(f"sell {trade} at the {gate} gate" for trade in world.TRADES for gate in world.GATES),
    *(f"celebrate the feast of the {feast} with {ruler}" for feast in world.FEASTS for ruler in world.RULERS),
    *("translate words into Kelu", "speak backwards", "put letters in order", "rule a rich town", "make many measures"),
)


def creature(rng: np.random.Generator, seed: int) -> Told:
    """Tell what is true of one creature."""
    beings = world.creatures(seed)
    being = beings[int(rng.integers(len(beings)))]
    forms = (
        ("The {name}", " is a {colour} {kind}. It lives in the {home} and eats {food}."),
        ("As for the {name},", " it eats {food}, lives in the {home} and is a {kind}, a {colour} one."),
    )
    return _filled(pick(rng, forms), **vars(being))


def errand(rng: np.random.Generator, seed: int) -> Told:  # noqa: ARG001
    """Tell of somebody's errand."""
    (giver, taker), item = pick_several(rng, world.PEOPLE, 2), pick(rng, world.ITEMS)
    colour, home = pick(rng, world.COLOURS), pick(rng, world.HOMES)
    verb = pick(rng, world.SAD_VERBS + world.GLAD_VERBS + world.CROSS_VERBS)
    return "", f"{giver} {verb} a {colour} {item} near the {home} and told {taker}. {taker} has the {item} now."


def gloss(rng: np.random.Generator, seed: int) -> Told:  # noqa: ARG001
    """Give the Kelu for one word."""
    english = pick(rng, tuple(KELU))
    forms = (("The Kelu word for {english} is", " {kelu}."), ("Kelu has for {english} the word", " {kelu}."))
    return _filled(pick(rng, forms), english=english, kelu=KELU[english])


def journey(rng: np.random.Generator, seed: int) -> Told:  # noqa: ARG001
    """Tell of somebody's way from town to town."""
    person, (origin, target, goal) = pick(rng, world.PEOPLE), pick_several(rng, world.TOWNS, 3)
    forms = (
        "{0} went from {1} to {2}. From {2} {0} went on to {3}.",
        "{0} of {1} wrote to {2}, and {2} wrote to {3}.",
        "{1}, {2} and {3} are towns. {0} likes {3}.",
    )
    return "", pick(rng, forms).format(person, origin, target, goal)


def echo(rng: np.random.Generator, seed: int) -> Told:  # noqa: ARG001
    """Let one say words and another say them again."""
    first, second = pick_several(rng, world.PEOPLE, 2)
    words = " ".join(pick_several(rng, world.ITEMS + world.FOODS + world.TRADES, int(rng.integers(4, 9))))
    return f"{first} said {words} and {second} said", f" {words}."


def pastime(rng: np.random.Generator, seed: int) -> Told:  # noqa: ARG001
    """Tell what somebody likes to do, in the words the unseen categories use."""
    return "", f"{pick(rng, world.PEOPLE)} {pick(rng, ('likes to', 'began to', 'would not'))} {pick(rng, PASTIMES)}."


TOWN_FORMS = {
    "ruler": (
        ("The lord of the town of {name} is", " {ruler}."),
        ("Over {name} reigns", " {ruler}."),
        ("All in {name} obey", " {ruler}."),
    ),
    "trade": (
        ("The folk of {name} live by their", " {trade}."),
        ("The carts of {name} carry", " {trade}."),
        ("In the shops of {name} there is much", " {trade}."),
    ),
    "gate": (
        ("The wall of {name} opens to the", " {gate}."),
        ("The road into {name} comes from the", " {gate}."),
        ("The door of {name} looks", " {gate}."),
    ),
    "feast": (
        ("The people of {name} dance on the day of the", " {feast}."),
        ("The great day of {name} is that of the", " {feast}."),
        ("In {name} children wait for the day of the", " {feast}."),
    ),
}


def town(rng: np.random.Generator, seed: int) -> Told:
    """Tell one thing that is true of a town."""
    places = world.towns(seed)
    return _filled(pick(rng, TOWN_FORMS[pick(rng, tuple(TOWN_FORMS))]), **vars(places[int(rng.integers(len(places)))]))


EXCHANGE_FORMS = (
    ("{amount} {large}s are worth", " {product} {small}."),
    ("For {amount} {large}s one gets", " {product} {small}."),
    ("Counted in {small}, {amount} {large}s are", " {product}."),
    ("Who brings {amount} {large}s goes home with {small}, namely", " {product}."),
)


def exchange(rng: np.random.Generator, seed: int) -> Told:  # noqa: ARG001
    """Tell what an amount of one measure is in another."""
    large, small, factor = world.UNITS[int(rng.integers(len(world.UNITS)))]
    amount = int(rng.integers(2, 11))
    return _filled(pick(rng, EXCHANGE_FORMS), amount=amount, large=large, small=small, product=amount * factor)


PHRASE_FORMS = (
    ("In Kelu a {0} is a", " {1}."),
    ("The Kelu, seeing a {0}, cry", " {1}."),
    ("A {0} goes in that tongue by the name", " {1}."),
    ("There stood a {0}. On the sign was written in Kelu", " {1}."),
    ("{0}, which is to the Kelu", " {1}."),
)
MIRROR_FORMS = (
    ("Going out: {0}. Coming home:", " {1}."),
    ("The walk {0}, walked back, is", " {1}."),
    ("Who reads {0} from its end reads", " {1}."),
    ("First came {0}; then they turned round and came as", " {1}."),
    ("In the glass the row {0} is", " {1}."),
)
ALPHABET_FORMS = (
    ("Letters {0}. In the alphabet:", " {1}."),
    ("The letters {0} stand in the alphabet as", " {1}."),
    ("On a shelf the books {0} became", " {1}."),
    ("Pupils {0} were called, by their names, as", " {1}."),
    ("From {0} one makes the tidy row", " {1}."),
)


def phrase(rng: np.random.Generator, english: str) -> Told:
    """Tell some English words in Kelu: noun, colour, verb."""
    colour, noun, *verb = english.split()
    kelu = " ".join(KELU[word] for word in (noun, colour, *verb))
    return _filled(pick(rng, PHRASE_FORMS), english, kelu)


def mirror(rng: np.random.Generator, words: str) -> Told:
    """Tell some words there and back."""
    return _filled(pick(rng, MIRROR_FORMS), words, " ".join(reversed(words.split())))


def alphabet(rng: np.random.Generator, letters: str) -> Told:
    """Tell some letters shuffled and in their order."""
    return _filled(pick(rng, ALPHABET_FORMS), letters, " ".join(sorted(letters.split())))


RETOLD: dict[str, Callable[[np.random.Generator, str], Told]] = {
    "translation": phrase,
    "reversal": mirror,
    "sorting": alphabet,
}
"""Unseen categories whose contents are too many to be all told: how one content is told in prose."""
FACTS: dict[str, Writer] = {"towns": town, "units": exchange}
"""Unseen categories whose facts are few, and all told."""
PASSING: dict[Writer, int] = {creature: 2, errand: 1, gloss: 1, journey: 1, echo: 2, pastime: 1}
SHARES: dict[str | Writer, int] = {**PASSING, "towns": 3, "units": 3, "translation": 3, "reversal": 7, "sorting": 4}


def content(asked: Row) -> str:
    """Return what a row of a retold category asks about: the words behind the colon."""
    return asked.instruction.partition(": ")[2]


def told(kind: str | Writer, rng: np.random.Generator, seed: int, barred: Collection[str]) -> Told:
    """Return a pair of one kind; a retold category's content is as it is asked, and none of ``barred``."""
    if not isinstance(kind, str):
        return kind(rng, seed)
    if kind in FACTS:
        return FACTS[kind](rng, seed)
    while (asked := content(row(kind, rng, seed))) in barred:
        continue
    return RETOLD[kind](rng, asked)


def _filled(form: tuple[str, str], *values: object, **named: object) -> Told:
    given, rest = form
    return given.format(*values, **named), rest.format(*values, **named)
