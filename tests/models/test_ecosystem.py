"""Both families where other programs take them: ONNX, quantised weights, weights stored in eight bits."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffit.configs.schema import StageSpec
from diffit.models import TMSA, ImageDiffiT, LatentDiffiT

families = pytest.mark.parametrize("family", ["image", "latent"])


def network(family: str) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    """A small network whose parts all act, and arguments for it."""
    torch.manual_seed(0)
    if family == "image":
        stages = StageSpec(blocks=1, width=32, heads=2, window=4), StageSpec(blocks=1, width=32, heads=2, window=None)
        net = ImageDiffiT(stages, image_size=(8, 8), channels=1, cond_dim=32, num_classes=3, augment_dim=9)
        arguments = torch.randn(2, 1, 8, 8), torch.tensor([-1.5, 0.7]), torch.tensor([0, 3]), torch.randn(2, 9)
    else:
        net = LatentDiffiT(8, hidden_size=64, depth=1, num_heads=2, num_classes=3)
        arguments = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    for parameter in net.requires_grad_(False).parameters():
        parameter.normal_(std=0.1)
    return net.eval(), arguments


def assert_onnx_computes_the_same(net: torch.nn.Module, arguments: tuple[Tensor, ...], folder: Path, **options) -> None:
    """The file of ``net`` against ``net``, for another batch too where ``options`` make it dynamic."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(net, arguments, dynamo=True, verbose=False, **options).save(folder / "net.onnx")
    session = runtime.InferenceSession(folder / "net.onnx")
    larger = tuple(torch.cat([part, part.flip(0), part[:1]]) for part in arguments)
    for inputs in (arguments, larger) if options else (arguments,):
        named = {given.name: part.numpy() for given, part in zip(session.get_inputs(), inputs, strict=True)}
        (found,) = session.run(None, named)
        np.testing.assert_allclose(found, net(*inputs).numpy(), rtol=0, atol=1e-5)


@families
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_computes_the_same_for_any_batch(family, tmp_path):
    net, arguments = network(family)
    batch = torch.export.Dim("batch")
    assert_onnx_computes_the_same(net, arguments, tmp_path, dynamic_shapes=[{0: batch} for _ in arguments])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_does_not_depend_on_the_strides_of_the_attention_kernel(tmp_path):
    """Each kernel lays its output out in its own way, and torch remembers that of the first export for the second."""
    attention = TMSA(32, 16, 2, grid_size=8, window_size=4).requires_grad_(False).eval()
    for context in (nullcontext(), sdpa_kernel(SDPBackend.MATH)):
        with context:
            assert_onnx_computes_the_same(attention, (torch.randn(2, 8, 8, 32), torch.randn(2, 16)), tmp_path)


@families
@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_linear_layers_compute_nearly_the_same(family):
    net, arguments = network(family)
    quantised = torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.t_embedder.mlp[0], torch.nn.Linear)
    expected = net(*arguments)
    assert (quantised(*arguments) - expected).norm() < 0.05 * expected.norm()


@families
def test_weights_stored_in_eight_bits_are_cast_layer_by_layer(family):
    hooks = pytest.importorskip("diffusers.hooks")
    net, arguments = network(family)
    expected = net(*arguments)
    hooks.apply_layerwise_casting(
        net, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32, skip_modules_pattern=None
    )
    assert net.t_embedder.mlp[0].weight.dtype == torch.float8_e4m3fn
    assert (net(*arguments) - expected).norm() < 0.1 * expected.norm()


@families
def test_half_precision_networks_take_their_dtype_from_the_input(family):
    net, (x, t, *rest) = network(family)
    expected = net(x, t, *rest)
    rest = [part.bfloat16() if part.is_floating_point() else part for part in rest]
    out = net.bfloat16()(x.bfloat16(), t, *rest)  # a timestep stays float32: bfloat16 cannot tell 999 from 1000
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_tmsa_alone_takes_a_map_of_thirteen_by_nine():
    attention = TMSA(32, 64, 4, grid_size=(13, 9), window_size=4)
    out = attention(torch.randn(2, 13, 9, 32), torch.randn(2, 64))
    assert out.shape == (2, 13, 9, 32)
    assert out.isfinite().all()
