"""Recommendation from implicit feedback: MovieLens latest-small, small models, and metrics over the whole catalogue.

A rating of any height counts as an interaction. Every user's interactions are split into train, validation and test,
at random by a seed (``split="random"``) or by time (``split="leave-one-out"``: the last is test, the one before it
validation). Choices are made on validation, reports on test.

**Metrics rank all items**, none is sampled. What a user is already known to have is no candidate: the training items,
and on test the validation items too. Users without a relevant item are left out of the mean. Recall divides by the
number of relevant items (``denominator="relevant"``, as LightGCN does), or by min(k, relevant) (``"min"``, as MultVAE
does).

Models: ``MatrixFactorization`` and ``LightGCN`` (one embedding table of users and items), ``MultVAE`` and ``NeuMF``,
with the sizes of the papers as defaults. All have ``loss(batch)`` and ``scores(users)`` -> (B, items), which is their
forward too. Batches come from ``PairBatches`` and ``UserBatches``, which draw from a generator of their own.

The ratings are looked for in ``$PLIANT_DATA``, then in the user's cache (downloaded once, checked by their hash).
``synthetic`` makes data up, and says so in its title.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import check
from pliant.core.inputs import device_of, evaluating

NAMES = ("ml-latest-small",)
Split = Literal["random", "leave-one-out"]
Part = Literal["validation", "test"]
Denominator = Literal["relevant", "min"]
_WIDEST = 65_536  # of a layer
_FILE = "ml-latest-small_ratings.csv"
_ADDRESS = "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"
_SHA256 = "80da8b3393dae325bbba5a31f291a6ba55d8d4f4396de3c456f2c1635b1b70e8"  # of ratings.csv with plain line ends


# -- the data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Interactions:
    """Pairs (user, item), each once, sorted by user and then item: ``users`` and ``items`` are (E,) int64."""

    users: Tensor
    items: Tensor
    num_users: int
    num_items: int

    @classmethod
    def of(cls, users: Tensor, items: Tensor, num_users: int, num_items: int) -> Interactions:
        """The interactions in any order, repeated or not.

        Raises:
            ValueError: a user or an item is out of range, or the two differ in length.
        """
        if users.shape != items.shape or users.ndim != 1:
            raise ValueError(f"items: shape {tuple(items.shape)} against users of shape {tuple(users.shape)}")
        for name, index, size in (("users", users, num_users), ("items", items, num_items)):
            if len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
                raise ValueError(f"{name}: {int(index.min())}..{int(index.max())}; allowed: 0..{size - 1}")
        keys = torch.unique(users.long() * num_items + items.long())
        return cls(keys // num_items, keys % num_items, num_users, num_items)

    def __len__(self) -> int:
        return len(self.users)

    @cached_property
    def keys(self) -> Tensor:
        """The pairs as numbers user * num_items + item, ascending."""
        return self.users * self.num_items + self.items

    @cached_property
    def start(self) -> Tensor:
        """Where each user's interactions begin: (num_users + 1,)."""
        counts = torch.bincount(self.users, minlength=self.num_users)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def contain(self, users: Tensor, items: Tensor) -> Tensor:
        """Whether each pair is among them: booleans of the pairs' shape (``users`` and ``items`` broadcast)."""
        keys = users * self.num_items + items
        if not len(self):
            return torch.zeros_like(keys, dtype=torch.bool)
        at = torch.searchsorted(self.keys, keys).clamp(max=len(self) - 1)
        return self.keys[at] == keys

    def rows(self, users: Tensor) -> Tensor:
        """The users' interactions as ones in a float matrix (B, num_items)."""
        out = torch.zeros(len(users), self.num_items)
        count = self.start[users + 1] - self.start[users]
        row = torch.arange(len(users)).repeat_interleave(count)
        entry = torch.arange(len(row)) + (self.start[users] - count.cumsum(0) + count)[row]
        out[row, self.items[entry]] = 1.0
        return out

    def merged(self, other: Interactions) -> Interactions:
        """The union of both."""
        users, items = torch.cat([self.users, other.users]), torch.cat([self.items, other.items])
        return Interactions.of(users, items, self.num_users, self.num_items)


@dataclass(frozen=True, eq=False)
class RecommendationData:
    """One data set in three parts that share no pair."""

    name: str
    title: str
    train: Interactions
    validation: Interactions
    test: Interactions

    @property
    def num_users(self) -> int:
        """Users, numbered from 0."""
        return self.train.num_users

    @property
    def num_items(self) -> int:
        """Items, numbered from 0."""
        return self.train.num_items

    def batches(self, part: Part = "test", chunk: int = 256) -> list[tuple[Tensor, Tensor]]:
        """What the metrics read: (users (B,), target (B, items) int8), users with a relevant item only.

        The target is 1 where the item is relevant, 0 where it is another candidate, -1 where the user is known to have
        it already. The batches suit ``pliant.measure``.

        Raises:
            ValueError: nothing is relevant in that part.
        """
        relevant = self.validation if part == "validation" else self.test
        known = self.train if part == "validation" else self.train.merged(self.validation)
        users = torch.unique(relevant.users)
        if not len(users):
            raise ValueError(f"data: its {part} part is empty")
        return [(u, (relevant.rows(u) - known.rows(u)).to(torch.int8)) for u in users.split(chunk)]  # type: ignore[no-untyped-call]


def load(
    name: str = "ml-latest-small", *, split: Split = "random", min_item_count: int = 5, seed: int = 0
) -> RecommendationData:
    """One of ``NAMES``.

    Args:
        name: "ml-latest-small": 100,836 ratings, 610 users, 9,724 items.
        split: "random": of each user 20 % test and 8 % validation; "leave-one-out": by time, one of each.
        min_item_count: leave out items with fewer interactions; 1 keeps all. With the default 3,650 items and 90,274
            interactions stay.
        seed: of the random split.

    Raises:
        ValueError: an argument is not what is described here.
        FileNotFoundError: the data is nowhere to be found; the message tells the ways to get it.
    """
    if name not in NAMES:
        raise ValueError(f"task: unknown recommendation data {name!r}; allowed: {', '.join(NAMES)}")
    if isinstance(min_item_count, bool) or not isinstance(min_item_count, int) or min_item_count < 1:
        raise ValueError(f"min_item_count: {min_item_count!r}; allowed: a whole number of 1 or more")
    table = np.genfromtxt(io.BytesIO(_ratings()), delimiter=",", skip_header=1)
    _, items, counts = np.unique(table[:, 1], return_inverse=True, return_counts=True)
    table = table[counts[items] >= min_item_count]
    title = f"MovieLens latest-small, items with {min_item_count} ratings or more"
    user_names, users = np.unique(table[:, 0], return_inverse=True)
    item_names, items = np.unique(table[:, 1], return_inverse=True)
    return _split(name, title, (users, items, table[:, 3]), (len(user_names), len(item_names)), split, seed)


def synthetic(
    users: int = 60, items: int = 80, per_user: int = 16, *, split: Split = "random", seed: int = 0
) -> RecommendationData:
    """Generated data, no claim about anything: tastes of rank 4, each user has the ``per_user`` items that fit best.

    Raises:
        ValueError: a size is not positive, or ``per_user`` exceeds ``items``.
    """
    if not (users > 0 and 3 <= per_user <= items):
        raise ValueError(f"per_user: {per_user} of {items} items, {users} users; allowed: 3 <= per_user <= items")
    rng = np.random.default_rng(seed)
    fit = rng.normal(size=(users, 4)) @ rng.normal(size=(4, items)) + 0.5 * rng.normal(size=(users, items))
    chosen = np.argsort(-fit, axis=1)[:, :per_user]
    user = np.repeat(np.arange(users), per_user)
    columns = (user, chosen.ravel(), rng.random(user.size))
    return _split("synthetic", "synthetic interactions", columns, (users, items), split, seed)


def _split(
    name: str,
    title: str,
    columns: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    sizes: tuple[int, int],
    split: Split,
    seed: int,
) -> RecommendationData:
    """Users, items (numbered from 0) and times in three parts."""
    if split not in ("random", "leave-one-out"):
        raise ValueError(f"split: {split!r}; allowed: 'random', 'leave-one-out'")
    users, items, time = columns
    # Place of each interaction among its user's, from the end: 0 is the last in time, or the last of a random order.
    order = np.lexsort((np.random.default_rng(seed).random(len(users)), users))
    if split == "leave-one-out":
        order = np.lexsort((np.arange(len(users)), time, users))
    counts = np.bincount(users)
    place = np.empty(len(users), np.int64)
    place[order] = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(len(users))
    total = counts[users]
    if split == "leave-one-out":
        tests = validations = np.where(total >= 3, 1, 0)
    else:
        tests, validations = total // 5, (total - total // 5) // 10
    part = np.where(place < tests, 2, np.where(place < tests + validations, 1, 0))
    train, validation, test = (
        Interactions.of(torch.from_numpy(users[part == p]), torch.from_numpy(items[part == p]), *sizes)
        for p in range(3)
    )
    parts = f"{len(train):,} / {len(validation):,} / {len(test):,}"
    return RecommendationData(
        name, f"{title} ({sizes[0]:,} users, {sizes[1]:,} items; {parts})", train, validation, test
    )


def _ratings() -> bytes:
    folder = os.environ.get("PLIANT_DATA")
    if folder and (path := Path(folder) / "recommendation" / _FILE).exists():
        return path.read_bytes()
    ways = f"Put {_FILE} into the folder recommendation/ of $PLIANT_DATA, or let it be downloaded once from {_ADDRESS}"
    try:
        pooch = importlib.import_module("pooch")
        # The archive has no published sha256; what is checked is the file inside.
        archive = pooch.retrieve(_ADDRESS, known_hash=None, fname=Path(_ADDRESS).name, path=pooch.os_cache("pliant"))
        with zipfile.ZipFile(archive) as files:
            content = files.read("ml-latest-small/ratings.csv").replace(b"\r\n", b"\n")
    except ImportError as error:
        raise FileNotFoundError(f'MovieLens was not found. {ways}: pip install "pliant[data]"') from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(
            f"MovieLens was not found in $PLIANT_DATA, its download failed: {error}. {ways}"
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise FileNotFoundError(
            f"MovieLens: the downloaded ratings have the sha256 {found}, expected {_SHA256}. {ways}"
        )
    return content


# -- batches --------------------------------------------------------------------------------------------------------


class PairBatches:
    """Batches (users (B,), positives (B,), negatives (B,) or (B, K)) of training pairs, one pass of len(history) pairs.

    Negatives are drawn uniformly among the items that the user does not have in ``history``. Every pass goes on with
    the generator, so passes differ; ``pliant.fit`` sets it anew for each epoch, which makes a resumed run the same.

    Args:
        history: the training interactions.
        batch_size: B; the last batch is smaller.
        negatives: K for each positive; 1 gives a vector.
        by: "user": a user uniformly, then one of its items (LightGCN); "pair": the pairs in a random order (NeuMF).
        seed: of the generator.

    Raises:
        ValueError: an argument is outside what is allowed, the history is empty, or a user in it has every item.
    """

    def __init__(
        self,
        history: Interactions,
        batch_size: int = 1024,
        *,
        negatives: int = 1,
        by: Literal["user", "pair"] = "user",
        seed: int = 0,
    ) -> None:
        check.instance("history", history, Interactions)
        self.batch_size = check.whole("batch_size", batch_size, at_least=1)
        self.negatives = check.whole("negatives", negatives, at_least=1)
        self.by: Literal["user", "pair"] = check.choice("by", by, ("user", "pair"))
        if not len(history):
            raise ValueError("history: it is empty, so there is nothing to train on")
        degrees = history.start.diff()
        if int(degrees.max()) >= history.num_items:
            raise ValueError(f"history: user {int(degrees.argmax())} has every item, so it has no negatives")
        self.history = history
        self.generator = torch.Generator().manual_seed(check.seed("seed", seed))
        self._users, self._degrees = degrees.nonzero().squeeze(1), degrees

    def __len__(self) -> int:
        return -(-len(self.history) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        history, total = self.history, len(self.history)
        order = torch.randperm(total, generator=self.generator) if self.by == "pair" else None
        for begin in range(0, total, self.batch_size):
            size = min(self.batch_size, total - begin)
            if order is not None:
                pair = order[begin : begin + size]
                users = history.users[pair]
            else:
                users = self._users[torch.randint(len(self._users), (size,), generator=self.generator)]
                share = torch.rand(size, generator=self.generator, dtype=torch.float64)
                pair = history.start[users] + (share * self._degrees[users]).long()
            negatives = self._negatives(users)
            yield users, history.items[pair], negatives.squeeze(1) if self.negatives == 1 else negatives

    def _negatives(self, users: Tensor) -> Tensor:
        """(B, K) items that the users do not have: draw, and draw again where it hit."""
        drawn = torch.randint(self.history.num_items, (len(users), self.negatives), generator=self.generator)
        while (hit := self.history.contain(users[:, None], drawn)).any():
            drawn[hit] = torch.randint(self.history.num_items, (int(hit.sum()),), generator=self.generator)
        return drawn


class UserBatches:
    """Batches of users (B,) who have interactions, in a random order: what ``MultVAE`` trains on.

    Raises:
        ValueError: the batch size is not positive, or the history is empty.
    """

    def __init__(self, history: Interactions, batch_size: int = 16, *, seed: int = 0) -> None:
        check.instance("history", history, Interactions)
        self.batch_size = check.whole("batch_size", batch_size, at_least=1)
        if not len(history):
            raise ValueError("history: it is empty, so there is nothing to train on")
        self.users = torch.unique(history.users)
        self.generator = torch.Generator().manual_seed(check.seed("seed", seed))

    def __len__(self) -> int:
        return -(-len(self.users) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.users), generator=self.generator)
        yield from self.users[order].split(self.batch_size)  # type: ignore[no-untyped-call]


# -- models ---------------------------------------------------------------------------------------------------------


class MatrixFactorization(nn.Module):
    """Users and items as rows of one embedding table; a score is the product of two rows (BPR: Rendle et al., 2009).

    ``loss``, for a batch (u, i, j) of users, positives and K negatives each (K = 1 mostly)::

        mean softplus(s_uj - s_ui) + decay / 2 * (|e_u|^2 + |e_i|^2 + |e_j|^2) / B

    Args:
        num_users: rows 0..num_users - 1 of the table.
        num_items: the rows behind them.
        features: d.
        decay: of the rows of the batch, as they stand in the table.
    """

    def __init__(self, num_users: int, num_items: int, features: int = 64, *, decay: float = 1e-4) -> None:
        super().__init__()
        self.num_users = check.whole("num_users", num_users, at_least=1)
        self.num_items = check.whole("num_items", num_items, at_least=1)
        check.whole("features", features, at_least=1, at_most=_WIDEST)
        self.decay = check.number("decay", decay, at_least=0)
        self.embedding = nn.Embedding(num_users + num_items, features)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def table(self) -> Tensor:
        """The rows that scores are made of: (users + items, d)."""
        return self.embedding.weight

    def scores(self, users: Tensor) -> Tensor:
        """(B,) -> (B, items)."""
        table = self.table()
        return table[users] @ table[self.num_users :].t()

    def forward(self, users: Tensor) -> Tensor:
        """``scores``."""
        return self.scores(users)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The BPR loss of a batch of ``PairBatches``."""
        users, positives, negatives = batch[0], batch[1] + self.num_users, batch[2] + self.num_users
        negatives = negatives.view(len(users), -1)
        table, raw = self.table(), self.embedding.weight
        u, i, j = table[users], table[positives], table[negatives]
        difference = (u[:, None] * j).sum(-1) - (u * i).sum(-1, keepdim=True)
        size = raw[users].square().sum() + raw[positives].square().sum() + raw[negatives].square().sum()
        return F.softplus(difference).mean() + self.decay * 0.5 * size / len(users)


class _Propagate(torch.autograd.Function):
    """A E for a symmetric sparse A, whose backward is A again: the transpose is never built."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, operator: Tensor) -> Tensor:
        """(n, d), (n, n) -> (n, d)."""
        ctx.operator = operator
        return operator @ table

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """A^T = A."""
        return ctx.operator @ gradient, None


class LightGCN(MatrixFactorization):
    """Matrix factorisation on embeddings smoothed over the graph of interactions (He et al., SIGIR 2020).

    ``E_{l+1} = D^-1/2 A D^-1/2 E_l`` and ``E = mean of E_0..E_L``; a node without interactions keeps E_0 / (L + 1).

    Args:
        history: the training interactions, the edges of the graph.
        features: d.
        layers: L; 0 is matrix factorisation.
        decay: on the rows of E_0 in the batch.
    """

    row_start: Tensor
    neighbour: Tensor
    strength: Tensor

    def __init__(self, history: Interactions, features: int = 64, layers: int = 3, *, decay: float = 1e-4) -> None:
        check.instance("history", history, Interactions)
        super().__init__(history.num_users, history.num_items, features, decay=decay)
        self.layers = check.whole("layers", layers, at_least=0, at_most=_WIDEST)
        nodes = history.num_users + history.num_items
        ends = torch.cat([history.users, history.items + history.num_users])
        others = torch.cat([history.items + history.num_users, history.users])
        order = torch.argsort(ends * nodes + others)
        ends, others = ends[order], others[order]
        degree = torch.bincount(ends, minlength=nodes)
        self.register_buffer("row_start", torch.cat([degree.new_zeros(1), degree.cumsum(0)]), persistent=False)
        self.register_buffer("neighbour", others, persistent=False)
        self.register_buffer("strength", (degree[ends] * degree[others]).double().rsqrt().float(), persistent=False)

    def operator(self) -> Tensor:
        """D^-1/2 A D^-1/2 as a CSR tensor (n, n), in the table's precision."""
        size = (self.num_users + self.num_items,) * 2
        values = self.strength.to(self.embedding.weight.dtype)
        return torch.sparse_csr_tensor(self.row_start, self.neighbour, values, size, check_invariants=False)

    def table(self) -> Tensor:
        """E, the mean over the layers: (users + items, d)."""
        total = layer = self.embedding.weight
        operator = self.operator()
        for _ in range(self.layers):
            layer = _Propagate.apply(layer, operator)  # type: ignore[no-untyped-call]
            total = total + layer
        return total / (self.layers + 1)

    @torch.no_grad()
    def cached(self) -> MatrixFactorization:
        """The same scores without the graph, from the dense propagated table: fast, but no zeros are left in it."""
        table = self.table()
        flat = MatrixFactorization(self.num_users, self.num_items, table.shape[1], decay=self.decay)
        flat.embedding.weight = nn.Parameter(table.clone())
        return flat.eval()


class MultVAE(nn.Module):
    """Variational autoencoder with a multinomial likelihood (Liang et al., WWW 2018): a user is its row of items.

    ``loss``, for a batch of users with rows x (B, items)::

        z ~ N(mu, sigma) from tanh(W x'), x' = dropout(x / |x|);   -mean sum_i x_i log softmax_i(f(z)) + beta KL
        beta = min(0.2, step / 200,000) at step = 0, 1, ...

    Args:
        history: the interactions that a user is known by, in training and in ``scores``.
        hidden: width of encoder and decoder.
        latent: size of z.
        dropout: of the input.
        beta: where the weight of the KL term ends.
        anneal_steps: its growth by step is 1 / anneal_steps.
    """

    items: Tensor
    start: Tensor
    steps: Tensor

    def __init__(
        self,
        history: Interactions,
        hidden: int = 600,
        latent: int = 200,
        *,
        dropout: float = 0.5,
        beta: float = 0.2,
        anneal_steps: int = 200_000,
    ) -> None:
        super().__init__()
        self.history: Interactions = check.instance("history", history, Interactions)
        for name, size in (("hidden", hidden), ("latent", latent)):
            check.whole(name, size, at_least=1, at_most=_WIDEST)
        check.share("dropout", dropout)
        self.beta = check.number("beta", beta, at_least=0)
        self.anneal_steps = check.whole("anneal_steps", anneal_steps, at_least=1, at_most=10**12)
        self.encoder = nn.Linear(history.num_items, hidden)
        self.posterior = nn.Linear(hidden, 2 * latent)
        self.decoder = nn.Linear(latent, hidden)
        self.output = nn.Linear(hidden, history.num_items)
        for layer in (self.encoder, self.posterior, self.decoder, self.output):
            nn.init.xavier_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.001)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, items) -> logits (B, items), mu and log sigma^2 (B, latent); z = mu in evaluation mode."""
        hidden = torch.tanh(self.encoder(self.dropout(F.normalize(x))))
        mean, log_variance = self.posterior(hidden).chunk(2, 1)
        z = mean
        if self.training:
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.output(torch.tanh(self.decoder(z))), mean, log_variance

    def scores(self, users: Tensor) -> Tensor:
        """(B,) -> (B, items)."""
        return self.decode(self._rows(users))[0]

    def forward(self, users: Tensor) -> Tensor:
        """``scores``."""
        return self.scores(users)

    def loss(self, batch: Tensor) -> Tensor:
        """The negative evidence lower bound of a batch of ``UserBatches``; in training it counts the step."""
        x = self._rows(batch)
        logits, mean, log_variance = self.decode(x)
        beta = (self.steps / self.anneal_steps).clamp(max=self.beta).to(x.dtype)  # 0 at the first step
        if self.training:
            self.steps += 1
        likelihood = (x * F.log_softmax(logits, 1)).sum(1).mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1.0).sum(1).mean()
        return beta * divergence - likelihood

    def _rows(self, users: Tensor) -> Tensor:
        weight = self.decoder.bias  # the one parameter that no sparse form takes away
        return self.history.rows(users.cpu()).to(weight.device, weight.dtype)


class NeuMF(nn.Module):
    """A product of embeddings and a small perceptron over others, side by side (He et al., WWW 2017).

    ``loss``, for users, positives and K negatives each: mean BCE(positive, 1) + mean BCE(negative, 0), two means.

    Args:
        num_users: users.
        num_items: items.
        features: of the four tables; the perceptron is 2 features -> 32 -> 16 -> 8 -> (joined with the product) 1.
        dropout: behind each layer of the perceptron and its ReLU.
    """

    def __init__(self, num_users: int, num_items: int, features: int = 16, *, dropout: float = 0.2) -> None:
        super().__init__()
        self.num_users = check.whole("num_users", num_users, at_least=1)
        self.num_items = check.whole("num_items", num_items, at_least=1)
        check.whole("features", features, at_least=1, at_most=_WIDEST)
        check.share("dropout", dropout)
        self.gmf_user, self.gmf_item = nn.Embedding(num_users, features), nn.Embedding(num_items, features)
        self.mlp_user, self.mlp_item = nn.Embedding(num_users, features), nn.Embedding(num_items, features)
        for table in (self.gmf_user, self.gmf_item, self.mlp_user, self.mlp_item):
            nn.init.normal_(table.weight, std=0.01)
        layers: list[nn.Module] = []
        for inputs, outputs in ((2 * features, 32), (32, 16), (16, 8)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers)
        self.predict = nn.Linear(features + 8, 1)
        for module in [*self.mlp, self.predict]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def logit(self, users: Tensor, items: Tensor) -> Tensor:
        """Two index tensors of one shape (...) -> the logits (...) of their pairs."""
        product = self.gmf_user(users) * self.gmf_item(items)
        deep = self.mlp(torch.cat([self.mlp_user(users), self.mlp_item(items)], -1))
        found: Tensor = self.predict(torch.cat([product, deep], -1))
        return found.squeeze(-1)

    def scores(self, users: Tensor) -> Tensor:
        """(B,) -> (B, items); every pair runs through the perceptron."""
        items = torch.arange(self.num_items, device=users.device)
        return self.logit(users[:, None].expand(-1, len(items)), items.expand(len(users), -1))

    def forward(self, users: Tensor) -> Tensor:
        """``scores``."""
        return self.scores(users)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The loss of a batch of ``PairBatches``."""
        users, positives, negatives = batch
        negatives = negatives.view(len(users), -1)
        found = self.logit(users, positives)
        others = self.logit(users[:, None].expand_as(negatives), negatives)
        return F.softplus(-found).mean() + F.softplus(others).mean()


# -- metrics --------------------------------------------------------------------------------------------------------


def _hits(scores: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Whether each of the k best candidates is relevant (B, k), and the number of relevant items (B,)."""
    if scores.shape != target.shape or scores.ndim != 2:
        raise ValueError(
            f"target: shape {tuple(target.shape)} against scores of shape {tuple(scores.shape)} (B, items)"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k: {k!r}; allowed: 1..{scores.shape[1]}, the number of items")
    if bool(torch.isnan(scores).any()):
        raise ValueError("scores: they contain NaN")
    relevant = (target > 0).sum(1)
    if not len(target) or not bool(relevant.all()):
        raise ValueError("target: every row needs a relevant item (1), and there must be a row")
    best = scores.masked_fill(target < 0, float("-inf")).topk(k, 1).indices
    return target.gather(1, best) > 0, relevant


def recall_at_k(scores: Tensor, target: Tensor, k: int = 20, denominator: Denominator = "relevant") -> float:
    """Mean share of a user's relevant items among the k best candidates.

    Args:
        scores: (B, items).
        target: (B, items): 1 relevant, 0 another candidate, -1 no candidate.
        k: the length of the list.
        denominator: "relevant", the number of relevant items; "min", min(k, that number).
    """
    if denominator not in ("relevant", "min"):
        raise ValueError(f"denominator: {denominator!r}; allowed: 'relevant', 'min'")
    hits, relevant = _hits(scores, target, k)
    return (hits.sum(1) / (relevant.clamp(max=k) if denominator == "min" else relevant)).mean().item()


def precision_at_k(scores: Tensor, target: Tensor, k: int = 20) -> float:
    """Mean share of relevant items among the k best candidates."""
    return _hits(scores, target, k)[0].float().mean().item()


def hit_rate(scores: Tensor, target: Tensor, k: int = 20) -> float:
    """Share of users with a relevant item among their k best candidates."""
    return _hits(scores, target, k)[0].any(1).float().mean().item()


def ndcg_at_k(scores: Tensor, target: Tensor, k: int = 20) -> float:
    """Mean of sum_r hit_r / log2(r + 1) over r = 1..k, divided by the same sum for min(k, relevant) hits in front."""
    hits, relevant = _hits(scores, target, k)
    gain = 1.0 / torch.arange(2, k + 2, device=scores.device, dtype=torch.float64).log2()
    ideal = gain.cumsum(0)[relevant.clamp(max=k) - 1]
    return ((hits * gain).sum(1) / ideal).mean().item()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: RecommendationData,
    part: Part = "test",
    k: int = 20,
    *,
    chunk: int = 256,
    denominator: Denominator = "relevant",
) -> dict[str, float]:
    """Recall, NDCG, precision and hit rate at k over all candidates, ``chunk`` users at a time.

    ``model`` maps users (B,) to scores (B, items); it is left in the mode it was in. No more than ``chunk`` rows of
    scores exist at once.
    """
    device = device_of(model)
    sums = dict.fromkeys(("recall", "ndcg", "precision", "hit_rate"), 0.0)
    total = 0
    with evaluating(model):
        for users, target in data.batches(part, chunk):
            scores, target = model(users.to(device)), target.to(device)
            total += len(users)
            sums["recall"] += recall_at_k(scores, target, k, denominator) * len(users)
            sums["ndcg"] += ndcg_at_k(scores, target, k) * len(users)
            sums["precision"] += precision_at_k(scores, target, k) * len(users)
            sums["hit_rate"] += hit_rate(scores, target, k) * len(users)
    return {name: value / total for name, value in sums.items()}
