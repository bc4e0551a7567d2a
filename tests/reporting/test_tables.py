"""The comparison table."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from fedloom.errors import EvaluationError
from fedloom.reporting.metrics import Metric
from fedloom.reporting.tables import compare, paired_difference, reference_among, student_t975
from fedloom.wording import one_line, written, written_bytes

LOSS = Metric("loss_nats", "loss [nats]")
EXACT = Metric("exact", "exact match", better="higher", unit="%")
RESULTS = {
    "fedit": {1: {"loss_nats": 2.0, "exact": 0.10}, 2: {"loss_nats": 3.0, "exact": 0.20}, 3: {"loss_nats": 4.0}},
    "flora": {1: {"loss_nats": 1.9, "exact": 0.50}, 2: {"loss_nats": 2.9, "exact": 0.10}, 3: {"loss_nats": 3.89}},
}


def test_a_cell_is_mean_and_sample_standard_deviation_over_seeds() -> None:
    cell = compare(RESULTS, [LOSS]).cells["fedit"]["loss_nats"]
    assert cell is not None
    assert (cell.mean, cell.sd, cell.num_seeds) == (3.0, 1.0, 3)


def test_a_difference_smaller_than_the_spread_of_seeds_is_found_by_pairing_them() -> None:
    table = compare(RESULTS, [LOSS, EXACT], reference="fedit")
    loss, exact = (table.cells["flora"][key] for key in ("loss_nats", "exact"))
    assert loss is not None
    assert loss.difference is not None
    assert loss.difference.mean == pytest.approx(-0.31 / 3)
    assert loss.difference.verdict == "better"
    assert exact is not None
    assert exact.difference is not None
    assert exact.difference.verdict == "within noise"
    assert table.cells["fedit"]["loss_nats"].difference is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("better", "shift", "verdict"),
    [("lower", -1, "better"), ("lower", 1, "worse"), ("higher", 1, "better"), ("neither", 1, "not judged")],
)
def test_the_direction_decides_what_is_better(better: str, shift: float, verdict: str) -> None:
    reference = {1: 0.0, 2: 5.0}
    moved = {seed: value + shift + 0.01 * seed for seed, value in reference.items()}
    assert paired_difference(moved, reference, better).verdict == verdict  # type: ignore[arg-type]


def test_differences_that_are_all_the_same_are_not_judged() -> None:
    difference = paired_difference({1: 0.59, 2: 0.565}, {1: 0.5825, 2: 0.5575}, "higher")
    assert (difference.mean, difference.half_width) == (pytest.approx(0.0075), None)
    assert difference.verdict == "too few seeds"


def test_equal_results_are_within_noise_and_one_seed_decides_nothing() -> None:
    assert paired_difference({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}, "lower").verdict == "within noise"
    assert paired_difference({1: 1.0}, {1: 2.0, 2: 2.0}, "lower").verdict == "too few seeds"


@pytest.mark.parametrize(
    ("degrees", "tabulated"),
    [(1, 12.7062), (2, 4.3027), (5, 2.5706), (9, 2.2622), (10, 2.2281), (11, 2.2010), (30, 2.0423), (100, 1.9840)],
)
def test_the_quantile_is_students(degrees: int, tabulated: float) -> None:
    assert student_t975(degrees) == pytest.approx(tabulated, rel=1e-4)


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    values, reference = {1: 1.0, 2: 2.5, 3: 2.0}, {1: 1.5, 2: 2.6, 3: 2.9}
    difference = paired_difference(values, reference, "lower")
    assert difference.mean == pytest.approx(-0.5)
    assert difference.half_width == pytest.approx(4.3027 * 0.4 / 3**0.5, rel=1e-4)  # differences -0.5, -0.1, -0.9


def test_markdown_marks_the_best_value_and_says_what_the_marks_mean() -> None:
    text = compare(RESULTS, [LOSS, EXACT], reference="fedit").to_markdown()
    assert "| flora | **2.897 ± 0.995 ▲** | **30.0 % ± 28.3 %** |" in text
    assert "| fedit | 3.000 ± 1.000 | 15.0 % ± 7.1 % |" in text
    assert "mean ± standard deviation over 2–3 seeds; ▲ better" in text


def test_the_terminal_shows_the_same_values() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(compare(RESULTS, [LOSS], reference="fedit").to_rich("Dolly"))
    assert "2.897 ± 0.995 ▲" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_table_can_be_cut_to_some_columns() -> None:
    table = compare(RESULTS, [LOSS, EXACT], reference="fedit").only("exact", "absent")
    assert table.metrics == (EXACT,)
    assert "| flora | **30.0 % ± 28.3 %** |" in table.to_markdown()


HOSTILE = "a|b **c** `d` <i>e</i> &amp; [bold]f[/bold] :cat: $g$\n| h |\x1b[31m\x00\u2028\ud800"


def test_markdown_shows_any_label_in_its_own_cell() -> None:
    table = compare({HOSTILE: RESULTS["fedit"], "flora": RESULTS["flora"]}, [LOSS, EXACT], reference=HOSTILE)
    text = table.to_markdown()
    text.encode()
    head, rule, row, other, _, caption = text.splitlines()
    for line in (head, rule, row, other):
        assert len(re.findall(r"(?<!\\)\|", line)) == 4
    assert re.findall(r"(?<!\\)[`<&$\[]", row + caption) == []
    first = re.split(r"(?<!\\)\|", row)[1].strip()
    assert re.sub(r"\\(.)", r"\1", first) == one_line(HOSTILE)


def test_the_terminal_shows_any_label_as_it_is_and_obeys_none() -> None:
    console = Console(file=io.StringIO(), width=300)
    console.print(compare({HOSTILE: RESULTS["fedit"], "b": RESULTS["flora"]}, [LOSS], HOSTILE).to_rich(HOSTILE))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    flat = "".join(text.split())
    assert flat.count("".join(one_line(HOSTILE).split())) == 3  # title, row, caption
    assert not {"\x1b", "\x00"} & set(text)
    assert LOSS.title in text


def test_what_cannot_be_seen_is_shown() -> None:
    assert one_line("a\n\t\x00\x1b\x7f\x85\u2028\u202e\ud800é≤") == (
        r"a\u000a\u0009\u0000\u001b\u007f\u0085\u2028\u202e\ud800é≤"
    )


def test_json_keeps_every_digit() -> None:
    value = json.loads(json.dumps(compare(RESULTS, [LOSS], reference="fedit").to_json()))
    assert value["methods"]["flora"]["loss_nats"]["mean"] == pytest.approx(8.69 / 3, abs=1e-15)
    assert value["methods"]["flora"]["loss_nats"]["difference"]["verdict"] == "better"
    assert value["metrics"][0] == {"key": "loss_nats", "title": "loss [nats]", "better": "lower", "unit": ""}


def test_a_value_that_is_not_there_is_a_dash_and_never_best() -> None:
    results = {"base": {1: {"exact": 0.5}}, "flora": {1: {"loss_nats": 1.0, "exact": 0.4}}}
    table = compare(results, [LOSS, EXACT], reference="flora")
    assert "| base | – | **50.0 %** |" in table.to_markdown()
    assert table.best("loss_nats") is None


def test_one_seed_says_that_nothing_is_judged() -> None:
    results = {method: {1: seeds[1]} for method, seeds in RESULTS.items()}
    text = compare(results, [LOSS], reference="fedit").to_markdown()
    assert "| flora | **1.900** |" in text
    assert "one seed: differences are not judged" in text


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(EvaluationError, match="at least one method"):
        compare({}, [LOSS])
    with pytest.raises(EvaluationError, match=r"expected one of fedit, flora.*, got 'floar'"):
        compare(RESULTS, [LOSS], reference="floar")


def test_a_methods_bare_name_is_its_first_group_where_settings_tell_several_apart() -> None:
    labels = ["fedit", "flora (step=plain)", "flora (step=momentum)"]
    assert reference_among(labels, "flora") == "flora (step=plain)"
    with pytest.raises(EvaluationError, match="got 'flo'"):
        reference_among(labels, "flo")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_536_000, "1.54 MB"), (999_600, "1 MB"), (5e15, "5e+03 TB")],
)
def test_sizes_are_decimal(num_bytes: float, text: str) -> None:
    assert written_bytes(num_bytes) == text


def test_units_are_written() -> None:
    assert written(0.1234, "%") == "12.3 %"
    assert written(61.25, "s") == "61.2 s"
    assert written(1.5, "B") == "2 B"
