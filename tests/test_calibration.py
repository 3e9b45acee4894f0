"""Normalisation statistics: three estimators against what they are defined by, and nothing else touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pliant.core.calibration import NormTable, batches_of
from pliant.core.dynamic import Point
from pliant.elastic import BigNAS, ProARD, SortedNet

P = Point(size=1)
Q = Point(size=2)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )


def _data(n: int = 5) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 3, 9, 9) * (1 + i) + i for i in range(n)]


def _table(model: nn.Module, batches: list[Tensor], estimator: Any, points: tuple[Point, ...] = (P, Q)) -> NormTable:
    table = NormTable(model, points)

    def run(x: Tensor, tensors: Mapping[str, Tensor]) -> Any:
        return functional_call(model, dict(tensors), (x,))

    table.estimate(P, model, run, batches, estimator)
    return table


def test_cumulative_is_batchnorm_without_momentum() -> None:
    model, batches = _model().eval(), _data()
    table = _table(model, batches, "cumulative")
    plain = copy.deepcopy(model)
    for layer in (plain[1], plain[5]):
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    for x in batches:
        plain(x)
    for name in ("1", "5"):
        found = table.tensors(P, dict(model.named_modules()))
        layer = plain.get_submodule(name)
        torch.testing.assert_close(found[f"{name}.running_mean"], layer.running_mean)
        torch.testing.assert_close(found[f"{name}.running_var"], layer.running_var)


def test_ofa_is_cumulative_with_biased_variance() -> None:
    model, batches = _model(), _data()
    n = 8 * 7 * 7
    biased, unbiased = _table(model, batches, "ofa"), _table(model, batches, "cumulative")
    torch.testing.assert_close(biased.var[0, :6], unbiased.var[0, :6] * (n - 1) / n)
    torch.testing.assert_close(biased.mean[0], unbiased.mean[0])


def test_ofa_weights_batches_by_their_size() -> None:
    model, (x, *_) = _model(), _data(1)
    split = _table(model, [x[:6], x[6:]], "ofa")
    y = model[0](x)
    torch.testing.assert_close(split.mean[0, :6], y.mean((0, 2, 3)))
    assert not torch.allclose(_table(model, [x[:6], x[6:]], "cumulative").mean[0, :6], y.mean((0, 2, 3)))


def test_pooled_is_the_variance_of_everything_in_the_first_layer() -> None:
    model, batches = _model(), _data()
    table = _table(model, batches, "pooled")
    y = model[0](torch.cat(batches))
    torch.testing.assert_close(table.mean[0, :6], y.mean((0, 2, 3)))
    torch.testing.assert_close(table.var[0, :6], y.var((0, 2, 3), correction=0))


def test_estimating_touches_one_row_and_nothing_else() -> None:
    model, batches = _model(), _data()
    before = copy.deepcopy(model.state_dict())
    table = _table(model, batches, "cumulative")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(table.mean[1], torch.zeros(10))
    assert torch.equal(table.var[1], torch.ones(10))
    assert not any(m.training for m in model.modules())
    again = _table(model, batches, "cumulative")
    assert torch.equal(table.mean, again.mean)
    assert torch.equal(table.var, again.var)
    shuffled = _table(model, batches[::-1], "cumulative")
    torch.testing.assert_close(shuffled.var, table.var, rtol=1e-6, atol=1e-6)


def test_stale_rows_are_refused() -> None:
    model = _model()
    table = _table(model, _data(), "cumulative")
    table.check(P)
    with pytest.raises(RuntimeError, match="size=2 have not been estimated"):
        table.check(Q)
    table.stale()
    with pytest.raises(RuntimeError, match="size=1"):
        table.check(P)
    with pytest.raises(RuntimeError, match="size=3"):
        table.check(Point(size=3))
    NormTable(nn.Linear(2, 2), [P]).check(P)  # nothing to estimate


def test_rows_come_and_go() -> None:
    model = _model()
    table = _table(model, _data(), "cumulative")
    row = table.mean[0].clone()
    table.keep([Point(size=3), P])
    assert table.points() == [Point(size=3), P]
    assert Q not in table
    assert torch.equal(table.mean[1], row)
    assert table.fresh.tolist() == [False, True]


def test_bad_input() -> None:
    model = _model()
    with pytest.raises(ValueError, match="estimator: 'ema'"):
        _table(model, _data(), "ema")
    with pytest.raises(ValueError, match="data: it has no batches"):
        batches_of([], 4, torch.device("cpu"))


@pytest.mark.parametrize("by", ["class", "loop"])
@pytest.mark.parametrize("make", ["sortednet", "bignas", "proard"])
def test_frozen_layers_keep_their_statistics_and_others_do_not(make: str, by: str) -> None:
    """Trained with mean 0.30, handed out with mean 0.30."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.still = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.b, self.live = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.head = nn.Linear(16, 4)
            nn.init.constant_(self.still.running_mean, 0.3)

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            if by == "class":
                self.still.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            y = self.still(self.a(x)).relu()
            return self.head(self.live(self.b(y)).relu().mean((2, 3)))

    torch.manual_seed(0)
    model, x, y = Frozen(), torch.rand(16, 1, 8, 8), torch.arange(16) % 4
    net: Any = {
        "sortednet": lambda: SortedNet(model, x, width=(0.5, 1.0), accumulate=2),
        "bignas": lambda: BigNAS(model, x, width=(0.5, 1.0), expansion=(1.0,)),
        "proard": lambda: ProARD(model, x, width=(0.5, 1.0), depth=(1.0,), expansion=(1.0,), divisor=1),
    }[make]()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(3):
        net.train()
        if by == "loop":
            model.still.eval()
        optimizer.zero_grad()
        net.loss((x, y)).backward()
        optimizer.step()
    before = model.live.running_mean.clone()
    net.finish([(x, y)])
    net.eval()
    for point in net.points():
        small = net.extract(point)
        layers = dict(small.named_modules())
        assert torch.equal(layers["still"].running_mean, torch.full_like(layers["still"].running_mean, 0.3))
        assert not torch.equal(layers["live"].running_mean, before[: len(layers["live"].running_mean)])
        assert torch.equal(small(x), net.use(point)(x))
