"""Detectors that tests write themselves: no test needs a file from elsewhere."""

import warnings

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Weights of torch-fidelity's network, random, but such that every layer passes on signals of order one."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Unloaded(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state, *args, **kwargs):
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: {})
        net = Unloaded("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
    net.fc.weight.normal_(0, 0.05, generator=generator)
    net.fc.bias.normal_(0, 1, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "random-inception.pth"
    torch.save(net.state_dict(), path)
    return path


class Filters(nn.Module):
    """12 features: the mean responses to random filters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(images.float() / 64)).mean(dim=[2, 3])


@pytest.fixture(scope="session")
def torchscript(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "filters.pt"
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        torch.jit.script(Filters().eval()).save(str(path))
    return path
