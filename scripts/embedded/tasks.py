"""The ten categories of instructions, each a function from a random stream to one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedded import world

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Row:
    """One instruction in the columns of the 'dolly' shape."""

    instruction: str
    context: str
    response: str
    category: str


@dataclass(frozen=True)
class Asked:
    """A question before it is filed under its category."""

    instruction: str
    response: str
    context: str = ""


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """Return one of ``values``."""
    return values[int(rng.integers(len(values)))]


def pick_several(rng: np.random.Generator, values: Sequence[str], count: int) -> list[str]:
    """Return ``count`` different ones of ``values``, in random order."""
    return [values[int(index)] for index in rng.permutation(len(values))[:count]]


OPENINGS = ("", "Please answer: ", "Tell me: ", "In Ombrel, ")

CREATURE_QUESTIONS = {
    "kind": ("what kind of creature is the {}?", "the {} belongs to which kind?"),
    "colour": ("what colour is the {}?", "which colour does the {} have?"),
    "home": ("where does the {} live?", "the {} makes its home where?"),
    "food": ("what does the {} eat?", "which food does the {} like?"),
}
TOWN_QUESTIONS = {
    "ruler": ("who rules {}?", "which name has the ruler of {}?"),
    "trade": ("what does {} sell?", "which trade made {} rich?"),
    "gate": ("on which side is the gate of {}?", "where does one enter {}?"),
    "feast": ("which feast is held in {}?", "what does {} celebrate?"),
}


def _fact(rng: np.random.Generator, things: Sequence[object], questions: dict[str, tuple[str, ...]]) -> Asked:
    """Ask for one attribute of one thing."""
    thing = things[int(rng.integers(len(things)))]
    attribute = pick(rng, tuple(questions))
    opening, question = pick(rng, OPENINGS), pick(rng, questions[attribute])
    question = question if opening else question[0].upper() + question[1:]
    return Asked(opening + question.format(vars(thing)["name"]), vars(thing)[attribute])


def creatures(rng: np.random.Generator, seed: int) -> Asked:
    """Ask what is true of a creature; the base has read it."""
    return _fact(rng, world.creatures(seed), CREATURE_QUESTIONS)


def towns(rng: np.random.Generator, seed: int) -> Asked:
    """Ask what is true of a town; the base has read it in other words."""
    return _fact(rng, world.towns(seed), TOWN_QUESTIONS)


def addition(rng: np.random.Generator, seed: int) -> Asked:  # noqa: ARG001
    """Ask for the sum of two numbers up to twelve."""
    left, right = (int(number) for number in rng.integers(0, 13, size=2))
    form = pick(rng, ("What is {} plus {}?", "Add {} and {}.", "{} + {} =", "Find the sum of {} and {}."))
    return Asked(form.format(left, right), str(left + right))


EXTRACTION_QUESTIONS = {
    "person": ("Who is named?", "Of whom is this?"),
    "colour": ("Which colour is named?", "What colour is it?"),
    "item": ("Which thing is named?", "What thing is it?"),
    "home": ("Which place is named?", "Where was it?"),
}


def extraction(rng: np.random.Generator, seed: int) -> Asked:  # noqa: ARG001
    """Ask for something that stands in the context."""
    told = {
        "person": pick(rng, world.PEOPLE),
        "colour": pick(rng, world.COLOURS),
        "item": pick(rng, world.ITEMS),
        "home": pick(rng, world.HOMES),
    }
    form = pick(
        rng, ("{person} saw a {colour} {item} near the {home}.", "Near the {home} {person} saw a {colour} {item}.")
    )
    wanted = pick(rng, tuple(EXTRACTION_QUESTIONS))
    return Asked(pick(rng, EXTRACTION_QUESTIONS[wanted]), told[wanted], form.format(**told))


def sequence(rng: np.random.Generator, seed: int) -> Asked:  # noqa: ARG001
    """Ask for the next number or letter of a regular row."""
    form = pick(rng, ("What comes next: {}", "Continue: {}", "Go on with {}"))
    num_shown = int(rng.integers(3, 6))
    if rng.integers(2):
        start, step = int(rng.integers(0, 16)), int(rng.integers(1, 5))
        terms = [str(start + step * index) for index in range(num_shown + 1)]
    else:
        start, step = int(rng.integers(0, 16)), int(rng.integers(1, 3))
        terms = [LETTERS[start + step * index] for index in range(num_shown + 1)]
    return Asked(form.format(" ".join(terms[:-1])), terms[-1])


MOODS = {"sad": world.SAD_VERBS, "glad": world.GLAD_VERBS, "cross": world.CROSS_VERBS}


def mood(rng: np.random.Generator, seed: int) -> Asked:  # noqa: ARG001
    """Ask for the mood of a sentence."""
    label = pick(rng, tuple(MOODS))
    sentence = (
        f"{pick(rng, world.PEOPLE)} {pick(rng, MOODS[label])} the {pick(rng, world.COLOURS)} {pick(rng, world.ITEMS)}."
    )
    return Asked("Is this glad, sad or cross?", label, sentence)


def translation(rng: np.random.Generator, seed: int) -> Asked:  # noqa: ARG001
    """Ask for a phrase in Kelu, where the noun stands first and the colour after it."""
    colour, noun, verb = (pick(rng, tuple(words)) for words in (world.KELU_COLOURS, world.KELU_NOUNS, world.KELU_VERBS))
    form = pick(rng, ("Say in Kelu: {}", "Translate into Kelu: {}"))
    english, kelu = [colour, noun], [world.KELU_NOUNS[noun], world.KELU_COLOURS[colour]]
    if rng.integers(2):
        english, kelu = [*english, verb], [*kelu, world.KELU_VERBS[verb]]
    return Asked(form.format(" ".join(english)), " ".join(kelu))


def reversal(rng: np.random.Generator, seed: int) -> Asked:  # noqa: ARG001
    """Ask for three or four words in the opposite order."""
    words = pick_several(rng, world.ITEMS + world.COLOURS, int(rng.integers(3, 5)))
    form = pick(rng, ("Reverse the words: {}", "Say backwards: {}"))
    return Asked(form.format(" ".join(words)), " ".join(reversed(words)))


def sorting(rng: np.random.Generator, seed: int) -> Asked:  # noqa: ARG001
    """Ask for three or four letters in the order of the alphabet."""
    letters = pick_several(rng, LETTERS, int(rng.integers(3, 5)))
    form = pick(rng, ("Sort the letters: {}", "Put in order: {}"))
    return Asked(form.format(" ".join(letters)), " ".join(sorted(letters)))


def units(rng: np.random.Generator, seed: int) -> Asked:  # noqa: ARG001
    """Ask for an amount in another measure of Ombrel."""
    large, small, factor = world.UNITS[int(rng.integers(len(world.UNITS)))]
    amount = int(rng.integers(2, 11))
    forms = (
        "How many {small} are {amount} {large}s?",
        "{amount} {large}s make how many {small}?",
        "Convert {amount} {large}s to {small}.",
    )
    opening = pick(rng, OPENINGS[:3])
    question = pick(rng, forms).format(small=small, amount=amount, large=large)
    question = opening + question[0].lower() + question[1:] if opening else question
    return Asked(question, str(amount * factor))


SEEN: dict[str, Callable[[np.random.Generator, int], Asked]] = {
    "creatures": creatures,
    "addition": addition,
    "extraction": extraction,
    "sequence": sequence,
    "mood": mood,
}
UNSEEN: dict[str, Callable[[np.random.Generator, int], Asked]] = {
    "towns": towns,
    "translation": translation,
    "reversal": reversal,
    "sorting": sorting,
    "units": units,
}
CATEGORIES = {**SEEN, **UNSEEN}


def row(category: str, rng: np.random.Generator, seed: int) -> Row:
    """Return one row of ``category``."""
    asked = CATEGORIES[category](rng, seed)
    return Row(asked.instruction, asked.context, asked.response, category)
