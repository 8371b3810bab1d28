import torch

from diffit.configs.resolve import DataFacts, resolve
from diffit.data.archive import ImageArchive
from diffit.training import resident, validation
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
    decoded, honest = [], Validation.batches
    monkeypatch.setattr(Validation, "batches", lambda self: (decoded.append(batch) or batch for batch in honest(self)))
    held_out = Validation(stepper, archive)
    losses = [held_out() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2] > 0
    assert sum(len(data) for _, data, _ in decoded) == 12
    monkeypatch.setattr(resident, "SHARE", 0.0)
    assert Validation(stepper, archive)() == losses[0]  # where they do not fit
    streamed = Validation(stepper, archive)
    assert streamed() == streamed() == losses[0]
    assert sum(len(data) for _, data, _ in decoded) == 12 + 3 * 12

    shares = []
    for rank in range(2):
        stepper.procs = Processes(rank, 2, torch.device("cpu"))
        shares.append(list(Validation(stepper, archive).batches()))
    assert [[start for start, *_ in share] for share in shares] == [[0, 8], [4]]
    for start, data, labels in held_out.kept:
        (same,) = (batch for share in shares for batch in share if batch[0] == start)
        assert torch.equal(same[1], data)
        assert torch.equal(same[2], labels)
