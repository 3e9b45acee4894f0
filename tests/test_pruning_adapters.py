"""Structured pruning adapters: the numbers in the names are those of the method's exact properties."""

from __future__ import annotations

import copy
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.core.cost import count_parameters
from pliant.core.dynamic import Point
from pliant.core.frontier import measure
from pliant.core.persistence import load, save
from pliant.core.sparse import BlockSparseLinear
from pliant.core.training import fit
from pliant.sparsity.pruning_adapters import (
    PruningAdapters,
    SPLoPA,
    SPLoRA,
    SPPaRA,
    _add_to_centre,
    _parallel,
)
from pliant.tasks.images import SmallResNet

pytestmark = pytest.mark.filterwarnings("ignore:rank")
KINDS = ("splora", "sppara")


def base() -> SmallResNet:
    torch.manual_seed(3)
    model = SmallResNet(widths=(8, 12), blocks=2)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                m.bias.normal_(0, 0.3)
    return model


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, 1, 8, 8, generator=g), torch.randint(0, 10, (rows,), generator=g)


def adapted(kind: str = "splora", model: nn.Module | None = None, **options: Any) -> PruningAdapters:
    return PruningAdapters(model or base(), batch()[0], kind=kind, rank=3, **options)


def mlp(**options: Any) -> tuple[PruningAdapters, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 12)
    return PruningAdapters(model, x, **options), x, torch.tensor([0, 1, 2, 0, 1])


def steps(net: PruningAdapters, data: tuple[Tensor, Tensor], count: int = 3, decay: float = 5e-3) -> None:
    net.train()
    optimizer = torch.optim.SGD(net.parameter_groups(decay), 0.05, momentum=0.9)
    net.attach_optimizer(optimizer)
    for _ in range(count):
        optimizer.zero_grad()
        net.loss(data).backward()
        optimizer.step()


def disturb(net: PruningAdapters) -> PruningAdapters:
    """Adapters and own tensors that are far from where they started."""
    with torch.no_grad():
        for p in net.settings[0].parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


def masked(net: PruningAdapters) -> nn.Module:
    """The full-width network of the setting in use, built by hand: removed channels are zero in layers and norms."""
    model = copy.deepcopy(net.model).eval()
    setting = net._setting()
    cuts = net._network(setting).cuts
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    def places(name: str, dim: int, size: int) -> Tensor:
        runs = cuts.get(name, {}).get(dim, ((0, size),))
        return torch.tensor([p for start, length in runs for p in range(start, start + length)])

    with torch.no_grad():
        for name, tensor in setting.own().items():
            value = tensors[name]
            if value.dim() == 0:
                continue
            whole = torch.full_like(value, 1.0 if name.endswith("running_var") else 0.0)
            rows = places(name, 0, len(value))
            if value.dim() == 1:
                whole[rows] = tensor
            else:
                whole[rows[:, None], places(name, 1, value.shape[1])] = tensor
            value.copy_(whole)
        for layer in setting.layers:
            weight = tensors[f"{layer}.weight"]
            index = (
                places(f"{layer}.weight", 0, weight.shape[0])[:, None],
                places(f"{layer}.weight", 1, weight.shape[1]),
            )
            kept, delta = torch.zeros(weight.shape[:2]), torch.zeros(weight.shape[:2])
            kept[index], delta[index] = 1.0, setting.delta(layer)
            weight.copy_(_add_to_centre(weight, delta) * kept.view(*kept.shape, *[1] * (weight.dim() - 2)))
    return model


# -- exact properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "splopa"])
def test_1_the_fused_network_is_the_evaluated_one_and_the_training_path_agrees(kind: str) -> None:
    if kind == "splopa":
        net, x, _ = mlp(kind=kind, block=(2, 2), prototypes=3)
    else:
        net, (x, _) = adapted(kind), batch()
    disturb(net).eval()
    small = net.fuse()
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(small(x), expected)
        assert torch.equal(small(x[:1]), net(x[:1]))
    assert torch.equal(small(x), net(x))  # with gradients enabled too
    assert not any(type(m).__module__.startswith("pliant.core") for m in small.modules())
    net.train()
    for norm in [m for m in net.model.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.eval()  # only the path of the adapters is to differ
    assert torch.allclose(net(x), expected, atol=2e-5, rtol=1e-5)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_2_slice_and_fuse_commute(n_out: int, n_in: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    out = torch.randperm(n_out)[: n_out // 2 + 1].sort().values
    inp = torch.randperm(n_in)[: n_in // 2 + 1].sort().values
    for adapter in (SPLoRA(n_out, n_in, rank), SPPaRA(n_out, n_in)):
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_()
        for shape in ((), (3, 3)):
            weight = torch.randn(n_out, n_in, *shape)
            whole = _add_to_centre(weight, adapter.delta())[out][:, inp]
            smaller = adapter.cut(out, inp)
            sliced = _add_to_centre(weight[out][:, inp], smaller.delta())
            assert torch.equal(adapter.delta(out, inp), smaller.delta())
            assert torch.allclose(whole, sliced, rtol=0, atol=1e-5)
            if isinstance(adapter, SPPaRA):
                assert torch.equal(whole, sliced)
            # In whole numbers nothing is rounded, and the two are equal to the bit.
            exact = copy.deepcopy(adapter)
            with torch.no_grad():
                for p in exact.parameters():
                    p.copy_(torch.randint(-8, 8, p.shape).float())
            assert torch.equal(exact.delta()[out][:, inp], exact.cut(out, inp).delta())


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_3_the_sliced_network_is_the_masked_one(kind: str, seed: int) -> None:
    net, (x, _) = disturb(adapted(kind)), batch()
    rng = torch.Generator().manual_seed(seed)
    kept = {
        g.name: torch.randperm(g.channels, generator=rng)[: max(1, g.channels // 2)].tolist()
        for g in net.slicing.groups
    }
    net.set_kept(kept).eval()
    with torch.no_grad():
        assert torch.allclose(masked(net)(x), net(x), atol=1e-5, rtol=1e-5)
        assert torch.equal(net.fuse()(x), net(x))
    assert net.fuse().stages[0][0].conv1.out_channels == 4


@pytest.mark.parametrize("kind", KINDS)
def test_3_pruning_takes_channels_away_and_changes_nothing_of_the_others(kind: str, tmp_path: Any) -> None:
    net = disturb(small_run(kind=kind)[0])
    whole = net.fuse()
    first, second = (next(g.name for g in net.slicing.groups if g.name == name) for name in ("0", "3"))
    fresh = small_run(kind=kind)[0]
    for step, (a, b) in enumerate((([0, 2, 3, 5], [1, 2, 4]), ([2, 5], [1, 4]), ([5], [4]))):
        net.set_kept({first: a, second: b})
        if step == 1:  # what is stored is cut; the next step cuts it again
            net = fresh.load_task(net.save_task(tmp_path / "task"))
        small = net.fuse()
        assert torch.equal(small[0].weight, whole[0].weight[a])
        assert torch.equal(small[3].weight, whole[3].weight[b][:, a])
        assert torch.equal(small[8].weight, whole[8].weight[:, b])
        for layer, kept in ((0, a), (1, a), (3, b), (4, b)):
            assert torch.equal(small[layer].bias, whole[layer].bias[kept])
        assert torch.equal(small[1].running_mean, whole[1].running_mean[a])
        assert torch.equal(small[4].running_var, whole[4].running_var[b])


def test_3_training_moves_the_statistics_of_the_channels_that_are_kept() -> None:
    net, train = small_run()
    first, second = (next(g.name for g in net.slicing.groups if g.name == name) for name in ("0", "3"))
    net.set_kept({first: [0, 2, 3, 5], second: [1, 4]})
    before = {n: getattr(net._setting(), p).clone() for n, p in net._setting().names.items()}
    small = net.fuse().train()
    net.train()
    for x, y in train:
        net.loss((x, y)).backward()
        small(x)
    found = net._setting().own()
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        assert torch.allclose(found[name], small.get_buffer(name), rtol=1e-4, atol=1e-6)
        stored = getattr(net._setting(), net._setting().names[name])
        gone = [1, 4] if name.startswith("1") else [0, 2, 3]
        assert torch.equal(stored[gone], before[name][gone])
    assert found["1.num_batches_tracked"] == before["1.num_batches_tracked"] + 3


def test_4_learned_numbers_follow_the_formula() -> None:
    net, _, _ = mlp(rank=3)
    first, second = net.slicing.groups if net.slicing.groups[0].name == "0" else net.slicing.groups[::-1]
    a, b = 4, 5
    net.set_kept({first.name: range(a), second.name: range(b)})
    head = 3 * b + 3
    assert net.learned_numbers() == (3 * (12 + a) + a) + (3 * (a + b) + b) + head
    dense, _, _ = mlp(kind="sppara")
    dense.set_kept({first.name: range(a), second.name: range(b)})
    assert dense.learned_numbers() == (12 * a + a) + (a * b + b) + head


def test_5_the_base_never_changes_and_tasks_do_not_touch_each_other() -> None:
    model = base()
    before = copy.deepcopy(model.state_dict())
    net, (x, y) = adapted(model=model), batch()
    steps(net, (x, y))
    net.prune(0.2)
    steps(net, (x, y))
    a = net.point
    with torch.no_grad():
        answer = net.eval()(x)
    net.add_task("other", classes=4)
    assert net.point == Point(task="other", density=1)
    assert net.eval()(x).shape == (6, 4)
    assert {p.requires_grad for p in net.settings[0].parameters()} == {False}
    assert all(p.requires_grad for p in net.settings[1].parameters())
    steps(net, (x, y % 4))
    net.prune(0.1, [(x, y % 4)])
    with torch.no_grad():
        assert torch.equal(net.eval().use(a)(x), answer)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())  # norms' statistics too
    assert all(p.grad is None for p in model.parameters())
    small = net.extract(net.points()[-1])
    assert small.head.out_features == 4
    own = sum(p.numel() for s in net.settings for p in s.parameters())
    assert count_parameters(net) == own + count_parameters(model)  # W is stored once


def test_6_only_the_centre_tap_changes_and_other_kernels_are_refused() -> None:
    net = disturb(adapted()).eval()
    small = net.fuse()
    changed = small.stages[0][0].conv1.weight - net.model.stages[0][0].conv1.weight
    outer = changed.clone()
    outer[:, :, 1, 1] = 0
    assert outer.abs().max() == 0
    assert changed[:, :, 1, 1].abs().min() > 0
    for kernel in (2, (3, 1)):
        model = nn.Sequential(nn.Conv2d(1, 4, kernel), nn.Flatten(), nn.LazyLinear(3))
        model(torch.randn(2, 1, 8, 8))
        with pytest.raises(ValueError, match=r"targets: '0' is Conv2d.*odd kernel"):
            PruningAdapters(model, torch.randn(2, 1, 8, 8))


@given(
    k=st.sampled_from([1, 3, 5]), stride=st.integers(1, 3), padding=st.sampled_from([0, 1, 2, 3, "same", "valid"]),
    dilation=st.integers(1, 2), size=st.integers(9, 12),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_6_the_parallel_path_is_the_centre_tap(
    k: int, stride: int, padding: int | str, dilation: int, size: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, k, 1 if padding == "same" else stride, padding, dilation)
    adapter = SPLoRA(4, 2, 2, init_range=1.0)
    x = torch.randn(3, 2, size, size)
    fused = copy.deepcopy(conv)
    fused.weight.data = _add_to_centre(conv.weight, adapter.delta())
    for value in (x, x[0]):
        assert torch.allclose(conv(value) + _parallel(conv, adapter.factors(), value), fused(value), atol=1e-5)
    line = nn.Conv1d(2, 4, k, padding=k // 2)
    fused_line = copy.deepcopy(line)
    fused_line.weight.data = _add_to_centre(line.weight, adapter.delta())
    assert torch.allclose(
        line(x[..., 0]) + _parallel(line, adapter.factors(), x[..., 0]), fused_line(x[..., 0]), atol=1e-5
    )


def test_7_the_start_is_nearly_and_with_zero_factors_exactly_the_base() -> None:
    model, (x, _) = base().eval(), batch()
    expected = model(x)
    net = adapted(model=model).eval()
    for name in net._adapted:
        adapter = net._setting().adapter(name)
        rank, n_in = adapter.rows.shape
        assert adapter.rows.abs().max() <= 1 / math.sqrt(rank * n_in)
        assert adapter.cols.abs().max() <= 1e-4
        assert adapter.delta().abs().max() <= rank * 1e-4 / math.sqrt(rank * n_in)
    assert 0 < (net(x) - expected).abs().max() < 1e-2
    assert torch.equal(adapted(model=model, init_range=0.0).eval()(x), expected)
    half = PruningAdapters(model, x, rank=0.25)
    assert half._setting().adapter("stages.1.0.conv1").cols.shape == (12, 3)


def test_8_full_rank_reaches_any_weight() -> None:
    torch.manual_seed(0)
    weight, target = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(target - weight, full_matrices=False)
    adapter = SPLoRA(6, 4, 4).double()
    with torch.no_grad():
        adapter.cols.copy_(u * s)
        adapter.rows.copy_(vh)
    assert torch.allclose(_add_to_centre(weight, adapter.delta()), target, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_9_what_was_removed_stays_away_under_momentum_and_decay(kind: str) -> None:
    net, (x, y) = adapted(kind), batch()
    net.train()
    optimizer = torch.optim.AdamW(net.parameter_groups(0.1), 0.05)
    net.attach_optimizer(optimizer)
    for step in range(6):
        optimizer.zero_grad()
        net.loss((x, y)).backward()
        optimizer.step()
        if step == 2:
            net.prune(0.4)
            kept = dict(net._setting().kept)
            # A fresh state for what shrank: the old one has the old shapes.
            assert not any(optimizer.state.get(p) for p in net._setting().parameters())
    assert net._setting().kept == kept
    net.eval()
    with torch.no_grad():
        assert torch.allclose(masked(net)(x), net(x), atol=1e-4, rtol=1e-4)
    for name, channels in kept.items():
        group = next(g for g in net.slicing.groups if g.name == name)
        assert len(channels) < group.channels
    assert all(len(optimizer.state[p]) > 0 for p in net._setting().parameters() if p.grad is not None)


def test_10_block_adapters_are_kronecker_products_with_shared_prototypes() -> None:
    net, x, y = mlp(kind="splopa", block=(2, 2), prototypes=3, prototype_rank=2, init_range=0.5)
    assert net.blocks is not None
    prototypes = net.blocks()
    assert prototypes.shape == (3, 2, 2)
    for name in net._adapted:
        adapter = net._setting().adapter(name)
        by_hand = sum(torch.kron(s, pi) for s, pi in zip(adapter.S, prototypes, strict=True))
        assert torch.allclose(adapter.delta(prototypes), by_hand, atol=1e-6)
    assert sum(1 for n, _ in net.named_parameters() if n.startswith("blocks.")) == 2  # not once for each layer
    s = sum(net._setting().adapter(n).S.numel() for n in net._adapted)
    assert net.learned_numbers() == s + 3 * (2 * 2 + 2 * 2) + 10 + 8 + (8 * 3 + 3)
    steps(net, (x, y))
    gone = net.prune(0.5, [(x, y)])
    assert gone == round(0.5 * (5 * 6 + 4 * 5))
    left = 5 * 6 + 4 * 5 - gone  # what is masked is neither stored nor counted
    assert net.learned_numbers() == 3 * left + 3 * (2 * 2 + 2 * 2) + 10 + 8 + (8 * 3 + 3)
    steps(net, (x, y))
    net.eval()
    small = net.fuse()
    for name, layer in (("0", small[0]), ("2", small[2])):
        mask = net._setting().adapter(name).spread((2, 2))
        assert not mask.all()
        assert (layer.weight[~mask] == 0).all()
        assert (net._setting().adapter(name).delta(net.blocks())[~mask] == 0).all()
    assert net.point == Point(task="task", density=0.5)
    assert torch.equal(small(x), net(x))


def test_10_zero_blocks_become_block_sparse_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))
    x = torch.randn(64, 512)
    net = PruningAdapters(model, x, kind="splopa", prototypes=2, score="weight")
    net.prune(0.95)
    net.eval()
    small = net.extract(net.point, sparse=True)
    assert isinstance(small[0], BlockSparseLinear)
    assert "32x32" in small.layouts["0"]
    assert torch.allclose(small(x), net(x), atol=1e-4)


@pytest.mark.parametrize("score", ["taylor", "gradient", "lrp"])
def test_11_scores_do_not_see_the_scale_of_a_layer(score: str) -> None:
    net, (x, y) = disturb(adapted()), batch()
    once = net.score_layers([(x, y)], score)
    net.criterion = lambda out, target: 7.0 * nn.functional.cross_entropy(out, target)
    again = net.score_layers([(x, y)], score)
    for name, value in once.items():
        assert torch.allclose(value, again[name], rtol=1e-4)
        total = value.sum() if score == "lrp" else value.norm()
        assert float(total) == pytest.approx(1.0)
    assert all(p.grad is None for p in net.parameters())


def test_11_scores_by_hand() -> None:
    net, x, y = mlp(rank=2, init_range=0.5)
    net.eval()
    weight = net.fuse()[0].weight
    by_weight = net.score_layers(score="weight")["0"]
    assert torch.allclose(by_weight, (weight.abs().sum(1) / weight.abs().sum()).double(), rtol=1e-5)
    model = net.fuse()
    hidden = model[0](x).detach().requires_grad_()
    prediction = model[1:](hidden)
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(prediction, y), hidden, retain_graph=True)
    for kind, value in (("gradient", grad), ("taylor", grad * hidden)):
        expected = value.mean(0).abs().double()
        assert torch.allclose(net.score_layers([(x, y)], kind)["0"], expected / expected.norm(), rtol=1e-4)
        parted = [(x[:2], y[:2]), (x[2:], y[2:])]
        parts = [nn.functional.cross_entropy(model[1:](h), t) for h, t in ((hidden[:2], y[:2]), (hidden[2:], y[2:]))]
        grads = [torch.autograd.grad(p, hidden, retain_graph=True)[0] for p in parts]
        halves = [
            (g[rows] * (hidden[rows] if kind == "taylor" else 1)).mean(0).double()
            for g, rows in zip(grads, (slice(0, 2), slice(2, 5)), strict=True)
        ]
        # The reference drops the sign when all batches are summed up; "batch" after each of them.
        for absolute, total in (
            ("reference", (halves[0] + halves[1]).abs()),
            ("batch", halves[0].abs() + halves[1].abs()),
        ):
            net.absolute = absolute
            assert torch.allclose(net.score_layers(parted, kind)["0"], total / total.norm(), rtol=1e-4)
        assert not torch.allclose((halves[0] + halves[1]).abs(), halves[0].abs() + halves[1].abs())
    (relevance,) = torch.autograd.grad(prediction.gather(1, y[:, None]).sum(), hidden)
    each = (relevance * hidden).double()
    for absolute, expected in (("reference", each.abs().sum(0)), ("batch", each.mean(0).abs())):
        net.absolute = absolute
        found = net.score_layers([(x, y)], "lrp")["0"]
        assert torch.allclose(found, expected / expected.sum(), rtol=1e-4)


def test_11_layers_in_front_of_all_that_learns_are_scored_too() -> None:
    net, (x, y) = adapted(targets=("stages.1.*",), head=("head",)), batch()
    net.train()
    net.loss((x, y)).backward()
    assert set(net.score_layers()) == set(net.score_layers([(x, y)])) == set(net._scored())
    assert "stem.0" in net._scored()
    assert net.prune(0.3) > 0


def test_11_training_sums_up_the_scores_of_the_last_epoch() -> None:
    net, x, y = mlp(rank=2, init_range=0.5)
    net.train()  # no norm and no dropout: training and evaluation agree
    for _ in range(2):
        net.loss((x, y)).backward()
    net.epoch_end(None)
    found = net.score_layers()
    expected = net.score_layers([(x, y)])
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-3)
    net.loss((x[:2], y[:2])).backward()  # the next epoch has begun
    assert torch.equal(net.score_layers()["0"], found["0"])
    with pytest.raises(RuntimeError, match="no training step"):
        net.prune(score="gradient")
    with pytest.raises(ValueError, match="score: 'size'"):
        net.score_layers([(x, y)], "size")


@pytest.mark.parametrize("score", ["taylor", "gradient", "weight", "lrp"])
def test_11_exactly_the_lowest_channels_go_and_the_last_of_a_layer_stays(score: str) -> None:
    net, (x, y) = disturb(adapted()), batch()
    total = sum(g.channels for g in net.slicing.groups)
    left = total
    while left > len(net.slicing.groups):
        scores = net.score_layers([(x, y)], score)
        before = {g.name: set(net._setting().kept.get(g.name, range(g.channels))) for g in net.slicing.groups}
        wanted = min(round(0.15 * total), left - len(net.slicing.groups))
        gone = net.prune(0.15, [(x, y)], score=score)
        left -= gone
        assert gone == wanted
        after = {g.name: set(net._setting().kept.get(g.name, range(g.channels))) for g in net.slicing.groups}
        assert all(after[n] and after[n] <= before[n] for n in before)
        # In groups with one writer: no channel that went scored above one that stayed, but the last of a layer.
        lone = {g.name: net._writers(g)[0][0] for g in net.slicing.groups if len(net._writers(g)) == 1}
        values = {}
        for name, layer in lone.items():
            for c, value in zip(sorted(before[name]), scores[layer].tolist(), strict=True):
                values[name, c] = value
        went = [v for (n, c), v in values.items() if c not in after[n]]
        stayed = [v for (n, c), v in values.items() if c in after[n] and len(after[n]) > 1]
        if went and stayed:
            assert max(went) <= min(stayed)
    assert net.prune(0.5, [(x, y)], score=score) == 0
    assert all(len(c) == 1 for c in net._setting().kept.values())
    assert net.eval()(x).shape == (6, 10)


def test_12_gradients_match_finite_differences_and_the_base_has_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    x, y = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    net = PruningAdapters(model, x, rank=2, init_range=0.3).train()
    adapter = net._setting().adapter("0")

    def loss(rows: Tensor, cols: Tensor) -> Tensor:
        adapter.rows.data, adapter.cols.data = rows.data, cols.data
        return net.loss((x, y))

    net.loss((x, y)).backward()
    for p in (adapter.rows, adapter.cols):
        found = p.grad.clone()
        numeric = torch.zeros_like(p)
        for i in range(p.numel()):
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * 1e-6
                    numeric.view(-1)[i] += sign * net.loss((x, y)) / 2e-6
                    p.view(-1)[i] -= sign * 1e-6
        assert torch.allclose(found, numeric, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())


# -- the contract ---------------------------------------------------------------------------------------------------


def test_fit_adapts_prunes_in_rounds_and_keeps_the_densities_that_were_asked_for(tmp_path: Any) -> None:
    x, y = batch(24)
    net = adapted(density=(1.0, 0.7, 0.5), step=0.1, adapt=0.25)
    train = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    fit(net, train, epochs=8, lr=0.05, progress=False)
    found = [p["density"] for p in net.points()]
    assert found == pytest.approx([0.5, 0.7, 1.0], abs=0.02)
    assert net.point == net.points()[0]
    net.eval()
    front = measure(net, [(x, y)])
    assert [r.point for r in front] == net.points()
    assert front.rows[0].flops < front.rows[1].flops < front.rows[2].flops
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", model=base(), example=batch()[0]).eval()
    assert again.points() == net.points()
    for point in net.points():
        with torch.no_grad():
            assert torch.equal(again.use(point)(x), net.use(point)(x))
            assert torch.equal(net.extract(point)(x), net(x))


@pytest.mark.parametrize("kind", [*KINDS, "splopa"])
def test_a_task_file_holds_the_adapter_alone_and_loads_into_the_same_base(kind: str, tmp_path: Any) -> None:
    if kind == "splopa":
        net, x, y = mlp(kind=kind, block=(2, 2), prototypes=3)
        other = mlp(kind=kind, block=(2, 2), prototypes=3)[0]
    else:
        net, (x, y) = adapted(kind), batch()
        other = adapted(kind)
    steps(net, (x, y))
    net.prune(0.3, [(x, y)])
    steps(net, (x, y))
    path = net.save_task(tmp_path / "task.safetensors")
    stored = safetensors.torch.load_file(path)
    buffers = sum(t.numel() for n, t in net._setting().own().items() if "running_" in n)  # of the norms
    numbers = sum(t.numel() for t in stored.values() if t.dtype is torch.float32)
    if kind != "splopa":
        assert numbers == net.learned_numbers() + buffers
        assert set(net.model.state_dict()).isdisjoint(stored)  # none of the base's own tensors
    net.eval()
    with torch.no_grad():
        assert torch.equal(other.eval().load_task(path)(x), net(x))
        renamed = other.load_task(path, name="again")
        assert renamed.point == Point(task="again", density=net.point["density"])
        assert torch.equal(renamed(x), net(x))
    assert [p.name for p in tmp_path.iterdir()] == ["task.safetensors"]


def test_damaged_and_foreign_task_files_are_refused(tmp_path: Any) -> None:
    net = adapted()
    path = net.save_task(tmp_path / "a")
    content = path.read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "foreign")
    for bad in ("cut", "foreign"):
        with pytest.raises(ValueError, match="no task file of pliant, or it is damaged"):
            net.load_task(tmp_path / bad)
    with pytest.raises(ValueError, match="made for another network"):
        PruningAdapters(SmallResNet(widths=(8, 16), blocks=2), batch()[0], rank=3).load_task(path)
    with pytest.raises(ValueError, match="made for another network"):
        adapted("sppara").load_task(path)
    tensors = safetensors.torch.load(content)
    later = {"pliant": json.dumps({"format": 99})}
    (tmp_path / "later").write_bytes(safetensors.torch.save(tensors, later))
    with pytest.raises(ValueError, match="format 99"):
        net.load_task(tmp_path / "later")


def test_copies_are_independent_and_statistics_belong_to_the_task() -> None:
    net, (x, y) = adapted(), batch()
    other = copy.deepcopy(net)
    steps(net, (x, y))
    own = net._setting().own()
    name = "stages.0.0.norm1.running_mean"
    assert not torch.equal(own[name], net.model.get_buffer(name))
    assert torch.equal(other._setting().own()[name], net.model.get_buffer(name))
    net.add_task("second")
    assert torch.equal(net._setting().own()[name], net.model.get_buffer(name))


def test_depthwise_and_grouped_convolutions_are_adapted_fused_and_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 3),
    )  # fmt: skip
    x, y = batch()[0], torch.tensor([0, 1, 2, 0, 1, 2])
    net = PruningAdapters(model, x, rank=2)
    assert net._setting().adapter("4").rows.shape == (2, 2)
    steps(net, (x, y))
    net.prune(0.3, [(x, y)])
    steps(net, (x, y))
    net.eval()
    small = net.fuse()
    with torch.no_grad():
        assert torch.equal(small(x), net(x))
    assert small[3].groups == small[0].out_channels
    assert small[4].in_channels * 4 == small[4].groups * 8


def test_attention_of_a_vision_transformer_keeps_whole_heads() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=8,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    x, y = batch()
    model = transformers.ViTForImageClassification(config).eval()
    net = PruningAdapters(model, x, rank=2, targets=("*layer*",), exclude=("*patch*", "*layernorm*"))
    net.train().loss((x, y)).backward()
    net.prune(0.3, [(x, y)])
    net.eval()
    with torch.no_grad():
        assert torch.equal(net.fuse()(x).logits, net(x).logits)


def test_without_adapters_a_task_owns_all_weights_which_is_fine_pruning() -> None:
    net, (x, y) = adapted(targets=(), head=("*",)), batch()
    assert net.learned_numbers() == count_parameters(net.model)
    steps(net, (x, y))
    net.prune(0.4)
    steps(net, (x, y))
    net.eval()
    small = net.fuse()
    with torch.no_grad():
        assert torch.equal(small(x), net(x))
    assert net.learned_numbers() == count_parameters(small)
    assert not torch.equal(small.stem[0].weight[:1], net.model.stem[0].weight[:1])


# -- training that is broken off, parted, or goes wrong ---------------------------------------------------------------


def small_run(**options: Any) -> tuple[PruningAdapters, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10),
    )  # fmt: skip
    x, y = batch(12)
    net = PruningAdapters(model, x[:2], rank=2, density=(1.0, 0.8, 0.6), step=0.1, adapt=0.2, **options)
    return net, [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]


def state_of_run(net: PruningAdapters, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(p): n for n, p in net.named_parameters()}
    moments = {names[id(p)]: dict(s) for p, s in optimizer.state.items() if id(p) in names}
    return {"weights": dict(net.state_dict()), "moments": moments, "structure": net.structure(), "point": net.point}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_run_that_is_broken_off_at_any_step_goes_on_bit_by_bit(kind: str, tmp_path: Any) -> None:
    total = 6  # two epochs; prunings fall inside of them
    made: list[torch.optim.Optimizer] = []

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        options = {"momentum": 0.9} if kind == "sgd" else {}
        made.append((torch.optim.SGD if kind == "sgd" else torch.optim.Adam)(groups, lr=0.02, **options))
        return made[-1]

    def run(folder: str, stop: int | None = None) -> tuple[dict[str, Any], list[float]]:
        net, train = small_run()

        def on_step(done: int, _: int, loss: float) -> None:
            if done == stop and net.training:
                raise InterruptedError

        path = tmp_path / folder
        try:
            history = fit(net, train, steps=total, optimizer=optimizer, progress=False, checkpoint=path,
                          checkpoint_every=1, on_step=on_step)  # fmt: skip
        except InterruptedError:
            return {}, []
        return state_of_run(net, made[-1]), history.losses

    whole, losses = run("whole")
    assert len(whole["structure"]["settings"]) == 3
    assert whole["point"]["density"] == pytest.approx(0.6, abs=0.05)
    for stop in range(2, total + 1):
        run(f"at{stop}", stop)
        again, others = run(f"at{stop}")
        assert same(again, whole)
        assert others == losses
    finished, _ = run("whole")  # a finished run, loaded again
    assert same(finished | {"moments": {}}, whole | {"moments": {}})


def test_pruning_inside_a_loop_that_keeps_the_last_loss_alive() -> None:
    net, (x, y) = adapted(), batch()
    net.train()
    optimizer = torch.optim.Adam(net.parameter_groups(), 0.01)
    net.attach_optimizer(optimizer)
    before = {n: (id(p), p.shape) for n, p in net.named_parameters()}
    losses = []
    for step in range(6):
        loss = net.loss((x, y))
        losses.append(loss)  # with its graph
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
        if step % 2:
            assert net.prune(0.1) > 0
    assert {n: (id(p), p.shape) for n, p in net.named_parameters()} == before  # no tensor was exchanged or reshaped
    kept = net._setting().kept
    values = {n: p.detach().clone() for n, p in net._setting().named_parameters()}
    optimizer.zero_grad()
    net.loss((x, y)).backward()
    for name, index in net._setting().index.items():
        grad = getattr(net._setting(), net._setting().names[name]).grad
        if grad is not None:
            for dim, at in index.items():
                gone = torch.ones(grad.shape[dim], dtype=torch.bool)
                gone[at] = False
                assert not grad.movedim(dim, 0)[gone].any()  # what was removed has no part in the loss
    assert net._setting().kept == kept
    assert all(torch.equal(values[n], p) for n, p in net._setting().named_parameters())


def _process(rank: int, port: int, folder: str) -> None:
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    net, train = small_run()

    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, data: tuple[Tensor, Tensor]) -> Tensor:
            return self.net.loss(data)

    parallel = nn.parallel.DistributedDataParallel(Objective(), find_unused_parameters=True)
    optimizer = torch.optim.Adam(net.parameter_groups(), 0.02)
    net.attach_optimizer(optimizer)
    net.train()
    for step in range(12):
        net.schedule(step / 12)
        optimizer.zero_grad()
        x, y = train[step % 3]
        loss = parallel((x[rank::2], y[rank::2]))  # it stays alive while the next pruning is made
        loss.backward()
        optimizer.step()
        if step % 3 == 2:
            net.epoch_end(None)
    torch.save({"kept": net._setting().kept, "learned": dict(net._setting().named_parameters())}, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_prune_the_same_channels_and_hold_the_same_weights(tmp_path: Any) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=False) for rank in (0, 1))
    assert first["kept"] == second["kept"]
    assert sum(map(len, first["kept"].values())) < 11
    assert same(first["learned"], second["learned"])


@pytest.mark.parametrize("kind", [*KINDS, "splopa"])
def test_four_threads_at_a_fixed_point_get_the_answers_of_one(kind: str) -> None:
    if kind == "splopa":
        net, x, y = mlp(kind=kind, block=(2, 2), prototypes=3)
    else:
        net, (x, y) = adapted(kind), batch()
    net.prune(0.3, [(x, y)])
    net.eval()
    inputs = [torch.randn_like(x) for _ in range(4)]
    with torch.no_grad():
        expected = [net(v) for v in inputs]
    copied = copy.deepcopy(net)  # has made no network of its own yet

    def work(i: int) -> list[Tensor]:
        with torch.set_grad_enabled(i % 2 == 0):
            return [copied(inputs[i]).detach() for _ in range(25)]

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(work, range(4))):
            assert all(torch.equal(f, expected[i]) for f in found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_answers_as_the_plain_one_at_every_point(backend: str) -> None:
    net, x, y = mlp(rank=2)
    net.prune(0.2, [(x, y)], keep=True)
    net.eval()
    compiled = torch.compile(net, backend=backend)
    for point in [*net.points(), *net.points()[::-1]]:
        net.use(point)
        with torch.no_grad():
            assert torch.equal(compiled(x), net(x))


def test_the_network_follows_a_change_of_precision() -> None:
    net, (x, y) = adapted(), batch()
    net.train().loss((x, y)).backward()
    net.double()
    net.zero_grad()
    net.prune(0.2, [(x.double(), y)], keep=True)
    assert net.example.dtype is torch.float64
    net.loss((x.double(), y)).backward()
    net.eval()
    for point in net.points():
        with torch.no_grad():
            small = net.extract(point, sparse=True)
            assert torch.equal(small(x.double()), net.use(point)(x.double()))
    assert net.float().example.dtype is torch.float32


def test_an_error_in_the_criterion_leaves_the_network_as_it_was() -> None:
    net, (x, y) = disturb(adapted()), batch()
    net.train()

    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise ArithmeticError("no loss")

    net.criterion = fails
    before, structure = copy.deepcopy(net.state_dict()), net.structure()
    for run in (
        lambda: net.prune(0.2, [(x, y)], keep=True),
        lambda: net.score_layers([(x, y)]),
        lambda: net.eval().loss((x, y)),
        lambda: net.train().loss((x, y)),
    ):
        with pytest.raises(ArithmeticError):
            run()
        assert not any(m._forward_hooks for m in net.modules())
        norms = {n for n in before if "own" in n}  # a forward pass in training mode moves the norms' statistics
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items() if n not in norms or not net.training)
        assert net.structure() == structure
    assert net.training
    net.criterion = None
    assert net.prune(0.2, [(x, y)]) > 0


# -- layers of other kinds ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, split: bool = False) -> None:
        super().__init__()
        sizes = {"kdim": 6, "vdim": 5} if split else {}
        self.embed, self.memory = nn.Linear(6, 8), nn.Linear(6, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
        self.split, self.head = split, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        y = self.attention(h, x, self.memory(x))[0] if self.split else self.attention(h, h, h)[0]
        return self.head((h + y).mean(1))


@pytest.mark.filterwarnings("ignore:model")
@pytest.mark.parametrize("split", [False, True])
def test_the_projections_of_an_attention_have_adapters_of_their_own(split: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Attention(split), torch.randn(4, 5, 6), torch.tensor([0, 1, 2, 0])
    net = PruningAdapters(model, x, rank=2, init_range=0.5)
    names = [f"attention.{piece}" for piece in ("q", "k", "v", "out_proj")]
    assert set(names) <= set(net._adapted)
    net.train().loss((x, y)).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n in names for p in net._setting().adapter(n).parameters()
    )
    net.eval()
    small = net.fuse()
    deltas = [net._setting().delta(n) for n in names]
    attention = model.attention
    if split:
        pairs = [(f"{letter}_proj_weight", d) for letter, d in zip("qkv", deltas, strict=False)]
    else:
        pairs = [("in_proj_weight", torch.cat(deltas[:3]))]
    for name, delta in pairs:
        assert torch.allclose(getattr(small.attention, name), getattr(attention, name) + delta)
    assert torch.allclose(small.attention.out_proj.weight, attention.out_proj.weight + deltas[3])
    assert (net.prune(0.3, [(x, y)]) > 0) is not split  # keys of a width of their own hold all channels fast
    with torch.no_grad():
        assert torch.equal(net.fuse()(x), net(x))
    only = PruningAdapters(Attention(split), x, rank=2, targets=("attention.q",))
    assert list(only._adapted) == ["attention.q"]


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [1, 3])
def test_gradients_under_every_kind_of_padding_are_those_of_finite_differences(mode: str, padding: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=padding, padding_mode=mode), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(12, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(3, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2])
    net = PruningAdapters(model, x, rank=1, init_range=0.5)
    net.train().loss((x, y)).backward()
    adapter = net._setting().adapter("0")
    for p in (adapter.rows, adapter.cols):
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * 1e-6
                    ends.append(net.eval().loss((x, y)).item())  # of the fused weight, an independent path
                    p.view(-1)[i] -= sign * 1e-6
            assert float(p.grad.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)


def test_a_network_whose_channels_all_have_to_stay_is_adapted_all_the_same() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)
    )
    x, y = torch.randn(4, 16, 6, 6), torch.tensor([0, 1, 2, 0])
    with pytest.warns(UserWarning, match="it is adapted, and stays at density 1"):
        net = PruningAdapters(model, x, rank=1, score="weight", density=(1.0, 0.5))
    fit(net, [(x, y)] * 2, epochs=2, lr=0.05, progress=False)
    assert net.points() == [Point(task="task", density=1.0)]
    assert net.prune(0.5) == 0
    with torch.no_grad():
        assert torch.equal(net.fuse()(x), net(x))
        assert not torch.equal(net(x), model(x))


def test_a_rank_is_bounded_by_the_layer() -> None:
    net = mlp(rank=1_000_000)[0]
    assert [tuple(f.shape) for f in net._setting().factors("0")] == [(10, 12), (10, 10)]
    with pytest.raises(ValueError, match="rank: 1000000000"):
        mlp(rank=10**9)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lora"}, "kind: 'lora'"),
        ({"score": "size"}, "score: 'size'"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": 2.5}, "rank: 2.5"),
        ({"init_range": -1.0}, "init_range: -1.0"),
        ({"density": ()}, r"density: \(\)"),
        ({"density": (0.5, 1.0)}, "descending"),
        ({"density": (1.0, 0.0)}, "density"),
        ({"adapt": 1.0}, "adapt: 1.0"),
        ({"step": 0.0}, "step: 0.0"),
        ({"block": (0, 2)}, "block"),
        ({"targets": ("nothing",)}, "targets: 'nothing' matches no Conv or Linear"),
        ({"head": ("nothing",)}, "head: 'nothing' matches no Conv or Linear"),
        ({"targets": ("head",)}, "leaves no layer for kind='splora'"),
        ({"kind": "splopa"}, "leaves no layer for kind='splopa'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningAdapters(base(), batch()[0], **options)


def test_other_bad_input() -> None:
    net, (x, y) = adapted(), batch()
    with pytest.raises(TypeError, match=r"targets: .*sequence of names or patterns"):
        adapted(targets="conv")
    with pytest.raises(ValueError, match="no batches"):
        net.prune(data=[])
    with pytest.raises(RuntimeError, match="give data="):
        net.prune()
    with pytest.raises(ValueError, match=r"step: 1.5"):
        net.prune(1.5, [(x, y)])
    with pytest.raises(ValueError, match="no group 'nothing'"):
        net.set_kept({"nothing": [0]})
    name = net.slicing.groups[0].name
    net.set_kept({name: [1, 2]})
    with pytest.raises(ValueError, match="has lost"):
        net.set_kept({name: [0, 1]})
    with pytest.raises(ValueError, match="some of its channels"):
        net.set_kept({name: []})
    net.add_task("two")
    with pytest.raises(ValueError, match="there is a task 'two' already"):
        net.add_task("two")
    with pytest.raises(ValueError, match="point"):
        net.use(Point(task="three", density=1))
    with pytest.raises(ValueError, match=r"block: \(32, 32\) does not divide '0'"):
        mlp(kind="splopa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="rank: 9"):
            mlp(rank=9)
    net.criterion = lambda out, target: out.sum() * float("nan")
    with pytest.raises(ValueError, match="not finite"):
        net.prune(0.1, [(x, y)])
    assert isinstance(SPLoPA(4, 4, 1, (2, 2)).mask, Tensor)
