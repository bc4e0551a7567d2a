"""The doctor says what a run will say, and where it says that all is well, a run starts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fedloom.cli.app import exit_code
from fedloom.data.templates import template_text
from fedloom.data.tokenizer import byte_tokenizer
from fedloom.run_folder import claim

Document = dict[str, dict[str, Any]]
Change = Callable[["Place"], None]


class Place:
    """A recipe with files of its own, to be spoilt; ``set`` changes a setting."""

    def __init__(self, folder: Path, base: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.base, self.out, self.patch = folder, folder / "base", folder / "run", patch
        shutil.copytree(base, self.base)
        byte_tokenizer().save_pretrained(self.base)
        self.rows([{"instruction": f"ask {k}", "response": "yes", "kind": "ab"[k % 2]} for k in range(12)])
        self.document: Document = {
            "model": {"base": str(self.base)},
            "data": {"path": str(folder / "rows.json"), "template": "plain", "eval_rows": 2},
            "method": {"name": "fedit", "ranks": 2},
            "federation": {"num_clients": 2, "num_rounds": 1},
            "training": {"local_steps": 1, "batch_size": 2},
        }

    def rows(self, rows: object, name: str = "rows.json") -> None:
        text = rows if isinstance(rows, str) else json.dumps(rows)
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def set(self, **settings: object) -> None:
        for name, value in settings.items():
            table, key = name.split("__")
            self.document.setdefault(table, {})[key] = value
            if value is None:
                del self.document[table][key]

    def edit(self, file: str, **changes: object) -> None:
        path = self.base / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def command(self, name: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
        recipe = self.folder / "recipe.json"
        recipe.write_text(json.dumps(self.document))
        code = exit_code([name, str(recipe), "--out", str(self.out), *more])
        printed = capsys.readouterr()
        return code, printed.out + printed.err


@pytest.fixture
def place(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, base_folder, monkeypatch)


def settings(**changes: object) -> Change:
    return lambda place: place.set(**changes)


def config(**changes: object) -> Change:
    return lambda place: place.edit("config.json", **changes)


def rows(rows: object, **changes: object) -> Change:
    def change(place: Place) -> None:
        place.rows(rows)
        place.set(**changes)

    return change


def natural(*clients: object, **changes: object) -> Change:
    def change(place: Place) -> None:
        for number, one in enumerate(clients):
            place.rows(one, f"fed/local_training_{number}.json")
        place.set(data__path=str(place.folder / "fed"), data__eval_rows=None, partition__scheme="natural", **changes)

    return change


def suite(name: str, content: str | None, **changes: object) -> Change:
    def change(place: Place) -> None:
        place.set(evaluation__suites=[name], **changes)
        if content is not None:
            place.rows(content, "asked.csv")
            place.set(evaluation__paths={name: str(place.folder / "asked.csv")})

    return change


def without(module: str, **changes: object) -> Change:
    def change(place: Place) -> None:
        place.patch.setitem(sys.modules, module, None)
        place.set(**changes)

    return change


def bad_weights(place: Place) -> None:
    (place.base / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")


def no_weights(place: Place) -> None:
    (place.base / "model.safetensors").unlink()


def beside_adapter(place: Place) -> None:
    (place.base / "adapter_config.json").write_text("{}")


def code_of_its_own(place: Place) -> None:
    place.edit("config.json", model_type="mine", auto_map={"AutoConfig": "mine.C"})


def no_offsets(place: Place) -> None:
    (place.base / "tokenizer.json").unlink()
    (place.base / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')


def chat(template: str, **changes: object) -> Change:
    def change(place: Place) -> None:
        place.edit("tokenizer_config.json", chat_template=template)
        (place.base / "chat_template.jinja").write_text(template)
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        place.rows([{"messages": turns}] * 8)
        place.set(data__template="chat", **changes)

    return change


def no_row_in_the_base(place: Place) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(place.base)
    place.rows(template_text("plain").replace("Question:", "<new>"), "own.toml")
    place.set(data__template=str(place.folder / "own.toml"))


def file_as_folder(place: Place) -> None:
    place.out.write_text("a file")


def foreign_folder(place: Place) -> None:
    place.out.mkdir()
    (place.out / "thesis.txt").write_text("mine")


def below_a_file(place: Place) -> None:
    (place.folder / "file").write_text("")
    place.out = place.folder / "file" / "run"


def in_use(place: Place) -> None:
    place.out.mkdir()
    claim.lock(place.out)


def config_of_text(place: Place) -> None:
    (place.base / "config.json").write_text("{")


def no_tokenizer(place: Place) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place.base / name).unlink()


def no_bitsandbytes(place: Place) -> None:
    place.patch.setattr("fedloom.models.load.find_spec", lambda name: None)
    place.set(model__quantization="4bit")


def long_held_out(place: Place) -> None:
    place.rows([{"instruction": "a", "response": "b" * 900}], "held.json")
    place.set(data__eval_rows=None, data__eval_path=str(place.folder / "held.json"))


def partition_of_others(place: Place) -> None:
    place.rows('{"rows": [0], "starts": [0, 1], "names": ["0"]}', "partition.json")
    place.set(partition__path=str(place.folder / "partition.json"))


def untrained(place: Place) -> None:
    place.set(method__name="base", method__ranks=None, federation__num_rounds=None)
    del place.document["training"]


BAD: dict[str, Change] = {
    "data absent": settings(data__path="absent.json"),
    "base absent": settings(model__base="./absent"),
    "base of the wrong kind": config(model_type="t5"),
    "base of an unknown kind": config(model_type="nothing-known"),
    "configuration of text": config_of_text,
    "sizes that do not divide": config(num_attention_heads=5),
    "no weights": no_weights,
    "weights cut off": bad_weights,
    "an adapter next to the base": beside_adapter,
    "code of its own": code_of_its_own,
    "a kernel of the hub": config(attn_implementation="someone/kernel"),
    "no tokenizer": no_tokenizer,
    "a tokenizer without offsets": no_offsets,
    "a device that is not here": settings(model__device="cuda:9"),
    "a quantisation without its library": no_bitsandbytes,
    "stored quantised without its library": config(quantization_config={"quant_method": "aqlm"}),
    "no such target": settings(model__target_modules=["nothing_proj"]),
    "a rank wider than a layer": settings(model__target_modules=["k_proj"], method__ranks=12),
    "a rank for a stranger": settings(method__ranks={"0": 2, "tom": 2}),
    "a column that is missing": rows([{"question": "a", "response": "b"}] * 8, data__shape="dolly"),
    "rows that are not JSON": rows('{"instruction": "a"'),
    "no rows": rows([]),
    "rows of numbers": rows([1, 2]),
    "a row without an answer": rows([{"instruction": "a", "response": ""}] * 8),
    "a row that is too long": settings(data__max_length=4),
    "all rows too long": settings(data__max_length=2, data__overlong="drop"),
    "a length beyond the context": settings(data__max_length=100_000),
    "a token the base has not": no_row_in_the_base,
    "no chat template": settings(data__template="chat"),
    "a template that is absent": settings(data__template="absent.json"),
    "a template that raises": chat("{{ raise_exception('no system turn') }}"),
    "a template with an error": chat("{{ nothing.at.all }}"),
    "held-out rows absent": settings(data__eval_rows=None, data__eval_path="absent.json"),
    "held-out rows that are too long": long_held_out,
    "more held out than there are": settings(data__eval_rows=40),
    "more clients than rows": settings(federation__num_clients=40),
    "clients of more rows than there are": settings(partition__min_rows=9),
    "a partition by no column": settings(partition__scheme="category", partition__column="colour"),
    "more categories than there are": settings(
        partition__scheme="category", partition__column="kind", partition__categories_per_client=5
    ),
    "a partition of other rows": partition_of_others,
    "an emptied client": natural(
        [{"instruction": "a", "response": "b"}] * 4,
        [{"instruction": "a", "response": "b" * 900}],
        data__overlong="drop",
    ),
    "other natural clients than counted": natural([{"instruction": "a", "response": "b"}] * 4),
    "a cut beyond the blocks": settings(method__name="splitlora", split__cut_layer=7),
    "a run to replay that is none": settings(federation__participation="."),
    "e2e without references": suite("e2e", None),
    "e2e without representations": suite("e2e", "a text\n\nanother\n"),
    "multiple choice of text": suite("multiple-choice", "what?"),
    "mmlu in a file": suite("mmlu", "what?"),
    "exact match of nothing": suite("exact-match", None, data__eval_rows=None),
    "exact match of text": suite("exact-match", "question\n"),
    "a tracker that is not installed": without("wandb", run__trackers=["wandb"]),
    "Ray that is not installed": without("ray", engine__name="ray"),
    "a file as the run's folder": file_as_folder,
    "a folder of something else": foreign_folder,
    "a folder that cannot be made": below_a_file,
    "a folder in use": in_use,
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_run_ends_with_is_among_what_the_doctor_says(
    case: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    BAD[case](place)
    looked, findings = place.command("doctor", capsys)
    ran, output = place.command("run", capsys)
    lines = [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]
    assert (ran, looked) == (2, 2), output + findings
    assert lines
    for line in lines:
        assert line in findings
    assert not (place.out / "manifest.json").exists()


GOOD: dict[str, Change] = {
    "as it is": settings(),
    "a cut": settings(method__name="splitlora", split__cut_layer=1),
    "the untouched base": untrained,
    "ranks by name": settings(method__name="flora", method__ranks={"0": 3, "1": 1}),
    "rows that are dropped": rows(
        [{"instruction": "a", "response": ("", "b" * 900, "yes")[k % 3]} for k in range(12)],
        data__overlong="drop",
        data__unanswered="drop",
        data__eval_rows=None,
        federation__num_clients=1,
    ),
    "rows that are cut off": settings(data__max_length=29, data__overlong="truncate"),
    "an emptied client that may be dropped": natural(
        [{"instruction": "a", "response": "b"}] * 4,
        [{"instruction": "a", "response": "b" * 900}],
        data__overlong="drop",
        partition__empty="drop",
    ),
    "a chat template": chat("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"),
    "exact match": suite("exact-match", None),
}


@pytest.mark.parametrize("case", GOOD)
def test_where_the_doctor_says_that_all_is_well_a_run_starts(
    case: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    GOOD[case](place)
    looked, findings = place.command("doctor", capsys)
    assert (looked, "would run here" in findings) == (0, True), findings
    assert not place.out.exists()
    ran, output = place.command("run", capsys)
    assert ran == 0, output
    again, findings = place.command("doctor", capsys)
    assert (again, "holds this run, which would be resumed" in findings) == (0, True)


def test_all_that_is_in_the_way_is_told_at_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    no_weights(place)
    foreign_folder(place)
    rows([{"question": "a"}] * 8)(place)
    suite("e2e", None, model__device="cuda:9")(place)
    told = place.command("doctor", capsys)[1]
    for need in (f"base {place.base}", f"data {place.folder / 'rows.json'}", "run folder", "suites", "device cuda:9"):
        assert any(line.startswith(f"  {need}") and ": no, " in line for line in told.splitlines()), need


def test_the_doctor_of_a_begun_run_looks_at_what_it_was_started_with(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(federation__num_rounds=2)(place)
    assert place.command("run", capsys)[0] == 0
    for change in (settings(federation__num_rounds=1), rows([{"instruction": "other", "response": "b"}] * 12)):
        change(place)
        looked, findings = place.command("doctor", capsys)
        ran, output = place.command("run", capsys)
        line = next(one.removeprefix("error: ") for one in output.splitlines() if one.startswith("error: "))
        assert (looked, ran, line in findings) == (2, 2, True), output + findings
        settings(federation__num_rounds=2)(place)


def test_rows_that_take_a_while_are_announced(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.assembly.inputs.MANY_ROWS", 10)
    assert "making tokens of 12 rows" in place.command("doctor", capsys)[1]


def test_what_only_the_weights_show_is_not_known_until_they_are_loaded(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(place.base)
    place.set(model__dtype="float16")
    looked, findings = place.command("doctor", capsys)
    assert (looked, "numbers of the base: not known" in findings) == (0, True), findings
    assert place.command("doctor", capsys, "--load")[0] == 0
    model.get_output_embeddings().weight.data.fill_(6e4)
    model.save_pretrained(place.base)
    looked, findings = place.command("doctor", capsys, "--load")
    assert (looked, "infinity or NaN in float16" in findings) == (2, True), findings
    del model.model.layers[1].mlp.up_proj
    model.save_pretrained(place.base)
    looked, findings = place.command("doctor", capsys, "--load")
    _, output = place.command("run", capsys)
    (line,) = [one.removeprefix("error: ") for one in output.splitlines() if one.startswith("error: ")]
    assert "lack 'model.layers.1.mlp.up_proj.weight'" in line
    assert (looked, line in findings) == (2, True), findings
