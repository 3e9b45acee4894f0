"""The specification's exact properties 1-10 and 12 by number (11 is in test_recommendation), then the rest."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.cost import count_bytes
from pliant.core.dynamic import Point
from pliant.core.frontier import measure
from pliant.core.persistence import load, save
from pliant.core.training import fit
from pliant.sparsity import sparse_learning
from pliant.sparsity.sparse_learning import (
    SparseEmbedding,
    SparseLearning,
    compress_embeddings,
    exploration,
    lowest,
    table_bytes,
)
from pliant.tasks import recommendation

torch.set_num_threads(1)

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
}


class Classifier(nn.Module):
    """Three ids -> 4 classes, without a loss of its own."""

    def __init__(self, rows: int = 30, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(rows, 8)
        self.hidden = nn.Linear(24, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.table(ids).flatten(1))))


class Table(nn.Module):
    """One matrix and a linear loss, so that the gradient is whatever a test wants."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding(*weight.shape, dtype=weight.dtype)
        with torch.no_grad():
            self.table.weight.copy_(weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)

    def loss(self, gradient: Tensor) -> Tensor:
        return (self.table.weight * gradient).sum()


def batches(n: int = 12, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, (n, 16, 3), generator=rng)
    return [(x, x.sum(1) % 4) for x in ids]


def run(net: SparseLearning, steps: int = 12, make: Make | None = None, data: Any = None) -> torch.optim.Optimizer:
    optimizer = (make or OPTIMIZERS["adam"])(net.parameters())
    net.attach_optimizer(optimizer)
    net.train()
    found = data if data is not None else batches(steps)
    for step in range(steps):
        optimizer.zero_grad()
        net.loss(found[step % len(found)]).backward()
        optimizer.step()
    return optimizer


def masks(net: SparseLearning) -> list[Tensor]:
    return [m.mask.clone() for m in net.masks]  # type: ignore[union-attr, operator]


def weights(net: SparseLearning) -> list[Tensor]:
    return [net.model.get_parameter(n).detach() for n in net.active()]


def set_mask(net: SparseLearning, mask: Tensor) -> None:
    net.masks[0].mask.copy_(mask)  # type: ignore[operator, union-attr]
    net.masks[0].fired.copy_(mask)  # type: ignore[operator, union-attr]
    net._enforce()


def still(weight: Tensor, gradient: Tensor, mask: Tensor, **options: Any) -> SparseLearning:
    """One update of one tensor whose weight the optimiser leaves as it is (lr 0)."""
    arguments: dict[str, Any] = {"update_every": 1, "alpha": 0.3, "alpha_min": 0.3, "density": 0.5} | options
    net = SparseLearning(Table(weight), **arguments)
    with torch.no_grad():
        net.model.table.weight.copy_(weight)
    set_mask(net, mask)
    run(net, 1, lambda p: torch.optim.SGD(p, 0.0), [gradient])
    return net


# -- 1: the budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize("case", ["few rows", "zero weights", "alpha 1", "all tie", "no gradient"])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.93])
def test_1_the_budget_never_leaks(case: str, grow: Any, density: float) -> None:
    alpha = 1.0 if case == "alpha 1" else 0.5
    net = SparseLearning(
        Classifier(), density=density, update_every=1, alpha=alpha, alpha_min=alpha, grow=grow, regrow="keep"
    )
    data = batches(8)
    if case == "few rows":  # a batch touches 2 of 30 rows: the gradient of nearly all inactive entries is zero
        data = [(torch.tensor([[1, 4, 1]]), torch.tensor([step % 4])) for step in range(8)]
    elif case == "zero weights":
        for w in weights(net):
            w.zero_()
    elif case == "all tie":
        for w in weights(net):
            w.fill_(0.5)
        net._enforce()
    elif case == "no gradient":
        data = [(x, torch.full((16,), -100)) for x, _ in data]  # nothing counts: 0 / 0 is avoided by the sum below
        net.criterion = lambda y, t: F.cross_entropy(y, t, reduction="sum")
    before = net.active()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    net.attach_optimizer(optimizer)
    assert before == {n: round(density * w.numel()) for n, w in zip(before, weights(net), strict=True)}
    for batch in data:
        optimizer.zero_grad()
        net.loss(batch).backward()
        optimizer.step()
        assert net.active() == before
    assert len(net.history()) == 8


def test_1_also_where_a_parameter_has_no_gradient_at_all() -> None:
    net = SparseLearning(Classifier(), density=0.3, update_every=1, total_steps=4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.attach_optimizer(optimizer)
    before = net.active()
    for _ in range(4):
        optimizer.zero_grad()
        net.model.head.weight.sum().backward()
        optimizer.step()
        assert net.active() == before


# -- 2: which entries go and come ---------------------------------------------------------------------------------

whole = st.lists(st.integers(-3, 3), min_size=30, max_size=30)


@settings(max_examples=60, deadline=None)
@given(whole, st.lists(st.integers(1, 9), min_size=30, max_size=30), st.integers(1, 29), st.floats(0.0, 1.0), st.data())
def test_2_drop_and_grow_sets_against_brute_force(
    w: list[int], g: list[int], active: int, alpha: float, draw: st.DataObject
) -> None:
    weight, gradient = torch.tensor(w).double().view(6, 5), torch.tensor(g).double().view(6, 5)
    gradient[::2] *= -1
    order = draw.draw(st.permutations(range(30)))
    mask = torch.zeros(30, dtype=torch.bool)
    mask[list(order)[:active]] = True
    net = still(weight, gradient, mask.view(6, 5), alpha=alpha, alpha_min=alpha)
    k = min(active, math.ceil(round(alpha * active, 9)))
    ranked = sorted((i for i in range(30) if mask[i]), key=lambda i: (abs(w[i]), i))
    dropped, rest = set(ranked[:k]), set(ranked[k:])
    after = {i for i in range(30) if masks(net)[0].flatten()[i]}
    assert rest <= after
    assert len(after) == active  # |drop| = |grow| = k: the grown ones are disjoint from what remained
    candidates = sorted((i for i in range(30) if i not in rest), key=lambda i: (-g[i], i))
    assert after - rest == set(candidates[:k])
    if k:
        (update,) = net.history()
        assert update.moved == {"table.weight": k}
        assert update.regrown == {"table.weight": len(dropped & after)}


def test_2_the_number_is_the_ceiling_exactly() -> None:
    weight = torch.arange(1.0, 201.0).view(20, 10)
    mask = torch.zeros(20, 10, dtype=torch.bool)
    mask[:10] = True
    net = still(weight, torch.ones(20, 10), mask, alpha=0.07, alpha_min=0.07)  # 0.07 * 100 is 7.000000000000001
    assert net.history()[0].moved == {"table.weight": 7}
    net = still(weight, torch.ones(20, 10), mask, alpha=0.071, alpha_min=0.071)
    assert net.history()[0].moved == {"table.weight": 8}


def test_2_lowest_never_chooses_what_is_excluded() -> None:
    among = torch.tensor([True, False, True, False])
    assert lowest(torch.tensor([5.0, 0.0, math.inf, -1.0]), 2, among).tolist() == [True, False, True, False]
    assert lowest(torch.zeros(4, dtype=torch.float16), 1, among).tolist() == [True, False, False, False]
    assert not lowest(torch.zeros(4), 0, among).any()
    with pytest.raises(ValueError, match="k: 3 of 2"):
        lowest(torch.zeros(4), 3, among)


def test_2_places_without_a_gradient_are_drawn_at_random_after_those_with_one() -> None:
    weight, mask = torch.arange(1.0, 101.0).view(10, 10), torch.zeros(10, 10, dtype=torch.bool)
    mask[:4] = True
    gradient = torch.zeros(10, 10)
    gradient[9, 8:] = 1.0
    grown = set()
    for seed in range(20):
        net = still(weight, gradient, mask, seed=seed, alpha=0.25, alpha_min=0.25)
        assert masks(net)[0][9, 8:].all()
        grown |= set(masks(net)[0].flatten().nonzero().flatten().tolist())
    assert len(grown) > 80  # no end of the table is preferred


# -- 3, 4: between updates, and the optimiser's memory ------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_3_and_4_zeros_and_moments_after_every_step(name: str) -> None:
    net = SparseLearning(Classifier(), density=0.4, update_every=4, total_steps=12)
    optimizer = OPTIMIZERS[name](net.parameters())
    net.attach_optimizer(optimizer)
    storages = [w.data_ptr() for w in weights(net)]
    previous = masks(net)
    for step, batch in enumerate(batches(12), 1):
        optimizer.zero_grad()
        net.loss(batch).backward()
        optimizer.step()
        now = masks(net)
        if step % 4:
            assert all(torch.equal(a, b) for a, b in zip(previous, now, strict=True))
        else:
            assert not all(torch.equal(a, b) for a, b in zip(previous, now, strict=True))
        previous = now
        for parameter_name, w, mask in zip(net.active(), weights(net), now, strict=True):
            assert torch.equal(w[~mask].view(torch.int32), torch.zeros_like(w[~mask]).view(torch.int32))  # +0
            state = optimizer.state[net.model.get_parameter(parameter_name)]
            moments = [t for t in state.values() if isinstance(t, Tensor) and t.shape == w.shape]
            assert moments
            for moment in moments:
                assert (moment[~mask] == 0).all()
                assert (moment[mask] != 0).any()
    assert storages == [w.data_ptr() for w in weights(net)]  # in place: captured tensors stay the ones in use


def test_4_a_grown_weight_starts_as_a_fresh_entry_of_adam() -> None:
    torch.manual_seed(0)
    weight = torch.rand(6, 5, dtype=torch.float64) + 1
    mask = torch.rand(6, 5) < 0.5
    net = SparseLearning(Table(weight), density=0.5, update_every=3, alpha=0.4, alpha_min=0.4)
    with torch.no_grad():
        net.model.table.weight.copy_(weight)
    set_mask(net, mask)
    gradients = [torch.randn(6, 5, dtype=torch.float64) for _ in range(4)]
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    net.attach_optimizer(optimizer)
    for step, gradient in enumerate(gradients, 1):
        optimizer.zero_grad()
        net.loss(gradient).backward()
        optimizer.step()
        if step == 3:
            new = masks(net)[0] & ~mask
    assert new.any()
    g = gradients[3]
    m, v = 0.1 * g / (1 - 0.9**4), 0.001 * g * g / (1 - 0.999**4)
    torch.testing.assert_close(weights(net)[0][new], (-0.01 * m / (v.sqrt() + 1e-8))[new], rtol=1e-12, atol=0)


# -- 5: the limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regrow", ["keep", "zero"])
@pytest.mark.parametrize("name", ["sgd foreach", "adam"])
def test_5_density_one_is_dense_training_bit_by_bit(name: str, regrow: Any) -> None:
    dense = Classifier()
    net = SparseLearning(copy.deepcopy(dense), density=1.0, update_every=2, total_steps=12, regrow=regrow)
    run(net, make=OPTIMIZERS[name])
    optimizer = OPTIMIZERS[name](dense.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(dense(x), y).backward()
        optimizer.step()
    for a, b in zip(dense.parameters(), net.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_5_three_ways_to_static_training() -> None:
    found = []
    for options in (
        {"update_every": 13, "total_steps": 12},
        {"explore": False, "update_every": 1},
        {"alpha": 0.0, "alpha_min": 0.0, "update_every": 1},
    ):
        net = SparseLearning(Classifier(), density=0.3, **options)  # type: ignore[arg-type]
        before = masks(net)
        run(net)
        assert all(torch.equal(a, b) for a, b in zip(before, masks(net), strict=True))
        assert net.history() == []
        found.append(weights(net))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# -- 6: the schedule ----------------------------------------------------------------------------------------------


def test_6_the_cosine() -> None:
    assert exploration(0.0) == pytest.approx(0.5, abs=1e-12)
    assert exploration(1.0) == pytest.approx(0.005, abs=1e-12)
    assert exploration(0.5) == pytest.approx(0.2525, abs=1e-12)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    stepwise = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.005)
    for t in range(51):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(exploration(t / 50), abs=1e-12)
        optimizer.step()
        stepwise.step()


def test_6_in_a_loop_and_in_fit() -> None:
    net = SparseLearning(Classifier(), density=0.3, update_every=3, total_steps=12)
    run(net)
    assert [(u.step, u.alpha) for u in net.history()] == [(t, exploration(t / 12)) for t in (3, 6, 9, 12)]
    net = SparseLearning(Classifier(), density=0.3, update_every=3)
    fit(net, batches(), epochs=1, progress=False)
    assert [(u.step, u.alpha) for u in net.history()] == [(t, exploration((t - 1) / 12)) for t in (3, 6, 9, 12)]


# -- 7: the gradient ----------------------------------------------------------------------------------------------


def spy(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The values that growth ranks by, one tensor for each masked tensor and update."""
    seen: list[Tensor] = []

    def watched(values: Tensor, k: int, among: Tensor, generator: Any = None) -> Tensor:
        if generator is not None:
            seen.append(values.clone())
        return lowest(values, k, among, generator)

    monkeypatch.setattr(sparse_learning, "lowest", watched)
    return seen


@pytest.mark.parametrize("name", ["writes into the gradient", "adam"])
def test_7_growth_ranks_by_the_dense_gradient_before_the_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = OPTIMIZERS.get(name, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True))
    seen = spy(monkeypatch)
    net = SparseLearning(Classifier().double(), density=0.3, update_every=2, total_steps=4, params=["hidden.weight"])
    optimizer = make(net.parameters())
    net.attach_optimizer(optimizer)
    for step in range(2):
        x, y = batches()[step]
        before = copy.deepcopy(net.model)
        mask = masks(net)[0]
        optimizer.zero_grad()
        net.loss((x, y)).backward()
        optimizer.step()
    (ranked,) = seen
    weight = before.hidden.weight
    F.cross_entropy(before(x), y).backward()
    torch.testing.assert_close(ranked, -weight.grad.abs(), rtol=1e-12, atol=1e-15)
    inactive = (~mask).nonzero()[::17]
    assert len(inactive) > 5
    for row, column in inactive.tolist():
        values = []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                weight[row, column] = h
                values.append(float(F.cross_entropy(before(x), y)))
                weight[row, column] = 0.0
        slope = (values[0] - values[1]) / 2e-6
        assert abs(slope) == pytest.approx(-float(ranked[row, column]), rel=1e-4, abs=1e-8)


def test_7_a_window_averages_the_last_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    gradients = [torch.randn(6, 5) for _ in range(8)]
    net = SparseLearning(Table(torch.rand(6, 5)), density=0.5, update_every=4, grad_window=3, total_steps=8)
    run(net, 8, lambda p: torch.optim.SGD(p, 0.1), gradients)
    for i, ranked in enumerate(seen):
        mean = torch.stack(gradients[4 * i + 1 : 4 * i + 4]).mean(0)
        torch.testing.assert_close(ranked, -mean.abs())
    assert len(seen) == 2


# -- 8: values of what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("regrow", ["keep", "zero"])
def test_8_dropped_and_regrown_keeps_its_value_or_not(regrow: Any) -> None:
    weight = torch.tensor([[0.1, 0.2, 5.0, 6.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True, True, False, False]])
    gradient = torch.tensor([[7.0, 0.0, 0.0, 0.0, 8.0, 1.0]])
    net = still(weight, gradient, mask, alpha=0.5, alpha_min=0.5, regrow=regrow)  # drops 0 and 1, grows 4 and 0
    assert masks(net)[0].tolist() == [[True, False, True, True, True, False]]
    expected = torch.tensor([[0.1 if regrow == "keep" else 0.0, 0.0, 5.0, 6.0, 0.0, 0.0]])
    assert torch.equal(weights(net)[0], expected)
    assert net.history()[0].regrown == {"table.weight": 1}


def test_8_zero_forgets_the_moments_as_well() -> None:
    net = SparseLearning(Table(torch.rand(6, 5)), update_every=2, alpha=1.0, alpha_min=1.0, regrow="zero")
    mask = masks(net)[0]
    optimizer = run(net, 2, lambda p: torch.optim.Adam(p, 0.1), [mask.float() + 0.1])  # all that goes comes back
    assert torch.equal(masks(net)[0], mask)
    assert not weights(net)[0].any()
    assert not optimizer.state[net.model.table.weight]["exp_avg"].any()


# -- 9: the sparse table ------------------------------------------------------------------------------------------


def holed(rows: int, columns: int, density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    weight = torch.where(torch.rand(rows, columns, generator=rng) < density, weight, 0.0)
    return weight.to(dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12),
    st.sampled_from([1, 5, 8, 13, 64, 300]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(["bitmap", "csr", None]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_9_lookups_are_bitwise_those_of_the_dense_table(
    rows: int, columns: int, density: float, format: Any, dtype: torch.dtype
) -> None:
    weight = holed(rows, columns, density, dtype)
    weight[0, 0] = -0.0  # kept, so that not even its sign is lost
    table = SparseEmbedding(nn.Embedding.from_pretrained(weight), format)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[weight.element_size()]
    for index in (torch.arange(rows), torch.randint(rows, (2, 3, 4)), torch.tensor(0), torch.zeros(0, dtype=torch.int)):
        expected = F.embedding(index, weight)
        assert table(index).shape == expected.shape
        assert torch.equal(table(index).view(integer), expected.view(integer))
    assert torch.equal(table.weight.view(integer), weight.view(integer))
    if dtype is not torch.bfloat16:
        assert torch.equal(table.csr().to_dense(), weight)


@pytest.mark.parametrize("format", ["bitmap", "csr"])
@pytest.mark.parametrize(("columns", "index_bytes"), [(64, 1), (300, 2)])
def test_9_bytes_follow_the_formula(format: Any, columns: int, index_bytes: int) -> None:
    for density in (0.5, 0.1):
        weight = holed(200, columns, density)
        nonzero = int(torch.count_nonzero(weight))
        table = SparseEmbedding(weight, format)
        index = 200 * math.ceil(columns / 8) if format == "bitmap" else index_bytes * nonzero
        expected = 4 * nonzero + index + 4 * 201
        assert table_bytes(200, columns, nonzero, format) == expected == count_bytes(table)
        data = safetensors_bytes({k: v.contiguous() for k, v in table.state_dict().items()})
        assert len(data) - 8 - int.from_bytes(data[:8], "little") == expected  # what the file holds behind its header


def test_9_the_format_is_chosen_by_bytes() -> None:
    assert SparseEmbedding(holed(200, 64, 0.5)).format == "bitmap"
    assert SparseEmbedding(holed(200, 64, 0.05)).format == "csr"
    full, report = compress_embeddings(nn.Embedding(10, 8))
    assert isinstance(full, nn.Embedding)
    assert report[""].startswith("dense: the smallest")


def recommenders() -> dict[str, Callable[[], nn.Module]]:
    data = recommendation.synthetic()
    return {
        "mf": lambda: recommendation.MatrixFactorization(data.num_users, data.num_items, 16),
        "lightgcn": lambda: recommendation.LightGCN(data.train, 16, 2),
        "neumf": lambda: recommendation.NeuMF(data.num_users, data.num_items, 8),
        "multvae": lambda: recommendation.MultVAE(data.train, 32, 8),
    }


@pytest.mark.parametrize("name", ["mf", "lightgcn", "neumf", "multvae"])
def test_9_extracted_networks_score_alike(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = SparseLearning(recommenders()[name](), density=0.1).eval()
    users = torch.arange(20)
    expected = net(users)
    plain = net.extract(net.point)
    assert torch.equal(plain(users), expected)
    assert not any("pliant.sparsity" in type(m).__module__ for m in plain.modules())
    sparse = net.extract(net.point, sparse=True, min_sparsity=0.5)
    torch.testing.assert_close(sparse(users), expected, rtol=1e-5, atol=1e-6)
    assert sparse.layouts
    if name != "multvae":  # no embedding there; its linear layers are exchanged only where that is faster
        torch.save(plain.state_dict(), tmp_path / "dense.pt")
        torch.save(sparse.state_dict(), tmp_path / "sparse.pt")
        assert (tmp_path / "sparse.pt").stat().st_size < 0.8 * (tmp_path / "dense.pt").stat().st_size
        assert count_bytes(sparse) < count_bytes(plain)
        assert any(line.startswith("csr") for line in sparse.layouts.values())
    again = copy.deepcopy(sparse)
    again.load_state_dict(sparse.state_dict())
    assert torch.equal(again(users), sparse(users))


def test_9_a_table_loads_one_with_another_number_of_entries() -> None:
    a, b = SparseEmbedding(holed(9, 8, 0.2), "csr"), SparseEmbedding(holed(9, 8, 0.7, seed=3), "csr")
    assert len(a.values) != len(b.values)
    a.load_state_dict(b.state_dict())
    assert torch.equal(a.weight, b.weight)
    with pytest.raises(RuntimeError):
        a.load_state_dict(SparseEmbedding(holed(9, 8, 0.2), "bitmap").state_dict())


def test_9_bad_tables_and_indices() -> None:
    table = SparseEmbedding(holed(4, 8, 0.5))
    for index in (-1, 4):
        with pytest.raises(IndexError, match="table has"):
            table(torch.tensor([0, index]))
    with pytest.raises(ValueError, match="max_norm"):
        SparseEmbedding(nn.Embedding(4, 8, max_norm=1.0))
    with pytest.raises(ValueError, match="format"):
        SparseEmbedding(holed(4, 8, 0.5), "coo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="table"):
        SparseEmbedding(torch.zeros(4))
    assert table(torch.zeros(0, dtype=torch.long)).shape == (0, 8)
    for format in ("bitmap", "csr"):
        empty = SparseEmbedding(torch.zeros(4, 8), format)  # type: ignore[arg-type]
        assert torch.equal(empty(torch.tensor([[3, 0]])), torch.zeros(1, 2, 8))
    assert "format=" in repr(table)


def test_9_shared_tables_stay_dense() -> None:
    model = Classifier()
    model.head = nn.Linear(8, 30, bias=False)
    model.head.weight = model.table.weight
    _, report = compress_embeddings(model)
    assert "shared" in report["table"]


# -- 10: no order of rows -----------------------------------------------------------------------------------------


def test_10_permuted_rows_give_permuted_masks() -> None:
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    place = torch.argsort(order)  # row r of the first table is row place[r] of the second
    found = []
    for permuted in (False, True):
        net = SparseLearning(Classifier(), density=0.4, update_every=2, total_steps=12, params=["table.weight"])
        if permuted:
            mask, weight = masks(net)[0], weights(net)[0].clone()
            with torch.no_grad():  # the weights of the first net before its mask are gone; those kept are enough
                net.model.table.weight.copy_(weight[order])
            set_mask(net, mask[order])
        data = [(place[x] if permuted else x, y) for x, y in batches(12)]
        data = [
            (torch.cat([x, (place if permuted else torch.arange(30)).view(10, 3)]), F.pad(y, (0, 10))) for x, y in data
        ]
        run(net, 12, lambda p: torch.optim.SGD(p, 0.5), data)  # every row has a gradient in every batch: no ties
        found.append(masks(net)[0])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0][order], found[1])


# -- 12: coverage -------------------------------------------------------------------------------------------------


def test_12_coverage_never_falls_and_starts_at_the_density() -> None:
    net = SparseLearning(Classifier(), density=0.25, update_every=2, total_steps=12)
    total = sum(w.numel() for w in weights(net))
    values = [net.coverage()]
    union = masks(net)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    net.attach_optimizer(optimizer)
    for batch in batches(12):
        optimizer.zero_grad()
        net.loss(batch).backward()
        optimizer.step()
        union = [a | b for a, b in zip(union, masks(net), strict=True)]
        values.append(net.coverage())
        assert net.coverage() == sum(int(u.sum()) for u in union) / total
    assert values[0] == net.density() == sum(net.active().values()) / total
    assert values == sorted(values)
    assert values[-1] > values[0]
    assert [u.fired for u in net.history()][-1] == round(values[-1] * total)
    frozen = SparseLearning(Classifier(), density=0.25, update_every=2, explore=False)
    run(frozen)
    assert frozen.coverage() == frozen.density()


# -- the masked set and the first masks ---------------------------------------------------------------------------


def test_the_default_masked_set_has_no_bias_and_counts_shared_parameters_once() -> None:
    assert list(SparseLearning(Classifier()).active()) == ["table.weight", "hidden.weight", "head.weight"]
    model = Classifier()
    model.copy = nn.Embedding(30, 8)
    model.copy.weight = model.table.weight
    net = SparseLearning(model, density=0.5)
    assert list(net.active()) == ["table.weight", "hidden.weight", "head.weight"]
    assert list(SparseLearning(model, params=["copy.*"]).active()) == ["table.weight"]
    assert len({id(p) for p in net.parameters()}) == 5


def test_ways_to_choose() -> None:
    model = Classifier()
    chosen: list[Any] = [
        (["hidden.weight"], ["hidden.weight"]),
        (["h*"], ["hidden.weight", "hidden.bias", "head.weight", "head.bias"]),
        ([model.head], ["head.weight"]),
        ([model.table.weight], ["table.weight"]),
        (lambda n, p: p.ndim == 1, ["hidden.bias", "head.bias"]),
    ]
    for params, names in chosen:
        net = SparseLearning(
            copy.deepcopy(model) if callable(params) or isinstance(params[0], str) else model, params=params
        )
        assert list(net.active()) == names
        assert net.arguments()["params"] == names
    net = SparseLearning(Classifier(), density={"table.weight": 0.1, "*.weight": 0.5})
    assert net.active() == {"table.weight": 24, "hidden.weight": 120, "head.weight": 20}
    assert net.points() == [Point(sparsity=round(1 - 164 / 520, 9))]


def test_the_first_masks() -> None:
    net = SparseLearning(Classifier(rows=3000), density=0.3, init="bernoulli", params=["table.weight"])
    assert net.active()["table.weight"] != 7200
    assert net.density() == pytest.approx(0.3, abs=0.02)
    dense = Classifier()
    net = SparseLearning(copy.deepcopy(dense), density=0.3, init="global")
    every = torch.cat([dense.get_parameter(n).detach().abs().flatten() for n in net.active()])
    kept = torch.cat([m.flatten() for m in masks(net)])
    assert int(kept.sum()) == round(0.3 * len(every))
    assert every[kept].min() >= every[~kept].max()
    a, b = SparseLearning(Classifier(), seed=1), SparseLearning(Classifier(), seed=2)
    assert not torch.equal(masks(a)[0], masks(b)[0])
    state = torch.get_rng_state()
    assert torch.equal(masks(SparseLearning(a.model, seed=1))[0], masks(a)[0])
    assert torch.equal(state, torch.get_rng_state())  # no global generator was touched


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": float("nan")}, "density"),
        ({"density": 1e-9}, "keeps none"),
        ({"density": {}}, "density"),
        ({"density": {"nothing": 0.5}}, "matches no parameter"),
        ({"density": {"table.weight": 0.5}, "params": ["table.weight"]}, "params"),
        ({"density": {"table.weight": 0.5}, "init": "global"}, "init"),
        ({"params": ["nothing*"]}, "matches no parameter"),
        ({"params": []}, "leave nothing"),
        ({"params": [nn.Linear(2, 2)]}, "no weight of the model"),
        ({"params": ["head.weight", nn.Parameter(torch.zeros(2, 2))]}, "no weight of the model"),
        ({"seed": -1}, "seed"),
        ({"params": lambda n, p: False}, "leave nothing"),
        ({"update_every": 0}, "update_every"),
        ({"total_steps": 0}, "total_steps"),
        ({"grad_window": 101}, "grad_window"),
        ({"grad_window": 0}, "grad_window"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": 0.1, "alpha_min": 0.2}, "alpha"),
        ({"drop": "movement"}, "drop"),
        ({"grow": "momentum"}, "grow"),
        ({"regrow": "half"}, "regrow"),
        ({"init": "erk"}, "init"),
        ({"example": torch.zeros(0, 3)}, "example"),
        ({"example": torch.zeros(2, 3)}, "example"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLearning(Classifier(), **options)


def test_wrong_kinds() -> None:
    with pytest.raises(TypeError, match="model"):
        SparseLearning("model")  # type: ignore[arg-type]
    for wrong in ({"seed": 0.5}, {"grad_window": 1.5}, {"explore": 1}, {"density": True}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}: "):
            SparseLearning(Classifier(), **wrong)
    with pytest.raises(TypeError, match="params"):
        SparseLearning(Classifier(), params="table.weight")
    with pytest.raises(TypeError, match="params"):
        SparseLearning(Classifier(), params=[3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="optimizer"):
        SparseLearning(Classifier()).attach_optimizer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="point"):
        SparseLearning(Classifier()).use({"sparsity": 0.1})


def test_models_that_cannot_be_masked() -> None:
    model = Classifier()
    model.table = nn.Embedding(30, 8, sparse=True)
    with pytest.raises(ValueError, match="sparse=True"):
        SparseLearning(model)
    SparseLearning(model, params=["hidden.weight"])
    frozen = Classifier()
    frozen.table.weight.requires_grad_(False)
    assert "table.weight" not in SparseLearning(frozen).active()
    with pytest.raises(ValueError, match="frozen"):
        SparseLearning(frozen, params=["table.weight"])
    with pytest.raises(ValueError, match="leave nothing"):
        SparseLearning(nn.BatchNorm1d(4))
    model = nn.Linear(4, 4, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex64"):
        SparseLearning(model)
    broken = Classifier()
    with torch.no_grad():
        broken.table.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        SparseLearning(broken, init="global")


def test_what_an_optimiser_must_do() -> None:
    net = SparseLearning(Classifier(), update_every=2)
    with pytest.raises(ValueError, match=r"hidden\.weight"):
        net.attach_optimizer(torch.optim.SGD(net.model.table.parameters(), 0.1))
    with pytest.raises(ValueError, match="total_steps"):
        run(net, 1)
    net.schedule(0.5)
    run(net, 2)
    optimizer = run(SparseLearning(Classifier(), total_steps=5), 1)
    optimizer.step()  # its network is gone
    net = SparseLearning(Classifier(), total_steps=5)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.attach_optimizer(optimizer)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: net.loss(batches()[0]))
    with torch.no_grad():
        net.model.head.bias[0] = float("nan")
    net.update_every = 1
    net.loss(batches()[0]).backward()
    with pytest.raises(ValueError, match="NaN"):
        optimizer.step()


def test_a_loop_without_an_optimiser_attached_is_warned() -> None:
    net = SparseLearning(Classifier(), density=0.2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.warns(UserWarning, match="attach_optimizer"):
        net.loss(batches()[0]).backward()
    optimizer.step()
    assert torch.count_nonzero(net.model.table.weight) > 48
    net.eval()  # evaluation, and with it the extracted network, is sparse all the same
    assert torch.count_nonzero(net.model.table.weight) <= 48
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.loss(batches()[0])


@pytest.mark.parametrize("fused", [False, True])  # a fused optimiser unscales and skips by itself
def test_a_step_that_a_gradient_scaler_skips_does_not_count(fused: bool) -> None:
    net = SparseLearning(Classifier(), update_every=1, total_steps=4)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, fused=fused)
    net.attach_optimizer(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(net.loss(batches()[step])).backward()
        if step == 1:
            net.model.head.weight.grad.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
    assert [u.step for u in net.history()] == [1, 2]


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_does_not_change_the_window(fused: bool) -> None:
    windows = []
    for scale in (1.0, 1024.0):
        net = SparseLearning(Classifier(), update_every=4, grad_window=3, total_steps=4)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, fused=fused)
        net.attach_optimizer(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(net.loss(batches()[step])).backward()
            scaler.step(optimizer)
            scaler.update()
        windows.append([m.window.clone() for m in net.masks])  # type: ignore[operator, union-attr]
    for a, b in zip(*windows, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_are_plus_zero_in_every_precision_and_layout(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4, 5, 6, dtype=dtype).to(memory_format=torch.channels_last)
    tensor[0, 0, 0] = torch.tensor([-1.0, -0.0, math.inf, -math.inf, math.nan, 1.0])
    before, mask = tensor.clone(), torch.rand(3, 4, 5, 6) < 0.5
    mask[0, 0, 0] = False
    where = tensor.data_ptr()
    sparse_learning._clear(tensor, mask)
    assert tensor.data_ptr() == where
    assert torch.equal(tensor[mask], before[mask])
    assert (tensor[~mask] == 0).all()
    assert not torch.signbit(tensor[~mask]).any()


# -- the contract -------------------------------------------------------------------------------------------------


@pytest.fixture
def catalogued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pliant.core.persistence._catalogue", lambda: ["pliant.sparsity.sparse_learning:SparseLearning"]
    )


@pytest.mark.usefixtures("catalogued")
@pytest.mark.parametrize("options", [{"density": 0.3}, {"density": {"table.weight": 0.2}, "grad_window": 2}])
def test_save_and_load(options: dict[str, Any], tmp_path: Path) -> None:
    net = SparseLearning(Classifier(), batches()[0][0], update_every=5, total_steps=12, **options)
    run(net)
    net.eval()
    save(net, tmp_path / "saved")
    again = load(tmp_path / "saved", model=Classifier(seed=9))
    assert isinstance(again, SparseLearning)
    x = batches()[3][0]
    assert torch.equal(net(x), again(x))
    assert again.history() == net.history()
    assert again.active() == net.active()
    assert again.coverage() == net.coverage()
    assert again._steps == 12
    for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    net.train()
    again.train()
    run(net)
    run(again)
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(again), strict=True))  # they go on alike


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_fit_resumes_bit_by_bit(grow: Any, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, total: int, loss: float) -> None:
        if step == 14:
            raise Stop

    def train(folder: str, on_step: Any = None) -> SparseLearning:
        net = SparseLearning(Classifier(), density=0.3, update_every=5, grad_window=4, grow=grow)
        fit(
            net,
            batches(),
            epochs=2,
            optimizer=lambda g: torch.optim.Adam(g, 1e-2),
            checkpoint=tmp_path / folder,
            checkpoint_every=3,
            progress=False,
            on_step=on_step,
        )
        return net

    whole = train("whole")
    with pytest.raises(Stop):
        train("broken", stop)
    resumed = train("broken")
    assert [u.step for u in whole.history()] == [5, 10, 15, 20]
    assert resumed.history() == whole.history()
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_measure_and_dial() -> None:
    net = SparseLearning(Classifier(), density=0.2, update_every=4)
    fit(net, batches(), epochs=3, optimizer=lambda g: torch.optim.Adam(g, 1e-2), progress=False)
    (row,) = measure(net, batches(), repeats=0)
    assert row.point == Point(sparsity=0.8) == net.point
    assert row.static
    assert row.nonzero_flops < 0.3 * row.flops  # biases are not counted; the products are a fifth
    assert net.use(Point(sparsity=0.8)) is net
    assert "density=0.2" in repr(net)


def test_the_models_own_loss_comes_first_and_a_criterion_before_it() -> None:
    net = SparseLearning(Table(torch.ones(2, 2)), density=1.0)
    assert float(net.eval().loss(torch.full((2, 2), 3.0))) == 12.0  # type: ignore[arg-type]
    net = SparseLearning(Table(torch.ones(2, 2)), density=1.0, criterion=lambda y, t: (y - t).sum())
    assert float(net.eval().loss((torch.tensor([0]), torch.zeros(1, 2)))) == 2.0

    class Attribute(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.loss = nn.CrossEntropyLoss()  # a module of that name is no objective for a batch

    x, y = batches()[0]
    net = SparseLearning(Attribute()).eval()
    assert torch.equal(net.loss((x, y)), F.cross_entropy(net(x), y))


def test_copies_are_free_of_the_optimiser() -> None:
    net = SparseLearning(Classifier(), density=0.3, update_every=2, total_steps=12)
    optimizer = run(net, 3)
    twin = copy.deepcopy(net)
    before = masks(twin)
    net.loss(batches()[0]).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, masks(twin), strict=True))
    assert twin._steps == 3
    run(twin, 3)
    assert twin._steps == 6
    assert net._steps == 4
    second = torch.optim.SGD(net.parameters(), 0.1)
    net.attach_optimizer(second)  # the first is let go: its steps do not count any more
    optimizer.step()
    assert net._steps == 4


def test_a_wrapped_optimiser_and_evaluation_in_inference_mode() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = SparseLearning(Classifier(), density=0.3, update_every=2, total_steps=4)
    optimizer = accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(net.parameters(), 1e-2))
    net.attach_optimizer(optimizer)
    for step in range(4):
        with torch.inference_mode():
            net.eval()
            net(batches()[0][0])
        net.train()
        optimizer.zero_grad()
        net.loss(batches()[step]).backward()
        optimizer.step()
    assert [u.step for u in net.history()] == [2, 4]
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(batches()[0][0]), net(batches()[0][0]))


def test_half_precision_and_linear_layers_stored_sparsely() -> None:
    net = SparseLearning(Classifier().to(torch.bfloat16), density=0.3, update_every=2, grad_window=2, total_steps=6)
    before = net.active()
    run(net, 6, OPTIMIZERS["sgd foreach"])
    assert net.active() == before
    assert weights(net)[0].dtype is torch.bfloat16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    dense = SparseLearning(model, torch.randn(2, 64), density=0.05).eval()
    sparse = dense.extract(dense.point, sparse=True)
    x = torch.randn(8, 64)
    torch.testing.assert_close(sparse(x), dense(x))
    assert set(sparse.layouts) == {"0", "2"}  # type: ignore[arg-type]


# -- compiled, in threads, and after failures ------------------------------------------------------------------------


def test_the_network_answers_compiled_as_it_does_uncompiled() -> None:
    net = SparseLearning(Classifier(), density=0.3).eval()
    x = batches(1)[0][0]
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net.use(net.points()[0])(x))


def test_four_threads_answer_as_one() -> None:
    net = SparseLearning(Classifier(), density=0.3).eval()
    inputs = [x for x, _ in batches(4)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        alone = [net(x) for x in inputs]
        for _ in range(3):
            for a, b in zip(alone, pool.map(net, inputs), strict=True):
                assert torch.equal(a, b)


def test_an_update_that_cannot_be_made_moves_no_mask() -> None:
    net = SparseLearning(Classifier(), density=0.3, update_every=2, total_steps=10)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)  # so that the weights stay numbers
    net.attach_optimizer(optimizer)
    for step, (x, y) in enumerate(batches(2)):
        optimizer.zero_grad()
        net.loss((x, y)).backward()
        if step:  # the last tensor's gradient alone is broken
            net.model.head.weight.grad.fill_(math.nan)
            optimizer.param_groups[0]["lr"] = 0.0
            before = masks(net)
            with torch.no_grad():
                kept = net.model.head.weight.clone()
            with pytest.raises(ValueError, match="NaN"):
                optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(masks(net), before, strict=True))
            assert net.history() == []
            assert kept.shape == net.model.head.weight.shape
        else:
            optimizer.step()


def test_a_criterion_that_fails_leaves_the_network_as_it_was() -> None:
    calls: list[int] = []

    def criterion(y: Tensor, t: Tensor) -> Tensor:
        calls.append(len(t))
        if len(calls) > 1:
            raise RuntimeError("boom")
        return F.cross_entropy(y, t)

    net = SparseLearning(Classifier(), density=0.3, update_every=3, total_steps=9, grad_window=2, criterion=criterion)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.attach_optimizer(optimizer)
    net.loss(batches(1)[0]).backward()
    optimizer.step()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="boom"):
        net.loss(batches(1)[0])
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.training


def test_the_type_of_the_example_follows_the_network() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    net = SparseLearning(model, torch.randn(3, 16), density=0.1).double()
    plain = net.extract(net.points()[0], sparse=True)
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(plain(x), net(x))
