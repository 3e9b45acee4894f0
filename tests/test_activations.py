from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pliant.core.activations import InputStatistics, is_matrix, matrix, observe, write_matrix


@given(splits=st.lists(st.integers(0, 30), max_size=5), offset=st.sampled_from([0.0, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_any_split_of_the_stream_gives_the_statistics_of_one_pass(splits: list[int], offset: float) -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    seen = InputStatistics(5, hessian=True)
    cuts = [0, *sorted(splits), 60]
    for a, b in pairwise(cuts):
        seen.update(x[a:b])
    assert seen.count == 60
    assert torch.allclose(seen.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(seen.variance, x.var(0, unbiased=False), rtol=1e-6)  # a mean of 1e6 and a spread of 1
    assert torch.allclose(seen.norm, x.norm(dim=0), rtol=1e-9)
    assert torch.allclose(seen.hessian, 2 / 60 * x.t() @ x, rtol=1e-9)


def test_single_precision_with_a_large_mean_keeps_its_variance() -> None:
    x = (torch.randn(4096, 3) + 1000).float()
    seen = InputStatistics(3)
    for part in x.split(100):
        seen.update(part)
    assert torch.allclose(seen.variance, x.double().var(0, unbiased=False), rtol=1e-6)


def test_variance_within_sequences_leaves_out_what_differs_between_them() -> None:
    x = torch.randn(4, 10, 3, dtype=torch.float64) + 5 * torch.randn(4, 1, 3, dtype=torch.float64)
    seen = InputStatistics(3, variance="within")
    seen.update(x[:3])
    seen.update(x[3:])
    assert torch.allclose(seen.variance, x.var(1, unbiased=False).mean(0))
    assert torch.allclose(seen.mean, x.mean((0, 1)))


def test_merge_is_the_union_and_needs_the_same_sums() -> None:
    x = torch.randn(20, 3, dtype=torch.float64)
    a, b = InputStatistics(3), InputStatistics(3)
    a.update(x[:7])
    b.update(x[7:])
    a.merge(b)
    assert torch.allclose(a.variance, x.var(0, unbiased=False))
    whole = InputStatistics(3, hessian=True)
    with pytest.raises(ValueError, match="hessian=True"):
        whole.merge(a)
    with pytest.raises(ValueError, match="hessian"):
        _ = a.hessian


def test_bad_input_is_named() -> None:
    seen = InputStatistics(3)
    with pytest.raises(ValueError, match="no vector has been seen"):
        _ = seen.norm
    with pytest.raises(ValueError, match="4 features"):
        seen.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        seen.update(torch.tensor([[1.0, float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="variance"):
        InputStatistics(3, variance="between")
    layer = nn.Linear(3, 2)
    with observe({"fc": layer}), pytest.raises(ValueError, match=r"layer 'fc'.*NaN"):
        layer(torch.full((1, 3), float("inf")))
    with pytest.raises(TypeError, match="Conv2d of one group"), observe({"d": nn.Conv2d(4, 4, 3, groups=4)}):
        pass


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (2, 3, 6)),
        (nn.Conv2d(3, 4, (3, 2), 2, 1, 2), (2, 3, 9, 8)),
        (nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last), (3, 9, 8)),
    ],
)
def test_the_mean_output_of_a_layer_is_its_matrix_times_the_mean_input(layer: nn.Module, shape: tuple) -> None:
    x = torch.randn(shape)
    with observe({"a": layer}, hessian=True) as seen:
        y = layer(x)
    y = y.flatten(-2).transpose(-1, -2) if isinstance(layer, nn.Conv2d) else y
    mean = matrix(layer).double() @ seen["a"].mean + layer.bias.double()
    assert torch.allclose(y.reshape(-1, 4).double().mean(0), mean, atol=1e-5)
    layer(x)
    assert seen["a"].count == y.reshape(-1, 4).shape[0]  # closed: nothing more is seen
    write_matrix(layer, torch.zeros_like(matrix(layer)))
    assert torch.count_nonzero(layer.weight) == 0


def test_the_transposed_layer_of_gpt2() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)
    x = torch.randn(5, 6)
    assert is_matrix(conv1d)
    assert torch.allclose(x @ matrix(conv1d).t() + conv1d.bias, conv1d(x), atol=1e-6)
    write_matrix(conv1d, torch.ones(4, 6))
    assert conv1d.weight.shape == (6, 4)
    assert bool((conv1d.weight == 1).all())
    with observe({"a": conv1d}) as seen:
        conv1d(x)
    assert torch.allclose(seen["a"].mean, x.double().mean(0))
    assert not is_matrix(nn.LayerNorm(4))
