"""``diffit export``."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--network",
    required=True,
    metavar="FILE|ID",
    help="File that training wrote, NVIDIA's official weights, or the Hub id of either.",
)
@click.option(
    "--to",
    required=True,
    type=click.Choice(["official", "diffusers", "hub-folder"]),
    help="The official layout, a folder for DiffiTPipeline, or a folder to upload to the Hub.",
)
@click.option("--dest", required=True, type=click.Path(path_type=Path), help="File or folder to write.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the weights. Default: the file's.")
@click.option(
    "--vae",
    metavar="PATH|ID",
    help="Autoencoder that a diffusers folder holds and a hub-folder names. Default: the file's.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is at --dest.")
def export(network: str, to: str, dest: Path, dtype: str | None, vae: str | None, overwrite: bool) -> None:
    """Write a network in another form.

    official is one .safetensors file with the official names and index buffers. diffusers is a folder that
    DiffiTPipeline.from_pretrained reads. hub-folder is the network and a model card to complete and upload.
    """
    if to == "diffusers":
        from diffit.pipeline import write_pipeline

        path = write_pipeline(network, dest, dtype=dtype, vae=vae, overwrite=overwrite)
    else:
        from diffit.weights.export import export as write

        path = write(network, to, dest, dtype=dtype, vae=vae, overwrite=overwrite)
    click.echo(f"wrote {path}")
