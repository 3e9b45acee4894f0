from __future__ import annotations

import copy
import functools
import itertools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pliant.elastic.proard as module
from pliant import catalog
from pliant.core.adversary import PGD, gradient_of, kl_divergence, kl_objective
from pliant.core.dynamic import Point
from pliant.core.frontier import measure
from pliant.core.persistence import load, save
from pliant.core.slicing import make_divisible
from pliant.core.training import fit
from pliant.elastic.bignas import MobileNet, Row
from pliant.elastic.proard import (
    AccRobPredictor,
    ElasticResNet,
    Found,
    ProARD,
    adaad_loss,
    ard_loss,
    measure_point,
    pareto,
    robust_accuracy,
    rslad_loss,
    sample,
    search,
    trades_loss,
    train_progressively,
)

torch.set_num_threads(1)
torch.manual_seed(0)
X, Y = torch.rand(32, 1, 8, 8), torch.randint(0, 4, (32,))
DATA = [(X[:16], Y[:16]), (X[16:], Y[16:])]


# -- networks ---------------------------------------------------------------------------------------------------------


def resnet(seed: int = 0) -> ElasticResNet:
    torch.manual_seed(seed)
    return ElasticResNet(
        1, 4, width=8, stages=(16, 32), base_blocks=(1, 1), extra=2, strides=(1, 2), divisor=2, dropout=0.1
    )


def elastic_resnet(seed: int = 0, **options: Any) -> ProARD:
    model = resnet(seed)
    return ProARD(model, X[:2], **{"attack_steps": 2, **model.axes(), **options})


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def cnn(seed: int = 0, channels: int = 8, blocks: int = 2, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Sequential(*[Block(channels) for _ in range(blocks)]),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes),
    )  # fmt: skip


SMALL: dict[str, Any] = {
    "width": (0.5, 1.0), "depth": {"3": (1, 2)}, "expansion": (0.5, 1.0), "divisor": 2, "attack_steps": 2, "eps": 0.1,
    "step": 0.05, "offer": 3,
}  # fmt: skip


def small(seed: int = 0, **options: Any) -> ProARD:
    return ProARD(cnn(seed), X[:2], **{**SMALL, **options})


class Mobile(nn.Module):
    """An inverted residual with a 7x7 depthwise filter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 3 * channels, 1)
        self.depthwise = nn.Conv2d(3 * channels, 3 * channels, 7, padding=3, groups=3 * channels, bias=False)
        self.norm = nn.BatchNorm2d(3 * channels)
        self.project = nn.Conv2d(3 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(torch.relu(self.norm(self.depthwise(torch.relu(self.expand(x))))))


def mobile(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(Mobile(4), Mobile(4)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip


def elastic_mobile(**options: Any) -> ProARD:
    given = {"width": (0.5, 1.0), "depth": {"1": (1, 2)}, "expansion": (0.5, 1.0), "kernel": (3, 5, 7), "divisor": 1}
    return ProARD(mobile(), X[:2], **{**given, "attack_steps": 1, **options})  # type: ignore[arg-type]


def draws(net: ProARD, count: int, seed: int = 0) -> list[Point]:
    return sample(net.space, count, seed)


# -- 1 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [elastic_resnet, small, elastic_mobile])
def test_1_extract_is_bit_identical(make: Any) -> None:
    net = make()
    net.enter(net.phases[-1].name)
    optimizer = torch.optim.SGD(net.parameter_groups(), 0.05)
    for _ in range(2):
        net.loss((X, Y)).backward()
        optimizer.step()
    points = draws(net, 6, seed=3)
    net.calibrate(DATA, points=points)
    net.eval()
    outputs = []
    with torch.no_grad():
        for point in points:
            plain = net.extract(point)
            outputs.append(net.use(point)(X))
            assert torch.equal(outputs[-1], plain(X))
            assert sum(p.numel() for p in plain.parameters()) <= net.axes.parameters(point) + sum(
                m.numel() for m in net.matrices.values()
            )
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == len(points)  # they are different networks
    assert not any(type(m).__name__ == "SubNetwork" for m in plain.modules())


def test_1_deployed_is_calibrated_and_extracted() -> None:
    net = elastic_mobile()
    with torch.no_grad():
        for matrix in net.matrices.values():
            matrix.normal_()
    for point in (net.space.smallest, net.space.largest):
        net.calibrate(X, points=[point])
        assert torch.equal(net.deployed(point, X)(X), net.extract(point)(X))


# -- 2, 3 -------------------------------------------------------------------------------------------------------------


def bottleneck_importance(block: nn.Module) -> tuple[Tensor, Tensor]:
    """Of the channels behind conv2 and conv1, by the specification's words."""
    return block.conv3[0].weight.abs().sum((0, 2, 3)), block.conv2[0].weight.abs().sum((0, 2, 3))  # type: ignore[union-attr, index]


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 1000))
def test_2_sorting_is_a_permutation(seed: int) -> None:
    net = elastic_resnet(seed)
    model: Any = net.model
    with torch.no_grad():
        for m in model.modules():  # statistics and scales that are not all alike
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.weight, m.bias, m.running_mean, m.running_var):
                    t.uniform_(0.5, 1.5)
    model.eval()
    before, weights = model(X), copy.deepcopy(model.state_dict())
    net.sort_channels()
    assert (model(X) - before).abs().max() < 1e-5 * max(1.0, before.abs().max())
    assert not torch.equal(model.stages[0][0].conv2[0].weight, weights["stages.0.0.conv2.0.weight"])  # it did move
    for stage in model.stages:
        for block in stage:
            for importance in bottleneck_importance(block):
                assert (importance.diff() <= 1e-6).all()
    once = copy.deepcopy(model.state_dict())
    net.sort_channels()
    assert all(torch.equal(t, once[n]) for n, t in model.state_dict().items())


def test_2_sorting_makes_smaller_sizes_better() -> None:
    """The kept channels are those of the largest importance, not the smallest."""
    net = small()
    block: Any = net.model[3][0]  # type: ignore[index]
    with torch.no_grad():
        block.conv2.weight[:, :4] *= 0.01  # what comes first matters least
    full = net.deployed(net.space.largest, X)(X)
    halved = net.space.check({**net.space.largest, "3.0.expansion": 0.5})
    unsorted = (net.deployed(halved, X)(X) - full).abs().mean()
    net.sort_channels()
    assert (net.deployed(halved, X)(X) - full).abs().mean() < 0.2 * unsorted


def wide(**options: Any) -> ProARD:
    """Mid channels 56, 40, 32 at expansions 0.35, 0.25, 0.2 of 160 outputs."""
    torch.manual_seed(0)
    model = ElasticResNet(1, 4, width=8, stages=(160,), base_blocks=(1,), extra=0, strides=(2,), dropout=0.0)
    return ProARD(model, X[:2], **{"attack_steps": 1, **model.axes(), **options})


def test_3_a_later_sort_stays_inside_trained_sizes() -> None:
    net = wide(width=(1.0,))
    coordinate = "stages.0.0.expansion"
    assert [p.name for p in net.phases] == ["teacher", "depth", "expansion-a", "expansion-b"]
    points = {e: net.space.check({**net.space.largest, coordinate: e}) for e in (0.35, 0.25, 0.2)}
    assert [net.axes.sizes(points[e])["stages.0.0.conv2.0"] for e in points] == [56, 40, 32]
    net.enter("expansion-a")
    block: Any = net.model.stages[0][0]  # type: ignore[union-attr, index]
    with torch.no_grad():
        for parameter in block.parameters():  # trained meanwhile: the order is no longer that of importance
            parameter.copy_(torch.randn_like(parameter))
        for conv in (block.conv1, block.conv2):
            conv[1].running_mean.copy_(torch.arange(56.0))  # a tag for each channel
    networks = {e: net.axes.network(p) for e, p in points.items()}

    def outputs() -> dict[float, Tensor]:
        found = {}
        for e, network in networks.items():
            network.skeleton.eval()
            found[e] = network.run(net.model, X)
        return found

    before = outputs()
    net.enter("expansion-b")
    after = outputs()
    for e in (0.35, 0.25):
        assert (before[e] - after[e]).abs().max() < 1e-5 * before[e].abs().max().clamp(min=1)
    assert not torch.allclose(before[0.2], after[0.2], rtol=1e-3)  # the new size gets other channels
    for conv in (block.conv1, block.conv2):
        tags = conv[1].running_mean.tolist()
        assert sorted(tags[:40]) == list(range(40))
        assert sorted(tags[40:]) == list(range(40, 56))
        assert tags != sorted(tags)
    for importance in bottleneck_importance(block):
        assert (importance[:40].diff() <= 1e-4).all()
        assert (importance[40:].diff() <= 1e-4).all()
        assert importance[40] > importance[39]  # across the border there is no order
    free = outputs()
    net.sort_channels()  # without protection the trained size would change
    assert not torch.allclose(free[0.25], outputs()[0.25], rtol=1e-3)


@pytest.mark.parametrize("protect", ["expansion", "all"])
def test_3_protect_all_keeps_the_sizes_of_narrow_stages_too(protect: Any) -> None:
    net = wide(protect=protect)
    narrow = net.space.check({**net.space.largest, "stages.0.width": 104})
    network = net.axes.network(narrow)
    network.skeleton.eval()
    before = network.run(net.model, X)
    net.enter("expansion-a")
    same = torch.allclose(network.run(net.model, X), before, atol=1e-5)
    assert same is (protect == "all")


# -- 4 ----------------------------------------------------------------------------------------------------------------


def test_4_kernel_matrices() -> None:
    net = elastic_mobile()
    assert sorted(net.matrices) == [f"1/{b}/depthwise:{k}" for b in (0, 1) for k in (3, 5)]
    assert {k: tuple(m.shape) for k, m in net.matrices.items()}["1/0/depthwise:5"] == (25, 25)
    assert all(torch.equal(m, torch.eye(len(m))) for m in net.matrices.values())
    weight: Tensor = net.model[1][0].depthwise.weight  # type: ignore[index, union-attr, assignment]

    def filters(k: int, width: int = 4) -> Tensor:
        point = net.space.check({**net.space.largest, "1.0.kernel": k, "1.width": width})
        network = net.axes.network(point)
        found = {**network.views(net.model), **net._filters(network)}
        return found["1.0.depthwise.weight"].detach()

    assert torch.equal(filters(3), weight[:, :, 2:5, 2:5])
    assert torch.equal(filters(5), weight[:, :, 1:6, 1:6])
    assert torch.equal(filters(7), weight)
    first, second = (torch.randn(n, n) for n in (25, 9))
    with torch.no_grad():
        net.matrices["1/0/depthwise:5"].copy_(first)
    five = (weight[:, 0, 1:6, 1:6].reshape(-1, 25) @ first.T).reshape(-1, 1, 5, 5)
    assert torch.equal(filters(7), weight)  # never
    torch.testing.assert_close(filters(5), five)
    torch.testing.assert_close(filters(3), five[:, :, 1:4, 1:4])
    with torch.no_grad():
        net.matrices["1/0/depthwise:3"].copy_(second)
    torch.testing.assert_close(filters(5), five)
    three = (five[:, 0, 1:4, 1:4].reshape(-1, 9) @ second.T).reshape(-1, 1, 3, 3)
    torch.testing.assert_close(filters(3), three)
    torch.testing.assert_close(filters(3, width=2), three[:6])  # one matrix for all channels
    plain = elastic_mobile(kernel_matrices=False)
    assert len(plain.matrices) == 0


def test_4_matrices_are_trained_and_decayed_and_outputs_at_full_size_do_not_see_them() -> None:
    net = elastic_mobile()
    net.enter(net.phases[-1].name)
    groups = net.parameter_groups(0.1)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert all(id(m) in decayed for m in net.matrices.values())
    assert id(net.model[1][0].norm.weight) not in decayed  # type: ignore[index, union-attr]
    for _ in range(4):
        net.loss((X, Y)).backward()
    assert any(m.grad is not None and m.grad.abs().sum() > 0 for m in net.matrices.values())
    net.norms.trust(net.space.largest)
    net.eval()
    before = net(X)
    with torch.no_grad():
        for m in net.matrices.values():
            m.normal_()
    assert torch.equal(net(X), before)


# -- 5, 6 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "eval"])
def test_5_the_attack_is_feasible_and_leaves_the_network(norm: Any) -> None:
    net = elastic_resnet(attack_norm=norm, attack_steps=3, eps=0.1, step=0.05).train()
    point = draws(net, 1)[0]
    net.loss((X, Y)).backward()
    state = copy.deepcopy(net.state_dict())
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    flags = [m.training for m in net.modules()]
    under = net._attacked(point)
    moved = net.attack.attack(kl_objective(under, torch.randn(32, 4)), X)
    assert (moved - X).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    assert all(torch.equal(p.grad, grads[n]) for n, p in net.named_parameters() if n in grads)  # type: ignore[arg-type]
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(under(X), under(X))  # no dropout
    whole, half = under(X)[:8], under(X[:8])
    assert torch.allclose(whole, half, atol=1e-6) is (norm == "eval")  # batch statistics depend on the batch
    before = {n: b.clone() for n, b in net.model.named_buffers()}
    net._logits(net.space.largest, X)  # the training forward does move them
    assert any(not torch.equal(b, before[n]) for n, b in net.model.named_buffers())


def test_6_without_a_random_start_the_gradient_is_rounding_noise() -> None:
    net = cnn().eval()
    with torch.no_grad():
        net[6].weight.mul_(10)
    clean = net(X).detach()
    objective = kl_objective(net, clean)
    at_x = gradient_of(objective, X).norm()
    beside = gradient_of(objective, X + 0.001 * torch.randn_like(X)).norm()
    assert at_x < 1e-6
    assert beside > 1e3 * at_x
    start = PGD(0.1).begin(X, torch.Generator().manual_seed(0))
    assert gradient_of(objective, start).norm() > 1e3 * at_x
    with pytest.raises(ValueError, match="start: None is not allowed: where student and teacher agree"):
        small(start=None)


# -- 7, 8 -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 6), classes=st.integers(2, 8), seed=st.integers(0, 999))
def test_7_rslad_at_the_teacher_and_its_reductions(rows: int, classes: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    s, a, t = (torch.randn(rows, classes, generator=g) for _ in range(3))
    assert rslad_loss(t, t, t).abs() < 1e-6
    torch.testing.assert_close(rslad_loss(s, a, t, reduction="elementwise"), rslad_loss(s, a, t) / classes)
    p, q, r = t.softmax(1), s.softmax(1), a.softmax(1)
    robust, natural = ((p * (p / v).log()).sum(1).mean() for v in (r, q))
    torch.testing.assert_close(rslad_loss(s, a, t), 5 / 6 * robust + natural / 6, rtol=1e-4, atol=1e-6)


def test_7_no_gradient_where_student_and_teacher_agree() -> None:
    net = cnn().eval()
    teacher = copy.deepcopy(net)(X).detach()
    out = net(X)
    loss = rslad_loss(out, out, teacher)
    loss.backward()
    assert loss.abs() < 1e-6
    assert sum(p.grad.norm() for p in net.parameters() if p.grad is not None) < 1e-6


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 6), classes=st.integers(2, 8), beta=st.floats(0, 20), seed=st.integers(0, 999))
def test_8_trades(rows: int, classes: int, beta: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    clean, attacked = (2 * torch.randn(rows, classes, generator=g) for _ in range(2))
    y = torch.randint(0, classes, (rows,), generator=g)
    entropy = F.cross_entropy(clean, y)
    assert torch.equal(trades_loss(clean, attacked, y, beta=0.0), entropy)
    robust = trades_loss(clean, attacked, y, beta=beta) - entropy
    assert robust >= -1e-5
    p, q = clean.softmax(1), attacked.softmax(1)
    torch.testing.assert_close(robust, beta * (p * (p / q).log()).sum(1).mean(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduction", ["batchmean", "elementwise"])
def test_8_the_teachers_phase_is_trades_with_the_options_of_the_network(reduction: Any) -> None:
    net = small(beta=2.0, reduction=reduction).train()
    model, under = copy.deepcopy(net.model).train(), net._attacked(net.space.largest)
    with torch.no_grad():
        clean = under(X)
    moved = net.attack.attack(kl_objective(under, clean), X, generator=net.generator(0, 0))
    natural, attacked = model(X), model(moved)
    divergence = F.kl_div(attacked.log_softmax(1), natural.softmax(1), reduction="batchmean")
    expected = F.cross_entropy(natural, Y) + 2.0 * divergence / (4 if reduction == "elementwise" else 1)
    torch.testing.assert_close(net.loss((X, Y)), expected)


@pytest.mark.parametrize("objective", ["rslad", "adaad"])
def test_7_the_students_loss_has_the_reduction_of_the_network(objective: Any) -> None:
    values = []
    for reduction in ("batchmean", "elementwise"):
        net = small(objective=objective, reduction=reduction, pretrain=False).train()
        values.append(net.loss((X, Y)))
    torch.testing.assert_close(values[0], 4 * values[1])
    assert values[0] > 1e-4


def test_8_adaad_asks_the_teacher_on_both_inputs() -> None:
    net = small(objective="adaad", alpha=0.5, pretrain=False).train()
    student, teach = net.student(0, 1), net._teach()
    under = net._attacked(student)

    def divergence(v: Tensor, ours: Tensor, reduction: str) -> Tensor:
        return F.kl_div(ours.log_softmax(1), teach(v).log_softmax(1), reduction=reduction, log_target=True)

    moved = net.attack.attack(lambda v: divergence(v, under(v), "sum"), X, generator=net.generator(0, 1))
    expected = sum(0.5 * divergence(v, net._logits(student, v), "batchmean") for v in (X, moved))
    torch.testing.assert_close(net.loss((X, Y)), expected, rtol=1e-4, atol=1e-6)


def test_8_the_other_losses_by_their_equations() -> None:
    s, a, t, u = (torch.randn(5, 3, dtype=torch.float64) for _ in range(4))
    y = torch.tensor([0, 1, 2, 0, 1])

    def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
        p, q = (p / temperature).softmax(1), (q / temperature).softmax(1)
        return (p * (p / q).log()).sum(1).mean()

    torch.testing.assert_close(ard_loss(s, a, t, y), 900 * kl(t, a, 30.0))
    mixed = ard_loss(s, a, t, y, alpha=0.3, temperature=4.0)
    torch.testing.assert_close(mixed, 0.3 * 16 * kl(t, a, 4.0) + 0.7 * F.cross_entropy(s, y))
    torch.testing.assert_close(adaad_loss(s, a, t, u), kl(u, a))
    torch.testing.assert_close(adaad_loss(s, a, t, u, alpha=0.2), 0.2 * kl(u, a) + 0.8 * kl(t, s))
    torch.testing.assert_close(adaad_loss(s, a, t, u, reduction="elementwise"), kl(u, a) / 3)
    clean = s.clone().requires_grad_(True)
    trades_loss(clean, a, y).backward()
    alone = s.clone().requires_grad_(True)
    F.cross_entropy(alone, y).backward()
    assert not torch.allclose(clean.grad, alone.grad)  # type: ignore[arg-type]  # the gradient flows through f(x), too


# -- 9 ----------------------------------------------------------------------------------------------------------------


def test_9_phases_are_nested_and_the_sampler_keeps_to_them() -> None:
    net = elastic_resnet()
    assert [p.name for p in net.phases] == ["teacher", "width", "depth-a", "depth-b", "expansion-a", "expansion-b"]
    assert [p.students for p in net.phases] == [1, 1, 2, 2, 4, 4]
    assert [p.lr for p in net.phases] == [0.1, 3e-2, 2.5e-3, 7.5e-3, 2.5e-3, 7.5e-3]
    assert [(p.epochs, p.warmup) for p in net.phases] == [(120, 5), (120, 5), (25, 0), (120, 5), (25, 0), (120, 5)]
    assert [p.weight_decay for p in net.phases] == [2e-4] + 5 * [3e-5]
    assert [p.sorts for p in net.phases] == [False] * 4 + [True] * 2
    assert net.phases[0].space.size == 1
    for before, after in itertools.pairwise(net.phases):
        assert before.space <= after.space
        assert before.space.size < after.space.size
    assert net.phases[-1].space <= net.space <= net.phases[-1].space
    assert all(net.space.largest in p.space for p in net.phases)
    for phase in net.phases[1:]:
        net.enter(phase.name)
        seen = [net.student(step, r) for step in range(40) for r in (1, 2)]
        assert all(point in phase.space for point in seen)
        for name, c in phase.space.coordinates.items():
            assert {p[name] for p in seen} == set(c.choices)  # and reaches all of it
    a, b = net.phases[2].space.coordinates, net.phases[3].space.coordinates
    assert a["stages.0.depth"].choices == (2, 3)
    assert a["stem_residual.depth"].choices == (0, 1)
    assert b["stages.0.depth"].choices == (1, 2, 3)
    assert net.phases[4].space.coordinates["stages.1.2.expansion"].choices == (0.25, 0.35)


def test_9_students_are_a_function_of_seed_step_and_number() -> None:
    net, other = small(), small()
    for n in (net, other):
        n.enter("expansion")
    torch.rand(7)
    drawn = [net.student(s, r) for s in range(6) for r in (1, 2, 3)]
    assert drawn == [other.student(s, r) for s in range(6) for r in (1, 2, 3)]
    assert len(set(drawn)) > 5
    third = small(seed=0)
    third.seed = 5
    third.enter("expansion")
    assert drawn != [third.student(s, r) for s in range(6) for r in (1, 2, 3)]


def test_9_a_step_adds_the_gradients_of_r_students_on_one_batch() -> None:
    """Equal to R backward passes of the plain formula, so nothing is zeroed or averaged between students."""
    net = small(pretrain=False).train()
    net.enter("expansion")
    net.steps.fill_(7)
    copied = copy.deepcopy(net)
    net.loss((X, Y)).backward()
    assert int(net.steps) == 8
    copied._snapshot(anew=False)
    reference = copied.teacher_logits(X)
    assert net.phases[net.phase].students == 4
    for r in range(1, 5):
        g = copied.generator(7, r)
        copied._distil(copied.student(7, r), X, Y, reference, g).backward()
    for (name, a), (_, b) in zip(net.named_parameters(), copied.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert any(p.grad is not None for p in net.parameters())


def test_9_custom_phases() -> None:
    phases = [{"width": (4, 8)}, {"width": (4, 8), "depth": (1, 2)},
              {"width": (4, 8), "depth": (1, 2), "expansion": (0.5, 1.0)}]  # fmt: skip
    net = small(phases=phases)
    assert [p.space.size for p in net.phases] == [1, 2, 4, 2 * (2 + 4)]
    assert [p.students for p in net.phases] == [1, 1, 2, 4]
    assert [p.sorts for p in net.phases] == [False, False, False, True]
    with pytest.raises(ValueError, match=r"phases: number 1 is not a superset of the one before it: 3\.width"):
        small(phases=[phases[0], {"depth": (1, 2)}, phases[2]])
    with pytest.raises(ValueError, match=r"the last one must be the whole space, but 3\.0\.expansion has only"):
        small(phases=phases[:2])
    with pytest.raises(ValueError, match="is not a superset"):
        small(phases=[{"width": (4,)}, phases[2]])  # without the largest network
    with pytest.raises(ValueError, match="last one must be the whole space"):
        small(phases=("width", "depth"))
    with pytest.raises(ValueError, match=r"phases\[1\]: 'expand'; allowed: 'width', 'kernel', 'depth', 'expansion'"):
        small(phases=("width", "expand"))
    with pytest.raises(ValueError, match="'heads' is neither a coordinate nor an axis"):
        small(phases=[{"heads": (1,)}])


# -- 10, 11 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "eval"])
def test_10_one_point_is_plain_rslad_of_a_static_student(norm: Any) -> None:
    teacher = cnn(5)
    options = {**SMALL, "width": (1.0,), "depth": {}, "expansion": (1.0,), "attack_norm": norm}
    net = ProARD(cnn(1), X[:2], teacher=teacher, pretrain=False, **options)
    assert net.space.size == 1
    static, frozen = cnn(1).train(), copy.deepcopy(teacher).eval()
    first = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    second = torch.optim.SGD(static.parameters(), 0.1, momentum=0.9)
    net.train()
    for step in range(3):
        x, y = DATA[step % 2]
        first.zero_grad()
        net.loss((x, y)).backward()
        first.step()
        # RSLAD, written out
        t = frozen(x).detach()
        buffers = copy.deepcopy(dict(static.named_buffers()))
        static.train(norm == "batch")
        g = net.generator(step, 1)
        moved = x + 0.001 * torch.randn(x.shape, generator=g)
        for _ in range(2):
            moved.requires_grad_(True)
            value = kl_divergence(t, static(moved), reduction="sum")
            (gradient,) = torch.autograd.grad(value, moved)
            moved = moved.detach() + 0.05 * gradient.sign()
            moved = torch.min(torch.max(moved, x - 0.1), x + 0.1).clamp(0, 1)
        static.train()
        for name, b in static.named_buffers():
            b.copy_(buffers[name])
        second.zero_grad()
        attacked, clean = static(moved), static(x)
        loss = 5 / 6 * kl_divergence(t, attacked) + 1 / 6 * kl_divergence(t, clean)
        loss.backward()
        second.step()
    for (name, a), b in zip(net.model.state_dict().items(), static.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(static[0].weight, cnn(1)[0].weight)


def test_11_the_frozen_teacher_never_changes() -> None:
    net = small().train()
    net.enter("teacher")
    net.loss((X, Y)).backward()
    assert net.frozen is None  # it is made when its phase ends
    with torch.no_grad():
        net.model[0].weight.mul_(1.1)  # type: ignore[union-attr, operator, index]
    net.enter("width")
    assert net.frozen is not None
    assert torch.equal(net.frozen[0].weight, net.model[0].weight)  # type: ignore[index, union-attr, arg-type]
    before = copy.deepcopy(net.frozen.state_dict())
    net.train()
    assert not net.frozen.training
    net.held = False
    fit(net, DATA, epochs=2, lr=0.05, progress=False, weight_decay=0.1)
    assert net.phase == len(net.phases) - 1
    net.enter("expansion")
    assert not any(p.requires_grad for p in net.frozen.parameters())
    given = ProARD(cnn(1), X[:2], teacher=(own := cnn(9)), **SMALL)
    state = copy.deepcopy(own.state_dict())
    fit(given, DATA, epochs=2, lr=0.05, progress=False, weight_decay=0.1)
    for module_ in (own, given.frozen):
        assert all(torch.equal(t, state[n]) for n, t in module_.state_dict().items())  # type: ignore[union-attr]
    late = small(pretrain=False).train()
    late.loss((X, Y)).backward()
    state = copy.deepcopy(late.frozen.state_dict())  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(late.parameters(), 0.1)
    optimizer.step()
    late.loss((X, Y))
    assert all(torch.equal(t, state[n]) for n, t in late.frozen.state_dict().items())  # type: ignore[union-attr]
    assert before.keys() == state.keys()


def test_11_the_live_teacher_is_the_largest_sub_network() -> None:
    net = small(teacher="live").train()
    net.enter("width")
    net.use(net.space.smallest)  # whatever is in use
    assert net.frozen is None
    reference = copy.deepcopy(net.model).train()
    state = copy.deepcopy(net.state_dict())
    found = net.teacher_logits(X)
    assert torch.equal(found, reference(X))
    assert not found.requires_grad
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    loss = net.loss((X, Y))
    copied = small(teacher="live").train()
    copied.enter("width")
    student = copied._distil(copied.student(0, 1), X, Y, found, copied.generator(0, 1))
    trades = copied._trades(copied.space.largest, X, Y, copied.generator(0, 0))
    torch.testing.assert_close(loss, student + trades)
    with torch.no_grad():
        net.model[0].weight.mul_(1.5)  # type: ignore[union-attr, operator, index]
    assert not torch.equal(net.teacher_logits(X), found)  # it follows


# -- 12 ---------------------------------------------------------------------------------------------------------------


def test_12_inactive_blocks_do_not_count() -> None:
    net = elastic_resnet()
    shallow = {**net.space.largest, "stages.0.depth": 1, "stages.0.0.expansion": 0.2}
    one = Point(**{**shallow, "stages.0.1.expansion": 0.2, "stages.0.2.expansion": 0.25})
    two = Point(**{**shallow, "stages.0.1.expansion": 0.35, "stages.0.2.expansion": 0.2})
    assert one != two
    assert torch.equal(net.space.encode(one), net.space.encode(two))
    predictor = AccRobPredictor(net.space)
    assert torch.equal(predictor.predict([one]), predictor.predict([two]))
    assert net.flops(one) == net.flops(two)
    assert net.axes.parameters(one) == net.axes.parameters(two)
    net.calibrate(DATA, points=[one])
    net.eval()
    assert torch.equal(net.use(one)(X), net.use(two)(X))  # the same row of statistics, too
    names = list(net.space.coordinates)
    hot = dict(zip(names, net.space.encode(one).split([len(c.choices) for c in net.space.coordinates.values()]),
                   strict=True))  # fmt: skip
    assert hot["stages.0.1.expansion"].sum() == hot["stages.0.2.expansion"].sum() == 0
    assert hot["stages.0.0.expansion"].tolist() == [1, 0, 0]
    active = Point(**{**one, "stages.0.0.expansion": 0.35})
    assert net.flops(active) != net.flops(one)
    assert not torch.equal(net.space.encode(active), net.space.encode(one))


# -- 13 ---------------------------------------------------------------------------------------------------------------


class Rule(AccRobPredictor):
    """A predictor whose two outputs pull apart, so that there is a front."""

    def predict(self, points: Any) -> Tensor:
        rows = []
        for p in points:
            h = torch.Generator().manual_seed(zlib.crc32(str(p).encode()))
            size = sum(float(v) for v in p.values())
            rows.append([size / 200 + 0.2 * torch.rand((), generator=h).item(), torch.rand((), generator=h).item()])
        return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_13_the_search_finds_the_front_of_the_whole_space(share: float) -> None:
    pytest.importorskip("pymoo")
    net = small(width=(0.25, 0.5, 0.75, 1.0))
    every = list(net.space.enumerate())
    assert len(every) == net.space.size == 4 * (2 + 4)
    predictor = Rule(net.space)
    cap = share * net.flops(net.space.largest)
    rows = predictor.predict(every).tolist()
    allowed = [(p, a, r) for p, (a, r) in zip(every, rows, strict=True) if net.flops(p) <= cap]
    front = {
        p for p, a, r in allowed
        if not any(b >= a and s >= r and (b > a or s > r) for _, b, s in allowed)
    }  # fmt: skip
    assert 1 < len(front) < len(allowed)
    found = search(net, predictor, max_flops=cap, population=20, generations=15)
    assert {f.point for f in found} == front
    assert all(f.flops == net.flops(f.point) <= cap for f in found)
    assert [f.robustness for f in found] == sorted((f.robustness for f in found), reverse=True)
    early = search(net, predictor, max_flops=cap, population=6, generations=2)
    assert early
    assert all(f.flops <= cap for f in early)
    state = torch.get_rng_state()
    assert search(net, predictor, max_flops=cap, population=6, generations=2) == early
    assert torch.equal(torch.get_rng_state(), state)


def test_13_a_learned_predictor_and_its_search() -> None:
    pytest.importorskip("pymoo")
    net = elastic_resnet()
    points = sample(net.space, 60, 1)
    costs = torch.tensor([float(sum(p[n] == c.choices[-1] for n, c in net.space.coordinates.items())) for p in points])
    predictor = AccRobPredictor(net.space, hidden=32, layers=2)
    predictor.learn(points, torch.stack([costs / 20, 1 - costs / 20], 1), epochs=100)
    seen: list[Point] = []
    original = predictor.predict

    def spy(asked: Any) -> Tensor:
        seen.extend(asked)
        return original(asked)

    predictor.predict = spy  # type: ignore[method-assign, assignment]
    cap = 0.6 * net.flops(net.space.largest)
    found = search(net, predictor, max_flops=cap, population=8, generations=4)
    assert len(seen) == len(set(seen))  # nothing is predicted twice
    assert all(p == net.space.canonical(p) for p in seen)
    scores = [(f.accuracy, f.robustness) for f in found]
    for (a, r), (b, s) in itertools.permutations(scores, 2):
        assert not (b >= a and s >= r and (b > a or s > r))
    assert all(f.flops <= cap for f in found)


class Bigger(AccRobPredictor):
    """Larger is better in both, so that the cap alone holds the search."""

    def predict(self, points: Any) -> Tensor:
        shares = [sum(c.choices.index(p[n]) / (len(c.choices) - 1) for n, c in self.space.coordinates.items())
                  for p in points]  # fmt: skip
        return torch.tensor([[s / 20, s / 30] for s in shares], dtype=torch.float64)


def test_13_the_cap_is_a_constraint_of_the_search() -> None:
    pytest.importorskip("pymoo")
    net = elastic_resnet()
    predictor = Bigger(net.space)
    seen: list[Point] = []
    original = predictor.predict
    predictor.predict = lambda points: (seen.extend(points), original(points))[1]  # type: ignore[method-assign]
    cap = 0.35 * net.flops(net.space.largest)
    found = search(net, predictor, max_flops=cap, population=12, generations=8)
    first, last = seen[:12], seen[-24:]
    within = [sum(net.flops(p) <= cap for p in part) / len(part) for part in (first, last)]
    assert within[1] > within[0]  # it turns to what fits; without the constraint it runs to the largest
    assert len({(f.accuracy, f.robustness) for f in found}) == 1  # the two agree; equals are all kept
    assert found[0].accuracy > max(predictor.predict([p])[0, 0] for p in first if net.flops(p) <= cap)


def test_13_pareto_and_bad_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(0.5, 0.5), (0.6, 0.4), (0.4, 0.6), (0.5, 0.4), (0.5, 0.5), (0.6, 0.3)]
    found = [Found(Point(n=i), a, r, 1) for i, (a, r) in enumerate(rows)]
    assert {f.point["n"] for f in pareto(found)} == {0, 1, 2, 4}
    net = small()
    predictor = Rule(net.space)
    with pytest.raises(ValueError, match="max_flops: 10 is below the smallest network's"):
        search(net, predictor, max_flops=10)
    with pytest.raises(ValueError, match="population: 0"):
        search(net, predictor, max_flops=1e9, population=0)
    with pytest.raises(ValueError, match="mutation: 2"):
        search(net, predictor, max_flops=1e9, mutation=2)
    import builtins

    real = builtins.__import__

    def no_pymoo(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pymoo"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pymoo)
    with pytest.raises(ImportError, match=r'pip install "pliant\[search\]"'):
        search(net, predictor, max_flops=1e9)


# -- 14 ---------------------------------------------------------------------------------------------------------------


@functools.cache
def papers_network() -> ProARD:
    torch.manual_seed(0)
    model = ElasticResNet().eval()
    return ProARD(model, torch.rand(1, 3, 8, 8), offer=2, **model.axes())


def to_eight(value: float) -> int:
    """The multiple of 8 nearest to a size, at least 8, and the next one where that loses more than a tenth."""
    nearest = max(8, 8 * math.floor(value / 8 + 0.5))
    return nearest if nearest >= 0.9 * value else nearest + 8


def layers_by_the_rule(point: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of every convolution and linear layer of an architecture; an expansion multiplies what a block makes.

    The multipliers behind the widths are looked up, so that all sizes come from 64, 32, 256, ... and 0.65, 0.8, 1.
    """

    def width(name: str, full: int) -> int:
        sizes = {to_eight(full * w) for w in (0.65, 0.8, 1.0)}
        assert point[f"{name}.width"] in sizes
        return int(point[f"{name}.width"])

    mid, c = width("stem1.0", 32), width("stem2.0", 64)
    table: dict[str, tuple[int, ...]] = {"stem1.0": (mid, 3, 3, 3), "stem2.0": (c, mid, 3, 3)}
    if point["stem_residual.depth"]:
        table["stem_residual.0.conv.0"] = (mid, mid, 3, 3)
    for s, full in enumerate((256, 512, 1024, 2048)):
        out = width(f"stages.{s}", full)
        for b in range(int(point[f"stages.{s}.depth"])):
            inner, name = to_eight(round(out * float(point[f"stages.{s}.{b}.expansion"]))), f"stages.{s}.{b}"
            table[f"{name}.conv1.0"] = (inner, c, 1, 1)
            table[f"{name}.conv2.0"] = (inner, inner, 3, 3)
            table[f"{name}.conv3.0"] = (out, inner, 1, 1)
            if b == 0:
                table[f"{name}.shortcut.0"] = (out, c, 1, 1)
            c = out
    return table | {"head": (10, c)}


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_14_every_layer_of_every_student_has_the_size_of_the_rule(seed: int) -> None:
    net = papers_network()
    point = sample(net.space, 1, seed)[0]
    expected = layers_by_the_rule(point)
    views = net.axes.network(point).views(net.model)
    assert {n.removesuffix(".weight"): tuple(t.shape) for n, t in views.items() if t.ndim > 1} == expected


def test_14_students_cost_what_the_rule_gives() -> None:
    net = papers_network()
    for point in (net.space.smallest, *sample(net.space, 2)):
        macs, side = 0, 8
        for name, shape in layers_by_the_rule(point).items():  # as they run; a shortcut ends where its block does
            stride = 2 if name in [f"stages.{s}.0.conv2.0" for s in (1, 2, 3)] else 1
            side = 1 if name == "head" else -(-side // stride)
            macs += math.prod(shape) * side * side
        assert net.flops(point) == 2 * macs


def test_14_mobile_networks_expand_what_enters_the_block() -> None:
    """relative="in" with the rule of Once-for-all's mobile blocks, make_divisible(round(entering * expansion))."""
    rows = (Row((16, 24), (1, 2), (3,), 1, 1), Row((24, 40), (1, 2), (3, 5), 6, 2))
    torch.manual_seed(0)
    model = MobileNet(4, 1, rows=rows, stem=(16, 32), head=(32,), stem_stride=1)
    choices = {**model.choices(), "expansion": (3, 4, 6), "per_block": ("expansion",)}
    net = ProARD(model, X[:2], attack_steps=1, relative="in", inner="md", **choices)
    assert not any(n.startswith("stages.0.") and n.endswith("expansion") for n in net.space.coordinates)
    for point in sample(net.space, 40):
        views = net.axes.network(point).views(net.model)
        made = {n.removesuffix(".weight"): len(t) for n, t in views.items() if t.ndim > 1}
        c = int(point["stem.0.width"])
        for s in (0, 1):
            for b in range(int(point[f"stages.{s}.depth"])):
                name, e = f"stages.{s}.{b}", float(point.get(f"stages.{s}.{b}.expansion", 1))
                mid = to_eight(round(c * e))
                assert made[f"{name}.depthwise.0"] == made[f"{name}.excite.3"] == mid
                assert made.get(f"{name}.expand.0", mid) == mid
                assert made[f"{name}.excite.1"] == to_eight(mid // 4)
                c = made[f"{name}.project.0"]
                assert c == point[f"stages.{s}.width"]


def test_14_sizes_of_the_paper() -> None:
    table = {64: (40, 48, 64), 256: (168, 208, 256), 512: (336, 408, 512), 1024: (664, 816, 1024),
             2048: (1328, 1640, 2048), 32: (24, 24, 32)}  # fmt: skip
    for full, sizes in table.items():
        assert tuple(make_divisible(full * w, 8) for w in (0.65, 0.8, 1.0)) == sizes
    net = papers_network()
    model: Any = net.model
    assert sum(len(s) for s in model.stages) == 18
    assert [len(s) for s in model.stages] == [4, 4, 6, 4]
    choices = {n: c.choices for n, c in net.space.coordinates.items()}
    widths = {n: c for n, c in choices.items() if n.endswith("width")}
    assert list(widths.values()) == [(24, 32), (40, 48, 64), *(table[n] for n in (256, 512, 1024, 2048))]
    assert choices["stem_residual.depth"] == (0, 1)
    assert [choices[f"stages.{i}.depth"] for i in range(4)] == [(2, 3, 4), (2, 3, 4), (4, 5, 6), (2, 3, 4)]
    assert sum(n.endswith("expansion") for n in choices) == 18
    product = 3**5 * 2 * 2 * (9 + 27 + 81) ** 3 * (81 + 243 + 729)
    assert net.space.size == product  # 6 widths of which two coincide, and idle blocks counted once
    assert net.flops(net.space.smallest) < net.flops(net.space.largest)


# -- training ---------------------------------------------------------------------------------------------------------


def test_fit_walks_through_all_phases() -> None:
    net = elastic_resnet(attack_steps=1)
    seen: list[str] = []
    sorts: list[str] = []
    original = net.sort_channels

    def sort(trained: Any = None) -> None:
        sorts.append(net.phases[net.phase].name)
        original(trained)

    net.sort_channels = sort  # type: ignore[method-assign, assignment]
    history = fit(net, DATA, steps=24, lr=0.02, progress=False, lr_schedule="constant",
                  on_step=lambda *_: seen.append(net.phases[net.phase].name))  # fmt: skip
    assert list(dict.fromkeys(seen)) == [p.name for p in net.phases]
    counts = [seen.count(p.name) for p in net.phases]
    assert counts == pytest.approx([24 * s for s in net.shares], abs=1.01)
    assert sorts == ["depth-b", "expansion-a"]  # just before the two phases of expansion
    assert history.steps == 24
    assert int(net.steps) == 24
    front = measure(net, DATA, repeats=0)
    assert len(front) == len(net.points())
    flops = [r.flops for r in front.rows]
    assert flops == [net.flops(p) for p in net.points()] == sorted(flops)
    net.train().loss((X, Y)).backward()
    with pytest.raises(RuntimeError, match="have not been estimated since training"):
        net.eval()(X)


def test_phases_can_be_held_and_schedules_start_anew() -> None:
    net = small()
    net.enter("depth")
    net.schedule(0.0)
    net.schedule(0.99)
    assert net.phases[net.phase].name == "depth"
    net.held = False
    net.schedule(0.99)
    assert net.phases[net.phase].name == "expansion"
    net.schedule(0.0)
    assert net.phases[net.phase].name == "teacher"
    net.schedule(1.0)
    assert net.phase == len(net.phases) - 1
    shared = small(shares=(0, 1, 0, 3))
    assert shared.shares == (0, 0.25, 0, 0.75)
    shared.schedule(0.0)
    assert shared.phases[shared.phase].name == "width"
    assert shared.frozen is not None  # a phase without a share is entered all the same
    shared.schedule(0.3)
    assert shared.phases[shared.phase].name == "expansion"
    with pytest.raises(ValueError, match="phase: 'none' is not one of teacher, width"):
        net.enter("none")


@pytest.mark.parametrize("objective", ["rslad", "ard", "adaad", "trades"])
@pytest.mark.parametrize("teacher", ["frozen", "live"])
def test_every_objective_trains(objective: Any, teacher: Any) -> None:
    net = small(objective=objective, teacher=teacher, alpha=0.5, temperature=2.0).train()
    net.enter("expansion")
    loss = net.loss((X, Y))
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    scaled = small(objective=objective, teacher=teacher, alpha=1.0, temperature=2.0, reduction="elementwise").train()
    scaled.enter("expansion")
    assert scaled.loss((X, Y)) < loss
    net.eval()
    before = copy.deepcopy(net.state_dict())
    first = net.loss((X, Y))
    assert torch.equal(first, net.loss((X, Y)))  # in evaluation mode nothing is counted and nothing moves
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_adaad_attacks_where_both_move() -> None:
    """Its x' is not that of RSLAD: the teacher's side of the divergence has a gradient, too."""
    teacher = cnn(5)
    found = []
    for objective in ("rslad", "adaad"):
        net = ProARD(cnn(1), X[:2], teacher=teacher, objective=objective, **SMALL).train()  # type: ignore[arg-type]
        net.enter("width")
        seen: list[Tensor] = []
        original = net._logits
        net._logits = lambda p, x, s=seen, o=original: (s.append(x), o(p, x))[1]  # type: ignore[method-assign, assignment, misc]
        net.loss((X, Y))
        found.append(seen[0])
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def separable(count: int = 128) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    y = torch.randint(0, 4, (count,))
    patterns = torch.full((4, 1, 8, 8), 0.1)  # dark, bright, stripes across, stripes down
    patterns[1] = 0.8
    patterns[2, :, ::4] = patterns[2, :, 1::4] = 0.8
    patterns[3, :, :, ::4] = patterns[3, :, :, 1::4] = 0.8
    return (patterns[y] + 0.1 * torch.rand(count, 1, 8, 8)).clamp(0, 1), y


def test_progressive_training_learns_robust_students_and_keeps_the_best_state() -> None:
    x, y = separable()
    train, held = [(x[i : i + 32], y[i : i + 32]) for i in (0, 32)], [(x[64:], y[64:])]
    net = small(calibration_images=64, seed=1)
    reports = train_progressively(
        net, train, validation=held, steps=[30, 16, 6, 10], lrs=[0.1, 0.05, 0.02, 0.02], every=4, candidates=2,
        progress=False,
    )  # fmt: skip
    assert [r.name for r in reports] == [p.name for p in net.phases]
    assert [r.steps for r in reports] == [30, 16, 6, 10]
    for report in reports:
        scores = [s for _, s in report.scores]
        assert report.scores[-1][0] == report.steps  # the last state is looked at as well
        assert report.kept == report.scores[scores.index(max(scores))][0]
    attack = PGD(0.1, 0.05, 10, "uniform")
    for point in net.points():
        plain = net.extract(point)
        assert robust_accuracy(plain, held, attack) > 0.8
    assert not net.training
    assert not net.held


def test_a_phase_ends_with_its_best_state() -> None:
    x, y = separable()
    net = small(calibration_images=64)
    states: list[dict[str, Tensor]] = []
    scores = iter([0.1, 0.9, 0.3, 0.2])
    original = module.robust_accuracy

    def scripted(*args: Any, **kwargs: Any) -> float:
        states.append({n: t.clone() for n, t in net.model.state_dict().items()})
        return next(scores)

    module.robust_accuracy = scripted
    try:
        reports = train_progressively(net, [(x, y)], validation=[(x, y)], steps=[4, 0, 0, 0], every=1, candidates=1,
                                      progress=False)  # fmt: skip
    finally:
        module.robust_accuracy = original
    assert reports[0].kept == 2
    assert [r.steps for r in reports] == [4, 0, 0, 0]
    tags = "0.weight"
    assert torch.equal(net.model.state_dict()[tags], states[1][tags])
    assert torch.equal(net.model.state_dict()["1.running_mean"], states[1]["1.running_mean"])
    assert not torch.equal(states[1][tags], states[3][tags])


def test_each_phase_has_an_optimiser_and_a_schedule_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Mapping[str, Any]] = []
    monkeypatch.setattr(
        module, "fit", lambda net, train, **kw: calls.append(kw) or fit(net, train, **{**kw, "epochs": 1})
    )
    net = small()
    train_progressively(net, [(X, Y)], progress=False)
    assert [c["epochs"] for c in calls] == [125, 125, 125, 125]
    assert [c["lr"] for c in calls] == [0.1, 3e-2, 7.5e-3, 7.5e-3]
    assert [c["weight_decay"] for c in calls] == [2e-4, 3e-5, 3e-5, 3e-5]
    factor = calls[0]["lr_schedule"]
    assert factor(0.0) < 0.05
    assert factor(0.02) == pytest.approx(0.5, abs=0.02)
    assert factor(0.04) == pytest.approx(1.0, abs=1e-3)
    assert factor(1.0) == pytest.approx(0.0, abs=1e-6)
    assert module._warmed(0.0)(0.0) == 1.0
    with pytest.raises(ValueError, match="epochs: 3 numbers for 4 phases: teacher, width, depth, expansion"):
        train_progressively(net, [(X, Y)], epochs=[1, 1, 1])
    with pytest.raises(ValueError, match="give one of the two"):
        train_progressively(net, [(X, Y)], epochs=[1] * 4, steps=[1] * 4)


def test_a_broken_run_goes_on_bit_by_bit(tmp_path: Any) -> None:
    def make() -> ProARD:
        return small(calibration_images=32)

    whole = make()
    fit(whole, DATA, steps=12, lr=0.05, progress=False)

    def stop(step: int, *_: Any) -> None:
        if step == 7:
            raise KeyboardInterrupt

    broken = make()
    with pytest.raises(KeyboardInterrupt):
        fit(broken, DATA, steps=12, lr=0.05, progress=False, checkpoint=tmp_path, checkpoint_every=5, on_step=stop)
    again = make()
    history = fit(again, DATA, steps=12, lr=0.05, progress=False, checkpoint=tmp_path, checkpoint_every=5)
    assert history.resumed_from == 5
    for (name, a), b in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# -- statistics -------------------------------------------------------------------------------------------------------


def test_calibration_is_the_weighted_mean_of_batch_statistics() -> None:
    net = small(calibration_images=24, calibration_batch=10)
    point = net.space.smallest
    net.calibrate(DATA, points=[point])
    plain: Any = net.extract(point)
    hidden = F.conv2d(X[:24], net.model[0].weight[:4], stride=2, padding=1)  # type: ignore[index, union-attr]
    parts = hidden.split(10)  # batches of 10, 10 and 4 of the first 24 images
    share = torch.tensor([10, 10, 4]) / 24
    mean = sum(s * p.mean((0, 2, 3)) for s, p in zip(share, parts, strict=True))
    var = sum(s * p.var((0, 2, 3), correction=0) for s, p in zip(share, parts, strict=True))
    torch.testing.assert_close(plain[1].running_mean, mean)
    torch.testing.assert_close(plain[1].running_var, var)
    attacked = small(calibration_images=24, calibration_batch=10, calibrate_on="both")
    attacked.calibrate(DATA, points=[point])
    assert not torch.equal(attacked.extract(point)[1].running_mean, plain[1].running_mean)  # type: ignore[index]
    assert not attacked.training or attacked.model.training


def test_uncalibrated_students_refuse_to_evaluate() -> None:
    net = small().eval()
    net(X)  # the largest came with its statistics
    with pytest.raises(RuntimeError, match=r"normalisation statistics of 3\.width=4 .* have not been estimated"):
        net.use(net.space.smallest)(X)
    with pytest.raises(RuntimeError, match=r"net\.calibrate"):
        net.extract(net.space.smallest)
    with pytest.raises(RuntimeError, match="have not been estimated"):
        robust_accuracy(net, DATA)
    plain = net.deployed(net.space.smallest, X)
    with pytest.raises(RuntimeError):  # which leaves the network as it was
        net(X)
    net.calibrate(X)
    assert torch.equal(plain(X), net(X))
    no_norms = ProARD(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), X[:2])
    no_norms.eval().use(no_norms.space.smallest)(X)
    no_norms.calibrate(X)


def test_measuring_candidates_leaves_the_network_as_it_was() -> None:
    net = small().eval()
    before, points = copy.deepcopy(net.state_dict()), net.points()
    attack = PGD(0.1, 0.05, 2, "uniform")
    acc, rob = measure_point(net, net.space.smallest, DATA, calibrate=X, attack=attack)
    assert 0 <= rob <= acc <= 1
    assert acc == pytest.approx((net.deployed(net.space.smallest, X)(X).argmax(1) == Y).float().mean().item())
    predictor = AccRobPredictor.fit(net, DATA, calibrate=DATA, n=6, attack=attack, epochs=3)
    assert predictor.predict(points).shape == (len(points), 2)
    assert set(predictor.errors) == {"accuracy", "robustness"}
    assert net.points() == points
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    again = AccRobPredictor.fit(net, DATA, calibrate=DATA, n=6, attack=attack, epochs=3)
    assert torch.equal(again.predict(points), predictor.predict(points))
    with pytest.raises(ValueError, match="data: it has no batches"):
        measure_point(net, net.space.smallest, [], calibrate=X, attack=attack)


# -- the predictor ----------------------------------------------------------------------------------------------------


def test_the_predictor_has_a_base_for_each_output_and_learns() -> None:
    net = elastic_resnet()
    points = sample(net.space, 300, 0)
    assert len(set(points)) == 300
    share = torch.tensor([sum(c.choices.index(p[n]) / (len(c.choices) - 1) for n, c in net.space.coordinates.items())
                          for p in points]) / 12  # fmt: skip
    measured = torch.stack([0.5 + 0.4 * share, 0.6 * share], 1)
    predictor = AccRobPredictor(net.space)
    linear = [m for m in predictor.body if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [400] * 6 + [2]
    assert predictor(torch.zeros(3, net.space.features)).shape == (3, 2)
    predictor.base.copy_(torch.tensor([0.7, 0.2]))
    with torch.no_grad():
        linear[-1].weight.zero_()
    torch.testing.assert_close(predictor.predict(points[:2]), torch.tensor([[0.7, 0.2]] * 2))
    predictor = AccRobPredictor(net.space).learn(points, measured)
    assert predictor.base[0] == pytest.approx(measured[:, 0].mean().item(), abs=0.02)
    assert predictor.base[1] == pytest.approx(measured[:, 1].mean().item(), abs=0.02)
    assert predictor.errors["accuracy"] < 0.5 * measured[:, 0].std()
    assert predictor.errors["robustness"] < 0.5 * measured[:, 1].std()
    with pytest.raises(ValueError, match=r"measured: shape \(3,\) for 3 points"):
        predictor.learn(points[:3], torch.zeros(3))
    with pytest.raises(ValueError, match="shares in"):
        predictor.learn(points[:3], torch.full((3, 2), 55.0))


def test_samples_are_different_and_all_of_a_small_space() -> None:
    net = small()
    assert len(sample(net.space, 8, 0)) == len(set(sample(net.space, 8, 0))) == 8
    assert sample(net.space, 8, 0) == sample(net.space, 8, 0)
    assert set(sample(net.space, 10_000, 0)) == set(net.space.enumerate())


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "pliant.elastic.proard:ProARD"
    if path not in [e.path for e in catalog.METHODS]:
        entry = catalog.Entry("proard", path, "ProARD", 2025, "2506.07666", "", "", "", "images", "search")
        monkeypatch.setattr(catalog, "METHODS", (*catalog.METHODS, entry))


def test_saved_and_loaded_after_a_search(listed: None, tmp_path: Any) -> None:
    net = elastic_resnet(attack_steps=1)
    fit(net, DATA, steps=12, lr=0.02, progress=False)
    found = draws(net, 3, seed=9)
    assert net.set_points(found, DATA) == sorted(found, key=net.flops) == net.points()
    net.use(found[1])
    net.eval()
    save(net, tmp_path / "out")
    model = resnet(5)
    again = load(tmp_path / "out", model=model)
    assert isinstance(again, ProARD)
    assert again.points() == net.points()
    assert again.point == found[1]
    assert again.phases[again.phase].name == "expansion-b"
    assert again.space.coordinates == net.space.coordinates
    again.eval()
    for point in found:
        assert torch.equal(again.use(point)(X), net.use(point)(X))
        assert torch.equal(again.extract(point)(X), net.extract(point)(X))
    assert torch.equal(again.teacher_logits(X), net.teacher_logits(X))
    assert int(again.steps) == 12
    net.train()
    again.train()
    torch.manual_seed(0)
    first = net.loss((X, Y))
    torch.manual_seed(0)
    assert torch.equal(first, again.loss((X, Y)))  # it goes on as it would have: phase, teacher, step
    with pytest.raises(ValueError, match="points: there are none"):
        net.set_points([])
    with pytest.raises(ValueError, match="point: it must give exactly"):
        net.set_points([{"width": 1}])


def test_saved_with_a_given_teacher_and_kernels(listed: None, tmp_path: Any) -> None:
    net = elastic_mobile(teacher=mobile(4), phases=("kernel", "width", "depth", "expansion"))
    with torch.no_grad():
        for m in net.matrices.values():
            m.add_(0.1)
    net.calibrate(DATA)
    net.eval().use(net.space.smallest)
    save(net, tmp_path / "out")
    with pytest.raises(ValueError, match=r"teacher: it was given when this was saved; give it again: teacher="):
        load(tmp_path / "out", model=mobile(1))
    again = load(tmp_path / "out", model=mobile(1), teacher=mobile(2))
    assert torch.equal(again.eval()(X), net(X))
    assert torch.equal(again.teacher_logits(X), net.teacher_logits(X))  # type: ignore[operator]
    assert [p.name for p in again.phases][1] == "kernel"  # type: ignore[union-attr]


# -- the constructor --------------------------------------------------------------------------------------------------


def test_any_model_with_its_defaults() -> None:
    from pliant.tasks.images import SmallResNet

    torch.manual_seed(0)
    net = ProARD(SmallResNet(), torch.rand(2, 1, 28, 28))
    choices = {n: c.choices for n, c in net.space.coordinates.items()}
    assert choices["stages.2.width"] == (40, 48, 64)
    assert choices["stages.0.depth"] == (1, 2)
    assert choices["stages.2.1.expansion"] == (0.57, 0.71, 1.0)
    assert net.axes.sizes(net.space.smallest)["stages.2.0.conv1"] == 24
    assert net.attack == PGD(0.031, 0.0078, 10, "gaussian", "linf", (0.0, 1.0))
    mlp = ProARD(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), X[:2])
    assert [p.name for p in mlp.phases] == ["teacher", "width"]
    fit(mlp, DATA, epochs=1, progress=False)
    assert len(mlp.points()) == 2
    assert "architectures=2" in repr(mlp)
    assert "width, 2 architectures" in repr(mlp.phases[1])


def test_the_plain_network_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="stages, base_blocks, strides: 1, 4 and 4 entries"):
        ElasticResNet(stages=(8,))
    with pytest.raises(ValueError, match="base_blocks, extra"):
        ElasticResNet(base_blocks=(0, 1, 1, 1))
    with pytest.raises(ValueError, match=r"expansion: \(0\.2, 0\.3\) must have 0\.35"):
        resnet().axes(expansion=(0.2, 0.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, r"eps: 0\.0 is not allowed"),
        ({"eps": -1.0}, "eps"),
        ({"step": 0.0}, "step"),
        ({"attack_steps": 0}, "steps: 0"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"bounds": (0.0, 0.5)}, r"inputs: they run from .* outside of bounds=\(0\.0, 0\.5\); put the normalisation"),
        ({"start": "zeros"}, "start: 'zeros'; allowed: 'gaussian', 'uniform'"),
        ({"attack_norm": "layer"}, "attack_norm: 'layer'; allowed: 'batch', 'eval'"),
        ({"objective": "kd"}, "objective: 'kd'; allowed: 'rslad', 'ard', 'adaad', 'trades'"),
        ({"reduction": "sum"}, "reduction: 'sum'"),
        ({"teacher": "best"}, "teacher: 'best'; allowed: 'frozen', 'live'"),
        (
            {"teacher": nn.Sequential(cnn(), nn.Unflatten(1, (2, 2)))},
            r"teacher: its output has shape \(2, 2, 2\); logits",
        ),
        ({"teacher": cnn(classes=7)}, "teacher: it has 7 classes, the model has 4"),
        ({"students": (1, 2)}, r"students: \(1, 2\); allowed: a sequence of exactly 3"),
        ({"students": (0, 1, 1)}, "students"),
        ({"beta": -1.0}, "beta: -1.0"),
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"shares": (1, 2)}, r"shares: \[1, 2\] must be numbers >= 0, not all zero, one for each of teacher, width"),
        ({"protect": "none"}, "protect"),
        ({"offer": 0}, "offer: 0"),
        ({"calibration_images": 0}, "calibration_images: 0"),
        ({"calibrate_on": "attacked"}, "calibrate_on: 'attacked'; allowed: 'clean', 'both'"),
        ({"inner": "half"}, "inner: 'half'; allowed: 'md'"),
        ({"inner": "md", "expansion": None}, "expansion: give the ratios"),
        ({"width": (0.5,)}, "width"),
        ({"width": (0.0, 1.0)}, "width"),
        ({"depth": {"9": (1, 2)}}, "depth: '9' is not a stack"),
        ({"kernel": (2, 3)}, "kernel"),
        ({"kernel": (3, 5)}, "kernel: nothing in the model can change"),
        ({"relative": "up"}, "relative: 'up'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_batches_and_points() -> None:
    net = small()
    with pytest.raises(ValueError, match=r"inputs: they run from .* to 2"):
        net.loss((X + 1 + (1 - X.max()), Y))
    shifted = small(bounds=(-1.0, 3.0))
    assert shifted.loss((X + 1, Y)).isfinite()
    with pytest.raises(TypeError, match="floating point"):
        net.loss((X.long(), Y))
    with pytest.raises(TypeError, match="floating point"):
        ProARD(cnn(), {"x": X[:2]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels run from 0 to 7, but the model has 4"):
        net.loss((X, torch.arange(32) % 8))
    with pytest.raises(ValueError, match=r"point: 3\.width=5 is not one of 4, 8"):
        net.use({**net.space.largest, "3.width": 5})
    with pytest.raises(ValueError, match="point: it must give exactly"):
        net.extract(Point(width=1.0))
    with pytest.raises(ValueError, match="data: it has no batches"):
        net.calibrate([])
    with pytest.raises(ValueError, match="estimator"):
        net.calibrate(X, estimator="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of its layers can be cut in width"):
        ProARD(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)), X[:2])


# -- the experiment ---------------------------------------------------------------------------------------------------


def test_the_arms_of_the_experiment_differ_in_their_spaces_and_starts_alone() -> None:
    pytest.importorskip("sklearn")
    from pliant.reproduce import proard as experiment

    data = experiment._digits()
    x, _ = data["train"]
    assert [len(v[0]) for v in data.values()] == [1078, 180, 539]
    assert x.min() == 0
    assert x.max() == 1
    teacher = experiment._network(0)
    whole, phased = (
        experiment._student_arm(experiment._network(0), teacher, data, 0, [0, 1, 0, 0, 0, 0], whole=w, rate=0.03)
        for w in (True, False)
    )
    assert [(p.name, p.students, p.lr) for p in whole.phases] == [(p.name, p.students, p.lr) for p in phased.phases]
    assert {p.space.size for p in whole.phases[1:]} == {whole.space.size}
    assert [p.space.size for p in phased.phases[1:]] == [4, 8, 12, 4 * (2 + 4 + 8), whole.space.size]
    assert not any(p.sorts for p in whole.phases)
    assert torch.equal(whole.teacher_logits(x[:5]), phased.teacher_logits(x[:5]))
    assert list(experiment.STUDENTS[1:]) == [p.students for p in phased.phases[1:]]
    alone = experiment._alone(experiment._network(1), teacher, whole.space.smallest, data, 0, steps=2)
    assert alone[4][0].conv1.weight.shape == (4, 8, 3, 3)  # type: ignore[index]
