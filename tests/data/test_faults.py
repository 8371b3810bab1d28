"""The short form of `benchmarks.faults_files`: damaged and hostile files are one line, or read as they were."""

import random

import pytest
from benchmarks.faults_files import KINDS, mutate, run


@pytest.mark.slow
def test_mutated_files_of_every_kind_are_refused_in_one_line_or_read():
    pytest.importorskip("lmdb", reason="needs the optional package lmdb")
    rows = run(5 * len(KINDS), seed=0)
    assert [row.kind for row in rows] == list(KINDS)
    assert {row.kind: row.faults for row in rows if row.faults} == {}
    assert sum(row.refused for row in rows) > len(KINDS)


def test_a_mutant_differs_from_what_it_was_made_of():
    """But for JSON mutations of what is no JSON."""
    rng, data = random.Random(0), bytes(range(256))
    assert all(mutate(data, rng, one_bit=True) != data for _ in range(100))
    assert sum(mutate(data, rng) != data for _ in range(100)) > 80
