"""``diffit studio``."""

import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from diffit.cli.options import GroupedCommand, Options, with_options
from diffit.errors import UserError, install_hint

FOLDER = click.Path(path_type=Path)
AUTH = "DIFFIT_STUDIO_AUTH"

OPTIONS: Options = {
  "What is shown": [
    click.option("--network", "networks", multiple=True, metavar="FILE|RUN|ID",
                 help="Network to try: snapshot, run folder, official weights or Hub id; may be given several times."),
    click.option("--runs", type=FOLDER, help="Folder of runs to watch; their snapshots can be tried too."),
    click.option("--data", type=FOLDER, help="Image archive to look at."),
    click.option("--vae", metavar="PATH|ID", help="Autoencoder of latent models.  [default: the files']"),
    click.option("--keep", type=click.IntRange(min=1), default=3, show_default=True,
                 help="Networks that stay in memory; the least recently used one goes."),
  ],
  "Who sees it": [
    click.option("--host", default="127.0.0.1", show_default=True,
                 help="Address to listen at; 0.0.0.0 is every network of this machine."),
    click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, help="Port to listen at."),
    click.option("--auth-file", type=FOLDER,
                 help=f"File with lines USER:PASSWORD.  [default: one such line in ${AUTH}, else nobody is asked]"),
    click.option("--share", is_flag=True, help="Put the page on the internet, through a server of Gradio's makers."),
  ],
}  # fmt: skip


@click.command(cls=GroupedCommand)
@with_options(OPTIONS)
def studio(networks: tuple[str, ...], runs: Path | None, data: Path | None, vae: str | None, **options: Any) -> None:
    """A page in the browser: try models, look into them, watch runs.

    It listens on this machine alone unless --host or --share says otherwise, and asks nothing of the network.
    """
    if not networks and runs is None:
        raise UserError("nothing to show: pass --network FILE, or --runs DIR")
    for name, path in (("--runs", runs), ("--data", data)):
        if path is not None and not path.exists():
            raise UserError(f"{name} {path}: not there; check the spelling")
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"the page needs gradio: {install_hint('studio')}")
    from diffit.studio import Shelf
    from diffit.studio.app import parse_auth, read_auth, serve
    from diffit.weights import read_header

    auth = None if options["auth_file"] is None else read_auth(options["auth_file"])
    if auth is None and (line := os.environ.get(AUTH)):
        auth = parse_auth([line], f"{AUTH}: expected USER:PASSWORD; set it so, or unset it")
    for network in networks:
        read_header(network)  # a mistyped name is said here, not in the page
    shelf = Shelf(networks, runs, data, vae, keep=options["keep"])
    host, port = options["host"], options["port"]
    click.echo(
        f"diffit studio: http://{f'[{host}]' if ':' in host else host}:{port} on {shelf.device} (Ctrl-C ends it)"
    )
    with suppress(KeyboardInterrupt):  # it is how the page ends
        serve(shelf, host=host, port=port, share=options["share"], auth=auth)
