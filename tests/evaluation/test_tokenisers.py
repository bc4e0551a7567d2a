"""The expected words were printed by mteval-v13a's rules and by Stanford's PTBTokenizer 3.4.1, not by this code."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedloom.evaluation.e2e.e2e_files import read_references
from fedloom.evaluation.e2e.tokenisers import PUNCTUATION, mteval_words, ptb_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Blue Spice, near Café X.", "blue spice , near café x ."),
        ("It costs £20-25 (or $3.50)!", "it costs £20 - 25 ( or $ 3.50 ) !"),
        ("family-friendly isn't 1,000", "family-friendly isn't 1,000"),
        ("Fish &amp; chips", "fish & chips"),
    ],
)
def test_mteval_words(text: str, words: str) -> None:
    assert mteval_words(text) == tuple(words.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It isn't kid-friendly; they're £20-25.", "it is n't kid-friendly they 're # 20-25"),
        ("A 3-out-of-5 rating, 1,000 people, 10:30.", "a 3-out-of-5 rating 1,000 people 10:30"),
        ("near St. John's and the U.K. etc.", "near st. john 's and the u.k. etc."),
        ("city center., next", "city center. next"),
        ("You cannot say 'hello' \"there\" -- no... yes", "you can not say hello there no yes"),
        ("R&B at 5 o'clock in www.a.com, 5/5 or -5", "r&b at 5 o'clock in www.a.com 5/5 or -5"),
        ("wait what?! (aside)", "wait what ?! -lrb- aside -rrb-"),
    ],
)
def test_ptb_words(text: str, words: str) -> None:
    assert ptb_words(text) == tuple(words.split())


def stanford_words(texts: list[str], folder: Path) -> list[tuple[str, ...]]:
    spec = find_spec("pycocoevalcap")
    places = (spec.submodule_search_locations or []) if spec else []
    if not places or shutil.which("java") is None:
        pytest.skip("the Java tokeniser is absent")
    (folder / "texts").write_text("\n".join(texts) + "\n", encoding="utf-8")
    jar = Path(next(iter(places)), "tokenizer", "stanford-corenlp-3.4.1.jar")
    options = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), *options, str(folder / "texts")]
    lines = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout.split("\n")
    return [tuple(word for word in line.split() if word not in PUNCTUATION) for line in lines[:-1]]


@pytest.mark.data
@pytest.mark.slow
def test_ptb_words_are_the_java_programs_on_every_human_text_of_the_test_set(data_dir: Path, tmp_path: Path) -> None:
    references = read_references(data_dir / "e2e" / "testset_w_refs.csv")
    texts = [" ".join(text.split()) for group in references.texts for text in group]
    assert [ptb_words(text) for text in texts] == stanford_words(texts, tmp_path)
