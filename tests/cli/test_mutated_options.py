"""A short form of `benchmarks/faults_options.py`: whatever is typed, the answer is the work, or one line."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits memory")
def test_mutated_command_lines_are_answered_in_one_line():
    spec = importlib.util.spec_from_file_location("faults_options", ROOT / "benchmarks/faults_options.py")
    faults = importlib.util.module_from_spec(spec)
    sys.modules["faults_options"] = faults  # its dataclass looks itself up
    spec.loader.exec_module(faults)
    outcomes = list(faults.outcomes(40, seed=7))
    assert not [(outcome.words, outcome.fault, outcome.stderr) for outcome in outcomes if outcome.fault]
    statuses = {outcome.status for outcome in outcomes}
    assert statuses == {0, 1, 2}, "some work, some are refused as words, some for what they name"
