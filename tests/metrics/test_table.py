"""Tables of records: which columns there are, and that every format holds the same cells."""

import csv
import io

import pytest

from diffit.metrics.table import FORMATS, compare


def record(metric="fid10k_full", kimg=None, results=None, **facts):
    known = {"metric": metric, "results": results or {"fid": 2.123456789, "fid_bias": 0.2}, "samples": 10_000}
    if kimg is not None:
        known |= {"kimg": kimg, "images": int(kimg * 1000)}
    facts = {"seeds": "0-9999", "detector": {"name": "inception", "sha256": "a" * 64}} | facts
    return known | facts | {"weights_sha256": str(kimg), "date": f"at {kimg}", "seconds": kimg, "notes": []}


def test_a_run_has_its_kimg_and_numbers_and_nothing_that_is_always_the_same():
    header, rows = compare({"run": [record(kimg=1.0), record(kimg=2.5)]})
    assert header == ["metric", "kimg", "fid"]
    assert rows == [["fid10k_full", "1", "2.1235"], ["fid10k_full", "2.5", "2.1235"]]


def test_between_runs_what_differs_has_a_column_and_hashes_are_short():
    one = record(sampling={"steps": 18, "cfg_scale": 1.0, "cfg_interval": None}, reference={"sha256": "b" * 64})
    two = record(sampling={"steps": 32, "cfg_scale": 1.0, "cfg_interval": [0.2, 5.0]}, reference={"sha256": "c" * 64})
    header, rows = compare({"a": [one], "b": [two]})
    assert header == ["run", "metric", "fid", "steps", "cfg_interval", "reference.sha256"]
    assert rows[0] == ["a", "fid10k_full", "2.1235", "18", "", "b" * 8]
    assert rows[1] == ["b", "fid10k_full", "2.1235", "32", "[0.2, 5.0]", "c" * 8]


def test_what_differs_between_metrics_only_is_in_their_names():
    score = record("is50k", results={"is": 9.5, "is_std": 0.125}, samples=50_000, seeds="0-49999")
    header, rows = compare({"a": [record(), score]})
    assert header == ["metric", "fid", "is"]
    assert rows == [["fid10k_full", "2.1235", ""], ["is50k", "", "9.5 ± 0.12"]]


def test_exact_tables_have_all_digits_and_deviations_apart():
    header, rows = compare({"a": [record("kid1k", results={"kid": 0.1 + 0.2, "kid_error": 1e-3})]}, exact=True)
    assert header == ["metric", "kid", "kid_error"]
    assert [float(cell) for cell in rows[0][1:]] == [0.1 + 0.2, 1e-3]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_every_cell(name):
    header, rows = ["run", "fid"], [["a_1 | 50%", "2.1 ± 0.1"], ["b", ""]]
    text = FORMATS[name](header, rows)
    expected = {
        "table": "run        fid\na_1 | 50%  2.1 ± 0.1\nb",
        "md": "| run | fid |\n| --- | --- |\n| a_1 \\| 50% | 2.1 ± 0.1 |\n| b |  |",
        "csv": "run,fid\na_1 | 50%,2.1 ± 0.1\nb,",
        "latex": r"""\begin{tabular}{ll}
run & fid \\
\hline
a\_1 | 50\% & 2.1 $\pm$ 0.1 \\
b &  \\
\end{tabular}""",
    }[name]
    assert text == expected
    if name == "csv":
        assert list(csv.reader(io.StringIO(text))) == [header, *rows]


def test_what_a_terminal_obeys_is_not_passed_on():
    """Records come from anywhere. Found by `make faults`."""
    record = {"metric": "a\nerror: all is well", "results": {"\x1b[2J": 3.0}}
    header, rows = compare({"run": [record]})
    assert header == ["metric", "\\x1b[2J"]
    assert rows == [["a\\nerror: all is well", "3"]]
