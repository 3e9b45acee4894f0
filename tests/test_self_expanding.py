from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pliant.core import persistence
from pliant.core.cost import count_parameters
from pliant.core.dynamic import Point
from pliant.core.training import fit
from pliant.elastic.self_expanding import (
    SECNN,
    SECNN_OPTIONS,
    Candidate,
    Rational,
    SelfExpanding,
    diag_score,
    exact_score,
    increase_bound,
    increase_exact,
    kfac_score,
    natural_expansion_score,
    penalised,
    proposals,
    scores,
    secnn,
    split_linear,
    surgery,
)
from pliant.elastic.self_expanding.secnn import _Block

torch.set_num_threads(1)
PATH = "pliant.elastic.self_expanding:SelfExpanding"
FAST = {"proposals": 4, "proposal_steps": 4}
SMALL = st.integers(2, 9)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 3))


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.PReLU(3), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    settle(model, torch.randn(64, 1, 8, 8))
    return model


class Residual(nn.Module):
    """Coupled channels of two producers, one of them also a reader, and a concatenation with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.side = nn.Conv2d(4, 3, 1)
        self.head = nn.Conv2d(7, 5, 1)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm(self.inner(x)))
        side = torch.tanh(self.side(x))
        return self.out(torch.relu(self.head(torch.cat([side, x], 1))).mean((2, 3)))


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settle(Residual(), torch.randn(64, 1, 8, 8))


def tiny_secnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settle(secnn(4, in_channels=1, classes=3, size=16), torch.randn(64, 1, 16, 16))


def settle(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Running statistics that are not 0 and 1."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval()


X = {"mlp": (96, 6), "cnn": (96, 1, 8, 8), "residual": (96, 1, 8, 8), "tiny_secnn": (96, 1, 16, 16)}
MAKE = {"mlp": mlp, "cnn": cnn, "residual": residual, "tiny_secnn": tiny_secnn}


def data(name: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(X[name], generator=generator), torch.randint(0, 3, (X[name][0],), generator=generator)


def grown(name: str, **options) -> SelfExpanding:
    extra = {k: v for k, v in SECNN_OPTIONS.items() if k in ("sites", "layers_behind")} if name == "tiny_secnn" else {}
    return SelfExpanding(MAKE[name](), data(name)[0][:2], **(FAST | extra | options))


def real_score(net: SelfExpanding, batch) -> float:
    damping = net.damping if net.score == "kfac" else net.eps
    return natural_expansion_score(net.model, batch, fisher=net.score, metric=net.metric, damping=damping)


# -- 1: start size ----------------------------------------------------------------------------------------------------


def test_1_the_start_model_has_the_papers_sizes():
    net = SelfExpanding(secnn(16), torch.randn(2, 3, 32, 32), **SECNN_OPTIONS)
    assert count_parameters(net.model) == 9024
    x = torch.randn(16, 3, 32, 32)
    for expected, where in ((11360, "blocks.0.act"), (13696, "blocks.1.act")):
        net.deepen(where, data=(x, torch.randint(0, 10, (16,))))
        assert count_parameters(net.model) == expected
    assert net.model.blocks[0].act[1].layer.bias is None
    assert secnn()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert secnn(8, in_channels=1, size=28)(torch.randn(2, 1, 28, 28)).shape == (2, 10)


# -- 2: preservation --------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x, y) -> dict[str, torch.Tensor]:
    model.eval()
    names = [n for n, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())), strict=True))


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("init", ["random", "optimized", "noise", "mala"])
def test_2_units_keep_outputs_and_old_gradients(name, init):
    net, (x, y) = grown(name), data(name)
    for site in [s.name for s in net.growing()]:
        before, old = net.model.eval()(x), gradients(net.model, x, y)
        shapes = {n: p.shape for n, p in net.model.named_parameters()}
        net.widen(site, 2, init=init, data=(x, y))
        torch.testing.assert_close(net.model(x), before, rtol=1e-5, atol=1e-6)
        new = gradients(net.model, x, y)
        for parameter, shape in shapes.items():
            if new[parameter].shape == shape:  # grown ones are compared by their surviving entries below
                torch.testing.assert_close(new[parameter], old[parameter], rtol=1e-4, atol=1e-5)
        edits = net.ops[-1]["edits"]
        for where, sides in edits.items():
            kept = old[f"{where}.weight"]
            now = new[f"{where}.weight"]
            for dim, side in enumerate(("out", "in")):
                if side in sides and now.ndim > dim:
                    now = now.index_select(dim, surgery.old_positions(kept.shape[dim], [tuple(g) for g in sides[side]]))
            torch.testing.assert_close(now, kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("activation", ["prelu", "leaky"])
def test_2_layers_keep_outputs_and_old_gradients(name, activation):
    net, (x, y) = grown(name, activation=activation), data(name)
    places = net._spots_behind() or list(dict.fromkeys(s.module for site in net.growing() for s in site.consumers))
    for where in [*places, *places[:1]]:  # the first one twice
        before, old = net.model.eval()(x), [g for _, g in sorted(gradients(net.model, x, y).items())]
        ids = [id(p) for _, p in sorted(net.model.named_parameters())]
        if where in net._wrappers and not net._spots_behind():
            where = f"{where}.1"
        net.deepen(where, data=(x, y))
        torch.testing.assert_close(net.model(x), before, rtol=1e-5, atol=2e-6)
        now = gradients(net.model, x, y)
        by_id = {id(p): now[n] for n, p in net.model.named_parameters()}
        for i, kept in zip(ids, old, strict=True):
            torch.testing.assert_close(by_id[i], kept, rtol=1e-4, atol=1e-5)


def test_2_neurons_with_zero_outgoing_weights_are_exact_and_live():
    net, (x, y) = grown("mlp"), data("mlp")
    before = net.model(x)
    net.widen("0", 3, data=(x, y))
    assert torch.equal(net.model[2].weight[:, 4:], torch.zeros(3, 3))
    assert (net.model[0].weight[4:] != 0).all()
    torch.testing.assert_close(net.model(x), before, rtol=0, atol=1e-6)
    pre = net.model[0](x)[:, 4:]
    assert (pre.var(0, unbiased=False) > 0.5).all()  # units are active, not half dead
    assert gradients(net.model, x, y)["2.weight"][:, 4:].abs().min() > 0


def test_2_the_split_of_senn():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3), torch.randn(20, 5)
    before = layer(x)
    first = split_linear(layer, torch.randn(5, 5), torch.randn(5))
    torch.testing.assert_close(layer(first(x)), before, rtol=1e-4, atol=1e-5)
    singular = torch.zeros(5, 5)
    singular[0, 0] = 1.0
    first = split_linear(layer, singular)
    assert torch.linalg.svdvals(first.weight).min() >= 0.9e-3 * 0.2
    rational = Rational(5)
    torch.testing.assert_close(rational(x), x)
    with torch.no_grad():
        rational.v.fill_(0.5), rational.c.fill_(-0.3), rational.l.fill_(0.7)
    expected = (0.7 * x + (2 * 0.5 * x - 0.3) / (1 + x**2)) / math.sqrt(0.5**2 + 0.3**2 + 0.7**2 + 1e-8)
    torch.testing.assert_close(rational(x), expected)
    net, batch = grown("mlp", identity="split", actions=("layers",), tau=0.0, capacity={"parameters": 400}), data("mlp")
    before = net.model(batch[0])
    assert net.maybe_expand(batch).kind == "layer"
    torch.testing.assert_close(net.model(batch[0]), before, rtol=1e-4, atol=1e-5)
    plain = net.extract(net.points()[-1])
    assert not any(type(m).__module__.startswith("pliant") for m in plain.modules())
    assert torch.equal(plain(batch[0]), net.eval()(batch[0]))


def test_2_layer_norm_by_rows_at_the_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.SiLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2), model[1].bias.normal_()
    x, y = data("mlp")
    before = model(x)
    net = SelfExpanding(model, x[:2])
    assert net._blocks() == []  # never proposed
    for count in (1, 4):
        net.widen("0", count, data=(x, y))
        torch.testing.assert_close(net.model(x), before, rtol=1e-5, atol=2e-6)
    assert model[1].normalized_shape == (10,)
    assert gradients(model, x, y)["3.weight"][:, 5:].abs().min() > 0


# -- 3: the identity convolution --------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.sampled_from([1, 3, 5]), st.integers(5, 9))
@settings(max_examples=20, deadline=None)
def test_3_the_identity_convolution_is_bit_exact(channels, kernel, size):
    spec = {"conv": True, "features": channels, "kernel": kernel, "norm": False, "bias": False, "activation": "prelu"}
    x = torch.randn(2, channels, size, size)
    unit = surgery.make_unit(spec)
    assert torch.equal(unit.layer(x), x)
    assert torch.equal(unit(x), x)
    if kernel == 3:  # the box filter of nine taps, which the published code calls identity
        box = torch.eye(channels)[:, :, None, None].expand(channels, channels, 3, 3)
        assert not torch.allclose(F.conv2d(x, box, padding=1), x)


# -- 4, 5: the exact score --------------------------------------------------------------------------------------------


@given(SMALL, SMALL, st.floats(1e-3, 1.0), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_4_the_gram_form_is_the_parameter_form(n, p, eps, seed):
    g = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, fisher = g.mean(0), g.T @ g / n
    direct = mean @ torch.linalg.solve(fisher + eps * torch.eye(p, dtype=torch.float64), mean)
    gram = g @ g.T
    ones = torch.ones(n, dtype=torch.float64)
    dual = ones @ gram @ torch.linalg.solve(gram + n * eps * torch.eye(n, dtype=torch.float64), ones) / n
    assert abs(float(direct - dual)) < 1e-10
    assert abs(float(exact_score(g, damping=eps) - direct)) < 1e-10
    wide = torch.cat([g, torch.zeros(n, 20, dtype=torch.float64)], 1)  # forces the other form
    assert abs(float(exact_score(wide, damping=eps) - direct)) < 1e-10


@given(st.integers(3, 9), SMALL, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_5_projection_bounds_and_monotonicity(n, p, seed):
    generator = torch.Generator().manual_seed(seed)
    j = torch.randn(n, p, generator=generator, dtype=torch.float64)
    g_y = torch.randn(n, generator=generator, dtype=torch.float64)
    pinv = torch.linalg.pinv(j)
    projected = (j @ pinv @ g_y).square().sum() / n
    f = j.T @ j / n
    g = j.T @ g_y / n
    assert float(exact_score(j, g_y)) == pytest.approx(float(projected), abs=1e-8)
    assert float(g @ torch.linalg.pinv(f) @ g) == pytest.approx(float(projected), abs=1e-7)
    eta = float(exact_score(j))
    assert -1e-10 <= eta <= 1 + 1e-10
    assert eta == pytest.approx(1.0, abs=1e-8) if p >= n else eta < 1
    more = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    assert float(exact_score(torch.cat([j, more], 1))) >= eta - 1e-9
    assert float(exact_score(torch.cat([j, more], 1), damping=0.1)) >= float(exact_score(j, damping=0.1)) - 1e-9


def test_5_of_a_network():
    model, (x, y) = mlp().double(), data("mlp")
    x = x[:8].double()
    assert natural_expansion_score(model, (x, y[:8]), fisher="exact", damping=0.0) == pytest.approx(1.0, abs=1e-6)
    x, y = torch.randn(90, 6).double(), torch.randint(0, 3, (90,))
    eta = natural_expansion_score(model, (x, y), fisher="exact", damping=0.0)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    each = vmap(grad(lambda p, a, b: F.cross_entropy(functional_call(model, p, (a[None],)), b[None])), (None, 0, 0))
    g = torch.cat([v.flatten(1) for v in each(parameters, x, y).values()], 1)
    assert g.shape[1] < 90
    assert eta == pytest.approx(float(exact_score(g)), rel=1e-9)
    assert 0 < eta < 1
    output = natural_expansion_score(model, (x, y), fisher="exact", metric="output", damping=0.0)
    g_y = torch.softmax(model(x), 1) - F.one_hot(y, 3)
    assert 0 < output <= float(g_y.detach().square().sum(1).mean()) + 1e-9
    widened = SelfExpanding(model, x[:2], **FAST)
    widened.widen("0", 2, data=(x, y))
    assert natural_expansion_score(widened.model, (x, y), fisher="exact", damping=0.0) >= eta - 1e-9


# -- 6, 7: what the score means ---------------------------------------------------------------------------------------


@given(st.integers(6, 20), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_6_half_the_score_is_the_gain_of_a_natural_step(n, p, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, p, generator=generator, dtype=torch.float64)
    t, theta = (torch.randn(k, generator=generator, dtype=torch.float64) for k in (n, p))
    f, residual = a.T @ a / n, a @ theta - t
    step = theta - torch.linalg.solve(f, a.T @ residual / n)
    loss = [0.5 * (a @ v - t).square().mean() for v in (theta, step)]
    assert float(loss[0] - loss[1]) == pytest.approx(float(exact_score(a, residual)) / 2, rel=1e-6, abs=1e-10)
    model = nn.Linear(p, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(theta[None])
    score = natural_expansion_score(
        model, (a, t[:, None]), lambda out, y: 0.5 * F.mse_loss(out, y), fisher="exact", metric="output", damping=0.0
    )
    assert score == pytest.approx(2 * float(loss[0] - loss[1]), rel=1e-6, abs=1e-9)
    if p > 1:
        kfac = natural_expansion_score(
            model, (a, t[:, None]), lambda out, y: 0.5 * F.mse_loss(out, y), metric="output", damping=0.0
        )
        assert kfac == pytest.approx(score, rel=1e-6)  # one output: K-FAC is exact


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_7_reparametrisation(seed):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(5, 5, generator=generator, dtype=torch.float64) + 3 * torch.eye(5, dtype=torch.float64)
    assert float(exact_score(g @ b)) == pytest.approx(float(exact_score(g)), rel=1e-6)
    assert abs(float(diag_score(g @ b, eps=0.0) - diag_score(g, eps=0.0))) > 1e-6


# -- 8: K-FAC ---------------------------------------------------------------------------------------------------------


def moments(a, d):
    n = len(a)
    return a.T @ a / n, d.T @ d / n, d.T @ a / n


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_8_the_increase_is_the_schur_form_and_the_bound_is_below(present, proposed, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    a_c, a_p, d = (torch.randn(60, k, generator=generator, dtype=torch.float64) for k in (present, proposed, outputs))
    a_c = torch.cat([a_c, torch.ones(60, 1, dtype=torch.float64)], 1)
    a_p = a_p + a_c[:, :1]  # correlated
    eta = [float(kfac_score(*moments(a, d))) for a in (a_c, torch.cat([a_c, a_p], 1))]
    exact, bound = float(increase_exact(a_c, d, a_p)), float(increase_bound(a_c, d, a_p))
    assert exact == pytest.approx(eta[1] - eta[0], abs=1e-8)
    assert bound <= exact + 1e-10
    assert bound < exact - 1e-12
    free = a_p - a_c @ torch.linalg.lstsq(a_c, a_p).solution  # E[a_p a_c'] = 0
    assert float(increase_bound(a_c, d, free)) == pytest.approx(float(increase_exact(a_c, d, free)), rel=1e-8)
    assert float(increase_bound(a_c, d, a_c[:, :1].clone())) == pytest.approx(0.0, abs=1e-12)  # a duplicate


def test_8_factors_of_a_convolution_by_hand():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(27, 3).double())
    x, y = torch.randn(40, 2, 6, 6).double(), torch.randint(0, 3, (40,))
    seen = scores.observe(model, x, y, F.cross_entropy)
    s = layer(x)
    s.retain_grad()
    F.cross_entropy(model[2](s.flatten(1)), y, reduction="sum").backward()
    a_sum, s_sum, w_sum = 0.0, 0.0, 0.0
    padded = F.pad(x, (1, 1, 1, 1))
    for i in range(3):
        for k in range(3):
            patch = torch.cat(
                [padded[:, :, 2 * i : 2 * i + 3, 2 * k : 2 * k + 3].flatten(1), torch.ones(40, 1).double()], 1
            )
            d = s.grad[:, :, i, k]
            a_sum, s_sum, w_sum = a_sum + patch.T @ patch / 40, s_sum + d.T @ d / 40, w_sum + d.T @ patch / 40
    found = scores.layer_moments(seen, "0")
    torch.testing.assert_close(found.inputs, a_sum)
    torch.testing.assert_close(found.gradients, s_sum)
    torch.testing.assert_close(found.cross, w_sum)
    torch.testing.assert_close(found.cross[:, :-1].reshape_as(layer.weight), layer.weight.grad / 40)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"stride": 2, "padding": (2, 1), "dilation": (3, 1)}, {}])
def test_8_patches_are_what_the_convolution_reads(options):
    layer = nn.Conv2d(4, 5, (2, 3), **options).double()
    x = torch.randn(3, 4, 9, 8).double()
    geometry = scores.geometry_of(layer)
    weight = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
    torch.testing.assert_close(geometry.inputs(x) @ weight.T, geometry.rows(layer(x)))
    torch.testing.assert_close(geometry.apply(x, layer.weight, layer.bias), layer(x))
    pairs = proposals._proposed_patches(geometry, x, 2)  # two sets of two channels, positions of all samples in a row
    parts = [w.flatten(1) @ p for w, p in zip(layer.weight.split(2, 1), pairs, strict=True)]
    torch.testing.assert_close(sum(parts).T, geometry.rows(layer(x) - layer.bias[:, None, None]).flatten(0, 1))


def test_8_the_metric_of_the_outputs_is_their_sum():
    """F = J'J / N, J over samples and outputs: S is the identity at the output and W2'W2 before a linear layer."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double(), data("mlp")
    seen = scores.observe(model, x.double(), y, F.cross_entropy, metric="output")
    torch.testing.assert_close(scores.layer_moments(seen, "1").gradients, torch.eye(3).double())
    second = model[1].weight.detach()
    torch.testing.assert_close(scores.layer_moments(seen, "0").gradients, second.T @ second)
    ones = torch.cat([x.double(), torch.ones(96, 1).double()], 1)
    rows, cotangent = scores.sample_rows(model[:1], ones[:, :6], F.cross_entropy, y, "output")
    fisher = torch.einsum("nop,noq->pq", rows.unflatten(0, (96, 4)), rows.unflatten(0, (96, 4))) / 96
    expected = torch.kron(torch.eye(4).double(), ones[:, :6].T @ ones[:, :6] / 96)  # of the weight, output by output
    torch.testing.assert_close(fisher[:24, :24], expected)
    torch.testing.assert_close(cotangent.reshape(96, 4).sum(1), torch.zeros(96).double())  # softmax - one-hot


def test_8_damping_is_relative():
    torch.manual_seed(0)
    matrix = torch.randn(9, 4).double()
    matrix = matrix.T @ matrix
    expected = matrix + 0.1 * matrix.trace() / 4 * torch.eye(4).double()
    torch.testing.assert_close(scores.damped(matrix, 0.1, "S"), expected)
    cross, white = torch.randn(4, 3).double(), torch.linalg.cholesky(torch.eye(3).double() + 1)
    value = (torch.linalg.solve(expected, cross @ white) * (cross @ white)).sum()
    for scale in (1.0, 1e3, 1e-3):  # a_p in other units
        found = proposals._white(scale * cross[None], scale**2 * matrix[None], white, 0.1)
        torch.testing.assert_close(found, value[None])
    model, batch = mlp(), data("mlp")
    plain = natural_expansion_score(model, batch, F.cross_entropy)
    tenfold = natural_expansion_score(model, batch, lambda out, y: 10 * F.cross_entropy(out, y))
    assert tenfold == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual"])
@pytest.mark.parametrize("metric", ["empirical", "output"])
def test_8_candidates_increase_the_real_score_by_the_schur_form(name, metric):
    """Scores from the cache against the score of the grown network."""
    net, batch = grown(name, increase="schur", metric=metric, actions=("units",)), data(name)
    eta, seen, candidates = net.candidates(batch)
    assert eta == pytest.approx(real_score(net, batch), rel=1e-9)
    for candidate in candidates:
        other = grown(name, increase="schur", metric=metric, actions=("units",))
        consumers = [s.module for site in other.growing() if site.name == candidate.where for s in site.consumers]
        other._make(candidate, seen, None)
        after = scores.observe(other.model, *batch, F.cross_entropy, metric=metric)
        change = 0.0
        for n in consumers:
            old, new = scores.layer_moments(seen, n), scores.layer_moments(after, n)
            o = len(old.gradients)  # a reader may be a maker too: its new outputs have no gradient yet
            cut = scores.Moments(new.inputs, new.gradients[:o, :o], new.cross[:o])
            change += cut.score(net.damping) - old.score(net.damping)
        assert change == pytest.approx(candidate.delta, rel=0.05, abs=1e-3)  # both are slightly damped
        bound = grown(name, metric=metric, actions=("units",)).candidates(batch)[2]
        assert next(b.delta for b in bound if b.where == candidate.where) <= candidate.delta * 1.01


def test_8_inputs_that_are_constant_or_repeated_are_no_trouble():
    x, y = data("mlp")
    x = torch.cat([x[:, :2], torch.full((96, 2), 3.0), 30 * x[:, :1], 30 * x[:, :1]], 1)
    net = SelfExpanding(mlp(), x[:2], **FAST)
    assert all(math.isfinite(c.delta) for c in net.candidates((x, y))[2])


def test_8_optimised_proposals_beat_drawn_ones():
    batch = data("mlp")
    found = {}
    for init in ("optimized", "mala"):  # without steps, the drawn ones: the best, and SENN's weighted mean
        for steps in (0, 30):
            net = grown("mlp", init=init, proposals=16, proposal_steps=steps, actions=("units",), temperature=0.02)
            found[init, steps] = {c.where: c.delta for c in net.candidates(batch)[2]}
    for where in ("0", "2"):
        assert found["optimized", 30][where] > 1.05 * found["optimized", 0][where]
        assert found["mala", 30][where] > found["mala", 0][where]
        assert found["mala", 0][where] < found["optimized", 0][where]


def test_8_proposals_are_centred_and_of_unit_variance():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3, dilation=2), 2 * torch.randn(40, 2, 8, 8) + 5
    geometry = scores.geometry_of(layer)
    drawn = torch.randn(1, 4, 3, 2, 3, 3), torch.randn(1, 4, 3)
    ((w, b),) = proposals._weights({"": drawn}, {"": proposals._spread(geometry, x)}).values()
    pre = geometry.apply(x, w.flatten(0, 2), b.flatten())
    torch.testing.assert_close(pre.mean((0, 2, 3)), drawn[1].flatten(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pre.var((0, 2, 3), correction=0), torch.ones(12), rtol=1e-3, atol=1e-3)


def test_8_mala_samples_its_target():
    """Many chains on exp(Delta' / scale - |theta|^2 / 2) with a quadratic Delta': a Gaussian, so it is known."""
    chains, scale = 20_000, 0.5
    slope, curvature = torch.tensor([1.5, -1.0, 0.0]).double(), torch.tensor([1.0, 4.0, 0.0]).double()

    def flat(rows):
        w, b = rows["layer"]
        return torch.cat([w[0, :, 0], b[0]], 1).double()  # (chains, 3)

    def objective(rows):
        return (slope * flat(rows) - curvature * flat(rows).square() / 2).sum(1)

    start = {"layer": (torch.full((1, chains, 1, 2), 2.0), torch.full((1, chains, 1), -2.0))}
    generator = torch.Generator().manual_seed(0)
    found = flat(proposals._mala(start, objective, scale, 60, 0.05, generator))
    variance = 1 / (1 + curvature / scale)
    mean = variance * slope / scale
    assert ((found.mean(0) - mean).abs() < 4 * (variance / chains).sqrt()).all()
    assert ((found.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / chains)).all()
    assert (torch.corrcoef(found.T) - torch.eye(3)).abs().max() < 4 / math.sqrt(chains)


def test_8_senn_decides_by_the_softmax_weighted_mean_of_its_proposals():
    batch = data("mlp")

    def delta(temperature):  # of two proposals, as they are drawn
        net = grown("mlp", init="mala", proposals=2, proposal_steps=0, actions=("units",), temperature=temperature)
        _, seen, candidates = net.candidates(batch)
        return candidates[0].delta, scores.layer_moments(seen, "2").score(net.damping)

    (largest, eta), (mean, _) = delta(1e-6), delta(1e9)
    values = torch.tensor([largest, 2 * mean - largest]).double()
    assert values[0] > 1.05 * values[1]
    temperature = float(values[0] - values[1]) / eta
    expected = (torch.softmax(values / (temperature * eta), 0) * values).sum()
    assert delta(temperature)[0] == pytest.approx(float(expected), rel=1e-6)
    assert float(expected) > 1.01 * mean


def test_8_proposals_have_a_scale_that_can_be_trained():
    net, (x, y) = grown("mlp", proposals=16, proposal_steps=60), data("mlp")
    net.widen("0", 2, init="optimized", data=(x, y))
    pre = net.model[0](x)[:, 4:]
    torch.testing.assert_close(pre.var(0, unbiased=False), torch.ones(2), rtol=1e-3, atol=1e-3)


# -- 9, 10, 11: the diagonal score ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize(
    ("score", "metric"), [("diag", "empirical"), ("diag", "output"), ("exact", "empirical"), ("exact", "output")]
)
def test_9_cached_candidates_are_the_grown_networks_and_never_lower(name, score, metric):
    options = {"score": score, "metric": metric, "init": "random", "eps": 1e-3, "activation": "prelu"}
    rule = "secnn" if name == "tiny_secnn" else "senn"
    x, y = data(name)
    batch = (x[:24], y[:24])
    net = grown(name, rule=rule, **options)
    if name == "tiny_secnn":
        net.deepen("blocks.0.act", data=batch)  # a block of two convolutions, widened together
        net.widen("blocks.0.conv", 1, data=batch)
        assert net.ops[-1]["edits"]["blocks.0.act.1.layer"].keys() == {"out", "in"}
    eta, seen, candidates = net.candidates(batch)
    assert eta == pytest.approx(real_score(net, batch), rel=1e-5)
    assert {c.kind for c in candidates} == {"units", "layer"}
    for candidate in candidates:
        assert candidate.delta >= -1e-9 * eta
        other = copy.deepcopy(net)
        other._make(candidate, seen, None)
        assert real_score(other, batch) == pytest.approx(eta + candidate.delta, rel=1e-3)
        assert count_parameters(other.model) - count_parameters(net.model) == candidate.added


def test_9_equal_when_the_mean_gradients_of_new_parameters_vanish():
    g = torch.randn(10, 4, dtype=torch.float64)
    even = torch.randn(5, 3, dtype=torch.float64)
    more = torch.cat([even, -even])
    assert float(diag_score(torch.cat([g, more], 1))) == pytest.approx(float(diag_score(g)), rel=1e-12)
    more[0] += 1
    assert float(diag_score(torch.cat([g, more], 1))) > float(diag_score(g)) + 1e-6
    assert float(diag_score(torch.cat([g, more], 1))) / 7 < float(diag_score(g)) / 4  # the mean per parameter falls


@given(st.floats(0, 100), st.integers(0, 3000), st.floats(0, 1e-3))
def test_10_the_penalty_multiplies(eta, added, penalty):
    assert penalised(eta, added, penalty) == pytest.approx(eta * math.exp(-penalty * added**2))
    assert penalised(eta, 0, penalty) == eta
    assert penalised(eta, added, 0.0) == eta


def test_10_in_the_decision():
    assert penalised(1.0, 2336, 1e-7) == pytest.approx(0.58, abs=0.01)  # the specification's figure at 16 channels
    options = {"rule": "secnn", "score": "diag", "init": "random", "tau": 0.0, "capacity": {"parameters": 2500}}
    free = grown("tiny_secnn", **options)
    eta, _, candidates = free.candidates(data("tiny_secnn"))
    best, _, _ = free._decide(eta, candidates, 1.0)
    assert best.delta == max(c.delta for c in candidates)
    strict = grown("tiny_secnn", **options, penalty=1e-3)
    best, _, _ = strict._decide(eta, candidates, 1.0)
    assert best.added == min(c.added for c in candidates)


def test_11_the_score_needs_a_mean_gradient():
    v = torch.tensor([[0.3, -2.0, 0.01]], dtype=torch.float64)
    g = torch.cat([v, -v] * 8)
    assert float(diag_score(g)) == 0
    assert float(exact_score(g, damping=1e-3)) == pytest.approx(0, abs=1e-15)
    published = (g**2 / ((g**2).sum(0) + 1e-5)).sum()
    assert float(published) > 2.9
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    y = model(x).detach() + torch.tensor([[0.5], [-0.5]])
    for fisher in ("diag", "exact", "kfac"):
        assert natural_expansion_score(model, (x, y), F.mse_loss, fisher=fisher) == pytest.approx(0, abs=1e-10)


# -- 12: decisions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["senn", "secnn"])
def test_12_tau(rule):
    never = grown("mlp", rule=rule, tau=math.inf, score="diag", cooldown=0)
    for _ in range(3):
        assert never.maybe_expand(data("mlp")) is None
    assert never.points() == [Point(stage=0)]
    assert [h["reason"] for h in never.history] == ["below tau"] * 3
    assert all(math.isfinite(h["eta"]) and h["best"] >= h["eta"] and h["ratio"] >= 1 for h in never.history)
    limit = count_parameters(never.model) + 60
    always = grown(
        "mlp", rule=rule, tau=0.0, alpha=-1.0, score="diag", capacity={"parameters": limit}, per_check=None, units=1,
        cooldown=0,
    )  # fmt: skip
    before = count_parameters(always.model)
    assert always.maybe_expand(data("mlp")) is not None
    assert limit - 12 < count_parameters(always.model) <= limit
    assert always.history[-1]["reason"] == "nothing within the capacity"
    sizes = [count_parameters(always.extract(p)) for p in always.points()]
    assert sizes[0] == before
    assert all(a < b for a, b in pairwise(sizes))


def test_12_cooldown_every_and_capacities():
    net = grown("mlp", tau=0.0, alpha=-1.0, cooldown=2, init="random", actions=("units",), capacity={"units": 8})
    made = [net.maybe_expand(data("mlp")) is not None for _ in range(7)]
    assert made == [True, False, False, True, False, False, True]
    net = grown("mlp", tau=0.0, alpha=-1.0, every=3, init="random", capacity={"units": 8})
    assert [net.maybe_expand(data("mlp")) is not None for _ in range(6)] == [False, False, True] * 2
    net = grown("mlp", tau=0.0, alpha=-1.0, init="random", actions=("units",), capacity={"units": 6}, per_check=None)
    net.maybe_expand(data("mlp"))
    assert max(s.channels for s in net.growing()) <= 6
    assert net.model[0].out_features == 6
    net = grown("mlp", tau=0.0, alpha=-1.0, actions=("layers",), capacity={"layers": 1}, per_check=5)
    net.maybe_expand(data("mlp"))
    assert len(net.ops) >= 2
    flops = net._flops(mlp())
    net = grown("mlp", tau=0.0, alpha=-1.0, init="random", capacity={"flops": flops + 40}, per_check=None)
    net.maybe_expand(data("mlp"))
    assert flops < net._flops(net.model) <= flops + 40
    silent = grown("mlp", tau=1.0001, alpha=1e9)
    assert silent.maybe_expand(data("mlp")) is None
    assert silent.history[-1]["reason"] == "below alpha"


def test_12_senn_decides_by_layer_and_divides_layers_by_their_cost():
    net = grown("mlp", layer_cost=4.0)
    op = {"kind": "units"}
    small = Candidate("units", "a", 0.2, 0.5, 10, op)
    large = Candidate("units", "b", 0.3, 3.0, 10, op)
    layer = Candidate("layer", "c", 1.0, 1.0, 10, op, cost=4.0)
    assert small.ratio == pytest.approx(1.4)
    assert layer.ratio == pytest.approx(1.25)
    assert net._decide(4.0, [small, large, layer], 1.0) == (small, True, "accepted")
    assert net._decide(4.0, [large, layer], 1.0) == (layer, True, "accepted")
    assert net._decide(4.0, [large], 1.0) == (large, False, "below tau")
    rule = grown("mlp", rule="secnn", score="diag")
    assert rule._decide(4.0, [small, large], 1.0)[:2] == (large, False)
    big = Candidate("layer", "d", 4.5, 4.0, 10, op)
    assert rule._decide(4.0, [large, big], 1.0) == (big, True, "accepted")


def test_12_senn_compares_with_the_layer_and_secnn_with_the_network():
    for name in ("mlp", "residual"):
        eta, seen, candidates = grown(name, init="random").candidates(data(name))
        layers = {n: scores.layer_moments(seen, n).score(0.1) for n in seen.inputs}
        assert eta == pytest.approx(sum(layers.values()))
        readers = {s.name: [c.module for c in s.consumers] for s in grown(name).growing()}
        assert {c.kind for c in candidates} == {"units", "layer"}
        for c in candidates:
            own = sum(layers[n] for n in (readers[c.where] if c.kind == "units" else [c.where]))
            assert c.reference == pytest.approx(own)
            assert c.ratio == pytest.approx((own + c.delta / (20 if c.kind == "layer" else 1)) / own)
    eta, _, candidates = grown("mlp", rule="secnn", init="random").candidates(data("mlp"))
    assert all(c.reference == eta for c in candidates)


def test_12_alpha_is_relative_to_the_bound_of_the_score():
    """eta <= E|g_y|^2 in the metric of the outputs: alpha is a share of that."""
    x, y = data("mlp")
    for factor in (1.0, 20.0):
        options = {"metric": "output", "tau": 1.0, "actions": ("units",), "per_check": 1, "init": "random"}
        options["criterion"] = lambda out, y, factor=factor: factor * F.cross_entropy(out, y)
        net = grown("mlp", **options, alpha=-1.0)
        bound = factor**2 * (net(x).softmax(1) - F.one_hot(y, 3)).detach().square().sum(1).mean()
        net.maybe_expand((x, y))
        share = net.history[-1]["delta"] / float(bound)
        assert 0 < share < 1
        for alpha, reason in ((1.001 * share, "below alpha"), (0.999 * share, "accepted")):
            net = grown("mlp", **options, alpha=alpha)
            net.maybe_expand((x, y))
            assert net.history[-1]["reason"] == reason


def test_12_secnn_does_nothing_where_a_layer_and_units_tie():
    net = grown("mlp", rule="secnn", score="diag", tau=1.5)
    layer, units = (Candidate(kind, "a", 1.0, 1.0, 10, {"kind": kind}) for kind in ("layer", "units"))
    for pair in ([layer, units], [units, layer]):
        assert net._decide(1.0, pair, 1.0)[1:] == (False, "a layer and units score alike")
    twin = Candidate("units", "b", 1.0, 1.0, 10, {"kind": "units"})
    assert net._decide(1.0, [units, twin], 1.0) == (units, True, "accepted")  # two of a kind are no tie


@pytest.mark.parametrize("score", ["kfac", "diag", "exact"])
@pytest.mark.parametrize("name", ["cnn", "tiny_secnn"])
def test_12_scoring_changes_nothing(name, score):
    net, batch = grown(name, score=score), data(name)
    net.train()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    state = {n: t.clone() for n, t in net.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    modes = [m.training for m in net.modules()]
    random_state = torch.get_rng_state()
    net.candidates(batch)
    natural_expansion_score(net.model, batch, fisher=score)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(state[n], t) for n, t in net.state_dict().items())
    assert all(torch.equal(grads[n], p.grad) for n, p in net.named_parameters() if n in grads)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


# -- 13: optimisers ---------------------------------------------------------------------------------------------------

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def steps(net, optimizer, batch, count):
    net.train()
    for _ in range(count):
        optimizer.zero_grad()
        loss = net.loss(batch)
        loss.backward()
        optimizer.step()
    return loss  # held, so that its graph outlives the growth


@pytest.mark.parametrize("kind", list(OPTIMISERS))
@pytest.mark.parametrize("name", ["mlp", "cnn", "residual"])
@pytest.mark.parametrize("given", [True, False])
def test_13_the_optimiser_state_survives(kind, name, given):
    net, batch = grown(name), data(name)
    optimizer = OPTIMISERS[kind](net.parameters())
    held = steps(net, optimizer, batch, 3)
    parameters = dict(net.model.named_parameters())
    before = {
        n: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
        for n, p in parameters.items()
    }
    where = net.growing()[0].name
    if not given:
        net.attach_optimizer(optimizer)
    net.widen(where, 2, data=batch, optimizer=optimizer if given else None)
    edits = net.ops[-1]["edits"]
    for n, p in parameters.items():
        path, _, leaf = n.rpartition(".")
        tensors = {}
        if path in edits:
            gaps = {s: [tuple(g) for g in found] for s, found in edits[path].items()}
            tensors = {t: by_dim for t, by_dim, _ in surgery._tensors_of(net.model.get_submodule(path), gaps)}
        state = optimizer.state[p]
        assert state.keys() == before[n].keys()
        for key, old in before[n].items():
            new = state[key]
            if not isinstance(old, torch.Tensor) or not old.ndim:
                assert new == old  # the step count
                continue
            assert new.shape == p.shape
            mask = torch.ones(new.shape, dtype=torch.bool)
            kept = new
            for dim, gaps in tensors.get(leaf, {}).items():
                positions = surgery.old_positions(old.shape[dim], gaps)
                kept = kept.index_select(dim, positions)
                inside = torch.zeros(new.shape[dim], dtype=torch.bool)
                inside[positions] = True
                mask &= inside.reshape([-1 if d == dim else 1 for d in range(new.ndim)])
            assert torch.equal(kept, old)
            assert (new[~mask] == 0).all()
    moved = net.model.get_submodule(where).weight.detach().clone()
    steps(net, optimizer, batch, 2)
    after = net.model.get_submodule(where).weight
    assert after.shape == moved.shape
    assert ((after - moved)[-2:].abs().amax() > 0).all()  # new rows train
    assert held is not None


@pytest.mark.parametrize("given", [True, False])
def test_13_parameters_of_new_layers_join_the_group_of_their_neighbour(given):
    net, batch = grown("mlp"), data("mlp")
    optimizer = torch.optim.Adam(
        [
            {"params": net.model[0].parameters(), "lr": 0.1},
            {"params": [*net.model[2].parameters(), *net.model[4].parameters()]},
        ]
    )
    if not given:
        net.attach_optimizer(optimizer)
    net.deepen("4", data=batch, optimizer=optimizer if given else None)
    new = list(net.model[4][0].parameters())
    assert all(any(p is q for q in optimizer.param_groups[1]["params"]) for p in new)
    before = [p.clone() for p in new]
    steps(net, optimizer, batch, 2)
    assert all(not torch.equal(a, b) for a, b in zip(before, new, strict=True))


def test_13_an_optimiser_that_nobody_named_is_not_patched():
    net, batch = grown("mlp"), data("mlp")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    steps(net, optimizer, batch, 1)
    net.deepen("4", data=batch)
    net.widen("0", 2, data=batch)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert not any(id(p) in held for p in net.model[4][0].parameters())
    assert optimizer.state[net.model[0].weight]["momentum_buffer"].shape == (4, 6)
    assert net.model[0].weight.shape == (6, 6)
    fresh = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)  # and a new one works
    steps(net, fresh, batch, 2)


def test_13_the_one_given_goes_before_the_one_attached():
    net, batch = grown("mlp"), data("mlp")
    attached, given = (torch.optim.Adam(net.parameters()) for _ in range(2))
    net.attach_optimizer(attached)
    steps(net, attached, batch, 1)
    steps(net, given, batch, 1)
    net.widen("0", 2, data=batch, optimizer=given)
    assert given.state[net.model[0].weight]["exp_avg"].shape == (6, 6)
    assert attached.state[net.model[0].weight]["exp_avg"].shape == (4, 6)
    other = grown("mlp", tau=0.0, alpha=-1.0, actions=("units",))
    wrapped = type("AcceleratedOptimizer", (), {})()
    wrapped.optimizer = torch.optim.Adam(other.parameters())
    steps(other, wrapped.optimizer, batch, 1)
    other.attach_optimizer(wrapped)
    where = other.maybe_expand(batch).where
    weight = other.model.get_submodule(where).weight
    assert wrapped.optimizer.state[weight]["exp_avg"].shape == weight.shape


def test_13_the_attached_optimiser_is_not_kept_alive_nor_copied():
    net, batch = grown("mlp"), data("mlp")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.attach_optimizer(optimizer)
    steps(net, optimizer, batch, 1)
    assert net._known_optimizer(None) is optimizer
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin._known_optimizer(None) is None
        twin.deepen("4", data=batch)
        assert torch.equal(twin.model(batch[0]), net.model(batch[0]))
    assert net._known_optimizer(None) is optimizer  # which copying did not change
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(net.parameters()))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert net._known_optimizer(None) is None
    net.widen("0", data=batch)


def test_13_nothing_global_is_registered():
    before = [len(hooks) for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)]
    net, batch = grown("mlp"), data("mlp")
    steps(net, torch.optim.SGD(net.parameters(), lr=0.1), batch, 1)
    net.parameter_groups()
    net.widen("0", data=batch)
    assert [len(hooks) for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)] == before


def test_13_gradients_that_wait_for_a_step_survive():
    net, batch = grown("mlp"), data("mlp")
    net.train().loss(batch).backward()
    old = net.model[2].weight.grad.clone()
    net.widen("0", 2, data=batch)
    assert torch.equal(net.model[2].weight.grad[:, :4], old)
    assert (net.model[2].weight.grad[:, 4:] == 0).all()


def test_13_a_state_of_another_shape_is_refused_before_anything_changes():
    net, batch = grown("mlp"), data("mlp")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    steps(net, optimizer, batch, 1)
    optimizer.state[net.model[0].weight]["factored"] = torch.zeros(7)
    before = [p.shape for p in net.parameters()]
    with pytest.raises(ValueError, match="optimizer: SGD keeps 'factored' of shape"):
        net.widen("0", data=batch, optimizer=optimizer)
    assert [p.shape for p in net.parameters()] == before
    assert net.points() == [Point(stage=0)]


# -- fit, stages, files -----------------------------------------------------------------------------------------------


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setattr(persistence, "_catalogue", lambda: [PATH])


def loader(name: str):
    x, y = data(name)
    return [(x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "instance"])
def test_fit_grows_and_the_optimiser_follows(optimizer):
    net = grown("mlp", tau=1.0, alpha=-1.0, per_check=2, capacity={"units": 12, "layers": 1}, layer_cost=4.0)
    made = {}
    if optimizer == "instance":
        made["o"] = torch.optim.Adam(net.parameters(), lr=0.01)
        chosen = made["o"]
    else:

        def chosen(groups):
            made["o"] = OPTIMISERS[optimizer](groups)
            return made["o"]

    fit(net, loader("mlp"), epochs=4, optimizer=chosen, progress=False)
    assert len(net.points()) > 4
    assert {op["kind"] for op in net.ops} == {"units", "layer"}
    held = [id(p) for g in made["o"].param_groups for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in net.model.parameters()}
    for p, state in made["o"].state.items():
        assert all(v.shape == p.shape for v in state.values() if isinstance(v, torch.Tensor) and v.ndim)
    if optimizer == "instance":
        assert net._known_optimizer(None) is made["o"]


@pytest.mark.parametrize("own", [False, True])
def test_fit_resumes_bit_by_bit_after_growth(tmp_path, own):
    def make():
        return grown("cnn", tau=1.0, alpha=-1.0, capacity={"units": 12, "layers": 1}, layer_cost=4.0, init="random")

    def adam(net):
        if own:  # an optimiser of the caller's, which holds the start model's parameters alone
            return torch.optim.Adam(net.parameters(), lr=0.01)
        return lambda groups: torch.optim.Adam(groups, lr=0.01)

    whole = make()
    fit(whole, loader("cnn"), epochs=4, optimizer=adam(whole), progress=False, checkpoint=tmp_path / "a")

    class Stop(Exception):
        pass

    def stop(step, total, loss):
        if step == 8:
            raise Stop

    broken = make()
    with pytest.raises(Stop):
        fit(
            broken,
            loader("cnn"),
            epochs=4,
            optimizer=adam(broken),
            progress=False,
            checkpoint=tmp_path / "b",
            on_step=stop,
        )
    again = make()
    history = fit(again, loader("cnn"), epochs=4, optimizer=adam(again), progress=False, checkpoint=tmp_path / "b")
    assert history.resumed_from == 6
    assert again.ops == whole.ops
    assert len(whole.ops) == 4
    assert again.history == whole.history
    for (n, a), (m, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert n == m
        assert torch.equal(a, b), n


@pytest.mark.parametrize("name", list(MAKE))
def test_stages_extract_save_and_load(name, tmp_path, listed):
    options = {
        "tau": 0.0,
        "alpha": -1.0,
        "capacity": {"units": 10, "layers": 1, "parameters": 10**5},
        "layer_cost": 0.2,
    }
    rule = {"rule": "secnn", "score": "diag", "cooldown": 0, "activation": "leaky"} if name == "tiny_secnn" else {}
    net, (x, y) = grown(name, **options, **rule, per_check=2), data(name)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    outputs = []
    for _ in range(2):
        steps(net, optimizer, (x, y), 2)
        net.eval()
        outputs.append(net(x).detach())
        net.maybe_expand((x, y), optimizer=optimizer)
    assert net.point == Point(stage=4)
    steps(net, optimizer, (x, y), 2)
    persistence.save(net.use(Point(stage=1)), tmp_path / "net")
    again = persistence.load(tmp_path / "net", model=MAKE[name]()).eval()
    net.eval()
    assert again.point == net.point == Point(stage=1)
    assert again.points() == net.points()
    assert again.history == net.history
    for point in net.points():
        used = net.use(point)(x)
        plain = net.extract(point)
        assert torch.equal(used, plain(x))
        assert torch.equal(used, again.use(point)(x))
        assert not plain.training
        assert all(p.requires_grad and p.grad is None for p in plain.parameters())
        own = (type(MAKE[name]()), _Block, SECNN)
        assert not any(type(m).__module__.startswith("pliant") and not isinstance(m, own) for m in plain.modules())
    torch.testing.assert_close(net.use(Point(stage=0))(x), outputs[0])  # the network before its first growth
    if name != "tiny_secnn":  # there, slopes move at the check, before anything grows
        torch.testing.assert_close(net.use(Point(stage=2))(x), outputs[1])
    again.train().use(again.points()[-1])
    again.maybe_expand((x, y))  # and it goes on growing
    assert len(again.points()) > 5
    with pytest.raises(ValueError, match="not a setting"):
        net.use(Point(stage=99))


def test_stages_are_records():
    net, batch = grown("cnn", tau=0.0, alpha=-1.0, capacity={"units": 9}), data("cnn")
    net.maybe_expand(batch)
    assert net.point == Point(stage=1)
    frozen = {n: t.clone() for n, t in net.stages.state_dict().items()}
    optimizer = torch.optim.SGD([p for g in net.parameter_groups(0.1) for p in g["params"]], lr=0.1, weight_decay=0.1)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == count_parameters(net.model)
    net.use(Point(stage=0))
    steps(net, optimizer, batch, 2)  # trains the live network, whatever is in use
    assert all(torch.equal(frozen[n], t) for n, t in net.stages.state_dict().items())
    assert not any(m.training for m in net.stages.modules())
    assert net.model.training
    net.maybe_expand(batch)
    assert net.point == Point(stage=0)  # stays where the caller put it


def test_the_slope_of_added_leaky_layers_decays_over_the_cooldown(tmp_path, listed):
    net, batch = grown("tiny_secnn", rule="secnn", score="diag", activation="leaky", cooldown=4), data("tiny_secnn")
    net.deepen("blocks.1.act", data=batch)
    act = net.model.blocks[1].act[1].act
    slopes = [act.negative_slope]
    for _ in range(6):
        net.tau = math.inf
        net.maybe_expand(batch)
        slopes.append(act.negative_slope)
    assert slopes == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    persistence.save(net, tmp_path / "net")
    again = persistence.load(tmp_path / "net", model=tiny_secnn())
    assert again.model.blocks[1].act[1].act.negative_slope == pytest.approx(0.2)
    assert again.stages[0].blocks[1].act.negative_slope == 0.2


def test_checks_repeat_exactly_and_use_the_last_training_samples():
    found = []
    for _ in range(2):
        net = grown("mlp", score_samples=40)
        for batch in loader("mlp"):
            net.train().loss(batch)
        torch.manual_seed(len(found))  # the caller's random state plays no part
        x, _ = net._score_batch(None)
        assert torch.equal(x, data("mlp")[0][-40:])
        found.append((net.maybe_expand(), net.history))
    assert found[0] == found[1]
    net = grown("mlp", score_data=data("mlp"))
    net.train().loss(loader("mlp")[0])
    assert net._recent == []
    net.epoch_end(None)
    assert len(net.history) == 1


def test_one_neuron_grows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1))  # SENN's one-dimensional regression starts so
    x = torch.linspace(-3, 3, 64)[:, None]
    net = SelfExpanding(
        model,
        x[:2],
        criterion=F.mse_loss,
        units=1,
        metric="output",
        actions=("units",),
        tau=1.0,
        alpha=0.0,
        score_data=(x, torch.sin(2 * x)),
    )
    assert [s.name for s in net.growing()] == ["0"]
    assert net.maybe_expand().kind == "units"


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule: 'best'; allowed: 'senn', 'secnn'"),
        ({"score": "full"}, "score: 'full'"),
        ({"metric": "mean"}, "metric: 'mean'"),
        ({"init": "zero"}, "init: 'zero'"),
        ({"increase": "all"}, "increase: 'all'"),
        ({"identity": "box"}, "identity: 'box'"),
        ({"activation": "relu"}, "activation: 'relu'"),
        ({"actions": ()}, "actions"),
        ({"actions": "units"}, "actions: 'units'"),
        ({"actions": ("prune",)}, "actions"),
        ({"tau": -1.0}, "tau: -1.0"),
        ({"tau": math.nan}, "tau: nan"),
        ({"units": 0}, "units: 0; allowed: a whole number from 1"),
        ({"units": 1.5}, "units: 1.5"),
        ({"every": 0}, "every: 0"),
        ({"cooldown": -1}, "cooldown: -1"),
        ({"kernel": 4}, "kernel: 4; allowed: an odd number"),
        ({"penalty": -1.0}, "penalty: -1.0"),
        ({"damping": -0.1}, "damping: -0.1"),
        ({"score_samples": 0}, "score_samples: 0"),
        ({"identity": "split", "score": "diag"}, "identity: 'split'"),
        ({"increase": "schur", "score": "diag"}, "increase: 'schur'"),
        ({"capacity": {"width": 3}}, "capacity: unknown 'width'; allowed: parameters, flops, units, layers"),
        ({"capacity": {"parameters": 10}}, r"capacity: parameters 10 is below the present size, 55"),
        ({"capacity": {"flops": 10}}, "capacity: flops 10 is below"),
        ({"capacity": {"units": 2}}, "capacity: units 2 is below the present size, 4"),
        ({"tau": 1.0, "per_check": None}, "tau: at 1.0 all is accepted; give a capacity"),
        ({"exclude": ("9",)}, "exclude: no module of the model is named '9'"),
        ({"sites": ("9",)}, "no hidden channels that can be widened"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SelfExpanding(mlp(), torch.randn(2, 6), **options)


class Tied(nn.Module):
    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.twice = twice
        if not twice:
            self.b.weight = self.a.weight

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.c(torch.relu(self.a(x) if self.twice else self.b(x)))


class Fixed(nn.Module):
    """A forward that fixes the number of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).reshape(-1, 6))


def test_bad_models():
    with pytest.raises(TypeError, match=r"an nn.Module"):
        SelfExpanding(3, torch.randn(2, 4))
    with pytest.raises(ValueError, match="no hidden channels that can be widened"):
        SelfExpanding(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"'a\.weight' and 'b\.weight' are one (shared weight|tied parameter)"):
        SelfExpanding(Tied(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="'a' runs 2 times in one forward"):
        SelfExpanding(Tied(twice=True), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"widened.*an added channel changes|reshape|shape"):
        SelfExpanding(Fixed(), torch.randn(2, 4), exclude=("a",))
    net = SelfExpanding(mlp(), torch.randn(2, 6), exclude=("0",))
    assert [s.name for s in net.growing()] == ["2"]


def test_bad_calls():
    net, (x, y) = grown("mlp"), data("mlp")
    with pytest.raises(ValueError, match=r"where: '4' cannot be widened: .*; allowed: "):
        net.widen("4")
    with pytest.raises(ValueError, match="where: no layer can be added at '0'; allowed: "):
        net.deepen("0")
    with pytest.raises(ValueError, match="count: 0"):
        net.widen("0", 0)
    with pytest.raises(ValueError, match="data: no samples to score"):
        net.maybe_expand()
    with pytest.raises(ValueError, match="optimizer: it holds no parameter of this network"):
        net.maybe_expand((x, y), optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizer: expected"):
        net.maybe_expand((x, y), optimizer=3)
    with pytest.raises(TypeError, match="optimizer: expected"):
        net.attach_optimizer(3)
    foreign = torch.optim.SGD(mlp().parameters(), lr=0.1)
    net.attach_optimizer(foreign)
    with pytest.raises(ValueError, match="optimizer: it holds no parameter of this network"):
        net.widen("0", data=(x, y))
    del foreign
    bad = x.clone()
    bad[0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        net.maybe_expand((bad, y))
    with torch.no_grad():
        net.model[0].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        net.maybe_expand((x, y))
    assert net.points() == [Point(stage=0)]
    other = grown("mlp")
    other.widen("0", data=(x, y))
    with pytest.raises(ValueError, match="grown in another way"):
        other.restructure({"ops": [], "history": [], "slopes": [{}]} | {"ops": [{"kind": "units"}]})


def test_bad_scores():
    model, (x, y) = mlp(), data("mlp")
    with pytest.raises(TypeError, match="already reduced"):
        natural_expansion_score(model, (x, y), F.cross_entropy(model(x), y))
    with pytest.raises(TypeError, match="criterion: 3; allowed: a function"):
        natural_expansion_score(model, (x, y), 3)
    with pytest.raises(ValueError, match="already reduced to a scalar"):
        natural_expansion_score(model, (x, y), lambda out, t: (out.sum(0) ** 2).sum())
    with pytest.raises(ValueError, match="it returned shape"):
        natural_expansion_score(model, (x, y), lambda out, t: out)
    with pytest.raises(ValueError, match="fisher: 'hessian'"):
        natural_expansion_score(model, (x, y), fisher="hessian")
    with pytest.raises(ValueError, match="damping: -1"):
        natural_expansion_score(model, (x, y), damping=-1)
    with pytest.raises(ValueError, match=r"damping: [AS] \(.*\) is singular.*fewer samples.*above 0"):
        natural_expansion_score(model, (x[:2], y[:2]), damping=0.0)
    for reduction in ("mean", "sum", "none"):
        value = natural_expansion_score(
            model, (x, y), lambda o, t, r=reduction: F.cross_entropy(o, t, reduction=r), fisher="exact"
        )
        assert value == pytest.approx(natural_expansion_score(model, (x, y), fisher="exact"), rel=1e-5)
    with pytest.raises(ValueError, match="no Linear or Conv2d"):
        natural_expansion_score(nn.Flatten(), (x[:, :3], y))


# -- where it broke once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["kfac", "diag", "exact"])
def test_ignored_targets_are_left_out_of_the_score(score):
    model, (x, y) = mlp(), data("mlp")
    masked = y.clone()
    masked[::3] = -100
    kept = masked != -100
    found = natural_expansion_score(model, (x, masked), fisher=score)
    assert found == pytest.approx(natural_expansion_score(model, (x[kept], y[kept]), fisher=score), rel=1e-9)
    by_hand = natural_expansion_score(model, (x[kept], y[kept]), F.cross_entropy, fisher=score)  # sample by sample
    assert found == pytest.approx(by_hand, rel=1e-4)
    with pytest.raises(ValueError, match="every target of the samples to score is -100"):
        natural_expansion_score(model, (x, torch.full_like(y, -100)), fisher=score)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["kfac", "diag"])
def test_half_precision_scores_and_grows(dtype, score):
    x, y = data("cnn")
    plain = natural_expansion_score(cnn(), (x, y), fisher=score)
    assert natural_expansion_score(cnn().to(dtype), (x.to(dtype), y), fisher=score) == pytest.approx(plain, rel=0.1)
    net = SelfExpanding(cnn().to(dtype), x[:2].to(dtype), **FAST, score=score, tau=1.0, alpha=-1.0)
    before = net(x.to(dtype))
    assert net.maybe_expand((x.to(dtype), y)) is not None
    assert net(x.to(dtype)).dtype == dtype
    assert torch.allclose(net(x.to(dtype)), before, rtol=0.05, atol=0.05)


def test_sets_that_one_added_layer_reads_grow_one_by_one():
    net = grown("residual", rule="secnn", score="diag", cooldown=0, actions=("units",), tau=0.0)
    net.deepen("head")
    before = sum(site.channels for site in net.growing())
    assert net.maybe_expand(data("residual")) is not None
    assert sum(site.channels for site in net.growing()) > before


def test_a_layer_that_is_given_only_zeros():
    """Everything behind a dead ReLU: nothing is worth adding there, and nothing breaks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.constant_(model[0].bias, -100.0)
    net = SelfExpanding(model, torch.randn(2, 6), proposals=4, proposal_steps=3, actions=("units",))
    _, _, found = net.candidates((torch.randn(32, 6), torch.randint(0, 2, (32,))))
    assert found
    assert all(math.isfinite(c.delta) for c in found)
