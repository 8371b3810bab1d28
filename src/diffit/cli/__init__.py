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
    """Run a click command; a :class:`UserError` becomes one line on stderr and exit status 1."""
    try:
        command.main(args=args, prog_name=None if args is None else command.name)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.stdout.flush()
        sys.stderr.flush()
        # Under torchrun the other ranks may be waiting in a collective: leave without joining anything.
        os._exit(1) if "TORCHELASTIC_RUN_ID" in os.environ else sys.exit(1)


def main() -> None:
    """Entry point of the ``diffit`` script."""
    run(cli)
