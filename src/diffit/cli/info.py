"""``diffit info``."""

import click

from diffit.cli.options import Numbers


@click.command()
@click.argument("target", metavar="PRESET|FILE|ID")
@click.option("--num-blocks", "--depth", type=Numbers(), metavar="N",
              help="Of a preset: another number of blocks, or one a stage.")  # fmt: skip
def info(target: str, num_blocks: list[int] | None) -> None:
    """Say what a preset or a network file is, and what it costs to run.

    Multiply-accumulates are counted on tensors without memory, so the largest model takes a second.
    """
    from diffit.cli.describe import describe

    click.echo(describe(target, tuple(num_blocks) if num_blocks else None))
