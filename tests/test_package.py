"""The package agrees with itself: its name, its extras, and the versions that are pinned."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from diffit.errors import DISTRIBUTION, install_hint

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def bare(requirement: str) -> str:
    """``torch-fidelity`` of ``torch_fidelity>=0.4``."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_hints_install_this_distribution_and_an_extra_that_it_has():
    assert PROJECT["name"] == DISTRIBUTION
    assert install_hint("latent") == "pip install 'diffit-torch[latent]'"
    hinted = set()
    for file in (ROOT / "src").rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"pip install '?diffit\b", text), f"{file}: names the distribution itself"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "install_hint":
                hinted.add(ast.literal_eval(node.args[0]))
    assert {"data", "latent", "metrics"} <= hinted <= set(EXTRAS)


def test_all_means_every_extra_but_those_for_working_on_the_project():
    (whole,) = EXTRAS["all"]
    named = re.fullmatch(rf"{DISTRIBUTION}\[(.*)\]", whole)[1].split(",")
    assert sorted(named) == sorted(set(EXTRAS) - {"all", "docs", "dev"})


def test_every_dependency_is_pinned_to_a_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    asked = {bare(text) for extra, texts in EXTRAS.items() if extra != "all" for text in texts}
    assert asked | {bare(text) for text in PROJECT["dependencies"]} <= {bare(line) for line in lines}


@pytest.mark.parametrize("module", ["train.py", "configs.py"])
def test_the_shims_of_a_checkout_stay_shims(module):
    assert len((ROOT / module).read_text().splitlines()) <= 12


def test_types_are_announced():
    assert (ROOT / "src/diffit/py.typed").exists()


def test_pre_commit_lints_with_the_pinned_ruff():
    (version,) = re.findall(r'"(ruff==[^"]*)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert version in (ROOT / "constraints.txt").read_text().splitlines()


def test_ci_tries_every_python_that_is_promised_and_the_oldest_torch():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    promised = [text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == promised
    (oldest,) = [text.partition(">=")[2] for text in PROJECT["dependencies"] if bare(text) == "torch"]
    tried = {(entry["python"], entry["torch"]) for entry in jobs["bounds"]["strategy"]["matrix"]["include"]}
    assert (promised[0], f"torch=={oldest}.*") in tried
