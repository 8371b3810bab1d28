"""Write errors.md next to this file: every line with which diffit refuses something, collected from its source."""

import ast
import re
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src/diffit"
TITLES = {
    "data": "Data",
    "configs": "Options and configurations",
    "training": "Training",
    "sampling": "Sampling",
    "explore": "Looking inside",
    "metrics": "Metrics",
    "weights": "Network files",
    "models": "Networks and autoencoders",
    "pipeline": "DiffiT in diffusers",
    "cli": "Commands",
    "utils": "Files, processes and the Hub",
}
INTRODUCTION = """# Every error

Look for the part of a line that does not change: values stand in braces here. What the line names last is what to do;
[troubleshooting](troubleshooting.md) says why the common ones happen.
"""


def messages(tree: ast.AST) -> list[str]:
    """The texts of ``UserError`` and of what a configuration refuses, their values as ``{name}``."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("UserError", "ValueError")]
    texts = [text_of(call.args[0]) for call in sorted(named, key=lambda call: call.lineno)]
    return [text for text in texts if re.search(r"\w{3}", re.sub(r"\{.*?\}", "", text))]


def text_of(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(text_of, values))
        case ast.BinOp(left=left, right=right):
            return text_of(left) + text_of(right)
        case ast.FormattedValue(value=ast.Name(id=name) | ast.Attribute(attr=name)):
            return f"{{{name.strip('_').lower()}}}"
    return "{…}"


def by_room() -> dict[str, list[str]]:
    """Room to messages, each once. Of ValueErrors only those that reach a user, as parts of a configuration's."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(SOURCE.rglob("*.py")):
        text = file.read_text()
        if file.name != "schema.py":
            text = text.replace("ValueError(", "_(")
        found[file.relative_to(SOURCE).parts[0].removesuffix(".py")] += messages(ast.parse(text))
    return {room: list(dict.fromkeys(texts)) for room, texts in found.items()}


def main() -> None:
    found, lines = by_room(), [INTRODUCTION]
    for room in dict.fromkeys([*TITLES, *found]):
        if texts := found.get(room):
            lines += [f"\n## {TITLES.get(room, room.capitalize())}\n", *(f"- `` {text} ``" for text in texts)]
    (HERE / "errors.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
