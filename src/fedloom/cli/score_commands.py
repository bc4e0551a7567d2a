"""score and judge: the outputs of any system against references, two results before a judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import JsonOption, RoundOption
from fedloom.cli.output import print_result, say
from fedloom.errors import SettingsError

if TYPE_CHECKING:
    from fedloom.evaluation.judge.asking import CallEstimate

app = typer.Typer(help="Score the outputs of any system; no model needed.", no_args_is_help=True)


@app.command("e2e")
def score_e2e(
    references: Annotated[
        Path,
        typer.Option("--references", metavar="FILE", help="Human texts: CSV (mr,ref), mr||ref lines, or blocks."),
    ],
    outputs: Annotated[
        Path, typer.Option("--outputs", metavar="FILE", help="One text per meaning representation: TSV or lines.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Score outputs by BLEU, NIST, METEOR, ROUGE_L and CIDEr, as the official E2E scorer does."""
    from fedloom.results.output_scores import score_files

    print_result(score_files(references, outputs), as_json=as_json)


def judge(
    result: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a PEFT adapter.", show_default=False)],
    endpoint: Annotated[
        str,
        typer.Option("--endpoint", metavar="URL", help="A server with OpenAI's chat protocol, e.g. https://host/v1."),
    ],
    judge_model: Annotated[
        str, typer.Option("--judge", metavar="MODEL", help="Name of the judge model on that server.")
    ],
    questions: Annotated[
        Path,
        typer.Option("--questions", metavar="FILE", help="JSON lines with question_id, turns (or text), category."),
    ],
    against: Annotated[
        str, typer.Option("--against", metavar="RUN_OR_BASE", help="Another result, or `base`.")
    ] = "base",
    protocol: Annotated[str, typer.Option("--protocol", metavar="NAME", help="`fedit` or `mt-bench`.")] = "fedit",
    references: Annotated[
        Path | None,
        typer.Option("--references", metavar="FILE", help="Reference answers, for MT-bench's math, reasoning, coding."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Judge prompts in FastChat's form. Default: ours.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Largest number of questions.")
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help="Largest number of tokens per answer; never over half the base's context.",
        ),
    ] = 256,
    client: Annotated[int | None, typer.Option("--client", metavar="K", help="A client's own adapter.")] = None,
    round: RoundOption = None,
    base: Annotated[str | None, typer.Option("--base", metavar="FOLDER", help="The base model.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for answers and verdicts.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let a judge compare a result's answers with another's, or with the base's.

    The key is read from the variable FEDLOOM_JUDGE_KEY; that of OPENAI_API_KEY is sent to OpenAI and this machine only.
    """
    from fedloom.evaluation.judge.endpoint import Endpoint
    from fedloom.results import judgement, opened_result
    from fedloom.results.held_out import BASE

    if protocol not in list(judgement.Protocol):
        raise SettingsError(f"--protocol: expected fedit or mt-bench, got {protocol!r}; choose one of these")
    bench = judgement.Bench(questions, references, prompts, max_new_tokens, limit)
    asked = Endpoint(endpoint, judge_model)
    judgement.check(asked, bench)
    opened = opened_result.open_result(result, base=base, client=client, round=round)
    ours = judgement.only_adapter(opened)
    folder = out or default_folder(result)
    judgement.check_folder(folder)
    say_length(judgement.answer_tokens(opened, bench), max_new_tokens)
    second = (result.name, judgement.answers_of(opened, ours, bench, folder, say_decoding))
    if against == BASE:
        first = (BASE, judgement.answers_of(opened, BASE, bench, folder, say_decoding))
    else:
        rival = opened_result.open_result(Path(against), base=base)
        name = judgement.only_adapter(rival)
        length = judgement.answer_tokens(rival, bench)
        if length != judgement.answer_tokens(opened, bench):
            say_length(length, max_new_tokens)
        first = (Path(against).name, judgement.answers_of(rival, name, bench, folder, say_decoding))
    judged = judgement.judge(
        judgement.Protocol(protocol),
        asked,
        bench,
        first,
        second,
        cache=folder / "verdicts.sqlite",
        on_estimate=say_estimate,
        on_verdict=lambda done, total: say(f"verdict {done} of {total}"),
    )
    print_result(judged, as_json=as_json)


def default_folder(result: Path) -> Path:
    """Return the default folder of a judge's answers and verdicts: in a run, or next to a PEFT folder."""
    from fedloom.run_folder.claim import EVALUATION

    is_run = (result / "manifest.json").exists()
    return result / EVALUATION / "judge" if is_run else result.with_name(f"{result.name}-judge")


def say_length(num_tokens: int, asked: int) -> None:
    """Note that answers are shorter than the limit asked for."""
    if num_tokens < asked:
        say(f"note: answers have at most {num_tokens} tokens (half the base's context), not {asked}")


def say_decoding(name: str, done: int, total: int, seconds_left: float) -> None:
    """Print the progress of decoding."""
    say(f"{name}: {done} of {total} answers, {seconds_left:.0f} s left")


def say_estimate(estimate: CallEstimate) -> None:
    """Print what the judge will cost, and through which proxy, before the first call."""
    if estimate.proxy is not None:
        say(f"note: calls go through the proxy {estimate.proxy}; set NO_PROXY to the judge's host to go without")
    say(
        f"{estimate.num_calls} calls to make, {estimate.num_cached} verdicts cached; about {estimate.prompt_tokens:,} "
        f"prompt tokens, at most {estimate.completion_tokens_at_most:,} completion tokens"
    )
