"""Metrics of a run: when they are due, where they go, and the best weights by each."""

from pathlib import Path
from typing import Any

from diffit.configs.schema import Config
from diffit.data.archive import ImageArchive
from diffit.data.open import Archive
from diffit.errors import UserError
from diffit.metrics.evaluate import evaluate_network
from diffit.metrics.record import read_records, record_file
from diffit.metrics.suite import Suite, better, headline
from diffit.models.autoencoder import Autoencoder
from diffit.sampling.model import Model
from diffit.sampling.settings import with_sampling
from diffit.training.run_dir import RunLog
from diffit.utils.distributed import Processes
from diffit.weights.file import save_network


def sampled_for_metrics(config: Config) -> Config:
    """``config`` with the solver and steps that metrics of a run are to use."""
    return with_sampling(config, sampler=config.training.metrics_sampler, steps=config.training.metrics_steps)


def best_file(run_dir: Path, name: str) -> Path:
    """The best weights of a run by the metric ``name``."""
    return run_dir / record_file(name).replace("metric-", "network-best-").replace(".jsonl", ".safetensors")


class Evaluator:
    """The metrics that a configuration asks for. Made before training starts, so that what is missing is said then."""

    def __init__(
        self,
        config: Config,
        archive: Archive,
        procs: Processes,
        autoencoder: Autoencoder | None = None,
        *,
        batch: int,
        precision: str,
    ) -> None:
        self.config, self.archive, self.procs, self.autoencoder = config, archive, procs, autoencoder
        self.batch, self.precision = batch, precision
        sampled_for_metrics(config)  # UserError for what does not suit the model
        names = config.training.metrics
        reference = config.training.metrics_ref
        if reference is None and isinstance(archive, ImageArchive):
            reference = archive.location
        if names and reference is None:
            raise UserError(
                f"--metrics {','.join(names)}: compare with images, and {archive.path} holds latents; "
                "give the images that they were made of: --metrics-ref ARCHIVE"
            )
        self.suite = None
        if names and reference:
            scripts = config.training.allow_scripts
            self.suite = Suite(names, Path(reference), config.image_shape, procs, batch=batch, allow_scripts=scripts)

    def pending(self, run_dir: Path, images_seen: int) -> bool:
        """Whether a metric has no record of this moment yet. The first process looks, for all."""
        if self.suite is None:
            return False
        missing = self.procs.is_first and any(
            all(record.get("images") != images_seen for record in read_records(run_dir / record_file(name)))
            for name in self.suite.names
        )
        return bool(self.procs.broadcast(missing))

    def __call__(self, net: Any, images_seen: int, log: RunLog | None) -> list[dict[str, Any]]:
        """Records of the averaged weights ``net``, which go into the ``log`` of the first process.

        All processes call this together. Where a value is the best so far, the weights are kept as
        ``network-best-<metric>.safetensors``.
        """
        assert self.suite is not None
        kimg = images_seen / 1000
        model = Model(net, sampled_for_metrics(self.config), self.autoencoder, self.precision)
        facts = {"images": images_seen, "kimg": kimg}
        records = evaluate_network(self.suite, model, real_labels=self.archive.labels, batch=self.batch, facts=facts)
        for record in records if log is not None else ():
            assert log is not None
            path = log.run_dir / record_file(record["metric"])
            name, value = headline(record["results"])
            known = [old for old in read_records(path) if isinstance(old.get("images"), int)]  # of this run
            earlier = [headline(old["results"])[1] for old in known if old["images"] < images_seen]
            if all(better(name, value, old) for old in earlier):
                best = best_file(log.run_dir, record["metric"])
                save_network(best, net.state_dict(), self.config, kimg=kimg)
            if all(old["images"] != images_seen for old in known):
                log.metric(path, record)
        return records
