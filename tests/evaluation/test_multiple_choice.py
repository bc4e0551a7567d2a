from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.errors import DataError, EvaluationError
from fedloom.evaluation.choice.multiple_choice import answer_questions, tokenised_groups
from fedloom.evaluation.choice.question_prompts import Answering, prompt_text
from fedloom.evaluation.choice.questions import Question, read_mmlu, read_questions
from fedloom.evaluation.choice.shared_prefix import Query, continuation_nats, nats_from_scratch, shared_prefix
from fedloom.evaluation.intervals import paired_differences

QUESTIONS = [
    Question(f"What is {i} + {i}?", (str(2 * i), "many", "no idea", "0"), i % 4, "sums" if i % 2 else "adding_up")
    for i in range(12)
]
EXAMPLES = [Question("One?", ("1", "2", "3", "4"), 0, subject) for subject in ("sums", "adding_up")] * 2


def own_nats(model: Any, prompt: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([[*prompt, *continuation]])
    log_probabilities = model(ids).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
    return -sum(float(log_probabilities[place, token]) for place, token in zip(places, continuation, strict=True))


def test_shared_prefixes_change_no_likelihood(model: Any) -> None:
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 1], [5, 6, 7, 8, 2, 3, 4]]
    continuations = [[[1], [2, 3], [4, 5, 6]], [[9], [8]], [[7, 7, 7, 7], [1, 2]]]
    queries = [Query(*pair) for pair in zip(prompts, continuations, strict=True)]
    assert shared_prefix(queries) == [5, 6, 7]
    for budget in (1, 1000):
        found = continuation_nats(model, queries, token_budget=budget)
        scratch = nats_from_scratch(model, queries, token_budget=budget)
        for query, shared, alone in zip(queries, found, scratch, strict=True):
            expected = [own_nats(model, list(query.prompt), list(words)) for words in query.continuations]
            np.testing.assert_allclose(shared, expected, atol=1e-10)
            np.testing.assert_allclose(alone, expected, atol=1e-10)


def test_a_single_query_and_prompts_of_one_token_work(model: Any) -> None:
    [nats] = continuation_nats(model, [Query([3], [[1, 2], [4]])], token_budget=10)
    np.testing.assert_allclose(nats, [own_nats(model, [3], [1, 2]), own_nats(model, [3], [4])], atol=1e-10)


@pytest.mark.parametrize("answering", list(Answering))
def test_a_constant_answer_scores_at_chance(model: Any, tokenizer: Any, answering: Answering) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()  # every token is equally likely, so one choice is always taken
    questions = [Question(f"{i}?", ("aa", "bb", "cc", "dd"), i % 4) for i in range(40)]
    answers = answer_questions(model, tokenizer, questions, shots=0, answering=answering)
    assert set(answers.predictions_N.tolist()) == {0}
    assert answers.micro.value == answers.chance == answers.shuffled == 0.25
    assert answers.micro.low < 0.25 < answers.micro.high
    uneven = answer_questions(model, tokenizer, questions[:3], shots=0, answering=answering)
    assert uneven.micro.value == pytest.approx(uneven.shuffled)


@pytest.mark.parametrize("answering", list(Answering))
def test_the_likeliest_answer_is_taken_as_if_each_were_scored_alone(
    model: Any, tokenizer: Any, answering: Answering
) -> None:
    answers = answer_questions(model, tokenizer, QUESTIONS, EXAMPLES, shots=1, answering=answering)
    for index, question in enumerate(QUESTIONS):
        example = [one for one in EXAMPLES if one.subject == question.subject][:1]
        prompt = list(prompt_text(question, example, answering).encode())
        texts = question.choices if answering is Answering.TEXT else "ABCD"
        scores = [own_nats(model, prompt, list(f" {text}".encode())) for text in texts]
        if answering is Answering.TEXT:
            scores = [score / len(text) for score, text in zip(scores, texts, strict=True)]
        assert answers.predictions_N[index] == np.argmin(scores)


def test_averages_by_question_and_by_subject_differ_as_defined(model: Any, tokenizer: Any) -> None:
    questions = [*QUESTIONS, Question("Lone?", ("a", "b", "c", "d"), 3, "single")]
    answers = answer_questions(model, tokenizer, questions, shots=0)
    assert answers.micro.n == 13
    assert answers.micro.value == pytest.approx(answers.correct_N.mean())
    subjects = {question.subject for question in questions}
    assert set(answers.per_subject) == subjects
    assert answers.macro.value == pytest.approx(np.mean([one.value for one in answers.per_subject.values()]))
    for name, average in (("micro", answers.micro), ("macro", answers.macro)):
        found = answers.items[name]
        assert found.score(found.statistics_NS.sum(axis=0)) == pytest.approx(average.value)


def test_the_prompt_is_the_usual_one() -> None:
    question = Question("Q?", ("x", "y"), 1, "high_school_physics")
    assert prompt_text(question, [question], Answering.LETTER) == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "Q?\nA. x\nB. y\nAnswer: B\n\nQ?\nA. x\nB. y\nAnswer:"
    )
    assert prompt_text(question, [question], Answering.TEXT) == "Question: Q?\nAnswer: y\n\nQuestion: Q?\nAnswer:"


def test_examples_that_do_not_fit_are_dropped_and_counted(model: Any, tokenizer: Any) -> None:
    long_example = Question("L" * 60, ("1", "2", "3", "4"), 0, "s")
    questions = [Question("short?", ("1", "2", "3", "4"), 0, "s"), Question("M" * 300, ("1", "2", "3", "4"), 0, "s")]
    answers = answer_questions(model, tokenizer, questions, [long_example] * 5, shots=5)
    assert answers.num_with_fewer_shots == 2
    assert answers.num_truncated == 1
    assert 0 < answers.mean_shots < 5


def test_a_paired_comparison_of_a_model_with_itself_is_noise(model: Any, tokenizer: Any) -> None:
    answers = answer_questions(model, tokenizer, QUESTIONS, shots=0)
    differences = paired_differences(answers.items, answers.items, seed=0, resamples=50)
    assert set(differences) == {"micro", "macro"}
    assert not any(difference.exceeds_noise for difference in differences.values())


def test_missing_examples_and_questions_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="expected 2 examples of adding_up for 2 shots, got 0"):
        answer_questions(model, tokenizer, QUESTIONS, shots=2)
    with pytest.raises(EvaluationError, match="expected at least one question to answer"):
        answer_questions(model, tokenizer, [], shots=0)


def test_mmlu_is_read_with_and_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "anatomy_test.csv").write_text(
        'question,choice0,choice1,choice2,choice3,answer\n"a,b",1,2,3,4,2\n'
    )
    (tmp_path / "test" / "law_test.csv").write_text("q,1,2,3,4,D\n")
    assert read_mmlu(tmp_path) == [
        Question("a,b", ("1", "2", "3", "4"), 2, "anatomy"),
        Question("q", ("1", "2", "3", "4"), 3, "law"),
    ]


def test_absent_questions_say_where_they_are_expected(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"test: expected MMLU's CSV files, .*, found none; name"):
        read_mmlu(tmp_path)
    with pytest.raises(EvaluationError, match=r"none.jsonl: expected a file of JSON lines .*, found none; check"):
        read_questions(tmp_path / "none.jsonl")


@pytest.mark.parametrize("answer", [1, "1", "B", "b", "two"])
def test_an_answer_is_an_index_a_letter_or_a_text(tmp_path: Path, answer: object) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "q", "choices": ["one", "two", "three"], "answer": answer}) + "\n\n")
    assert read_questions(file)[0].answer == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "choices": [], "answer": 0}', "line 1: expected 2 to 26 choices, got 0"),
        ('{"question": "q", "answer": 0}', "expected the keys question, choices and answer"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 7}', "of one of the 2 choices as answer, got '7'"),
        ('{"question": " ", "choices": ["a", "b"], "answer": 1}', "expected a question, got an empty text"),
        ("no json", "line 1: expected one JSON object per line"),
        ('{"question": "q", "question": "r"}', "q.jsonl line 1: expected every key once"),
    ],
)
def test_a_broken_question_is_refused_with_its_place(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(line + "\n")
    with pytest.raises((EvaluationError, DataError), match=message):
        read_questions(file)


@pytest.mark.data
def test_all_of_mmlu_is_read(data_dir: Path) -> None:
    questions = read_mmlu(data_dir / "mmlu")
    assert len(questions) == 14_042
    assert len({question.subject for question in questions}) == 57
    assert len(read_mmlu(data_dir / "mmlu", "dev")) == 285


def test_groups_hold_every_question_once_and_share_their_examples(tokenizer: Any, model: Any) -> None:
    groups = tokenised_groups(model, tokenizer, QUESTIONS, EXAMPLES, shots=1)
    assert sorted(map(len, groups)) == [6, 6]
    for queries in groups:
        assert bytes(shared_prefix(queries)).startswith(b"The following are multiple choice questions")
        assert bytes(shared_prefix(queries)).endswith(b"Answer: A\n\nWhat is ")
