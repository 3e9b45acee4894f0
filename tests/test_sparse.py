from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pliant.core import masks
from pliant.core.cost import count_bytes, count_flops, flops_per_sample
from pliant.core.sparse import BlockSparseLinear, Compact, SparseConv2d, SparseLinear, compile_sparse


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-5 * b.norm())


def round_trips(module: nn.Module, other: nn.Module, x: torch.Tensor) -> bool:
    other.load_state_dict(module.state_dict())
    return torch.equal(other(x), module(x)) and torch.equal(copy.deepcopy(module)(x), module(x))


def sparsify(layer: nn.Module, share: float) -> nn.Module:
    with torch.no_grad():
        w = layer.weight
        w[~masks.magnitude_mask(w, int(share * w.numel()))] = 0
    return layer


def blocky(layer: nn.Linear, block: int, share: float) -> nn.Linear:
    out, inp = layer.weight.shape
    kept = torch.ones(out // block * (inp // block), dtype=torch.bool)
    kept[torch.randperm(len(kept))[: int(share * len(kept))]] = False
    with torch.no_grad():
        layer.weight.mul_(torch.kron(kept.view(out // block, -1).float(), torch.ones(block, block)))
    return layer


@pytest.mark.parametrize("shape", [(64, 96), (96,), (2, 3, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_linear_equals_the_masked_layer_and_its_state_round_trips(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    layer, other = (sparsify(nn.Linear(96, 32, bias=bias), 0.9) for _ in range(2))
    sparse = SparseLinear(layer)
    assert close(sparse(x), layer(x))
    assert round_trips(sparse, SparseLinear(other), x)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
    batch=st.sampled_from([None, 1, 3]),
)
def test_sparse_convolution_equals_the_masked_layer(kernel, stride, dilation, padding, bias, batch) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, bias=bias)
    sparsify(conv, 0.6)
    x = torch.randn((3, 8, 7) if batch is None else (batch, 3, 8, 7))
    assert close(SparseConv2d(conv)(x), conv(x))


def test_sparse_convolution_refuses_what_it_cannot_do() -> None:
    for options in ({"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "circular"}):
        with pytest.raises(ValueError, match="conv"):
            SparseConv2d(nn.Conv2d(4, 4, 3, **options))


@pytest.mark.parametrize("product", ["bsr", "batched"])
@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize("shape", [(7, 48), (48,), (2, 3, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_block_sparse_linear_equals_the_masked_layer(product: str, block: int, shape: tuple, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    layer, other = (blocky(nn.Linear(48, 32, bias=bias), block, 0.5) for _ in range(2))
    sparse = BlockSparseLinear(layer, block, product)
    assert len(sparse.blocks) == 32 * 48 // block**2 // 2
    assert close(sparse(x), layer(x))
    assert round_trips(sparse, BlockSparseLinear(other, block, product), x)


def test_block_sparse_linear_without_any_block_is_its_bias() -> None:
    layer = nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.zero_()
    for product in ("bsr", "batched"):
        assert torch.equal(BlockSparseLinear(layer, 8, product)(torch.randn(3, 16)), layer.bias.expand(3, 8))
    with pytest.raises(ValueError, match=r"block: 3 does not divide"):
        BlockSparseLinear(layer, 3)
    with pytest.raises(ValueError, match="product: 'csr'"):
        BlockSparseLinear(layer, 8, "csr")


@pytest.mark.parametrize("bias", [True, False])
def test_compact_layers_leave_rows_and_columns_out(bias: bool) -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(12, 10, bias=bias), nn.Conv2d(6, 8, 3, 2, 1, bias=bias)
    with torch.no_grad():
        linear.weight[::2] = 0
        linear.weight[:, 5:] = 0
        conv.weight[1:6] = 0
        conv.weight[:, 2] = 0
    for layer, x in ((linear, torch.randn(2, 3, 12)), (linear, torch.randn(12)), (conv, torch.randn(2, 6, 9, 9))):
        assert close(Compact(layer)(x), layer(x))
    assert close(Compact(conv)(torch.ones(6, 9, 9)), conv(torch.ones(6, 9, 9)))
    small = Compact(linear)
    assert small.layer.weight.shape == (5, 5)
    assert count_flops(lambda: small(torch.randn(4, 12))).total == 2 * 4 * 5 * 5
    assert linear.weight.shape == (10, 12)  # the source is left as it was
    with pytest.raises(ValueError, match="2 groups"):
        Compact(nn.Conv2d(4, 4, 3, groups=2))


def test_stored_products_count_what_they_compute() -> None:
    torch.manual_seed(0)
    layer = sparsify(nn.Linear(96, 64), 0.9)
    nonzero = int(torch.count_nonzero(layer.weight))
    net = nn.Sequential(SparseLinear(layer))
    for quick in (True, False):
        counted = count_flops(lambda: net(torch.randn(5, 96)), nonzero=quick)
        assert counted.total == counted.nonzero == 2 * 5 * nonzero
    blocks = blocky(nn.Linear(64, 32), 8, 0.5)
    for product in ("bsr", "batched"):
        small = BlockSparseLinear(blocks, 8, product)
        assert count_flops(lambda s=small: s(torch.randn(3, 64))).total == 2 * 3 * 64 * 32 // 2
    conv = sparsify(nn.Conv2d(4, 6, 3, bias=False), 0.8)
    x = torch.randn(2, 4, 8, 8)
    assert flops_per_sample(SparseConv2d(conv), x).total == flops_per_sample(conv, x).nonzero


def test_compile_sparse_says_what_it_chose_and_changes_no_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Flatten(),
        nn.Linear(4 * 36, 64),
        nn.ReLU(),
        nn.Linear(64, 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
    ).eval()
    sparsify(model[2], 0.5)
    sparsify(model[6], 0.99)
    blocky(model[8], 32, 0.96)
    with torch.no_grad():
        model[10].weight[:900] = 0
    x = torch.randn(64, 1, 8, 8)
    y, dense = model(x), count_bytes(model)
    report = compile_sparse(model, 0.85, x)
    assert set(report) == {"0", "2", "4", "6", "8", "10"}
    assert report["0"].startswith("dense: 0.0% zeros, below")
    assert report["2"].startswith("dense: 50.0% zeros, below min_sparsity=0.85")
    assert report["6"].startswith("csr: 99.0% zeros")  # a hundredth of the products: far above break-even
    assert isinstance(model[6], SparseLinear)
    assert isinstance(model[8], BlockSparseLinear | SparseLinear)
    assert isinstance(model[10], Compact | BlockSparseLinear | SparseLinear)
    assert "rows and columns" in report["10"]
    assert type(model[4]) is nn.Linear
    assert close(model(x), y)
    assert count_bytes(model) < dense / 2
    with pytest.raises(ValueError, match="min_sparsity"):
        compile_sparse(model, 1.5)


def test_a_sparse_convolution_is_chosen_where_it_is_measured_to_be_faster() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(sparsify(nn.Conv2d(256, 256, 3, padding=1), 0.99), nn.Flatten())
    x = torch.randn(1, 256, 6, 6)
    y = net(x)
    report = compile_sparse(net, 0.85, x)
    assert report["0"].startswith("csr: 99.0% zeros")
    assert close(net(x), y)
    unseen = compile_sparse(nn.Sequential(nn.Conv2d(1, 1, 3)))
    assert unseen["0"].endswith("no example told the shape of its input")


def test_no_note_of_torch_on_sparse_tensors_leaks_out() -> None:
    code = """
import copy, pickle, warnings
warnings.simplefilter("error")
import torch
from torch import nn
from pliant.core.sparse import BlockSparseLinear, SparseLinear
linear = nn.Linear(16, 16)
block = BlockSparseLinear(linear, 8)
with torch.no_grad():
    for layer in (block, SparseLinear(linear), pickle.loads(pickle.dumps(block))):
        layer(torch.randn(2, 16))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
