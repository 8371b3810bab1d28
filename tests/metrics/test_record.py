"""Files of records: what is read, what a kill cut off, what is damaged."""

import json

import pytest

from diffit.errors import UserError
from diffit.metrics.record import read_records, record_file
from diffit.utils.files import read_jsonl

RECORD = {"metric": "fd1k:pixels", "results": {"fd": 1.5}}


def test_a_line_that_a_kill_cut_off_is_left_out_and_a_missing_file_is_empty(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    line = json.dumps(RECORD)
    for cut in (0, 1, len(line) - 1):
        path.write_text(f"{line}\n{line}\n{line[:cut]}")
        assert read_jsonl(path) == read_records(path) == [RECORD, RECORD]
    path.write_text(f"{line}\n12")  # the rest of a number is JSON, too
    assert read_jsonl(path) == [RECORD]


@pytest.mark.parametrize("damage", ['{"metric": ', "12", "[]", ""])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damage):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(RECORD)}\n{damage}\n{json.dumps(RECORD)}\n")
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 is not a JSON object"):
        read_jsonl(path)


def test_files_of_other_things_are_named(tmp_path):
    path = tmp_path / "stats.jsonl"
    path.write_text('{"metric": "fd", "results": {}}\n{"loss": 0.5}\n')
    with pytest.raises(UserError, match=r"line 2 is not a record of `diffit metrics calc`"):
        read_records(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_records(path)


def test_the_file_of_a_metric_has_no_colon():
    assert record_file("fd1k_full:pixels") == "metric-fd1k_full-pixels.jsonl"
