"""Every exact property of BigNAS: slices, the zero start, the sandwich's gradient, rate, calibration, search."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pliant
from pliant.core.cost import flops_per_sample
from pliant.core.dynamic import Point, Value
from pliant.core.slicing import Slicing
from pliant.core.spaces import Axes, Coordinate, Space
from pliant.core.training import fit
from pliant.elastic.bignas import (
    PAPER_ROWS,
    BigNAS,
    DropConnect,
    MBConv,
    MobileNet,
    Row,
    exponential_constant,
    grid,
    last_norms,
)
from pliant.tasks.images import ResidualBlock, SmallResNet

ROWS = (Row((8, 16), (1, 2), (3,), 1, 1), Row((16, 24), (1, 2, 3), (3, 5), 4, 2), Row((24, 32), (1, 2), (3, 5), 4, 2))


def _mobile(dropout: float = 0.0, drop_connect: float = 0.0, **options: Any) -> BigNAS:
    torch.manual_seed(0)
    model = MobileNet(
        5, 2, rows=ROWS, stem=(16, 24), head=(32, 48), stem_stride=1, dropout=dropout, drop_connect=drop_connect
    )
    return BigNAS(model, torch.randn(4, 2, 14, 14), **{"resolution": (9, 12, 14), **model.choices(), **options})


def _resnet(**options: Any) -> BigNAS:
    torch.manual_seed(0)
    return BigNAS(SmallResNet(1, 4, (8, 16), 2), torch.randn(4, 1, 12, 12), **options)


def _batch(net: BigNAS, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    assert isinstance(net.example, Tensor)
    x = torch.randn(rows, *net.example.shape[1:], generator=generator)
    return x, torch.randint(4, (rows,), generator=generator)


def _data(net: BigNAS, batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    x, y = _batch(net, 8 * batches)
    return list(zip(x.split(8), y.split(8), strict=True))


def _random_weights(net: BigNAS) -> BigNAS:
    """Scales and shifts as after training, so that nothing is hidden by ones and zeros."""
    torch.manual_seed(3)
    for module in net.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return net


# -- 1: slice = extract ---------------------------------------------------------------------------------------------

_MOBILE = _random_weights(_mobile())
_RESNET = _random_weights(_resnet(resolution=(8, 12)))


@given(st.integers(0, 10_000), st.sampled_from(["mobile", "resnet"]))
@settings(max_examples=25, deadline=None)
def test_slice_is_extract_in_training_and_evaluation(seed: int, which: str) -> None:
    net = _MOBILE if which == "mobile" else _RESNET
    point = net.space.canonical(net.space.sample(torch.Generator().manual_seed(seed)))
    x, _ = _batch(net)
    net.calibrate(_data(net), points=[point])
    child = net.extract(point)
    net.use(point)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), child.eval()(x))
        assert torch.equal(net.train()(x), child.train()(x))


def test_extracted_networks_hold_nothing_of_pliant() -> None:
    net = _mobile()
    net.calibrate(_data(net))
    for point in net.points():
        child = net.extract(point)
        assert not [m for m in child.modules() if type(m).__module__.startswith("pliant")]
        assert all(p.is_contiguous() for p in child.parameters())


def test_extracted_networks_can_be_trained_and_exported() -> None:
    net = _mobile()
    net.calibrate(_data(net))
    child = net.extract(net.points()[0])
    norms = [m for m in child.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.momentum == 0.1 for m in norms)
    x, y = _batch(net)
    F.cross_entropy(child.train()(x), y).backward()
    program = torch.export.export(child.eval(), (x,))
    assert torch.equal(program.module()(x), child(x))


def test_shortcut_is_what_the_active_widths_need() -> None:
    net = _mobile()
    same = {**net.space.largest, "stages.0.width": 16, "stages.1.width": 16}
    other = {**net.space.largest, "stages.0.width": 16, "stages.1.width": 24}
    for point, kind in ((same, nn.Identity), (other, nn.Conv2d)):
        block = net.axes.network(Point(**point)).skeleton.get_submodule("stages.1.0")
        assert isinstance(block, MBConv)
        assert isinstance(block.shortcut, kind)
    net.calibrate(_data(net), points=[same])
    child = net.extract(same)
    assert net.axes.parameters(same) == sum(p.numel() for p in child.parameters())


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (7, 8)])
def test_pooled_shortcut_against_its_definition(size: tuple[int, int]) -> None:
    block = MBConv(3, 3, 3, 2, 2).eval()
    for p in block.project.parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, 3, *size)
    padded = F.pad(x, (size[1] % 2, size[1] % 2, size[0] % 2, size[0] % 2))
    expected = torch.zeros(2, 3, (size[0] + 1) // 2, (size[1] + 1) // 2)
    for i in range(expected.shape[2]):
        for j in range(expected.shape[3]):
            expected[:, :, i, j] = padded[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum((2, 3)) / 4
    torch.testing.assert_close(block(x), expected)


# -- 2: zero-gamma identity -----------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_every_block_starts_as_its_shortcut(seed: int) -> None:
    net = _ZERO
    point = net.space.canonical(net.space.sample(torch.Generator().manual_seed(seed)))
    net.calibrate(_data(net), points=[point])
    skeleton = net.axes.network(point).skeleton
    seen = []

    def check(module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, MBConv)
        x = args[0]
        if module.stride > 1:
            x = F.avg_pool2d(F.pad(x, (x.shape[3] % 2, 0, x.shape[2] % 2, 0)), 2)
        assert torch.equal(output, module.shortcut(x))
        seen.append(output)

    handles = [m.register_forward_hook(check) for m in skeleton.modules() if isinstance(m, MBConv)]
    net.use(point)
    with torch.no_grad():
        net.train()(_batch(net)[0])
        net.eval()(_batch(net)[0])
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 * sum(net.axes.depths(point).values())


_ZERO = _mobile(zero_gamma=True)


def test_last_norms_tells_the_branch_from_the_shortcut() -> None:
    model = SmallResNet(1, 4, (8, 16), 2)
    found = last_norms(model, torch.randn(2, 1, 12, 12), ["stages.0", "stages.1"])
    names = {id(m): n for n, m in model.named_modules()}
    assert [names[id(m)] for m in found] == [f"stages.{s}.{b}.norm2" for s in (0, 1) for b in (0, 1)]


def test_blocks_without_a_last_norm_are_named() -> None:
    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(self.norm(x))  # type: ignore[no-any-return]

    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(PreNorm(), PreNorm()), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"zero_gamma: the residual branch of '1.0' does not end"):
        BigNAS(model, torch.randn(2, 6), zero_gamma=True)
    with pytest.raises(ValueError, match="zero_gamma: no stack of blocks"):
        BigNAS(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 6), zero_gamma=True)


# -- 3, 4: gradients ------------------------------------------------------------------------------------------------


def _gradients(net: BigNAS, loss: Tensor) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.model.parameters()]


def test_inplace_distillation_gradient() -> None:
    net = _resnet(n_random=0)
    x, _ = _batch(net)
    captured: list[Tensor] = []
    run = net._run

    def capture(point: Point, x: Any, regularized: bool = True) -> Any:
        out = run(point, x, regularized)
        out.retain_grad()
        captured.append(out)
        return out

    net._run = capture  # type: ignore[method-assign]
    net.loss(_batch(net)).backward()
    teacher, child = captured
    expected = (child.softmax(1) - teacher.detach().softmax(1)) / len(x)
    torch.testing.assert_close(child.grad, expected, rtol=1e-5, atol=1e-7)
    logits = child.detach().requires_grad_()
    F.kl_div(logits.log_softmax(1), teacher.detach().softmax(1), reduction="batchmean").backward()
    torch.testing.assert_close(child.grad, logits.grad, rtol=1e-5, atol=1e-7)


def test_parameters_of_the_largest_alone_get_the_label_gradient() -> None:
    net = _resnet(n_random=0, label_smoothing=0.1)
    x, y = _batch(net)
    both = _gradients(net, net.train().loss((x, y)))
    alone = _gradients(net, F.cross_entropy(net.use(net.space.largest)(x), y, label_smoothing=0.1))
    small = net.axes.network(net.space.smallest)
    only = [n for n, _ in net.model.named_parameters() if n not in dict(small.skeleton.named_parameters())]
    assert only
    names = [n for n, _ in net.model.named_parameters()]
    for name in only:
        assert torch.equal(both[names.index(name)], alone[names.index(name)]), name
    differ = [n for n, a, b in zip(names, both, alone, strict=True) if not torch.equal(a, b)]
    assert "head.bias" in differ


def test_the_step_is_the_sum_of_separate_gradients() -> None:
    for reduce in ("sum", "mean"):
        net = _resnet(reduce=reduce, resolution=(8, 12)).train()
        x, y = _batch(net)
        total = _gradients(net, net.loss((x, y)))
        net.draws.zero_()
        children = net.draw()
        assert len(children) == 3
        assert children[-1] == net.space.smallest
        out = net.use(net.space.largest)(x)
        parts = [_gradients(net, F.cross_entropy(out, y, label_smoothing=0.1))]
        z = out.detach().softmax(1)
        for child in children:
            logp = net.use(child)(x).log_softmax(1)
            parts.append(_gradients(net, -(z * logp).sum(1).mean()))
        for i, grad in enumerate(total):
            expected = torch.stack([p[i] for p in parts]).sum(0) / (1 if reduce == "sum" else 4)
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_random_children_are_uniform_and_repeatable() -> None:
    net = _resnet(resolution=(8, 12), n_random=4)
    drawn = [p for _ in range(300) for p in net.draw()[:-1]]
    for name, c in net.space.coordinates.items():
        expected = len(drawn) / len(c.choices)
        chi2 = sum((sum(p[name] == v for p in drawn) - expected) ** 2 / expected for v in c.choices)
        assert chi2 < 16.3, name  # at most three degrees of freedom, p = 0.001
    net.draws.zero_()
    assert [p for _ in range(10) for p in net.draw()[:-1]] == drawn[:40]


def test_dropout_acts_in_the_largest_child_alone() -> None:
    net = _mobile(dropout=0.5, drop_connect=0.4).train()
    x, _ = _batch(net)
    small, large = net.space.smallest, net.space.largest
    with torch.no_grad():
        assert torch.equal(net._run(small, x, regularized=False), net._run(small, x, regularized=False))
        assert not torch.equal(net._run(large, x, regularized=True), net._run(large, x, regularized=True))
        # the same skeleton serves both: what was switched off comes on again
        net._run(large, x, regularized=False)
        assert not torch.equal(net._run(large, x, regularized=True), net._run(large, x, regularized=True))
    used: list[bool] = []
    run = net._run

    def capture(point: Point, x: Any, regularized: bool = True) -> Any:
        used.append(regularized)
        return run(point, x, regularized)

    net._run = capture  # type: ignore[method-assign]
    net.loss(_batch(net))
    assert used == [True, False, False, False]
    net.regularize = "all"
    net.loss(_batch(net))
    assert used[4:] == [True] * 4


def test_dropout_inside_attention_is_off_in_other_children() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 4, 32, 0.5, batch_first=True) for _ in range(2)]
    net = BigNAS(nn.Sequential(nn.Linear(6, 16), nn.Sequential(*layers), nn.Linear(16, 3)), torch.randn(2, 5, 6))
    x, point = torch.randn(4, 5, 6), net.space.smallest
    net.train()
    assert torch.equal(net._run(point, x, regularized=False), net._run(point, x, regularized=False))
    assert not torch.equal(net._run(point, x, regularized=True), net._run(point, x, regularized=True))
    net._run(point, x, regularized=False)
    net.eval().use(point)
    with torch.no_grad():
        assert torch.equal(net(x), net.extract(point)(x))
    assert torch.equal(net(x), net.extract(point)(x))  # with gradients as well


def test_evaluation_mode_after_training_with_batch_statistics() -> None:
    """Children train with batch statistics; whatever way they are run afterwards, they use their own."""
    net = _random_weights(_resnet())
    x, y = _batch(net)
    net.train().loss((x, y)).backward()
    net.finish(_data(net))
    net.eval()
    for point in net.points():
        child = net.use(point).extract(point)
        assert torch.equal(net(x), child(x))
        with torch.no_grad():
            assert torch.equal(net(x), child(x))


def test_loss_in_evaluation_mode_is_that_of_the_child_in_use() -> None:
    net = _resnet(label_smoothing=0.0)
    x, y = _batch(net)
    net.finish(_data(net))
    before = int(net.draws)
    net.eval().use(net.points()[0])
    assert torch.equal(net.loss((x, y)), F.cross_entropy(net(x), y))
    assert int(net.draws) == before
    net(x)  # statistics are still trusted


def test_drop_connect_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropConnect(0.25).train()
    out = drop(torch.ones(4000, 3))
    assert set(out.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(out[:, 0], out[:, 2])  # whole samples
    assert abs(out.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(out), out)
    with pytest.raises(ValueError, match="drop_connect: 1"):
        DropConnect(1.0)


# -- 5: reduction to ordinary training ------------------------------------------------------------------------------


def test_a_space_of_one_point_is_ordinary_training() -> None:
    options: dict[str, Any] = {"width": (1.0,), "depth": (1.0,), "expansion": (1.0,), "n_random": 0}
    net = _resnet(label_smoothing=0.0, **options)
    assert net.space.size == 1
    assert net.points() == [Point()]
    plain = copy.deepcopy(net.model)
    plain.train()
    data = _data(net, 6)
    a = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    b = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    net.train()
    for x, y in data:
        for optimizer, loss in ((a, net.loss((x, y))), (b, F.cross_entropy(plain(x), y))):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for p, q in zip(net.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# -- 6: the rate ----------------------------------------------------------------------------------------------------


def test_rate() -> None:
    factor = exponential_constant(365)
    values = [factor(t / 3650) for t in range(3651)]
    warm = 50
    assert values[:warm] == pytest.approx([t / 50 for t in range(warm)])
    assert values[warm] == pytest.approx(1.0, abs=1e-3)
    assert all(b <= a + 1e-12 for a, b in zip(values[warm:], values[warm + 1 :], strict=False))
    end = 5 + 236.0
    assert all(v == 0.05 for t, v in enumerate(values) if t / 10 > end)
    assert factor((end - 0.01) / 365) == pytest.approx(0.05, rel=1e-3)  # it arrives there without a jump
    assert factor((end - 1) / 365) > 0.0505
    for bad in ({"epochs": 3}, {"epochs": 10, "rate": 1.5}, {"epochs": 10, "floor": 2}, {"epochs": 10, "every": 0}):
        with pytest.raises(ValueError, match=r"warmup|rate"):
            exponential_constant(**bad)


# -- 7, 8, 9: calibration -------------------------------------------------------------------------------------------


def test_calibration_is_batchnorm_of_the_child() -> None:
    """ "cumulative" is what a plain copy of the child with momentum=None estimates."""
    net = _random_weights(_mobile())
    point, data = net.points()[1], _data(net)
    net.calibrate(data, points=[point])
    child = net.extract(point)
    plain = copy.deepcopy(child)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for x, _ in data:
            plain(x)
    for (name, a), (_, b) in zip(child.named_buffers(), plain.named_buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_calibration_is_pure() -> None:
    net = _mobile(dropout=0.5)
    data, point = _data(net), net.points()[0]
    before = copy.deepcopy(net.state_dict())
    net.calibrate(data, points=[point])
    moved = {n for n, t in net.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"norms.mean", "norms.var", "norms.fresh"}
    first = net.norms.mean.clone()
    assert torch.equal(first[1:], before["norms.mean"][1:])
    net.calibrate(data, points=[point])
    assert torch.equal(first, net.norms.mean)
    net.calibrate(data[::-1], points=[point])
    torch.testing.assert_close(first, net.norms.mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["cumulative", "ofa", "pooled"])
def test_calibration_estimators_by_hand_with_dropout_off(estimator: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Dropout(0.5), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    x = torch.randn(16, 1, 6, 6)
    net = BigNAS(model, x[:2], width=(0.5, 1.0), estimator=estimator).train()
    net.calibrate([(x[:10], None), (x[10:], None)])
    dims = (0, 2, 3)
    for point in net.points():
        plain: Any = net.extract(point)
        parts = plain[0](x).split([10, 6])
        means = torch.stack([p.mean(dims) for p in parts])
        variances = torch.stack([p.var(dims, correction=estimator == "cumulative") for p in parts])
        share = torch.tensor([[10], [6]]) / 16 if estimator != "cumulative" else torch.tensor([[0.5], [0.5]])
        var = (share * variances).sum(0) if estimator != "pooled" else plain[0](x).var(dims, correction=0)
        torch.testing.assert_close(plain[2].running_mean, (share * means).sum(0))
        torch.testing.assert_close(plain[2].running_var, var)


def test_training_leaves_the_shared_buffers_alone() -> None:
    net = _resnet()
    before = {n: b.clone() for n, b in net.model.named_buffers() if "running" in n}
    net.train().loss(_batch(net)).backward()
    assert all(torch.equal(b, before[n]) for n, b in net.model.named_buffers() if "running" in n)


def test_uncalibrated_children_refuse() -> None:
    net = _resnet()
    x, _ = _batch(net)
    net.eval()(x)  # the largest is the network that was given
    small = net.points()[0]
    with pytest.raises(RuntimeError, match="have not been estimated"):
        net.use(small)(x)
    with pytest.raises(RuntimeError, match="have not been estimated"):
        net.loss(_batch(net))
    with pytest.raises(RuntimeError, match="have not been estimated"):
        net.extract(small)
    net.finish(_data(net))
    net.use(small)(x)
    net.train().loss(_batch(net))
    with pytest.raises(RuntimeError, match="have not been estimated"):
        net.eval()(x)
    other = net.space.canonical({**net.space.largest, "stages.0.width": 4})
    with pytest.raises(RuntimeError, match="have not been estimated"):
        net.extract(other)
    net.calibrate(_data(net), points=[other])
    net.extract(other)


# -- 10: costs ------------------------------------------------------------------------------------------------------


def _counted(child: nn.Module, x: Tensor) -> int:
    """Multiply-adds of a plain network, by hooks on its layers."""
    total = 0

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            k = module.kernel_size[0] * module.kernel_size[1]
            total += output.numel() * k * module.in_channels // module.groups
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features

    handles = [m.register_forward_hook(note) for m in child.modules()]
    with torch.no_grad():
        child(x)
    for handle in handles:
        handle.remove()
    return total


def test_costs_of_fifty_children() -> None:
    net, generator = _mobile(), torch.Generator().manual_seed(5)
    x = net.example[:1]  # type: ignore[index]
    for _ in range(50):
        point = net.space.canonical(net.space.sample(generator))
        child, resized = net.axes.network(point).extract(net.model), net.axes.resized(x, point)
        assert net.axes.flops(point) == 2 * _counted(child, resized) == flops_per_sample(child, resized).total
        assert net.axes.parameters(point) == sum(p.numel() for p in child.parameters())


def test_the_papers_space() -> None:
    net = MobileNet(10, rows=PAPER_ROWS)
    choices = net.choices()
    assert choices["width"]["stem.0"] == (32, 40)
    assert choices["width"]["head.0"] == (1280, 1408)
    assert [len(s) for s in net.stages] == [2, 3, 3, 4, 6, 6, 2]
    blocks = [m for m in net.modules() if isinstance(m, MBConv)]
    assert [b.project[0].out_channels for b in blocks if b.stride == 2] == [32, 48, 88, 216]  # type: ignore[index, union-attr]
    assert blocks[2].expand[0].out_channels == 24 * 6  # type: ignore[index, union-attr]
    assert isinstance(blocks[0].expand, nn.Identity)


# The table of the paper, written out anew: (expansion, stride) of each stage.
EXPANSIONS_AND_STRIDES = ((1, 1), (6, 2), (6, 2), (6, 2), (6, 1), (6, 2), (6, 1))


def _to_eight(value: float) -> int:
    """The multiple of 8 nearest to a size, at least 8, and the next one where that loses more than a tenth."""
    nearest = max(8, 8 * math.floor(value / 8 + 0.5))
    return nearest if nearest >= 0.9 * value else nearest + 8


def _choice(point: Mapping[str, Value], name: str, alone: int) -> int:
    return int(point.get(name, alone))


def _layers_of_the_paper(point: Mapping[str, Value], classes: int) -> dict[str, tuple[int, int, int, int, int]]:
    """(out, in of one filter, kernel, stride, groups) of every layer of an architecture, by the paper's table."""
    c = int(point["stem.0.width"])
    table = {"stem.0": (c, 3, 3, 2, 1)}
    for s, (expansion, stride) in enumerate(EXPANSIONS_AND_STRIDES):
        out, kernel = int(point[f"stages.{s}.width"]), _choice(point, f"stages.{s}.kernel", 3)
        for b in range(int(point[f"stages.{s}.depth"])):
            name, mid = f"stages.{s}.{b}", _to_eight(c * expansion)
            squeezed = _to_eight(mid // 4)
            if expansion > 1:
                table[f"{name}.expand.0"] = (mid, c, 1, 1, 1)
            table[f"{name}.depthwise.0"] = (mid, 1, kernel, stride if b == 0 else 1, mid)
            table[f"{name}.excite.1"] = (squeezed, mid, 1, 1, 1)
            table[f"{name}.excite.3"] = (mid, squeezed, 1, 1, 1)
            table[f"{name}.project.0"] = (out, mid, 1, 1, 1)
            if c != out:
                table[f"{name}.shortcut"] = (out, c, 1, 1, 1)
            c = out
    head = int(point["head.0.width"])
    return table | {"head.0": (head, c, 1, 1, 1), "classifier": (classes, head, 1, 1, 1)}


def _macs_of_the_paper(point: Mapping[str, Value], resolution: int, classes: int) -> int:
    """Multiply-adds of an architecture by hand: sizes halve where strides are 2, and odd ones are rounded up."""
    total, side = 0, resolution
    for name, (out, into, kernel, stride, _) in _layers_of_the_paper(point, classes).items():
        side = -(-side // stride)
        places = 1 if ".excite." in name or name == "classifier" else side * side
        total += out * into * kernel * kernel * places
    return total


@functools.cache
def _papers_axes() -> Axes:
    torch.manual_seed(0)
    model, x = MobileNet(10), torch.randn(2, 3, 32, 32)
    choices = model.choices()
    slicing = Slicing(model, x, divisor=choices.pop("divisor"), stacks=choices.pop("stacks"))
    return Axes(slicing, x, **choices)


def _layers_of_the_child(point: Point) -> dict[str, tuple[int, int, int, int, int]]:
    axes = _papers_axes()
    network = axes.network(point)
    views = network.views(axes.slicing.model)
    found = {}
    for name, module in network.modules.items():
        if isinstance(module, nn.Conv2d | nn.Linear):
            out, into, *kernel = views[f"{name}.weight"].shape
            if isinstance(module, nn.Conv2d):
                assert (out, into) == (module.out_channels, module.in_channels // module.groups)
                assert module.kernel_size == tuple(kernel)
                assert module.padding == tuple(k // 2 for k in kernel)
                found[name] = (out, into, kernel[0], module.stride[0], module.groups)
            else:
                found[name] = (out, into, 1, 1, 1)
    return found


@given(st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_every_layer_of_every_child_has_the_size_of_the_paper(seed: int) -> None:
    axes = _papers_axes()
    point = axes.space.canonical(axes.space.sample(torch.Generator().manual_seed(seed)))
    assert _layers_of_the_child(point) == _layers_of_the_paper(point, 10)
    assert axes.flops(point) == 2 * _macs_of_the_paper(point, 32, 10)


def _directly(point: Mapping[str, Value], classes: int) -> MobileNet:
    """The network that has the sizes of ``point`` as its full ones, without weights."""
    rows = [
        Row(
            (int(point[f"stages.{s}.width"]),), (int(point[f"stages.{s}.depth"]),),
            (_choice(point, f"stages.{s}.kernel", 3),), expansion, stride,
        )
        for s, (expansion, stride) in enumerate(EXPANSIONS_AND_STRIDES)
    ]  # fmt: skip
    stem, head = ((int(point[f"{name}.0.width"]),) for name in ("stem", "head"))
    with torch.device("meta"):
        return MobileNet(classes, rows=rows, stem=stem, head=head)


@given(st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_a_child_is_shaped_like_the_network_built_at_its_sizes(seed: int) -> None:
    axes = _papers_axes()
    point = axes.space.canonical(axes.space.sample(torch.Generator().manual_seed(seed)))
    views = axes.network(point).views(axes.slicing.model)
    direct = _directly(point, 10)
    assert {n: t.shape for n, t in views.items()} == {n: t.shape for n, t in direct.state_dict().items()}


def test_the_smallest_and_the_largest_child_cost_what_the_paper_says() -> None:
    """From about 200 million multiply-adds at 192 pixels to the largest at 320, for the 1,000 classes of ImageNet."""
    space = _papers_axes().space
    for point, resolution, macs in (
        (space.smallest, 192, 219_382_144), (space.smallest, 320, 603_388_288),
        (space.largest, 192, 691_137_024), (space.largest, 320, 1_899_778_560),
    ):  # fmt: skip
        assert _macs_of_the_paper(point, resolution, 1000) == macs
        x = torch.empty(1, 3, resolution, resolution, device="meta")
        assert _counted(_directly(point, 1000).eval(), x) == macs
    axes, x = _papers_axes(), torch.empty(1, 3, 192, 192, device="meta")
    child = axes.network(space.smallest).extract(axes.slicing.model).to("meta")
    assert _counted(child, x) == 219_382_144 - 990 * 1280  # it has 10 classes


def test_a_chosen_expansion_keeps_the_rules_of_the_block() -> None:
    net = _mobile(expansion=(0.5, 0.8, 1.0))
    assert "stages.0.expansion" not in net.space.coordinates  # its blocks do not expand
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        point = net.space.canonical(net.space.sample(generator))
        sizes, c = net.axes.sizes(point), int(point["stem.0.width"])
        for s, row in enumerate(ROWS):
            for b in range(row.depth[-1]):
                e = float(point.get(f"stages.{s}.expansion", 1.0))  # type: ignore[arg-type]
                mid = _to_eight(round(c * row.expand * e))
                made = {m.module: sizes[g.name] for g in net.axes.slicing.groups for m in g.members if m.side == "out"}
                assert made[f"stages.{s}.{b}.excite.3"] == mid
                assert made.get(f"stages.{s}.{b}.excite.1", 8) == _to_eight(mid // 4)  # 8 of 8 is no choice
                c = int(point[f"stages.{s}.width"])


def test_networks_of_one_size_may_keep_their_width() -> None:
    rows = (Row((16,), (1,), (3,), 1, 1), Row((16,), (2,), (3,), 4, 2))
    model = MobileNet(5, 2, rows=rows, stem=(16,), head=(32,), stem_stride=1)
    assert model.choices()["width"] == {}
    with pytest.raises(ValueError, match="rows: stage 0 and what is before it both have 16 channels"):
        MobileNet(rows=(Row((8, 16), (1,), (3,), 1, 1), *rows[1:]), stem=(16,))


def test_drop_connect_acts_around_the_identities_of_the_last_two_stages() -> None:
    """Block i of 26, counted from 0, drops with 0.2 i / 26; the first of a stage has no identity around it."""
    net = MobileNet(10).train()
    blocks = {n: m for n, m in net.named_modules() if isinstance(m, MBConv)}
    rates = [b.drop.p if isinstance(b.drop, DropConnect) else 0.0 for b in blocks.values()]
    assert rates == pytest.approx([0.0] * 18 + [0.2 * i / 26 for i in range(18, 26)])
    seen: list[str] = []
    for name, block in blocks.items():
        block.drop.register_forward_hook(lambda m, a, o, name=name: seen.append(name))
    net(torch.randn(2, 3, 32, 32))
    acting = [name for name in seen if isinstance(blocks[name].drop, DropConnect)]
    assert acting == [f"stages.5.{b}" for b in range(1, 6)] + ["stages.6.1"]


def test_drop_connect_looks_at_the_active_widths() -> None:
    """Where a child's widths agree at a stride of 1 the first block of a stage has an identity around it, too."""
    rows = (Row((16, 24), (1,), (3,), 2, 1), Row((16, 32), (1,), (3,), 2, 1))
    model = MobileNet(5, 2, rows=rows, stem=(8,), head=(32,), stem_stride=1, dropout=0.0, drop_connect=0.9)
    net = BigNAS(model, torch.randn(4, 2, 8, 8), **model.choices()).train()
    x, _ = _batch(net, 64)
    for widths, random in (((16, 16), True), ((24, 16), False), ((24, 32), False)):
        point = Point(**{**net.space.largest, "stages.0.width": widths[0], "stages.1.width": widths[1]})
        with torch.no_grad():
            assert torch.equal(net._run(point, x), net._run(point, x)) is not random


# -- 11, 12: the search ---------------------------------------------------------------------------------------------


def _target(net: BigNAS) -> Any:
    """A metric that does not depend on the weights: the wider the child of each stage, the better, up to a point."""

    def metric(output: Tensor, target: Tensor) -> float:
        p = net.point
        return -abs(int(p["stages.0.width"]) - 6) - abs(int(p["stages.1.width"]) - 12) + 0.1 * int(p["stages.1.depth"])

    return metric


def test_a_mutation_moves_each_coordinate_to_another_choice() -> None:
    space, generator = _MOBILE.space, torch.Generator().manual_seed(0)
    assert any(len(c.choices) == 2 for c in space.coordinates.values())
    for _ in range(40):
        point = space.sample(generator)
        assert space.mutate(point, 0.0, generator) == point
        moved = space.mutate(point, 1.0, generator)
        assert moved in space
        assert all(moved[n] != point[n] for n, c in space.coordinates.items() if len(c.choices) > 1)


def test_fine_search_is_monotone_and_inside_the_budget() -> None:
    net = _resnet(width=(0.25, 0.5, 0.75, 1.0), resolution=(8, 12))
    limit = 0.5 * net.axes.flops(net.space.largest)
    data = _data(net, 1)
    found = net.search(data, data, trials=40, mutate=0.3, metric=_target(net), batches=1, flops=limit)
    assert [t.stage for t in found.trials].count("fine") == 40
    accepted = [t for t in found.trials if t.accepted]
    assert all(b.quality > a.quality for a, b in itertools.pairwise(accepted))
    assert accepted[-1].point == found.best
    assert all(t.flops <= limit for t in found.trials)
    assert len({t.point for t in found.trials}) == len(found.trials)
    front = net.points()
    assert found.best in front
    assert front[-1] == net.space.largest
    for point in front:
        net.extract(point)  # all have statistics
    for kept in (t for t in found.trials if t.point in front[:-1]):
        assert not any(t.quality > kept.quality and t.flops <= kept.flops for t in found.trials)
    best = max(t.quality for t in found.trials if t.stage == "coarse")
    assert accepted[-1].quality > best  # width 6 is in no network-wide pattern of two widths


def test_fine_search_keeps_to_the_budget_where_dearer_children_are_better() -> None:
    net = _resnet(width=(0.25, 0.5, 0.75, 1.0))
    data, limits = _data(net, 1), {"flops": 0.5 * net.axes.flops(net.space.largest), "parameters": 1000}

    def metric(output: Tensor, target: Tensor) -> float:
        return net.axes.flops(net.point)

    found = net.search(data, data, trials=12, mutate=0.5, metric=metric, lower_is_better=False, batches=1, **limits)
    for trial in found.trials:
        assert trial.flops <= limits["flops"]
        assert net.axes.parameters(trial.point) <= 1000
    assert net.axes.flops(found.best) == max(t.flops for t in found.trials)
    assert found.trials[-1].stage == "fine"
    again = net.search(data, data, trials=5, metric=metric, lower_is_better=True, batches=1, **limits)
    assert net.axes.flops(again.best) == min(t.flops for t in again.trials)
    assert net.points()[0] == again.best


def test_fine_search_goes_on_from_the_best_child() -> None:
    net = _resnet(width=(0.25, 0.5, 0.75, 1.0), per_block=("expansion",))
    data, one = _data(net, 1), {"width": 1, "depth": 1, "expansion": 1}

    def metric(output: Tensor, target: Tensor) -> float:
        return sum(float(v) for v in net.point.values())

    found = net.search(
        data, data, trials=6, mutate=0.01, coarse=one, metric=metric, lower_is_better=True, batches=1, flops=1e12
    )
    best = found.trials[0].point
    for trial in found.trials[1:]:
        assert sum(trial.point[n] != best[n] for n in best) == 1
        best = trial.point if trial.accepted else best
    assert sum(t.accepted for t in found.trials) > 3


def test_the_coarse_grid_of_the_paper() -> None:
    net = _mobile(resolution=(6, 8, 10, 12, 14))
    assert len(grid(net.space, {"resolution": 5, "depth": 4, "width": 2, "kernel": 4, "expansion": 2})) == 160
    kernels = {tuple(p[n] for n in ("stages.1.kernel", "stages.2.kernel")) for p in grid(net.space, {
        "resolution": 1, "depth": 1, "width": 1, "kernel": 4, "expansion": 1})}  # fmt: skip
    assert kernels == {(3, 3), (5, 5), (5, 3), (3, 5)}


def test_the_coarse_grid_takes_the_nearest_levels() -> None:
    """Evenly spaced levels are rounded half up; both halves of a network take the ends, in turn."""
    for size, count, levels in ((4, 3, [0, 2, 3]), (5, 4, [0, 1, 3, 4]), (5, 3, [0, 2, 4]), (3, 1, [2])):
        space = Space([Coordinate("width", "width", tuple(range(size)))])
        assert [p["width"] for p in grid(space, {"width": count})] == levels
    space = Space([Coordinate(name, "depth", (1, 2, 3)) for name in "abc"])
    patterns = [tuple(p.values()) for p in grid(space, {"depth": 5})]
    assert patterns == [(1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 3, 1), (1, 1, 3)]


def test_measured_latency_budget() -> None:
    net = _resnet()
    data = _data(net, 1)
    found = net.search(data, data, trials=2, batches=1, repeats=3, latency=5.0)
    assert found.best in net.points()
    with pytest.raises(ValueError, match=r"budget: nothing fits .*latency"):
        net.search(data, data, trials=0, batches=1, repeats=3, latency=1e-6)


def test_search_survives_saving(tmp_path: Path) -> None:
    net = _resnet(resolution=(8, 12))
    data = _data(net, 1)
    found = net.search(data, data, trials=3, batches=1, parameters=1500)
    net.use(found.best)
    pliant.save(net, tmp_path / "net")
    again = pliant.load(tmp_path / "net", model=SmallResNet(1, 4, (8, 16), 2))
    assert again.points() == net.points()
    assert again.point == found.best
    x, _ = _batch(net)
    for point in net.points():
        assert torch.equal(again.use(point).eval()(x), net.use(point).eval()(x))


def test_the_ready_made_network_survives_saving(tmp_path: Path) -> None:
    net = _random_weights(_mobile(zero_gamma=True))
    net.finish(_data(net, 1))
    pliant.save(net, tmp_path / "net")
    again = pliant.load(tmp_path / "net", model=copy.deepcopy(net.model))
    assert isinstance(again, BigNAS)
    assert again.space.coordinates == net.space.coordinates
    x, _ = _batch(net)
    for point in net.points():
        assert torch.equal(again.use(point).eval()(x), net.use(point).eval()(x))


# -- a user's own network, and fit ----------------------------------------------------------------------------------


def test_fit_trains_all_children() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > 0).long()
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(ResidualBlock(8, 8), ResidualBlock(8, 8)),
        nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    net = BigNAS(model, x[:2], zero_gamma=True)
    data = list(zip(x.split(16), y.split(16), strict=True))
    fit(net, data, epochs=20, lr=0.1, lr_schedule=exponential_constant(20, warmup=1), progress=False)
    front = pliant.measure(net, data, repeats=0)
    assert [r.point for r in front] == net.points()
    assert len(front) >= 4
    assert all(r.quality > 0.85 for r in front)
    flops = [r.flops for r in front]
    assert flops == [c["flops"] for c in net.costs().values()]


def test_transformer_blocks() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=True) for _ in range(2)]
    model = nn.Sequential(nn.Linear(6, 16), nn.Sequential(*layers), nn.Linear(16, 3))
    net = BigNAS(model, torch.randn(2, 5, 6), criterion=lambda out, y: F.cross_entropy(out.mean(1), y), distill=False)
    assert net.space.size > 1
    x = torch.randn(4, 5, 6)
    net.train().loss((x, torch.tensor([0, 1, 2, 0]))).backward()
    net.use(net.points()[0])
    assert torch.equal(net.eval()(x), net.extract(net.point)(x))


def _published(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """Small networks of transformers, random weights: the model, an input, options."""
    t = pytest.importorskip("transformers")
    images, words = {"pixel_values": torch.randn(2, 3, 32, 32)}, {"input_ids": torch.randint(0, 50, (2, 9))}
    common: dict[str, Any] = {"num_labels": 5}
    if name == "vit":
        config = t.ViTConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32,
            patch_size=8, **common,
        )  # fmt: skip
        return t.ViTForImageClassification(config), images, {}
    if name == "regnet":  # grouped convolutions
        config = t.RegNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], groups_width=8, **common)
        return t.RegNetForImageClassification(config), images, {}
    if name == "convnext":  # 7x7 depthwise filters
        config = t.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, **common)
        return t.ConvNextForImageClassification(config), images, {"kernel": (3, 5, 7)}
    config = t.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=50, **common
    )
    return t.BertForSequenceClassification(config), words, {}


@pytest.mark.parametrize("name", ["vit", "regnet", "convnext", "bert"])
def test_published_networks_without_a_configuration(name: str) -> None:
    torch.manual_seed(0)
    model, x, options = _published(name)
    net = BigNAS(model, x, **options)
    axes = {c.axis for c in net.space.coordinates.values()}
    assert axes == {"width", "depth", "expansion", *options}
    batch = {**x, "labels": torch.tensor([0, 1])}
    net.train().loss(batch).backward()
    generator = torch.Generator().manual_seed(0)
    net.eval()
    for _ in range(3):
        point = net.space.canonical(net.space.sample(generator))
        net.calibrate([batch], points=[point])
        with torch.no_grad():
            assert torch.equal(net.use(point)(**x).logits, net.extract(point)(**x).logits), point


def test_decay_is_on_weights_of_the_largest_alone() -> None:
    net = _resnet()
    decayed, free = net.parameter_groups(1e-5)
    assert decayed["weight_decay"] == 1e-5
    assert free["weight_decay"] == 0.0
    kinds = {id(p): m for m in net.model.modules() for p in m.parameters(recurse=False)}
    assert {type(kinds[id(p)]) for p in decayed["params"]} == {nn.Conv2d, nn.Linear}
    assert all(p.ndim == 1 for p in free["params"])
    total = sum(p.numel() for p in net.model.parameters())
    assert sum(p.numel() for g in (decayed, free) for p in g["params"]) == total


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "max"}, "reduce: 'max'; allowed: 'sum', 'mean'"),
        ({"regularize": "none"}, "regularize: 'none'; allowed: 'largest', 'all'"),
        ({"n_random": -1}, "n_random: -1; allowed: a whole number from 0"),
        ({"n_random": 0, "largest": False, "smallest": False, "distill": False}, "n_random: 0; allowed: 1 or more"),
        ({"largest": False}, "distill: the largest child is the teacher"),
        ({"offer": 0}, "offer: 0"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0"),
        ({"estimator": "ema"}, "estimator: 'ema'"),
        ({"width": (0.5,)}, "width: .* 1 among them"),
        ({"depth": {"stages.0": (0, 5)}}, "depth: stages.0 has 2 blocks"),
        ({"kernel": (3, 5)}, "kernel: nothing in the model can change"),
        ({"resolution": (-1,)}, r"resolution\[0\]: -1; allowed: a whole number from 1"),
        ({"exclude": ["nothing"]}, "exclude: no module"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _resnet(**options)


def test_bad_points_and_budgets() -> None:
    net = _resnet()
    data: Sequence[Any] = _data(net, 1)
    with pytest.raises(ValueError, match=r"stages.0.width=5 is not one of"):
        net.use({**net.space.largest, "stages.0.width": 5})
    with pytest.raises(ValueError, match="point: it must give exactly"):
        net.use({"width": 0.5})
    with pytest.raises(ValueError, match="budget: give one or more of"):
        net.search(data, data)
    with pytest.raises(ValueError, match="budget: give one or more of"):
        net.search(data, data, flop=3.0)
    with pytest.raises(ValueError, match=r"budget: nothing fits .*smallest child has"):
        net.search(data, data, trials=0, flops=10)
    with pytest.raises(ValueError, match="mutate: 0"):
        net.search(data, data, mutate=0.0, flops=1e9)
    with pytest.raises(ValueError, match="coarse: 'heads'"):
        net.search(data, data, coarse={"heads": 2}, flops=1e9)
    with pytest.raises(ValueError, match="data: it has no batches"):
        net.calibrate([])
    with pytest.raises(ValueError, match="rows: a MobileNet"):
        MobileNet(rows=())
