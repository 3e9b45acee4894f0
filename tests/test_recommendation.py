"""The recommendation task: data, batches, models (property 11 of DSL's specification) and metrics over all items."""

from __future__ import annotations

import csv
import hashlib
import math
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pliant.core.frontier import measure
from pliant.core.training import fit
from pliant.sparsity.sparse_learning import SparseLearning
from pliant.tasks import recommendation
from pliant.tasks.recommendation import (
    Interactions,
    LightGCN,
    MatrixFactorization,
    MultVAE,
    NeuMF,
    PairBatches,
    UserBatches,
    evaluate,
    hit_rate,
    ndcg_at_k,
    precision_at_k,
    recall_at_k,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> recommendation.RecommendationData:
    return recommendation.synthetic()


def pairs(part: Interactions) -> set[tuple[int, int]]:
    return set(zip(part.users.tolist(), part.items.tolist(), strict=True))


# -- the data -------------------------------------------------------------------------------------------------


def test_interactions() -> None:
    found = Interactions.of(torch.tensor([2, 0, 2, 2]), torch.tensor([1, 3, 0, 1]), 4, 5)
    assert pairs(found) == {(0, 3), (2, 0), (2, 1)}
    assert len(found) == 3
    assert found.start.tolist() == [0, 1, 1, 3, 3]
    assert found.contain(torch.tensor([0, 0, 2, 3]), torch.tensor([3, 2, 1, 4])).tolist() == [True, False, True, False]
    dense = torch.zeros(4, 5)
    dense[[0, 2, 2], [3, 0, 1]] = 1
    for users in ([0, 1, 2, 3], [2, 2, 0], [3], []):
        assert torch.equal(found.rows(torch.tensor(users, dtype=torch.long)), dense[users])
    empty = Interactions.of(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 4, 5)
    assert not empty.contain(torch.tensor([1]), torch.tensor([1])).any()
    assert pairs(found.merged(empty)) == pairs(found)
    with pytest.raises(ValueError, match="items"):
        Interactions.of(torch.tensor([0]), torch.tensor([5]), 4, 5)
    with pytest.raises(ValueError, match="users"):
        Interactions.of(torch.tensor([-1]), torch.tensor([0]), 4, 5)
    with pytest.raises(ValueError, match="shape"):
        Interactions.of(torch.tensor([0, 1]), torch.tensor([0]), 4, 5)


def test_the_random_split(data: recommendation.RecommendationData) -> None:
    parts = [pairs(p) for p in (data.train, data.validation, data.test)]
    assert sum(len(p) for p in parts) == len(set.union(*parts)) == 60 * 16
    for user in range(60):  # of 16: 3 test, then a tenth of the other 13
        assert [sum(u == user for u, _ in p) for p in parts] == [12, 1, 3]
    assert pairs(recommendation.synthetic(seed=0).test) == parts[2]
    assert pairs(recommendation.synthetic(seed=1).test) != parts[2]
    assert "synthetic" in data.title


def ratings(folder: Path, rows: list[tuple[int, int, float, int]]) -> None:
    target = folder / "recommendation" / "ml-latest-small_ratings.csv"
    target.parent.mkdir(parents=True)
    text = "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, r)) + "\n" for r in rows)
    target.write_text(text)


def test_leave_one_out_is_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for user in range(1, 9):
        items, times = rng.permutation(12)[: 2 + user] * 7 + 1, rng.permutation(50)[: 2 + user]
        rows += [(user, int(i), 3.5, int(t)) for i, t in zip(items, times, strict=True)]
    rng.shuffle(rows)
    ratings(tmp_path, rows)
    monkeypatch.setenv("PLIANT_DATA", str(tmp_path))
    found = recommendation.load(split="leave-one-out", min_item_count=1)
    names = sorted({r[1] for r in rows})
    for user in range(1, 9):
        ordered = [names.index(r[1]) for r in sorted((r for r in rows if r[0] == user), key=lambda r: r[3])]
        assert (user - 1, ordered[-1]) in pairs(found.test)
        assert (user - 1, ordered[-2]) in pairs(found.validation)
        assert {(user - 1, i) for i in ordered[:-2]} <= pairs(found.train)
    assert len(found.test) == len(found.validation) == 8


def test_rare_items_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratings(tmp_path, [(u, i, 4.0, u * i) for u in range(1, 7) for i in (10, 20, 30, 40 + u)])
    monkeypatch.setenv("PLIANT_DATA", str(tmp_path))
    assert recommendation.load(min_item_count=2).num_items == 3
    assert recommendation.load(min_item_count=1).num_items == 9


def test_movielens_where_it_is_at_hand() -> None:
    import os

    folder = os.environ.get("PLIANT_DATA")
    file = Path(folder or "") / "recommendation" / "ml-latest-small_ratings.csv"
    if not folder or not file.exists():
        pytest.skip("MovieLens is not in $PLIANT_DATA")
    found = recommendation.load()
    assert (found.num_users, found.num_items) == (610, 3650)
    assert len(found.train) + len(found.validation) + len(found.test) == 90274
    assert hashlib.sha256(file.read_bytes()).hexdigest() == recommendation._SHA256
    with open(file) as lines:
        rows = [(int(r["userId"]), int(r["movieId"])) for r in csv.DictReader(lines)]
    assert len(rows) == 100836


class Pooch:
    """A stand-in that hands out a file in place of a download."""

    def __init__(self, archive: Path | Exception) -> None:
        self.archive = archive

    def os_cache(self, name: str) -> str:
        return name

    def retrieve(self, *args: Any, **kwargs: Any) -> str:
        if isinstance(self.archive, Exception):
            raise self.archive
        return str(self.archive)


def test_ways_to_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLIANT_DATA", raising=False)
    content = "userId,movieId,rating,timestamp\r\n" + "".join(f"{u},{i},4.0,{i}\r\n" for u in (1, 2) for i in range(9))
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("ml-latest-small/ratings.csv", content)

    def use(what: Path | Exception) -> None:
        def import_module(name: str) -> Any:
            if isinstance(what, ImportError):
                raise what
            return Pooch(what)

        monkeypatch.setattr(recommendation.importlib, "import_module", import_module)

    use(archive)
    with pytest.raises(FileNotFoundError, match="sha256"):
        recommendation.load()
    digest = hashlib.sha256(content.replace("\r\n", "\n").encode()).hexdigest()
    monkeypatch.setattr(recommendation, "_SHA256", digest)
    assert recommendation.load(min_item_count=1).num_items == 9
    for what in (OSError("no network"), ImportError("no pooch")):
        use(what)
        with pytest.raises(FileNotFoundError, match=r"PLIANT_DATA.*downloaded once"):
            recommendation.load()
    (tmp_path / "archive.zip").write_bytes(b"no archive")
    use(archive)
    with pytest.raises(FileNotFoundError, match="failed"):
        recommendation.load()


def test_wrong_arguments_of_the_data() -> None:
    with pytest.raises(ValueError, match="task"):
        recommendation.load("netflix")
    with pytest.raises(ValueError, match="min_item_count"):
        recommendation.load(min_item_count=0)
    with pytest.raises(ValueError, match="split"):
        recommendation.synthetic(split="by hand")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_user"):
        recommendation.synthetic(per_user=100)


# -- batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["user", "pair"])
@pytest.mark.parametrize("negatives", [1, 5])
def test_pairs(data: recommendation.RecommendationData, by: Any, negatives: int) -> None:
    batches = PairBatches(data.train, 100, negatives=negatives, by=by, seed=3)
    found = list(batches)
    assert len(found) == len(batches) == math.ceil(len(data.train) / 100)
    for users, positives, others in found:
        assert others.shape == ((len(users),) if negatives == 1 else (len(users), negatives))
        assert data.train.contain(users, positives).all()
        assert not data.train.contain(users[:, None], others.view(len(users), -1)).any()
    if by == "pair":
        seen = {(u, i) for users, items, _ in found for u, i in zip(users.tolist(), items.tolist(), strict=True)}
        assert seen == pairs(data.train)
    again = list(PairBatches(data.train, 100, negatives=negatives, by=by, seed=3))
    assert all(torch.equal(a, b) for x, y in zip(found, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(found[0][1], next(iter(batches))[1])  # the next pass is another one


def test_users_are_drawn_uniformly_and_negatives_too() -> None:
    users = torch.cat([torch.zeros(28, dtype=torch.long), torch.tensor([2])])
    items = torch.cat([torch.arange(28), torch.tensor([29])])
    history = Interactions.of(users, items, 3, 30)
    found = [b for _ in range(60) for b in PairBatches(history, 29, seed=_)]
    users, negatives = torch.cat([b[0] for b in found]), torch.cat([b[2] for b in found])
    assert set(users.tolist()) == {0, 2}  # user 1 has nothing
    positives = torch.bincount(torch.cat([b[1] for b in found])[users == 0], minlength=28)
    assert positives.min() > 10  # of 31 in the mean: each of a user's items is as likely
    assert positives.max() < 60
    assert 0.45 < (users == 0).float().mean() < 0.55
    assert set(negatives[users == 0].tolist()) == {28, 29}
    counts = torch.bincount(negatives[users == 2], minlength=30)
    assert counts[:29].min() > 0
    assert counts[29] == 0


def test_bad_batches(data: recommendation.RecommendationData) -> None:
    empty = Interactions.of(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 2, 2)
    everything = Interactions.of(torch.tensor([0, 0]), torch.tensor([0, 1]), 2, 2)
    for make, message in (
        (lambda: PairBatches(data.train, 0), "batch_size"),
        (lambda: PairBatches(data.train, negatives=0), "negatives"),
        (lambda: PairBatches(data.train, by="item"), "by"),  # type: ignore[arg-type]
        (lambda: PairBatches(empty), "empty"),
        (lambda: PairBatches(everything), "every item"),
        (lambda: UserBatches(data.train, 0), "batch_size"),
        (lambda: UserBatches(empty), "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_user_batches(data: recommendation.RecommendationData) -> None:
    batches = UserBatches(data.train, 16)
    found = list(batches)
    assert len(found) == len(batches) == 4
    assert sorted(torch.cat(found).tolist()) == list(range(60))


# -- models ---------------------------------------------------------------------------------------------------


def isolated() -> Interactions:
    """Four users and five items; user 1 and item 2 have no edge."""
    return Interactions.of(torch.tensor([0, 0, 2, 3, 3]), torch.tensor([0, 1, 1, 3, 4]), 4, 5)


def test_11_without_layers_lightgcn_is_matrix_factorisation() -> None:
    history = isolated()
    graph, flat = LightGCN(history, 6, 0, decay=0.1), MatrixFactorization(4, 5, 6, decay=0.1)
    flat.load_state_dict(graph.state_dict())
    batch = (torch.tensor([0, 2, 3]), torch.tensor([1, 1, 3]), torch.tensor([[2, 3], [0, 4], [1, 0]]))
    assert torch.equal(graph(torch.arange(4)), flat(torch.arange(4)))
    losses = graph.loss(batch), flat.loss(batch)
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(graph.embedding.weight.grad, flat.embedding.weight.grad)  # other order of sums


def dense_operator(history: Interactions) -> Tensor:
    n = history.num_users + history.num_items
    adjacency = torch.zeros(n, n, dtype=torch.float64)
    for u, i in pairs(history):
        adjacency[u, history.num_users + i] = adjacency[history.num_users + i, u] = 1.0
    scale = adjacency.sum(1).clamp(min=1).rsqrt()
    return scale[:, None] * adjacency * scale


@pytest.mark.parametrize("layers", [1, 3])
def test_11_isolated_nodes_symmetry_and_the_gradient(layers: int) -> None:
    history = isolated()
    model = LightGCN(history, 6, layers).double()
    operator = model.operator().to_dense()
    assert torch.equal(operator, operator.t())
    torch.testing.assert_close(operator, dense_operator(history), atol=1e-7, rtol=0)
    table = model.table()
    for node in (1, 4 + 2):
        assert torch.equal(table[node], model.embedding.weight[node] / (layers + 1))
    weight = model.embedding.weight.detach().clone().requires_grad_()
    layer = total = weight
    for _ in range(layers):
        layer = operator @ layer
        total = total + layer
    expected = total / (layers + 1)
    torch.testing.assert_close(table, expected)
    towards = torch.randn_like(expected)
    (expected * towards).sum().backward()
    (table * towards).sum().backward()
    torch.testing.assert_close(model.embedding.weight.grad, weight.grad)


def test_the_propagated_table_scores_alike(data: recommendation.RecommendationData) -> None:
    model = LightGCN(data.train, 8, 2)
    flat = model.cached()
    assert torch.equal(flat(torch.arange(9)), model(torch.arange(9)))
    assert not isinstance(flat, LightGCN)
    flat.embedding.weight.data.zero_()
    assert model.embedding.weight.any()


def test_the_bpr_loss_by_hand() -> None:
    model = MatrixFactorization(3, 4, 5, decay=0.2).double()
    e = model.embedding.weight.detach()
    users, positives, negatives = torch.tensor([2, 0]), torch.tensor([1, 3]), torch.tensor([0, 2])
    expected = 0.0
    for u, i, j in zip(users.tolist(), positives.tolist(), negatives.tolist(), strict=True):
        difference = float(e[u] @ e[3 + j] - e[u] @ e[3 + i])
        norms = float(e[u] @ e[u] + e[3 + i] @ e[3 + i] + e[3 + j] @ e[3 + j])
        expected += (math.log1p(math.exp(difference)) + 0.2 * 0.5 * norms) / 2
    assert model.loss((users, positives, negatives)).item() == pytest.approx(expected, rel=1e-10)


def test_multvae(data: recommendation.RecommendationData) -> None:
    model = MultVAE(data.train, 16, 4, dropout=0.0, anneal_steps=10).eval()
    users = torch.tensor([4, 9])
    x = data.train.rows(users)
    logits, mean, log_variance = model.decode(x)
    assert torch.equal(model(users), logits)
    model.steps += 1
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
    likelihood = sum(float(logits[r].log_softmax(0)[x[r] > 0].sum()) for r in range(2)) / 2
    assert model.loss(users).item() == pytest.approx(-likelihood + 0.1 * float(kl), rel=1e-5)
    model.train()
    for _ in range(9):
        model.loss(users)
    assert int(model.steps) == 10  # evaluation did not count
    assert model.loss(users).isfinite()
    losses = []
    model.train().steps.zero_()  # the first step of the training has none of the KL term, the second a tenth
    for beta in (0.0, 0.1):
        torch.manual_seed(3)
        value = model.loss(users).item()
        torch.manual_seed(3)
        again, mean, log_variance = model.decode(x)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        likelihood = (x * again.log_softmax(1)).sum(1).mean()
        assert value == pytest.approx(float(beta * kl - likelihood), rel=1e-5)
    for steps in (2, 500):  # 2 / 10 is where the weight of the KL term ends
        model.eval().steps.fill_(steps)
        losses.append(model.loss(users))
    assert torch.equal(*losses)
    assert MultVAE(data.train, 8, 2).output.out_features == 80


def test_neumf_is_two_means() -> None:
    model = NeuMF(3, 4, 4).eval()
    users, positives = torch.tensor([0, 2]), torch.tensor([1, 3])
    negatives = torch.tensor([[0, 2, 3], [0, 1, 2]])
    scores = model(torch.arange(3))
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores[users, positives], model.logit(users, positives))
    bce = nn.BCEWithLogitsLoss()
    others = scores[users[:, None], negatives]
    expected = bce(scores[users, positives], torch.ones(2)) + bce(others, torch.zeros(2, 3))
    torch.testing.assert_close(model.loss((users, positives, negatives)), expected)
    torch.testing.assert_close(
        model.loss((users, positives, negatives[:, 0])), model.loss((users, positives, negatives[:, :1]))
    )


def test_the_dropout_of_neumf_stands_behind_its_layers() -> None:
    model = NeuMF(3, 4, 4, dropout=1.0).train()
    users, items = torch.tensor([0, 2]), torch.tensor([1, 3])
    product = model.gmf_user(users) * model.gmf_item(items)
    with torch.no_grad():
        for layer in model.mlp:
            if isinstance(layer, nn.Linear):
                layer.bias.fill_(1.0)  # what a dropout before the layer would let through
    expected = model.predict(torch.cat([product, torch.zeros(2, 8)], -1)).squeeze(-1)
    torch.testing.assert_close(model.logit(users, items), expected)


def test_wrong_sizes(data: recommendation.RecommendationData) -> None:
    with pytest.raises(ValueError, match="features"):
        MatrixFactorization(3, 4, 0)
    with pytest.raises(ValueError, match="layers"):
        LightGCN(data.train, 4, -1)
    with pytest.raises(ValueError, match="anneal_steps"):
        MultVAE(data.train, 4, 2, anneal_steps=0)


# -- metrics --------------------------------------------------------------------------------------------------


def by_hand(scores: list[float], target: list[int], k: int) -> dict[str, float]:
    ranked = sorted((i for i in range(len(scores)) if target[i] >= 0), key=lambda i: -scores[i])[:k]
    hits = [target[i] == 1 for i in ranked]
    relevant = sum(t == 1 for t in target)
    ideal = sum(1 / math.log2(r + 2) for r in range(min(k, relevant)))
    return {
        "recall": sum(hits) / relevant,
        "min": sum(hits) / min(k, relevant),
        "precision": sum(hits) / k,
        "hit_rate": float(any(hits)),
        "ndcg": sum(h / math.log2(r + 2) for r, h in enumerate(hits)) / ideal,
    }


@pytest.mark.parametrize("k", [1, 3, 12])
def test_metrics_against_plain_loops(k: int) -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.permutation(240).reshape(20, 12)).float()
    target = torch.from_numpy(rng.choice([-1, 0, 1], (20, 12), p=[0.3, 0.4, 0.3])).to(torch.int8)
    target[:, 0] = 1
    rows = [by_hand(s, t, k) for s, t in zip(scores.tolist(), target.tolist(), strict=True)]
    mean = {name: sum(r[name] for r in rows) / 20 for name in rows[0]}
    assert recall_at_k(scores, target, k) == pytest.approx(mean["recall"], rel=1e-6)
    assert recall_at_k(scores, target, k, "min") == pytest.approx(mean["min"], rel=1e-6)
    assert precision_at_k(scores, target, k) == pytest.approx(mean["precision"], rel=1e-6)
    assert hit_rate(scores, target, k) == pytest.approx(mean["hit_rate"], rel=1e-6)
    assert ndcg_at_k(scores, target, k) == pytest.approx(mean["ndcg"], rel=1e-6)


def test_what_is_known_is_no_candidate(data: recommendation.RecommendationData) -> None:
    for part, known in (("validation", data.train), ("test", data.train.merged(data.validation))):
        for users, target in data.batches(part, 7):  # type: ignore[arg-type]
            assert torch.equal(target < 0, known.rows(users) > 0)
            assert len(users) <= 7
            relevant = data.validation if part == "validation" else data.test
            assert torch.equal(target > 0, relevant.rows(users) > 0)


def test_evaluation_in_chunks_is_the_whole(data: recommendation.RecommendationData) -> None:
    model = MatrixFactorization(60, 80, 4).train()
    (whole,) = data.batches("test", 1000)
    for chunk in (7, 1000):
        found = evaluate(model, data, "test", 5, chunk=chunk, denominator="min")
        assert found["recall"] == pytest.approx(recall_at_k(model(whole[0]), whole[1], 5, "min"), rel=1e-6)
        assert found["ndcg"] == pytest.approx(ndcg_at_k(model(whole[0]), whole[1], 5), rel=1e-6)
    assert model.training


def test_bad_scores(data: recommendation.RecommendationData) -> None:
    scores, target = torch.rand(2, 5), torch.tensor([[1, 0, 0, 0, -1], [0, 1, 0, 0, 0]])
    for arguments, message in (
        ((scores, target, 6), "k: 6"),
        ((scores, target, 0), "k: 0"),
        ((scores, target[:1], 2), "target"),
        ((scores, torch.zeros_like(target), 2), "relevant"),
        ((scores * float("nan"), target, 2), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            ndcg_at_k(*arguments)
    with pytest.raises(ValueError, match="denominator"):
        recall_at_k(scores, target, 2, "all")  # type: ignore[arg-type]
    nothing = Interactions.of(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 60, 80)
    empty = recommendation.RecommendationData("x", "x", data.train, nothing, nothing)
    with pytest.raises(ValueError, match="empty"):
        evaluate(MatrixFactorization(60, 80, 4), empty)


# -- the whole way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lightgcn", "multvae", "neumf"])
def test_training_beats_chance_and_is_measured(name: str, data: recommendation.RecommendationData) -> None:
    torch.manual_seed(0)
    model: nn.Module
    batches: Any = PairBatches(data.train, 256)
    if name == "lightgcn":
        model = LightGCN(data.train, 16, 2)
    elif name == "multvae":
        model, batches = MultVAE(data.train, 32, 8), UserBatches(data.train, 30)
    else:
        model, batches = NeuMF(data.num_users, data.num_items, 8), PairBatches(data.train, 64, negatives=4, by="pair")
    net = SparseLearning(model, density=0.5, update_every=5)
    history = fit(
        net, batches, epochs=20, optimizer=lambda g: torch.optim.Adam(g, 1e-2), weight_decay=0.0, progress=False
    )
    assert history.losses[-1] < history.losses[0]
    assert net.history()
    (row,) = measure(net, data.batches("test"), metric=partial(recall_at_k, k=20), repeats=0)
    assert row.quality == pytest.approx(evaluate(net, data, "test", 20)["recall"], rel=1e-6)
    assert row.quality > 20 / 67 + 0.05  # 67 candidates or so, 20 of them at random
