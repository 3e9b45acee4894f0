from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from pliant.core import masks
from pliant.core.cost import flops_per_sample
from pliant.core.matrices import matrices

torch.set_num_threads(1)


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 1, 1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 16, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    )


# few distinct values, so that ties and zeros are common
tied = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5]), min_size=1, max_size=24).map(torch.tensor)


@settings(max_examples=60, deadline=None)
@given(tied)
def test_masks_have_the_exact_count_keep_the_largest_and_nest(w: torch.Tensor) -> None:
    before = torch.ones_like(w, dtype=torch.bool)
    for k in range(len(w) + 1):
        kept = masks.magnitude_mask(w, k)
        assert int((~kept).sum()) == k
        assert not (kept & ~before).any()  # what was gone stays gone
        if 0 < k < len(w):
            assert w[kept].abs().min() >= w[~kept].abs().max()
        expected = sorted(range(len(w)), key=lambda i: (abs(float(w[i])), i))[:k]
        assert sorted((~kept).nonzero().flatten().tolist()) == sorted(expected)  # ties go by flat index
        before = kept


@settings(max_examples=60, deadline=None)
@given(tied, st.data())
def test_masked_entries_go_first_even_before_other_zeros(w: torch.Tensor, data: st.DataObject) -> None:
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(w), max_size=len(w))))
    gone = int((~kept).sum())
    k = data.draw(st.integers(gone, len(w)))
    again = masks.magnitude_mask(w * kept, k, kept)
    assert not (again & ~kept).any()
    assert int((~again).sum()) == k


@pytest.mark.parametrize("zeros", [-1, 7])
def test_mask_count_out_of_range(zeros: int) -> None:
    with pytest.raises(ValueError, match=rf"zeros: {zeros} .* 0\.\.6"):
        masks.magnitude_mask(torch.ones(2, 3), zeros)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=0, max_size=40))
def test_bits_round_trip(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = masks.pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(len(bits) / 8)
    assert torch.equal(masks.unpack_bits(packed, mask.shape), mask)


def test_target_count_is_never_below_the_share() -> None:
    assert masks.target_count(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001
    assert masks.target_count(0.5, 3) == 2
    assert masks.target_count(0.0, 9) == 0
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="sparsity"):
            masks.target_count(bad, 10)


def weights(seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=rng) * c for s, c in (((4, 1, 3, 3), 1.0), ((6, 2, 3, 3), 0.1), ((12, 96), 0.5))]


@pytest.mark.parametrize("name", masks.ALLOCATORS)
def test_allocators_meet_the_target_exactly_and_grow_with_it(name: str) -> None:
    ws = weights()
    total = sum(w.numel() for w in ws)
    kept: list[torch.Tensor | None] = [None] * 3
    before = [0] * 3
    for target in (0, 1, 37, 500, 900, 1200, total):
        zeros = masks.ALLOCATORS[name](ws, target, kept)
        assert sum(zeros) == target
        assert all(0 <= k <= w.numel() for k, w in zip(zeros, ws, strict=True))
        assert all(a <= b for a, b in zip(before, zeros, strict=True))
        before = zeros
        kept = [masks.magnitude_mask(w, k) for w, k in zip(ws, zeros, strict=True)]
    with pytest.raises(ValueError, match="target"):
        masks.ALLOCATORS[name](ws, total + 1, None)


def test_allocators_by_their_definitions() -> None:
    ws = weights()
    target = 900
    sizes = [w.numel() for w in ws]
    every = torch.cat([w.abs().flatten() for w in ws])
    limit = every.sort().values[target - 1]
    assert masks.global_magnitude(ws, target) == [int((w.abs() <= limit).sum()) for w in ws]

    scores = []
    for w in ws:
        square = w.double().square().flatten().sort().values.tolist()
        scores.append([v / sum(square[i:]) for i, v in enumerate(square)])
    limit = sorted(s for layer in scores for s in layer)[target - 1]
    assert masks.lamp(ws, target) == [sum(s <= limit for s in layer) for layer in scores]

    share = masks.uniform(ws, target)
    assert all(abs(k - target * n / sum(sizes)) < 1 for k, n in zip(share, sizes, strict=True))

    # ERK: the density over sum(shape) / prod(shape) is the same number wherever it is below 1
    zeros = masks.erdos_renyi(ws, 700)
    eps = [(1 - k / n) / (sum(w.shape) / n) for k, n, w in zip(zeros, sizes, ws, strict=True)]
    free = [e for e, k in zip(eps, zeros, strict=True) if k]
    assert zeros[0] == 0  # (4, 1, 3, 3) is dense here
    assert max(free) - min(free) < 0.1 * max(free)
    assert eps[0] < max(free)


def test_erdos_renyi_never_gives_a_layer_more_weights_than_it_has() -> None:
    # By sum(shape) / prod(shape) alone the small layer would have a density of 1.8: what it cannot use, others get.
    small, large = torch.randn(2, 3), torch.randn(40, 50)
    target = round(0.9 * 2006)
    assert masks.erdos_renyi([small, large], target) == [0, target]
    middle = torch.randn(10, 10)
    zeros = masks.erdos_renyi([small, middle, large], target)
    assert sum(zeros) == target
    assert zeros[0] == 0
    room = 2106 - target - 6  # what is left to the other two, in proportion to the sums of their sides
    assert 100 - zeros[1] == pytest.approx(room * 20 / (20 + 90), abs=1)


def test_lamp_leaves_each_layer_one_weight_and_takes_zeros_first() -> None:
    ws = [torch.tensor([0.0, 0.0, 1e-6]), torch.tensor([5.0, 6.0, 7.0, 8.0])]
    assert masks.lamp(ws, 2) == [2, 0]
    assert masks.lamp(ws, 5) == [2, 3]
    assert masks.lamp([torch.zeros(3), torch.ones(3)], 3) == [3, 0]


def test_prunable_selects_by_name_and_refuses_what_matches_nothing() -> None:
    model = cnn()
    assert [w.name for w in masks.prunable(model)] == ["0", "3", "5", "7"]
    assert [w.name for w in masks.prunable(model, include=["[35]"])] == ["3", "5"]
    assert [w.name for w in masks.prunable(model, exclude=["0", "7"])] == ["3", "5"]
    with pytest.raises(ValueError, match="include: 'head' matches no Conv or Linear layer"):
        masks.prunable(model, include=["head"])
    with pytest.raises(ValueError, match="exclude: 'x\\*' matches no"):
        masks.prunable(model, exclude=["x*"])
    with pytest.raises(ValueError, match="no prunable layer"):
        masks.prunable(model, exclude=["*"])
    with pytest.raises(ValueError, match="no prunable layer"):
        masks.prunable(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(TypeError, match="include"):
        masks.prunable(model, include="0")
    with pytest.raises(ValueError, match="lazy"):
        masks.prunable(nn.LazyLinear(3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(x)).mean(1))


def test_tied_weights_count_once_and_are_masked_together() -> None:
    model = Tied()
    found = masks.prunable(model)
    assert [w.name for w in found] == ["mix", "head"]
    parameter = model.embed.weight
    masks.set_mask(found[1], masks.magnitude_mask(parameter, 20))
    assert found[1].parameter is parameter
    assert int((model.embed.weight == 0).sum()) == int((model.head.weight == 0).sum()) == 20
    assert sum(p is parameter for p in model.parameters()) == 1
    baked = masks.bake(copy.deepcopy(model))
    assert baked.head.weight is baked.embed.weight
    x = torch.randint(0, 7, (3, 5))
    assert torch.equal(baked(x), model(x))
    assert masks.sparsity_of(baked) == 20 / (28 + 16)


def test_a_copy_can_be_baked_and_the_original_keeps_its_masks() -> None:
    model = cnn().eval()
    found = masks.prunable(model)
    for w in found:
        masks.set_mask(w, masks.magnitude_mask(w.parameter, w.parameter.numel() // 2))
    x = torch.randn(3, 1, 8, 8)
    y = model(x)
    plain = masks.bake(copy.deepcopy(model))
    assert torch.equal(plain(x), y)
    assert torch.equal(model(x), y)
    assert all(parametrize.is_parametrized(m) for m, _ in (o for w in found for o in w.owners))
    assert not any(parametrize.is_parametrized(m) for m in plain.modules())
    assert [type(m) for m in plain.modules()] == [type(m) for m in cnn().modules()]
    assert set(plain.state_dict()) == set(cnn().state_dict())


def test_a_parametrisation_of_the_users_own_survives_baking() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer)
    (w,) = masks.prunable(model)
    masks.attach(w)

    class Twice(nn.Module):
        def forward(self, b: torch.Tensor) -> torch.Tensor:
            return 2 * b

    parametrize.register_parametrization(layer, "bias", Twice())
    x = torch.randn(2, 3)
    plain = masks.bake(copy.deepcopy(model))
    assert torch.equal(plain(x), model(x))
    assert parametrize.is_parametrized(plain[0], "bias")
    assert isinstance(plain[0].weight, nn.Parameter)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    ],
)
def test_a_zero_never_comes_back(make: object) -> None:
    model = cnn()
    optimizer = make(model.parameters())
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 5, (16,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(5):  # momentum from before the mask
        step()
    found = masks.prunable(model)
    kept = {}
    for w in found:
        kept[w.name] = masks.magnitude_mask(w.parameter, w.parameter.numel() * 3 // 4)
        masks.set_mask(w, kept[w.name])
    frozen = {w.name: w.value().clone() for w in found}
    for _ in range(50):
        step()
        for w in found:
            assert (w.parameter.grad[~kept[w.name]] == 0).all()
            assert (w.value()[~kept[w.name]] == 0).all()
    assert all(not torch.equal(w.value(), frozen[w.name]) for w in found)  # the others did learn
    assert {id(w.parameter) for w in found} <= {id(p) for g in optimizer.param_groups for p in g["params"]}


def test_multiply_adds_agree_with_the_dense_counter_and_fall_by_exactly_the_zeroed_weights() -> None:
    model = cnn()
    x = torch.randn(3, 1, 8, 8)
    found = masks.prunable(model)
    uses = masks.multiply_adds(model, found, x)
    assert uses == [16, 16, 1, 1]
    for w in found:
        masks.attach(w)

    def macs() -> int:
        return sum(u * int(w.kept.sum()) for u, w in zip(uses, found, strict=True))

    dense = flops_per_sample(model, x)
    assert dense.total == dense.nonzero == 2 * macs()  # grouped convolutions too
    masks.set_mask(found[1], masks.magnitude_mask(found[1].parameter, 10))
    pruned = flops_per_sample(model, x)
    assert 2 * macs() == dense.total - 2 * 10 * 4 * 4
    assert pruned.nonzero == 2 * macs()
    assert pruned.total == dense.total  # a masked dense product saves nothing


def test_multiply_adds_of_other_layers() -> None:
    model = nn.ModuleDict({"t": nn.ConvTranspose2d(2, 3, 2, 2), "l": nn.Linear(5, 4), "idle": nn.Linear(2, 2)})
    for name, x, expected in (("t", torch.randn(2, 2, 4, 5), [20, 0, 0]), ("l", torch.randn(2, 7, 5), [0, 7, 0])):

        class Run(nn.Module):
            def __init__(self, key: str = name) -> None:
                super().__init__()
                self.parts, self.key = model, key

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.parts[self.key](x)

        net = Run()
        assert masks.multiply_adds(net, masks.prunable(net), x) == expected


# -- scores and budgets ---------------------------------------------------------------------------------------------


def test_scores_match_their_definitions() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    assert torch.equal(masks.magnitude_score(weight), weight.abs())
    assert torch.equal(masks.wanda_score(weight, inputs.norm(dim=0)), weight.abs() * inputs.norm(dim=0))
    h = 2 / 40 * inputs.t() @ inputs
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped)).t()  # A = L L^T = U^T U
    assert torch.allclose(masks.sparsegpt_score(weight, h), weight**2 / upper.diagonal() ** 2, rtol=1e-9)


def test_the_score_of_sparsegpt_is_the_damage_done_with_the_best_compensation_by_later_inputs() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(1, 5, dtype=torch.float64), torch.randn(50, 5, dtype=torch.float64)
    h = 2 / 50 * inputs.t() @ inputs
    score = masks.sparsegpt_score(weight, h, damp=1e-12)[0]
    for k in range(5):  # w_k becomes 0, the inputs after k make up for it by least squares, those before stay
        later = inputs[:, k + 1 :]
        target = inputs[:, k] * weight[0, k]
        left = target - later @ torch.linalg.lstsq(later, target[:, None]).solution[:, 0] if k < 4 else target
        assert score[k].item() == pytest.approx(2 / 50 * left.square().sum().item(), rel=1e-6)


def eliminated(weight: torch.Tensor, h: torch.Tensor, budget: Any, damp: float = 0.01, block: int = 128) -> Any:
    """SparseGPT with the inverse of what is left of H, inverted anew for every input."""
    w, size = weight.double().clone(), weight.shape[1]
    damped = h + damp * h.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    inverses = [torch.linalg.inv(damped[k:, k:]) for k in range(size)]  # of the inputs that are not settled yet
    spread = torch.stack([inverse[0, 0] for inverse in inverses])  # U[k, k]^2
    gone = torch.zeros_like(w, dtype=torch.bool)
    for k in range(size):
        if isinstance(budget, tuple):
            n, m = budget
            if k % m == 0:
                score = w[:, k : k + m] ** 2 / spread[k : k + m]
                gone[:, k : k + m].scatter_(1, score.argsort(1)[:, : m - n], True)
        elif k % block == 0:
            score = w[:, k : k + block] ** 2 / spread[k : k + block]
            gone[:, k : k + block] = score <= score.flatten().sort().values[int(score.numel() * budget)]
        for row in range(len(w)):
            if gone[row, k]:
                w[row, k + 1 :] -= w[row, k] / inverses[k][0, 0] * inverses[k][0, 1:]
                w[row, k] = 0.0
    return ~gone, w


@pytest.mark.parametrize(("columns", "budget"), [(24, 0.5), (150, 0.6), (24, (2, 4)), (136, (4, 8)), (12, (1, 3))])
def test_sparsegpt_is_the_elimination_of_one_input_after_another(columns: int, budget: Any) -> None:
    rng = torch.Generator().manual_seed(columns)
    weight = torch.randn(5, columns, generator=rng)
    inputs = torch.randn(2 * columns, columns, generator=rng, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=rng, dtype=torch.float64) / columns**0.5 + 0.3
    h = 2 / len(inputs) * inputs.t() @ inputs
    kept, values, score = masks.sparsegpt(weight, h, budget)
    expected, w = eliminated(weight, h, budget)
    assert torch.equal(kept, expected)
    assert torch.allclose(values.masked_fill(~kept, 0.0), w, atol=1e-9)
    if isinstance(budget, tuple):
        assert (kept.view(5, -1, budget[1]).sum(2) == budget[0]).all()
    elif columns <= 128:
        assert int((~kept).sum()) == int(kept.numel() * budget) + 1
    # What it is for: less is lost than by the same mask without the change of weights.
    lost = [
        (inputs @ (v.masked_fill(~kept, 0.0) - weight.double()).t()).square().sum() for v in (values, weight.double())
    ]
    assert lost[0] < 0.9 * lost[1]
    assert score.shape == weight.shape
    with pytest.raises(ValueError, match="budget"):
        masks.sparsegpt(weight, h, 1.0)
    with pytest.raises(ValueError, match="budget"):
        masks.sparsegpt(weight, h, (3, 7) if columns % 7 else (5, 11))


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_inputs_that_are_never_used_change_nothing_whatever_the_scale_of_the_others(scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, live = torch.randn(4, 12, generator=rng), torch.randn(30, 9, generator=rng, dtype=torch.float64)
    inputs = torch.zeros(30, 12, dtype=torch.float64)
    used = torch.tensor([0, 1, 3, 4, 5, 7, 8, 9, 11])
    inputs[:, used] = live

    def hessian(x: torch.Tensor) -> torch.Tensor:
        return 2 / 30 * (scale * x).t() @ (scale * x)

    whole, alone = masks.sparsegpt_score(weight, hessian(inputs)), masks.sparsegpt_score(weight[:, used], hessian(live))
    assert torch.allclose(whole[:, used], alone, rtol=1e-9)
    assert not whole[:, [2, 6, 10]].any()
    one, other = (
        masks.sparsegpt(weight, hessian(inputs), (3, 6)),
        masks.sparsegpt(weight, hessian(inputs / scale), (3, 6)),
    )
    assert torch.equal(one[0], other[0])
    assert torch.allclose(one[1], other[1], rtol=1e-6)
    assert torch.isfinite(masks.sparsegpt(weight, torch.zeros(12, 12), 0.5)[1]).all()


def test_a_dead_input_goes_first_and_half_precision_is_scored_in_single() -> None:
    inputs = torch.randn(20, 4, dtype=torch.float64)
    inputs[:, 2] = 0
    score = masks.sparsegpt_score(torch.randn(3, 4), 2 / 20 * inputs.t() @ inputs)
    assert torch.isfinite(score).all()
    assert not masks.row_mask(score, 1)[:, 2].any()
    assert masks.wanda_score(torch.randn(3, 4, dtype=torch.bfloat16), torch.ones(4)).dtype is torch.float32


@given(st.integers(1, 4), st.integers(1, 12), st.data())
@settings(max_examples=40, deadline=None)
def test_budgets_are_exact_and_ties_go_by_position(rows: int, columns: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns))
    score = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    zeros = data.draw(st.integers(0, columns))
    kept = masks.row_mask(score, zeros)
    for r in range(rows):
        gone = sorted(range(columns), key=lambda k, r=r: (score[r, k].item(), k))[:zeros]
        assert (~kept[r]).nonzero().flatten().tolist() == sorted(gone)
    assert int((~masks.layer_mask(score, zeros)).sum()) == zeros
    parts = masks.global_masks([score, score + 0.5], zeros)
    assert sum(int((~p).sum()) for p in parts) == zeros
    m = data.draw(st.sampled_from([m for m in range(2, 13) if columns % m == 0] or [0]))
    if m:
        n = data.draw(st.integers(1, m - 1))
        groups = masks.group_mask(score, n, m)
        assert (groups.view(rows, -1, m).sum(-1) == n).all()
        assert masks.follows_pattern(groups, n, m)
        assert not masks.follows_pattern(torch.ones(rows, columns), n, m)


def test_torch_prune_chooses_the_same_weights() -> None:
    from torch.nn.utils import prune

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Conv1d(9, 4, 1))
    scores = [masks.magnitude_score(m.weight) for m in model]
    ours = masks.global_masks(scores, 40)
    prune.global_unstructured([(m, "weight") for m in model], prune.L1Unstructured, amount=40)
    for m, kept in zip(model, ours, strict=True):
        assert torch.equal(m.weight_mask.bool(), kept)


def test_bad_scores_and_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pattern: 2:4 needs .* has 6"):
        masks.group_mask(torch.ones(2, 6), 2, 4)
    for bad in ("4:2", "2", "a:b", "0:4", "2:4:8", "-1:4"):
        with pytest.raises(ValueError, match="pattern"):
            masks.parse_pattern(bad)
    assert masks.parse_pattern("4:8") == (4, 8)
    with pytest.raises(ValueError, match="zeros: 7"):
        masks.row_mask(torch.ones(2, 6), 7)
    with pytest.raises(ValueError, match="NaN"):
        masks.row_mask(torch.full((2, 6), float("nan")), 1)
    with pytest.raises(ValueError, match="norm"):
        masks.wanda_score(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="hessian"):
        masks.sparsegpt_score(torch.ones(2, 3), torch.ones(2, 2))
    with pytest.raises(ValueError, match="damp"):
        masks.sparsegpt_score(torch.ones(2, 3), torch.eye(3), damp=0)
    assert not masks.follows_pattern(torch.ones(2, 6), 2, 4)


# -- every matrix of a network --------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer with a projection, an attention, a bilinear and a transposed layer, and a table."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, proj_size=4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.bilinear = nn.Bilinear(4, 4, 5)
        self.up = nn.ConvTranspose1d(5, 3, 2)
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.lstm(self.table(ids))[0]
        a = self.attention(h, h, h, need_weights=False)[0]
        y: torch.Tensor = self.head(self.up(self.bilinear(h, a).transpose(1, 2)).mean(2))
        return y


MATRICES = [
    *(f"lstm.weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh", "hr")),
    "attention.in_proj_weight",
    "attention.out_proj",
    "bilinear",
    "up",
    "head",
]


def test_with_an_example_every_matrix_is_prunable() -> None:
    model, ids = Recurrent().eval(), torch.randint(0, 9, (4, 7))
    found = masks.prunable(model, example=ids)
    assert sorted(w.name for w in found) == sorted(MATRICES)
    assert [w.name for w in masks.prunable(model)] == ["attention.out_proj", "up", "head"]  # by their classes alone
    uses = dict(zip((w.name for w in found), masks.multiply_adds(model, found, ids), strict=True))
    assert uses == dict.fromkeys(MATRICES, 7) | {"head": 1}
    some = masks.prunable(model, ("lstm.*",), ("*_hh_*",), ids)
    assert [w.name for w in some] == [f"lstm.weight_{k}_l{i}" for i in (0, 1) for k in ("ih", "hr")]
    with pytest.raises(ValueError, match="include: 'gru' matches no layer; there are: 'lstm"):
        masks.prunable(model, ("gru",), example=ids)


def test_recurrent_weights_stay_masked_in_training_copies_and_baking() -> None:
    model, ids = Recurrent(), torch.randint(0, 9, (4, 7), generator=torch.Generator().manual_seed(0))
    found = masks.prunable(model, example=ids)
    for w in found:
        masks.set_mask(w, masks.magnitude_mask(w.parameter, w.parameter.numel() // 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    before = [w.value().clone() for w in found]
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids).square().mean()
        loss.backward()
        for w in found:
            assert w.parameter.grad is not None, w.name
            assert not w.parameter.grad[~w.kept].any(), w.name
        optimizer.step()
        copy.deepcopy(model)  # also right after a run with gradients
    assert all(not torch.equal(w.value(), b) for w, b in zip(found, before, strict=True))
    # what is used is the mask, whatever stands in the parameter
    with torch.no_grad():
        expected = model.eval()(ids)
        for w in found:
            w.parameter[~w.kept] = 5.0
        assert torch.equal(model(ids), expected)
    baked = masks.bake(copy.deepcopy(model))
    assert torch.equal(baked(ids), expected)
    assert type(baked.lstm) is nn.LSTM
    assert not baked.lstm._forward_hooks
    assert baked.lstm._flat_weights[0] is baked.lstm.weight_ih_l0
    assert sorted(w.name for w in masks.prunable(baked, example=ids)) == sorted(MATRICES)
    assert masks.sparsity_of(baked, example=ids) == pytest.approx(0.5, abs=0.02)
    whole = sum(p.numel() for p in baked.parameters())
    assert masks.zeros_share(model) == masks.count_zeros(baked.parameters()) / whole
    torch.save(baked.lstm.state_dict(), io.BytesIO())
    assert torch.equal(model(ids), expected)


def test_uses_of_stacked_experts_are_a_mean_over_them() -> None:
    from pliant.core.experts import Experts

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = Experts(4, 6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(0, 1)
            chosen = torch.zeros(len(flat), 2, dtype=torch.long)
            chosen[:, 1] = torch.arange(len(flat)) % 4 + 1
            y: torch.Tensor = self.bank(flat, chosen, torch.ones(chosen.shape)).view_as(x)
            return y

    model, x = Bank(), torch.randn(3, 10, 4)
    found = masks.prunable(model, example=x)
    assert [w.name for w in found] == ["bank.up", "bank.down"]
    assert masks.multiply_adds(model, found, x) == [4, 4]  # 10 tokens, 2 of 5 experts each
    for w in found:
        masks.set_mask(w, masks.magnitude_mask(w.parameter, 60))
    y = model(x)
    assert torch.equal(masks.bake(copy.deepcopy(model))(x), y)


def test_coverage_counts_and_says_why() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)), torch.randn(2, 4)
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    every = matrices(model, x)
    why = {"1": ("excluded", False), "2": ("no", True)}
    found = masks.coverage(model, every, [model[0].weight], lambda name, m: why[name])
    assert (found.pruned, found.matrices, found.parameters) == (12, 12 + 15 + 10, 12 + 15 + 10 + 10)
    assert found.share == 12 / 37
    assert found.of_all == 12 / 47
    assert found.left_out == {"1": "excluded", "2": "no"}
    assert found.refused == ("2",)
    lines = str(found).splitlines()
    assert lines[0] == "12 weights are pruned: 32.4% of the network's matrices, 25.5% of its 47 parameters"
    assert lines[1:] == ["  1: excluded", "  2: no"]
    with pytest.warns(UserWarning, match=r"32.4% of its matrix weights.*25.5% of all.*Left out: '2' \(no\)"):
        masks.warn_refused(found, 1)


def test_scores_of_a_stack_are_those_of_its_matrices() -> None:
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 4, 8, generator=rng), torch.randn(3, 20, 8, generator=rng).double()
    x[1, :, 2] = 0.0
    norm, h = x.norm(dim=1), 2 / 20 * x.transpose(1, 2) @ x
    for stacked, one in (
        (masks.wanda_score(w, norm), [masks.wanda_score(w[e], norm[e]) for e in range(3)]),
        (masks.sparsegpt_score(w, h), [masks.sparsegpt_score(w[e], h[e]) for e in range(3)]),
    ):
        assert torch.allclose(stacked, torch.stack(one))
        for make in (lambda s: masks.row_mask(s, 3), lambda s: masks.group_mask(s, 2, 4)):
            assert torch.equal(make(stacked), torch.stack([make(s) for s in one]))
    assert masks.follows_pattern(masks.group_mask(norm[:, None].expand(3, 4, 8), 2, 4), 2, 4)
    with pytest.raises(ValueError, match=r"norm: its shape is \(8,\); allowed: \(3, 8\)"):
        masks.wanda_score(w, norm[0])
