"""Consensus sub-network: the numbers of the specification's exact properties stand in the names."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.cost import flops_per_sample
from pliant.core.dynamic import NotStaticError, Point
from pliant.core.frontier import measure
from pliant.core.gates import binary_gate
from pliant.core.persistence import load, save
from pliant.core.training import fit
from pliant.sparsity.consensus import GATED, Consensus, find_branches, polarization
from pliant.tasks.images import ResidualBlock, SmallResNet

HALF = Point(sparsity=0.5)


def tiny(blocks: int = 2) -> SmallResNet:
    return SmallResNet(widths=(4, 6), blocks=blocks)


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, 1, 8, 8, generator=g), torch.randint(0, 10, (rows,), generator=g)


def gated(**options: object) -> Consensus:
    return Consensus(tiny(), batch()[0], **options)


def shut(net: Consensus, *gates: int) -> Consensus:
    """Heads whose gates are shut for everybody, and the consensus on that."""
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(net._bounds, net._bounds[1:], strict=False)):
            for k in range(a, b):
                if k in gates:
                    net.heads[i].second.bias[k - a] = -100.0
    return net.eval().find_consensus(batch()[0])


class Root(nn.Module):
    """Residual sums in the forward of the model itself, one in place, one with a scale behind the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.a = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.b = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        out = self.a(x)
        out += x
        out = self.relu(out)
        return self.head(out + self.scale * self.b(out))


class Bottleneck(nn.Module):
    """A depthwise convolution between two pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2, 1)
        self.expand, self.n1 = nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.n2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.project, self.n3 = nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu6(self.n2(self.depthwise(F.relu6(self.n1(self.expand(x))))))
        return self.head((x + self.n3(self.project(y))).flatten(1))


# -- exact properties -----------------------------------------------------------------------------------------------


@given(st.integers(2, 9), st.integers(1, 7), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_1_polarisation_is_the_variance_of_the_gates(rows: int, gates: int, seed: int) -> None:
    g = torch.randint(0, 2, (rows, gates), generator=torch.Generator().manual_seed(seed)).double()
    value = polarization(g.mean(0))
    assert abs(value - g.var(0, unbiased=False).mean()) <= 1e-15
    assert (value == 0) == bool(((g.sum(0) == 0) | (g.sum(0) == rows)).all())
    # Half the probability that two samples, drawn with replacement, disagree.
    disagree = (g[:, None] != g[None]).double().mean((0, 1)) / 2
    assert torch.allclose(disagree.mean(), value)


def test_1_a_quarter_if_every_gate_is_split_in_half() -> None:
    assert polarization(torch.full((5,), 0.5)) == 0.25
    assert polarization(torch.tensor([0.0, 1.0])) == 0


def test_2_gradient_moves_every_sample_towards_the_majority() -> None:
    torch.manual_seed(0)
    z = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(z)
    (grad,) = torch.autograd.grad(3.0 * polarization(binary_gate(z).mean(0)), z)
    gbar = (z >= 0).double().mean(0)
    expected = 3.0 * (1 - 2 * gbar) / (8 * 3)
    assert torch.allclose(grad / (p * (1 - p)), expected.expand(8, 3))
    tie = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    assert torch.autograd.grad(polarization(binary_gate(tie).mean(0)), tie)[0].abs().max() == 0
    relaxed = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: polarization(g.mean(0)), (relaxed,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_3_gates_are_exactly_binary_and_pass_the_gradient_straight_through(dtype: torch.dtype) -> None:
    z = torch.tensor([-20.0, -1.0, -1e-4, 0.0, 1e-4, 2.0, 20.0], dtype=dtype, requires_grad=True)
    g = binary_gate(z)
    assert g.tolist() == [0, 0, 0, 1, 1, 1, 1]  # p = 1/2 counts as open
    a = torch.arange(1.0, 8.0).to(dtype)
    (grad,) = torch.autograd.grad((g * a).sum(), z)
    p = torch.sigmoid(z.detach().float())
    assert torch.allclose(grad.float(), a.float() * p * (1 - p), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("mode", ["layer", "channel"])
def test_4_the_extracted_network_is_the_gated_one_where_the_gates_are_unanimous(mode: str) -> None:
    net = gated(granularity=mode)
    net = shut(net, *((1, 2) if mode == "layer" else (*range(4), 5, 9)))  # one whole group of channels among them
    assert float(net.agreement) == 1.0
    x = batch()[0]
    small = net.extract(HALF)
    y = small(x)
    assert torch.equal(y, net.use(HALF)(x))
    if mode == "layer":
        assert torch.equal(y, net.use(GATED)(x))
    else:
        assert torch.allclose(y, net.use(GATED)(x), atol=1e-6)
        masked = net._run_consensus_full(x)  # masking in place of slicing: not one bit differs
        assert torch.equal(masked, net.use(GATED)(x))


@pytest.mark.parametrize("mode", ["layer", "channel"])
def test_5_gates_pinned_open_change_no_bit(mode: str) -> None:
    model, (x, _) = tiny().eval(), batch()
    expected = model(x)
    net = Consensus(model, x, granularity=mode).eval()
    for head in net.heads:
        head.second.bias.data.fill_(float("inf"))
    assert torch.equal(net(x), expected)
    assert torch.equal(net.find_consensus(x).extract(HALF)(x), expected)


def test_5_gates_all_shut_leave_stem_skips_and_head() -> None:
    net = shut(gated(), 0, 1, 2, 3)
    model, (x, _) = net.model, batch()
    by_hand = model.stem(x)
    for stage in model.stages:
        for block in stage:
            by_hand = torch.relu(block.shortcut(by_hand))
    by_hand = model.head(model.pool(by_hand).flatten(1))
    assert torch.equal(net.use(GATED)(x), by_hand)
    assert torch.equal(net.extract(HALF)(x), by_hand)


def test_6_a_shut_branch_gets_no_gradient_but_its_gate_does_unless_the_branch_is_skipped() -> None:
    for skipped in (False, True):
        net = gated()
        net.heads[1].second.bias.data.fill_(-1.0)  # block stages.0.1 shut
        net.heads[1].second.weight.data.zero_()
        if skipped:
            net.frozen[1] = 0
        net.train()
        x, y = batch()
        seen: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: object, output: Tensor, seen: dict[str, Tensor] = seen) -> None:
            output.retain_grad()
            seen["out"] = output

        block = net.model.stages[0][1]
        block.register_forward_hook(keep)
        branch: list[Tensor] = []
        block.norm2.register_forward_hook(lambda m, a, out, branch=branch: branch.append(out))
        F.cross_entropy(net(x), y).backward()
        for name in ("conv1", "norm1", "conv2", "norm2"):
            for p in getattr(block, name).parameters():
                assert p.grad is None or p.grad.abs().max() == 0
        bias = net.heads[1].second.bias.grad
        if skipped:
            assert bias is None
            assert not branch
            continue
        slope = (seen["out"] > 0).float()  # act'
        p = torch.sigmoid(torch.tensor(-1.0))
        expected = (seen["out"].grad * slope * branch[0]).sum() * p * (1 - p)
        assert bias.item() == pytest.approx(expected.item(), rel=1e-4)
        assert bias.item() != 0


def test_7_the_cost_loss_pushes_towards_the_share_in_proportion_to_the_costs() -> None:
    net = gated(keep=0.5)
    for share, sign in ((1.0, 1), (0.0, -1)):
        gbar = torch.full((4,), share, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(net._cost_loss(gbar), gbar)
        assert (grad * sign > 0).all()  # above the share: a step down the gradient lowers every gate
        assert torch.allclose(grad / grad[0], net.costs / net.costs[0])
    half = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    assert net._cost_loss(half).item() == pytest.approx(0.0, abs=1e-30)
    below = gated(keep=0.5, budget="max")._cost_loss(torch.full((4,), 0.2, dtype=torch.float64))
    assert below == 0
    assert gated(cost="gates").costs.tolist() == [1.0] * 4


def test_7_costs_are_the_multiply_adds_behind_each_gate() -> None:
    net = gated()
    x, _ = batch()
    whole = flops_per_sample(net.model, x).total
    for k in range(4):
        assert flops_per_sample(shut(copy.deepcopy(net), k).extract(HALF), x).total == whole - 2 * net.costs[k]
    channels = gated(granularity="channel")
    for k in (0, 5, 15):
        small = shut(copy.deepcopy(channels), k).extract(HALF)
        assert flops_per_sample(small, x).total == whole - 2 * channels.costs[k]
    parameters = gated(cost="parameters", granularity="channel")
    assert parameters.costs[0] == 2 * 4 * 9


class Plain(nn.Module):
    """The plain constructor of a residual network of which some branches are left out."""

    def __init__(self, kept: tuple[bool, ...]) -> None:
        super().__init__()
        full = tiny()
        self.stem, self.pool, self.head = full.stem, full.pool, full.head
        self.stages = full.stages
        self.kept = kept
        blocks = [b for stage in self.stages for b in stage]
        for block, stays in zip(blocks, kept, strict=True):
            if not stays:
                del block.conv1, block.norm1, block.conv2, block.norm2

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, stays in zip([b for s in self.stages for b in s], self.kept, strict=True):
            x = block(x) if stays else torch.relu(block.shortcut(x))
        return self.head(self.pool(x).flatten(1))


def test_8_the_extracted_network_loads_into_a_plain_one_and_counts_add_up() -> None:
    net, (x, _) = shut(gated(), 0, 3), batch()
    small = net.extract(HALF)
    plain = Plain((False, True, True, False)).eval()
    plain.load_state_dict(small.state_dict())  # strict: the same names, no gate among them
    assert torch.equal(plain(x), small(x))
    assert not any(type(m).__module__.startswith("pliant.core") for m in small.modules())
    assert not any(type(m).__module__.startswith("pliant.sparsity") for m in small.modules())
    gone = sum(
        p.numel() for b in (net.branches[0], net.branches[3]) for m in b.members
        for p in net.model.get_submodule(m).parameters()
    )  # fmt: skip
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in net.model.parameters()) - gone


def test_8_channels_leave_their_filters_norms_and_readers() -> None:
    net = shut(gated(granularity="channel"), 1, 2)
    small = net.extract(HALF)
    block = small.stages[0][0]
    assert type(block) is ResidualBlock
    assert block.conv1.weight.shape == (2, 4, 3, 3)
    assert block.norm1.num_features == 2
    assert block.conv2.weight.shape == (4, 2, 3, 3)
    assert torch.equal(block.conv1.weight, net.model.stages[0][0].conv1.weight[[0, 3]])


def test_9_without_regularisers_and_pinned_open_training_is_the_plain_one() -> None:
    x, y = batch()
    plain = tiny()
    net = Consensus(copy.deepcopy(plain), x, lam_polar=0.0, lam_cost=0.0)
    for head in net.heads:
        head.second.bias.data.fill_(float("inf"))
    for model, loss in ((plain, lambda: F.cross_entropy(plain(x), y)), (net, lambda: net.loss((x, y)))):
        model.train()
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "heads" not in n], 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    for a, b in zip(plain.state_dict().values(), net.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_10_one_sample_is_refused_and_the_order_of_samples_does_not_matter() -> None:
    net = gated().train()
    x, y = batch()
    with pytest.raises(ValueError, match="one sample"):
        net.loss((x[:1], y[:1]))
    assert polarization(torch.tensor([1.0])) == 0
    with torch.no_grad():
        for head in net.heads:
            head.second.weight.normal_()
            head.second.bias.zero_()
    order = torch.randperm(6)
    net.eval()
    net(x)
    one = net.regularizer()
    net(x[order])
    assert torch.allclose(one, net.regularizer())
    assert one > 0


_SCRIPT = """
    import os, sys, torch
    from pliant.sparsity.consensus import Consensus
    from pliant.tasks.images import SmallResNet
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SmallResNet(widths=(4, 6), blocks=2).eval()
    x = torch.randn(8, 1, 8, 8)
    net = Consensus(model, x, lam_polar=3.0)
    for head in net.heads:
        head.second.weight.data.normal_(); head.second.bias.data.zero_()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        x = x[:5] if rank == 0 else x[5:]          # unequal parts
    net.eval(); net(x)
    value = net.regularizer(); value.backward()
    grad = torch.cat([p.grad.flatten() for p in net.heads.parameters()])
    if world > 1:
        torch.distributed.all_reduce(grad); grad /= world   # as DistributedDataParallel does
    if world == 1 or rank == 0:
        torch.save((value.detach(), grad), sys.argv[1])
    if world > 1:
        torch.distributed.destroy_process_group()
"""


def test_10_two_processes_average_over_the_joined_batch(tmp_path) -> None:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        start = [sys.executable] + (
            ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"] if processes == 2 else []
        )
        done = subprocess.run([*start, str(script), str(out)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    (one, grad), (two, joined) = found
    assert one > 0.1
    assert torch.allclose(one, two, atol=1e-6)
    assert torch.allclose(grad, joined, atol=1e-6)


def test_11_extraction_looks_at_the_whole_set_not_at_batches() -> None:
    net = gated()
    x = torch.cat([torch.full((4, 1, 8, 8), -3.0), torch.full((4, 1, 8, 8), 3.0)])
    head = net.heads[0]
    with torch.no_grad():
        net.model.stem[0].weight.fill_(0.1)
        head.first.weight.fill_(1.0)
        head.second.weight.fill_(1.0)
        head.first.bias.zero_()
        net.eval()
        entry = net.model.stem(x).mean((2, 3)).sum(1)
        head.second.bias.fill_(-16 * float(entry.max() + entry.min()) / 2)  # between the two kinds of images
    for half in (x[:4], x[4:]):  # each batch agrees with itself
        assert float(net.find_consensus(half).agreement) == 1.0
        net(half)
        assert float(polarization(net.gate_means().detach())) == 0
    with pytest.warns(UserWarning, match="1 of 4 gates are not unanimous"):
        net.find_consensus([(x[:4], None), (x[4:], None)])
    assert float(net.agreement) == pytest.approx(1 - 0.5 / 4)
    assert 0.5 <= float(net.agreement) < 1
    assert net.report().polarization == pytest.approx(0.25 / 4)
    net.min_agreement = 0.99
    with pytest.raises(ValueError, match="min_agreement"):
        net.extract(HALF)
    assert net.extract(HALF, force=True)


@pytest.mark.parametrize("mode", ["layer", "channel"])
def test_12_extract_is_idempotent_and_leaves_the_source_alone(mode: str) -> None:
    net = shut(gated(granularity=mode), 1, 2)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    x, _ = batch()
    one, two = net.extract(HALF), net.extract(HALF)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    with torch.no_grad():
        for p in one.parameters():
            p.zero_()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert type(net.model.stages[0][0]) is ResidualBlock
    exported = torch.export.export(two, (x,)).module()
    assert torch.allclose(exported(x), two(x), atol=1e-6)


# -- finding branches -----------------------------------------------------------------------------------------------


def test_branches_are_found_in_forwards_of_several_styles() -> None:
    found = find_branches(Root())
    assert [(b.block, b.members) for b in found] == [("", ("a",)), ("", ("b",))]
    model, x = Root(), torch.randn(4, 5)
    net = Consensus(model, x).eval()
    for gone in ((0,), (1,), (0, 1)):
        net.means.fill_(1.0)
        net.means[list(gone)] = 0.0
        h = torch.tanh(model.stem(x))
        out = torch.relu(h if 0 in gone else h + model.a(h))
        expected = model.head(out if 1 in gone else out + model.scale * model.b(out))
        assert torch.equal(net.use(HALF)(x), expected)
        small = net.extract(HALF)
        assert torch.equal(small(x), expected)
        assert ("a.0.weight" in small.state_dict()) == (0 not in gone)
        assert ("scale" in small.state_dict()) == (1 not in gone)
    net.train().loss((x, torch.tensor([0, 1, 2, 0]))).backward()


def test_sums_that_are_no_residuals_are_left_alone() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.position = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) + self.position  # no skip
            return self.b(x) + self.c(x)  # two equals

    assert find_branches(Sums()) == []
    with pytest.raises(ValueError, match="no residual branch"):
        Consensus(Sums(), torch.randn(2, 4))


def test_vision_transformers_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    x, y = batch()
    model = transformers.ViTForImageClassification(config).eval()
    with pytest.raises(ValueError, match="granularity='channel' needs none"):
        Consensus(model, x)  # its layers take **kwargs
    channels = Consensus(model, x, granularity="channel", blocks=("*intermediate*", "*fc1*", "*mlp*")).eval()
    channels.means[::3] = 0.0
    channels.train().loss((x, y)).backward()
    channels.eval()
    small = channels.extract(HALF)
    assert torch.equal(small(x).logits, channels.use(HALF)(x).logits)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_depthwise_channels_go_with_their_writer() -> None:
    x, _ = batch()
    net = Consensus(Bottleneck(), x, granularity="channel").eval()
    assert [(r.writer, tuple(r.readers)) for r in net._channels] == [("expand", ("project",))]
    net.means[:5] = 0.0
    small = net.extract(HALF)
    assert small.depthwise.groups == 7
    assert torch.equal(small(x), net.use(HALF)(x))
    net.frozen.copy_((net.means >= 0.5).to(torch.int8))
    assert torch.allclose(net.use(GATED)(x), small(x), atol=1e-6)


def test_sequences_in_linear_layers() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), Mean(), nn.Linear(4, 3))
    x = torch.randn(4, 3, 5)
    net = Consensus(model, x, granularity="channel", blocks=("1",))
    net.loss((x, torch.tensor([0, 1, 2, 0]))).backward()
    net.eval()
    net.means[[0, 7]] = 0.0
    assert torch.equal(net.extract(HALF)(x), net.use(HALF)(x))


# -- training -------------------------------------------------------------------------------------------------------


def test_schedule_ramps_the_cost_first_and_the_polarisation_later() -> None:
    net = gated(lam_polar=3.0, lam_cost=10.0)
    found = {}
    for progress in (0.0, 0.1, 0.15, 0.2, 0.35, 0.6, 1.0):
        net.schedule(progress)
        found[progress] = tuple(round(w, 6) for w in net.weights())
    assert found[0.0] == found[0.1] == (0.0, 0.0)
    assert found[0.15] == (0.3, 5.0)
    assert found[0.2] == (0.6, 10.0)
    assert found[0.35] == (1.5, 10.0)
    assert found[0.6] == found[1.0] == (3.0, 10.0)


def test_fit_saves_measures_and_gates_stay_undecayed(tmp_path) -> None:
    x, y = batch(24)
    net = gated(lam_polar=1.0, lam_cost=3.0)
    groups = net.parameter_groups(0.1)
    assert groups[1]["weight_decay"] == 0.0
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in net.heads.parameters()}
    train = [(x[:12], y[:12]), (x[12:], y[12:])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(net, train, epochs=2, lr=0.05, progress=False)
    net.eval()
    front = measure(net, [(x, y)])
    assert {r.point for r in front} == set(net.points())
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", model=tiny(), example=batch()[0]).eval()
    for point in net.points():
        assert torch.equal(again.use(point)(x), net.use(point)(x))
    assert torch.equal(again.means, net.means)


def test_a_gate_that_was_unanimous_for_two_epochs_is_fixed_and_a_shut_branch_is_not_computed() -> None:
    net = gated(freeze_after=2)
    with torch.no_grad():
        net.heads[1].second.bias.fill_(-50.0)
        net.heads[2].second.weight.mul_(1000.0)
        net.heads[2].second.bias.zero_()
        net.heads[3].second.bias.fill_(50.0)
    x, y = batch()
    net.train()
    net.schedule(0.0)
    calls = []
    net.model.stages[0][1].conv1.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        net.loss((x, y))
        net.epoch_end(None)
    assert net.frozen.tolist()[1] == 0
    assert net.frozen.tolist()[3] == 1
    mixed = net.gate_means()[2].item()
    if 0 < mixed < 1:
        assert net.frozen.tolist()[2] == -1
    ran = len(calls)
    net.loss((x, y)).backward()
    assert len(calls) == ran
    assert net.model.stages[0][1].conv1.weight.grad is None  # an optimiser passes it by
    assert net.heads[1].second.bias.grad is None
    before = net.streak.clone()
    net.epoch_end(None)
    net.epoch_end(None)  # an epoch in which nothing ran tells nothing
    assert net.streak.abs().max() == 0
    assert before.abs().max() == 2
    assert net.eval().find_consensus(x).means[1] == 0


def test_free_gates_do_not_look_at_the_input() -> None:
    net = gated(gate="free").train()
    x, y = batch()
    net.loss((x, y)).backward()
    assert net.heads[0].logits.grad.abs().max() > 0
    net.heads[0].logits.data.fill_(-1.0)
    net.eval()
    net(x)
    assert net.gate_means().tolist() == [0.0, 1.0, 1.0, 1.0]


def test_copies_share_nothing_and_the_models_forwards_are_its_own() -> None:
    net = gated().train()
    x, y = batch()
    net.loss((x, y)).backward()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.heads[0].second.bias.fill_(-100.0)
    net.eval(), other.eval()
    assert not torch.equal(net(x), other(x))
    assert torch.equal(net(x), net.model(x))  # all open
    assert not any("forward" in vars(m) for m in net.model.modules())
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 3, 8, 8))
    assert not any("forward" in vars(m) for m in net.model.modules())


def test_recalibration_estimates_the_norms_on_the_sub_network() -> None:
    x, _ = batch()
    for mode, gates in (("layer", (0,)), ("channel", (0, 1))):
        net = shut(gated(granularity=mode), *gates)
        norm = net.model.stages[0][1].norm1
        seen = []
        handle = norm.register_forward_hook(lambda m, a, o, seen=seen: seen.append(a[0]))
        net.recalibrate([(x[:2], None), (x[2:4], None)])
        handle.remove()
        means = [part.mean((0, 2, 3)) for part in seen]
        assert torch.allclose(norm.running_mean, (means[0] + means[1]) / 2, atol=1e-6)
        assert norm.momentum == 0.1
        assert torch.equal(net.extract(HALF)(x), net.use(HALF)(x))


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "filter"}, "granularity: 'filter'"),
        ({"keep": 0.0}, "keep: 0.0"),
        ({"keep": 1.5}, "keep: 1.5"),
        ({"cost": "time"}, "cost: 'time'"),
        ({"budget": "min"}, "budget: 'min'"),
        ({"gate": "noisy"}, "gate: 'noisy'"),
        ({"lam_polar": -1.0}, "lam_polar: -1.0"),
        ({"lam_cost": float("nan")}, "lam_cost: nan"),
        ({"warmup": 0.7}, "warmup: 0.7"),
        ({"freeze_after": 0}, "freeze_after: 0"),
        ({"min_agreement": 0.2}, "min_agreement: 0.2"),
        ({"blocks": ("nothing.*",)}, "blocks: no module of the model is named 'nothing.*'"),
        ({"blocks": ("stem.0",), "granularity": "channel"}, "leaves no layer whose channels can be gated"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*").replace("[", r"\[")):
        gated(**options)


def test_other_bad_input() -> None:
    x, y = batch()
    with pytest.raises(TypeError, match=r"blocks: .*a sequence of at least one name"):
        gated(blocks="stages")
    net = gated()
    with pytest.raises(RuntimeError, match="no forward has run"):
        net.regularizer()
    with pytest.raises(ValueError, match="no batches"):
        net.find_consensus([])
    with pytest.raises(ValueError, match="no batches"):
        net.recalibrate([])
    with pytest.raises(NotStaticError):
        net.extract(GATED)
    with pytest.raises(ValueError, match="point"):
        net.use(Point(sparsity=0.7))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = ResidualBlock(1, 1), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.block(x)).flatten(1))

    with pytest.raises(ValueError, match="'block' runs 2 times"):
        Consensus(Twice(), x)
    del y


# -- what a point says, ties, threads, and failures ---------------------------------------------------------------


def test_a_point_says_what_was_reached() -> None:
    net = gated(keep=0.25)
    assert net.points() == [Point(sparsity=0.75), GATED]  # what is asked, before anything was found
    net.use(Point(sparsity=0.75))
    net.eval().find_consensus(batch()[0])  # all gates are open
    assert net.points()[0] == net.point == Point(sparsity=0.0)
    shut(net, 0, 3)
    reached = float(net.costs[[0, 3]].sum() / net.costs.sum())
    assert net.points()[0]["sparsity"] == pytest.approx(reached, abs=1e-6)
    assert net.points()[0]["sparsity"] == pytest.approx(1 - net.report().kept, abs=1e-6)
    assert net.use(Point(sparsity=0.75)).point == net.points()[0]  # what was asked names it still
    with pytest.raises(ValueError, match="not a setting"):
        net.use(Point(sparsity=0.5))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_tie_stays_open(granularity: str) -> None:
    net = gated(granularity=granularity).eval()
    net.means.fill_(0.5)
    net.found.fill_(True)
    x = batch()[0]
    assert net.points()[0] == Point(sparsity=0.0)
    assert net.report().kept == net.report().flops == 1.0
    assert torch.equal(net.extract(net.points()[0])(x), net.model(x))
    assert torch.equal(net.use(net.points()[0])(x), net.model(x))
    net.means.fill_(0.4999)
    assert net.points()[0] == Point(sparsity=1.0)
    assert not torch.allclose(net.use(net.points()[0])(x), net.model(x))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_four_threads_answer_as_one(granularity: str) -> None:
    net = gated(granularity=granularity)
    for head in net.heads:
        torch.nn.init.normal_(head.second.weight)
        torch.nn.init.zeros_(head.second.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.eval().find_consensus(batch()[0])
    inputs = [torch.randn(4, 1, 8, 8) for _ in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for point in net.points():
            net.use(point)
            with torch.no_grad(), ThreadPoolExecutor(4) as pool:
                alone = [net(x) for x in inputs]
                for _ in range(8):
                    for a, b in zip(alone, pool.map(net, inputs), strict=True):
                        assert torch.equal(a, b)
    finally:
        sys.setswitchinterval(before)
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in net.model.modules())


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_every_point_answers_compiled_as_it_does_uncompiled(granularity: str) -> None:
    net = shut(gated(granularity=granularity), 0)
    x = batch()[0]
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(net, backend=backend)
        for point in (*net.points(), *net.points()[::-1]):
            net.use(point)
            assert torch.equal(compiled(x), net(x))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_criterion_that_fails_leaves_the_network_as_it_was(granularity: str) -> None:
    calls = []

    def criterion(y: Tensor, t: Tensor) -> Tensor:
        calls.append(len(t))
        if len(calls) > 1:
            raise RuntimeError("boom")
        return F.cross_entropy(y, t)

    net = gated(granularity=granularity, criterion=criterion).train()
    net.loss(batch())
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(RuntimeError, match="boom"):
        net.loss(batch())
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert (net.point, net.training) == (GATED, True)
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in net.model.modules())


def test_recalibration_that_fails_leaves_the_statistics() -> None:
    net = gated().eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="data: it holds no batches"):
        net.recalibrate([])
    with pytest.raises(RuntimeError):
        net.recalibrate([batch()[0], torch.randn(2, 3, 8, 8)])
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert net.point == GATED


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_what_is_not_a_number_counts_for_no_gate(granularity: str) -> None:
    net = gated(granularity=granularity).train()
    x, y = batch()
    net.schedule(0.0)
    net.loss((x, y))
    before = net.lowest.clone(), net.highest.clone()
    assert bool((net.lowest == 1).all())
    net.model.eval()  # so that the norms keep their statistics
    net.loss((x * float("nan"), y))
    assert torch.equal(net.lowest, before[0])
    assert torch.equal(net.highest, before[1])
    with pytest.raises(ValueError, match="data: the gates' logits"):
        net.find_consensus(x * float("nan"))
    assert bool((net.means == 1).all())
    assert not net.found


def test_one_text_is_no_sequence_of_names() -> None:
    for name in ("exclude", "blocks"):
        with pytest.raises(TypeError, match=f"{name}: 'head'; allowed: a sequence"):
            gated(**{name: "head"})


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_2_the_gradient_of_the_regulariser_reaches_the_gates_whole(granularity: str) -> None:
    net = gated(granularity=granularity, lam_polar=3.0, lam_cost=0.0)
    for head in net.heads:
        torch.nn.init.normal_(head.second.weight, std=30.0)
        torch.nn.init.zeros_(head.second.bias)
    x, _ = batch()
    net.eval().use(GATED)(x)
    # Of the gates alone: those further on also depend on what the first ones let through.
    gates = {i: g.detach().requires_grad_() for i, g in net._passing.gates.items()}
    net._passing.gates = gates
    net.regularizer().backward()
    for g in gates.values():
        expected = 3.0 * (1 - 2 * g.detach().mean(0)) / (len(x) * len(net.means))
        torch.testing.assert_close(g.grad, expected.expand_as(g))
    assert any(0 < float(g.detach().mean()) < 1 for g in gates.values())
