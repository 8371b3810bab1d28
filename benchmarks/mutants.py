"""Mutation trial of the core modules: `make mutants`.

Each mutant is one edit of one place, of those that mutmut knows, in a process forked from one that has the libraries
loaded already, against the fast tests of its module alone. Left as they are: annotations, type aliases, raised errors,
decorators, imports, and the arguments of HINTS.

    python -m benchmarks.mutants [module …] [--sample N]

prints every survivor with its line, then the share that was killed; see docs/mutants.md.
"""

import argparse
import difflib
import gc
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "diffusion.edm": ["diffusion/test_edm.py"],
    "diffusion.adm": ["diffusion/test_adm.py"],
    "diffusion.samplers": ["diffusion/test_samplers.py", "diffusion/test_adm.py"],
    "diffusion.guidance": ["diffusion/test_guidance.py"],
    "models.attention": ["models/test_attention.py"],
    "training.ema": ["training/test_ema.py"],
    "utils.randomness": ["utils/test_randomness.py"],
    "metrics.frechet": ["metrics/test_frechet.py"],
}
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--assert=plain", "-m", "not slow and not gpu")
HINTS = ("non_blocking", "pin_memory", "strict")
"""Arguments that change no number: how fast a copy is, and zip's check of an invariant."""
LIBRARIES = (
    "torch",
    "numpy",
    "scipy.stats",
    "scipy.linalg",
    "hypothesis",
    "pydantic",
    "pytest_timeout",
    "diffusers",
    "mpmath",
)


@dataclass(frozen=True)
class Mutant:
    line: int
    change: str
    code: str


class Sites(cst.CSTVisitor):
    """The nodes of a module that an edit of could change what it computes."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[int, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        silent = cst.Annotation | cst.Import | cst.ImportFrom | cst.Raise | cst.Decorator
        if isinstance(node, silent) or _is_alias_or_docstring(node):
            return False
        self.found.append((self.get_metadata(PositionProvider, node).start.line, node))
        return True


def _is_alias_or_docstring(node: cst.CSTNode) -> bool:
    if isinstance(node, cst.Expr):
        return isinstance(node.value, cst.SimpleString | cst.ConcatenatedString)
    names = ("Callable", "Literal")
    return (
        isinstance(node, cst.Assign)
        and isinstance(node.value, cst.Subscript)
        and (isinstance(node.value.value, cst.Name) and node.value.value.value in names)
    )


def mutants_of(source: str) -> list[Mutant]:
    """Every edit that compiles, in the order of the lines."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    sites, bare = Sites(), _without_hints(source)
    wrapper.visit(sites)
    found: dict[str, Mutant] = {}
    for line, node in sites.found:
        for kind, operator in mutation_operators:
            for changed in operator(node) if isinstance(node, kind) else ():
                code = cst.ensure_type(wrapper.module.deep_replace(node, changed), cst.Module).code
                if code not in found and _compiles(code) and _without_hints(code) != bare:
                    found[code] = Mutant(line, _difference(source, code), code)
    return sorted(found.values(), key=lambda mutant: mutant.line)


class _DropHints(cst.CSTTransformer):
    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg | cst.RemovalSentinel:
        keyword = original_node.keyword
        return cst.RemoveFromParent() if keyword is not None and keyword.value in HINTS else updated_node


def _without_hints(code: str) -> str:
    """The code without hints, commas put aside: dropping an argument leaves one behind."""
    return cst.parse_module(code).visit(_DropHints()).code.replace(", )", ")")


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _difference(before: str, after: str) -> str:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return "  →  ".join(" ".join(line[2:].strip() for line in lines_) for lines_ in _removed_and_added(list(lines)))


def _removed_and_added(lines: list[str]) -> Iterator[list[str]]:
    yield [line for line in lines if line.startswith("- ")]
    yield [line for line in lines if line.startswith("+ ")]


class Substitute(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a text."""

    def __init__(self, name: str, path: Path, code: str) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.code, str(self.path), "exec"), module.__dict__)


@dataclass(frozen=True)
class Trial:
    """The tests of ``module`` with a text in its place, in a process of their own."""

    process: int
    ends: float

    @classmethod
    def start(cls, module: str, code: str, limit: float) -> "Trial":
        child = os.fork()
        if not child:
            import pytest

            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            sys.meta_path.insert(0, Substitute(f"diffit.{module}", path_of(module), code))
            tests = [str(ROOT / "tests" / test) for test in TESTS[module]]
            os._exit(int(pytest.main([*tests, *PYTEST]) != 0))
        return cls(child, time.monotonic() + limit)

    def passed(self) -> bool | None:
        """None while it runs; a trial over its limit has failed."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        if done:
            return status == 0
        if time.monotonic() < self.ends:
            return None
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        return False


def survivors_of(module: str, mutants: list[Mutant], limit: float) -> Iterator[Mutant]:
    """Tries as many at once as there are cores."""
    waiting = list(reversed(mutants))
    running: dict[Mutant, Trial] = {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            mutant = waiting.pop()
            running[mutant] = Trial.start(module, mutant.code, limit)
        time.sleep(0.05)
        for mutant, verdict in [(mutant, trial.passed()) for mutant, trial in running.items()]:
            if verdict is not None:
                del running[mutant]
            if verdict:
                yield mutant


def path_of(module: str) -> Path:
    return ROOT / "src" / "diffit" / (module.replace(".", "/") + ".py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="module", help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, metavar="N", help="at most N mutants a module, the same ones each time")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # no child looks through the libraries for garbage
    total = killed = 0
    for module in arguments.modules:
        source = path_of(module).read_text()
        began = time.monotonic()
        if list(survivors_of(module, [Mutant(0, "none", source)], 600)) == []:
            sys.exit(f"{module}: its tests fail without a mutant; run them first")
        limit = 30 + 4 * (time.monotonic() - began)
        mutants = mutants_of(source)
        if arguments.sample and arguments.sample < len(mutants):
            mutants = sorted(random.Random(0).sample(mutants, arguments.sample), key=lambda mutant: mutant.line)
        survivors = 0
        for mutant in survivors_of(module, mutants, limit):
            survivors += 1
            print(f"survived {module}:{mutant.line}: {mutant.change}", flush=True)
        total, killed = total + len(mutants), killed + len(mutants) - survivors
        print(f"{module}: {len(mutants) - survivors} of {len(mutants)} killed", flush=True)
    print(f"killed {killed} of {total} mutants, {killed / total:.1%}")


if __name__ == "__main__":
    main()
