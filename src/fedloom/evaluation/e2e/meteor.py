"""METEOR 1.5 by its original Java program (``-l en -norm``), and nothing else under that name.

The extra ``meteor`` brings the program and its paraphrase table (the pycocoevalcap package carries both); Java must be
on the PATH. Words come from :func:`fedloom.evaluation.e2e.tokenisers.ptb_words`, as in the COCO caption code.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import EvaluationError, MissingExtraError
from fedloom.evaluation.e2e.ngrams import Words
from fedloom.evaluation.intervals import Statistics

# English, ranking task: alpha, beta, gamma, delta; weights of exact, stem, synonym and paraphrase matches.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.20, 0.60, 0.75
_MODULE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_STOPPED = (
    "METEOR: expected an answer of its Java program, which has stopped: check 'java -version' and that 2 GB of memory "
    "are free, or drop METEOR from the metrics"
)


def meteor_command() -> list[str]:
    """Return the command that starts the program.

    Raises:
        MissingExtraError: the package that carries the program is not installed.
        EvaluationError: Java is not on the PATH.
    """
    spec = find_spec("pycocoevalcap")
    places = spec.submodule_search_locations or [] if spec else []
    jar = next((jar for place in places if (jar := Path(place, "meteor", "meteor-1.5.jar")).is_file()), None)
    if jar is None:
        raise MissingExtraError("meteor", "METEOR (the original Java program and its paraphrase table)")
    java = shutil.which("java")
    if java is None:
        raise EvaluationError(
            "METEOR: expected a Java runtime, found no 'java' on the PATH: install one, or drop METEOR from the metrics"
        )
    return [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]


def meteor_statistics(references: Sequence[Sequence[Words]], outputs: Sequence[Words]) -> tuple[Statistics, float]:
    """Return the program's statistics of each item, (N, 23), and its own score of all of them.

    Raises:
        MissingExtraError: the package that carries the program is not installed.
        EvaluationError: Java is absent, or the program stopped.
    """
    command = meteor_command()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
    ) as program:
        try:
            lines = [_ask(program, _score_line(*item)) for item in zip(references, outputs, strict=True)]
            answer = _ask(program, " ||| ".join(["EVAL", *lines]))
            for _ in lines:  # one score per item comes before the score of all
                answer = _read(program)
        finally:
            program.kill()
    statistics_NS = np.array([line.split() for line in lines], dtype=np.float64)
    statistics_NS[_is_perfect(statistics_NS), 20] = 0  # the program adds no chunk for a text equal to its reference
    return statistics_NS, float(answer)


def meteor(sums: Statistics) -> Statistics:
    """Return METEOR from the program's statistics summed over items, (..., 23) -> (...).

    P and R weigh content words δ and function words 1 − δ, and matches by module;
    F = P R / (α P + (1 − α) R); score = F (1 − γ (chunks / matched words)^β). Resampling uses this; the figure itself
    is always the program's.

    Source: Denkowski & Lavie, "Meteor Universal", 2014.
    """
    length, reference_length, function, reference_function = np.moveaxis(sums[..., :4], -1, 0)
    # by module: content words of output and reference, function words of output and reference
    by_module = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    matched = np.moveaxis(np.einsum("...mk,m->...k", by_module, _MODULE_WEIGHTS), -1, 0)
    precision = _weighted(matched[0], matched[2]) / np.maximum(_weighted(length - function, function), 1e-9)
    reference_words = _weighted(reference_length - reference_function, reference_function)
    recall = _weighted(matched[1], matched[3]) / np.maximum(reference_words, 1e-9)
    harmonic = precision * recall / np.maximum(_ALPHA * precision + (1 - _ALPHA) * recall, 1e-9)
    chunks, matches = sums[..., 20], (sums[..., 21] + sums[..., 22]) / 2
    fragmentation = chunks / np.maximum(matches, 1e-9)
    return np.asarray(harmonic * (1 - _GAMMA * fragmentation**_BETA))


def _weighted(content_words: Statistics, function_words: Statistics) -> Statistics:
    return _DELTA * content_words + (1 - _DELTA) * function_words


def _is_perfect(statistics_NS: Statistics) -> NDArray[np.bool_]:
    length, reference_length, chunks, matched, reference_matched = statistics_NS[:, [0, 1, 20, 21, 22]].T
    return np.asarray((matched == length) & (reference_matched == reference_length) & (chunks == 1))


def _score_line(references: Sequence[Words], output: Words) -> str:
    texts = [" ".join(words).replace("|||", "") for words in (*references, output)]
    return " ||| ".join(["SCORE", *texts])


def _ask(program: subprocess.Popen[str], line: str) -> str:
    assert program.stdin is not None
    try:
        program.stdin.write(line + "\n")
        program.stdin.flush()
    except OSError as error:
        raise EvaluationError(_STOPPED) from error
    return _read(program)


def _read(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    answer = program.stdout.readline()
    if not answer:
        raise EvaluationError(_STOPPED)
    return answer.strip()
