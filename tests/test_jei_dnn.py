"""JEI-DNN: the exact properties of the method, its training procedure, and what it refuses."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pliant.core.cost import flops_per_sample
from pliant.core.dynamic import NotStaticError, Point
from pliant.core.gates import exit_distribution, first_exit
from pliant.core.inputs import evaluating
from pliant.core.rows import block_rows
from pliant.routing.jei_dnn import (
    JEIDNN,
    Conformal,
    ThresholdExit,
    conformal_quantile,
    gate_loss,
    gate_targets,
    im_loss,
)
from pliant.tasks.images import SmallResNet

torch.set_num_threads(1)
BLOCKS = ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "stages.2.0", "stages.2.1"]


def backbone(seed=0):
    torch.manual_seed(seed)
    model = SmallResNet(classes=4, widths=(4, 6, 8))
    with torch.no_grad():  # running statistics of real activations, so that exits differ
        model.train()
        for _ in range(3):
            model(torch.randn(32, 1, 12, 12))
    return model.eval()


def network(**options):
    model = backbone()
    torch.manual_seed(1)
    return JEIDNN(model, torch.randn(2, 1, 12, 12), **{"cost_weights": (0.1, 0.8), **options})


def batches(n=3, size=16, seed=2):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 12, 12, generator=g), torch.randint(0, 4, (size,), generator=g)) for _ in range(n)
    ]  # fmt: skip


def spread(net, seed=3):
    """Gates under which samples leave at many exits: at each, about a third by their largest probability."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        net.gate_weight.copy_(torch.randn(net.gate_weight.shape, generator=g))
        net.gate_weight[..., 0] = 200.0
        for w in net.head_weight:
            w.mul_(4)
        x = net.example
        x = {k: torch.randn(64, *v.shape[1:], generator=g) for k, v in x.items()} if isinstance(x, dict) else (
            torch.randn(64, *x.shape[1:], generator=g))  # fmt: skip
        net.gate_bias.zero_()
        levels, _, _ = net._inputs((x, torch.zeros(64, dtype=torch.long)))
        s = net._gate_logits(net._joint_logits(levels))
        net.gate_bias.copy_(-s.quantile(0.66, dim=1))
    return net


def groups(net):
    named = list(net.named_parameters())
    return {
        "model": [p for n, p in named if n.startswith("model")],
        "ims": [p for n, p in named if n.startswith(("plain", "head"))],
        "gates": [p for n, p in named if n.startswith("gate")],
    }


def begin(net, phase):
    net.clock.copy_(torch.tensor([1, {"gate": 1, "im": net.phase_batches + 1}[phase], 0]))
    assert net.phase == phase
    return net


# -- property 3: the weighting of IMs ---------------------------------------------------------------------------------


def test_the_weight_of_a_sample_is_held_constant():
    torch.manual_seed(0)
    ce = torch.rand(1, 6, 4, dtype=torch.float64).add(0.1).requires_grad_(True)
    p = exit_distribution(torch.rand(1, 6, 4, dtype=torch.float64) * 0.4)[..., :-1]
    loss = im_loss(ce, p)
    torch.testing.assert_close(loss, ce.mean(), rtol=0, atol=1e-7)
    (grad,) = torch.autograd.grad(loss, ce)
    with torch.no_grad():
        r = ce.sum(-1, keepdim=True) / (p * ce).sum(-1, keepdim=True)
    torch.testing.assert_close(grad, r * p / 24, rtol=1e-6, atol=1e-9)
    # With the gradient of r it would be the plain mean, whose gradient is another.
    attached = (ce.sum(-1, keepdim=True) / (p * ce).sum(-1, keepdim=True) * p * ce).mean()
    (plain,) = torch.autograd.grad(attached, ce)
    torch.testing.assert_close(plain, torch.full_like(plain, 1 / 24))
    assert (grad - plain).abs().max() > 0.01


def test_a_sample_that_never_leaves_contributes_nothing():
    ce = torch.rand(1, 2, 3).requires_grad_(True)
    p = torch.tensor([[[0.0, 0, 0], [0.5, 0.2, 0]]])
    (grad,) = torch.autograd.grad(im_loss(ce, p), ce)
    assert grad.isfinite().all()
    assert (grad[0, 0] == 0).all()
    assert (grad[0, 1, :2] > 0).all()


def test_the_im_phase_uses_these_weights_and_none_means_the_mean():
    (x, y) = batches(1)[0]
    found = {}
    for weighting in ("exit", "none"):
        net = begin(spread(network(im_weighting=weighting)), "im")
        levels, _, _ = net._inputs((x, y))
        a = net._joint_logits(levels).detach().requires_grad_(True)
        net._joint_logits = lambda levels, a=a: a
        (found[weighting],) = torch.autograd.grad(net.loss((x, y)), a)
        ce = F.cross_entropy(a.permute(0, 3, 1, 2).flatten(2).transpose(1, 2).reshape(-1, 4),
                             y.repeat_interleave(5).repeat(2), reduction="none").view(2, 16, 5)  # fmt: skip
        p = exit_distribution(net._gate_logits(a).sigmoid())[..., :-1].detach()
        r = (ce.sum(-1) / ((p * ce).sum(-1) + 1e-8)).detach()[..., None]
        weight = torch.ones_like(p) if weighting == "none" else r * p
        expected = (weight * ce).mean((1, 2)).sum()
        torch.testing.assert_close(found[weighting], torch.autograd.grad(expected, a)[0])
    assert (found["exit"] - found["none"]).abs().max() > 1e-3


# -- property 4: gates shut, gates open -------------------------------------------------------------------------------


def test_shut_gates_give_the_backbone_to_the_bit_and_open_ones_leave_at_once():
    net = network()
    x = torch.randn(9, 1, 12, 12)
    net.use(Point(cost_weight=0.1))
    with torch.no_grad():
        net.gate_weight.zero_()
        net.gate_bias.fill_(-math.inf)
        assert torch.equal(net(x), net.model(x))
        assert (net.decide(x).exit == 5).all()
        net.gate_bias[:, 0] = math.inf
        rows = block_rows(net.model, BLOCKS, lambda: net(x))
        assert (net.decide(x).exit == 0).all()
    assert dict(rows) == {BLOCKS[0]: 9}


# -- property 5: compaction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_compaction_changes_no_answer_and_each_row_runs_alone_alike(dtype, atol):
    net = spread(network()).to(dtype).use(Point(cost_weight=0.8))
    x = torch.randn(40, 1, 12, 12, dtype=dtype)
    with torch.no_grad():
        found = {}
        for compact in ("always", "never", 0.25):
            net.compact = compact
            found[compact] = net.decide(x)
        alone = [net.decide(row[None]) for row in x]
        cached = net.decide(exit_features=net.cache([(x, torch.zeros(40, dtype=torch.long))]).features)
    a = found["always"]
    assert len(a.exit.unique()) >= 3
    for b in (found["never"], found[0.25], cached):
        assert torch.equal(a.exit, b.exit)
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=atol)
        torch.testing.assert_close(a.exit_probability, b.exit_probability, rtol=0, atol=max(atol, 1e-6))
    torch.testing.assert_close(a.logits, torch.cat([o.logits for o in alone]), rtol=0, atol=atol)
    assert torch.equal(a.exit, torch.cat([o.exit for o in alone]))


def test_the_rows_that_blocks_run_on_are_those_of_the_exits_taken():
    net = spread(network()).use(Point(cost_weight=0.8))
    x = torch.randn(40, 1, 12, 12)
    with torch.no_grad():
        exits = net.decide(x).exit
        rows = block_rows(net.model, BLOCKS, lambda: net(x))
    assert sum(rows.values()) == (exits + 1).sum().item()
    assert 0 < sum(rows.values()) < 6 * 40


# -- property 6: targets ----------------------------------------------------------------------------------------------

scores = st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=4, max_size=4), min_size=1, max_size=5)


@given(scores, st.floats(0, 5))
@settings(max_examples=80, deadline=None)
def test_targets_never_fall_with_depth_and_begin_at_the_best_exit(score, weight):
    s = torch.tensor([score], dtype=torch.float64)
    costs = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    t, best = gate_targets(s, costs, torch.tensor([weight], dtype=torch.float64))
    assert (t.diff(dim=-1) >= 0).all()
    value = s + weight * costs
    for row, b, v in zip(t[0], best[0].tolist(), value[0].tolist(), strict=True):
        assert v[b] == min(v)
        assert b == v.index(min(v))
        assert row.tolist() == [float(k >= b) for k in range(3)]


def test_targets_at_both_ends_of_the_cost_weight():
    s = torch.tensor([[[2.0, 0.5, 0.5, 0.7]], [[2.0, 0.5, 0.5, 0.7]]])
    _, best = gate_targets(s, torch.tensor([0.25, 0.5, 0.75, 1.0]), torch.tensor([0.0, 1e6]))
    assert best.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("score", ["ce", "error", "confidence"])
def test_the_three_scores(score):
    net = spread(network(gate_score=score, cost_weights=(0.0,)))
    x, y = batches(1)[0]
    with torch.no_grad():
        levels, final, _ = net._inputs((x, y))
        a = net._joint_logits(levels)
        every = torch.cat((a[0], final[:, None]), 1)
        p = every.softmax(-1)[torch.arange(16), :, y]
        right = every.argmax(-1) == y[:, None]
        value = {"ce": -p.log(), "error": (~right).float(), "confidence": -p * right}[score]
        _, best = net._targets(a, final, y)
    torch.testing.assert_close(value.gather(1, best[0][:, None]).squeeze(1), value.amin(1))


# -- property 7: two groups that do not touch -------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["gate", "im"])
def test_each_phase_moves_its_own_weights_and_nothing_else(phase):
    net = spread(network())
    # Momentum and weight decay already wound up: idle weights would move if their gradients were zero and not None.
    optimizer = torch.optim.SGD(net.parameter_groups(0.1), 0.5, momentum=0.9)
    x, y = batches(1)[0]
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p) * 1e-3
    optimizer.step()
    begin(net, phase)
    net.clock[1] -= 1
    optimizer.zero_grad(set_to_none=False)  # the trap
    net.schedule(0.5)
    net.loss((x, y)).backward()
    part = groups(net)
    idle, busy = ("ims", "gates") if phase == "gate" else ("gates", "ims")
    assert all(p.grad is None for p in part[idle] + part["model"])
    assert all(p.grad is not None for p in part[busy])
    assert sum(p.grad.abs().sum() for p in part[busy]) > 0
    before = {k: [p.detach().clone() for p in v] for k, v in part.items()}
    buffers = {n: b.clone() for n, b in net.model.named_buffers()}
    optimizer.step()
    for name in (idle, "model"):
        assert all(torch.equal(p, q) for p, q in zip(part[name], before[name], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(part[busy], before[busy], strict=True))
    assert all(torch.equal(b, buffers[n]) for n, b in net.model.named_buffers())


def test_gate_gradients_are_none_in_the_warm_up():
    net = network()
    net.schedule(0.0)
    assert net.phase == "warmup"
    net.loss(batches(1)[0]).backward()
    assert all(p.grad is None for n, p in net.named_parameters() if n.startswith(("gate", "head", "model")))
    assert all(p.grad is not None for n, p in net.named_parameters() if n.startswith("plain"))


# -- property 9: gate loss --------------------------------------------------------------------------------------------


def test_the_gate_loss_without_weights_is_binary_cross_entropy():
    net = begin(spread(network(cost_weights=(0.3,))), "gate")
    x, y = batches(1)[0]
    levels, final, _ = net._inputs((x, y))
    a = net._joint_logits(levels)
    t, _ = net._targets(a, final, y)
    assert 0 < t.mean() < 1
    expected = nn.BCEWithLogitsLoss()(net._gate_logits(a), t)
    torch.testing.assert_close(net.loss((x, y)), expected)


def test_positive_weights_stand_where_the_target_is_one():
    s, t = torch.randn(1, 5, 2), torch.randint(0, 2, (1, 5, 2)).float()
    w = torch.tensor([[3.0, 0.5]])
    torch.testing.assert_close(
        gate_loss(s, t, w), (F.binary_cross_entropy_with_logits(s, t, reduction="none") * (1 + t * (w - 1))).mean()
    )


@pytest.mark.parametrize("kind", ["code", "exact"])
def test_positive_weights_come_from_validation(kind):
    net = begin(spread(network(pos_weight=kind)), "gate")
    data = batches(3)
    best = []
    for x, y in data:
        levels, final, _ = net._inputs((x, y))
        best.append(net._targets(net._joint_logits(levels), final, y)[1])
    net.epoch_end(data)
    best = torch.cat(best, 1)
    for i in range(2):
        for k in range(5):
            n = ((best[i] == k) if kind == "code" else (best[i] <= k)).sum().item()
            assert net.pos_weights[i, k].item() == pytest.approx(min((48 - n) / max(n, 0.1), 5), abs=1e-5)


# -- property 10: cost ------------------------------------------------------------------------------------------------


def test_costs_rise_to_one_and_the_reported_cost_is_that_of_the_exits_taken():
    net = spread(network()).use(Point(cost_weight=0.8))
    assert (net.costs.diff() > 0).all()
    assert net.costs[-1] == 1
    x = torch.randn(30, 1, 12, 12)
    with torch.no_grad():
        found = net.decide(x)
        outcome = {o.point: o for o in net.curve([(x, torch.zeros(30, dtype=torch.long))])}[net.point]
    assert torch.equal(found.cost, net.costs[found.exit])
    assert outcome.cost == pytest.approx(net.costs[found.exit].mean().item(), abs=1e-6)


def test_costs_hold_ims_and_gates_and_agree_with_what_is_executed():
    net = network()
    x = torch.randn(2, 1, 12, 12)
    whole = flops_per_sample(net.model, x).total
    ims = 2 * 4 * sum(net.widths)
    gates = 5 * 2 * (9 * 4 + 6)
    end = whole + ims + gates
    for k in range(5):
        static = flops_per_sample(net.use(Point(exit=k)), x).total
        assert net.head_costs[0, k].item() == pytest.approx(static / end, rel=1e-5)
        earlier = 2 * 4 * sum(net.widths[:k]) + (k + 1) * 2 * (9 * 4 + 6)
        assert net.costs[k].item() == pytest.approx((static + earlier) / end, rel=1e-5)
    assert net.head_costs[0, 5].item() == pytest.approx(whole / end, rel=1e-5)


# -- property 11: conformal sets --------------------------------------------------------------------------------------


def test_twenty_scores_at_five_percent_give_the_largest():
    s = torch.rand(20)
    assert conformal_quantile(s, 0.05) == s.max().item()
    assert conformal_quantile(s[:1], 0.5) == s[0].item()


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_coverage_on_exchangeable_scores(alpha):
    g = torch.Generator().manual_seed(0)
    covered = [
        (torch.rand(50, generator=g) <= conformal_quantile(torch.rand(200, generator=g), alpha)).float().mean().item()
        for _ in range(200)
    ]
    mean = sum(covered) / len(covered)
    assert mean >= 1 - alpha - 4 * math.sqrt(alpha * (1 - alpha) / 10_000 * 1.25)
    assert mean <= 1 - alpha + 0.02


def test_sets_use_the_quantile_of_the_exit_taken():
    net = spread(network()).use(Point(cost_weight=0.8))
    held, x = batches(6, 30, seed=5), batches(1, 40, seed=6)[0][0]
    with torch.no_grad():
        sets = net.conformal(held)
        chosen = sets.predict_set(x, alpha=0.1)
        found = net.decide(x)
    assert chosen.dtype is torch.bool
    assert chosen.shape == (40, 4)
    p = found.logits.softmax(-1)
    for n in range(40):
        k = found.exit[n].item()
        taken = sets.exits == k
        s = sets.scores[taken, k] if taken.sum() > 20 else sets.scores[:, k]
        assert torch.equal(chosen[n], 1 - p[n] <= conformal_quantile(s, 0.1))
    assert sets.scores.shape == (180, 6)


# -- the procedure ----------------------------------------------------------------------------------------------------


def test_phases_alternate_and_each_epoch_begins_with_gates():
    net = network(phase_batches=3, warmup=0.25)
    seen = []
    for epoch in range(4):
        for i in range(8):
            net.schedule((epoch * 8 + i) / 32)
            seen.append(net.phase)
        net.epoch_end(None)
    net.schedule(1.0)
    assert seen[:8] == ["warmup"] * 8
    cycle = ["gate"] * 3 + ["im"] * 3 + ["gate"] * 2
    assert seen[8:] == cycle * 3


def test_a_short_epoch_still_trains_the_ims():
    net = network(phase_batches=200, warmup=0.0)
    seen = []
    for epoch in range(2):
        for i in range(4):
            net.schedule((epoch * 4 + i) / 8)
            seen.append(net.phase)
        net.epoch_end(None)
    assert seen[4:] == ["gate", "gate", "im", "im"]


def test_the_warm_up_loss_weighs_early_exits_more():
    net = network()
    x, y = batches(1)[0]
    net.schedule(0.0)
    levels, final, _ = net._inputs((x, y))
    expected = F.cross_entropy(final, y)
    for k, (z, w, b) in enumerate(zip(levels, net.plain_weight, net.plain_bias, strict=True)):
        expected = expected + (6 - k) * F.cross_entropy(F.linear(z, w, b), y)
    torch.testing.assert_close(net.loss((x, y)), expected)


def test_an_im_that_stops_improving_is_restored_and_held_until_the_warm_up_ends():
    net = network(patience=2)
    data = batches(2)
    net.schedule(0.0)
    net.epoch_end(data)
    best = [w.detach().clone() for w in net.plain_weight]
    with torch.no_grad():  # exit 1 becomes useless: no logit differs, class 3 never wins
        net.plain_weight[1].zero_()
        net.plain_bias[1].copy_(torch.tensor([-5.0, -5, -5, -5]))
    net.best_accuracy.fill_(2.0)
    net.best_accuracy[[0, 2, 3, 4]] = -1.0
    net.epoch_end(data)
    assert not net.frozen.any()
    net.best_accuracy[[0, 2, 3, 4]] = -1.0
    net.epoch_end(data)
    assert net.frozen.tolist() == [False, True, False, False, False]
    assert torch.equal(net.plain_weight[1], best[1])
    net.zero_grad()
    net.schedule(0.1)
    net.loss(data[0]).backward()
    assert net.plain_weight[1].grad is None
    assert net.plain_weight[0].grad is not None
    net.best_accuracy.fill_(2.0)
    for _ in range(2):
        net.epoch_end(data)
    assert net.phase == "gate"  # all stopped, so the warm-up is over before its share
    assert not net.frozen.any()
    for i in range(2):
        assert all(torch.equal(net.head_weight[k][i], net.plain_weight[k]) for k in range(5))


def train(net, data, held, epochs=6, start=0, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(net.parameter_groups(5e-4), 0.05, momentum=0.9)
    total = epochs * len(data)
    for epoch in range(start, epochs):
        for i, batch in enumerate(data):
            net.schedule((epoch * len(data) + i) / total)
            optimizer.zero_grad()
            net.loss(batch).backward()
            optimizer.step()
        net.epoch_end(held)
        if epoch == 2 and start == 0:
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    net.schedule(1.0)
    net.finish(data)
    return saved if start == 0 else None


def test_training_resumes_exactly_from_saved_tensors():
    net, data, held = network(phase_batches=2), batches(5), batches(2, seed=9)
    state, optimizer_state = train(net, data, held)
    assert state["clock"].tolist()[0] == 1
    again = network(phase_batches=2)
    again.load_state_dict(state)
    optimizer = torch.optim.SGD(again.parameter_groups(5e-4), 0.05, momentum=0.9)
    optimizer.load_state_dict(optimizer_state)
    train(again, data, held, start=3, optimizer=optimizer)
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_cached_features_train_to_the_same_network():
    a, b = network(), network()
    data, held = batches(4), batches(2, seed=9)
    train(a, data, held)
    train(b, list(b.cache(data, batch_size=16)), list(b.cache(held, batch_size=16)))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_finish_brings_the_best_weights_back():
    net, held = begin(spread(network()), "gate"), batches(3)
    net.epoch_end(held)
    good, plain = net._joint().clone(), net._plain().clone()
    net.best_score.fill_(-1e9)
    net.best_accuracy.fill_(2)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(1.0)
    net.epoch_end(held)
    net.finish(held)
    assert torch.equal(net._joint(), good)
    assert torch.equal(net._plain(), plain)


def test_the_backbone_stays_frozen_and_in_evaluation_mode():
    net = network().train()
    assert net.training
    assert not any(m.training for m in net.model.modules())
    assert not any(p.requires_grad for p in net.model.parameters())
    with evaluating(net):
        pass
    assert not net.model.training


def test_shuffled_caches_cover_every_sample_once():
    net = network()
    x, _ = batches(1, 20)[0]
    cached = net.cache([(x, torch.arange(20) % 4)], batch_size=6, shuffle=True)
    assert len(cached) == 4 == len(list(cached))
    seen = torch.cat([b["exit_features"] for b in cached])
    assert torch.equal(seen.sum(1).sort().values, cached.features.sum(1).sort().values)


# -- the dial ---------------------------------------------------------------------------------------------------------


def test_points_stand_from_cheap_to_dear_and_a_new_network_is_whole():
    net = network()
    assert [str(p) for p in net.points()] == [
        "exit=0", "exit=1", "exit=2", "exit=3", "exit=4", "cost_weight=0.8", "cost_weight=0.1", "exit=5",
    ]  # fmt: skip
    assert net.point == Point(exit=5)
    x = torch.randn(3, 1, 12, 12)
    assert torch.equal(net(x), net.model(x))
    with pytest.raises(ValueError, match="not a setting"):
        net.use(Point(exit=6))


def test_a_static_exit_is_the_plain_head_and_runs_no_later_block():
    net = network().use(Point(exit=2))
    x = torch.randn(5, 1, 12, 12)
    rows = block_rows(net.model, BLOCKS, lambda: net(x))
    assert sorted(rows) == BLOCKS[:3]
    levels, _, _ = net._inputs((x, torch.zeros(5, dtype=torch.long)))
    assert torch.equal(net(x), F.linear(levels[2], net.plain_weight[2], net.plain_bias[2]))


@pytest.mark.parametrize("k", [0, 3, 5])
def test_extracted_networks_are_plain_smaller_and_equal_at_every_batch_size(k):
    net = network().use(Point(exit=k))
    plain = net.extract(Point(exit=k))
    assert not any(type(m).__module__.startswith("pliant.routing") for m in plain.modules())
    for n in (1, 2, 7, 64):
        x = torch.randn(n, 1, 12, 12)
        assert torch.equal(plain(x), net(x))
    with evaluating(plain):
        pass  # train() and eval() work, as measuring needs
    if k < 5:
        kept = sum(p.numel() for p in plain.parameters())
        blocks = net.model.stem, *[net.model.get_submodule(b) for b in BLOCKS[: k + 1]]
        assert kept == sum(p.numel() for m in blocks for p in m.parameters()) + 4 * (net.widths[k] + 1)
        assert flops_per_sample(plain, x).total == flops_per_sample(net, x).total
    before = net(x)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert torch.equal(net(x), before)  # weights of its own


def test_points_that_depend_on_the_input_have_no_static_network():
    with pytest.raises(NotStaticError, match="no static network"):
        network().extract(Point(cost_weight=0.1))


def test_state_round_trip():
    a = spread(network())
    b = network()
    b.load_state_dict(a.state_dict())
    x = torch.randn(8, 1, 12, 12)
    for p in a.points():
        assert torch.equal(a.use(p)(x), b.use(p)(x))
    config = a.arguments()
    assert config["cost_weights"] == [0.1, 0.8]
    assert config["im_weighting"] == "exit"


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_transformers_models(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "vit":
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
                                   image_size=8, patch_size=4, num_channels=1, num_labels=3)
        )  # fmt: skip
        feature = lambda h: model.vit.layernorm(h[:, 0])  # noqa: E731
    else:
        model = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], layer_type="basic",
                                      num_channels=1, num_labels=3)
        )  # fmt: skip
        feature = None
    example = {"pixel_values": torch.randn(2, 1, 8, 8)}
    net = spread(JEIDNN(model, example, feature=feature, cost_weights=(0.1, 0.5)))
    x = {"pixel_values": torch.randn(12, 1, 8, 8)}
    batch = {**x, "labels": torch.randint(0, 3, (12,))}
    train(net, [batch] * 3, [batch])
    spread(net)
    with torch.no_grad():
        for p in net.points():
            net.use(p)
            net.compact = "always"
            a = net.decide(**x)
            net.compact = "never"
            b = net.decide(**x)
            assert torch.equal(a.exit, b.exit)
            torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)
    plain = net.use(Point(exit=1)).extract(Point(exit=1))
    one = {"pixel_values": x["pixel_values"][:1]}
    assert torch.equal(plain(**x), net(**x))
    assert torch.equal(plain(**one), net(**one))
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in model.parameters())


# -- the opponents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["confidence", "shares"])
def test_thresholds_meet_their_target_costs_on_validation(rule):
    net = network()
    with torch.no_grad():
        for w in net.plain_weight:
            w.mul_(5)
    held = batches(8, 50)
    opponent = ThresholdExit(net, rule=rule, target_costs=(0.5, 0.7)).calibrate(held)
    for outcome in opponent.curve(held):
        assert outcome.cost == pytest.approx(outcome.point["target_cost"], abs=0.03)
    x = held[0][0]
    for point in opponent.points():
        opponent.use(point)
        with torch.no_grad():
            live = opponent.decide(x)
            cached = opponent.decide(exit_features=net.cache([held[0]]).features)
        assert torch.equal(live.exit, cached.exit)
        torch.testing.assert_close(live.logits, cached.logits, rtol=0, atol=1e-5)
        confidence = live.logits.softmax(-1).amax(-1)
        bars = torch.cat((opponent._bars(), torch.tensor([-1.0])))
        assert (confidence >= bars[live.exit] - 1e-5).all()
        with torch.no_grad():
            rows = block_rows(net.model, BLOCKS, lambda: opponent(x))
        assert sum(rows.values()) == (live.exit + 1).sum().item()
    with pytest.raises(NotStaticError):
        opponent.extract(opponent.points()[0])
    sets = opponent.conformal(held).predict_set(x, alpha=0.1)
    assert sets.shape == (50, 4)


def test_an_opponent_without_thresholds_says_so():
    opponent = ThresholdExit(network())
    with pytest.raises(RuntimeError, match="calibrate"):
        opponent(torch.randn(2, 1, 12, 12))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cost_weights": (-0.1,)}, "cost_weights"),
        ({"cost_weights": ()}, "cost_weights"),
        ({"cost_weights": (0.1, 0.1)}, "cost_weights"),
        ({"cost_weights": (math.nan,)}, "cost_weights"),
        ({"cost_weights": (math.inf,)}, "cost_weights"),
        ({"exits": ["blocks.0"]}, "no module 'blocks.0'"),
        ({"exits": ["stages.1.0", "stages.0.0"]}, "order of execution"),
        ({"feature": lambda h: h}, "feature"),
        ({"feature": lambda h: h.mean()}, "feature"),
        ({"feature": lambda h: "no"}, "feature"),
        ({"im_weighting": "both"}, "im_weighting"),
        ({"gate_score": "acc"}, "gate_score"),
        ({"pos_weight": "paper"}, "pos_weight"),
        ({"warmup": 1.5}, "warmup"),
        ({"patience": 0}, "patience"),
        ({"phase_batches": 0}, "phase_batches"),
        ({"compact": "maybe"}, "compact"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        network(**options)


def test_bad_models_are_refused():
    x = torch.randn(2, 1, 12, 12)
    with pytest.raises(ValueError, match="2 classes"):
        JEIDNN(SmallResNet(classes=1), x)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        JEIDNN(lambda x: x, x)
    with pytest.raises(ValueError, match="shape"):
        JEIDNN(SmallResNet(), torch.randn(2, 3, 12, 12))
    with pytest.raises(ValueError, match="2 classes"):
        JEIDNN(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)), x)


def test_bad_data_is_refused():
    net = network()
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match="target"):
        net.loss((x, y + 4))
    with pytest.raises(TypeError, match="batch"):
        net.loss(x)
    with pytest.raises(ValueError, match="exit_features"):
        net(exit_features=torch.randn(2, 3))
    with pytest.raises(ValueError, match="no batches"):
        net.epoch_end([])
    with pytest.raises(ValueError, match="no batches"):
        net.cache([])
    with pytest.raises(ValueError, match="no batches"):
        net.conformal([])
    with pytest.raises(ValueError, match="no batches"):
        net.curve([])
    with pytest.raises(ValueError, match="batch_size"):
        net.cache([(x, y)], batch_size=0)
    with pytest.raises(ValueError, match="alpha"):
        conformal_quantile(torch.rand(3), 1.0)
    with pytest.raises(ValueError, match="criterion"):
        network(criterion=lambda a, y: a).loss((x, y))
    with pytest.raises(ValueError, match="target_costs"):
        ThresholdExit(net, target_costs=(1.5,))
    with pytest.raises(ValueError, match="rule"):
        ThresholdExit(net, rule="entropy")


@pytest.mark.parametrize("phase", ["gate", "im"])
def test_a_criterion_that_gives_the_mean_is_asked_row_by_row(phase):
    for weighting in ("exit", "single"):
        mean = begin(spread(network(criterion=F.cross_entropy, im_weighting=weighting)), phase)
        each = begin(spread(network(im_weighting=weighting)), phase)
        torch.testing.assert_close(mean.loss(batches(1)[0]), each.loss(batches(1)[0]))


def test_a_criterion_of_ones_own():
    net = network(criterion=lambda a, y: F.cross_entropy(a, y, reduction="none", label_smoothing=0.1))
    x, y = batches(1)[0]
    assert net.loss((x, y)).item() != network().loss((x, y)).item()


def test_the_decision_is_that_of_the_distribution():
    net = spread(network()).use(Point(cost_weight=0.1))
    x, y = batches(1, 30)[0]
    with torch.no_grad():
        levels, _, _ = net._inputs((x, y))
        p = exit_distribution(net._gate_logits(net._joint_logits(levels))[0].sigmoid())
        found = net.decide(x)
    assert torch.equal(found.exit, first_exit(p))
    torch.testing.assert_close(found.exit_probability.sum(1), torch.ones(30))


def test_confidence_counts_where_the_answer_is_right_alone():
    net = network(gate_score="confidence", cost_weights=(0.0,))
    a = torch.full((1, 1, len(net.plan), 4), -20.0)
    a[..., 1] = 0.0  # wrong at every exit, its right class all the likelier the later
    a[0, 0, :, 0] = torch.linspace(-5, -1, len(net.plan))
    final = torch.tensor([[0.0, 9.0, 0.0, 0.0]])
    _, best = net._targets(a, final, torch.tensor([0]))
    assert best.item() == 0  # all score 0: the first; by -p_y alone it would be the last
    a[0, 0, 2] = torch.tensor([3.0, 0.0, 0.0, 0.0])
    assert net._targets(a, final, torch.tensor([0]))[1].item() == 2


def test_single_trains_each_sample_at_the_exit_that_it_takes():
    net = begin(spread(network(im_weighting="single")), "im")
    with torch.no_grad():
        net.gate_bias[0, 2] = -1e4  # nobody leaves at this one
    x, y = batches(1)[0]
    levels, final, _ = net._inputs((x, y))
    a = net._joint_logits(levels)
    with torch.no_grad():
        exit_ = first_exit(exit_distribution(net._gate_logits(a).sigmoid()))
    every = torch.cat((a, final[None, :, None].expand(2, -1, 1, -1)), 2)
    rows = torch.arange(len(y))
    answers = [F.cross_entropy(every[i, rows, exit_[i]], y) for i in range(2)]
    plain = F.cross_entropy(net._plain_logits(levels).transpose(1, 2), y[:, None].expand(-1, len(net.plan)))
    torch.testing.assert_close(net.loss((x, y)), sum(answers) + plain)
    net.loss((x, y)).backward()
    taken = {int(e) for e in exit_[0]}
    assert len(taken) > 1
    assert 2 not in taken
    for k, w in enumerate(net.head_weight):  # those that nobody leaves at learn nothing
        assert bool(w.grad[0].any()) == (k in taken)


def test_sets_of_an_exit_that_twenty_took_are_those_of_all():
    scores = torch.linspace(0, 1, 100)[:, None].repeat(1, 2)
    for taken, alone in ((20, False), (21, True)):
        exits = torch.ones(100, dtype=torch.long)
        exits[:taken] = 0
        found = Conformal(None, scores, exits).quantile(0, 0.1)
        assert found == conformal_quantile(scores[:taken, 0] if alone else scores[:, 0], 0.1)


def test_extract_follows_the_type_of_the_model():
    net = spread(network()).double()
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    for k in range(len(net.plan) + 1):
        small = net.extract({"exit": k})
        assert torch.equal(small(x), net.use({"exit": k})(x))
        assert small(x).dtype is torch.float64


def test_every_point_answers_compiled_as_it_does_uncompiled():
    net = spread(network())
    usual = ThresholdExit(net, target_costs=(0.5,)).calibrate(batches(2))
    x = batches(1)[0][0]
    for one in (net, usual):
        for backend in ("eager", "aot_eager"):
            compiled = torch.compile(one, backend=backend)
            for point in (*one.points(), *one.points()[::-1]):
                one.use(point)
                assert torch.equal(compiled(x), one(x))


def test_four_threads_answer_as_one():
    net = spread(network())
    inputs = [x for x, _ in batches(4, 8)]
    for point in net.points():
        net.use(point)
        alone = [net(x) for x in inputs]
        with torch.no_grad(), ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                for a, b in zip(alone, pool.map(net, inputs), strict=True):
                    assert torch.equal(a, b)


def test_a_criterion_that_fails_leaves_the_network_as_it_was():
    calls = []

    def criterion(a, y):
        calls.append(len(y))
        if len(calls) > 1:
            raise RuntimeError("boom")
        return F.cross_entropy(a, y, reduction="none")

    net = network(criterion=criterion).train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="boom"):
        net.loss(batches(1)[0])
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert (net.phase, net.training, net.model.training) == ("warmup", True, False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_predictions_that_are_not_finite_are_no_validation():
    net = network()
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match=r"validation: .*NaN"):
        ThresholdExit(net).calibrate([(x * math.nan, y)])
    net.clock[0] = 1
    net.epoch_end(batches(2))
    before = copy.deepcopy(net.state_dict())
    net.epoch_end([(x * math.nan, y)])
    assert torch.equal(net.best_score, before["best_score"])
    assert torch.equal(net.best_joint, before["best_joint"])
    assert torch.isfinite(net.pos_weights).all()


@pytest.mark.parametrize("n", [1, 5, 10, 20, 37])
def test_the_conformal_level_counts_the_new_sample(n):
    scores = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    for alpha in (0.05, 0.25, 0.5, 0.75):
        level = min(math.ceil((n + 1) * (1 - alpha)) / n, 1.0)
        expected = np.quantile(scores.numpy(), level, method="higher")
        assert conformal_quantile(scores, alpha) == pytest.approx(float(expected))
