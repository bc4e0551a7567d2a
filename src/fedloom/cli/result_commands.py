"""evaluate, generate, export: use the result of a run, or any adapter."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from fedloom.cli.options import JsonOption, PushOption, RankOption, RoundOption, ToolOption
from fedloom.cli.output import print_result, say
from fedloom.config.conduct import SuiteName
from fedloom.errors import SettingsError

ResultArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_ADAPTER", help="A run folder, or the folder of any PEFT adapter.", show_default=False
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="FOLDER",
        help="Base model, folder or hub name. Default: the one named by the run or the adapter.",
        show_default=False,
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="FOLDER",
        help="Tokenizer folder, hub name or `bytes`. Default: the run's, or the base's own.",
        show_default=False,
    ),
]
ClientOption = Annotated[
    int | None,
    typer.Option(
        "--client", metavar="K", help="Use this client's adapter, where each has its own.", show_default=False
    ),
]


def evaluate(
    result: ResultArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Rows to score: a file, folder or hub name. Default: the run's held-out rows. "
            "For e2e the references, for mmlu its folder, for multiple-choice a JSONL file of questions.",
            show_default=False,
        ),
    ] = None,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    client: ClientOption = None,
    round: RoundOption = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="SHAPE",
            help="How a row becomes prompt and answer, or `text` for a file of plain text. Default: as in the run.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", metavar="NAME", help="Prompt template. Default: as in the run.", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", metavar="N", min=2, help="Largest number of tokens per row.", show_default=False),
    ] = None,
    overlong: Annotated[
        str | None,
        typer.Option(
            "--overlong",
            metavar="POLICY",
            help="What to do with longer rows: error, drop or truncate.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite", metavar="NAME", help=f"Score by a suite instead: one of {', '.join(get_args(SuiteName))}."
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval", metavar="A,B,...", help="Run tasks of lm-evaluation-harness instead (extra lm-eval)."
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots",
            metavar="N",
            min=0,
            help="Examples before a question. Default: the run's evaluation.shots; with --lm-eval, each task's.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            min=1,
            help="Largest number of items. Default: the run's evaluation.limit; with --lm-eval, all.",
        ),
    ] = None,
    answering: Annotated[
        str | None,
        typer.Option(
            "--answering",
            metavar="KIND",
            help="A choice's likelihood: `letter`, or `text` per byte. Default: the run's evaluation.answering.",
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option("--beams", metavar="N", min=1, help="Beams for e2e. Default: the run's evaluation.beams."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help="Largest number of tokens per answer. Default: the run's evaluation.max_new_tokens.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure held-out loss and perplexity of a run or of any adapter, or its scores, beside its base.

    An option that would have no effect is rejected.
    """
    _check_folder(result)
    from fedloom.results import held_out, opened_result, suite_scores

    asked = suite_scores.Asked(
        suite,
        lm_eval,
        data,
        shape,
        template,
        max_length,
        overlong,
        shots,
        limit,
        beams,
        answering,
        max_new_tokens,
    )
    found = opened_result.of_client(opened_result.find_result(result, round), client)
    choice = None
    if suite is None and lm_eval is None:
        choice = held_out.RowChoice(data, shape, template, max_length, overlong)
        held_out.check_rows(found, choice)
    opened = opened_result.over_base(found, base, tokenizer)
    _say_all(found.notes)
    if choice is None:
        print_result(suite_scores.score_result(opened, asked, say), as_json=as_json)
    else:
        print_result(held_out.evaluate(opened, choice), as_json=as_json)


def generate(
    result: ResultArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="What to ask.", show_default=False)
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Ask line by line until the input ends.")] = False,
    base_too: Annotated[
        bool, typer.Option("--base-too/--only", help="Show the base's answer too, or only the result's.")
    ] = True,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Largest number of tokens per answer.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", help="Sample at this temperature; 0: always the likeliest token."),
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the sampling.")] = 0,
    cut_layer: Annotated[
        int | None,
        typer.Option("--cut", metavar="N", help="Decode with the model cut after N blocks, and count the bytes sent."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="NAME",
            help="Prompt template, or `none` for the prompt as typed. Default: as in the run.",
            show_default=False,
        ),
    ] = None,
    base: BaseOption = None,
    tokenizer: TokenizerOption = None,
    client: ClientOption = None,
    round: RoundOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the answer of a run or any adapter to a prompt, beside its base's."""
    if interactive == (prompt is not None):
        raise SettingsError(
            f"expected either --prompt TEXT or --interactive, got {'both' if interactive else 'neither'}; give one"
        )
    _check_folder(result)
    from fedloom.results.conversation import Sampling, check_wording, converse
    from fedloom.results.opened_result import open_result

    sampling = Sampling(max_new_tokens, temperature, seed)
    check_wording(template)
    opened = open_result(result, base=base, tokenizer=tokenizer, client=client, round=round)
    _say_all(opened.found.notes)
    if cut_layer is not None:
        from fedloom.results import split_conversation

        if prompt is None or temperature > 0.0:
            given = "--interactive" if prompt is None else f"--temperature {temperature}"
            raise SettingsError(
                f"--cut: expected --prompt TEXT at temperature 0, got {given}; change that, or drop --cut"
            )
        answered = split_conversation.generate_cut(opened, prompt, cut_layer, sampling, template)
        print_result(answered, as_json=as_json)
        return
    conversation = converse(opened, template=template, sampling=sampling, beside_base=base_too)
    if prompt is not None:
        print_result(conversation.ask(prompt), as_json=as_json)
        return
    kept = "earlier lines are kept" if conversation.wording.is_dialogue else "every line is a question of its own"
    say(f"{conversation.wording.description}; {kept}; end with Ctrl-D")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in sys.argv: invalid bytes are reported by ask()
    for line in sys.stdin:
        if line.strip():
            print_result(conversation.ask(line.strip()), as_json=as_json)


def export(
    result: ResultArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="New or empty folder to write.", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the base with the adapter merged in, instead of the adapter.")
    ] = False,
    rank: RankOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="float32, bfloat16 or float16. Default: float32 for an adapter, the base's own for a merged model.",
            show_default=False,
        ),
    ] = None,
    client: ClientOption = None,
    round: RoundOption = None,
    base: BaseOption = None,
    tool: ToolOption = None,
    to_hub: PushOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the result for other tools: a PEFT adapter with its model card, or a merged model."""
    from fedloom.results.push import check_name, push

    _check_folder(result)
    if to_hub is not None:
        check_name(to_hub)
    if merge and tool is not None:
        raise SettingsError(f"--for {tool}: expected an adapter to serve, got --merge; drop one of the two")
    if merge:
        from fedloom.results.merged_export import export_merged

        written = export_merged(result, to, base=base, rank=rank, client=client, round=round, dtype=dtype)
    else:
        from fedloom.results.export import export_adapter

        kind = dtype or "float32"
        written = export_adapter(result, to, base=base, rank=rank, client=client, round=round, dtype=kind, tool=tool)
    print_result(written, as_json=as_json)
    if to_hub is not None:
        say(f"uploaded to {push(to, to_hub)}")


def _check_folder(result: Path) -> None:
    """Say that there is no result before anything large is imported to read one."""
    from fedloom.run_folder.reader import check_result_folder

    check_result_folder(result)


def _say_all(notes: Sequence[str]) -> None:
    for note in notes:
        say(f"note: {note}")
