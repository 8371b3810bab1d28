import torch

from diffit.configs.resolve import DataFacts, resolve
from diffit.data.archive import ImageArchive
from diffit.training import validation
from diffit.training.step import Stepper, build_network
from diffit.training.validation import Validation
from diffit.utils.distributed import Processes, alone
from helpers import write_archive


def test_held_out_images_are_decoded_once_a_share_by_each_process_and_chosen_alike(tmp_path, monkeypatch):
    """Two processes, one after the other, in place of two at a time: they see what one sees, each a part."""
    monkeypatch.setattr(validation, "VALIDATION_IMAGES", 12)
    archive = ImageArchive(write_archive(tmp_path / "val.zip", 20), cond=True)
    config = resolve("debug", {"cond": True, "batch_gpu": 4}, DataFacts(3, (16, 16), 3))
    stepper = Stepper(config, alone("cpu"), build_network(config), "fp32")
    read, honest = [], ImageArchive.__getitem__
    monkeypatch.setattr(ImageArchive, "__getitem__", lambda self, i: read.append(i) or honest(self, i))
    held_out = Validation(stepper, archive)
    losses = [held_out() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2] > 0
    assert len(read) == len(set(read)) == 12

    shares = []
    for rank in range(2):
        stepper.procs = Processes(rank, 2, torch.device("cpu"))
        shares.append(Validation(stepper, archive).batches)
    assert [[start for start, *_ in share] for share in shares] == [[0, 8], [4]]
    assert sorted(read[12:]) == sorted(read[:12])
    for start, data, labels in held_out.batches:
        (same,) = (batch for share in shares for batch in share if batch[0] == start)
        assert torch.equal(same[1], data)
        assert torch.equal(same[2], labels)
