"""TMSA against a loop over single tokens, and against masked attention over the whole map."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from diffit.models import attention as module_of_attention
from diffit.models.attention import (
    MAX_WINDOWS,
    TMSA,
    fused_attention,
    in_parts,
    is_exporting,
    is_relative_position_index,
    join_heads,
    kernel_attention,
    plain_attention,
    relative_position_index,
    split_heads,
)

GRADIENTS = (
    "relative_position_bias_table",
    "qkv.weight",
    "qkv.bias",
    "qkv_temb.weight",
    "qkv_temb.bias",
    "proj.weight",
)

# (H, W) of the map, window: square and rectangular, dividing and not, larger than the map, global.
CASES = [
    ((4, 4), 2),
    ((4, 6), 2),
    ((4, 6), (2, 3)),
    ((5, 7), 3),
    ((7, 4), (4, 3)),
    ((6, 7), (2, 3)),  # only the width is padded
    ((5, 6), (2, 3)),  # only the height is
    ((3, 5), 4),
    ((2, 3), 8),
    ((1, 1), 2),
    ((3, 3), None),
    ((2, 5), None),
]
cases = pytest.mark.parametrize(("size", "window"), CASES, ids=str)


def tmsa(size, window, *, dim=6, heads=2, cond_dim=5, seed=0, fused=True, dtype=torch.float64) -> TMSA:
    """Every parameter random and of order one, so that each term of Eq. 6 weighs in the result."""
    module = TMSA(dim, cond_dim, heads, grid_size=size, window_size=window, fused=fused).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 and parameter.shape[-1] != heads else 1.0
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * scale
    return module


def inputs(size, *, batch=2, dim=6, cond_dim=5, seed=1, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *size, dim, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(batch, cond_dim, generator=generator, dtype=torch.float64).to(dtype)


def token_by_token(module: TMSA, x: Tensor, cond: Tensor, size, window) -> np.ndarray:
    """CONTRACT §1 Eq. 3–6 and §3, in NumPy, reading nothing of the module but its state dict."""
    p = {key: value.double().numpy() for key, value in module.state_dict().items()}
    x, cond = x.double().numpy(), cond.double().numpy()
    heads = p["relative_position_bias_table"].shape[1]
    dim = x.shape[-1]
    d = dim // heads
    pair = size if window is None else (window, window) if isinstance(window, int) else window
    h, w = min(pair[0], size[0]), min(pair[1], size[1])
    places = list(itertools.product(range(x.shape[1]), range(x.shape[2])))
    out = np.zeros(x.shape)
    for b, (yi, xi) in itertools.product(range(len(x)), places):
        time = p["qkv_temb.weight"] @ cond[b] + p["qkv_temb.bias"]

        def qkv(y, x_, b=b, time=time):
            return (p["qkv.weight"] @ x[b, y, x_] + p["qkv.bias"] + time).reshape(3, heads, d)

        seen = [(y, x_) for y, x_ in places if window is None or (y // h, x_ // w) == (yi // h, xi // w)]
        result = np.zeros((heads, d))
        for head in range(heads):
            query = qkv(yi, xi)[0, head]
            logits = []
            for yj, xj in seen:
                row = (yi - yj + h - 1) * (2 * w - 1) + (xi - xj + w - 1)
                logits.append(
                    query @ qkv(yj, xj)[1, head] / math.sqrt(d) + p["relative_position_bias_table"][row, head]
                )
            weights = np.exp(logits) / np.exp(logits).sum()
            result[head] = sum(a * qkv(yj, xj)[2, head] for a, (yj, xj) in zip(weights, seen, strict=True))
        out[b, yi, xi] = p["proj.weight"] @ result.reshape(dim) + p["proj.bias"]
    return out


def masked_global(module: TMSA, x: Tensor, cond: Tensor, window: tuple[int, int]) -> Tensor:
    """Attention of every token to the whole map, with the tokens of other windows masked; Swin's gathered bias."""
    B, H, W, D = x.shape
    h, w = window
    y, x_ = (axis.flatten() for axis in torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))
    number = (y // h) * W + x_ // w
    other = number[:, None] != number[None]
    row = (y[:, None] - y + h - 1) * (2 * w - 1) + x_[:, None] - x_ + w - 1
    bias = module.relative_position_bias_table[row.masked_fill(other, 0)].permute(2, 0, 1).masked_fill(other, -math.inf)
    tokens = (module.qkv(x) + module.qkv_temb(cond)[:, None, None]).reshape(B, H * W, 3, module.num_heads, -1)
    q, k, v = tokens.unbind(2)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return module.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, H, W, D))


def gradients(module: TMSA, x: Tensor, cond: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of a fixed random functional of it."""
    x, cond = x.detach().requires_grad_(), cond.detach().requires_grad_()
    module.zero_grad()
    out = module(x, cond)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * direction.to(out)).sum().backward()
    found = {name: module.get_parameter(name).grad for name in GRADIENTS}
    return {"out": out.detach(), "x": x.grad, "cond": cond.grad, **found}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Absolute tolerance relative to the largest entry of each tensor: small entries carry the rounding of large."""
    for name, value in expected.items():
        bound = tolerance * value.abs().max().item()
        assert_close(
            actual[name].cpu(), value.cpu(), rtol=0, atol=bound, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}"
        )


@cases
@pytest.mark.parametrize("attention", [fused_attention, kernel_attention, plain_attention])
def test_it_is_equations_3_to_6_token_by_token(size, window, attention):
    module, (x, cond) = tmsa(size, window), inputs(size)
    module.attention = attention
    expected = torch.from_numpy(token_by_token(module, x, cond, size, window))
    assert_close(module(x, cond), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "window"), [((8, 8), (4, 4)), ((6, 9), (2, 3)), ((7, 5), (4, 4)), ((9, 4), (2, 3))])
def test_windows_are_global_attention_with_other_windows_masked(size, window):
    module, (x, cond) = tmsa(size, window), inputs(size, batch=3)
    assert_close(module(x, cond), masked_global(module, x, cond, window), rtol=1e-12, atol=1e-12)
    mask = masked_global(module, x, cond, window).square().sum()
    module(x, cond).square().sum().backward()
    found = [parameter.grad for parameter in module.parameters()]
    assert_close(found, list(torch.autograd.grad(mask, list(module.parameters()))), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("size", "window"), [((4, 6), 2), ((5, 7), 3), ((5, 4), (2, 3))])
def test_nothing_passes_from_window_to_window_and_everything_within(size, window):
    module, (x, cond) = tmsa(size, window, dim=2, heads=1), inputs(size, batch=1, dim=2)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x, cond), x)[0, ..., 0, :, :, :]
    reaches = (jacobian != 0).any(2).any(-1)  # (H, W, H, W)
    h, w = (window, window) if isinstance(window, int) else window
    for yi, xi, yj, xj in itertools.product(*map(range, (*size, *size))):
        assert reaches[yi, xi, yj, xj] == ((yi // h, xi // w) == (yj // h, xj // w))


def test_a_global_table_serves_smaller_maps_with_the_offsets_that_occur():
    module = tmsa((4, 5), None)
    x, cond = inputs((3, 2))
    table = module.relative_position_bias_table.view(7, 9, 2)
    small = tmsa((3, 2), None)
    small.load_state_dict(module.state_dict() | {"relative_position_bias_table": table[1:6, 3:6].reshape(-1, 2)})
    assert_close(module(x, cond), small(x, cond), rtol=1e-12, atol=1e-12)


def test_a_map_larger_than_a_global_table_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"4×6.*4×5"):
        tmsa((4, 5), None)(*inputs((4, 6)))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"10.*4 heads"):
        TMSA(10, 5, 4, grid_size=4)


def test_a_window_larger_than_the_grid_is_the_whole_grid():
    large, whole = tmsa((3, 4), 8), tmsa((3, 4), None)
    assert large.relative_position_bias_table.shape == (5 * 7, 2)
    assert_close(large(*inputs((3, 4))), whole(*inputs((3, 4))), rtol=0, atol=0)


@pytest.mark.parametrize("window", [2, None])
def test_state_dict_keys_and_shapes_are_those_of_the_official_weights(window):
    module = TMSA(1152, 1152, 16, grid_size=16, window_size=window)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes == {
        "relative_position_bias_table": (961 if window is None else 9, 16),
        "qkv_temb.weight": (3456, 1152),
        "qkv_temb.bias": (3456,),
        "qkv.weight": (3456, 1152),
        "qkv.bias": (3456,),
        "proj.weight": (1152, 1152),
        "proj.bias": (1152,),
    }


windows = pytest.mark.parametrize("window", [(1, 1), (2, 3), (4, 2)])


def index_by_hand(h: int, w: int) -> Tensor:
    """CONTRACT §3, a pair of tokens at a time."""
    places = list(itertools.product(range(h), range(w)))
    return torch.tensor([[(y - b + h - 1) * (2 * w - 1) + x - a + w - 1 for b, a in places] for y, x in places])


@windows
def test_the_index_of_the_official_weights_is_recognised_and_no_other(window):
    index = index_by_hand(*window)
    assert torch.equal(relative_position_index(window), index)
    assert is_relative_position_index(index, window)
    for place in (0, len(index) - 1):
        other = index.clone()
        other[place, 0] += 1
        assert not is_relative_position_index(other, window)
    assert not is_relative_position_index(index[:-1], window)
    assert not is_relative_position_index(index, (window[0] + 1, window[1]))


@windows
def test_an_index_in_a_file_is_checked_and_not_kept(window):
    module = tmsa(window, None)
    state = module.state_dict()
    module.load_state_dict(state | {"relative_position_index": index_by_hand(*window)})
    assert module.state_dict().keys() == state.keys()
    with pytest.raises(RuntimeError, match=rf"relative_position_index is not that of a \({window[0]}, {window[1]}\)"):
        module.load_state_dict(state | {"relative_position_index": index_by_hand(*window) + 1})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("head_width", [64, 72])
@pytest.mark.parametrize(("size", "window"), [((4, 8), 4), ((8, 8), None), ((6, 5), 4), ((16, 16), None)], ids=str)
@pytest.mark.parametrize("attention", [fused_attention, kernel_attention])
def test_fused_and_plain_agree_with_all_gradients(size, window, head_width, dtype, attention):
    shape = {"dim": 2 * head_width, "cond_dim": 8}
    plain = gradients(tmsa(size, window, fused=False, **shape), *inputs(size, **shape))
    module = tmsa(size, window, dtype=dtype, **shape)
    module.attention = attention
    fused = gradients(module, *inputs(size, dtype=dtype, **shape))
    assert_all_close(fused, plain, 1e-13 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_on_a_cpu_kernels_compute_where_no_bias_learns(grad, monkeypatch):
    called = []
    monkeypatch.setattr(module_of_attention, "kernel_attention", lambda q, *_: called.append(len(q)) or q)
    module, arguments = tmsa((4, 4), 2), inputs((4, 4))
    with torch.set_grad_enabled(grad):
        module(*arguments)
    assert bool(called) is not grad
    module.requires_grad_(False)(*arguments)
    assert called


def test_where_a_bias_learns_a_cpu_computes_attention_in_float32_under_autocast():
    module, arguments = tmsa((4, 4), 2, dtype=torch.float32), inputs((4, 4), dtype=torch.float32)
    seen = []
    module.attention = lambda q, k, v, bias: seen.extend((q, k, v, bias)) or fused_attention(q, k, v, bias)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*arguments)
    q, k, v, bias = seen
    assert [part.dtype for part in seen] == [torch.bfloat16] * 3 + [torch.float32]
    exact = plain_attention(q.double(), k.double(), v.double(), bias.double())
    found = fused_attention(q, k, v, bias)
    assert found.dtype == out.dtype == torch.bfloat16
    assert_close(found, exact.to(torch.bfloat16), rtol=2**-8, atol=1e-6)  # one rounding, of the result


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_width", [64, 72])
@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_on_a_gpu_the_fused_kernel_has_the_bias_gradient_of_float64(side, head_width, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    shape = {"dim": 2 * head_width, "cond_dim": 8}
    arguments = inputs((side, side), **shape)
    plain = gradients(tmsa((side, side), None, fused=False, **shape).cuda(), *(a.cuda() for a in arguments))
    module = tmsa((side, side), None, dtype=torch.float32, **shape).cuda()
    module.attention = kernel_attention  # also where the map is short
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        fused = gradients(module, *(a.float().cuda() for a in arguments))
    assert_all_close(fused, plain, tolerance)


def test_as_many_windows_go_to_a_kernel_as_the_second_dimension_of_a_cuda_grid_has():
    assert MAX_WINDOWS == 2**16 - 1


@pytest.mark.parametrize(("count", "sizes"), [(6, [6]), (7, [6, 1]), (12, [6, 6]), (13, [6, 6, 1])])
def test_a_batch_in_parts_is_the_batch_as_a_whole_with_its_gradients(count, sizes):
    generator, seen = torch.Generator().manual_seed(0), []
    tensors = [torch.randn(count, 2, 4, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    tensors.append(torch.randn(2, 4, 4, generator=generator, dtype=torch.float64))
    whole, parts = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(len(q))
        return kernel_attention(q, k, v, parts[3])

    expected, found = plain_attention(*whole), in_parts(attention, *parts[:3], limit=6)
    assert seen == sizes
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    assert_close([part.grad for part in parts], [part.grad for part in whole], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_batch_may_have_more_windows_than_a_kernel_takes(device):
    module = tmsa((1, 2), None, dtype=torch.float32).to(device)
    x, cond = (part.to(device) for part in inputs((1, 2), batch=70_000, dtype=torch.float32))
    results = []
    for attention in (kernel_attention, plain_attention):
        module.attention = attention
        module.zero_grad()
        out = module(x, cond)
        out.square().mean().backward()
        results.append((out.detach(), module.relative_position_bias_table.grad))
    assert_close(*results, rtol=1e-4, atol=1e-5)


@cases
def test_the_bias_acts_and_learns(size, window):
    module, (x, cond) = tmsa(size, window), inputs(size)
    before = gradients(module, x, cond)
    table = module.relative_position_bias_table
    if len(table) == 1:  # a single token: softmax of one logit is 1 whatever the bias
        assert not before["relative_position_bias_table"].any()
        return
    assert before["relative_position_bias_table"].any(dim=1).all(), "an offset without a gradient"
    table.data += torch.linspace(0, 1, len(table), dtype=table.dtype)[:, None]
    assert (module(x, cond) != before["out"]).any(-1).all(), "a token that does not see its bias"


def test_the_bias_of_an_offset_is_read_by_that_offset_alone():
    module, (x, cond) = tmsa((2, 3), None, heads=1), inputs((2, 3), batch=1)
    before = module(x, cond)
    module.relative_position_bias_table.data[0] += 1  # Δ = (−1, −2): query in the first corner, key in the last
    changed = (module(x, cond) != before).any(-1)[0]
    assert changed.nonzero().tolist() == [[0, 0]]


def test_each_sample_has_its_own_time_vector_and_no_other_sample():
    module, (x, cond) = tmsa((5, 4), 3), inputs((5, 4), batch=3)
    together = module(x, cond)
    for i in range(3):
        assert_close(together[i : i + 1], module(x[i : i + 1], cond[i : i + 1]), rtol=1e-12, atol=1e-12)
    same = module(x[:1].expand(3, -1, -1, -1), cond)
    assert (same[0] != same[1]).any(-1).all()


def test_query_and_value_learn_from_the_time_vector_and_the_key_cannot():
    module, (x, cond) = tmsa((3, 3), None), inputs((3, 3))
    query, key, value = gradients(module, x, cond)["qkv_temb.weight"].chunk(3)
    assert query.any(1).all()
    assert value.any(1).all()
    # One vector added to every key moves all logits of a query alike, which softmax does not see.
    assert_close(key, torch.zeros_like(key), rtol=0, atol=1e-12)


@cases
def test_everything_stays_on_the_device_of_the_map(size, window):
    x, cond = (part.to("meta") for part in inputs(size))
    assert tmsa(size, window).to("meta")(x, cond).device.type == "meta"


sizes = st.integers(1, 9)


@given(H=sizes, W=sizes, h=sizes, w=sizes)
def test_windows_and_heads_are_taken_apart_and_joined_again(H, W, h, w):
    """Against the window of each place cut out by hand; values are never 0, padding always is."""
    x = torch.arange(2 * H * W * 12.0).reshape(2, H, W, 12) + 1
    parts = split_heads(x, (h, w), 3, 2)
    rows, cols = math.ceil(H / h), math.ceil(W / w)
    assert parts.shape == (3, 2 * rows * cols, 2, h * w, 2)
    for part, number in zip(parts, range(3), strict=True):
        assert_close(join_heads(part, (h, w), (H, W)), x[..., 4 * number : 4 * number + 4], rtol=0, atol=0)
    for image, row, col, head in itertools.product(range(2), range(rows), range(cols), range(2)):
        patch = x[image, row * h : row * h + h, col * w : col * w + w]
        cell = parts[:, (image * rows + row) * cols + col, head].reshape(3, h, w, 2)
        expected = patch.unflatten(-1, (3, 2, 2))[:, :, :, head].permute(2, 0, 1, 3)
        assert_close(cell[:, : patch.shape[0], : patch.shape[1]], expected, rtol=0, atol=0)
        assert cell.count_nonzero() == expected.numel(), "padding is not zero"


@pytest.mark.parametrize(("size", "window"), [((6, 6), 3), ((5, 4), 3), ((4, 4), None)], ids=str)
def test_it_compiles_as_one_graph(size, window):
    torch.compiler.reset()
    module, arguments = tmsa(size, window), inputs(size)
    expected = gradients(module, *arguments)
    module.compile(fullgraph=True, backend="aot_eager")
    assert_all_close(gradients(module, *arguments), expected, 1e-12)


@pytest.mark.parametrize(
    ("exporting", "compiling", "poses", "expected"),
    [
        (False, False, False, False),
        (True, False, False, True),
        (True, True, False, True),  # with strict=True
        (True, False, True, True),
        (True, True, True, False),
    ],
)
def test_an_older_compiler_is_not_taken_for_an_export(exporting, compiling, poses, expected, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: compiling)
    monkeypatch.setattr(module_of_attention, "POSES", poses)
    assert is_exporting() is expected


@pytest.mark.parametrize("grad", [True, False])
def test_a_graph_has_the_attention_that_a_step_without_it_has(grad):
    """PyTorch 2.11's compiler takes itself for an export, which has the kernel and one call for any batch."""
    torch.compiler.reset()
    called, module = [], tmsa((8, 8), 4)

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    module.compile(fullgraph=True, backend=backend)
    with torch.set_grad_enabled(grad):
        module(*inputs((8, 8)))
    assert any("scaled_dot_product_attention" in name for name in called) is not grad
    assert "clone" not in called
    assert "softmax" in called or not grad


@pytest.mark.parametrize(
    ("tokens", "dtype", "grad", "formula"),
    [
        (16, torch.float32, True, True),
        (16, torch.bfloat16, True, True),
        (16, torch.float16, True, False),
        (17, torch.bfloat16, True, False),
        (16, torch.bfloat16, False, False),
    ],
)
def test_a_gpu_learns_short_windows_by_the_formula(tokens, dtype, grad, formula, monkeypatch):
    called = []
    for name in ("plain_attention", "kernel_attention"):
        monkeypatch.setattr(module_of_attention, name, lambda *arguments, name=name: called.append(name))
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        q = torch.empty(3, 2, tokens, 8, device="cuda", dtype=dtype)
        fused_attention(q, q, q, torch.empty(2, tokens, tokens, device="cuda", requires_grad=True))
    assert called == ["plain_attention" if formula else "kernel_attention"]


@pytest.mark.slow
def test_inductor_agrees_with_eager():
    torch.compiler.reset()
    shape = {"dim": 32, "cond_dim": 8}
    arguments = inputs((5, 8), dtype=torch.float32, **shape)
    module = tmsa((5, 8), 4, dtype=torch.float32, **shape)
    expected = gradients(module, *arguments)
    module.compile(fullgraph=True)
    assert_all_close(gradients(module, *arguments), expected, 5e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_padding_is_never_attended_to_in_half_precision_either(grad):
    module, (x, cond) = tmsa((5, 5), 4), inputs((5, 5))
    with torch.set_grad_enabled(grad):
        half = tmsa((5, 5), 4, dtype=torch.bfloat16)(x.bfloat16(), cond.bfloat16())
    assert_close(half, module(x, cond), rtol=0, atol=0.15, check_dtype=False)


def test_the_kernel_of_the_library_is_used_unless_told_otherwise():
    assert TMSA(8, 8, 2, grid_size=4).attention is fused_attention
    assert TMSA(8, 8, 2, grid_size=4, fused=False).attention is plain_attention


def test_padded_windows_are_exported_for_any_batch():
    module, batch = tmsa((5, 5), 4).requires_grad_(False), torch.export.Dim("batch")
    exported = torch.export.export(module, inputs((5, 5), batch=3), dynamic_shapes=({0: batch}, {0: batch})).module()
    larger = inputs((5, 5), batch=7)
    assert_close(exported(*larger), module(*larger))
