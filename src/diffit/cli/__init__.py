"""The ``diffit`` command. Each subcommand parses its options and calls one library function."""

import importlib
import os
import sys

import click

from diffit import __version__
from diffit.errors import UserError

# Subcommand -> (module, one line of help). Modules are imported when needed: `diffit --help` must not wait for torch.
COMMANDS = {
    "data": ("diffit.cli.data", "Convert, check and inspect image archives."),
    "train": ("diffit.cli.train", "Train a model on an image archive."),
    "metrics": ("diffit.cli.metrics", "Judge samples: FID and its relatives, near-copies."),
    "sample": ("diffit.cli.sample", "Draw images from a trained model."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(COMMANDS[name][0]), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="diffit")
def cli() -> None:
    """DiffiT: train, sample and evaluate diffusion vision transformers."""


def run(command: click.Command, args: list[str] | None = None) -> None:
    """Run a click command and exit. What the user got wrong is one line on stderr: status 2 for the words, else 1."""
    try:
        sys.exit(command.main(args=args, standalone_mode=False))
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else command.name
        fail(f"{error.format_message().rstrip('.')} (see {path} --help)", 2)
    except (UserError, click.ClickException) as error:
        fail(error.format_message() if isinstance(error, click.ClickException) else str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)


def fail(message: str, status: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # The other processes may be waiting for this one: leave without joining anything, and the launcher ends them.
        os._exit(status)
    sys.exit(status)


def main() -> None:
    """Entry point of the ``diffit`` script."""
    run(cli)
