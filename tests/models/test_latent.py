"""The latent model against a straightforward NumPy computation that knows nothing of it but its state dict."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.configs.presets import get_preset
from diffit.models import build
from diffit.models.latent import LatentDiffiT

CLASSES = 5
SMALL = {"hidden_size": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": CLASSES}


def latent(input_size=(4, 6), *, seed: int = 0, **changes) -> LatentDiffiT:
    """Every parameter random and of order one, so that each term weighs in the result; float64."""
    net = LatentDiffiT(input_size, **SMALL | changes).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        scale = parameter[0].numel() ** -0.5 if name.endswith("weight") and "table" not in name else 0.5
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
    return net


def inputs(input_size=(4, 6), *, batch: int = 3, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, *input_size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([999.0, 0.0, 437.25])[:batch].double(), torch.tensor([0, CLASSES, 3])[:batch]


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def time_features(t: float) -> list[float]:
    angles = [t * math.exp(-math.log(10_000) * i / 128) for i in range(128)]
    return [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]


def sinusoids(place: int, width: int) -> list[float]:
    angles = [place / 10_000 ** (i / (width // 2)) for i in range(width // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def by_the_equations(p: dict[str, np.ndarray], x: np.ndarray, t: float, y: int | None, *, depth: int) -> np.ndarray:
    """CONTRACT's forward for one sample ``(C, h, w)``, a token, a head and a pair of tokens at a time."""
    width, C, s, _ = p["x_embedder.proj.weight"].shape
    H, W = x.shape[1] // s, x.shape[2] // s
    places = list(itertools.product(range(H), range(W)))

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    tokens = np.zeros((H * W, width))
    for n, (row, column) in enumerate(places):
        for c, a, b in itertools.product(range(C), range(s), range(s)):
            tokens[n] += p["x_embedder.proj.weight"][:, c, a, b] * x[c, row * s + a, column * s + b]
        # float32, as the file stores it
        position = np.array(sinusoids(column, width // 2) + sinusoids(row, width // 2), dtype=np.float32)
        tokens[n] += p["x_embedder.proj.bias"] + position

    cond = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", np.array(time_features(t)))))
    if y is not None:
        cond = cond + p["y_embedder.embedding_table.weight"][y]

    for i in range(depth):
        name, table = f"blocks.{i}.", p[f"blocks.{i}.attn.relative_position_bias_table"]
        heads = table.shape[1]
        qkv = linear(name + "attn.qkv", layer_norm(tokens)) + linear(name + "attn.qkv_temb", cond)
        q, k, v = qkv.reshape(H * W, 3, heads, width // heads).transpose(1, 2, 0, 3)
        mixed = np.zeros((H * W, heads, width // heads))
        for head, (n, (yi, xi)) in itertools.product(range(heads), enumerate(places)):
            logits = np.array(
                [
                    q[head, n] @ k[head, m] / math.sqrt(width // heads)
                    + table[(yi - yj + H - 1) * (2 * W - 1) + xi - xj + W - 1, head]
                    for m, (yj, xj) in enumerate(places)
                ]
            )
            weights = np.exp(logits - logits.max())
            mixed[n, head] = weights / weights.sum() @ v[head]
        tokens = tokens + linear(name + "attn.proj", mixed.reshape(H * W, width))
        tokens = tokens + linear(name + "mlp.fc2", gelu_tanh(linear(name + "mlp.fc1", layer_norm(tokens))))

    features = linear("final_layer.linear", silu(layer_norm(tokens)))
    out = np.zeros((2 * C, H * s, W * s))
    for n, (row, column) in enumerate(places):
        for a, b, c in itertools.product(range(s), range(s), range(2 * C)):
            out[c, row * s + a, column * s + b] = features[n, (a * s + b) * 2 * C + c]
    return out


def expected_output(net: LatentDiffiT, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    p = {key: value.numpy() for key, value in net.state_dict().items() if key != "pos_embed"}
    ys = [None] * len(x) if y is None else y.tolist()
    samples = [
        by_the_equations(p, x[i].numpy(), float(t[i]), ys[i], depth=len(net.blocks))  # a row a sample
        for i in range(len(x))
    ]
    return torch.from_numpy(np.stack(samples))


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ((4, 6), {}),
        ((6, 2), {"patch_size": 1, "depth": 1}),
        ((8, 8), {"patch_size": 4, "in_channels": 3, "num_heads": 3, "depth": 2}),
        ((4, 4), {"num_classes": 0}),
        ((4, 4), {"label_drop": 0.0}),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_forward_pass_is_the_equations_token_by_token(size, changes):
    net = latent(size, **changes)
    x, t, y = inputs(size, channels=changes.get("in_channels", 4))
    if "num_classes" in changes:
        y = None
    elif "label_drop" in changes:
        y = y.clamp(max=CLASSES - 1)  # there is no null class
    expected = expected_output(net, x, t, y)
    out = net(x, t, y)
    assert out.shape == (3, 2 * x.shape[1], *size)
    assert_close(out, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_one_timestep_serves_the_whole_batch():
    net, (x, t, y) = latent(), inputs()
    assert_close(net(x, t[:1], y), net(x, t[:1].expand(3), y), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other():
    net, (x, t, y) = latent(), inputs()
    together = net(x, t, y)
    for i in range(3):
        assert_close(net(x[i : i + 1], t[i : i + 1], y[i : i + 1]), together[i : i + 1], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_float32_is_near_float64():
    net, (x, t, y) = latent(), inputs()
    exact = net(x, t, y)
    assert_close(net.float()(x.float(), t.float(), y), exact.float(), rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_labels_must_be_there_where_there_are_classes_and_nowhere_else():
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"5 classes: pass y in \[0, 5\]"):
        latent()(x, t)
    with pytest.raises(ValueError, match="0 classes: pass y=None"):
        latent(num_classes=0)(x, t, y)


# --- the official layout --------------------------------------------------------------------------------------------


def official_shapes(tokens: int, rows: int) -> dict[str, tuple[int, ...]]:
    """CONTRACT's table, without the index."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
    }
    for i in range(28):
        shapes[f"blocks.{i}.attn.relative_position_bias_table"] = (rows, 16)
        for name, out, into in [
            ("attn.qkv_temb", 3456, 1152),
            ("attn.qkv", 3456, 1152),
            ("attn.proj", 1152, 1152),
            ("mlp.fc1", 4608, 1152),
            ("mlp.fc2", 1152, 4608),
        ]:
            shapes[f"blocks.{i}.{name}.weight"] = (out, into)
            shapes[f"blocks.{i}.{name}.bias"] = (out,)
    return shapes


@pytest.mark.parametrize(
    ("preset", "tokens", "rows", "trainable"),
    [("imagenet256", 256, 961, 561_035_232), ("imagenet512", 1024, 3969, 562_382_816)],
)
def test_keys_shapes_and_count_are_those_of_the_official_weights(preset, tokens, rows, trainable):
    with torch.device("meta"):
        net = build(get_preset(preset).model)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert shapes == official_shapes(tokens, rows)
    assert len(shapes) + 28 == 346  # with an index in every layer
    assert sum(parameter.numel() for parameter in net.parameters()) == trainable


def test_a_depth_of_30_is_another_count():
    with torch.device("meta"):
        net = LatentDiffiT(depth=30)
    assert sum(parameter.numel() for parameter in net.parameters()) == 600_906_752


def test_the_arguments_default_to_the_official_model_at_256_pixels():
    with torch.device("meta"):
        default, preset = LatentDiffiT(), build(get_preset("imagenet256").model)
    assert {k: v.shape for k, v in default.state_dict().items()} == {k: v.shape for k, v in preset.state_dict().items()}


def test_no_index_is_stored():
    net = latent()
    assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float64}
    assert [name for name, _ in net.named_buffers()] == ["pos_embed"]
    assert "pos_embed" in net.state_dict()


# --- beginnings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh() -> LatentDiffiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LatentDiffiT(8, hidden_size=256, depth=2, num_heads=4, num_classes=100)


def test_linear_layers_begin_xavier_uniform_with_zero_biases(fresh):
    for name, module in fresh.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        assert not module.bias.any(), name
        if name.startswith("t_embedder"):
            continue
        fan_out, fan_in = module.weight.flatten(1).shape
        bound = math.sqrt(6 / (fan_in + fan_out)) if name != "final_layer.linear" else 0.0
        assert module.weight.abs().max() <= bound, name
        assert_close(module.weight.std().item(), bound / math.sqrt(3), rtol=0.05, atol=0)


def test_time_and_label_begin_normal_with_0_02(fresh):
    for weight in (
        fresh.t_embedder.mlp[0].weight,
        fresh.t_embedder.mlp[2].weight,
        fresh.y_embedder.embedding_table.weight,
    ):
        assert_close(weight.std().item(), 0.02, rtol=0.03, atol=0)
        assert abs(weight.mean().item()) < 4 * 0.02 / weight.numel() ** 0.5
        assert weight.abs().max() > 3.5 * 0.02  # not truncated, not uniform


def test_bias_tables_begin_normal_with_0_02(fresh):
    for block in fresh.blocks:
        assert_close(block.attn.relative_position_bias_table.std().item(), 0.02, rtol=0.15, atol=0)


def test_a_new_network_answers_zero(fresh):
    out = fresh(torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([1, 100]))
    assert_close(out, torch.zeros(2, 8, 8, 8), rtol=0, atol=0)


def test_without_label_drop_there_is_no_null_class():
    assert latent(label_drop=0.0).y_embedder.embedding_table.weight.shape == (CLASSES, 24)
    assert latent(label_drop=0.1).y_embedder.embedding_table.weight.shape == (CLASSES + 1, 24)
    assert latent(num_classes=0).y_embedder is None


def test_every_parameter_learns():
    """One that does not breaks training in several processes."""
    net = latent()
    net(*inputs()).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().max() > 0, name


# --- variants that change nothing -----------------------------------------------------------------------------------


def gradients(net: LatentDiffiT) -> dict[str, Tensor]:
    net.zero_grad()
    net(*inputs()).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def test_gradient_checkpointing_changes_nothing_but_recomputes():
    net = latent().train()
    plain = gradients(net)
    calls = []
    net.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(net)
    assert len(calls) == 1
    net.set_grad_ckpt(True)
    assert_close(gradients(net), plain, rtol=1e-12, atol=1e-12)
    assert len(calls) == 3


def test_it_compiles_as_one_graph():
    torch.compiler.reset()
    net = latent(depth=1).train()
    expected = gradients(net)
    net.compile(fullgraph=True, backend="aot_eager")
    assert_close(gradients(net), expected, rtol=1e-11, atol=1e-11)
