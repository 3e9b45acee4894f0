"""The specification's exact properties 1-12 by number, then finding layers, bad input, the life cycle and storage."""

from __future__ import annotations

import contextlib
import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pliant import catalog
from pliant.core.cost import count_flops, flops_per_sample
from pliant.core.dynamic import NotStaticError, Point
from pliant.core.frontier import measure
from pliant.core.persistence import load, save
from pliant.core.training import fit
from pliant.sparsity import ftwt
from pliant.sparsity.ftwt import DENSE, FTWT, mask_loss, masked_macs, mass_labels, peaks, uniform_labels
from pliant.tasks.images import SmallResNet

PEAKS = torch.tensor([[5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9]])


def settled(model: nn.Module, shape: tuple[int, ...] = (1, 8, 8)) -> nn.Module:
    """The model with norm statistics and affine weights of its own."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
                m.weight.copy_(torch.rand(m.weight.shape, generator=rng) + 0.5)
                m.bias.copy_(torch.randn(m.bias.shape, generator=rng) * 0.5)
        model.train()
        for _ in range(5):
            model(torch.randn(64, *shape, generator=rng) * 2 + 1)
    return model.eval()


def cnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settled(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, 1, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )


def separable(multiplier: int = 1) -> nn.Module:
    """Pointwise, depthwise (conv-norm-relu6), grouped, and a convolution whose activation is not 0 at 0."""
    torch.manual_seed(1)
    m = 6 * multiplier
    return settled(
        nn.Sequential(
            nn.Conv2d(1, 6, 1),
            nn.BatchNorm2d(6),
            nn.ReLU6(),
            nn.Conv2d(6, m, 3, 1, 1, groups=6, bias=False),
            nn.BatchNorm2d(m),
            nn.ReLU6(),
            nn.Conv2d(m, 8, 3, 2, 1, groups=2),
            nn.BatchNorm2d(8),
            nn.Sigmoid(),
            nn.Conv2d(8, 4, 1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        )
    )


def resnet() -> nn.Module:
    torch.manual_seed(2)
    return settled(SmallResNet(widths=(4, 6), blocks=1, stem_stride=1, classes=5))


MODELS = {"cnn": cnn, "separable": separable, "multiplier": lambda: separable(2), "resnet": resnet}


def images(n: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def batch(n: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = images(n, seed)
    return x, (x.mean((1, 2, 3)) * 10).round().long().remainder(5)


def make(name: str = "cnn", **options: Any) -> FTWT:
    return FTWT(MODELS[name](), images(2), **options).eval()


def random_masks(net: FTWT, rows: int, seed: int = 0, share: float = 0.5) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    found = []
    for head in net.heads:
        mask = torch.rand(rows, head.out_features, generator=rng) < share
        mask[torch.arange(rows), torch.randint(head.out_features, (rows,), generator=rng)] = True
        found.append(mask)
    return found


def ones(net: FTWT, rows: int) -> list[Tensor]:
    return [torch.ones(rows, h.out_features, dtype=torch.bool) for h in net.heads]


def kept(mask: Tensor) -> set[int]:
    return set(mask[0].nonzero().squeeze(1).tolist())


# -- 1, 2: labels -------------------------------------------------------------------------------------------------


def test_1_worked_example() -> None:
    assert kept(mass_labels(PEAKS, 0.95)) == {3, 1, 0, 5}
    z = PEAKS / PEAKS.sum()
    assert z[0, [3, 1, 0, 5]].sum().item() == pytest.approx(0.88, abs=0.002)
    assert kept(mass_labels(PEAKS, 0.5)) == {3}
    assert z[0, 3].item() == pytest.approx(0.302, abs=5e-4)
    assert z[0, [3, 1]].sum().item() == pytest.approx(0.579, abs=5e-4)
    assert kept(mass_labels(PEAKS, 0.30)) == {3}  # the guard
    assert kept(mass_labels(PEAKS, 1.0)) == set(range(7))


def test_1_own_value_is_included_with_the_slack() -> None:
    a = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert kept(mass_labels(a, 0.7)) == {0, 1}  # 0.7 exactly, up to rounding
    assert kept(mass_labels(a, 0.69)) == {0}
    assert kept(mass_labels(torch.tensor([[0.4, 0.300005, 0.299995]]), 0.7)) == {0, 1}  # 0.700005: within the slack


def test_1_uniform_mode_prunes_a_fixed_number() -> None:
    assert kept(uniform_labels(PEAKS, 0.5)) == {3, 1, 0, 5}  # floor(3.5) = 3 of 7 go
    assert uniform_labels(torch.arange(1.0, 11.0)[None], 0.9).sum() == 9  # 1 - 0.9 is not 0.1 in binary
    dead = torch.tensor([[1.0, 0.0, 1e-6, 2.0]])
    assert kept(uniform_labels(dead, 1.0)) == {0, 3}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.sampled_from([0.25, 2.0, 1024.0]))
def test_2_labels_scale_sign_place_and_order(seed: int, r: float, c: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    o = torch.randn(3, 9, 4, 4, generator=rng)
    g = mass_labels(peaks(o), r)
    assert torch.equal(mass_labels(peaks(o * c), r), g)
    assert torch.equal(mass_labels(peaks(-o), r), g)
    places = torch.randperm(16, generator=rng)
    assert torch.equal(mass_labels(peaks(o.flatten(2)[..., places].view_as(o)), r), g)
    order = torch.randperm(9, generator=rng)
    assert torch.equal(mass_labels(peaks(o[:, order]), r), g[:, order])
    assert g.sum(1).min() >= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.sampled_from([0.0, 1e-5]))
def test_2_labels_nest(seed: int, r1: float, r2: float, delta: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    a = torch.rand(4, 40, generator=rng) ** 12  # a long tail of channels near nothing
    a[:, ::7] = 0
    small, large = (mass_labels(a, r, delta) for r in sorted((r1, r2)))
    assert not (small & ~large).any()
    assert not (large & ~mass_labels(a, 1.0, delta)).any()


def test_2_nothing_fires_and_one_fires_alone() -> None:
    assert kept(mass_labels(torch.zeros(1, 5), 0.9)) == {0}
    assert kept(mass_labels(torch.tensor([[0.0, 0.0, 7.0, 0.0]]), 0.9)) == {2}  # more than r by itself: the guard
    assert not mass_labels(torch.zeros(2, 5), 1.0).isnan().any()


# -- 3: the oracle at r = 1 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_3_oracle_at_one_is_the_dense_network_bit_for_bit(name: str) -> None:
    net = make(name, mass=1.0, delta=0.0)
    with torch.no_grad():  # silence two filters for good, so that something is dropped
        norm = net.model.get_submodule(net.layers[0].norm or "")
        norm.weight[:2], norm.bias[:2] = 0.0, -1.0
        x = images(12)
        trace = net.trace(x, "labels")
        assert not trace.masks[0][:, :2].any()
        assert torch.equal(trace.output, net.model(x))


# -- 4: gradients -----------------------------------------------------------------------------------------------------


def gradients(net: FTWT, part: str) -> tuple[dict[str, float], dict[str, float]]:
    """Sums of |gradient| of the mask loss or the criterion, for the network's tensors and for the heads'."""
    net.zero_grad()
    x, y = batch()
    trace = net.train().trace(x, labels=True)
    loss = mask_loss(trace.scores, trace.labels) if part == "mask" else F.cross_entropy(trace.output, y)
    loss.backward()

    def sums(module: nn.Module) -> dict[str, float]:
        return {n: 0.0 if p.grad is None else p.grad.abs().sum().item() for n, p in module.named_parameters()}

    return sums(net.model), sums(net.heads)


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_4_decoupled_gradients_do_not_meet(name: str) -> None:
    net = make(name, mode="decoupled")
    network, heads = gradients(net, "mask")
    assert not any(network.values())
    assert all(value > 0 for n, value in heads.items() if n.endswith("bias"))
    network, heads = gradients(net, "criterion")
    assert not any(heads.values())
    assert any(network.values())


def test_4_joint_reaches_the_features_and_the_criterion_still_no_head() -> None:
    net = make("cnn", mode="joint")
    network, _ = gradients(net, "mask")
    assert network["0.weight"] > 0  # before the heads of layers 2 and 3
    assert network["3.weight"] > 0
    assert network["7.weight"] == 0  # after the last head's input
    assert network["11.weight"] == 0
    _, heads = gradients(net, "criterion")
    assert not any(heads.values())


def test_4_a_filter_masked_for_the_whole_batch_gets_no_gradient() -> None:
    net = make()
    x, y = batch()
    masks = ones(net, 16)
    masks[0][:, 2] = masks[1][:, 5] = False
    net.train()
    F.cross_entropy(net.trace(x, masks).output, y).backward()
    for conv, norm, c in ((0, 1, 2), (3, 4, 5)):
        for tensor in (net.model[conv].weight, net.model[norm].weight, net.model[norm].bias):  # type: ignore[index]
            assert not tensor.grad[c].any()
            assert tensor.grad.any()


# -- 5: the sum of losses ---------------------------------------------------------------------------------------------


def test_5_mask_loss_of_zero_scores() -> None:
    net = make()
    sizes = [h.out_features for h in net.heads]
    labels = random_masks(net, 7)
    zero = [torch.zeros(7, c) for c in sizes]
    expected = math.log(2) * sum(sizes) / len(sizes)
    assert mask_loss(zero, labels).item() == pytest.approx(expected, rel=1e-6)
    for head in net.heads:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    net.mask_weight = 3.0
    x, y = batch()
    net.train()
    total = net.loss((x, y)).item()
    net.cooling = True
    assert total - net.loss((x, y)).item() == pytest.approx(3 * expected, rel=1e-4)


def test_5_normalisation_by_hand() -> None:
    p = [torch.randn(4, 3), torch.randn(4, 5)]
    g = [torch.rand(4, 3) < 0.5, torch.rand(4, 5) < 0.5]
    by_hand = 0.0
    for scores, labels in zip(p, g, strict=True):
        for c in range(scores.shape[1]):
            q = scores[:, c].sigmoid()
            by_hand += float(-torch.where(labels[:, c], q.log(), (1 - q).log()).mean()) / 2
    assert mask_loss(p, g).item() == pytest.approx(by_hand, rel=1e-5)


# -- 6: execution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["grouped", "union"])
@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_6_active_execution_is_the_masked_dense_one(name: str, execution: str) -> None:
    net = make(name, groups=3)
    for rows, share in ((1, 0.5), (1, 0.0), (9, 0.5), (9, 0.0), (9, 1.0)):  # 0.0: a single active channel
        masks = random_masks(net, rows, rows, share)
        if rows == 9:
            masks = [m[torch.arange(9) % 4] for m in masks]  # some rows have the same masks
        x = images(rows, rows)
        dense = net.trace(x, masks, execution="masked").output
        assert torch.allclose(net.trace(x, masks, execution=execution).output, dense, atol=1e-5)  # type: ignore[arg-type]


@torch.no_grad()
def test_6_masked_dense_is_what_the_equations_say() -> None:
    net = make()
    x = images(5)
    masks = random_masks(net, 5)
    y = x
    for module in net.model:  # type: ignore[union-attr]
        y = module(y)
        if isinstance(module, nn.ReLU):
            y = y * masks.pop(0)[:, :, None, None]
    assert torch.allclose(net.trace(x, random_masks(net, 5)).output, y, atol=1e-5)


@torch.no_grad()
def test_6_a_filter_that_is_off_may_be_infinite() -> None:
    net = make()
    net.model[1].bias[2] = math.inf  # type: ignore[index]
    masks = ones(net, 2)
    masks[0][:, 2] = False
    for execution in ("masked", "grouped", "union"):
        assert net.trace(images(2), masks, execution=execution).output.isfinite().all()  # type: ignore[arg-type]


@torch.no_grad()
def test_6_with_the_norm_folded() -> None:
    plain = cnn()
    folded = copy.deepcopy(plain)
    for conv, norm in ((0, 1), (3, 4)):
        folded[conv] = nn.utils.fusion.fuse_conv_bn_eval(plain[conv], plain[norm])  # type: ignore[index, operator, call-overload]
        folded[norm] = nn.Identity()  # type: ignore[operator]
    net, other = FTWT(plain, images(2)).eval(), FTWT(folded, images(2)).eval()
    masks = random_masks(net, 6)
    for execution in ("masked", "grouped", "union"):
        a, b = (n.trace(images(6), masks, execution=execution).output for n in (net, other))  # type: ignore[arg-type]
        assert torch.allclose(a, b, atol=1e-5)


@torch.no_grad()
def test_6_predicted_masks_and_the_three_dimensions() -> None:
    for dims, conv, norm in ((1, nn.Conv1d, nn.BatchNorm1d), (3, nn.Conv3d, nn.BatchNorm3d)):
        model = nn.Sequential(conv(2, 5, 3), norm(5), nn.ReLU(), conv(5, 4, 1), nn.GELU(), nn.Flatten())
        x = torch.randn(3, 2, *[5] * dims)
        net = FTWT(model.eval(), x).eval()
        assert [layer.source for layer in net.layers] == [None, 0]
        dense = net.trace(x, execution="masked").output
        assert torch.allclose(net(x), dense, atol=1e-5)


@torch.no_grad()
def test_6_filters_that_are_off_are_not_computed() -> None:
    """The FLOPs that PyTorch dispatches at batch 1 are twice the multiply-adds counted, sample by sample."""
    for name in ("cnn", "resnet"):
        net = make(name)
        rest = net.stats(images(2))
        for seed in range(3):
            x = images(1, seed)
            trace = net.trace(x, labels=True)
            active = sum(int(net.layer_macs(k, trace)) for k in range(len(net.layers)))
            heads = sum(h.weight.numel() for h in net.heads)
            other = rest.dense_macs - sum(layer.dense_macs for layer in rest.layers)
            assert count_flops(lambda: net(x), nonzero=False).total == 2 * (active + heads + other)  # noqa: B023


@torch.no_grad()
def test_6_depthwise_filters_run_where_both_sides_are_on() -> None:
    net = make("separable")
    masks = ones(net, 1)
    masks[0][0, 3:] = False  # three inputs of the depthwise layer are on
    masks[1][0, :2] = False  # and one of their filters, beside three whose input is off
    conv = net.model[3]  # type: ignore[index]
    seen: list[int] = []
    real = F.conv2d

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is real and args[1].shape[1:] == conv.weight.shape[1:] and args[6] > 0 and args[1].shape[-1] == 3:
                seen.append(args[1].shape[0])
            return func(*args, **(kwargs or {}))

    x = images(1)
    dense = net.trace(x, masks, execution="masked").output
    with Watch():
        out = net.trace(x, masks, execution="grouped").output
    assert torch.allclose(out, dense, atol=1e-5)
    assert 1 in seen


# -- 7: counting ------------------------------------------------------------------------------------------------------


def test_7_multiply_adds() -> None:
    on = torch.ones(2, 6, dtype=torch.bool)
    assert masked_macs(on, torch.ones(2, 8, dtype=torch.bool), 1, 9, 16).tolist() == [6 * 8 * 9 * 16] * 2
    m_in = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    m_out = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    assert masked_macs(m_in, m_out, 1, 9, 16).tolist() == [3 * 2 * 9 * 16, 6 * 3 * 9 * 16]
    # depthwise: where both are on; the published count would be 2 * (3 // 6) = 0
    m_out = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
    assert masked_macs(m_in, m_out, 6, 9, 16).tolist() == [2 * 9 * 16, 1 * 9 * 16]
    # two groups of three: pairs inside a group only
    assert masked_macs(m_in, m_out, 2, 1, 1).tolist() == [2 * 2 + 1 * 1, 3 * 1]


@torch.no_grad()
def test_7_open_masks_cost_the_dense_convolutions() -> None:
    for name in MODELS:
        net = make(name, head_init="open")
        stats = net.stats(images(3))
        x = images(1)
        assert stats.dense_macs == flops_per_sample(net.model, x).total // 2
        assert [layer.macs for layer in stats.layers] == [layer.dense_macs for layer in stats.layers]
        assert stats.macs == stats.dense_macs + stats.head_macs
        assert stats.saving < 0  # nothing is left out, and the heads cost something
    net = make("cnn", head_init="open")
    pooled = 1 * 64 + 6 * 16 + 8 * 4
    assert net.stats(images(2)).head_macs == 1 * 6 + 6 * 8 + 8 * 8 + pooled


@torch.no_grad()
def test_7_the_mean_of_a_batch_is_the_mean_of_its_samples() -> None:
    net = make("separable", norm="none")
    x = images(6)
    single = [net.stats(x[i : i + 1]) for i in range(6)]
    whole = net.stats([(x[:4], None), (x[4:], None)])
    assert whole.samples == 6
    assert whole.macs == pytest.approx(sum(s.macs for s in single) / 6)
    assert whole.macs_reference == pytest.approx(sum(s.macs_reference for s in single) / 6)
    assert len({s.macs for s in single}) > 1


@torch.no_grad()
def test_7_residual_inputs_count_in_full_and_the_reference_does_not() -> None:
    net = make("resnet")
    names = [layer.name for layer in net.layers]
    assert names == ["stem.0", "stages.0.0.conv1", "stages.0.0.conv2", "stages.1.0.conv1", "stages.1.0.conv2"]
    assert [layer.source for layer in net.layers] == [None, 0, 1, None, 3]  # a sum is dense
    x = images(1)
    masks = random_masks(net, 1, 3)
    trace = net.trace(x, masks)
    n = [int(m.sum()) for m in masks]
    assert int(net.layer_macs(3, trace)) == 4 * n[3] * 9 * 16
    expected = n[0] * 1 * 9 * 64 + n[1] * n[0] * 9 * 64 + n[2] * n[1] * 9 * 64
    expected += n[3] * n[2] * 9 * 16 + n[4] * n[3] * 9 * 16
    assert net._reference_macs(trace) == expected


@torch.no_grad()
def test_7_reference_counts_a_depthwise_layer_as_free() -> None:
    net = make("separable")
    masks = ones(net, 1)
    full = net._reference_macs(net.trace(images(1), masks))
    masks[0][0, 0] = False
    less = net._reference_macs(net.trace(images(1), masks))
    depthwise = 6 * 9 * 64
    assert full - less == 1 * 64 + depthwise
    assert int(net.layer_macs(1, net.trace(images(1), masks))) == 5 * 9 * 64


# -- 8: batch norm ----------------------------------------------------------------------------------------------------


def test_8_norm_sees_what_is_not_masked() -> None:
    net = make(mass=0.5)
    x = images(16)
    before = copy.deepcopy(net.model.state_dict())
    with torch.no_grad():
        net(x)
    assert all(torch.equal(v, before[k]) for k, v in net.model.state_dict().items())  # evaluation: untouched
    masks = random_masks(net, 16)
    net.train()
    with torch.no_grad():
        net.trace(x, masks)
        first = F.conv2d(x, before["0.weight"], None, 2, 1)
        momentum = 0.1
        expected = before["1.running_mean"] * (1 - momentum) + momentum * first.mean((0, 2, 3))
        variance = before["1.running_var"] * (1 - momentum) + momentum * first.var((0, 2, 3), unbiased=True)
        assert torch.allclose(net.model.state_dict()["1.running_mean"], expected, atol=1e-6)
        assert torch.allclose(net.model.state_dict()["1.running_var"], variance, atol=1e-5)
        o = F.batch_norm(first, None, None, before["1.weight"], before["1.bias"], training=True)
        second = F.conv2d(o.relu() * masks[0][:, :, None, None], before["3.weight"], before["3.bias"], 1, 1)
        expected = before["4.running_mean"] * (1 - momentum) + momentum * second.mean((0, 2, 3))
        assert torch.allclose(net.model.state_dict()["4.running_mean"], expected, atol=1e-5)


# -- 9: forced heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_9_heads_forced_open_and_shut(name: str) -> None:
    net = make(name)
    x = images(4)
    for head in net.heads:
        head.bias.fill_(math.inf)
    assert torch.allclose(net(x), net.model(x), atol=1e-5)
    assert torch.equal(net.trace(x, execution="masked").output, net.model(x))
    for head in net.heads:
        head.bias.fill_(-math.inf)
    trace = net.trace(x)
    assert all((m.sum(1) == 1).all() for m in trace.masks)
    assert torch.isfinite(trace.output).all()
    net.train()
    assert torch.isfinite(net.trace(x).output).all()


# -- 10: cooldown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [True, False])
def test_10_heads_stand_still_after_the_cooldown(zero: bool) -> None:
    net = make(cooldown=0.5)
    # The worst case: one group for all with momentum and decay, and gradients that are zeroed instead of dropped.
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    net.train()
    frozen: list[Tensor] = []
    weight = net.model[0].weight  # type: ignore[index]
    for step in range(12):
        net.schedule(step / 12)
        if step == 6:
            frozen = [p.detach().clone() for p in net.heads.parameters()]
            network = weight.detach().clone()
        optimizer.zero_grad(set_to_none=zero)
        net.loss(batch(seed=step)).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(frozen, net.heads.parameters(), strict=True))
    assert not torch.equal(network, weight)


def test_10_a_weight_of_zero_takes_the_gradients_away() -> None:
    net = make().train()
    net.loss(batch()).backward()
    assert all(p.grad is not None for p in net.heads.parameters())
    net.zero_grad(set_to_none=False)
    net.mask_weight = 0.0
    net.loss(batch()).backward()
    assert all(p.grad is None for p in net.heads.parameters())


def test_10_in_fit_and_again_in_a_second_training() -> None:
    net = make(cooldown=0.5, head_lr=1.0)
    start = [p.detach().clone() for p in net.heads.parameters()]
    seen: dict[int, list[Tensor]] = {}

    def note(step: int, total: int, loss: float) -> None:
        seen[step] = [p.detach().clone() for p in net.heads.parameters()]

    fit(net, [batch(seed=s) for s in range(4)], epochs=2, lr=0.05, on_step=note, progress=False)
    assert not torch.equal(seen[1][0], start[0])
    assert not torch.equal(seen[4][0], seen[3][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[4], seen[8], strict=True))
    fit(net, [batch()], steps=1, lr=0.05, on_step=note, progress=False)
    assert not torch.equal(seen[1][0], seen[8][0])  # schedule(0) lets them learn again


# -- 11: batch independence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["masked", "grouped", "union"])
@pytest.mark.parametrize("name", ["cnn", "separable", "resnet"])
@torch.no_grad()
def test_11_batch_mates_do_not_matter(name: str, execution: str) -> None:
    net = make(name, norm="none", execution=execution)
    x = images(10)
    whole = net.trace(x)
    for rows in (slice(3, 4), slice(2, 7), torch.tensor([9, 0, 5])):
        part = net.trace(x[rows])
        assert all(torch.equal(a[rows], b) for a, b in zip(whole.masks, part.masks, strict=True))
        assert torch.allclose(whole.output[rows], part.output, atol=1e-5)
    assert any(len(m.unique(dim=0)) > 1 for m in whole.masks)


# -- 12: the state dict -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_12_the_dense_checkpoint_loads_strictly(name: str) -> None:
    dense = MODELS[name]().state_dict()
    net = make(name)
    own = net.state_dict()
    assert {k for k in own if k.startswith("model.")} == {f"model.{k}" for k in dense}
    assert {k.split(".")[0] for k in own} == {"model", "heads"}
    assert list(net.model.state_dict()) == list(dense)
    with torch.no_grad():
        for p in net.model.parameters():
            p.add_(1)
    assert not net.model.load_state_dict(dense, strict=True).missing_keys
    with torch.no_grad():
        assert torch.equal(net.model(images()), MODELS[name]()(images()))


def test_12_the_users_model_is_not_touched() -> None:
    model = cnn()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    net = FTWT(model, images(2))
    with torch.no_grad():
        net.eval()(images())
        expected = cnn()(images())
        assert torch.equal(model(images()), expected)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- finding layers ---------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A shared convolution, a group norm, a functional in-place activation, a shortcut, and a final convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, 1, 1)
        self.group, self.group_norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        x = torch.tanh(self.twice(x)) + torch.tanh(self.twice(x))
        x = torch.relu_(self.group_norm(self.group(x)))
        return self.last(x).mean((2, 3))


def test_finder_takes_what_can_be_gated_and_says_why_not() -> None:
    net = FTWT(Odd(), images(2))
    assert [(layer.name, layer.norm, layer.act) for layer in net.layers] == [("first", "norm", "function")]
    for name, why in (("twice", "several times"), ("group", "all channels"), ("last", "neither"), ("norm", "no convo")):
        with pytest.raises(ValueError, match=f"where: '{name}' cannot be gated.*{why}"):
            FTWT(Odd(), images(2), where=[name])


def test_finder_leaves_shortcuts_unless_named() -> None:
    assert "stages.1.0.shortcut.0" not in [layer.name for layer in make("resnet").layers]
    net = make("resnet", where=["stages.1.0.shortcut.0", "stem.0"])
    assert [layer.name for layer in net.layers] == ["stem.0", "stages.1.0.shortcut.0"]


def test_finder_follows_zero_channels_through_pooling() -> None:
    assert [layer.source for layer in make("cnn").layers] == [None, 0, 1]


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(i, 4, 3, 1, 1) for i in (1, 4, 4))
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x)))
        y = self.norm2(self.second(x))
        y += x
        y = F.relu_(y)
        return F.silu(self.third(y)).mean((2, 3))


@torch.no_grad()
def test_a_sum_in_place_is_dense_again() -> None:
    net = FTWT(settled(AddsInPlace()), images(2), where=["first", "second", "third"]).eval()
    assert [(layer.act, layer.source) for layer in net.layers] == [
        ("function", None),
        ("none", 0),
        ("function", None),
    ]
    masks = random_masks(net, 6)
    dense = net.trace(images(6), masks, execution="masked").output
    assert torch.allclose(net.trace(images(6), masks, execution="grouped").output, dense, atol=1e-5)


class Branches(nn.Module):
    """Two branches that begin in one order and end in the other, and a course that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 5, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        right, left = torch.tanh(right), torch.relu(left)
        y = torch.cat((left, right), 1)
        return (y if x.shape[-1] < 6 else self.last(y).relu()).mean((2, 3))


@torch.no_grad()
def test_branches_may_end_in_another_order() -> None:
    net = FTWT(Branches(), images(2)).eval()
    assert [(layer.name, layer.source) for layer in net.layers] == [("left", None), ("right", None), ("last", None)]
    x = images(4)
    trace = net.trace(x, labels=True)
    assert torch.equal(trace.labels[0], mass_labels(peaks(net.model.left(x).relu()), 0.9))  # type: ignore[operator]
    assert [m.shape[1] for m in net.trace(x, "labels").masks] == [3, 5, 4]
    assert torch.allclose(net.trace(x).output, net.trace(x, execution="masked").output, atol=1e-5)
    with pytest.raises(RuntimeError, match="at 'last' this forward pass leaves the course"):
        net(x[..., :5])


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x) + 0.5


@torch.no_grad()
def test_triples_gate_behind_a_module_of_ones_own() -> None:
    model = settled(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), Swish(), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Flatten())
    )
    net = FTWT(model, images(2), where=[("0", "1", "2"), ("3", None, "4")]).eval()
    assert [layer.act for layer in net.layers] == ["2", "4"]
    assert net.layers[1].source == 0
    x, masks = images(5), random_masks(net, 5)
    y = model[2](model[1](model[0](x)))
    labels = mass_labels(peaks(y), net.mass)
    expected = model[5](F.relu(model[3](y * masks[0][:, :, None, None])) * masks[1][:, :, None, None])
    for execution in ("masked", "grouped", "union"):
        assert torch.allclose(net.trace(x, masks, execution=execution).output, expected, atol=1e-5)  # type: ignore[arg-type]
    assert torch.equal(net.trace(x, masks, labels=True).labels[0], labels)
    before = FTWT(model, images(2), where=[("0", "1", None)]).eval()
    assert torch.equal(before.trace(x, labels=True).labels[0], mass_labels(peaks(model[1](model[0](x))), 0.9))
    with pytest.raises(ValueError, match="where: '0' is followed by the norm '1'"):
        FTWT(model, images(2), where=[("0", None, "2")])
    with pytest.raises(ValueError, match="where: the model has no module named 'x'"):
        FTWT(model, images(2), where=[("0", "1", "x")])


class Shares(nn.Module):
    """A residual block of the usual kind: one activation for both of its layers, and for what comes before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.relu(self.bn1(self.conv1(x)))
        return self.head(self.relu(x + self.bn2(self.conv2(y))).mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("names", [("conv1",), ("conv1", "conv2"), ("stem", "conv1", "conv2")])
def test_an_activation_may_be_that_of_several_layers(names: tuple[str, ...]) -> None:
    model: Any = settled(Shares())
    where = [(n, {"conv1": "bn1", "conv2": "bn2"}.get(n), "relu") for n in names]
    net = FTWT(model, images(2), where=where).eval()
    assert [layer.name for layer in net.layers] == list(names)
    x, masks = images(5), random_masks(net, 5)
    of = {n: m[:, :, None, None] for n, m in zip(names, masks, strict=True)}
    h = F.relu(model.stem(x)) * of.get("stem", 1)
    y = F.relu(model.bn1(model.conv1(h))) * of.get("conv1", 1)
    z = F.relu(h + model.bn2(model.conv2(y))) * of.get("conv2", 1)
    for execution in ("masked", "grouped", "union"):
        found = net.trace(x, masks, execution=execution)  # type: ignore[arg-type]
        assert torch.allclose(found.output, model.head(z.mean((2, 3))), atol=1e-5)
    assert torch.equal(net.trace(x, labels=True).labels[0], mass_labels(peaks(found_o(model, x, names[0])), net.mass))


def found_o(model: Any, x: Tensor, name: str) -> Tensor:
    h = F.relu(model.stem(x))
    return h if name == "stem" else F.relu(model.bn1(model.conv1(h)))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_heads_may_read_a_grid(pool: Any) -> None:
    net = make(pool=pool, embedding=24, norm="l2")
    assert [h.in_features for h in net._heads] == [25, 24, 32]  # 1 x 5 x 5, 6 x 2 x 2, 8 x 2 x 2
    x = images(3)
    found = F.adaptive_max_pool2d(x, 5) if pool == "max" else F.adaptive_avg_pool2d(x, 5)
    torch.testing.assert_close(net.trace(x).scores[0], net.heads[0](F.normalize(found.flatten(1), dim=1)))
    assert [h.in_features for h in make(embedding=1)._heads] == [1, 6, 8]  # one place at least
    assert torch.equal(make(embedding=1).trace(x).scores[0], make().trace(x).scores[0])
    stats = net.stats(images(4))
    assert stats.head_macs == sum(h.weight.numel() for h in net._heads) + 64 + 6 * 16 + 8 * 4


def test_every_point_answers_compiled_as_it_does_uncompiled() -> None:
    net = make("resnet")
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend)
        for point in (*net.points(), *net.points()[::-1]):
            net.use(point)
            assert torch.allclose(compiled(images(4)), net(images(4)), atol=1e-5)


def test_four_threads_answer_as_one() -> None:
    net = make("resnet")
    inputs = [images(4, seed) for seed in range(4)]
    for point in net.points():
        net.use(point)
        alone = [net(x) for x in inputs]
        with torch.no_grad(), ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                for a, b in zip(alone, pool.map(net, inputs), strict=True):
                    assert torch.equal(a, b)


def test_a_criterion_that_fails_leaves_no_hook() -> None:
    calls = []

    def criterion(y: Tensor, t: Tensor) -> Tensor:
        calls.append(len(t))
        if len(calls) > 1:
            raise RuntimeError("boom")
        return F.cross_entropy(y, t)

    net = FTWT(settled(Shares()), images(2), where=[("conv1", "bn1", "relu")], criterion=criterion).train()
    net.loss(batch())
    before = [(n, p.detach().clone()) for n, p in net.named_parameters()]
    with pytest.raises(RuntimeError, match="boom"):
        net.loss(batch())
    assert all(torch.equal(p, dict(net.named_parameters())[n]) for n, p in before)
    assert (net.point, net.training) == (net.points()[0], True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0.0}, "mass: 0.0; allowed"),
        ({"mass": 1.5}, "mass"),
        ({"mass": math.nan}, "mass"),
        ({"label": "best"}, "label: 'best'; allowed: 'mass', 'uniform'"),
        ({"mode": "both"}, "mode"),
        ({"pool": "min"}, "pool"),
        ({"norm": "batch"}, "norm"),
        ({"head_init": "zero"}, "head_init"),
        ({"execution": "fast"}, "execution"),
        ({"cooldown": 1.2}, "cooldown"),
        ({"mask_weight": -1.0}, "mask_weight"),
        ({"delta": math.inf}, "delta"),
        ({"head_lr": 0.0}, "head_lr"),
        ({"backbone_lr": -0.1}, "backbone_lr"),
        ({"groups": 0}, "groups"),
        ({"where": ["nope"]}, "where: the model has no module named 'nope'"),
        ({"where": [("0", "1")]}, r"where: .*allowed"),
        ({"where": []}, r"where: \[\]; allowed"),
        ({"embedding": 0}, "embedding: 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_models_and_data() -> None:
    with pytest.raises(ValueError, match="no convolution with a batch norm or an activation"):
        FTWT(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), images(2))
    with pytest.raises(TypeError, match="model"):
        FTWT("cnn", images(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keeps no running statistics"):
        FTWT(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), images(2))
    with pytest.raises(TypeError, match="where: '0'; allowed: a sequence"):
        make(where="0")
    net = make()
    with pytest.raises(ValueError, match="data: it holds no samples"):
        net.stats([])
    with pytest.raises(ValueError, match="mass: it is empty"):
        FTWT.estimate(cnn(), images(2), images(4), mass=[])
    with pytest.raises(ValueError, match="masks: 1 of them for 3 layers"):
        net.trace(images(2), ones(net, 2)[:1])
    with pytest.raises(ValueError, match=r"masks: that of '0' is torch\.bool of shape"):
        net.trace(images(3), ones(net, 2))
    with pytest.raises(ValueError, match="without an active filter"):
        net.trace(images(2), [m & False for m in ones(net, 2)])
    with pytest.raises(ValueError, match="labels run from"):
        net.train().loss((images(2), torch.tensor([1, 77])))
    with pytest.raises(ValueError, match="not a setting of FTWT"):
        net.use({"mass": 0.123})


class Discards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        self.act(x)
        return x.mean((2, 3))


def test_an_activation_whose_result_is_thrown_away_is_refused() -> None:
    with pytest.raises(ValueError, match="works in place"):
        FTWT(Discards(), images(2))


# -- the life cycle ---------------------------------------------------------------------------------------------------


def test_the_dial() -> None:
    net = make(mass=0.8)
    assert net.points() == [Point(mass=0.8), DENSE]
    assert net.point == Point(mass=0.8)
    with pytest.raises(NotStaticError, match=r"mass=0\.8"):
        net.extract({"mass": 0.8})
    x = images()
    with torch.no_grad():
        small = net.extract(DENSE)
        assert torch.equal(small(x), net.use(DENSE)(x))
        assert torch.equal(small(x), net.model(x))
    assert not any("pliant" in type(m).__module__ for m in small.modules())
    net.train().loss(batch()).backward()
    assert all(p.grad is None for p in net.heads.parameters())


def test_fit_measure_stats_and_estimate() -> None:
    net = make(mass=0.7)
    data = [batch(seed=s) for s in range(4)]
    expected = FTWT.estimate(net.model, images(2), data, mass=[0.5, 0.7, 1.0])
    savings = [expected[r].saving for r in (0.5, 0.7, 1.0)]
    assert savings[0] > savings[1] > savings[2]
    fit(net, data, epochs=6, lr=0.1, lr_schedule="constant", progress=False)
    assert not net.training
    stats = net.stats(data)
    assert 0 < stats.saving < 1
    front = measure(net, data, repeats=0)
    gated = next(r for r in front if not r.static)
    dense = next(r for r in front if r.static)
    assert gated.flops < dense.flops
    assert dense.flops == 2 * stats.dense_macs
    assert all(0.5 < layer.head_accuracy <= 1 for layer in stats.layers)
    assert net.stats(data, oracle=True).head_accuracy == 1


def test_parameter_groups_have_two_rates_and_no_decay_on_heads() -> None:
    net = make(head_lr=2.0, backbone_lr=0.5)
    network, heads = net.parameter_groups(0.1)
    assert (network["lr_scale"], network["weight_decay"]) == (0.5, 0.1)
    assert (heads["lr_scale"], heads["weight_decay"]) == (2.0, 0.0)
    assert {id(p) for g in (network, heads) for p in g["params"]} == {id(p) for p in net.parameters()}
    net.model.requires_grad_(False)
    assert [g["lr_scale"] for g in net.parameter_groups()] == [2.0]  # a frozen network has no group
    net.model.requires_grad_(True)
    optimizer: list[torch.optim.SGD] = []

    def keep(groups: list[dict[str, Any]]) -> torch.optim.SGD:
        optimizer.append(torch.optim.SGD(groups, 0.01))
        return optimizer[0]

    fit(net, [batch()], steps=1, optimizer=keep, lr_schedule="constant", progress=False)
    assert [g["lr"] for g in optimizer[0].param_groups] == pytest.approx([0.005, 0.02])


def test_heads_learn_the_labels() -> None:
    net = make(mass=0.7, norm="layernorm")
    optimizer = torch.optim.Adam(net.heads.parameters(), 0.05)
    data = batch(64)
    before = net.stats(data[0]).head_accuracy
    net.model.requires_grad_(False)
    for _ in range(60):
        optimizer.zero_grad()
        trace = net.trace(data[0], labels=True)
        mask_loss(trace.scores, trace.labels).backward()
        optimizer.step()
    assert net.stats(data[0]).head_accuracy > max(before, 0.75)


@pytest.mark.parametrize("norm", ["softmax", "l2", "layernorm", "none"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_what_a_head_sees(norm: str, pool: str) -> None:
    net = make(norm=norm, pool=pool)
    x = images(3)
    with torch.no_grad():
        trace = net.trace(x, labels=True)
        i = F.relu(net.model[1](net.model[0](x))) * trace.masks[0][:, :, None, None]  # type: ignore[index]
        e = i.amax((2, 3)) if pool == "max" else i.mean((2, 3))
        scaled = {
            "softmax": lambda: e.exp() / e.exp().sum(1, keepdim=True),
            "l2": lambda: e / e.norm(dim=1, keepdim=True),
            "layernorm": lambda: (e - e.mean(1, keepdim=True)) / (e.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
            "none": lambda: e,
        }[norm]()
        head = net.heads[1]
        p = scaled @ head.weight.t() + head.bias
        assert torch.allclose(trace.scores[1], p, atol=1e-5)
        assert torch.equal(trace.masks[1], (p > 0) | F.one_hot(p.argmax(1), 8).bool())


def test_open_heads_and_seeds() -> None:
    opened = make(head_init="open")
    assert all(m.all() for m in opened.trace(images()).masks)
    a, b, c = make(seed=3), make(seed=3), make(seed=4)
    assert torch.equal(a.heads[0].weight, b.heads[0].weight)
    assert not torch.equal(a.heads[0].weight, c.heads[0].weight)
    state = torch.random.get_rng_state()
    a.reset_parameters()
    assert torch.equal(state, torch.random.get_rng_state())


@torch.no_grad()
def test_tune_keeps_what_is_faster() -> None:
    net = make()
    x = images(4)
    before = net(x)
    choices = net.tune(x, repeats=3)
    assert net.execution == "auto"
    assert set(choices) == {layer.name for layer in net.layers}
    for choice in choices.values():
        assert choice.execution == ("masked" if min(choice.ratios.values()) >= 1 else choice.execution)
        assert set(choice.ratios) == {"grouped", "union"}
    assert torch.allclose(net(x), before, atol=1e-5)
    net.tuned = {name: ftwt.Choice("union") for name in choices}
    assert torch.allclose(net(x), before, atol=1e-5)
    assert FTWT(cnn(), images(2), execution="auto").eval()(x).shape == (4, 5)  # masked until tuned


def test_copies_dtype_and_other_inputs() -> None:
    net = make()
    x = images()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(twin(x), net(x))
        for p in twin.parameters():
            p.add_(0.1)
        assert torch.equal(make()(x), net(x))
        assert net.double()(x.double()).dtype is torch.float64
        assert net.float()(images(3)[..., :6]).shape == (3, 5)
        assert net(images(0)).shape == (0, 5)
    half = make().to(torch.bfloat16)
    trace = half.trace(x.bfloat16(), labels=True)
    assert trace.output.dtype is torch.bfloat16
    assert half.train().loss((x.bfloat16(), batch(8)[1])).isfinite()


def test_save_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if all(entry.slug != "ftwt" for entry in catalog.METHODS):
        entry = catalog.Entry("ftwt", "pliant.sparsity.ftwt:FTWT", "", 2022, "2110.08232", "", "", "", "images")
        monkeypatch.setattr(catalog, "METHODS", (*catalog.METHODS, entry))
    options: dict[str, Any] = {"mass": 0.7, "norm": "l2", "where": [("0", "1", "2"), "3"], "groups": 2}
    net = make(**options)
    fit(net, [batch()], steps=3, progress=False)
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", model=cnn(9)).eval()
    assert isinstance(again, FTWT)
    assert again.point == net.point
    assert (again.mass, again.norm, again.groups) == (0.7, "l2", 2)
    with torch.no_grad():
        assert torch.equal(again(images()), net(images()))
    fit(again, [batch()], steps=2, progress=False)


def test_resumed_training_goes_on_bit_by_bit(tmp_path: Path) -> None:
    data = [batch(seed=s) for s in range(4)]

    def run(folder: Path | None, stop: int | None = None) -> FTWT:
        net = make(cooldown=0.5)

        def note(step: int, total: int, loss: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            fit(net, data, epochs=2, checkpoint=folder, checkpoint_every=2, on_step=note, progress=False)
        return net

    whole = run(None)
    run(tmp_path / "c", stop=7)
    resumed = run(tmp_path / "c")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
