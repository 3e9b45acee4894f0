from __future__ import annotations

import copy
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pliant.core.dynamic import Point
from pliant.core.persistence import load, save
from pliant.core.training import fit
from pliant.weights.weight_compander import (
    FUNCTIONS,
    Compander,
    WeightCompander,
    averaged,
    compand,
    companders,
    fold,
    histogram,
    load_plain,
    psi,
    psi_inverse,
    stats,
)

torch.set_num_threads(1)
BOUNDED = ("arctan", "tanh", "softsign")
BOUND = {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0}


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


torch.manual_seed(0)
X, Y = torch.randn(32, 6), torch.randint(0, 4, (32,))
DATA = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]


# -- 1 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_1_odd_increasing_bounded_and_without_nan(fn):
    a, b = 0.7, 0.4
    v = torch.linspace(-8, 8, 2001)
    w = psi(v, a, b, fn)
    assert torch.equal(w, -psi(-v, a, b, fn))
    assert psi(torch.zeros(1), a, b, fn).item() == 0
    assert (w.diff() >= 0).all()  # tanh reaches its bound within float32's resolution
    assert (psi(torch.linspace(-2, 2, 2001), a, b, fn).diff() > 0).all()
    far = torch.tensor([3e38, -3e38, 1e-45, math.inf, -math.inf])
    out = psi(far, a, b, fn)
    assert not out.isnan().any()
    if fn in BOUNDED:
        limit = torch.tensor(a * BOUND[fn])
        ceiling = torch.nextafter(limit, torch.tensor(math.inf))
        assert (out.abs() <= ceiling).all()
        assert (psi(torch.tensor([5 * b]), a, b, fn) < limit).all()
        torch.testing.assert_close(out[3:], torch.stack([limit, -limit]))


def test_1_float64_stays_strictly_inside():
    v = torch.logspace(-5, 5, 1000, dtype=torch.float64)
    assert (psi(v, 0.7, 0.4) < 0.7 * math.pi / 2).all()


# -- 2 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_2_round_trip(fn):
    a, b = 0.3, 0.3
    w = torch.linspace(-0.9, 0.9, 1001) * a * BOUND.get(fn, 1.0)
    again = psi(psi_inverse(w, a, b, fn), a, b, fn)
    torch.testing.assert_close(again, w, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("make", [mlp, cnn])
def test_2_the_output_is_unchanged_at_the_start(make, fn):
    x = X if make is mlp else torch.randn(3, 2, 7, 7)
    plain = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        companded = compand(copy.deepcopy(plain), fn=fn)
    assert len(companders(companded)) == 2
    torch.testing.assert_close(companded(x), plain(x), rtol=0, atol=1e-6)


def test_2_slope_at_zero_is_one_for_every_function():
    for fn in FUNCTIONS:
        model = compand(mlp(), fn=fn)
        _, _, map_ = companders(model)["0"]
        v = torch.zeros(1, requires_grad=True)
        (slope,) = torch.autograd.grad(map_(v).sum(), v)
        assert slope.item() == pytest.approx(1.0, rel=1e-5)
        assert stats(model)["0"]["a"] == pytest.approx(3 * mlp()[0].weight.std(unbiased=False).item(), rel=1e-5)


# -- 3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_3_autograd(fn):
    v = torch.randn(7, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, a, b: psi(v, a, b, fn), (v, a, b))
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(psi(zero, 0.7, 0.4, fn), zero)
    expected = {"mulaw": 0.7 / 0.4 * 255 / math.log(256), "identity": 1.0}.get(fn, 0.7 / 0.4)
    assert slope.item() == pytest.approx(expected, rel=1e-12)


def test_3_closed_forms():
    v = torch.randn(50, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(50, dtype=torch.float64)
    dv, da, db = torch.autograd.grad((psi(v, a, b) * weights).sum(), (v, a, b))
    inner = 1 + (v / b) ** 2
    torch.testing.assert_close(dv, weights * (a / b) / inner)
    torch.testing.assert_close(da, (weights * torch.arctan(v / b)).sum())
    torch.testing.assert_close(db, (weights * -(a * v / b**2) / inner).sum())


def test_3_learned_scales_get_the_chain_rule_and_the_clip():
    map_ = Compander(0.5, 0.4, learnable=True)
    v = torch.tensor([0.1, -0.3])
    map_(v).sum().backward()
    a, b = 0.5, 0.4
    assert map_.log_a.grad.item() == pytest.approx((a * torch.arctan(v / b)).sum().item(), rel=1e-5)
    assert map_.log_b.grad.item() == pytest.approx((-(a * v / b) / (1 + (v / b) ** 2)).sum().item(), rel=1e-5)
    map_.zero_grad()
    (map_(v).sum() * 1e6).backward()
    assert abs(map_.log_a.grad.item()) == 1.0
    assert abs(map_.log_b.grad.item()) == 1.0


# -- 4 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "lr", "tolerance"), [(torch.float64, 0.1, 1e-5), (torch.float32, 0.03, 1e-4)])
def test_4_wide_scales_train_as_the_plain_network(dtype, lr, tolerance):
    def train(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
        for step in range(60):
            optimizer.zero_grad()
            F.cross_entropy(net(DATA[step % 4][0].to(dtype)), DATA[step % 4][1]).backward()
            optimizer.step()
        return net(X.to(dtype))

    start = mlp().to(dtype)
    plain = train(copy.deepcopy(start))
    widest = max(p.abs().max().item() for p in start.parameters())
    wide = compand(copy.deepcopy(start), scale=1e4 * widest / start[0].weight.std(unbiased=False).item())
    torch.testing.assert_close(train(wide), plain, rtol=0, atol=tolerance)
    assert not torch.allclose(plain, start(X.to(dtype)), atol=0.1)  # it did train
    assert not torch.allclose(train(compand(copy.deepcopy(start))), plain, atol=1e-2)  # and with c = 3 it differs


# -- 5, 6 -------------------------------------------------------------------------------------------------------------


def test_5_one_step_moves_w_by_the_squared_slope():
    a, b, lr = 0.6, 0.3, 1e-6
    v = torch.tensor([0.0, b, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    grad_w = torch.tensor([1.0, 1.0, 2.0, -3.0], dtype=torch.float64)
    before = psi(v, a, b)
    (before * grad_w).sum().backward()
    after = psi(v.detach() - lr * v.grad, a, b)
    slope = (a / b) / (1 + (v.detach() / b) ** 2)
    torch.testing.assert_close(after - before.detach(), -lr * slope**2 * grad_w, rtol=1e-4, atol=0)
    ratio = (after - before)[0] / (after - before)[1]
    assert ratio.item() == pytest.approx(4.0, rel=1e-4)


def test_6_weight_decay_acts_on_v():
    net = WeightCompander(mlp(), X)
    lr, lam = 0.1, 0.5
    optimizer = torch.optim.SGD(net.parameter_groups(lam), lr=lr)
    v = net.model[0].parametrizations.weight.original
    v0, (_, _, map_) = v.detach().clone(), companders(net.model)["0"]
    w0 = net.model[0].weight.detach().clone()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for step in range(1, 4):
        optimizer.step()
        torch.testing.assert_close(v.detach(), v0 * (1 - lr * lam) ** step)
        torch.testing.assert_close(net.model[0].weight, map_(v0 * (1 - lr * lam) ** step))
    assert not torch.allclose(net.model[0].weight, w0 * (1 - lr * lam) ** 3, rtol=1e-3, atol=0)


def test_6_decay_on_w_is_a_term_of_the_loss():
    net = WeightCompander(mlp(), X, decay_on="w")
    plain_loss = net.loss(DATA[0])
    groups = net.parameter_groups(0.4)
    v = net.model[0].parametrizations.weight.original
    assert next(g for g in groups if any(p is v for p in g["params"]))["weight_decay"] == 0
    assert next(g for g in groups if any(p is net.model[0].bias for p in g["params"]))["weight_decay"] == 0.4
    squares = sum(net.model[i].weight.square().sum() for i in (0, 3))
    torch.testing.assert_close(net.loss(DATA[0]), plain_loss + 0.2 * squares)


# -- 7 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_7_fold_is_bit_identical_and_leaves_nothing(fn, learnable):
    net = WeightCompander(mlp(), X, fn=fn, learnable=learnable)
    fit(net, DATA, epochs=2, lr=0.05, progress=False)
    small = net.extract(net.point)
    assert torch.equal(small(X), net(X))
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in mlp().named_parameters()]
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in mlp().parameters())
    assert [n for n, _ in small.named_buffers()] == []
    assert [type(m) for m in small.modules()] == [type(m) for m in mlp().modules()]
    assert not any(type(m).__module__.startswith("pliant") for m in small.modules())
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad for p in small.parameters())
    with torch.no_grad():
        small[0].weight.zero_()
    assert net.model[0].weight.abs().sum() > 0  # weights of its own
    assert len(companders(net.model)) == 2


def test_7_fold_of_a_registered_fold_is_idempotent():
    net = WeightCompander(mlp(), X)
    fit(net, DATA, epochs=1, progress=False)
    once = net.extract(net.point)
    twice = fold(compand(copy.deepcopy(once), scale=5.0))
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# -- 8 ----------------------------------------------------------------------------------------------------------------


def test_8_others_are_untouched():
    model = mlp()
    kept = {n: id(p) for n, p in model.named_parameters() if n != "0.weight"}
    compand(model, exclude=("3",))
    assert {n: id(p) for n, p in model.named_parameters() if n in kept} == kept
    assert type(model[3]) is nn.Linear
    assert list(companders(model)) == ["0"]
    model = cnn()
    kept = {n: id(p) for n, p in model.named_parameters() if n not in ("0.weight", "5.weight")}
    compand(model)
    assert {n: id(p) for n, p in model.named_parameters() if n in kept} == kept
    assert list(companders(compand(cnn(), target_modules=("Conv2d",)))) == ["0"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.embed(x)))).mean(1)


def test_8_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 5, (6, 3))
    net = WeightCompander(model, tokens)
    torch.testing.assert_close(net(tokens), model(tokens), rtol=0, atol=1e-6)
    head, embed = net.model.head.parametrizations.weight, net.model.embed.parametrizations.weight
    assert head.original is embed.original
    assert head[0] is embed[0]
    assert len(companders(net.model)) == 2
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in net.parameters()) == count
    fit(net, [(tokens, torch.randint(0, 5, (6,)))], steps=5, progress=False)
    assert torch.equal(net.model.head.weight, net.model.embed.weight)
    small = net.extract(net.point)
    assert small.head.weight is small.embed.weight
    assert torch.equal(small(tokens), net(tokens))
    save(net, tmp_path / "out")
    again = load(tmp_path / "out", model=Tied())
    assert torch.equal(again(tokens), net(tokens))
    plain = compand(Tied())
    load_plain(plain, Tied().state_dict())
    torch.testing.assert_close(plain.head.weight, plain.embed.weight)
    alone = compand(Tied(), exclude=("embed",))
    assert list(companders(alone)) == ["middle"]
    assert alone.head.weight is alone.embed.weight


# -- 9 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learnable", [False, True])
def test_9_state_dicts_and_saving(tmp_path, learnable):
    net = WeightCompander(mlp(), X, learnable=learnable, tie_slope=learnable)
    fit(net, DATA, epochs=1, progress=False)
    other = WeightCompander(mlp(5), X, learnable=learnable, tie_slope=learnable)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(X), net(X))
    small, plain = net.extract(net.point), mlp(7)
    plain.load_state_dict(small.state_dict())
    assert torch.equal(plain(X), net(X))
    save(net, tmp_path / "out")
    again = load(tmp_path / "out", model=mlp(9))
    assert torch.equal(again(X), net(X))
    assert isinstance(again, WeightCompander)
    assert again.learnable is learnable


def test_9_a_plain_checkpoint_goes_through_the_inverse():
    net, source = WeightCompander(mlp(), X), mlp(3)
    net.load_plain(source.state_dict())
    torch.testing.assert_close(net(X), source(X), rtol=0, atol=1e-6)
    with torch.no_grad():
        source[3].weight[0, 0] = 50.0
    before = net.model[3].weight.clone()
    with pytest.raises(ValueError, match=r"3\.weight: max\|w\| = 50 reaches the bound"):
        net.load_plain(source.state_dict())
    assert torch.equal(net.model[3].weight, before)
    net.load_plain(source.state_dict(), clip=True)
    assert net.model[3].weight[0, 0].item() == pytest.approx(net.stats()["3"]["bound"], rel=1e-3)
    assert torch.isfinite(net(X)).all()
    with pytest.raises(ValueError, match="names do not fit"):
        net.load_plain({k: v for k, v in mlp().state_dict().items() if k != "3.bias"})
    with pytest.raises(ValueError, match=r"0\.weight: shape"):
        net.load_plain(mlp().state_dict() | {"0.weight": torch.zeros(2, 2)})


# -- 10 ---------------------------------------------------------------------------------------------------------------


def test_10_functional_call_grad_and_deepcopy():
    net = WeightCompander(mlp(), X, learnable=True)
    parameters = dict(net.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(net, parameters, (X,)), net(X), rtol=0, atol=1e-6)

    def objective(p):
        return F.cross_entropy(torch.func.functional_call(net, p, (X,)), Y)

    by_func = torch.func.grad(objective)(parameters)
    net.loss((X, Y)).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(by_func[name], p.grad, rtol=1e-5, atol=1e-7)
    other = copy.deepcopy(net)
    assert torch.equal(other(X), net(X))
    before = net(X).detach()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert torch.equal(net(X), before)


def test_10_ddp_in_a_group_of_one():
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = "29741"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        net = WeightCompander(mlp(), X, learnable=True)
        wrapped = nn.parallel.DistributedDataParallel(net)
        torch.testing.assert_close(wrapped(X), net(X), rtol=0, atol=1e-6)
        F.cross_entropy(wrapped(X), Y).backward()
        got = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        net.loss((X, Y)).backward()
        for a, p in zip(got, net.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()


def test_10_compile():
    net = WeightCompander(mlp(), X, learnable=True)
    try:
        compiled = torch.compile(net.model)
        out = compiled(X)
        out.sum().backward()
    except Exception as error:  # a missing compiler shows itself in many types
        pytest.skip(f"torch.compile does not work here: {type(error).__name__}: {str(error).splitlines()[0]}")
    torch.testing.assert_close(out, net(X), rtol=0, atol=1e-6)
    got = net.model[0].parametrizations.weight.original.grad.clone()
    net.zero_grad()
    net(X).sum().backward()
    torch.testing.assert_close(got, net.model[0].parametrizations.weight.original.grad, rtol=1e-5, atol=1e-6)


# -- 11 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_11_scaling_law(fn):
    v = torch.randn(40, dtype=torch.float64)
    for s in (0.1, 2.0, 30.0):
        one, two = v.clone().requires_grad_(), (s * v).requires_grad_()
        w, scaled = psi(one, 0.7, 0.4, fn), psi(two, s * 0.7, s * 0.4, fn)
        torch.testing.assert_close(scaled, s * w)
        (a,), (b,) = torch.autograd.grad(w.sum(), one), torch.autograd.grad(scaled.sum(), two)
        torch.testing.assert_close(a, b)


# -- the rest of the specification ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", BOUNDED)
def test_guard_raises_a_for_heavy_tails_and_warns(fn):
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = 4.0
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"layer 0: max\|w\| = 4 is beyond 0.95 of the bound"):
        compand(model, fn=fn)
    row = stats(model)["0"]
    assert row["a"] == pytest.approx(4.0 / (0.95 * BOUND[fn]), rel=1e-5)
    assert row["a"] == pytest.approx(row["b"], rel=1e-6)
    torch.testing.assert_close(model(X), plain(X), rtol=1e-5, atol=1e-5)


def test_guard_fires_for_uniform_weights_at_scale_one():
    with pytest.warns(UserWarning, match="raised from"):
        compand(mlp(), scale=1.0)


def test_init_value_changes_the_function_slightly():
    model = compand(mlp(), init="value")
    assert torch.equal(model[0].parametrizations.weight.original, mlp()[0].weight)
    assert 1e-6 < (model(X) - mlp()(X)).abs().max() < 0.2


def test_learned_scales_are_grouped_clamped_and_tied():
    net = WeightCompander(mlp(), X, learnable=True, hyper_lr_factor=0.2)
    groups = net.parameter_groups(0.01)
    assert [g["weight_decay"] for g in groups] == [0.01, 0.01, 0.0]
    assert [g.get("lr_scale", 1.0) for g in groups] == [1.0, 1.0, 0.2]
    assert len(groups[2]["params"]) == 4
    together = [id(p) for g in groups for p in g["params"]]
    assert sorted(together) == sorted(id(p) for p in net.parameters())
    _, _, map_ = companders(net.model)["0"]
    start = net.stats()["0"]["a"]
    with torch.no_grad():
        map_.log_a.add_(9.0)
        map_.log_b.sub_(9.0)
    net.schedule(0.5)
    assert net.stats()["0"]["a"] == pytest.approx(10 * start, rel=1e-4)
    assert net.stats()["0"]["b"] == pytest.approx(start / 10, rel=1e-4)
    tied = WeightCompander(mlp(), X, learnable=True, tie_slope=True)
    assert len(tied.parameter_groups()[2]["params"]) == 2
    fit(tied, DATA, epochs=2, progress=False)
    row = tied.stats()["0"]
    assert row["a"] / row["b"] == pytest.approx(1.0, rel=1e-5)
    assert row["a"] != pytest.approx(start, rel=1e-5)


def test_no_filter_by_name_is_needed_and_adam_weakens_the_effect():
    """Under Adam's first step v moves by lr whatever the slope, so w moves by lr dw/dv: ratio 2 at v = b, not 4."""
    map_ = Compander(0.5, 0.5)
    moves = {}
    for kind in (torch.optim.SGD, torch.optim.Adam):
        v = nn.Parameter(torch.tensor([0.0, 0.5], dtype=torch.float64))
        before = map_(v).detach()
        optimizer = kind([v], lr=1e-6)
        map_(v).sum().backward()
        optimizer.step()
        move = map_(v).detach() - before
        moves[kind] = (move[0] / move[1]).item()
    assert moves[torch.optim.SGD] == pytest.approx(4.0, rel=1e-3)
    assert moves[torch.optim.Adam] == pytest.approx(2.0, rel=1e-3)


def test_training_never_passes_the_bound_and_stats_tell_it():
    net = WeightCompander(mlp(), X)
    fit(net, DATA, epochs=20, lr=0.3, weight_decay=0.0, progress=False)
    for row in net.stats().values():
        assert row["max_abs"] < row["bound"]
        assert row["bound"] == pytest.approx(row["a"] * math.pi / 2)
    gauss = histogram(torch.randn(200_000))
    assert gauss["kurtosis"] == pytest.approx(3.0, abs=0.1)
    assert gauss["near_zero"] == pytest.approx(0.0797, abs=0.005)


def test_frozen_stays_frozen_and_composes_with_weight_norm():
    model = mlp()
    model[0].weight.requires_grad_(False)
    net = WeightCompander(model, X, learnable=True)
    assert not any(p.requires_grad for n, p in net.model[0].named_parameters() if n != "bias")
    before = net.model[0].weight.clone()
    fit(net, DATA, epochs=1, progress=False)
    assert torch.equal(net.model[0].weight, before)
    assert not net.extract(net.point)[0].weight.requires_grad
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    plain = model(X)
    compand(model)
    assert isinstance(model[0].parametrizations.weight[-1], Compander)
    torch.testing.assert_close(model(X), plain, rtol=0, atol=1e-6)
    out = model(X)
    assert torch.equal(fold(model)(X), out)


def test_half_precision_is_computed_in_float32():
    map_ = Compander(0.3, 8.0)
    v = torch.linspace(-1, 1, 101).bfloat16()
    assert map_(v).dtype == torch.bfloat16
    assert torch.equal(map_(v), map_(v.float()).bfloat16())
    tiny = torch.tensor([1e-7]).half()
    assert torch.equal(map_(tiny), map_(tiny.float()).half())


def test_average_is_of_w():
    net = WeightCompander(mlp(), X)
    ema = net.extract(net.point)
    start = ema[0].weight.clone()
    fit(net, DATA, epochs=3, progress=False)
    averaged(net.model, ema, 0.25)
    torch.testing.assert_close(ema[0].weight, torch.lerp(start, net.model[0].weight, 0.25))


def test_the_contract():
    model = mlp()
    state = copy.deepcopy(model.state_dict())
    net = WeightCompander(model, X)
    assert type(model[0]) is nn.Linear  # the caller's own stays plain
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert net.points() == [Point(compander=1)]
    assert net.use(Point(compander=1)) is net
    with pytest.raises(ValueError, match="not a setting"):
        net.extract(Point(compander=2))
    assert "arctan, scale=3" in repr(net)
    assert net.arguments()["fn"] == "arctan"
    mapping = WeightCompander(nn.Bilinear(6, 6, 4), (X, X), target_modules=("Bilinear",))
    assert mapping((X, X)).shape == (32, 4)


class Bare(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"fn": "sigmoid"}, ValueError, "fn: 'sigmoid'; allowed: 'arctan'"),
        ({"scale": 0.0}, ValueError, r"scale: 0\.0"),
        ({"scale": -1}, ValueError, "scale: -1"),
        ({"scale": math.nan}, ValueError, "scale: nan"),
        ({"init": "zero"}, ValueError, "init: 'zero'; allowed"),
        ({"decay_on": "b"}, ValueError, "decay_on: 'b'; allowed"),
        ({"hyper_lr_factor": 0.0}, ValueError, r"hyper_lr_factor: 0\.0"),
        ({"tie_slope": True}, ValueError, "tie_slope"),
        ({"target_modules": ("LSTM",)}, ValueError, "target_modules: no module"),
        ({"target_modules": "Linear"}, TypeError, "target_modules: 'Linear'; allowed: a sequence"),
        ({"exclude": "0"}, TypeError, "exclude: '0'; allowed: a sequence"),
        ({"exclude": ("fc",)}, ValueError, "exclude: 'fc' matches no module"),
        ({"exclude": ("*",)}, ValueError, "no module"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        WeightCompander(mlp(), X, **kwargs)


def test_bad_models():
    with pytest.raises(TypeError, match=r"model: 3; allowed: an nn\.Module"):
        compand(3)
    for a, b, label in ((0.0, 1.0, "a"), (1.0, 0.0, "b"), (-1.0, 1.0, "a"), (1.0, math.inf, "b")):
        with pytest.raises(ValueError, match=f"{label}: .*; allowed: a finite number above 0"):
            Compander(a, b)
    with pytest.raises(ValueError, match="fn: 'cube'"):
        Compander(1.0, 1.0, "cube")
    once = compand(mlp())
    with pytest.raises(ValueError, match="layer 0 is companded already"):
        compand(once)
    zero = mlp()
    nn.init.zeros_(zero[3].weight)
    with pytest.raises(ValueError, match="layer 3 are all zero"):
        compand(zero)
    bad = mlp()
    with torch.no_grad():
        bad[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 0 is empty, or holds NaN"):
        compand(bad)
    assert type(bad[0]) is nn.Linear  # nothing was changed
    with pytest.raises(TypeError, match="complex64"):
        compand(nn.Sequential(Bare(nn.Parameter(torch.ones(2, dtype=torch.complex64)))), target_modules=("Bare",))
    whole = nn.Sequential(Bare(nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)))
    with pytest.raises(TypeError, match="int8"):
        compand(whole, target_modules=("Bare",))
    with pytest.raises(ValueError, match="does not accept"):
        WeightCompander(mlp(), torch.randn(3, 5))
    with pytest.raises(ValueError, match="reaches the bound"):
        Compander(0.1, 0.1).right_inverse(torch.tensor([0.2]))


@pytest.mark.parametrize("arm", ["plain", "dropout 0.3", "max-norm 1", "weight norm", "WC fixed", "WC learned"])
def test_the_experiment_trains_a_stack_as_each_network_alone(arm):
    pytest.importorskip("sklearn")
    from pliant.reproduce import weight_compander as experiment

    data = experiment.Digits()
    settings = [(0.02, 0.0), (0.1, 5e-3), (0.005, 2e-2)]
    stack, _ = experiment._train(arm, settings, [0, 1, 2], 0.3, 2, data)
    alone, _ = experiment._train(arm, settings[1:2], [1], 0.3, 2, data)
    for together, single in zip(stack, alone, strict=True):
        torch.testing.assert_close(together[1:2], single, rtol=1e-4, atol=1e-5)


def test_cached_weights_are_computed_once():
    calls = []
    net = WeightCompander(Tied(), torch.randint(0, 5, (6, 3)))
    for _, _, map_ in companders(net.model).values():
        map_.register_forward_hook(lambda *_: calls.append(1))
    net.loss((torch.randint(0, 5, (6, 3)), torch.randint(0, 5, (6,))))
    assert len(calls) == 3  # embed, head and middle
    assert not parametrize._cache_enabled


# -- in threads, and after failures -----------------------------------------------------------------------------------


def test_four_threads_answer_as_one():
    net = WeightCompander(mlp(), X, learnable=True).eval()
    inputs = [torch.roll(X, k, 0) for k in range(4)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        alone = [net(x) for x in inputs]
        for _ in range(3):
            for a, b in zip(alone, pool.map(net, inputs), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_network_answers_compiled_as_it_does_uncompiled(backend):
    net = WeightCompander(cnn(), torch.randn(3, 2, 7, 7)).eval()
    torch._dynamo.reset()
    x = torch.randn(4, 2, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend=backend)(x), net.use(Point(compander=1))(x))


def test_a_criterion_that_fails_leaves_the_network_as_it_was():
    calls = []

    def criterion(y, t):
        calls.append(len(t))
        if len(calls) > 1:
            raise RuntimeError("boom")
        return F.cross_entropy(y, t)

    net = WeightCompander(mlp(), X, learnable=True, decay_on="w", criterion=criterion).train()
    net.parameter_groups(0.1)
    net.loss(DATA[0])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="boom"):
        net.loss(DATA[0])
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert parametrize._cache_enabled == 0  # nothing is remembered from one call to the next
    assert net.training
