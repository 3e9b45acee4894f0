"""Every exact property of the SortedNet specification, by its number, and the errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.dynamic import Point
from pliant.core.inputs import evaluating
from pliant.elastic.sortednet import SortedNet
from pliant.tasks.images import SmallResNet

FULL = Point(width=1.0, depth=1.0)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Stack(nn.Module):
    """A plain stack of residual blocks with a shared final norm and head."""

    def __init__(self, blocks: int = 4, residual: type[nn.Sequential] = Residual) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(residual(nn.Linear(16, 16), nn.Tanh()) for _ in range(blocks))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class OpenStack(Stack):
    """The residual sum is written outside of the blocks."""

    def __init__(self) -> None:
        super().__init__(residual=nn.Sequential)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
Y = torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(3))
WIDTHS = (0.25, 0.5, 0.75, 1.0)


def sorted_mlp(**options: Any) -> SortedNet:
    return SortedNet(mlp(), X[:2], **{"width": WIDTHS, **options})


def kept_ranges(net: SortedNet, point: Point) -> dict[str, list[set[int]]]:
    network = net._networks[point]
    found = {}
    for name, _ in network.skeleton.named_parameters():
        cuts = network.cuts.get(name, {})
        shape = net.model.get_parameter(name).shape
        full = [((0, size),) for size in shape]
        found[name] = [{i for a, n in cuts.get(d, full[d]) for i in range(a, a + n)} for d in range(len(shape))]
    return found


def leq(a: Point, b: Point) -> bool:
    return a["width"] <= b["width"] and a["depth"] <= b["depth"]


def resnet(**options: Any) -> SortedNet:
    torch.manual_seed(0)
    return SortedNet(SmallResNet(widths=(5, 7, 9)), torch.randn(2, 1, 28, 28), **options)


def test_1_nesting() -> None:
    net = resnet(width=(0.1, 0.3, 0.35, 0.5, 0.77, 1.0), depth=(0.5, 1.0))
    for a in net.points():
        for b in net.points():
            if leq(a, b):
                small, large = kept_ranges(net, a), kept_ranges(net, b)
                assert set(small) <= set(large)
                assert all(s <= t for n in small for s, t in zip(small[n], large[n], strict=True))
                # every kept region is a leading one
                assert all(s == set(range(len(s))) for n in small for s in small[n])


def test_2_slice_equals_extract_at_every_point() -> None:
    net = resnet(width=WIDTHS, depth=(0.5, 1.0))
    x = torch.randn(4, 1, 28, 28)
    net.calibrate([(x, None)])
    net.eval()
    with torch.no_grad():
        for point in net.points():
            assert torch.equal(net.use(point)(x), net.extract(point)(x))
            assert torch.equal(net(x[:1]), net.extract(point)(x[:1]))


def test_3_slice_equals_mask() -> None:
    net = sorted_mlp().eval()
    a, b, c = (net.model[i] for i in (0, 2, 4))
    for point in net.points():
        first, second = (round(size * point["width"]) for size in (16, 12))
        hidden = F.gelu(a(X))
        hidden = torch.cat([hidden[:, :first], torch.zeros(32, 16 - first)], 1)
        hidden = F.gelu(b(hidden))
        hidden = torch.cat([hidden[:, :second], torch.zeros(32, 12 - second)], 1)
        torch.testing.assert_close(net.use(point)(X), c(hidden), atol=1e-6, rtol=0)


def test_3_widths_are_rounded_half_up() -> None:
    net = SortedNet(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)), X[:2], width=(0.04, 0.25, 0.34, 1.0))
    assert [net.extract(p)[0].out_features for p in net.points()] == [1, 3, 3, 10]


def inside(net: SortedNet, point: Point) -> dict[str, Tensor]:
    net.active = [point]
    masks = net._used()
    net.active = []
    return {name: masks[id(p)] for name, p in net.model.named_parameters()}


def test_4_gradient_support() -> None:
    net = sorted_mlp()
    point = Point(width=0.5, depth=1.0)
    F.cross_entropy(net.use(point)(X), Y).backward()
    for name, mask in inside(net, point).items():
        gradient = net.model.get_parameter(name).grad
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).all()
    assert inside(net, point)["2.weight"].sum() == 6 * 8


def test_5_frozen_complement() -> None:
    point = Point(width=0.25, depth=1.0)
    for momentum, decay, strict in ((0.0, 0.0, False), (0.9, 0.1, True)):
        net = sorted_mlp(weights=[1, 0, 0, 0])
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=momentum, weight_decay=decay)
        if strict:
            for p in net.parameters():  # momentum from earlier steps of other sizes
                optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)
            net.freeze_inactive(optimizer)
        before = copy.deepcopy(net.model)
        net.loss((X, Y)).backward()
        optimizer.step()
        for name, mask in inside(net, point).items():
            old, new = before.get_parameter(name), net.model.get_parameter(name)
            assert torch.equal(old[~mask], new[~mask])
            assert not (old[mask] == new[mask]).all()


def test_5_frozen_complement_of_each_step() -> None:
    """What an earlier step used is no part of this one; what was frozen outside of it stays frozen."""
    net = sorted_mlp(accumulate=1)
    net.model[4].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    net.freeze_inactive(optimizer)
    for point in (FULL, Point(width=0.25, depth=1.0)):
        net.weights = tuple(float(p == point) for p in net.points())
        before = copy.deepcopy(net.model)
        optimizer.zero_grad()
        net.loss((X, Y)).backward()
        optimizer.step()
    for name, mask in inside(net, point).items():
        old, new = before.get_parameter(name), net.model.get_parameter(name)
        assert torch.equal(old[~mask], new[~mask])
        assert torch.equal(old, new) == (name == "4.bias")


@pytest.mark.parametrize("g", [1, 4])
def test_6_reduces_to_ordinary_training(g: int) -> None:
    torch.manual_seed(0)
    plain = SmallResNet(widths=(4, 4, 8))
    net = SortedNet(copy.deepcopy(plain), torch.randn(2, 1, 28, 28), width=(1.0,), accumulate=g)
    data = [(torch.randn(16, 1, 28, 28), torch.randint(0, 10, (16,))) for _ in range(3)]
    for module in (plain, net):
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        for x, y in data:
            optimizer.zero_grad()
            if module is net:
                net.loss((x, y)).backward()
            else:
                parts = zip(x.chunk(g), y.chunk(g), strict=True)
                torch.stack([F.cross_entropy(plain(a), b) for a, b in parts]).mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.model.parameters(), strict=True))


def gradients(net: SortedNet, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, list(net.model.parameters()), allow_unused=True)
    pairs = zip(net.model.parameters(), grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def test_7_accumulation_gives_the_gradient_of_the_big_batch() -> None:
    net = sorted_mlp(weights=[0, 1, 0, 0], accumulate=4)
    big = F.cross_entropy(net.use(net.points()[1])(X), Y)
    a, b = gradients(net, net.loss((X, Y))), gradients(net, big)
    assert (a - b).norm() / b.norm() < 1e-5


def test_7_every_row_is_in_one_part() -> None:
    x = torch.randn(11, 6, requires_grad=True)
    net = sorted_mlp(accumulate=4)
    parts = net._parts(x, Y[:11])
    assert sorted(len(a) for a, _ in parts) == [2, 3, 3, 3]
    assert torch.equal(torch.cat([a for a, _ in parts]), x)
    assert torch.equal(torch.cat([b for _, b in parts]), Y[:11])
    net.loss((x, Y[:11])).backward()
    assert (x.grad.abs().sum(1) > 0).all()  # type: ignore[union-attr]


def test_7_no_part_is_a_single_row_where_a_norm_needs_two() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    net = SortedNet(model, X[:2], width=(0.5, 1.0), accumulate=4)
    assert [len(a) for a, _ in net._parts(X[:5], Y[:5])] == [2, 3]
    assert net.loss((X[:3], Y[:3])).isfinite()
    assert [len(a) for a, _ in sorted_mlp()._parts(X[:3], Y[:3])] == [1, 1, 1]


@pytest.mark.parametrize("depth", [False, True])
def test_8_the_mean_over_draws_is_the_gradient_of_the_sum(depth: bool) -> None:
    def make(**options: Any) -> SortedNet:
        if depth:
            return SortedNet(Stack(), X[:2], width=(1.0,), depth=(0.25, 0.5, 0.75, 1.0), **options)
        return sorted_mlp(**options)

    single = []
    for i in range(4):
        net = make(accumulate=1, weights=[float(i == j) for j in range(4)])
        single.append(gradients(net, net.loss((X, Y))))
    net = make(mode="sum")
    total = gradients(net, net.loss((X, Y)))
    mean = torch.stack(single).mean(0)
    assert (mean - total).norm() / total.norm() < 1e-5


def test_9_one_pass_depth_equals_truncated_forwards() -> None:
    net = SortedNet(Stack(), X[:2], width=(1.0,), depth=(0.25, 0.5, 0.75, 1.0), mode="sum")
    runs = []
    blocks = net._networks[FULL].skeleton.blocks
    for block in blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    with evaluating(net), torch.no_grad():
        outputs = net.all_outputs(X)
        assert len(runs) == len(blocks)  # every block ran once for all four exits
        for point, output in zip(net.points(), outputs, strict=True):
            assert torch.equal(output, net.extract(point)(X))
        assert not torch.equal(outputs[0], outputs[1])
        assert torch.equal(net.use(net.points()[0])(X), outputs[0])  # and nothing was left behind


def test_9_with_batch_norm_inside_and_behind_the_blocks() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))

    blocks = nn.Sequential(block(), block(), block())
    model = nn.Sequential(nn.Linear(6, 6), blocks, nn.BatchNorm1d(6), nn.Linear(6, 4))
    net = SortedNet(model, X[:2], width=(1.0,), depth=(0.34, 0.67, 1.0), mode="sum")
    net.loss((X, Y)).backward()
    net.calibrate([(X, Y)])
    with evaluating(net), torch.no_grad():
        outputs = net.all_outputs(X)
        for point, output in zip(net.points(), outputs, strict=True):
            assert torch.equal(output, net.extract(point)(X))
    assert not torch.equal(outputs[0], outputs[1])


def test_9_blocks_that_are_more_than_their_module() -> None:
    net = SortedNet(OpenStack(), X[:2], width=(1.0,), depth=(0.25, 0.5, 0.75, 1.0), mode="sum")
    with evaluating(net), torch.no_grad():
        for point, output in zip(net.points(), net.all_outputs(X), strict=True):
            assert torch.equal(output, net.extract(point)(X))


def test_10_cost_order() -> None:
    from pliant.core.cost import count_parameters, flops_per_sample

    net = resnet(width=(0.2, 0.5, 1.0), depth=(0.5, 1.0))
    net.calibrate([(torch.randn(4, 1, 28, 28), None)])
    costs = net.costs()
    for a in net.points():
        for b in net.points():
            if leq(a, b):
                assert all(costs[a][c] <= costs[b][c] for c in ("flops", "parameters"))
    original = SmallResNet(widths=(5, 7, 9))
    assert costs[FULL]["parameters"] == count_parameters(original)
    assert costs[FULL]["flops"] == flops_per_sample(original, net.example[:1]).total
    # by hand: an MLP of 6-16-12-4 has 2 FLOPs for each weight
    for point, cost in sorted_mlp().costs().items():
        a, b = round(16 * point["width"]), round(12 * point["width"])
        assert cost == {"flops": 2 * (6 * a + a * b + b * 4), "parameters": 6 * a + a + a * b + b + b * 4 + 4}


def test_11_selection() -> None:
    net = sorted_mlp()
    costs = net.costs()
    budgets = sorted(c["flops"] for c in costs.values())
    chosen = [costs[net.select(flops=b)]["flops"] for b in budgets]
    assert chosen == budgets
    assert [costs[net.select(flops=b + 1)]["flops"] for b in budgets] == budgets
    assert net.select(flops=float("inf")) == FULL
    small, large = (costs[net.points()[i]] for i in (0, 2))  # the tighter of two limits counts, whichever it is
    assert net.select(flops=large["flops"], parameters=small["parameters"]) == net.points()[0]
    assert net.select(flops=small["flops"], parameters=large["parameters"]) == net.points()[0]
    with pytest.raises(ValueError, match="smallest costs"):
        net.select(flops=budgets[0] - 1)
    with pytest.raises(ValueError, match="flops= or parameters="):
        net.select(watts=3)


def test_12_switch_round_trip() -> None:
    net = resnet(width=(0.5, 1.0))
    net.calibrate([(torch.randn(4, 1, 28, 28), None)])
    net.eval()
    x = torch.randn(2, 1, 28, 28)
    before, output = {k: (v.data_ptr(), v.clone()) for k, v in net.state_dict().items()}, net(x)
    small = net.use(net.points()[0])(x)
    assert not torch.equal(small, output)
    assert torch.equal(net.use(FULL)(x), output)
    for k, v in net.state_dict().items():
        assert v.data_ptr() == before[k][0]
        assert torch.equal(v, before[k][1])


# -- normalisation statistics ---------------------------------------------------------------------------------------


def test_uncalibrated_sizes_refuse_to_evaluate() -> None:
    net = resnet(width=(0.5, 1.0)).eval()
    x = torch.randn(4, 1, 28, 28)
    net(x)  # the full network came with its statistics
    with pytest.raises(RuntimeError, match=r"statistics of width=0\.5"):
        net.use(net.points()[0])(x)
    with pytest.raises(RuntimeError, match="finish"):
        net.extract(net.points()[0])
    net.train().loss((x, torch.zeros(4, dtype=torch.long))).backward()
    with pytest.raises(RuntimeError, match="have not been estimated since training"):
        net.eval().use(FULL)(x)
    net.finish([(x, None)])
    net.use(net.points()[0])(x)


def test_calibration_is_the_mean_of_batch_statistics_and_leaves_dropout_off() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4))
    net = SortedNet(model, X[:2], width=(0.5, 1.0))
    net.calibrate([(X[:16], None), (X[16:], None)])
    hidden = model[0](X)[:, :4]
    mean = torch.stack([hidden[:16].mean(0), hidden[16:].mean(0)]).mean(0)
    var = torch.stack([hidden[:16].var(0), hidden[16:].var(0)]).mean(0)
    plain = net.extract(Point(width=0.5, depth=1.0))
    torch.testing.assert_close(plain[2].running_mean, mean)
    torch.testing.assert_close(plain[2].running_var, var)
    assert plain[2].momentum == 0.1
    assert not net.slicing.model[2].training or net.training  # the user's own module was not touched
    with pytest.raises(ValueError, match="no batches"):
        net.calibrate([])


def test_every_size_has_the_statistics_of_its_own_activations() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    net = SortedNet(model, X[:2], width=WIDTHS)
    net.calibrate([(X, None)])
    for point in net.points():
        plain = net.extract(point)
        torch.testing.assert_close(plain[3].running_mean, plain[:3](X).mean(0))
        with torch.no_grad():
            assert torch.equal(net.eval().use(point)(X), plain(X))


def test_switchable_statistics_are_those_of_each_size() -> None:
    net = SortedNet(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
        X[:2], width=(0.5, 1.0), norm_stats="switchable", accumulate=1, weights=[1, 0],
    )  # fmt: skip
    full = net.norms.mean[1].clone()
    net.loss((X, Y)).backward()
    expected = 0.1 * net.model[0](X)[:, :4].mean(0)
    torch.testing.assert_close(net.norms.mean[0, :4], expected)
    assert torch.equal(net.norms.mean[1], full)
    net.eval().use(Point(width=0.5, depth=1.0))(X)


@pytest.mark.parametrize("norm_stats", ["recalibrate", "switchable"])
def test_frozen_parts_are_followed_step_by_step(norm_stats: str) -> None:
    """A layer that the user put in evaluation mode keeps its statistics, until it is back in training mode."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    net = SortedNet(model, X[:2], width=(0.5, 1.0), norm_stats=norm_stats, accumulate=1, weights=[1, 0])
    half, own = net.points()[0], model[1].running_mean.clone()
    model[1].eval()
    model[2].eval()
    assert torch.equal(net.loss((X, Y)), net.loss((X, Y)))  # no dropout, no batch statistics
    expected = model[3].weight[:, :4] @ model[1].eval()(model[0](X))[:, :4].T + model[3].bias[:, None]
    torch.testing.assert_close(net.loss((X, Y)), F.cross_entropy(expected.T, Y))
    net.calibrate([(X, Y)])
    assert torch.equal(net.extract(half)[1].running_mean, own[:4])
    net.train()
    net.loss((X, Y))
    net.calibrate([(X, Y)])
    torch.testing.assert_close(net.extract(half)[1].running_mean, model[0](X)[:, :4].mean(0))
    assert torch.equal(model[1].running_mean, own)


def test_batch_free_is_checked() -> None:
    with pytest.raises(ValueError, match="batch_free"):
        resnet(norm_stats="batch_free")
    sorted_mlp(norm_stats="batch_free")


# -- the rest -------------------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_and_number_alone() -> None:
    a, b, c = sorted_mlp(seed=1), sorted_mlp(seed=1), sorted_mlp(seed=2)
    first = a.draw(40)
    torch.manual_seed(99)
    assert first == b.draw(25) + b.draw(15)
    assert first != c.draw(40)
    assert set(first) == set(a.points())
    resumed = sorted_mlp(seed=1)
    resumed.load_state_dict(b.state_dict())
    assert resumed.draw(10) == a.draw(10)
    assert sorted_mlp(always_full=True).draw(4)[0] == FULL


def test_a_step_that_failed_is_drawn_again() -> None:
    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("the user's own")

    net = sorted_mlp()
    for criterion in (fails, None):
        net.criterion = criterion
        if criterion is None:
            net.loss((X, Y))
        else:
            with pytest.raises(RuntimeError, match="the user's own"):
                net.loss((X, Y))
    assert net.active == sorted_mlp().draw(4)


def test_replay_runs_the_whole_batch() -> None:
    net = sorted_mlp(replay=True, accumulate=2, weights=[0, 0, 1, 0])
    single = F.cross_entropy(net.use(net.points()[2])(X), Y)
    torch.testing.assert_close(net.loss((X, Y)), single)


def test_dropout_below_full_size() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Linear(8, 4))
    for mode, rate in (("keep", 0.4), ("scale", 0.1), ("off", 0.0)):
        net = SortedNet(model, X[:2], width=(0.25, 1.0), dropout=mode)
        assert net._networks[Point(width=0.25, depth=1.0)].skeleton[1].p == pytest.approx(rate)
        assert net._networks[FULL].skeleton[1].p == 0.4


def test_indices() -> None:
    listed = [{"width": 0.5, "depth": 0.5}, {"width": 1.0, "depth": 1.0}]
    net = SortedNet(Stack(), X[:2], width=(0.5, 1.0), depth=(0.5, 1.0), indices=listed)
    assert [str(p) for p in net.points()] == ["width=0.5 depth=0.5", "width=1 depth=1"]
    assert net.arguments()["indices"] == listed
    with pytest.raises(ValueError, match="is not a setting"):
        net.use(Point(width=0.5, depth=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": (0.0, 1.0)}, r"width\[0\]: 0\.0; allowed: a finite number above 0 and up to 1"),
        ({"width": (0.5, 1.5)}, "width"),
        ({"width": (0.5,)}, r"width: \(0\.5,\); allowed: .*, with 1"),
        ({"width": ()}, "width"),
        ({"depth": (0.5, 1.0)}, "no stack of blocks"),
        ({"accumulate": 0}, "accumulate: 0"),
        ({"mode": "mean"}, "mode: 'mean'; allowed: 'sample', 'sum'"),
        ({"norm_stats": "none"}, "norm_stats"),
        ({"dropout": "half"}, "dropout"),
        ({"weights": [1.0]}, "weights: expected 4"),
        ({"weights": [0.0] * 4}, "not all zero"),
        ({"indices": [{"width": 0.5, "depth": 1.0}]}, "the full network"),
        ({"indices": [{"width": 0.3, "depth": 1.0}]}, "indices"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sorted_mlp(**options)


def test_bad_batches() -> None:
    net = sorted_mlp()
    with pytest.raises(ValueError, match="labels run from 0 to 7, but the model has 4"):
        net.loss((X, torch.arange(32) % 10))
    with pytest.raises(ValueError, match="batch: 2 inputs and 3 targets"):
        net.loss((X[:2], Y[:3]))
    with pytest.raises(TypeError, match="batch: expected"):
        net.loss(X)  # type: ignore[arg-type]


def test_labels_inside_a_mapping() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(values)}

    net = SortedNet(Keyword(), {"values": X[:2]}, width=WIDTHS)
    assert net.loss({"values": X, "labels": Y}).isfinite()
    assert net.eval()({"values": X})["logits"].shape == (32, 4)


def test_loss_in_evaluation_mode_is_that_of_the_point_in_use() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    net = SortedNet(model, x[:2], width=(0.5, 1.0))
    net.finish([(x, y)])
    net.eval().use({"width": 0.5, "depth": 1.0})
    draws = int(net.draws)
    assert torch.equal(net.loss((x, y)), torch.nn.functional.cross_entropy(net(x), y))
    assert int(net.draws) == draws
