"""Every exact property of the SN-Net specification, by its number; networks of many makes; and the errors."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import persistence
from pliant.core.cost import count_flops, count_parameters, flops_per_sample
from pliant.core.dynamic import Point
from pliant.core.frontier import measure
from pliant.core.inputs import call, logits
from pliant.core.persistence import load, save
from pliant.core.training import fit
from pliant.elastic.stitching import NormalEquations, StitchNet, paired, unpaired
from pliant.tasks.images import SmallResNet

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, d: int, norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d) if norm else nn.Identity()
        self.fc1, self.fc2, self.drop = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc2(torch.tanh(self.fc1(self.norm(x)))))


class MLP(nn.Module):
    """(B, 6) -> (B, 4)."""

    def __init__(self, d: int, depth: int = 4, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(d)
        self.embed = nn.Linear(6, d)
        self.blocks = nn.ModuleList(Block(d, **options) for _ in range(depth))
        self.head = nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tokens(nn.Module):
    """A class token and positions around the blocks: (B, 5, 6) -> (B, 4)."""

    def __init__(self, d: int, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(d)
        self.embed = nn.Linear(6, d)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(0.1 * torch.randn(1, 6, d))
        self.blocks = nn.Sequential(*(Block(d) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class Open(MLP):
    """The residual sum is outside of the blocks, and dropout a function of the outer module's mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.embed(x), 0.2, self.training)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Masked(nn.Module):
    """Blocks that take a mask made from the input and a bias table, and return tuples; the output is a mapping."""

    class Layer(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.fc = nn.Linear(d, d)

        def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            weights = (x @ x.transpose(1, 2) + bias).masked_fill(~mask[:, None], -9.0).softmax(-1)
            return x + torch.tanh(self.fc(weights @ x)), weights

    def __init__(self, d: int, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(d)
        self.embed, self.bias = nn.Embedding(9, d), nn.Parameter(torch.randn(5, 5))
        self.layers = nn.ModuleList(self.Layer(d) for _ in range(depth))
        self.head = nn.Linear(d, 4)

    def forward(self, ids: Tensor, unused: Tensor | None = None) -> dict[str, Tensor]:
        mask, x = ids > 0, self.embed(ids)
        bias = self.bias.tril().to(x.dtype)
        if unused is not None or x.shape[1] != 5:
            raise ValueError("not in these tests")
        for layer in self.layers:
            x = layer(x, mask, bias)[0]
        return {"logits": self.head(x.mean(1))}


def smooth(*widths: int, depth: int = 4, make: Any = MLP, **options: Any) -> list[nn.Module]:
    return [make(d, depth, **options) for d in widths]


X, T, Y = torch.randn(64, 6, generator=torch.manual_seed(3)), torch.randn(40, 5, 6), torch.randint(0, 4, (64,))
IDS = torch.randint(0, 9, (40, 5))
IMAGES = torch.randn(24, 1, 12, 12)


def resnets(a: int = 2, b: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    nets = [SmallResNet(widths=(4, 6, 8), blocks=a), SmallResNet(widths=(6, 8, 12), blocks=b)]
    for net in nets:  # statistics that are not those of a new network
        net.train()
        for _ in range(3):
            net(IMAGES)
        net.eval()
    return nets


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mlp": (lambda: smooth(4, 8), X, {}),
    "mlp up and down": (lambda: smooth(4, 6, 8, depth=3), X, {"direction": "both"}),
    "chains": (lambda: smooth(4, 6, 8, depth=3), X, {"nearest": False}),
    "unpaired": (lambda: [MLP(4, 2), MLP(8, 5)], X, {"direction": "both"}),
    "tokens": (lambda: smooth(6, 8, make=Tokens), T, {}),
    "residual sum outside": (lambda: smooth(4, 8, make=Open), X, {}),
    "masks": (lambda: smooth(4, 8, depth=3, make=Masked), {"ids": IDS}, {"blocks": "layers"}),
    "resnets": (resnets, IMAGES, {"direction": "both"}),
}


def case(name: str) -> tuple[StitchNet, Any]:
    make, x, options = CASES[name]
    net = StitchNet(make(), x, **options)
    net.initialize(x)
    return net.eval(), x


def rows_of_block(net: nn.Module, module: nn.Module, x: Any, side: str = "output") -> Tensor:
    """Reference: what a hook sees of a module, as rows."""
    seen: list[Tensor] = []

    def note(m: nn.Module, args: Any, out: Any) -> None:
        seen.append((args[0] if side == "input" else out).detach())

    handle = module.register_forward_hook(note)
    with torch.no_grad():
        call(net.eval(), x)
    handle.remove()
    return seen[0].flatten(0, -2) if seen[0].ndim < 4 else seen[0].movedim(1, -1).flatten(0, -2)


def lstsq(x: Tensor, y: Tensor) -> Tensor:
    """Reference: (D + 1, D') by the library's solver."""
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    return torch.linalg.lstsq(x, y.double(), driver="gelsd").solution


# -- 1, 12: the space -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stride", "stitches", "layers"),
    [(1, 1, 12, 12), (2, 1, 34, 11), (2, 2, 24, 6), (3, 1, 54, 10), (3, 3, 36, 4), (4, 1, 72, 9)],
)
def test_1_counts_of_windows(window, stride, stitches, layers):
    found = paired(12, window, stride)
    assert len(found) == stitches
    assert {layer for _, _, layer in found} == set(range(layers))


def test_1_three_anchors_of_twelve_blocks_have_71_ids():
    net = StitchNet(smooth(2, 3, 4, depth=12), X)
    assert len(net.points()) == len(net.configurations) == 71
    assert [c.id for c in net.configurations] == list(range(71))
    assert [c.anchors for c in net.configurations[:3]] == [(0,), (1,), (2,)]
    seams = [c.stitches[0] for c in net.configurations[3:]]
    assert [(s.j, s.k) for s in seams[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {s.layer for s in seams[:4]} == {0}
    assert [(s.j, s.k) for s in seams[4:7]] == [(1, 2), (2, 1), (2, 2)]
    assert {s.layer for s in seams[4:7]} == {1}
    assert [(s.front, s.back) for s in seams] == [(0, 1)] * 34 + [(1, 2)] * 34
    assert [(s.j, s.k) for s in seams[34:]] == [(s.j, s.k) for s in seams[:34]]
    assert {s.layer for s in seams[34:]} == set(range(11, 22))
    assert len(net.layers) == 22


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 5), st.integers(1, 5))
def test_1_windows_of_any_size(depth, window, stride):
    found = paired(depth, window, stride)
    starts = range(0, depth, stride)
    covered = {
        (j, k) for a in starts for j, k in itertools.product(range(a, a + window), repeat=2) if max(j, k) < depth
    }
    assert {(j, k) for j, k, _ in found} == covered
    assert len({(j, k) for j, k, _ in found}) == len(found)
    for j, k, layer in found:  # each on the layer of the first window that has it
        first = next(a for a in starts if a <= min(j, k) and max(j, k) < a + window)
        others = [
            n for i, m, n in found if next(a for a in starts if a <= min(i, m) and max(i, m) < a + window) == first
        ]
        assert set(others) == {layer}
    forward = paired(depth, window, stride, repeats=False)
    assert [(j, k) for j, k, _ in forward] == [(j, k) for j, k, _ in found if j < k]


def test_12_unpaired_map():
    found = unpaired(6, 18)
    assert len(found) == 17
    assert [(j, i, layer) for j, i, layer in found] == [(i // 3, i, i // 3) for i in range(1, 18)]
    net = StitchNet([MLP(4, 6), MLP(5, 18)], X)
    assert [(s.j, s.k, s.layer) for c in net.configurations[2:] for s in c.stitches] == found
    back = StitchNet([MLP(4, 6), MLP(5, 18)], X, direction="slow-to-fast")
    assert [(s.j, s.k, s.layer) for c in back.configurations[2:] for s in c.stitches] == [
        (i, i // 3, i // 3) for i in range(1, 18)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_12_any_two_depths(a, b):
    if a == b:
        return
    for front, back in ((a, b), (b, a)):
        found = unpaired(front, back)
        deep = 1 if front < back else 0
        assert sorted({pair[deep] for pair in found}) == list(range(1, max(a, b)))
        assert all(pair[1 - deep] == pair[deep] * min(a, b) // max(a, b) for pair in found)
        assert [n for *_, n in found] == sorted(n for *_, n in found)
        assert len({n for *_, n in found}) == len({pair[1 - deep] for pair in found})


def test_directions_and_neighbours():
    up = StitchNet(smooth(4, 5, 6), X)
    down = StitchNet(smooth(4, 5, 6), X, direction="slow-to-fast")
    both = StitchNet(smooth(4, 5, 6), X, direction="both")
    pairs = [{(c.stitches[0].front, c.stitches[0].back) for c in n.configurations[3:]} for n in (up, down, both)]
    assert pairs == [{(0, 1), (1, 2)}, {(1, 0), (2, 1)}, {(0, 1), (1, 2), (1, 0), (2, 1)}]
    assert both.configurations[: len(up.configurations)] == up.configurations


@pytest.mark.parametrize("direction", ["fast-to-slow", "slow-to-fast"])
def test_without_the_nearest_rule_other_pairs_and_chains_follow(direction):
    near = StitchNet(smooth(4, 5, 6, depth=3), X, direction=direction)
    far = StitchNet(smooth(4, 5, 6, depth=3), X, direction=direction, nearest=False)
    a, b, c = (0, 1, 2) if direction == "fast-to-slow" else (2, 1, 0)
    assert far.configurations[: len(near.configurations)] == near.configurations
    rest = far.configurations[len(near.configurations) :]
    space = [(j, k) for j, k, _ in paired(3)]
    assert [(x.anchors, (x.stitches[0].j, x.stitches[0].k)) for x in rest[: len(space)]] == [((a, c), p) for p in space]
    chains = rest[len(space) :]
    assert {x.anchors for x in chains} == {(a, b, c)}
    expected = {(p, q) for p in space for q in space if q[0] >= p[1]}
    assert {tuple((s.j, s.k) for s in x.stitches) for x in chains} == expected
    assert len(chains) == len(expected)
    shared = {s.layer for x in far.configurations if len(x.stitches) == 1 for s in x.stitches}
    assert {s.layer for x in chains for s in x.stitches} <= shared


def test_a_chain_computes_what_its_parts_do():
    net, x = case("chains")
    chain = next(c for c in net.configurations if [(s.j, s.k) for s in c.stitches] == [(0, 1), (2, 1)])
    one, two, three = net.anchors
    h = one.blocks[0](one.embed(x))
    h = two.blocks[2](two.blocks[1](net.layers[chain.stitches[0].layer](h)))
    h = three.blocks[2](three.blocks[1](net.layers[chain.stitches[1].layer](h)))
    assert torch.equal(net.use(Point(stitch=chain.id))(x), three.head(h))


def test_hierarchical_networks_stitch_within_stages():
    a, b = resnets()
    net = StitchNet([a, b], IMAGES)
    seams = [c.stitches[0] for c in net.configurations[2:]]
    assert [(s.stage, s.j, s.k) for s in seams] == [(g, j, k) for g in range(3) for j, k, _ in unpaired(2, 3)]
    assert len({(s.stage, s.layer) for s in seams}) == len({s.layer for s in seams}) == 6
    net.initialize(IMAGES)
    net.eval()
    point = net.find(0, 1, 1, 2, stage=1)
    child = net.extract(point)
    h = child.anchor0.stem(IMAGES)
    for stage in (0, 1):
        for block in (0, 1):
            h = child.get_submodule(f"anchor0.stages.{stage}.{block}")(h)
    assert isinstance(child.stitch0, nn.Conv2d)
    h = child.get_submodule("anchor1.stages.1.2")(child.stitch0(h))
    for block in range(3):
        h = child.get_submodule(f"anchor1.stages.2.{block}")(h)
    assert torch.equal(child.anchor1.head(h.mean((2, 3))), net.use(point)(IMAGES)) or torch.allclose(
        child.anchor1.head(h.mean((2, 3))), net.use(point)(IMAGES), atol=1e-5
    )
    equal = StitchNet(resnets(2, 2), IMAGES)  # of equal depth: forward pairs of K = 2 alone
    assert [(s.stage, s.j, s.k) for c in equal.configurations[2:] for s in c.stitches] == [(g, 0, 1) for g in range(3)]
    for stages, left in (("swin", {0, 1}), ("resnet", {1}), ([2], {2}), ("all", {0, 1, 2})):
        some = StitchNet(resnets(), IMAGES, stages=stages)
        assert {s.stage for c in some.configurations for s in c.stitches} == left


# -- 2: anchors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
def test_2_anchors_are_bit_identical_before_training(name):
    make, x, options = CASES[name]
    originals = [n.eval() for n in make()]
    net = StitchNet(make(), x, **options).eval()
    for initialized in (False, True):
        if initialized:
            net.initialize(x)
        for m, original in enumerate(originals):
            assert torch.equal(net.use(Point(stitch=m))(x), logits(call(original, x)))
            assert all(
                torch.equal(a, b) for a, b in zip(net.anchors[m].parameters(), original.parameters(), strict=True)
            )


@pytest.mark.parametrize("name", ["mlp", "resnets"])
def test_2_frozen_anchors_are_bit_identical_after_training(name):
    make, x, options = CASES[name]
    nets = make() if name == "resnets" else smooth(4, 8, dropout=0.5)
    originals = [n.eval() for n in copy.deepcopy(nets)]
    net = StitchNet(nets, x, train_anchors=False, **options)
    net.initialize(x)
    before = [layer.weight.clone() for layer in net.layers]
    fit(net, [(x, Y[: len(x)])] * 6, epochs=3, lr=0.05, progress=False)
    for m, original in enumerate(originals):
        assert torch.equal(net.use(Point(stitch=m))(x), original(x))
        assert torch.equal(net.extract(Point(stitch=m))(x), original(x))
    assert any(not torch.equal(a, b.weight) for a, b in zip(before, net.layers, strict=True))
    for p in net.points():
        assert torch.equal(net.use(p)(x), net.extract(p)(x))


def test_2_patterns_train_the_class_tokens_alone():
    net = StitchNet(smooth(6, 8, make=Tokens), T, train_anchors=["*cls"])
    assert {n for n, p in net.anchors.named_parameters() if p.requires_grad} == {"0.cls", "1.cls"}
    net.train()
    assert not net.anchors.training
    with pytest.raises(ValueError, match=r"train_anchors: no parameter of the anchors is named '\*token'"):
        StitchNet(smooth(6, 8, make=Tokens), T, train_anchors=["*token"])


# -- 3, 4: known solutions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("kind", ["tokens", "maps"])
def test_3_stitching_a_network_to_its_copy_is_the_identity(dtype, tolerance, kind):
    if kind == "tokens":
        anchor, x, j = Tokens(6).to(dtype).eval(), torch.randn(80, 5, 6, dtype=dtype), 1
        options: dict[str, Any] = {}
    else:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Conv2d(5, 5, 3, 1, 1), nn.Tanh()) for _ in range(3)]
        anchor = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Sequential(*blocks), nn.Flatten(), nn.Linear(500, 3)).to(dtype)
        x, j, options = IMAGES.to(dtype), 0, {"blocks": "1"}
    net = StitchNet([anchor, copy.deepcopy(anchor)], x, stitches=[(0, 1, j, j + 1)], **options)
    net.initialize(x, images=200)
    weight = net.layers[0].weight.flatten(1)
    torch.testing.assert_close(weight, torch.eye(len(weight), dtype=dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(net.layers[0].bias, torch.zeros(len(weight), dtype=dtype), rtol=0, atol=tolerance)
    net.eval()
    torch.testing.assert_close(net.use(Point(stitch=2))(x), anchor(x), rtol=0, atol=100 * tolerance)


def test_4_a_rotated_copy_gives_the_rotation():
    a = MLP(8, norm=False).double()
    q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    b = copy.deepcopy(a)
    with torch.no_grad():  # the stream of b is Q h where that of a is h
        b.embed.weight.copy_(q @ a.embed.weight)
        b.embed.bias.copy_(q @ a.embed.bias)
        b.head.weight.copy_(a.head.weight @ q.T)
        for mine, theirs in zip(b.blocks, a.blocks, strict=True):
            mine.fc1.weight.copy_(theirs.fc1.weight @ q.T)
            mine.fc2.weight.copy_(q @ theirs.fc2.weight)
            mine.fc2.bias.copy_(q @ theirs.fc2.bias)
    x = torch.randn(200, 6, dtype=torch.float64)
    torch.testing.assert_close(a(x), b(x))
    for j in range(3):
        net = StitchNet([a, copy.deepcopy(b)], x, stitches=[(0, 1, j, j + 1)])
        net.initialize(x)
        torch.testing.assert_close(net.layers[0].weight, q, rtol=0, atol=1e-6)
        torch.testing.assert_close(net.layers[0].bias, torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-6)


# -- 5, 6, 7: least squares -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 60), st.integers(1, 7), st.integers(0, 10**6))
def test_5_least_squares_is_optimal(d, out, extra, parts, seed):
    g = torch.Generator().manual_seed(seed)
    n = d + 1 + extra
    x = torch.randn(n, d, generator=g, dtype=torch.float64) + 1
    y = torch.randn(n, out, generator=g, dtype=torch.float64) @ torch.randn(out, out, generator=g, dtype=torch.float64)
    whole, stream = NormalEquations(), NormalEquations()
    whole.add(x, {"y": y})
    for a, b in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        if len(a):
            stream.add(a, {"y": b, "other": -b})
    w, bias = stream.solve("y")
    solution = torch.cat([w.T, bias[None]])
    ones = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)
    one_shot = torch.cat([whole.solve("y")[0].T, whole.solve("y")[1][None]])
    scale = max(1.0, solution.abs().max().item())
    condition = torch.linalg.cond(ones).item()
    if condition < 1e4:
        torch.testing.assert_close(solution, one_shot, rtol=0, atol=1e-6 * scale)
        torch.testing.assert_close(solution, lstsq(x, y), rtol=0, atol=1e-6 * scale)
    residual = ones @ solution - y
    assert (ones.T @ residual).abs().max() < 1e-6 * (ones.norm() * y.norm())
    for _ in range(100):
        other = solution + 0.1 * torch.randn(solution.shape, generator=g, dtype=torch.float64)
        assert residual.norm() <= (ones @ other - y).norm() * (1 + 1e-9)


def test_5_without_full_rank_the_norm_is_least_and_the_ridge_shrinks():
    x = torch.randn(50, 3, dtype=torch.float64)
    x = torch.cat([x, x[:, :1] * 2, torch.zeros(50, 1, dtype=torch.float64)], 1)
    y = torch.randn(50, 2, dtype=torch.float64)
    system = NormalEquations()
    system.add(x, {0: y})
    w, b = system.solve(0)
    torch.testing.assert_close(torch.cat([w.T, b[None]]), lstsq(x, y), rtol=0, atol=1e-8)
    ones = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    gram = ones.T @ ones
    expected = torch.linalg.solve(gram + 0.1 * gram.trace() / 6 * torch.eye(6, dtype=torch.float64), ones.T @ y)
    w, b = system.solve(0, ridge=0.1)
    torch.testing.assert_close(torch.cat([w.T, b[None]]), expected)


def test_5_a_solution_may_be_asked_for_between_batches():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    system = NormalEquations()
    for rows in (15, 30):
        system.add(x[rows - 15 : rows], {0: y[rows - 15 : rows]})
        w, b = system.solve(0)
        torch.testing.assert_close(torch.cat([w.T, b[None]]), lstsq(x[:rows], y[:rows]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["tokens", "mlp", "resnets"])
@pytest.mark.parametrize("direction", ["fast-to-slow", "slow-to-fast"])
def test_5_7_a_layer_is_the_mean_of_the_solutions_on_what_the_blocks_see(name, direction):
    make, x, _ = CASES[name]
    net = StitchNet(make(), x, direction=direction)
    batches = [(x[i : i + 7], None) for i in range(0, len(x), 7)]
    net.initialize(batches)
    blocks = [[list(s) for s in n.stages] if isinstance(n, SmallResNet) else [list(n.blocks)] for n in net.anchors]
    solutions: dict[int, list[Tensor]] = {}
    for c in net.configurations[2:]:
        (s,) = c.stitches
        front = rows_of_block(net.anchors[s.front], blocks[s.front][s.stage][s.j], x)
        back = rows_of_block(net.anchors[s.back], blocks[s.back][s.stage][s.k], x, "input")
        solutions.setdefault(s.layer, []).append(lstsq(front, back))
    assert max(map(len, solutions.values())) > 1 or name == "resnets"
    for number, found in solutions.items():
        mean = torch.stack(found[::-1]).mean(0)
        weight = net.layers[number].weight.detach().flatten(1).double()
        torch.testing.assert_close(weight, mean[:-1].T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net.layers[number].bias.detach().double(), mean[-1], rtol=1e-4, atol=1e-5)


def test_5_initialisation_sees_evaluation_mode_and_only_so_many_images():
    nets = smooth(4, 8, dropout=0.5)
    net = StitchNet(nets, X, stitches=[(0, 1, 1, 2)]).train()
    net.initialize([(X[:20], None), (X[20:], None)], images=30)
    assert net.training
    assert all(m.training for m in net.modules())
    reference = lstsq(
        rows_of_block(nets[0], nets[0].blocks[1], X[:30]), rows_of_block(nets[1], nets[1].blocks[1], X[:30])
    )
    torch.testing.assert_close(net.layers[0].weight.detach().double(), reference[:-1].T, rtol=1e-4, atol=1e-5)


def test_6_the_target_before_the_first_block_is_the_embedding():
    nets = smooth(4, 8)
    net = StitchNet(nets, X, stitches=[(0, 1, 0, 0)])
    net.initialize(X)
    front = rows_of_block(nets[0], nets[0].blocks[0], X)
    right = lstsq(front, rows_of_block(nets[1], nets[1].embed, X))
    wrong = lstsq(front, rows_of_block(nets[1], nets[1].blocks[-1], X))
    torch.testing.assert_close(net.layers[0].weight.detach().double(), right[:-1].T, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net.layers[0].weight.detach().double(), wrong[:-1].T, atol=1e-2)


def test_7_a_shared_layer_is_the_mean_of_layers_of_their_own():
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    shared = StitchNet(smooth(4, 8, depth=2), X)
    shared.initialize(X)
    for order in (pairs, pairs[::-1]):
        alone = StitchNet(smooth(4, 8, depth=2), X, stitches=[(0, 1, j, k) for j, k in order])
        alone.initialize(X)
        weights = torch.stack([layer.weight.detach().double() for layer in alone.layers])
        torch.testing.assert_close(shared.layers[0].weight.detach().double(), weights.mean(0), rtol=0, atol=1e-6)
        assert weights.std(0).max() > 1e-2
    assert len(shared.layers) == 1


# -- 8: cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
def test_8_costs_are_those_of_the_extracted_network(name):
    net, x = case(name)
    one = {k: v[:1] for k, v in x.items()} if isinstance(x, dict) else x[:1]
    for point, cost in net.costs().items():
        child = net.extract(point)
        assert cost == {"flops": flops_per_sample(child, one).total, "parameters": count_parameters(child)}
        with torch.no_grad():
            assert count_flops(lambda p=point: call(net.use(p), one)).total == cost["flops"]
    values = [c["flops"] for c in net.costs().values()]
    assert values == sorted(values)
    assert list(net.costs()) == net.points()


def test_8_additivity_by_hooks_and_the_order_in_j_and_k():
    nets = smooth(6, 8, make=Tokens, depth=5)
    net = StitchNet(nets, T, window=5)
    macs: dict[nn.Module, int] = {}

    def note(m: nn.Module, args: Any, out: Tensor) -> None:
        macs[m] = macs.get(m, 0) + out.numel() // len(out) * m.in_features

    def total(module: nn.Module) -> int:
        return sum(macs.get(m, 0) for m in module.modules())

    handles = [m.register_forward_hook(note) for n in nets for m in n.modules() if isinstance(m, nn.Linear)]
    for n in nets:
        n(T[:1])
    for handle in handles:
        handle.remove()
    embed, head = [total(n.embed) for n in nets], [total(n.head) for n in nets]
    blocks = [[total(b) for b in n.blocks] for n in nets]
    flops = {p: c["flops"] for p, c in net.costs().items()}
    for c in net.configurations[2:]:
        (s,) = c.stitches
        expected = embed[0] + sum(blocks[0][: s.j + 1]) + 6 * 6 * 8 + sum(blocks[1][s.k :]) + head[1]
        assert flops[Point(stitch=c.id)] == 2 * expected
    for i in range(5):
        in_k = [flops[net.find(0, 1, i, k)] for k in range(5)]
        in_j = [flops[net.find(0, 1, j, i)] for j in range(5)]
        assert in_k == sorted(in_k, reverse=True)
        assert in_j == sorted(in_j)
        assert len(set(in_k)) == len(set(in_j)) == 5
    assert flops[net.find(0, 1, 0, 0)] > flops[Point(stitch=1)]


# -- 9, 10: paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
def test_9_extraction_is_bit_identical_and_holds_the_path_alone(name):
    net, x = case(name)
    owned = {id(p): n for n, p in net.named_parameters()}
    for point in net.points():
        child = net.extract(point)
        assert torch.equal(call(net.use(point), x), call(child, x))
        assert not child.training
        assert not any(type(m).__module__.startswith("pliant.elastic") for m in child.modules())
        ran: set[int] = set()
        handles = [
            m.register_forward_hook(lambda m, *_, ran=ran: ran.update(id(p) for p in m.parameters(recurse=False)))
            for m in net.body.modules()
        ]
        call(net, x)
        for handle in handles:
            handle.remove()
        c = net.configurations[int(point["stitch"])]
        bare = [n for n, _ in net.named_parameters() if re.fullmatch(r"body\.anchors\.\d\.(cls|pos|bias)", n)]
        for full in bare:  # parameters of the networks themselves: the front's positions, every network's bias table
            m, leaf = int(full.split(".")[2]), full.rpartition(".")[2]
            if m == c.anchors[0] or (leaf == "bias" and m in c.anchors):
                ran.add(id(dict(net.named_parameters())[full]))
        got = sorted((tuple(p.shape), p.sum().item()) for p in child.parameters())
        assert got == sorted((tuple(p.shape), p.sum().item()) for p in net.parameters() if id(p) in ran)
        assert not {id(p) for p in child.parameters()} & owned.keys()


def test_9_the_extracted_network_is_ordinary(tmp_path):
    net, x = case("resnets")
    child = net.extract(net.points()[3])
    before = net.use(net.points()[3])(x)
    again = copy.deepcopy(child)
    torch.save(child.state_dict(), tmp_path / "w.pt")
    with torch.no_grad():
        for p in child.parameters():
            p.add_(1.0)
    assert torch.equal(net(x), before)
    assert torch.equal(again(x), before)
    child.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(child(x), before)
    loose = pickle.loads(pickle.dumps(child))
    assert torch.equal(loose(x), before)
    exported = torch.export.export(child, (x,)).module()
    torch.testing.assert_close(exported(x), before)
    F.cross_entropy(child.train()(x), Y[: len(x)]).backward()
    assert all(p.grad is not None for p in child.parameters())


@pytest.mark.parametrize("name", list(CASES))
def test_10_gradients_stay_on_the_path(name):
    net, x = case(name)
    names = {id(p): n for n, p in net.named_parameters()}
    target = Y[:40] if isinstance(x, dict) else Y[: len(x)]
    for point in net.points():
        net.zero_grad(set_to_none=True)
        F.cross_entropy(call(net.use(point), x), target).backward()
        touched = {names[id(p)] for p in net.parameters() if p.grad is not None}
        c = net.configurations[int(point["stitch"])]
        numbers = {n.split(".")[2] for n in touched if n.startswith("body.anchors.")}
        assert numbers == {str(m) for m in c.anchors}
        assert {n.split(".")[2] for n in touched if n.startswith("body.layers.")} == {str(s.layer) for s in c.stitches}
        for m in c.anchors[1:]:
            entrance = [n for n in touched if n.startswith((f"body.anchors.{m}.embed", f"body.anchors.{m}.stem"))]
            assert not entrance
            assert not any(n in (f"body.anchors.{m}.cls", f"body.anchors.{m}.pos") for n in touched)
        assert count_parameters(net.extract(point)) == sum(p.numel() for p in net.parameters() if p.grad is not None)


# -- 11: sampling -----------------------------------------------------------------------------------------------------


def test_11_draws_are_uniform_and_a_function_of_seed_and_number():
    net = StitchNet(smooth(4, 8, depth=3), X, seed=5)
    count = len(net.points())
    drawn = [int(net.draw()["stitch"]) for _ in range(200 * count)]
    observed = torch.bincount(torch.tensor(drawn), minlength=count).double()
    chi = ((observed - 200) ** 2 / 200).sum().item()
    assert chi < count + 4 * math.sqrt(2 * count)
    other = StitchNet(smooth(4, 8, depth=3), X, seed=5)
    torch.manual_seed(123)
    assert [int(other.draw()["stitch"]) for _ in range(50)] == drawn[:50]
    other.draws.fill_(20)
    assert int(other.draw()["stitch"]) == drawn[20]
    sixth = StitchNet(smooth(4, 8, depth=3), X, seed=6)
    assert [int(sixth.draw()["stitch"]) for _ in range(50)] != drawn[:50]


def test_11_training_draws_and_evaluation_does_not():
    net, x = case("mlp")
    point = net.points()[2]
    net.use(point)
    expected = F.cross_entropy(net(x), Y)
    assert net.loss((x, Y)) == expected
    assert net.draws == 0
    state = torch.get_rng_state()
    net.train()
    losses = [net.loss((x, Y)) for _ in range(8)]
    assert net.draws == 8
    assert torch.equal(torch.get_rng_state(), state)
    assert net.point == point
    check = StitchNet(smooth(4, 8), X)
    paths = [check.draw() for _ in range(8)]
    for loss, path in zip(losses, paths, strict=True):
        torch.testing.assert_close(loss, F.cross_entropy(net.use(path)(x), Y))


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_with_a_teacher():
    teacher = nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 4))
    net = StitchNet(smooth(4, 8), X, teacher=teacher, teacher_weight=0.25).eval()
    out, hard = net(X), teacher.eval()(X).argmax(1)
    teacher.train()
    expected = 0.75 * F.cross_entropy(out, Y) + 0.25 * F.cross_entropy(out, hard)
    torch.testing.assert_close(net.loss((X, Y)), expected)
    assert teacher.training
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in net.parameters()}
    assert net.teacher is teacher
    soft = torch.rand(64, 4).softmax(1)  # mixup targets
    expected = 0.75 * F.cross_entropy(out, soft) + 0.25 * F.cross_entropy(out, hard)
    torch.testing.assert_close(net.loss((X, soft)), expected)


def test_the_loss_with_a_soft_teacher():
    teacher = MLP(6)
    net = StitchNet(smooth(4, 8), X[:2], teacher=teacher, distillation="soft", teacher_weight=0.25).eval()
    out, wish = net(X), teacher(X).softmax(1)
    expected = 0.75 * F.cross_entropy(out, Y) - 0.25 * (wish * out.log_softmax(1)).sum(1).mean()
    assert torch.allclose(net.loss((X, Y)), expected, rtol=1e-6)


def test_ids_stage_by_stage():
    models = [SmallResNet(widths=w, blocks=3) for w in ((4, 8), (8, 16), (12, 24))]
    pairs, stages = (StitchNet(models, IMAGES[:2], order=order) for order in ("pairs", "stages"))

    def seams(net):
        return [(s.stage, s.front, s.back, s.j, s.k, s.layer) for c in net.configurations[3:] for s in c.stitches]

    by_stage = seams(stages)
    assert [s[:3] for s in by_stage] == sorted(s[:3] for s in by_stage)
    assert [s[1:3] for s in seams(pairs)] == sorted(s[1:3] for s in seams(pairs))
    assert sorted(s[:5] for s in by_stage) == sorted(s[:5] for s in seams(pairs))
    assert [c.id for c in stages.configurations] == list(range(len(stages.configurations)))
    layers = [s[5] for s in by_stage]
    assert layers == sorted(layers)
    assert set(layers) == set(range(len(stages.layers)))


def test_parameter_groups():
    net = StitchNet(smooth(4, 8), X, anchor_lr_scale=0.1)
    layers, anchors = net.parameter_groups(0.05)
    assert {id(p) for p in layers["params"]} == {id(p) for p in net.layers.parameters()}
    assert {id(p) for p in anchors["params"]} == {id(p) for p in net.anchors.parameters()}
    assert anchors["lr_scale"] == 0.1
    assert layers["weight_decay"] == anchors["weight_decay"] == 0.05
    frozen = StitchNet(smooth(4, 8), X, train_anchors=False)
    assert len(frozen.parameter_groups()) == 1
    assert {int(frozen.draw()["stitch"]) for _ in range(300)} == set(range(2, 12))


def test_fit_improves_every_path_and_warns_of_random_layers():
    target = (X @ torch.randn(6, 4)).argmax(1)
    net = StitchNet(smooth(8, 16), X)
    net.initialize(X)
    before = [F.cross_entropy(net.eval().use(p)(X), target).item() for p in net.points()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(net, [(X, target)] * 40, epochs=2, lr=0.05, progress=False)
    after = [F.cross_entropy(net.use(p)(X), target).item() for p in net.points()]
    assert all(a < 0.7 * b for a, b in zip(after, before, strict=True))
    front = measure(net, [(X, target)], repeats=0)
    assert len(front) == len(net.points())
    fresh = StitchNet(smooth(8, 16), X).train()
    with pytest.warns(UserWarning, match="stitching layers are still random"):
        fresh.loss((X, target))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.loss((X, target))


def test_every_id_has_statistics_of_its_own():
    nets = resnets()
    originals = [copy.deepcopy(n) for n in nets]
    net = StitchNet(nets, IMAGES).eval()
    stitch = net.find(0, 1, 0, 1, stage=1)
    assert torch.equal(net.use(Point(stitch=1))(IMAGES), originals[1](IMAGES))
    with pytest.raises(RuntimeError, match="statistics of stitch="):
        net.use(stitch)(IMAGES)
    with pytest.raises(RuntimeError, match="statistics of stitch="):
        net.extract(stitch)
    net.initialize(IMAGES)
    net.use(stitch)(IMAGES)
    fit(net, [(IMAGES, Y[:24])] * 5, epochs=1, lr=0.05, progress=False)
    for mine, original in zip(net.anchors, originals, strict=True):  # the anchors' own buffers were never written
        for (name, a), (_, b) in zip(mine.named_buffers(), original.named_buffers(), strict=True):
            assert "running" not in name or torch.equal(a, b)
    # Each row is that of its own path alone: estimate it on the extracted network.
    for point in (stitch, net.find(0, 1, 1, 2, stage=2), Point(stitch=1)):
        child = net.extract(point)
        norms = [m for m in child.modules() if isinstance(m, nn.BatchNorm2d)]
        kept = [m.running_mean.clone() for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None
            m.train()
        with torch.no_grad():
            child(IMAGES)
        for m, mean in zip(norms, kept, strict=True):
            torch.testing.assert_close(m.running_mean, mean, rtol=1e-4, atol=1e-5)
    net.train()
    net.loss((IMAGES, Y[:24]))
    net.eval()
    with pytest.raises(RuntimeError, match=r"finish\(train\)"):
        net.use(Point(stitch=0))(IMAGES)
    net.finish([(IMAGES, Y[:24])])
    net.use(Point(stitch=0))(IMAGES)


# -- networks of many makes -------------------------------------------------------------------------------------------


def test_blocks_by_name_by_function_and_found():
    reference, x = case("mlp")
    ways: list[Any] = [
        "blocks",
        ["blocks"],
        lambda n: "blocks",
        lambda n: (n.embed, list(n.blocks), n.head),
        lambda n: (lambda x: n.embed(x), [n.blocks], nn.Sequential(n.head)),
    ]
    for blocks in ways:
        net = StitchNet(smooth(4, 8), X, blocks=blocks).initialize(X).eval()
        assert net.configurations == reference.configurations
        for p in net.points():
            assert torch.equal(net.use(p)(x), reference.use(p)(x))
            assert torch.equal(net.extract(p)(x), reference.use(p)(x))
        assert count_parameters(net) == count_parameters(reference)
        assert net.costs() == reference.costs()


def test_one_module_list_is_a_sequence_of_anchors():
    nets = nn.ModuleList(smooth(4, 8))
    net = StitchNet(nets, X)
    assert [id(a) for a in net.anchors] == [id(n) for n in nets]
    assert net.point == Point(stitch=1)
    assert net.use({"stitch": 0}).point == Point(stitch=0)


def test_dropout_of_the_outer_forward_follows_the_mode():
    net, x = case("residual sum outside")
    net.use(Point(stitch=2))
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))
    plain = net.extract(net.point)  # in evaluation mode, whatever this network's is
    net.eval()
    assert torch.equal(net(x), net.extract(net.point)(x))
    assert torch.equal(net(x), plain(x))


class InPlace(MLP):
    """Blocks that overwrite what they are given."""

    class Layer(nn.Module):
        def __init__(self, d: int) -> None:
            super().__init__()
            self.fc = nn.Linear(d, d)

        def forward(self, x: Tensor) -> Tensor:
            return x.tanh_() + self.fc(x)

    def __init__(self, d: int, depth: int = 3) -> None:
        super().__init__(d, 0)
        self.blocks = nn.ModuleList(self.Layer(d) for _ in range(depth))


def test_blocks_that_work_in_place():
    with torch.no_grad():
        nets = smooth(4, 8, depth=3, make=InPlace)
        net = StitchNet(nets, X, stitches=[(0, 1, 0, 1), (0, 1, 1, 2)]).initialize(X).eval()
        h0 = nets[0].blocks[0](nets[0].embed(X))
        h1 = nets[1].blocks[0](nets[1].embed(X))
        torch.testing.assert_close(net.layers[0].weight.double(), lstsq(h0, h1)[:-1].T, rtol=1e-4, atol=1e-5)
        for p in net.points():
            assert torch.equal(net.use(p)(X), net.extract(p)(X))


def test_from_maps_to_tokens_and_back():
    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(1, 10, 4, 4)
            self.blocks = nn.Sequential(*(Block(10) for _ in range(3)))
            self.head = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))

    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 5, 4, 4)
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(5, 5, 3, 1, 1), nn.Tanh()) for _ in range(3)))
            self.head = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    torch.manual_seed(0)
    cnn, vit = Cnn(), Vit()
    net = StitchNet([cnn, vit], IMAGES, blocks="blocks", direction="both").initialize(IMAGES).eval()
    s = net.find(0, 1, 0, 1)
    layer = net.layers[0]
    h = vit.blocks[1](layer(cnn.blocks[0](cnn.stem(IMAGES)).flatten(2).transpose(1, 2)))
    torch.testing.assert_close(net.use(s)(IMAGES), vit.head(vit.blocks[2](h).mean(1)))
    for p in net.points():
        assert torch.equal(net.use(p)(IMAGES), net.extract(p)(IMAGES))
    single = StitchNet([cnn, vit], IMAGES, blocks="blocks", stitches=[(1, 0, 0, 1)]).initialize(IMAGES)
    front = rows_of_block(vit, vit.blocks[0], IMAGES)
    reference = lstsq(front, rows_of_block(cnn, cnn.blocks[0], IMAGES))
    torch.testing.assert_close(single.layers[0].weight.detach().double(), reference[:-1].T, rtol=1e-3, atol=1e-4)


def test_other_sizes_need_an_adapter():
    def nets() -> list[nn.Module]:
        torch.manual_seed(0)
        return [SmallResNet(widths=(4, 4, 4), stem_stride=2), SmallResNet(widths=(6, 6, 6), stem_stride=1, blocks=3)]

    with pytest.raises(
        ValueError, match=r"shape \(4, 6, 6\), before block 1 of anchor 1 \(6, 12, 12\).*adapter='resize'"
    ):
        StitchNet(nets(), IMAGES)
    for adapter in ("resize", lambda front, back: nn.Upsample(back[1:])):
        net = StitchNet(nets(), IMAGES, adapter=adapter, direction="both").initialize(IMAGES).eval()
        for p in net.points():
            child = net.extract(p)
            assert torch.equal(net.use(p)(IMAGES), child(IMAGES))
            assert not any(type(m).__module__.startswith("pliant.elastic") for m in child.modules())
    with pytest.raises(ValueError, match=r"adapter: it gives shape \(4, 6, 6\)"):
        StitchNet(nets(), IMAGES, adapter=lambda front, back: nn.Identity())
    with pytest.raises(TypeError, match="adapter: gave a int"):
        StitchNet(nets(), IMAGES, adapter=lambda front, back: 3)
    short = Tokens(6)
    short.pos = nn.Parameter(torch.zeros(1, 4, 6))
    short.forward = lambda x, f=Tokens.forward, m=short: f(m, x[:, :3])  # three tokens of five
    with pytest.raises(ValueError, match=r"shape \(4, 6\), before block 0 of anchor 1 \(6, 8\)"):
        StitchNet([short, Tokens(8)], T)
    net = StitchNet([short, Tokens(8)], T, adapter="resize").initialize(T).eval()
    for p in net.points():
        assert torch.equal(net.use(p)(T), net.extract(p)(T))


@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_models_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    size = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[0, slice(3, 5) if kind == "bert" else slice(0, 2)] = 0
    x = {"input_ids": torch.randint(0, 20, (6, 5)), "attention_mask": mask}
    if kind == "vit":
        size |= {"image_size": 8, "patch_size": 4, "num_labels": 4, "num_channels": 1}
        cls, config = transformers.ViTForImageClassification, transformers.ViTConfig
        x = {"pixel_values": torch.randn(6, 1, 8, 8)}
    elif kind == "bert":
        size |= {"vocab_size": 20, "num_labels": 4}
        cls, config = transformers.BertForSequenceClassification, transformers.BertConfig
    else:  # its rotary embedding takes the features and looks at their type alone
        size |= {"vocab_size": 20, "num_key_value_heads": 2, "use_cache": False}
        cls, config = transformers.LlamaForCausalLM, transformers.LlamaConfig
    nets = [cls(config(hidden_size=d, **size)).eval() for d in (8, 12)]
    originals = copy.deepcopy(nets)
    net = StitchNet(nets, x).eval()
    net.initialize([(x, None)] * 4)
    other = {k: v[:4].flip(0) for k, v in x.items()}
    if kind != "vit":
        other["attention_mask"] = torch.tensor([[0, 0, 0, 1, 1]] * 2 + [[1] * 5] * 2)
    for m, original in enumerate(originals):
        with torch.no_grad():
            assert torch.equal(net.use(Point(stitch=m))(**other), original(**other).logits)
    for p in net.points():
        assert torch.equal(net.use(p)(**other), net.extract(p)(**other))
    if kind == "bert":  # masked tokens do not matter, on stitched paths either
        changed = x | {"input_ids": torch.where(x["attention_mask"].bool(), x["input_ids"], 7)}
        for p in net.points():
            torch.testing.assert_close(net.use(p)(**x), net.use(p)(**changed))
    if kind != "llama":
        fit(net, [(x, Y[:6])] * 3, epochs=1, lr=0.01, progress=False)


class Loose(MLP):
    """Makes modules and tensors as it runs, and asks for shapes."""

    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape
        if width != 6 or len(x.shape) != 2 or x.dtype != torch.float32:
            raise ValueError("another input")
        x = nn.Tanh()(self.embed(x)) + torch.linspace(0, 1, self.embed.out_features)
        for block in self.blocks:
            x = block(x)
        return self.head(nn.Tanh()(x)).view(batch, -1)


def test_forwards_that_make_modules_and_constants():
    nets = smooth(4, 8, depth=3, make=Loose)
    originals = copy.deepcopy(nets)
    net = StitchNet(nets, X).initialize(X).eval()
    for m in (0, 1):
        assert torch.equal(net.use(Point(stitch=m))(X[:5]), originals[m](X[:5]))
    for p in net.points():
        assert torch.equal(net.use(p)(X), net.extract(p)(X))
    assert not any("constant" in name for name in net.state_dict())


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
def test_saved_and_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(persistence, "_catalogue", lambda: ["pliant.elastic.stitching:StitchNet"])
    make, x, options = CASES[name]
    net = StitchNet(make(), x, seed=3, **options)
    net.initialize(x)
    net.train()
    net.draw()
    net.eval()
    net.use(net.points()[2])
    save(net, tmp_path / "out")
    again = load(tmp_path / "out", anchors=nn.ModuleList(make()))
    assert isinstance(again, StitchNet)
    again.eval()
    assert again.point == net.point
    assert again.draws == net.draws == 1
    assert again.initialized
    for p in net.points():
        assert torch.equal(call(again.use(p), x), call(net.use(p), x))
    with pytest.raises(ValueError, match="anchors: StitchNet needs it"):
        load(tmp_path / "out")


def test_saved_and_loaded_with_a_function_for_the_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(persistence, "_catalogue", lambda: ["pliant.elastic.stitching:StitchNet"])

    def blocks(network: nn.Module) -> Any:
        return nn.Sequential(network.embed), list(network.blocks), nn.Sequential(network.head)

    net = StitchNet(smooth(4, 8), X, blocks=blocks, criterion=F.cross_entropy).initialize(X).eval()
    save(net, tmp_path / "out")
    again = load(tmp_path / "out", anchors=smooth(4, 8), blocks=blocks).eval()
    for p in net.points():
        assert torch.equal(again.use(p)(X), net.use(p)(X))


@pytest.mark.parametrize("name", ["tokens", "resnets"])
def test_copied_and_pickled(name):
    net, x = case(name)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for p in net.points():
            assert torch.equal(again.use(p)(x), net.use(p)(x))
            assert torch.equal(again.extract(p)(x), net.use(p)(x))
        with torch.no_grad():
            again.layers[0].weight.zero_()
        assert net.layers[0].weight.abs().sum() > 0


def test_resumed_training_is_exact(tmp_path):
    data = [(IMAGES[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)]

    def make() -> StitchNet:
        return StitchNet(resnets(), IMAGES).initialize(IMAGES)

    whole = make()
    fit(whole, data, epochs=2, lr=0.02, progress=False)
    broken = make()

    def stop(step: int, *_: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(broken, data, epochs=2, lr=0.02, progress=False, checkpoint=tmp_path, on_step=stop)
    fresh = make()
    fit(fresh, data, epochs=2, lr=0.02, progress=False, checkpoint=tmp_path)
    for p in whole.points():
        assert torch.equal(fresh.use(p)(IMAGES), whole.use(p)(IMAGES))


# -- the experiment ---------------------------------------------------------------------------------------------------


def test_the_resnets_of_the_experiment_load_exactly():
    from pliant.reproduce import sn_net

    try:
        nets = [sn_net.cifar_resnet(depth) for depth in (20, 32)]
        x, y = sn_net.cifar_jpeg("test", 200)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert [count_parameters(n) for n in nets] == [269_722, 464_154]
    assert len(set(y.tolist())) == 10
    assert all(70 < sn_net._accuracy(n, x, y) < 92 for n in nets)
    net = StitchNet(nets, x[:2])
    assert len(net.points()) == 2 + 3 * 4
    with torch.no_grad():
        assert torch.equal(net.eval().use(Point(stitch=0))(x[:8]), nets[0].eval()(x[:8]))


def test_the_experiment_without_its_data_says_so(monkeypatch):
    from pliant.reproduce import sn_net

    monkeypatch.delenv("PLIANT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"\$PLIANT_DATA"):
        sn_net.cifar_resnet(20)
    with pytest.raises(FileNotFoundError, match=r"\$PLIANT_DATA"):
        sn_net.cifar_jpeg("test", 2)
    said: list[str] = []
    assert sn_net._cifar(1, said.append) is None
    assert "left out" in said[0]
    assert sn_net._spearman([1, 2, 3, 4], [1, 2, 2, 5]) == pytest.approx(0.9487, abs=1e-3)
    assert sn_net._pareto([1, 2, 3, 3], [5, 4, 6, 7]) == [0, 3]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"window": 0}, ValueError, "window: 0"),
        ({"stride": 1.5}, TypeError, r"stride: 1\.5"),
        ({"calibration_batches": True}, TypeError, "calibration_batches: True"),
        ({"direction": "up"}, ValueError, "direction: 'up'; allowed: 'fast-to-slow'"),
        ({"anchor_lr_scale": 0.0}, ValueError, r"anchor_lr_scale: 0\.0"),
        ({"teacher_weight": 1.5}, ValueError, r"teacher_weight: 1\.5"),
        ({"teacher": 3}, TypeError, r"teacher: 3; allowed: an nn\.Module"),
        ({"adapter": "pool"}, TypeError, "adapter: 'pool'"),
        ({"channels_last": [True]}, ValueError, "channels_last: 1 values for 2 anchors"),
        ({"stages": "some"}, ValueError, "stages: 'some' is not one of"),
        ({"stages": [1]}, ValueError, r"stages: \[1\].*allowed: 0\.\.0"),
        ({"stages": "resnet"}, ValueError, "stages: resnet leaves"),
        ({"stitches": [(0, 1, 2)]}, ValueError, r"stitches\[0\]: \(0, 1, 2\); allowed"),
        ({"stitches": [(0, 0, 1, 1)]}, ValueError, "two different anchors of 0..1"),
        ({"stitches": [(0, 2, 1, 1)]}, ValueError, "two different anchors of 0..1"),
        ({"stitches": [(0, 1, 4, 1)]}, ValueError, r"j=4, but the blocks of anchor 0 there are 0\.\.3"),
        ({"stitches": [(0, 1, 1, -1)]}, ValueError, r"k=-1, but the blocks of anchor 1 there are 0\.\.3"),
        ({"stitches": [(0, 1, 1, 0, 0)]}, ValueError, "names stage 1"),
        ({"blocks": "layers"}, ValueError, r"blocks: anchor 0 \(MLP\) has no module 'layers'; .*blocks"),
        ({"blocks": "head"}, ValueError, "blocks: 'head' of anchor 0 .* is a Linear"),
        ({"blocks": 3}, TypeError, "blocks: 3"),
        ({"blocks": lambda n: (n.embed, [], n.head)}, ValueError, "expected a list of modules"),
        ({"blocks": lambda n: (n.embed, n.blocks)}, ValueError, "blocks: gave"),
        ({"blocks": lambda n: (n.embed, n.blocks, nn.Linear(8, 4))}, ValueError, "not one of the network's own"),
        ({"blocks": lambda n: (n.embed, list(n.blocks)[::-1], n.head)}, ValueError, "answers otherwise"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        StitchNet(smooth(4, 8), X, **kwargs)


def test_bad_anchors():
    a, b = smooth(4, 8)
    with pytest.raises(ValueError, match="anchors: 1 network; two or more"):
        StitchNet([a], X)
    with pytest.raises(ValueError, match="anchors: 0 network"):
        StitchNet([], X)
    with pytest.raises(TypeError, match="expected a sequence of networks, got one MLP"):
        StitchNet(a, X)
    with pytest.raises(TypeError, match="anchors: 3; allowed: a sequence"):
        StitchNet(3, X)
    with pytest.raises(TypeError, match=r"anchors\[1\]: 'b'; allowed: an nn\.Module"):
        StitchNet([a, "b"], X)
    with pytest.raises(ValueError, match="listed twice"):
        StitchNet([a, a], X)
    with pytest.raises(ValueError, match=r"network 0 \(MLP\): example: the model does not accept"):
        StitchNet([a, b], torch.randn(2, 5))
    ten = MLP(8)
    ten.head = nn.Linear(8, 10)
    with pytest.raises(ValueError, match=r"the same number of classes"):
        StitchNet([a, ten], X)
    with pytest.warns(UserWarning, match=r"anchors: sorted by cost"):
        net = StitchNet([b, a], X)
    assert net.anchors[0] is a
    bad = MLP(4)
    with torch.no_grad():
        bad.embed.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        StitchNet([bad, b], X)
    with pytest.raises(ValueError, match="no list of repeated blocks"):
        StitchNet([nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))], X)
    flat = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(144, 144), nn.Linear(144, 10)))
    stages = {SmallResNet: ["stages.0", "stages.1", "stages.2"], nn.Sequential: "1"}
    with pytest.raises(ValueError, match=r"the anchors have \[1, 3\] stages|the anchors have \[3, 1\] stages"):
        StitchNet(sorted([SmallResNet(), flat], key=lambda n: n is not flat), IMAGES, blocks=lambda n: stages[type(n)])
    with pytest.raises(ValueError, match="no stitch between them"):
        StitchNet(resnets(1, 1), IMAGES, blocks=["stages.0", "stages.1", "stages.2"])


class Branching(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if x.sum() > 0:
            x = x * 1.0
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Statement(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x.mul_(2.0)
        y = x
        y.add_(1.0)
        return self.head(x)


class Skipping(MLP):
    def forward(self, x: Tensor) -> Tensor:
        first = x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x + first)


class Twice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x)
        return self.head(x)


def test_networks_that_cannot_be_cut():
    for make, message in (
        (Branching, "branches on the numbers in a tensor"),
        (Statement, "answers otherwise when it is taken apart"),
        (Skipping, "2 values cross there"),
        (Twice, "'blocks.0' runs 2 times"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            StitchNet(smooth(4, 8, make=make), X, blocks="blocks")
        assert "anchor 0" in str(caught.value)
    works = StitchNet(smooth(4, 8, make=Branching), X, blocks=lambda n: (n.embed, list(n.blocks), n.head))
    assert len(works.points()) == 12


def test_bad_initialisation_and_points():
    net = StitchNet(smooth(4, 8), X)
    with pytest.raises(ValueError, match="data: 3 rows; least squares needs at least 5"):
        net.initialize(X[:3])
    with pytest.raises(ValueError, match="data: it has no batches"):
        net.initialize([])
    with pytest.raises(ValueError, match="images: 0"):
        net.initialize(X, images=0)
    with pytest.raises(ValueError, match="ridge: -1"):
        net.initialize(X, ridge=-1.0)
    bad = X.clone()
    bad[5, 2] = math.inf
    with pytest.raises(ValueError, match=r"features of anchor 0 .* block 0 .* contain NaN or infinity"):
        net.initialize(bad)
    assert not net.initialized
    with pytest.raises(ValueError, match="stitch=99 is not a setting of StitchNet"):
        net.use(Point(stitch=99))
    with pytest.raises(ValueError, match="stitch=-1 is not a setting"):
        net.extract(Point(stitch=-1))
    with pytest.raises(ValueError, match="no path leaves anchor 0 after block 0 for block 3"):
        net.find(0, 1, 0, 3)
    with pytest.raises(ValueError, match="data: 0 rows"):
        NormalEquations().solve("y")
