"""The ``diffit`` command. Each subcommand parses its options and calls one library function."""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import signal
import sys
import time
from difflib import get_close_matches

import click

from diffit import __version__
from diffit.errors import DISTRIBUTION, MESSAGE_LIMIT, UserError, printable
from diffit.utils.urls import remember

logger = logging.getLogger(__name__)
MANY_FILES = 8192  # open at once

# Subcommand -> (module, one line of help). Modules are imported when needed: `diffit --help` must not wait for torch.
COMMANDS = {
    "data": ("diffit.cli.data", "Convert, encode, check and inspect image archives."),
    "train": ("diffit.cli.train", "Train a model on an image archive."),
    "distill": ("diffit.cli.distill", "Make a student that samples in 8, 4, 2 or 1 steps."),
    "metrics": ("diffit.cli.metrics", "Judge samples: FID and its relatives, near-copies."),
    "sample": ("diffit.cli.sample", "Sample images from a trained model."),
    "tune-schedule": ("diffit.cli.tune", "Fit the noise levels of few steps to a model."),
    "export": ("diffit.cli.export", "Write a network for the official implementation, for diffusers or for the Hub."),
    "studio": ("diffit.cli.studio", "Try models, look into them and watch runs, in the browser."),
    "info": ("diffit.cli.info", "Say what a preset or a network file is, and what it costs to run."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[name][0]), name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="diffit")
def cli() -> None:
    """DiffiT: train, sample and evaluate diffusion vision transformers."""


class Lines(logging.Formatter):
    """What the library logs, as lines of a command: ``warning: …`` for warnings, else the message alone."""

    def format(self, record: logging.LogRecord) -> str:
        record.msg, record.args = printable(record.getMessage(), MESSAGE_LIMIT), None  # names of files may be in it
        return ("warning: " if record.levelno == logging.WARNING else "") + super().format(record)


def run(command: click.Command, args: list[str] | None = None) -> None:
    """Run a click command and exit. What the user got wrong is one line on stderr: status 2 for the words, else 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file on Windows may have no "−": better "?" than no help at all
            stream.reconfigure(errors="replace")
    wait_without_spinning()
    open_many_files()
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("diffit").setLevel(logging.INFO)
    warn_of_namesake()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not os.environ.get(name, "0").isdecimal():
            fail(f"{name}={os.environ[name]}: set by torchrun, to a number; unset it, or start with torchrun", 2)
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # a launcher's processes may wait for one another: they end at once
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # by way of what tidies up
    # From here on nothing sees the token of a signed URL, but what opens it.
    args = [remember(word) for word in (sys.argv[1:] if args is None else args)]
    try:
        # --sigma_min is --sigma-min: EDM's sampler and torchrun's habit write underscores.
        sys.exit(
            command.main(args=args, standalone_mode=False, token_normalize_func=lambda name: name.replace("_", "-"))
        )
    except click.UsageError as error:
        if error.ctx is not None and type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            click.echo(error.ctx.get_help(), err=True)
            sys.exit(2)
        path = error.ctx.command_path if error.ctx else "diffit"
        if isinstance(error, click.NoSuchOption) and error.possibilities:  # the nearest alone, not the first by name
            near = get_close_matches(error.option_name, error.possibilities, n=1, cutoff=0)
            error = click.NoSuchOption(error.option_name, possibilities=near)
        message = " ".join(error.format_message().split())  # click lists choices on lines of their own
        fail(f"{message.rstrip('.')} (see {path} --help)", 2)
    except (UserError, click.ClickException) as error:
        fail(error.format_message() if isinstance(error, click.ClickException) else str(error), 1)
    except OSError as error:  # what no one foresaw, such as a folder that may not be listed
        place = f"{error.filename}: " if error.filename else ""
        fail(f"{place}{error.strerror or error}", 1)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's is a RuntimeError
            fail("out of memory on this machine; use smaller numbers, or a machine with more", 1)
        if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # Python before 3.13
            fail(f"{error}; choose another place", 1)
        # A zip that was interrupted while a member was open complains when it is closed, in place of the interruption.
        stopped = interruption(error)
        if stopped is not None:
            fail("interrupted", stopped)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which must not be imported for this
            fail(
                "out of memory on the device; use a smaller --batch-gpu or --batch, --grad-ckpt or --precision bf16", 1
            )
        _let_another_process_speak(first_waits=1)
        raise


def wait_without_spinning() -> None:
    """Have the threads of a CPU sleep soon when they wait for one another; before torch is imported.

    By default they spin, and where other programs want the cores a step takes ten times as long (docs/results.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def open_many_files() -> None:
    """As many as this user may, where a shell's limit is less (1,024, on a Mac 256): archives may be of many zips."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def warn_of_namesake() -> None:
    """The public index's ``diffit``, a differ for Spark data frames, installs a module of the same name over ours.

    Installed after ours, its own command runs in place of this one; before ours, removing it removes files of ours.
    """
    try:
        summary = importlib.metadata.metadata("diffit").get_all("Summary") or [""]
    except importlib.metadata.PackageNotFoundError:
        return
    if "spark" in summary[0].lower():
        logger.warning(
            "another project's package 'diffit' shares this module's folder; "
            f"pip uninstall diffit, then pip install --force-reinstall --no-deps {DISTRIBUTION}"
        )


def interruption(error: BaseException | None) -> int | None:
    """The exit status that is due if a Ctrl-C or SIGTERM was under way when ``error`` came up, else None."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | click.Abort):
            return 130
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            return error.code
        error = error.__context__
    return None


def _let_another_process_speak(first_waits: float) -> None:
    """Most errors are met by all processes alike, or are lost connections to one that has told its error and gone.

    The launcher ends the others within a second of that one's exit; who is still there then tells its own story.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(first_waits if os.environ.get("RANK", "0") == "0" else 3)


def fail(message: str, status: int) -> None:
    _let_another_process_speak(first_waits=0)
    click.echo(f"error: {printable(message, MESSAGE_LIMIT)}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # The other processes may be waiting for this one: leave without joining anything, and the launcher ends them.
        os._exit(status)
    sys.exit(status)


def main() -> None:
    """Entry point of the ``diffit`` script."""
    run(cli)
