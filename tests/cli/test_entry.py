"""What the command line says before any subcommand does: logged lines, and a namesake of ours that is in the way."""

import logging
import os
import subprocess
import sys

import pytest

from diffit.cli import Lines, cli, run, wait_without_spinning


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
    words, environment = [sys.executable, "-m", "diffit", "--version"], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("diffit, version")
    found = done.stderr.splitlines()
    assert len(found) == lines, done.stderr
    assert all(line.startswith("warning: ") and "pip uninstall diffit" in line for line in found)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_do_not_spin_unless_they_are_told_to(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wait_without_spinning()
    assert {name: os.environ[name] for name in expected} == expected
    assert ("GOMP_SPINCOUNT" in os.environ) == ("GOMP_SPINCOUNT" in expected)


def test_it_is_settled_before_torch_is_there():
    code = "import sys, diffit.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("level", "line"), [(logging.INFO, "text"), (logging.WARNING, "warning: text"), (logging.ERROR, "text")]
)
def test_what_the_library_logs_is_a_plain_line(level, line):
    assert Lines().format(logging.LogRecord("diffit", level, "", 0, "text", None, None)) == line


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["info", "x\nerror: all is well"], 1),
        (["info", "\x1b[31m" + "A" * 40_000], 1),
        (["info", "debug", "--num-blocks", "\x1b[31m" + "9" * 40_000], 2),
        (["sample", "--seeds", "0-1000000000000"], 2),
        (["--\x1b[31m\nnope"], 2),
        (["metrics", "show", "/dev/zero"], 1),
        (["data", "convert", "--source", ".", "--dest", "loop"], 1),
        (["export", "--network", "x"], 2),
    ],
)
def test_a_mistake_is_one_line_that_a_terminal_only_shows(words, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as caught:
        run(cli, words)
    told = capsys.readouterr().err
    assert caught.value.code == status
    assert told.startswith("error: ")
    assert told.endswith("\n")
    assert told[:-1].isprintable()
    assert len(told) < 2000


def test_what_a_launcher_says_wrong_is_said(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SystemExit):
        run(cli, ["info", "debug"])
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE=two: set by torchrun, to a number;")


def test_a_mistyped_option_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        run(cli, ["train", "--outdri", "runs"])
    error = capsys.readouterr().err
    assert "No such option '--outdri'. Did you mean '--outdir'?" in error


@pytest.mark.parametrize("group", [[], ["data"], ["metrics"]])
def test_a_list_of_commands_says_all_of_what_each_does_on_80_columns(group, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    cli([*group, "--help"], standalone_mode=False)
    commands = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert len(commands) > 2
    assert not [line for line in commands if line.endswith("...")]


def test_a_command_may_open_more_files_than_a_shell_s_limit():
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(7)[1]))\n"
        "from diffit.cli import open_many_files; open_many_files(); print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    ).replace("getrlimit(7)", "getrlimit(resource.RLIMIT_NOFILE)")
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    most = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
    assert said.strip() == str((most, hard))


@pytest.mark.parametrize("words", [[], ["data"], ["metrics"]])
def test_a_command_of_which_nothing_is_asked_shows_its_help(words, capsys):
    with pytest.raises(SystemExit):
        run(cli, words)
    said = capsys.readouterr()
    lines = (said.err + said.out).splitlines()
    assert lines[0].startswith("Usage:")
    assert "Commands:" in lines
