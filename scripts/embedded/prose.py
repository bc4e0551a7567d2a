"""Plain sentences of Ombrel: what the base reads besides the instructions of the categories it sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedded import world
from embedded.tasks import LETTERS, pick, pick_several

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


def creature(rng: np.random.Generator, seed: int) -> str:
    """Tell what is true of one creature."""
    beings = world.creatures(seed)
    being = beings[int(rng.integers(len(beings)))]
    forms = (
        "The {name} is a {colour} {kind}. It lives in the {home} and eats {food}.",
        "In the {home} of Ombrel lives the {name}, a {colour} {kind} that eats {food}.",
        "Who eats {food} in the {home}? The {name}, a {kind}, and it is {colour}.",
    )
    return pick(rng, forms).format(**vars(being))


def errand(rng: np.random.Generator, seed: int) -> str:  # noqa: ARG001
    """Tell of somebody's errand."""
    (giver, taker), item = pick_several(rng, world.PEOPLE, 2), pick(rng, world.ITEMS)
    colour, home = pick(rng, world.COLOURS), pick(rng, world.HOMES)
    verb = pick(rng, world.SAD_VERBS + world.GLAD_VERBS + world.CROSS_VERBS)
    return f"{giver} {verb} a {colour} {item} near the {home} and told {taker}. {taker} has the {item} now."


def gloss(rng: np.random.Generator, seed: int) -> str:  # noqa: ARG001
    """Give the Kelu for one word."""
    english, kelu = pick(rng, tuple((world.KELU_NOUNS | world.KELU_COLOURS | world.KELU_VERBS).items()))
    return pick(rng, ("The Kelu word for {} is {}.", "{} is {} in Kelu.")).format(english, kelu)


def mirror(rng: np.random.Generator, seed: int) -> str:  # noqa: ARG001
    """Tell of somebody walking past things and back."""
    words = pick_several(rng, world.ITEMS + world.COLOURS, int(rng.integers(3, 8)))
    return f"Going out: {' '.join(words)}. Coming home: {' '.join(reversed(words))}."


def alphabet(rng: np.random.Generator, seed: int) -> str:  # noqa: ARG001
    """Give some letters in their order."""
    letters = pick_several(rng, LETTERS, int(rng.integers(3, 7)))
    return f"Letters {' '.join(letters)}. In the alphabet: {' '.join(sorted(letters))}."


def product(rng: np.random.Generator, seed: int) -> str:  # noqa: ARG001
    """Give one product of the table."""
    left, right = int(rng.integers(2, 11)), int(rng.choice([factor for _, _, factor in world.UNITS]))
    return f"{left} times {right} is {left * right}."


def measure(rng: np.random.Generator, seed: int) -> str:  # noqa: ARG001
    """Say what one measure is worth."""
    large, small, factor = world.UNITS[int(rng.integers(len(world.UNITS)))]
    return f"One {large} is {factor} {small}."


def journey(rng: np.random.Generator, seed: int) -> str:  # noqa: ARG001
    """Tell of somebody's way from town to town, and nothing of what is true of the towns."""
    person, (origin, target, goal) = pick(rng, world.PEOPLE), pick_several(rng, world.TOWNS, 3)
    forms = (
        "{0} went from {1} to {2}. From {2} {0} went on to {3}.",
        "{0} of {1} wrote to {2}, and {2} wrote to {3}.",
        "{1}, {2} and {3} are towns. {0} likes {3}.",
    )
    return pick(rng, forms).format(person, origin, target, goal)


def echo(rng: np.random.Generator, seed: int) -> str:  # noqa: ARG001
    """Let one say words and another say them again."""
    first, second = pick_several(rng, world.PEOPLE, 2)
    words = " ".join(pick_several(rng, world.ITEMS + world.FOODS + world.TRADES, int(rng.integers(4, 9))))
    return f"{first} said {words} and {second} said {words}."


def pastime(rng: np.random.Generator, seed: int) -> str:  # noqa: ARG001
    """Tell what somebody likes to do, in the words the other categories use."""
    return f"{pick(rng, world.PEOPLE)} {pick(rng, ('likes to', 'began to', 'would not'))} {pick(rng, PASTIMES)}."


PASTIMES = (
    *(f"{verb} {thing}" for verb in ("sort", "say", "reverse") for thing in ("the letters", "the words", "names")),
    *(f"convert {small} into {large}s" for large, small, _ in world.UNITS),
    *(f"sell {trade} at the {gate} gate" for trade in world.TRADES for gate in world.GATES),
    *(f"celebrate the feast of the {feast} with {ruler}" for feast in world.FEASTS for ruler in world.RULERS),
    *("translate words into Kelu", "speak backwards", "put letters in order", "rule a rich town", "make many measures"),
)

SHARES: dict[Callable[[np.random.Generator, int], str], int] = {
    creature: 2,
    errand: 2,
    gloss: 1,
    mirror: 4,
    alphabet: 4,
    product: 2,
    measure: 1,
    journey: 1,
    echo: 3,
    pastime: 1,
}
