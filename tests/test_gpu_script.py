"""``make gpu`` at toy size, so that it works on the day when there is a GPU."""

import json

import pytest
from benchmarks import gpu


@pytest.mark.slow
def test_the_script_for_gpus_runs_on_a_cpu_and_finds_nothing_wrong(tmp_path, capsys):
    assert gpu.main(["--processes", "2", "--dest", str(tmp_path / "here.json")]) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "here.json").read_text())
    assert len(found["attention"]) == 2 * (len(gpu.MAPS) + 1)
    assert all(0 < error["plain"] < 0.5 for error in found["attention"].values())
    assert found["step, debug, 8 images, fp32"]["images per second"] > 0
    assert found["kernels"][0]["ms"] > 0
    assert found["collectives"]["processes"] == 2


def test_what_is_wrong_is_told_from_rounding():
    good = {"sum": 2.0, "processes": 2, "losses": [1.0], "sharded losses": [1.0]}
    rounding, broken = {"fused": 2e-6, "plain": 1e-6}, {"fused": float("nan"), "plain": 1e-6}
    assert gpu.faults({"attention": {"map 8, fp32": rounding}, "collectives": good}) == []
    off = {"fused": 0.1, "plain": 0.01}
    found = {"attention": {"map 8, fp32": broken, "map 8, bf16": off}, "collectives": good | {"sum": 1.0}}
    assert len(gpu.faults(found)) == 3
    assert "a loss of 1.1" in gpu.faults({"attention": {}, "collectives": good | {"sharded losses": [1.1]}})[0]
