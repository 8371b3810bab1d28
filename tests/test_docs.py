"""The site builds without a word of complaint, and what README.md and docs/ link to, type and quote exists."""

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from diffit.cli import cli
from diffit.cli.train import train

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = DOCS / "errors.md"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    slugify = pytest.importorskip("markdown.extensions.toc").slugify
    return {slugify(re.sub(r"[`*]", "", title), "-") for title in re.findall(r"^#+ (.+)$", prose(page), re.M)}


def links() -> list[tuple[Path, str]]:
    written = (page for page in PAGES if page != GENERATED)
    found = [(page, target) for page in written for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))]
    return [(page, target) for page, target in found if not re.match(r"https?:", target)]


def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading():
    assert len(links()) > 50
    for page, link in links():
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists() or target == GENERATED, f"{page.name}: {link}"
        assert page.parent == ROOT or target.is_relative_to(DOCS), f"{page.name}: {link} is not on the site"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def command_lines() -> list[tuple[str, str]]:
    """``(page, line)`` of everything that is typed into a shell, also in the text."""
    found = []
    for page in PAGES:
        blocks = [text.replace("\\\n", " ") for kind, text in FENCE.findall(page.read_text()) if kind != "python"]
        lines = [re.sub(r"\s#.*", "", line) for block in blocks for line in block.splitlines()]
        lines += [f"{span} …" for span in re.findall(r"`([^`\n]+)`", prose(page))]  # in the text they may be in part
        typed = re.compile(r"(\$ |srun )?(diffit|torchrun|python train)")
        found += [(page.name, line) for line in lines if typed.match(line)]
    return found


def parse(line: str) -> None:
    """Whether the options exist, have values that they accept, and none is missing; ``…`` stands for more of them."""
    words = shlex.split(line.removeprefix("$ ").partition(" &")[0])
    start = next((i for i, word in enumerate(words) if word in ("diffit", "train.py")), None)
    if start is None:  # only torchrun's own options
        return
    command, words, name = (train if words[start] == "train.py" else cli), words[start + 1 :], "diffit"
    context = click.Context(command, info_name=name)
    while isinstance(command, click.Group) and words[:1] not in ([], ["…"]):
        name, command, words = command.resolve_command(context, words)
        context = click.Context(command, parent=context, info_name=name)
    ours = getattr(command, "_ours", lambda word: word)
    open_ended = any("…" in word for word in words)
    values, extra, _ = command.make_parser(context).parse_args([ours(word) for word in words if word != "…"])
    assert not extra
    for param in command.params:
        value = values.get(param.name)
        if isinstance(value, str | tuple | list) and "…" not in str(value):
            param.type_cast_value(context, value)
        assert open_ended or not param.required or value, f"{param.name} is missing"


def test_every_command_line_is_understood_by_the_command():
    lines = command_lines()
    assert len(lines) > 80
    for page, line in lines:
        try:
            parse(line)
        except (click.ClickException, AssertionError, ValueError) as error:
            pytest.fail(f"{page}: {line!r}: {error!r}")


@pytest.mark.parametrize("line", ["diffit train --dat x", "diffit sample --network a", "diffit data check --grid"])
def test_a_wrong_command_line_is_noticed(line):
    with pytest.raises((click.ClickException, AssertionError)):
        parse(line)


def texts() -> list[str]:
    """Every text of the source, the values in it left out."""
    text_of = runpy.run_path(str(DOCS / "errors.py"))["text_of"]
    nodes = (node for file in (ROOT / "src").rglob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    return [re.sub(r"\{[^{}]*\}", "…", text_of(node)) for node in nodes if isinstance(node, kinds)]


def test_every_line_that_troubleshooting_explains_is_one_that_diffit_says():
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    said = "\n".join(texts())
    assert len(rows) > 60
    for row in rows:
        parts = [re.escape(part.strip()) for part in row.split("…") if part.strip()]
        assert row.startswith("import ") or re.search("[^\n]*".join(parts), said), row


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_pages_make_no_request(tmp_path):
    pytest.importorskip("zensical", reason="needs pip install 'diffit-torch[docs]'")
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    runpy.run_path(str(tmp_path / "docs/errors.py"), run_name="__main__")
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "No issues found" in said, said
    assert not re.search(r"(?i)warning|error", said), said  # of mkdocstrings, which --strict does not count
    for page in (tmp_path / "docs").rglob("*.md"):
        built = (tmp_path / "site" / page.relative_to(tmp_path / "docs")).with_suffix(".html").read_text()
        assert not re.search(r'<(?:link|script|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//', built), page.name
        assert not re.search(r":(?:func|class|meth|mod):", built), page.name
    reference = (tmp_path / "site/api/diffusion.html").read_text()
    assert 'id="diffit.diffusion.heun"' in reference
    assert "First order, one evaluation a step" in reference
