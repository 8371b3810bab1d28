"""``--dry-run``: the resolved configuration and what it takes, on any machine."""

import json

from diffit.configs.resolve import accumulation
from diffit.configs.schema import Config
from diffit.data.archive import ImageArchive
from diffit.training.estimate import estimate


def describe(config: Config, processes: int, archive: ImageArchive | None) -> str:
    """Several lines of text for a person; the configuration in them is the JSON of ``training_options.json``."""
    training = config.training
    batch_gpu, rounds = accumulation(training.batch, training.batch_gpu, processes)
    cost = estimate(config, batch_gpu, training.precision)
    channels, height, width = config.image_shape
    if archive is not None:
        data = f"{len(archive)} images: {archive.path}"
        epochs = f", {training.steps * training.batch / len(archive):.3g} epochs"
    else:
        data = (
            f"{config.data.path} is not there: size and channels are the preset's" if config.data.path else "not given"
        )
        epochs = ""
    # Only the data knows how many classes --cond will have.
    classes = config.model.num_classes or ("no" if not config.data.cond else "the data's")
    lines = [
        json.dumps(config.model_dump(mode="json"), indent=2),
        f"preset      {config.preset}, {width}×{height}×{channels}, {classes} classes",
        f"data        {data}",
        f"parameters  {cost.parameters:,}",
        f"compute     {cost.macs / 1e9:.4g} G multiply-accumulates an image and forward pass",
        f"batch       {training.batch} = {batch_gpu} per GPU × {processes} processes × {rounds} accumulated",
        f"duration    {training.kimg:,g} kimg, {training.steps:,} steps{epochs}",
        f"memory      about {cost.training_bytes / 2**30:.2f} GiB a process: {cost.state_bytes / 2**30:.2f} for "
        f"weights, gradients, moments and average, {cost.activation_bytes / 2**30:.2f} for activations",
        f"sampling    {config.sampling.sampler}, {config.sampling.steps} steps",
        "dry run: nothing was written",
    ]
    return "\n".join(lines)
