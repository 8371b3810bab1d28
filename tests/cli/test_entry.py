"""What the command line says before any subcommand does: logged lines, and a namesake of ours that is in the way."""

import logging
import os

import pytest

from diffit.cli import Lines
from helpers import command


def install(site, name: str, summary: str) -> None:
    folder = site / f"{name}-0.1.5.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.5\nSummary: {summary}\n")


@pytest.mark.parametrize(
    ("summary", "lines"),
    [("Diff-it: Spark Dataframe Differ", 1), ("DiffiT: diffusion vision transformers.", 0)],
)
def test_a_namesake_in_our_place_is_said_in_one_line_with_the_remedy(tmp_path, summary, lines):
    install(tmp_path / "site", "diffit", summary)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "src")])
    done = command("--version", PYTHONPATH=path)
    assert done.stdout.startswith("diffit, version")
    found = done.stderr.splitlines()
    assert len(found) == lines, done.stderr
    assert all(line.startswith("warning: ") and "pip uninstall diffit" in line for line in found)


@pytest.mark.parametrize(
    ("level", "line"), [(logging.INFO, "text"), (logging.WARNING, "warning: text"), (logging.ERROR, "text")]
)
def test_what_the_library_logs_is_a_plain_line(level, line):
    assert Lines().format(logging.LogRecord("diffit", level, "", 0, "text", None, None)) == line
