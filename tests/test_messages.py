"""Every error says what to do: as far as the source can show, its message has a clause that begins with a verb."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fedloom"
ERRORS = {
    node.name for node in ast.parse((SOURCE / "errors.py").read_text("utf-8")).body if isinstance(node, ast.ClassDef)
}

VERBS = (
    *("add", "answer", "ask", "build", "call", "change", "check", "choose", "convert", "correct", "decode", "drop"),
    *("export", "fetch", "fill", "finish", "fix", "free", "give", "install", "judge", "keep", "leave", "load", "lower"),
    *("make", "mend", "name", "narrow", "open", "pad", "quote", "raise", "regenerate", "remove", "rename", "repeat"),
    *("resend", "restore", "run", "save", "score", "see", "send", "serve", "set", "shorten", "sort", "start", "take"),
    *("train", "try", "update", "upgrade", "use", "wait", "write"),
)
"""The imperatives with which our messages begin an action. A new one is added here when a message needs it."""
ADVICE = ("remedy", "advice", "advice_after", "action", "unfinished_note")
"""Names of values, attributes and functions that hold an action, whose text another place gives."""
ACTION = re.compile(rf"(?:^|[;:] |, or |\bthen )(?:if [^,;]+, )?(?:{'|'.join(VERBS)})\b")
COMPLETE = {"MissingExtraError"}
"""Errors that say what to do themselves: the command that installs the extra."""

PROGRAMMING = "a programming error, not a user's mistake"
FROM_A_CLIENT = "a client's message: the server drops the client and records this as the reason"
WITHOUT_ACTION = {
    "data/division.py:divide": (1, PROGRAMMING),
    "data/layouts.py:write_shepherd": (1, PROGRAMMING),
    "data/partition.py:Partition.__post_init__": (3, PROGRAMMING),
    "evaluation/exact_match.py:score_matches": (1, PROGRAMMING),
    "evaluation/judge/endpoint.py:Endpoint.chat": (1, PROGRAMMING),
    "evaluation/perplexity.py:compare_perplexity": (1, PROGRAMMING),
    "evaluation/perplexity.py:measure_perplexity": (1, PROGRAMMING),
    "federation/messages.py:_unblob": (1, FROM_A_CLIENT),
    "reporting/tables.py:compare": (1, PROGRAMMING),
    "run_folder/writer.py:RunFolder.write_round": (1, PROGRAMMING),
    "split/cut_messages.py:SplitMessage.from_bytes": (1, FROM_A_CLIENT),
    "split/cut_messages.py:check_activations": (2, FROM_A_CLIENT),
    "split/local_parties.py:local_parties": (1, PROGRAMMING),
}
"""Places whose message needs no action: how many such messages, and the reason."""

TO_DO = Counter(
    {
        "assembly/round_plan.py:strategy_of": 1,
        "config/comparison.py:check_seeds": 1,
        "data/chat.py:_apply": 1,
        "data/json_rows.py:_as_row": 1,
        "data/json_rows.py:_check_surrogates": 1,
        "data/json_rows.py:_value": 1,
        "data/json_rows.py:rows_of_lines": 1,
        "data/json_rows.py:rows_of_list": 1,
        "data/partition.py:Partition.load": 3,
        "data/partition.py:_refuse_empty": 1,
        "data/records.py:_check_columns": 1,
        "data/records.py:_parse_shape": 1,
        "data/records.py:_text": 1,
        "data/records.py:_turns": 3,
        "data/records.py:_value": 1,
        "data/schemes.py:_check_positive": 1,
        "data/schemes.py:_check_sizes": 1,
        "data/schemes.py:by_category": 1,
        "data/sources.py:Rows.column": 1,
        "data/sources.py:_files_of_folder": 1,
        "data/sources.py:_hub_split": 1,
        "data/sources.py:_read_csv": 1,
        "data/sources.py:_read_parquet": 1,
        "data/sources.py:_reader": 1,
        "data/templates.py:_build": 1,
        "data/templates.py:_checked": 3,
        "data/templates.py:load_template": 2,
        "data/tokenizer.py:load_tokenizer": 1,
        "evaluation/choice/questions.py:_from_json": 3,
        "evaluation/choice/questions.py:_index": 1,
        "evaluation/choice/questions.py:_question": 2,
        "evaluation/choice/questions.py:_read_csv": 1,
        "evaluation/choice/questions.py:read_mmlu": 1,
        "evaluation/choice/questions.py:read_questions": 2,
        "evaluation/e2e/e2e_files.py:_bar_lines": 1,
        "evaluation/e2e/e2e_files.py:_checked": 1,
        "evaluation/e2e/e2e_files.py:_read": 1,
        "evaluation/e2e/e2e_files.py:_table": 2,
        "evaluation/e2e/e2e_files.py:matched_texts": 1,
        "evaluation/e2e/scorer.py:_check": 1,
        "evaluation/judge/judge_prompts.py:JudgePrompt.messages": 1,
        "evaluation/judge/judge_prompts.py:read_prompts": 2,
        "evaluation/judge/judge_questions.py:_rows": 3,
        "evaluation/judge/judge_questions.py:_turns": 1,
        "evaluation/judge/judge_questions.py:read_judge_questions": 1,
        "evaluation/lm_harness.py:run_harness_tasks": 1,
        "evaluation/perplexity.py:plain_text_rows": 1,
        "evaluation/text_files.py:read_utf8": 1,
        "federation/validation.py:check_update": 5,
        "methods/combination.py:_shares": 1,
        "methods/combination.py:aggregate": 1,
        "preview/description.py:_skeleton": 1,
        "recipes/__init__.py:describe": 1,
        "reporting/report.py:_check_begun": 1,
        "reporting/report.py:write_report": 1,
        "results/suite_runs.py:_e2e": 1,
        "results/suite_runs.py:_path": 1,
        "results/suite_scores.py:Asked.__post_init__": 2,
        "results/suite_scores.py:score_suite": 1,
        "run_folder/durable.py:read_json": 1,
        "run_folder/reader.py:find_runs": 1,
        "run_folder/reader.py:read_run": 1,
        "run_folder/writer.py:RunFolder.read_round_file": 1,
        "split/cost_model.py:suggest_cut": 1,
        "split/leakage.py:_check_texts": 2,
        "split/plan.py:SplitPlan.check": 1,
        "split/plan.py:block_of": 1,
        "split/split_state.py:SplitState.from_tensors": 1,
    }
)
"""Places whose message still lacks an action, and how many. Write the action, then take the place out of this list."""


def places() -> Iterator[tuple[str, str]]:
    """Yield ``file:function`` and the message of every error that is raised without an action."""
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        constants = constants_of(tree)
        for function, error, arguments in raises(tree):
            message = "; ".join(text_of(argument, constants) for argument in arguments)
            if error not in COMPLETE and not says_what_to_do(message):
                yield f"{module}:{function}", message


def raises(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str, list[ast.expr]]]:
    """Yield (function, name, arguments) of every ``raise`` of one of our errors."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield from raises(node, f"{function}.{name}".strip("."))
                continue
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=arguments)) if name in ERRORS:
                yield function, name, arguments
        yield from raises(node, function)


def constants_of(tree: ast.Module) -> dict[str, str]:
    """Return a module's constants of text."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def text_of(node: ast.expr, constants: dict[str, str]) -> str:
    """Return a message as it is written, with ``{expression}`` for what is filled in."""
    match node:
        case ast.Constant(value=str() as value):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part, constants) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.FormattedValue(value=value):
            return f"{{{ast.unparse(value)}}}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left, constants) + text_of(right, constants)
        case _:
            return f"{{{ast.unparse(node)}}}"


def says_what_to_do(message: str) -> bool:
    """Tell whether a message has an action, or is only the message of another place passed on."""
    own = re.sub(r"\{[^{}]*\}", "", message)
    if not re.search(r"[a-zA-Z]{2}", own):
        return True
    filled_in = re.findall(r"\{([^{}]*)\}", message)
    advised = any(re.search(rf"(?:^|\.)(?:{'|'.join(ADVICE)})\b", value) for value in filled_in)
    return advised or bool(ACTION.search(re.sub(r"\{[^{}]*\}", "{}", message)))


def needless() -> Counter[str]:
    """Return how many messages of each place need no action."""
    return Counter({place: number for place, (number, _) in WITHOUT_ACTION.items()})


def test_every_error_says_what_to_do() -> None:
    found = Counter(place for place, _ in places())
    allowed = TO_DO + needless()
    excess = {place for place in found if found[place] > allowed[place]}
    assert not [f"{place}: {message}" for place, message in places() if place in excess]


def test_the_list_of_errors_without_an_action_only_shrinks() -> None:
    found = Counter(place for place, _ in places())
    listed = TO_DO + needless()
    assert not {
        place: f"{found[place]} of {number} are left" for place, number in listed.items() if found[place] < number
    }


@pytest.mark.parametrize(
    ("message", "has_action"),
    [
        ("rank: expected 1 to {largest}, got {rank}; choose a lower rank", True),
        ("{path}: damaged ({error}); if it is elsewhere, give it with --base FOLDER", True),
        ("{name}: expected finite numbers, got NaN; {remedy}", True),
        ("{where}: {problem}", True),
        ("{path}: expected JSON, got {error}", False),
        ("expected a whole message, the name is missing", False),
    ],
)
def test_an_action_is_told_from_a_description(message: str, has_action: bool) -> None:
    assert says_what_to_do(message) is has_action
