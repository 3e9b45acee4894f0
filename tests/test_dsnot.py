"""The method's exact properties 1-12 by number, then models, block by block, bad input and the life cycle."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.core import masks
from pliant.core.activations import InputStatistics, observe
from pliant.core.dynamic import Point
from pliant.core.frontier import measure
from pliant.core.matrices import matrix
from pliant.core.persistence import load, save
from pliant.core.training import fit
from pliant.sparsity.dsnot import DENSE, DSnoT, Refined, _Runner, attention_only, expected_error, refine, zeros_in_row

Case = dict[str, Tensor]


def case(seed: int, rows: int = 5, columns: int = 16, shift: float = 0.7) -> Case:
    """A weight and the statistics of inputs whose means differ from zero."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(40, columns, generator=rng, dtype=torch.float64) * torch.rand(columns, generator=rng)
    x = x + shift * torch.randn(columns, generator=rng, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    return {"x": x, "weight": weight, **of_inputs(x)}


def of_inputs(x: Tensor) -> Case:
    return {"mean": x.mean(0), "variance": x.var(0, unbiased=False), "norm": x.norm(dim=0)}


def run(
    c: Case, sparsity: float = 0.5, pattern: tuple[int, int] | None = None, **options: Any
) -> tuple[Tensor, Refined]:
    score = masks.wanda_score(c["weight"], c["norm"])
    if pattern is None:
        start = masks.row_mask(score, zeros_in_row(score.shape[1], sparsity))
    else:
        start = masks.group_mask(score, *pattern)
    names = ("mean", "variance", "norm")
    found = refine(c["weight"], start, *(c[n] for n in names), pattern=pattern, score=score, **options)
    return start, found


def naive(
    c: Case,
    start: Tensor,
    cycles: int,
    p: float,
    same_sign: bool,
    eps: float,
    pattern: tuple[int, int] | None,
    shrinking: bool = True,
) -> tuple[Tensor, list[float], list[list[tuple[int, int]]]]:
    """The algorithm as it is written, one weight at a time."""
    w, mu, v, nrm = c["weight"], c["mean"], c["variance"], c["norm"]
    rows, columns = w.shape
    kept = start.clone()
    errors, trace = [], []
    for r in range(rows):
        contribution = [float(w[r, k] * mu[k]) for k in range(columns)]
        s = [float(w[r, k].abs() * nrm[k]) for k in range(columns)]
        e = sum(contribution[k] for k in range(columns) if not start[r, k])
        first = math.copysign(1.0, e) if e else 0.0
        touched: set[int] = set()
        done: list[tuple[int, int]] = []
        while len(done) < cycles:
            if abs(e) <= eps:
                break
            sign = math.copysign(1.0, e)
            grow = [k for k in range(columns) if not start[r, k] and k not in touched and contribution[k] * e > 0]
            if pattern is not None:
                m = pattern[1]

                def open_group(k: int, m: int = m, r: int = r, touched: set[int] = touched) -> bool:
                    return any(start[r, j] and j not in touched for j in range(k // m * m, k // m * m + m))

                grow = [k for k in grow if open_group(k)]
            if not grow:
                break
            g = max(grow, key=lambda k: sign * contribution[k] / float(v[k]) ** p)
            if pattern is None:
                gone = [k for k in range(columns) if start[r, k] and k not in touched and contribution[k] * e < 0]
            else:
                low = g // pattern[1] * pattern[1]
                gone = [k for k in range(low, low + pattern[1]) if start[r, k] and k not in touched]
            if not gone:
                break
            d = min(gone, key=lambda k: s[k])
            if pattern is not None and shrinking and sign * contribution[d] >= sign * contribution[g]:
                touched.add(g)  # passed over
                continue
            new = e - contribution[g] + contribution[d]
            if (same_sign or pattern is not None) and (math.copysign(1.0, new) if new else 0.0) != first:
                break
            kept[r, g], kept[r, d] = True, False
            e = new
            touched |= {g, d}
            done.append((g, d))
        errors.append(e)
        trace.append(done)
    return kept, errors, trace


# -- 1-4: budget, error, signs, sets ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    groups=st.integers(1, 5),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.9, 1.0]),
    pattern=st.sampled_from([None, (2, 4), (1, 4), (3, 4)]),
    cycles=st.sampled_from([0, 1, 3, 50]),
    same_sign=st.booleans(),
    odd=st.sampled_from(["plain", "zero row", "twins", "dead inputs", "constant inputs"]),
)
def test_1_2_4_budget_error_and_sets(
    seed: int,
    rows: int,
    groups: int,
    sparsity: float,
    pattern: tuple[int, int] | None,
    cycles: int,
    same_sign: bool,
    odd: str,
) -> None:
    c = case(seed, rows, 4 * groups)
    if odd == "zero row":
        c["weight"][0] = 0.0
    if odd == "twins":
        c["weight"][:, 1] = c["weight"][:, 0]
        c |= of_inputs(c["x"][:, [0, 0, *range(2, 4 * groups)]])
    if odd == "dead inputs":
        c |= of_inputs(c["x"] * (torch.arange(4 * groups) % 2))
    if odd == "constant inputs":
        c |= of_inputs(c["x"][:1].expand(7, -1))
    start, found = run(c, sparsity, pattern, cycles=cycles, same_sign=same_sign)
    # 1: every row keeps its number of weights, every group too
    assert torch.equal(found.kept.sum(1), start.sum(1))
    if pattern is not None:
        assert (found.kept.view(rows, -1, 4).sum(2) == pattern[0]).all()
    # 2: the error that was carried along is the error of the mask
    again = expected_error(c["weight"], found.kept, c["mean"])
    scale = (c["weight"] * c["mean"]).abs().sum(1).clamp_min(1e-300)
    assert ((found.after - again).abs() <= 1e-12 * scale).all()
    assert torch.allclose(found.before, expected_error(c["weight"], start, c["mean"]))
    # 4: what grew was pruned, what went was kept, nothing was used twice, T at most
    grown, gone = found.kept & ~start, ~found.kept & start
    assert torch.equal(grown.sum(1), found.swaps)
    assert torch.equal(gone.sum(1), found.swaps)
    assert int(found.swaps.max()) <= cycles
    contribution = c["weight"] * c["mean"]
    assert (contribution[grown] != 0).all()
    if pattern is not None:
        assert int(grown.view(rows, -1, 4).sum(2).max()) <= min(pattern[0], 4 - pattern[0])


@pytest.mark.parametrize("seed", range(4))
def test_3_with_the_sign_rule_the_error_shrinks_strictly(seed: int) -> None:
    c = case(seed, 12, 200)
    contribution = c["weight"] * c["mean"]
    _, last = run(c, cycles=0)
    for cycles in range(1, 16):
        _, now = run(c, cycles=cycles)
        moved = now.swaps > last.swaps
        assert torch.equal(now.swaps[~moved], last.swaps[~moved])
        assert (now.after.abs()[moved] < last.after.abs()[moved]).all()
        assert torch.equal(now.after[~moved], last.after[~moved])
        assert torch.equal(now.after.sign(), now.before.sign())
        grown, gone = now.kept & ~last.kept, ~now.kept & last.kept
        sign = now.before.sign()[:, None].expand_as(contribution)
        assert (contribution[grown] * sign[grown] > 0).all()
        assert (contribution[gone] * sign[gone] < 0).all()
        last = now
    assert last.swaps.max() > 2


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4)])
def test_3_in_patterns_the_error_shrinks_unless_the_references_rule_is_asked_for(pattern: tuple[int, int]) -> None:
    grew = 0
    for seed in range(8):
        c = case(seed, 12, 64)
        _, found = run(c, pattern=pattern)
        moved = found.swaps > 0
        assert moved.any()
        assert (found.after.abs()[moved] < found.before.abs()[moved]).all()
        assert torch.equal(found.after.sign(), found.before.sign())
        _, theirs = run(c, pattern=pattern, shrinking=False)
        assert torch.equal(theirs.after.sign(), theirs.before.sign())
        grew += int((theirs.after.abs() > theirs.before.abs()).sum())
    assert grew


@pytest.mark.parametrize("seed", range(4))
def test_3_without_the_rule_every_swap_still_moves_against_the_error(seed: int) -> None:
    c = case(seed, 12, 400)  # T is capped at 5 there
    overshot = False
    _, last = run(c, cycles=0, same_sign=False)
    for cycles in range(1, 6):
        _, now = run(c, cycles=cycles, same_sign=False)
        moved = now.swaps > last.swaps
        positive = last.after[moved] > 0
        assert torch.equal(now.after[moved] < last.after[moved], positive)
        overshot |= bool((now.after.abs() > last.after.abs()).any())
        last = now
    assert overshot or seed
    assert int(run(c, cycles=50, same_sign=False)[1].swaps.max()) <= max(1, round(0.0122 * 400))


# -- 5: nothing to do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_5_no_cycles_or_no_error_leave_the_start(pattern: tuple[int, int] | None) -> None:
    c = case(1)
    for options in ({"cycles": 0}, {"eps": math.inf}):
        start, found = run(c, pattern=pattern, **options)  # type: ignore[arg-type]
        assert torch.equal(found.kept, start)
        assert not found.swaps.any()
    x = torch.randn(20, 16, dtype=torch.float64)
    seen = InputStatistics(16)
    seen.update(torch.stack([x, -x], 1))
    assert torch.equal(seen.mean, torch.zeros(16, dtype=torch.float64))
    start, found = run({"weight": c["weight"], "mean": seen.mean, "variance": seen.variance, "norm": seen.norm})
    assert torch.equal(found.kept, start)
    start, found = run(c)
    assert not torch.equal(found.kept, start)


# -- 6: the loop as it is written ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "same_sign", "p", "eps", "shrinking"),
    [
        (None, True, 1.0, 0.0, True),
        (None, True, 0.0, 0.3, True),
        (None, False, 1.0, 0.0, True),
        ((2, 4), True, 1.0, 0.0, True),
        ((2, 4), True, 1.0, 0.0, False),
        ((4, 8), True, 0.5, 0.1, True),
        ((4, 8), True, 1.0, 0.0, False),
        ((1, 4), True, 1.0, 0.0, True),
        ((1, 4), True, 1.0, 0.0, False),
        ((3, 4), False, 2.0, 0.0, True),
        ((5, 8), True, 1.0, 0.0, False),
    ],
)
def test_6_equals_the_plain_loop(
    pattern: tuple[int, int] | None,
    same_sign: bool,
    p: float,
    eps: float,
    shrinking: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pliant.sparsity.dsnot._CAP", 0.3)  # five swaps of 16 columns, so that signs do turn
    swaps = 0
    for seed in range(200):
        c = case(seed)
        sparsity = (0.25, 0.5, 0.7)[seed % 3]
        cycles = (2, 50)[seed % 2]
        options = {"cycles": cycles, "variance_power": p, "same_sign": same_sign, "eps": eps, "shrinking": shrinking}
        start, found = run(c, sparsity, pattern, **options)  # type: ignore[arg-type]
        limit = cycles if same_sign or pattern is not None else min(cycles, 5)
        kept, errors, trace = naive(c, start, limit, p, same_sign, eps, pattern, shrinking)
        assert torch.equal(found.kept, kept), seed
        assert found.after.tolist() == pytest.approx(errors, abs=1e-12)
        assert found.swaps.tolist() == [len(t) for t in trace]
        swaps += sum(len(t) for t in trace)
    assert swaps > 100


def test_6_the_first_swap_is_the_best_of_all() -> None:
    c = case(2, 5, 40)
    start, found = run(c, cycles=1)
    contribution, e = c["weight"] * c["mean"], found.before
    for r in range(5):
        if not found.swaps[r]:
            continue
        gain = (contribution[r] * e[r].sign() / c["variance"]).masked_fill(start[r], -math.inf)
        loss = (c["weight"][r].abs() * c["norm"]).masked_fill(~start[r] | (contribution[r] * e[r] >= 0), math.inf)
        assert found.kept[r, gain.argmax()]
        assert not found.kept[r, loss.argmin()]
    assert found.swaps.any()


def test_6_large_layers_are_cut_into_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(5, 13, 16)
    _, whole = run(c)
    monkeypatch.setattr("pliant.sparsity.dsnot._AT_ONCE", 40)
    _, parts = run(c)
    assert torch.equal(whole.kept, parts.kept)
    assert torch.equal(whole.after, parts.after)


def test_6_equal_scores_go_by_column_in_long_rows_too() -> None:
    from pliant.sparsity.dsnot import _ranked

    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        score = torch.randint(0, 12, (6, 64), generator=rng).double()
        allowed = torch.rand(6, 64, generator=rng) < 0.8
        whole = torch.argsort(score.masked_fill(~allowed, torch.inf), dim=1, stable=True)
        for length in (1, 3, 9, 60):
            order, valid = _ranked(score, allowed, length)
            assert torch.equal(order, whole[:, :length])
            assert torch.equal(valid, allowed.gather(1, order))


# -- 7-8: what does not matter --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.25, 2.0, 1024.0]), same_sign=st.booleans())
def test_7_equivariance(seed: int, scale: float, same_sign: bool) -> None:
    c = case(seed)
    _, found = run(c, same_sign=same_sign)
    rows, columns = torch.randperm(5), torch.randperm(16)
    moved = {"weight": c["weight"][rows][:, columns], **{n: c[n][columns] for n in ("mean", "variance", "norm")}}
    assert torch.equal(run(moved, same_sign=same_sign)[1].kept, found.kept[rows][:, columns])
    assert torch.equal(run(c | of_inputs(-c["x"]), same_sign=same_sign)[1].kept, found.kept)
    assert torch.equal(run(c | of_inputs(scale * c["x"]), same_sign=same_sign)[1].kept, found.kept)
    row_scale = torch.tensor([1.0, scale, 1.0, 0.5, scale], dtype=torch.float64)[:, None]
    assert torch.equal(run(c | {"weight": c["weight"] * row_scale}, same_sign=same_sign)[1].kept, found.kept)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), value=st.sampled_from([0.0, 1e-3, 1.0, 50.0]))
def test_8_equal_variances_are_no_variance(seed: int, value: float) -> None:
    c = case(seed)
    equal = c | {"variance": torch.full((16,), value, dtype=torch.float64)}
    assert torch.equal(run(equal)[1].kept, run(c, variance_power=0.0)[1].kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_8_values_and_types_stay(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    dense = copy.deepcopy(model)
    net = DSnoT(model, inputs().to(dtype), sparsity=0.6).eval()
    net.use({"sparsity": 0.6})
    for name in ("0", "2"):
        weight, before = net.model.get_submodule(name).weight, dense.get_submodule(name).weight
        kept = net.mask(name, net.point)
        assert weight.dtype == dtype
        assert torch.equal(weight[kept], before[kept])
        assert not weight[~kept].any()
    assert net(inputs().to(dtype)).dtype == dtype


# -- 9: streaming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 29), (10, 10, 10), (1,) * 30])
def test_9_any_split_gives_the_same_statistics(sizes: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(30, 7, 6, generator=rng) + 4096.0 * torch.arange(6)  # mean / spread up to 20,000, in float32
    exact = x.double().flatten(0, 1)
    seen = InputStatistics(6)
    for part in x.split(sizes):
        seen.update(part)
    assert torch.allclose(seen.mean, exact.mean(0), rtol=1e-12)
    assert torch.allclose(seen.variance, exact.var(0, unbiased=False), rtol=1e-6)
    assert torch.allclose(seen.norm, exact.norm(dim=0), rtol=1e-12)


def test_9_the_batch_size_of_the_calibration_does_not_matter() -> None:
    nets = [DSnoT(decoder(), ids(), sparsity=0.6, batch_size=size) for size in (1, 5, 64)]
    for name in nets[0]._names:
        found = [net.mask(name, {"sparsity": 0.6}) for net in nets]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


# -- 10-12: patterns, the start, the bias ---------------------------------------------------------------------------


def test_10_two_of_four() -> None:
    net = DSnoT(decoder(), ids(), sparsity=(), pattern=("2:4", "4:8"))
    assert net.points() == [Point(pattern="2:4"), Point(pattern="4:8"), DENSE]
    for pattern, (n, m) in (("2:4", (2, 4)), ("4:8", (4, 8))):
        small = net.extract({"pattern": pattern})
        for name in net._names:
            weight = matrix(small.get_submodule(name))
            assert ((weight != 0).view(len(weight), -1, m).sum(2) == n).all()
        assert sum(r.swaps for r in net.report({"pattern": pattern})) > 0
    with pytest.raises(ValueError, match=r"pattern: '2:4' does not fit '0', whose rows have 6 inputs"):
        DSnoT(nn.Sequential(nn.Linear(6, 4)), torch.randn(8, 6), pattern="2:4")


@pytest.mark.parametrize("start", ["wanda", "magnitude"])
def test_11_without_cycles_it_is_the_start(start: Any) -> None:
    model, x = mlp(), inputs()
    net = DSnoT(model, x, start=start, sparsity=(0.5, 0.6), cycles=0, blocks="")
    for s in (0.5, 0.6):
        weight = net.extract(DENSE).get_submodule("0").weight
        size = weight.abs() * (x.norm(dim=0) if start == "wanda" else 1.0)
        kept = net.mask("0", {"sparsity": s})
        order = torch.argsort(size, dim=1, stable=True)
        wanted = torch.ones_like(kept).scatter_(1, order[:, : int(12 * s)], False)
        assert torch.equal(kept, wanted)
    assert zeros_in_row(100, 0.29) == 29


def test_11_ties_go_by_index() -> None:
    start, _ = run(
        {"weight": torch.ones(2, 8), "norm": torch.ones(8), "mean": torch.zeros(8), "variance": torch.ones(8)}
    )
    assert start.tolist() == [[False] * 4 + [True] * 4] * 2


def test_11_sparsegpt_uses_the_second_moments() -> None:
    x = inputs() @ torch.randn(12, 12)
    net = DSnoT(mlp(), x, start="sparsegpt-score", sparsity=0.5, cycles=0, blocks="")
    weight = net.extract(DENSE).get_submodule("0").weight.detach().double()
    h = 2 * x.double().t() @ x.double() / len(x)
    h = h + 0.01 * h.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    score = (weight / upper.diagonal()) ** 2
    assert torch.equal(net.mask("0", {"sparsity": 0.5}), masks.row_mask(score, 6))
    assert not torch.equal(net.mask("0", {"sparsity": 0.5}), masks.row_mask(weight.abs(), 6))


@pytest.mark.parametrize("cycles", [0, 20])
@pytest.mark.parametrize("point", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_11_from_sparsegpt_the_kept_weights_are_its_own(cycles: int, point: dict[str, Any], tmp_path: Any) -> None:
    model, x = mlp(), inputs() @ torch.randn(12, 12) + 0.5
    dense = copy.deepcopy(model).eval()
    net = DSnoT(model, x, start="sparsegpt", sparsity=0.5, pattern="2:4", cycles=cycles, same_sign=False, blocks="")
    small = net.extract(point)
    hidden = x
    for name in net._names:  # the layers see the dense network's activations, as the whole of it is one block
        layer, plain = dense.get_submodule(name), small.get_submodule(name)
        seen = hidden.double()
        budget = (2, 4) if "pattern" in point else 0.5
        kept, values, _ = masks.sparsegpt(layer.weight, 2 / len(x) * seen.t() @ seen, budget)
        row = next(r for r in net.report(point) if r.name == name)
        mask = net.mask(name, point)
        expected = values.masked_fill(~mask, 0.0).to(plain.weight.dtype)  # what grew back has the value that it had
        assert torch.equal(plain.weight, expected)
        assert torch.equal(mask, kept) == (not row.swaps)
        assert torch.equal(mask.sum(1), kept.sum(1))
        error = (layer.weight.double() - values.masked_fill(~mask, 0.0)) @ seen.mean(0)
        assert row.error_after == pytest.approx(error.abs().mean().item(), rel=1e-6, abs=1e-9)
        with torch.no_grad():
            hidden = torch.relu(layer(hidden))
    if cycles and "sparsity" in point:  # the errors that it leaves are so small that the sign rule refuses most swaps
        assert sum(r.swaps for r in net.report(point)) > 0
    with torch.no_grad():
        answer = net.use(point)(x)
        assert torch.equal(answer, small(x))
        save(net, tmp_path / "net")
        again = load(tmp_path / "net", model=mlp(), example=x)
        assert torch.equal(again.eval()(x), answer)
        for loaded in (net, again):
            loaded.use(DENSE)
            assert all(torch.equal(v, dense.state_dict()[n]) for n, v in loaded.model.state_dict().items())
            assert torch.equal(loaded.use(point)(x), answer)


@pytest.mark.parametrize("block", [16, 4, None])
def test_11_the_masks_of_torchao(block: int | None) -> None:
    """Blocks as long as a row are our rows, blocks of 4 are 2:4, and without blocks it ranks the whole layer.

    torchao 0.18 sums up squares and takes no root: its score is |W| ||A||^2, not Wanda's. Its inputs are divided by the
    root of their norms here, so that both see the same score.
    """
    pytest.importorskip("torchao.sparsity")
    from torchao.sparsity import WandaSparsifier

    x = torch.randn(64, 16) * torch.rand(16)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    theirs = copy.deepcopy(model)
    sparsifier = WandaSparsifier(sparsity_level=0.5, semi_structured_block_size=block)
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    theirs(x / x.norm(dim=0).sqrt())
    sparsifier.step()
    sparsifier.squash_mask()
    net = DSnoT(model, x, sparsity=0.5, pattern="2:4", cycles=0, include=("0",), blocks="")
    if block is None:
        ours = masks.layer_mask(masks.wanda_score(model[0].weight, x.norm(dim=0)), 64)
    else:
        ours = net.mask("0", {"pattern": "2:4"} if block == 4 else {"sparsity": 0.5})
    assert torch.equal(ours, theirs.get_submodule("0").weight != 0)


@pytest.mark.parametrize("cycles", [0, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_12_a_bias_meets_the_whole_objective(cycles: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(12, 6, bias=bias)).double()
    x = inputs().double()
    y = layer(x).detach()
    net = DSnoT(layer, x, sparsity=0.6, cycles=cycles, correction="bias").eval()
    with torch.no_grad():
        gap = (net.use({"sparsity": 0.6})(x) - y).mean(0)
        assert gap.abs().max() < 1e-14
        assert torch.equal(net.use(DENSE)(x), y)
        plain = DSnoT(copy.deepcopy(layer), x, sparsity=0.6, cycles=cycles).use({"sparsity": 0.6})
        error = expected_error(layer[0].weight, plain.mask("0", plain.point), x.mean(0))
        assert torch.allclose((y - plain(x)).mean(0), error, atol=1e-13)


def test_12_convolutions_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3, 2, 1)).double()
    x = torch.rand(9, 2, 8, 8, dtype=torch.float64)
    y = model(x).detach()
    net = DSnoT(model, x, sparsity=0.6, correction="bias").use({"sparsity": 0.6})
    with torch.no_grad():
        assert (net(x) - y).mean((0, 2, 3)).abs().max() < 1e-14
    assert net.report()[0].swaps > 0


# -- models ---------------------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def inputs() -> Tensor:
    return torch.rand(40, 12, generator=torch.Generator().manual_seed(1)) + 0.2


def ids(rows: int = 12, length: int = 9) -> Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(2))


def decoder(kind: str = "llama") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {
        "llama": lambda: transformers.LlamaConfig(**llama, num_key_value_heads=2, **common),
        "qwen2": lambda: transformers.Qwen2Config(**llama, num_key_value_heads=2, **common),
        "opt": lambda: transformers.OPTConfig(
            hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=16,
            max_position_embeddings=32, **common,
        ),
        "mixtral": lambda: transformers.MixtralConfig(
            **llama, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **common
        ),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
            **llama, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
            shared_expert_intermediate_size=8, **common,
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **llama, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=4,
            **common,
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **llama, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=4, **common
        ),
        "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=3, n_head=4, n_positions=32, **common),
    }[kind]()  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # initial biases are zero, and initial weights tiny
        p.data += 0.1 * torch.randn(p.shape)
    return model


@pytest.mark.parametrize(
    ("kind", "blocks", "layers"),
    [
        ("llama", "model.layers", 21),
        ("qwen2", "model.layers", 21),
        ("opt", "model.decoder.layers", 18),
        ("gpt2", "transformer.h", 12),
    ],
)
def test_decoders_of_transformers(kind: str, blocks: str, layers: int) -> None:
    model, x = decoder(kind), ids()
    dense = copy.deepcopy(model)
    net = DSnoT(model, x, sparsity=(0.5, 0.7), pattern="2:4").eval()
    assert net._block_names == [f"{blocks}.{i}" for i in range(3)]
    assert len(net._names) == layers
    assert net.prune().point == DENSE
    state = net.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in dense.state_dict().items())
    with torch.no_grad():
        for point in net.points():
            y = net.use(point)(x).logits
            small = net.extract(point)
            assert type(small) is type(dense)
            assert torch.equal(small(x).logits, y)
            share = masks.count_zeros(matrix(small.get_submodule(n)) for n in net._names)
            total = sum(matrix(small.get_submodule(n)).numel() for n in net._names)
            wanted = 0.5 if "pattern" in point else float(point["sparsity"])
            assert share / total == pytest.approx(wanted, abs=0.05)
        assert torch.equal(y, dense(x).logits)
    assert torch.equal(net.model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    assert net.model.config.use_cache is dense.config.use_cache


def test_statistics_come_from_the_sparse_prefix() -> None:
    """Each block by hand: inputs that the pruned blocks before it give, masks from those."""
    model, x = decoder(), ids()
    net = DSnoT(copy.deepcopy(model), x, sparsity=0.6, start="magnitude")
    by_hand, p = copy.deepcopy(model), {"sparsity": 0.6}
    for b in range(3):
        layers = {n: by_hand.get_submodule(n) for n in net._names if n.startswith(f"model.layers.{b}.")}
        seen: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(lambda m, a, n=n, s=seen: s.update({n: a[0].double().flatten(0, -2)}))
            for n, layer in layers.items()
        ]
        with torch.no_grad():
            by_hand(x)
        for hook in hooks:
            hook.remove()
        for n, layer in layers.items():
            start = masks.row_mask(layer.weight.abs(), zeros_in_row(layer.in_features, 0.6))
            statistics = of_inputs(seen[n]).values()
            found = refine(layer.weight, start, *statistics)
            assert torch.equal(net.mask(n, p), found.kept), n
            layer.weight.data.masked_fill_(~found.kept, 0.0)
    at_once = DSnoT(copy.deepcopy(model), x, sparsity=0.6, start="magnitude", blocks="")
    assert torch.equal(at_once.mask(net._names[0], p), net.mask(net._names[0], p))
    assert any(not torch.equal(at_once.mask(n, p), net.mask(n, p)) for n in net._names)
    assert set(at_once._names) == {*net._names, "lm_head"}


class Residual(nn.Module):
    """Blocks that pass keyword arguments, a tuple, and something of their own in between."""

    def __init__(self, between: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(12, 8)
        self.layers = nn.ModuleList(Gated() for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i, layer in enumerate(self.layers):
            h = layer(scale=torch.tensor(1.0 + i), hidden=h)[0]
            if self.between:
                h = h * self.between
        return self.head(h)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, scale: Tensor, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden + scale * self.down(torch.relu(self.up(hidden))), None


def test_blocks_are_replayed_with_their_own_arguments_or_the_whole_network_is() -> None:
    """A factor of one between the blocks breaks the chain of tensors, and must change no mask."""
    found = []
    for between in (0.0, 1.0):
        net = DSnoT(Residual(between), inputs(), sparsity=0.5)
        runner = _Runner(net.model, list(net.model.layers), net._data)
        assert runner.chained == (not between)
        found.append([net.mask(n, {"sparsity": 0.5}) for n in net._names])
        assert net._names == [f"layers.{i}.{part}" for i in range(3) for part in ("up", "down")]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    wide = DSnoT(Residual(), inputs(), sparsity=0.5, blocks="", exclude=("head",))
    assert wide._names[0] == "embed"
    assert "head" not in wide._names


def test_refine_chooses_layers_and_the_report_tells() -> None:
    net = DSnoT(decoder(), ids(), sparsity=0.6, refine=attention_only)
    plain = DSnoT(decoder(), ids(), sparsity=0.6, cycles=0)
    report = net.report({"sparsity": 0.6})
    assert {r.name for r in report if r.refined} == {n for n in net._names if "self_attn" in n}
    assert all(r.swaps == 0 and r.error_after == r.error_before for r in report if not r.refined)
    first = net._names[4]
    assert "gate" in first
    # the first block's attention was refined, so its MLP sees other inputs; the start rule is the same
    assert int(net.mask(first, {"sparsity": 0.6}).sum()) == int(plain.mask(first, {"sparsity": 0.6}).sum())
    for r in report:
        assert r.error_after <= r.error_before
        assert r.squared_after <= r.squared_before
        assert r.sparsity == pytest.approx(zeros_in_row(r.columns, 0.6) / r.columns)
    assert str(report).count("\n") == len(report)
    assert "model.layers.2.mlp.down_proj" in str(report)
    with pytest.raises(ValueError, match="dense setting"):
        net.report()


def test_reference_units_and_within_variance() -> None:
    def masks_of(**options: Any) -> list[Tensor]:
        net = DSnoT(decoder(), ids(), sparsity=0.6, **options)
        return [net.mask(n, {"sparsity": 0.6}) for n in net._names]

    length = ids().shape[1]
    ours, theirs = masks_of(eps=0.02), masks_of(eps=0.02 * length, stats="reference")
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(ours, masks_of(eps=0.02, stats="reference"), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(masks_of(), masks_of(variance="within"), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(masks_of(), masks_of(same_sign=False), strict=True))


def test_tied_weights_are_pruned_once() -> None:
    model = mlp()
    model.append(nn.Linear(3, 3))
    model.append(model[5])
    net = DSnoT(model, inputs(), sparsity=0.5)
    assert net._names == ["0", "2", "4", "5"]
    before = net(inputs())
    net.use({"sparsity": 0.5}).use(DENSE)
    assert torch.equal(net(inputs()), before)


# -- stacked experts, other matrices, and what is covered -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_half_of_every_row_of_every_expert_goes(kind: str) -> None:
    model, x, p = decoder(kind), ids(), {"sparsity": 0.5}
    dense = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = DSnoT(model, x, sparsity=0.5, pattern="2:4").eval()
    stacked = [n for n in net._names if n.endswith("_proj") and ".experts." in n]
    assert len(stacked) == 6
    assert list(net.coverage.left_out) == ["lm_head"]
    assert not net.coverage.refused
    with torch.no_grad():
        y, small = net.use(p)(x).logits, net.extract(p)
        assert torch.equal(small(x).logits, y)
    inside = [w for n, w in small.named_parameters() if ".layers." in n and w.dim() > 1 and "bias" not in n]
    assert sum(w.numel() for w in inside) == net.coverage.pruned
    assert masks.count_zeros(inside) * 2 == net.coverage.pruned
    zeros = masks.count_zeros(small.parameters()) / sum(w.numel() for w in small.parameters())
    assert net.sparsity_of(p) == zeros
    assert zeros == pytest.approx(0.5 * net.coverage.of_all, abs=2e-3)  # norms and biases may hold a zero
    assert net.sparsity_of(DENSE) < 2e-3
    for name in stacked:
        kept, weight = net.mask(name, p), small.get_parameter(name)
        weight = weight.transpose(1, 2) if kind == "gpt_oss" else weight
        assert torch.equal(kept, weight != 0)
        assert kept.dim() == 3
        assert (kept.sum(-1) * 2 == kept.shape[-1]).all()
    two = net.mask(stacked[0], {"pattern": "2:4"})
    assert (two.view(-1, 4).sum(1) == 2).all()
    net.use(DENSE)
    state = net.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in dense.state_dict().items())


@pytest.mark.parametrize("start", ["wanda", "magnitude", "sparsegpt", "sparsegpt-score"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_an_expert_is_pruned_as_the_layer_that_holds_its_matrix(start: Any, implementation: str) -> None:
    """Each expert by hand: the tokens routed to it, through nn.Linear layers of its own, pruned as any others."""
    if start.startswith("sparsegpt") and implementation != "eager":
        pytest.skip("one is enough")
    model, x, p = decoder("mixtral"), ids(), {"sparsity": 0.5}
    model.config._experts_implementation = implementation
    net = DSnoT(copy.deepcopy(model), x, sparsity=0.5, start=start)
    small, differ = net.extract(p), 0
    for b in range(2):  # the second block sees what the first, pruned, gives
        runner, seen = copy.deepcopy(model), {}
        for name, w in runner.named_parameters():
            if any(name.startswith(f"model.layers.{i}.") for i in range(b)):
                w.data = small.get_parameter(name).data
        dense = runner.model.layers[b].mlp.experts
        dense.register_forward_pre_hook(lambda m, a, s=seen: s.update(a=a))
        with torch.no_grad():
            runner(x)
        tokens, chosen, _ = seen["a"]
        for e in range(4):
            gate_up, down = dense.gate_up_proj[e].detach(), dense.down_proj[e].detach()
            for rows in (tokens[(chosen == e).any(1)], tokens):  # its own, and what would be wrong: everyone's
                gate, up = (rows @ gate_up.t()).chunk(2, -1)
                hidden = torch.nn.functional.silu(gate) * up
                for name, weight, a in (("gate_up_proj", gate_up, rows), ("down_proj", down, hidden)):
                    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                    layer.weight.data.copy_(weight)
                    alone = DSnoT(nn.Sequential(layer), a, sparsity=0.5, start=start).mask("0", p)
                    same = torch.equal(net.mask(f"model.layers.{b}.mlp.experts.{name}", p)[e], alone)
                    if rows is tokens:
                        differ += not same
                    else:
                        assert same, (b, e, name)
    assert differ > 8


def test_an_expert_that_no_token_reaches_goes_by_magnitude_and_the_report_says_so() -> None:
    model, p = decoder("mixtral"), {"sparsity": 0.5}
    x = ids(1, 1)  # one token, which visits two of four
    for start in ("wanda", "sparsegpt"):
        net = DSnoT(copy.deepcopy(model), x, sparsity=0.5, start=start)  # type: ignore[arg-type]
        rows = {r.name: r for r in net.report(p)}
        name = "model.layers.0.mlp.experts.down_proj"
        hit = _hit(model, x)
        assert rows[name].unreached == 4 - len(hit) > 0
        assert "without tokens: by magnitude" in str(net.report(p))
        weight = model.get_parameter(name)
        for e in range(4):
            by_size = masks.row_mask(weight[e].abs(), weight.shape[-1] // 2)
            assert torch.equal(net.mask(name, p)[e], by_size) == (e not in hit)


def _hit(model: nn.Module, x: Tensor) -> set[int]:
    chosen: list[Tensor] = []
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, a: chosen.append(a[1]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return set(chosen[0].flatten().tolist())


class Mixed(nn.Module):
    """A recurrent layer, an attention onto something else, a convolution of groups, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(12, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(x)[0]
        h = self.attention(h, 2.0 * h, 2.0 * h, need_weights=False)[0]
        y: Tensor = self.head(self.conv(h.transpose(1, 2)).mean(2))
        return y


def test_what_cannot_be_served_is_named_with_its_share(tmp_path: Any) -> None:
    x, p = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(0)), {"sparsity": 0.5}
    with pytest.warns(
        UserWarning, match=r"71.7% of its matrix weights.*'attention.in_proj_weight' \(.*'conv' \(Conv1d"
    ):
        net = DSnoT(Mixed(), x, sparsity=0.5)
    assert net._names == ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.out_proj", "head"]
    assert set(net.coverage.left_out) == set(net.coverage.refused) == {"attention.in_proj_weight", "conv"}
    pruned, left = 4 * 8 * 20 + 64 + 24, 3 * 64 + 8 * 4 * 3
    assert net.coverage.share == pruned / (pruned + left)
    assert str(net.coverage).startswith(f"{pruned} weights are pruned: 7")
    assert net.sparsity_of(p) == pytest.approx(pruned / 2 / net.coverage.parameters, abs=0.03)
    assert torch.equal(net.extract(p)(x), net.use(p)(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = DSnoT(Mixed(), x, sparsity=0.5, exclude=("conv", "attention.in*"))
        assert chosen.coverage.left_out["conv"] == "excluded"
        other = load(save(chosen.use(p), tmp_path / "net"), model=Mixed(), example=x)
    assert torch.equal(other(x), chosen(x))
    assert torch.equal(other.use(DENSE)(x), Mixed()(x))
    # the state that the recurrent weights multiply, by hand
    h = torch.cat([torch.zeros(6, 1, 8), Mixed().lstm(x)[0][:, :-1].detach()], 1).flatten(0, 1)
    weight = Mixed().lstm.weight_hh_l0
    start = masks.row_mask(masks.wanda_score(weight, h.double().norm(dim=0)), 4)
    found = refine(weight, start, *of_inputs(h.double()).values())
    assert torch.equal(chosen.mask("lstm.weight_hh_l0", p), found.kept)


def test_a_second_list_of_blocks_is_not_passed_over_in_silence() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))})
    model["b"] = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
    model.forward = lambda x: model["b"](model["a"](x))  # type: ignore[method-assign, assignment]
    with pytest.warns(UserWarning, match=r"60.0% of its matrix weights.*'b.0' \(outside the blocks 'a'\)"):
        DSnoT(model, torch.randn(8, 4), sparsity=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DSnoT(model, torch.randn(8, 4), sparsity=0.5, blocks="").coverage.share == 1.0


def test_a_stack_is_refined_as_its_matrices_one_by_one() -> None:
    each = [case(seed) for seed in range(3)]
    names = ("weight", "mean", "variance", "norm")
    for pattern in (None, (2, 4)):
        alone = [run(c, pattern=pattern) for c in each]
        scores = torch.stack([masks.wanda_score(c["weight"], c["norm"]) for c in each])
        found = refine(
            torch.stack([c["weight"] for c in each]),
            torch.stack([start for start, _ in alone]),
            *(torch.stack([c[n] for c in each]) for n in names[1:]),
            pattern=pattern,
            score=scores,
        )
        for e, (_, one) in enumerate(alone):
            for name in ("kept", "before", "after", "swaps"):
                assert torch.equal(getattr(found, name)[e], getattr(one, name))


# -- padding ----------------------------------------------------------------------------------------------------------


def padded(left: bool, lengths: Sequence[int] = (9, 4, 6, 9, 2)) -> tuple[dict[str, Tensor], list[Tensor]]:
    x = ids(len(lengths))
    mask = torch.zeros_like(x)
    rows = []
    for i, n in enumerate(lengths):
        at = slice(9 - n, 9) if left else slice(0, n)
        mask[i, at] = 1
        rows.append(x[i : i + 1, at])
    return {"input_ids": x, "attention_mask": mask}, rows


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
def test_padding_does_not_count(kind: str, left: bool) -> None:
    """Masks of a padded batch are those of its sequences one by one; without its mask they are others."""
    batch, rows = padded(left)
    p = {"sparsity": 0.6}
    net = DSnoT(decoder(kind), batch, sparsity=0.6)
    alone = DSnoT(decoder(kind), rows[0], calibration=rows, sparsity=0.6)
    blind = DSnoT(decoder(kind), batch["input_ids"], sparsity=0.6)
    same = total = other = 0
    for name in net._names:
        kept = net.mask(name, p)
        same += int((kept == alone.mask(name, p)).sum())
        other += int((kept == blind.mask(name, p)).sum())
        total += kept.numel()
    assert same > 0.999 * total  # a tie may turn on the last digit
    assert other < 0.99 * total
    for a, b in zip(net.report(p), alone.report(p), strict=True):
        assert a.error_after == pytest.approx(b.error_after, rel=1e-3, abs=1e-7)


def test_padding_of_encoders_and_decoders_is_told_apart() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    source, _ = padded(False, (9, 3, 5))
    target, _ = padded(False, (4, 9, 2))
    batch = {**source, "decoder_input_ids": target["input_ids"], "decoder_attention_mask": target["attention_mask"]}
    net = DSnoT(model, batch, sparsity=0.5, blocks="")
    data = _Runner(model, [model], net._data)
    layers = {m.name: m for m in net._layers}
    with observe(layers) as found, torch.no_grad():
        data.run(0, found)
    for name, statistics in found.items():
        of_encoder = name.startswith("encoder") or "EncDecAttention.k" in name or "EncDecAttention.v" in name
        assert statistics.count == (17 if of_encoder else 15), name
    with pytest.warns(UserWarning, match=r"outside the blocks 'encoder.block'"):
        assert DSnoT(model, batch, sparsity=0.5).coverage.share < 0.6


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": "random"}, ValueError, "start: 'random'; allowed: 'wanda', 'magnitude', 'sparsegpt'"),
        ({"sparsity": 1.0}, ValueError, "sparsity: 1.0; allowed: a finite number above 0 and below 1"),
        ({"sparsity": (0.5, 0.5)}, ValueError, "sparsity: .* differ from each other"),
        ({"sparsity": ()}, ValueError, "leave the dial empty"),
        ({"pattern": "2of4"}, ValueError, "pattern: '2of4'"),
        ({"pattern": "4:2"}, ValueError, "pattern: 4:2"),
        ({"pattern": ("5:10",)}, ValueError, "pattern: '5:10' does not fit '0', whose rows have 12 inputs"),
        ({"cycles": -1}, ValueError, "cycles: -1"),
        ({"cycles": True}, TypeError, "cycles: True"),
        ({"batch_size": 0}, ValueError, "batch_size: 0"),
        ({"eps": math.nan}, ValueError, "eps: nan"),
        ({"variance_power": -1.0}, ValueError, "variance_power: -1.0"),
        ({"stats": "paper"}, ValueError, "stats: 'paper'"),
        ({"variance": "between"}, ValueError, "variance: 'between'"),
        ({"correction": "weights"}, ValueError, "correction: 'weights'"),
        ({"refine": "attn"}, TypeError, "refine: .* a function"),
        ({"include": "0"}, TypeError, "include: .* a sequence"),
        (
            {"include": ("conv*",)},
            ValueError,
            r"include: 'conv\*' matches no layer inside the blocks; there are: '0', '2', '4'",
        ),
        ({"exclude": ("*",)}, ValueError, "that include=.* leave"),
        ({"blocks": "layers"}, ValueError, "blocks: 'layers' is no part of Sequential"),
        ({"blocks": "0"}, ValueError, "blocks: '0' is a Linear"),
        ({"calibration": []}, ValueError, "calibration: there is no calibration data"),
        ({"calibration": torch.zeros(0, 12)}, ValueError, "calibration: there is no calibration data"),
        ({"calibration": 3}, TypeError, "calibration: 3; allowed: inputs .* or an iterable of batches"),
        ({"dense_weights": {}}, ValueError, "dense_weights: '0.weight' is missing"),
        (
            {"dense_weights": {"0.weight": torch.zeros(3, 3)}},
            ValueError,
            r"dense_weights: '0.weight' has shape \(3, 3\)",
        ),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DSnoT(mlp(), inputs(), **options)


def test_wrong_models() -> None:
    with pytest.raises(TypeError, match=r"model: .* allowed: an nn\.Module"):
        DSnoT(inputs(), inputs())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no Linear, Conv1D or Conv2d layer"):
        DSnoT(nn.Sequential(nn.ReLU()), inputs())
    with pytest.raises(ValueError, match="no plain floating-point parameter"):
        DSnoT(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 3))), inputs())


def test_weights_in_another_memory_order_are_refused_not_missed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"weight of '0' is not contiguous \(channels_last\?\)"):
        DSnoT(model, torch.rand(2, 4, 6, 6))


def test_a_sparse_model_needs_its_dense_weights() -> None:
    dense = mlp()
    net = DSnoT(copy.deepcopy(dense), inputs(), sparsity=0.5)
    sparse = net.extract({"sparsity": 0.5})
    with pytest.raises(ValueError, match=r"weight of '0' is sparse already \(50% zeros\)"):
        DSnoT(copy.deepcopy(sparse), inputs(), sparsity=0.5)
    again = DSnoT(sparse, inputs(), sparsity=0.5, dense_weights=dense.state_dict())
    assert torch.equal(again.mask("0", {"sparsity": 0.5}), net.mask("0", {"sparsity": 0.5}))
    assert torch.equal(again(inputs()), dense(inputs()))


class Lazy(nn.Module):
    """A layer that only long inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if len(x) > 4 else self.a(x)


def test_a_layer_that_is_never_called() -> None:
    model = Lazy()
    state = copy.deepcopy(model.state_dict())
    net = DSnoT(model, torch.randn(3, 4), sparsity=0.5)
    with pytest.raises(ValueError, match="never calls the layer 'b' on the calibration data"):
        net.use({"sparsity": 0.5})
    assert net.point == DENSE
    assert not net.stored
    assert all(torch.equal(v, state[k]) for k, v in net.model.state_dict().items())
    assert net.prune(torch.randn(8, 4)).use({"sparsity": 0.5}).point == Point(sparsity=0.5)


def test_activations_that_are_not_finite_leave_the_network_dense() -> None:
    x = inputs()
    bad = x.clone()
    bad[30, 0] = math.nan
    net = DSnoT(mlp(), x, calibration=bad, sparsity=0.5)
    with pytest.raises(ValueError, match=r"layer '0'.*NaN or infinity"):
        net.prune()
    assert torch.equal(net(x), mlp()(x))
    with pytest.raises(ValueError, match=r"point: sparsity=0\.3 is not a setting"):
        net.use({"sparsity": 0.3})
    with pytest.raises(ValueError, match="name: 'x' is not pruned"):
        net.mask("x", DENSE)


def test_refine_checks_its_arguments() -> None:
    c = case(0)
    start = torch.ones(5, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"norm: its shape is \(3,\); allowed: \(16,\)"):
        refine(c["weight"], start, c["mean"], c["variance"], torch.ones(3))
    with pytest.raises(ValueError, match="score: a pattern needs"):
        refine(c["weight"], start, c["mean"], c["variance"], c["norm"], pattern=(2, 4))
    with pytest.raises(ValueError, match="does not follow the pattern 2:4"):
        refine(c["weight"], start, c["mean"], c["variance"], c["norm"], pattern=(2, 4), score=c["weight"])


# -- the life cycle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "bias"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_and_loaded(kind: str, correction: Any, tmp_path: Any) -> None:
    x = ids()
    net = DSnoT(decoder(kind), x, sparsity=0.6, pattern="2:4", correction=correction, refine=attention_only).prune()
    net.use({"sparsity": 0.6})
    save(net, tmp_path / "net")
    other = decoder(kind)
    for p in other.parameters():
        p.data.normal_()
    again = load(tmp_path / "net", model=other).eval()
    net.eval()
    assert isinstance(again, DSnoT)
    assert again.point == net.point
    assert again.report() == net.report()
    with torch.no_grad():
        for point in [net.point, *net.points()]:
            assert torch.equal(net.use(point)(x).logits, again.use(point)(x).logits)


def test_fit_trains_the_dense_network_and_prunes_it_at_the_end() -> None:
    x = torch.randint(0, 40, (32, 8)).cumsum(1) % 40
    net = DSnoT(decoder(), x[:2], sparsity=0.5)
    net.use({"sparsity": 0.5})
    made = net.mask("model.layers.0.mlp.up_proj", net.point)
    history = fit(net, list(x.split(8)), epochs=8, lr=0.05, progress=False)
    assert history.losses[-1] < history.losses[0]
    assert net.point == DENSE
    assert not torch.equal(net.mask("model.layers.0.mlp.up_proj", {"sparsity": 0.5}), made)
    assert sum(len(part) for part in net._data) == 32  # no calibration was given, so the training data served
    front = measure(net, [(x, x)], metric=lambda y, t: float(y.mean()), repeats=0)
    assert front.rows[0].point == Point(sparsity=0.5)
    assert front.rows[0].nonzero_flops < front.rows[1].nonzero_flops


def test_a_loop_of_ones_own() -> None:
    x = inputs()
    y = (x.sum(1) > 8.4).long()
    net = DSnoT(mlp(), x, sparsity=0.5)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net.loss((x, y)).backward()
        optimizer.step()
    net.use({"sparsity": 0.5})
    with pytest.raises(RuntimeError, match="does not train with fixed masks"):
        net.loss((x, y))
    with torch.no_grad():
        assert net.loss((x, y)).isfinite()
    assert net.eval().loss((x, y)).isfinite()


def test_the_loss_of_language_models() -> None:
    net, x = DSnoT(decoder(), ids(), sparsity=0.5).eval(), ids()
    with torch.no_grad():
        own = net.model(input_ids=x, labels=x).loss
        assert torch.allclose(net.loss(x), own)
        assert torch.allclose(net.loss({"input_ids": x, "labels": x}), own)
        assert torch.allclose(
            net.loss((x[:, :-1], x[:, 1:])), net.model(input_ids=x, labels=x).loss
        )  # the same tokens, predicted from the same prefixes
        ignored = x.clone()
        ignored[:, 5:] = -100
        assert torch.allclose(net.loss({"input_ids": x, "labels": ignored}), net.model(x, labels=ignored).loss)
    with pytest.raises(TypeError, match="a tensor alone is taken for token ids"):
        DSnoT(mlp(), inputs()).loss(inputs())
    doubled = DSnoT(mlp(), inputs(), criterion=lambda y, t: 2 * nn.functional.cross_entropy(y, t))
    y = torch.zeros(40, dtype=torch.long)
    assert torch.allclose(doubled.loss((inputs(), y)), 2 * DSnoT(mlp(), inputs()).loss((inputs(), y)))


def test_calibration_in_every_form() -> None:
    x = ids()
    y = torch.zeros(len(x), dtype=torch.long)
    forms: list[Any] = [
        x,
        {"input_ids": x},
        {"input_ids": x, "labels": x},
        [x[:5], x[5:]],
        [(x, y)],
        [{"input_ids": x[:7]}, {"input_ids": x[7:]}],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4),
    ]
    found = [DSnoT(decoder(), form, sparsity=0.6) for form in forms] + [
        DSnoT(decoder(), x[:1], calibration=x, sparsity=0.6)
    ]
    last = found[0]._names[-1]
    for net in found[1:]:
        assert torch.equal(net.mask(last, {"sparsity": 0.6}), found[0].mask(last, {"sparsity": 0.6}))
    assert len(found[0].example) == 2


def test_copies_are_independent() -> None:
    net = DSnoT(mlp(), inputs(), sparsity=(0.5, 0.7)).use({"sparsity": 0.5})
    twin = copy.deepcopy(net)
    y = net(inputs())
    twin.use({"sparsity": 0.7})
    assert torch.equal(net(inputs()), y)
    assert torch.equal(net.use(DENSE)(inputs()), twin.use(DENSE)(inputs()))


def test_pruning_keeps_flags_and_hooks() -> None:
    net = DSnoT(decoder(), ids(), sparsity=0.5).train()
    net.model.model.layers[1].eval()
    flags = [m.training for m in net.modules()]
    net.prune()
    assert flags == [m.training for m in net.modules()][: len(flags)]
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in net.model.modules())
    with torch.inference_mode():
        net.use({"sparsity": 0.5})
    net.use(DENSE).loss(ids()).backward()


def test_sparse_storage() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    net = DSnoT(model, torch.rand(32, 64), sparsity=0.5)
    small = net.extract({"sparsity": 0.5}, sparse=True)
    assert "dense: 50.0% zeros" in small.layouts["0"]  # type: ignore[operator, index]
    small = net.extract({"sparsity": 0.5}, sparse=True, min_sparsity=0.4)
    x = torch.rand(5, 64)
    assert torch.allclose(small(x), net.use({"sparsity": 0.5})(x), atol=1e-6)


# -- training that is broken off, threads, compilers, precision, errors ---------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_run_that_is_broken_off_at_any_step_goes_on_bit_by_bit(kind: str, tmp_path: Any) -> None:
    made: list[torch.optim.Optimizer] = []
    x, y = inputs(), torch.arange(40) % 3

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(groups, 0.02) if kind == "adam" else torch.optim.SGD(groups, 0.05, momentum=0.9))
        return made[-1]

    def run(folder: str, stop: int | None = None) -> Any:
        net = DSnoT(mlp(), x, sparsity=0.5, start="sparsegpt")

        def on_step(done: int, _: int, loss: float) -> None:
            if done == stop:
                raise InterruptedError

        train = list(zip(x.split(20), y.split(20), strict=True))
        options = {"checkpoint": tmp_path / folder, "checkpoint_every": 1, "on_step": on_step}
        try:
            history = fit(net, train, steps=4, optimizer=optimizer, progress=False, **options)
        except InterruptedError:
            return None
        moments = [
            {k: v.tolist() if isinstance(v, Tensor) else v for k, v in s.items()} for s in made[-1].state.values()
        ]
        return {n: t.tolist() for n, t in net.state_dict().items()}, moments, history.losses, net.structure()

    whole = run("whole")
    for stop in (2, 3, 4):
        run(f"at{stop}", stop)
        assert run(f"at{stop}") == whole
    assert run("whole") == whole


def test_four_threads_at_a_fixed_point_get_the_answers_of_one() -> None:
    net, parts = DSnoT(mlp(), inputs(), sparsity=0.5).eval(), inputs().split(10)
    for point in net.points():
        net.use(point)
        expected = [net(x).detach() for x in parts]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(10):
                assert all(torch.equal(a, b) for a, b in zip(pool.map(net, parts), expected, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_answers_as_the_plain_one_at_every_point(backend: str) -> None:
    net, x = DSnoT(mlp(), inputs(), sparsity=(0.5, 0.7)).eval(), inputs()
    net.prune()
    compiled = torch.compile(net, backend=backend)
    for point in [*net.points(), *net.points()]:
        net.use(point)
        with torch.no_grad():
            assert torch.equal(compiled(x), net(x))


def test_the_network_follows_a_change_of_precision() -> None:
    net = DSnoT(mlp(), inputs(), sparsity=(0.5, 0.7))
    net.use({"sparsity": 0.5}).double()
    assert net.use({"sparsity": 0.7})(inputs().double()).dtype is torch.float64  # made now, in double precision
    assert net.extract({"sparsity": 0.7}, sparse=True)(inputs().double()).dtype is torch.float64
    assert net.example.dtype is torch.float64


@pytest.mark.parametrize("start", ["wanda", "sparsegpt"])
def test_an_error_while_masks_are_made_leaves_everything_as_it_was(start: Any, monkeypatch: Any) -> None:
    net = DSnoT(mlp(), inputs(), sparsity=(0.5, 0.7), start=start)
    net.use({"sparsity": 0.5}).train()
    before, structure, calibration = copy.deepcopy(net.state_dict()), net.structure(), net._data
    flags = [m.training for m in net.modules()]
    calls = []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise ArithmeticError("no mask")
        return refine(*args, **options)

    monkeypatch.setattr("pliant.sparsity.dsnot.refine", fails)
    for run in (net.prune, lambda: net.prune(inputs() + 1), lambda: net.use({"sparsity": 0.7}),
                lambda: net.extract({"sparsity": 0.7}), lambda: net.report({"sparsity": 0.7})):  # fmt: skip
        calls.clear()
        with pytest.raises(ArithmeticError):
            run()
        assert net.point == Point(sparsity=0.5)
        assert net.structure() == structure
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
        assert net._data is calibration
        assert [m.training for m in net.modules()][: len(flags)] == flags
    monkeypatch.undo()
    assert net.prune().point == Point(sparsity=0.5)


# -- implementations that are wrong by one place ---------------------------------------------------------------------


def test_an_error_of_exactly_zero_is_no_sign_and_refused() -> None:
    c = {
        "weight": torch.tensor([[1.0, 0.25, -0.25, 3.0]]), "mean": torch.tensor([0.5, 2.0, 2.0, 1.0]),
        "variance": torch.ones(4), "norm": torch.tensor([1.0, 1.0, 1.0, 1.0]),
    }  # fmt: skip
    start = torch.tensor([[False, False, True, True]])
    found = refine(c["weight"], start, c["mean"], c["variance"], c["norm"])
    assert found.before.item() == 1.0
    # The best growth is column 0 or 1, both of C = 0.5; with column 2 of C = -0.5 e' is 1 - 0.5 - 0.5 = 0.
    assert torch.equal(found.kept, start)
    assert found.swaps.item() == 0
    assert found.after.item() == 1.0


def test_a_row_stops_at_an_error_that_is_eps_and_not_only_below() -> None:
    tried = 0
    for seed in range(12):
        c = case(seed)
        _, free = run(c)
        for r in (free.swaps > 0).nonzero().flatten().tolist():
            at = float(free.before[r].abs())
            assert run(c, eps=at)[1].swaps[r] == 0
            assert run(c, eps=math.nextafter(at, 0.0))[1].swaps[r] > 0
            tried += 1
    assert tried > 5


def test_zeros_of_a_row_are_floored() -> None:
    assert [zeros_in_row(columns, 0.5) for columns in (5, 7, 9)] == [2, 3, 4]
    assert zeros_in_row(3, 0.6) == 1
    net = DSnoT(nn.Sequential(nn.Linear(7, 4)), torch.randn(20, 7), sparsity=(0.4, 0.5))
    assert (net.mask("0", {"sparsity": 0.4}).sum(1) == 5).all()  # 2.8 zeros are 2
    assert (net.mask("0", {"sparsity": 0.5}).sum(1) == 4).all()
