from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.adversary import (
    PGD,
    cross_entropy_objective,
    gradient_of,
    kl_divergence,
    kl_objective,
    robust_accuracy,
    undisturbed,
)

torch.set_num_threads(1)
torch.manual_seed(0)
X, Y = torch.rand(24, 1, 6, 6), torch.randint(0, 3, (24,))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 24), nn.ReLU(), nn.Linear(24, 3)
    )


def trained(steps: int = 60) -> tuple[nn.Module, Tensor, Tensor]:
    """A net that has learnt something, with 400 held-out samples that small moves can turn."""
    torch.manual_seed(1)
    centres = torch.rand(3, 1, 6, 6)
    labels = torch.randint(0, 3, (800,))
    images = (centres[labels] + 0.35 * torch.randn(800, 1, 6, 6)).clamp(0, 1)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(steps):
        rows = torch.arange(64) + 64 * (step % 6)
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    return net.eval(), images[400:], labels[400:]


# -- feasibility and the guard ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    eps=st.floats(1e-3, 0.9),
    step=st.floats(1e-3, 0.9),
    steps=st.integers(1, 4),
    norm=st.sampled_from(["linf", "l2"]),
    start=st.sampled_from(["gaussian", "uniform", None]),
    seed=st.integers(0, 10_000),
)
def test_attacks_stay_inside_the_ball_and_the_bounds(
    eps: float, step: float, steps: int, norm: Any, start: Any, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 1, 6, 6, generator=generator)
    x[0], x[1] = 0, 1  # corners
    moved = PGD(eps, step, steps, start, norm).attack(
        cross_entropy_objective(network().eval(), Y[:5]), x, generator=generator
    )
    away = (moved - x).flatten(1)
    size = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
    assert (size <= eps + 1e-6).all()
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not moved.requires_grad
    assert moved.shape == x.shape


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_network_changes(training: bool) -> None:
    net = network().train(training)
    net[4].eval()  # flags differ from module to module
    F.cross_entropy(net(X), Y).backward()
    state = copy.deepcopy(net.state_dict())
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    flags = [m.training for m in net.modules()]
    PGD(0.1, 0.05, 3).attack(cross_entropy_objective(net, Y), X, modules=[net])
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    assert all(torch.equal(p.grad, grads[n]) for n, p in net.named_parameters())  # type: ignore[arg-type]
    assert [m.training for m in net.modules()] == flags
    if training:  # without the guard the buffers do move
        PGD(0.1, 0.05, 3).attack(cross_entropy_objective(net, Y), X)
        assert not torch.equal(net.state_dict()["1.running_mean"], state["1.running_mean"])


def test_the_guard_holds_when_the_block_fails() -> None:
    net = network().train()
    before = copy.deepcopy(net.state_dict())

    def fail() -> None:
        with undisturbed(net):
            net.eval()
            net[1].train()
            net(X)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert net.training
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_the_random_start_comes_from_the_generator() -> None:
    objective = cross_entropy_objective(network().eval(), Y)

    def run(seed: int, start: Any) -> Tensor:
        return PGD(0.1, 0.02, 2, start).attack(objective, X, generator=torch.Generator().manual_seed(seed))

    for start in ("gaussian", "uniform"):
        state = torch.get_rng_state()
        first = run(0, start)
        assert torch.equal(torch.get_rng_state(), state)  # torch's own state is left alone
        torch.rand(3)
        assert torch.equal(run(0, start), first)
        assert not torch.equal(run(1, start), first)
    assert torch.equal(run(0, None), run(1, None))


def test_the_starts_are_those_of_the_equations() -> None:
    def noise(name: str) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return getattr(torch, name)(X.shape, generator=generator)  # type: ignore[no-any-return]

    g = torch.Generator().manual_seed(3)
    assert torch.equal(PGD(0.1).begin(X, g), X + 0.001 * noise("randn"))
    g = torch.Generator().manual_seed(3)
    uniform = PGD(0.1, start="uniform").begin(X, g)
    torch.testing.assert_close(uniform, (X + 0.2 * (noise("rand") - 0.5)).clamp(0, 1))
    assert torch.equal(PGD(0.1, start=None).begin(X), X)


# -- the steps ---------------------------------------------------------------------------------------------------------


def test_one_step_by_hand() -> None:
    net = network().eval()
    x = X.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), Y, reduction="sum"), x)
    moved = PGD(0.1, 0.03, 1, None).attack(cross_entropy_objective(net, Y), X)
    low, high = X - 0.1, X + 0.1
    assert torch.equal(moved, (X + 0.03 * gradient.sign()).clamp(low, high).clamp(0, 1))
    moved = PGD(0.1, 0.03, 1, None, "l2", bounds=(-9, 9)).attack(cross_entropy_objective(net, Y), X)
    direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(moved, X + 0.03 * direction)


def test_it_climbs_and_each_sample_on_its_own() -> None:
    net = network().eval()
    attack = PGD(0.2, 0.05, 8, None)
    objective = cross_entropy_objective(net, Y)
    moved = attack.attack(objective, X)
    assert objective(moved) > objective(X) + 1
    alone = torch.cat(
        [attack.attack(cross_entropy_objective(net, Y[i : i + 6]), X[i : i + 6]) for i in range(0, 24, 6)]
    )
    torch.testing.assert_close(moved, alone)


def test_gradient_of_gives_parameters_no_gradient() -> None:
    net = network().eval()
    gradient = gradient_of(kl_objective(net, torch.randn(24, 3)), X)
    assert gradient.shape == X.shape
    assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():  # an attack needs gradients whatever stands around it
        moved = PGD(0.1, 0.1, 1).attack(kl_objective(net, torch.zeros(24, 3)), X)
    assert not torch.equal(moved, X)


# -- against an independent attack ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_foolbox_from_the_same_start(norm: Any) -> None:
    foolbox = pytest.importorskip("foolbox")
    net, x, y = trained()
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    eps = 0.1 if norm == "linf" else 0.8
    theirs, _, _ = kind(abs_stepsize=eps / 4, steps=10, random_start=False)(
        foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, y, epsilons=eps
    )
    ours = PGD(eps, eps / 4, 10, None, norm).attack(cross_entropy_objective(net, y), x)
    assert (ours - x).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_foolbox_robust_accuracy() -> None:
    foolbox = pytest.importorskip("foolbox")
    net, x, y = trained()
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.03, steps=20, random_start=True)
    torch.manual_seed(0)
    _, _, broken = attack(foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, y, epsilons=0.1)
    theirs = 1 - broken.float().mean().item()
    ours = robust_accuracy(net, [(x[:150], y[:150]), (x[150:], y[150:])], PGD(0.1, 0.03, 20, "uniform"))
    clean = (net(x).argmax(1) == y).float().mean().item()
    assert 0.1 < ours < clean - 0.1
    assert abs(ours - theirs) <= 0.005


# -- divergences ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 6), classes=st.integers(2, 7), temperature=st.floats(0.5, 40), seed=st.integers(0, 999))
def test_kl_is_the_sum_of_its_definition(rows: int, classes: int, temperature: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    p, q = (3 * torch.randn(rows, classes, generator=g, dtype=torch.float64) for _ in range(2))
    a, b = (p / temperature).softmax(1), (q / temperature).softmax(1)
    total = (a * (a.log() - b.log())).sum()
    for reduction, by in (("sum", 1), ("batchmean", rows), ("elementwise", rows * classes)):
        found = kl_divergence(p, q, temperature=temperature, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(found, total / by)
    assert kl_divergence(p, q) >= 0
    assert kl_divergence(p, p).abs() < 1e-12


# -- robust accuracy ---------------------------------------------------------------------------------------------------


def test_robust_accuracy_counts_every_sample_and_leaves_the_network() -> None:
    net, x, y = trained()
    net.train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    flags = [m.training for m in net.modules()]
    tiny = robust_accuracy(net, [(x[:7], y[:7]), (x[7:], y[7:])], PGD(1e-7, 1e-7, 1, None))
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    net.eval()
    assert tiny == pytest.approx((net(x).argmax(1) == y).float().mean().item())
    values = [robust_accuracy(net, [(x, y)], PGD(e, e / 4, 10, "uniform")) for e in (0.02, 0.06, 0.12, 0.25)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.05
    assert robust_accuracy(net, [(x, y)], seed=5) == robust_accuracy(
        net, [(x, y)], PGD(steps=20, start="uniform"), seed=5
    )


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, r"eps: 0\.0 is not allowed; a finite number above 0"),
        ({"eps": -0.1}, "eps: -0.1"),
        ({"eps": float("nan")}, "eps: nan"),
        ({"step": 0.0}, "step: 0.0"),
        ({"steps": 0}, "steps: 0 is not allowed; a whole number of 1 or more"),
        ({"steps": 2.5}, "steps: 2.5"),
        ({"steps": True}, "steps: True"),
        ({"start": "normal"}, "start: 'normal' is not one of gaussian, uniform, None"),
        ({"norm": "l1"}, "norm: 'l1' is not one of linf, l2"),
        ({"bounds": (1, 0)}, r"bounds: \(1, 0\)"),
        ({"bounds": (0, 1, 2)}, "bounds"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**options)


def test_bad_inputs_and_objectives() -> None:
    attack, objective = PGD(0.1), cross_entropy_objective(network().eval(), Y)
    with pytest.raises(
        ValueError, match=r"inputs: they run from -1 to 2, outside of bounds=\(0\.0, 1\.0\); put the norm"
    ):
        attack.attack(objective, 3 * (X - X.min()) / (X.max() - X.min()) - 1)
    nan = X.clone()
    nan[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="inputs: they run from nan"):
        attack.attack(objective, nan)
    PGD(0.1, bounds=(-4, 4)).attack(objective, 3 * X - 1)
    with pytest.raises(TypeError, match=r"floating point numbers, got a tensor of torch\.int64"):
        attack.attack(objective, X.long())
    with pytest.raises(TypeError, match="got dict"):
        attack.attack(objective, {"x": X})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="objective: it must return a scalar tensor, got shape"):
        attack.attack(lambda x: x.sum(1), X)
    with pytest.raises(ValueError, match="objective: it must return a scalar tensor, got float"):
        attack.attack(lambda x: 1.0, X)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="does not depend on the input"):
        attack.attack(lambda x: x.detach().sum(), X)
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="does not depend on the input"):
        attack.attack(lambda x: weight.sum(), X)
    with pytest.raises(ValueError, match="data: it has no batches"):
        robust_accuracy(network(), [])
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(2, 4\) differ"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="reduction: 'mean'"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3), reduction="mean")  # type: ignore[arg-type]
