"""Duo-LLM: a big, a small and no feed-forward network for each token and layer, and the oracle of all their mixtures.

Alizadeh, Mirzadeh, Shahrokhi, Belenko, Sun, Cho, Sekhavat, Nabi, Farajtabar: *Duo-LLM: A Framework for Studying
Adaptive Computation in Large Language Models*, 2024, arXiv 2410.10846.

The idea: every feed-forward network (FFN) of a decoder gets a sibling 16 times smaller. Training with random choices
makes every mixture work, so that all of them can be tried: an oracle finds the best path of each token, and trained
routers can be held against it. It is an instrument first, and a network with a dial second.

Rows (tokens) of width d, L layers, options r = 2 (big, inner width H), 1 (small, H / 16), 0 (skip)::

    a = x + Attn(norm1(x));   u = norm2(a)                          (B, T, d)
    y = a + FFN_big(u) | a + FFN_small(u) | a                       r = 2 | 1 | 0

    stage 1   r ~ (p0, p1, p2) for each token and layer;  loss: next-token cross entropy
    stage 2   l_t(r): loss of token t's next token under path r in {1,2}^L or {0,1,2}^L
              Oracle_k(t) = min {l_t(r): #big(r) = k};   Oracle_<=k;   Oracle_any
              diff_t = l_t(all small) - min_r l_t(r)                possible gain from more compute
    stage 3   P = softmax(tau W_l u)  (n_choices,);   y = a + sum_c P_c FFN_c(u);   tau geometric 1 -> 10
              loss = cross entropy + beta (mean_{layers, tokens} P_big - budget)^2
    use       r = argmax_c (W_l u)_c;  the rows of each option are gathered, computed and put back

The oracle by tree: a token's path does not change what comes before it, so after layer l it has C^l states, and all
paths cost C + C^2 + ... + C^L FFN evaluations (C = 2: 2^(L+1) - 2) in place of L C^L. The states of a layer stand
as extra positions behind the sequence, each of which sees the tokens before its own and itself.

**The oracle reads the label.** Most of its gap to the dense network is selection among noisy losses, not something that
a router could reach, so ``Oracle.table`` always has the controls beside it: paths chosen by least entropy, by a label
drawn from the network, the paths' averaged probabilities, and the same oracle on labels that the network drew itself
(nothing to gain in expectation, yet the curve has the same shape).

Where the specification is silent or wrong:

* "Changing token t's path leaves logits before t bit-identical" holds with ``execution="masked"``. Compaction changes
  how many rows a product has, and with it the last bits of other rows.
* The cost of the tree counts FFN evaluations; attention is computed once for each state, (C^L - 1) / (C - 1) in all.
* ``bypass_scope="layer"`` fills K/V (attention sees every token), but the attention of skipped tokens is computed and
  dropped: it saves the FFN only. It has no all-skip setting (nothing but the embedding would be left).
* ``fit`` runs stage 1 and then stage 3 (``router_share`` of the steps); routers of several budgets take turns, batch by
  batch. The language model is frozen in stage 3 unless ``joint``.
* After argmax the share of big differs from mean P_big: ``calibrate`` moves one threshold for each budget. The shift is
  added to the logit of big in every layer alike, so the budget stays global.
* The baseline "fixed" is the best of the C(L, k) static patterns on data (``choose_patterns``), in the context in which
  all tokens take that pattern. ``finish`` does both on a few training batches; call them with validation data yourself.
* "Best of 100 random trials": a trial draws one path with k big layers for each token; the trial with the lowest mean.
* New small siblings: N(0, 0.02), the output matrix N(0, 0.02 / sqrt(2 L)), biases 0; routers N(0, 0.02).
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations, islice, product
from threading import get_ident
from typing import Any, Literal, NamedTuple, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import check
from pliant.core.cost import count_flops
from pliant.core.dynamic import Dynamic, NotStaticError, Point, Value
from pliant.core.gates import entropy
from pliant.core.inputs import (
    IGNORED,
    Batch,
    Input,
    call,
    check_example,
    device_of,
    evaluating,
    first_line,
    first_tensor,
    logits,
    next_token_loss,
    packed,
    removing,
    split_batch,
    to_device,
)

SKIP, SMALL, BIG = 0, 1, 2
OPTIONS = ("skip", "small", "big")
Execution = Literal["compact", "masked"]
Scope = Literal["ffn", "layer"]
Decision = Literal["argmax", "sample"]
Context = Literal["all_big", "own", "shared"]
Method = Literal["tree", "brute"]
Match = str | Sequence[str] | Callable[[str, nn.Module], bool]
_STD = 0.02
_TIE = 1e-6  # losses closer than this are equal; the path of fewest big layers, then the first, wins
_LEAVES = 1 << 24  # floats of states, and of logits, at once
_PIECE = 1024  # states in one attention call, those of all sequences in it together
_SEQUENCES = 8  # in one attention call
_NAMES = ("mlp", "feed_forward", "ffn", "ff")
_PARTS = ("fc1", "activation_fn", "fc2")  # of OPT, whose blocks hold them without a module around
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class Learned(NamedTuple):
    """Routing by the router of budget number ``budget``: softly at temperature ``tau``, or hard where it is None."""

    budget: int
    tau: float | None = None


class Probe(NamedTuple):
    """Routing of the oracle: the FFN notes its input and gives zero."""


Route = int | Tensor | Learned | Probe


@dataclass
class Seen:
    """What one layer saw in one call: ``u`` (N, d), ``choice`` (N,), ``score`` and ``probability`` (N, n_choices)."""

    u: Tensor | None = None
    choice: Tensor | None = None
    score: Tensor | None = None
    probability: Tensor | None = None


class DuoFFN(nn.Module):
    """One layer's FFNs and routers: ``u`` (..., d) -> what the block adds to its residual (..., d).

    Args:
        big: the model's own FFN.
        small: its sibling.
        features: d.
        choices: what a router chooses from, ascending, such as (1, 2).
        budgets: number of routers.
        execution: "compact" gathers the rows of each option; "masked" computes both siblings for all and selects.
        decision: of a router: "argmax", or "sample" from its probabilities at temperature ``tau``.
        tau: for sampling.
    """

    shift: Tensor

    def __init__(
        self,
        big: nn.Module,
        small: nn.Module,
        features: int,
        choices: tuple[int, ...],
        budgets: int,
        execution: Execution = "compact",
        decision: Decision = "argmax",
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        self.big, self.small = big, small
        self.features, self.choices = features, choices
        self.execution, self.decision, self.tau = execution, decision, tau
        like = next(big.parameters())
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.routers = nn.ParameterList([torch.empty(len(choices), features, **options) for _ in range(budgets)])
        self.register_buffer("shift", torch.zeros(budgets, **options))
        for w in self.routers:
            nn.init.normal_(w, std=_STD)
        self.route: Route = BIG
        # Of calls under way, by thread: a route in the place of ``route``, what the caller wants to know, and the last
        # choice (N,) for the hook of whole-layer bypass.
        self.routes: dict[int, Route] = {}
        self.watchers: dict[int, Seen] = {}
        self.taken: dict[int, Tensor] = {}

    @contextmanager
    def during(self, route: Route | None = None, seen: Seen | None = None) -> Iterator[None]:
        """Another route, and someone who watches, for the calls of this thread inside the block."""
        me = get_ident()
        before = self.routes.get(me), self.watchers.get(me)
        try:
            _hold(self.routes, me, before[0] if route is None else route)
            _hold(self.watchers, me, before[1] if seen is None else seen)
            yield
        finally:
            _hold(self.routes, me, before[0])
            _hold(self.watchers, me, before[1])

    @property
    def seen(self) -> Seen | None:
        """What this thread's caller wants to know about the present call."""
        return self.watchers.get(get_ident()) if self.watchers else None

    def option(self, r: int, u: Tensor) -> Tensor:
        """What option ``r`` adds for ``u`` (..., d)."""
        if r == SKIP:
            return torch.zeros_like(u)
        return cast(Tensor, (self.big if r == BIG else self.small)(u))

    def score(self, u: Tensor, budget: int) -> Tensor:
        """W u with the threshold of big: (N, d) -> (N, n_choices)."""
        s = F.linear(u, self.routers[budget])
        return torch.cat((s[:, :-1], s[:, -1:] + self.shift[budget]), 1)

    def decide(self, score: Tensor) -> Tensor:
        """Options (N,) from scores (N, n_choices); among equals the smaller."""
        table = torch.tensor(self.choices, device=score.device)
        if self.decision == "sample":
            return table[torch.multinomial((self.tau * score).float().softmax(-1), 1).squeeze(1)]
        best = ~(score < score.amax(-1, keepdim=True))  # where the scores are NaN: the smallest
        return table[torch.where(best, torch.arange(len(table), device=score.device), len(table)).amin(-1)]

    def forward(self, u: Tensor) -> Tensor:
        """See the class."""
        if isinstance(self.route, int) and self.route != SKIP and not self.routes and not self.watchers:
            return self.option(self.route, u)
        return self._routed(u)

    def _routed(self, u: Tensor) -> Tensor:
        me, rows = get_ident(), u.reshape(-1, u.shape[-1])
        route, seen = self.routes.get(me, self.route), self.watchers.get(me)
        if seen is not None:
            seen.u = rows.detach()
        if isinstance(route, Probe):
            return torch.zeros_like(u)
        if isinstance(route, int):  # all rows alike: the plain module on the plain tensor, bit for bit
            if seen is not None or SKIP in self.choices:
                self._note(torch.full((len(rows),), route, device=u.device))
            return self.option(route, u)
        if isinstance(route, Learned):
            score = self.score(rows, route.budget)
            if seen is not None:
                seen.score = score.detach()
            if route.tau is not None:
                return self.soft(u, (route.tau * score).softmax(-1).view(*u.shape[:-1], -1))
            choice = self.decide(score)
        else:
            choice = route.reshape(-1)
            if len(choice) != len(rows):
                raise ValueError(f"choices: {len(choice)} for each layer, but its FFN was given {len(rows)} rows")
        self._note(choice)
        return self.hard(rows, choice).view_as(u)

    def soft(self, u: Tensor, probability: Tensor) -> Tensor:
        """sum_c P_c FFN_c(u) with P (..., n_choices) in the order of ``choices``."""
        if (seen := self.seen) is not None:
            seen.probability = probability.reshape(-1, probability.shape[-1])
        parts = [
            p[..., None] * self.option(r, u) for r, p in zip(self.choices, probability.unbind(-1), strict=True) if r
        ]
        return torch.stack(parts).sum(0)

    def hard(self, rows: Tensor, choice: Tensor) -> Tensor:
        """Each row (N, d) through its own option (N,)."""
        if self.execution == "masked":
            y = torch.where((choice == BIG)[:, None], self.option(BIG, rows), self.option(SMALL, rows))
            return torch.where((choice == SKIP)[:, None], torch.zeros_like(y), y)
        y = torch.zeros_like(rows)
        for r in (SMALL, BIG):
            mine = (choice == r).nonzero().squeeze(1)
            if len(mine) == len(rows):
                return self.option(r, rows)
            if len(mine):
                y = y.index_copy(0, mine, self.option(r, rows[mine]).to(y.dtype))
        return y

    def _note(self, choice: Tensor) -> None:
        if SKIP in self.choices:
            self.taken[get_ident()] = choice
        if (seen := self.seen) is not None:
            seen.choice = choice

    def whole_layer(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of a block: tokens that skip leave it as they came (``bypass_scope="layer"``)."""
        if not self.taken or (taken := self.taken.pop(get_ident(), None)) is None:
            return output
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        kept = torch.where((taken == SKIP).view(*x.shape[:-1], 1), x, y)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    def extra_repr(self) -> str:
        """The sizes."""
        names = ", ".join(OPTIONS[r] for r in self.choices)
        return f"{self.features}, choices=({names}), routers={len(self.routers)}, execution={self.execution!r}"


def _hold(values: dict[int, Any], key: int, value: Any) -> None:
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value


class Trace(NamedTuple):
    """Choices (L, B, T) of one forward pass, and its logits (B, T, V)."""

    choices: Tensor
    logits: Tensor

    def share(self, option: int = BIG) -> Tensor:
        """Share of the tokens that took ``option`` in each layer: (L,)."""
        return (self.choices == option).double().mean((1, 2))

    def entropy(self) -> Tensor:
        """Entropy of each layer's choices over the tokens, in nats: (L,). Zero: the router does not look at them."""
        shares = torch.stack([self.share(r) for r in (SKIP, SMALL, BIG)])
        return entropy(shares.T) + 0.0  # no minus before a zero


# -- the network ----------------------------------------------------------------------------------------------------


class DuoLLM(Dynamic):
    """A decoder whose FFNs have a small sibling, with random, fixed and learned routing, and the oracle.

    The model is converted in place: its FFNs (``model.layers.3.mlp``) become ``DuoFFN``; ``extract`` gives plain
    networks again. ``model.generate`` follows the dial.

    Args:
        model: a causal language model: ids (B, T) (or a mapping) -> logits (B, T, V).
        example: an input that it accepts, token ids (B, T) first.
        ffn: which modules are FFNs: a pattern such as ``"model.layers.*.mlp"``, several, or a function of name and
            module. Where a block holds the parts themselves, join them: ``"*.fc1+activation_fn+fc2"``. By default found
            by name in the repeated blocks.
        small_ratio: inner width of the small sibling as a share of the big one's, in (0, 1].
        small: a function from the big FFN to its sibling, where that cannot be built from linear layers.
        bypass: whether skip is an option of routers and of ``points``.
        bypass_scope: "ffn": a skipped token keeps its attention; "layer": it leaves the block as it came (K/V filled).
        p: probabilities of skip, small and big in training.
        budgets: shares of big in (0, 1); each has a random, a fixed and a router setting.
        router_share: share of the training, its last part, in which the routers learn. 1: routers only.
        joint: the language model goes on learning while the routers do.
        beta: weight of the budget loss.
        tau: temperature at the beginning and the end of the routers' training.
        router_lr: factor of the learning rate for routers.
        execution: "compact" or "masked"; the answers are the same to rounding.
        decision: of routers at inference, "argmax" or "sample".
        max_patterns: static patterns tried for each budget; more are sampled.
        seed: of the random setting in evaluation mode, whose choices depend on the shape of the input only.

    Raises:
        ValueError: no FFN is found, or one does not map (..., d) to (..., d), or an argument is outside its range.
    """

    patterns: Tensor
    turn: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        ffn: Match | None = None,
        small_ratio: float = 1 / 16,
        small: Callable[[nn.Module], nn.Module] | None = None,
        bypass: bool = False,
        bypass_scope: Scope = "ffn",
        p: Sequence[float] = (0.0, 0.5, 0.5),
        budgets: Sequence[float] = (0.25, 0.5, 0.75),
        router_share: float = 0.3,
        joint: bool = False,
        beta: float = 5.0,
        tau: Sequence[float] = (1.0, 10.0),
        router_lr: float = 1.0,
        execution: Execution = "compact",
        decision: Decision = "argmax",
        max_patterns: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check.module("model", model)
        self.ffn = _match(ffn)
        self.small_ratio = check.number("small_ratio", small_ratio, above=0, at_most=1)
        self.small = check.optional(check.function, "small", small)
        self.bypass = check.boolean("bypass", bypass)
        self.bypass_scope: Scope = check.choice("bypass_scope", bypass_scope, Scope)
        self.p = check.sequence("p", p, check.share, length=3)
        if abs(sum(self.p) - 1) > 1e-6:
            raise check.wrong("p", p, "three probabilities (skip, small, big) that sum to 1")
        if self.p[0] > 0 and not bypass:
            raise check.wrong("p", p, "0 for skip, or bypass=True")
        self.budgets = check.sequence("budgets", budgets, _inside, empty=True)
        check.distinct("budgets", self.budgets)
        self.router_share = check.share("router_share", router_share)
        self.joint = check.boolean("joint", joint)
        self.beta = check.number("beta", beta, at_least=0)
        self.tau = check.sequence("tau", tau, check.positive, length=2)
        self.router_lr = check.number("router_lr", router_lr, at_least=0)
        self.execution: Execution = check.choice("execution", execution, Execution)
        self.decision: Decision = check.choice("decision", decision, Decision)
        self.max_patterns = check.whole("max_patterns", max_patterns, at_least=1)
        self.seed = check.seed("seed", seed)
        if any(isinstance(m, DuoFFN) for m in model.modules()):
            raise ValueError("model: it is converted already; build it anew, or extract a plain network")
        prediction = check_example(model, example)
        ids = first_tensor(example)
        if prediction.ndim != 3 or prediction.shape[:2] != ids.shape[:2]:
            raise ValueError(
                f"model: its prediction has shape {tuple(prediction.shape)} for an input of {tuple(ids.shape)}; "
                "allowed: logits (B, T, V) for ids (B, T)"
            )
        if bypass and self.p[0] == 0:
            warnings.warn(
                "bypass: skip is an option, but p gives it no probability in training; skipping is then far from what "
                "the network has learned. p=(0.2, 0.4, 0.4) trains with it",
                stacklevel=2,
            )
        self.example = example
        self.choices = (SKIP, SMALL, BIG) if bypass else (SMALL, BIG)
        self.stage: Literal["random", "routers"] = "random"
        self.temperature = self.tau[0]
        self.frozen = False
        self.model = model
        self._convert()
        count = len(self.names)
        like = ids.device
        spread = torch.full((len(self.budgets), count), SMALL, device=like)
        for row, budget in zip(spread, self.budgets, strict=True):
            k = self.big_layers(budget)
            row[[min(count - 1, int((i + 0.5) * count / k)) for i in range(k)]] = BIG
        self.register_buffer("patterns", spread)
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))
        self.use(self.points()[-1])

    def _convert(self) -> None:
        """Find the FFNs, build the siblings, and put ``DuoFFN`` in their places, all of them or none."""
        found = _ffns(self.model, self.ffn)
        names = [name for name, _ in found]
        wrapped = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for (name, parts), d in zip(found, _widths(self.model, self.example, found), strict=True):
                big = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
                if self.small is not None:
                    sibling = _told("small", self.small, big)
                    if not isinstance(sibling, nn.Module):
                        raise TypeError(f"small: gave {type(sibling).__name__} for {name}; an nn.Module is needed")
                else:
                    sibling = small_ffn(big, self.small_ratio, len(found))
                like = next(big.parameters())
                sibling.to(device=like.device, dtype=like.dtype)
                rows = torch.randn(3, d).to(like)
                _check_rows(big, rows, f"ffn: {name}")
                _check_rows(sibling, rows, f"small: the sibling of {name}")
                duo = DuoFFN(
                    big, sibling, d, self.choices, len(self.budgets), self.execution, self.decision, self.tau[1]
                )
                wrapped.append(duo.train(big.training))
        self.names: list[str] = []
        for name, duo in zip(names, wrapped, strict=True):
            first, *rest = _places(name)
            self.model.set_submodule(first, duo)
            for place in rest:
                self.model.set_submodule(place, nn.Identity())
            self.names.append(first)
        self.parts = {name: _places(full) for name, full in zip(self.names, names, strict=True)}
        self.block_names = [_block_of(self.model, name) for name in self.names]
        if self.bypass and self.bypass_scope == "layer":
            for layer, block in zip(self.layers, self.blocks, strict=True):
                block.register_forward_hook(layer.whole_layer, with_kwargs=True)
        routers = {id(w) for layer in self.layers for w in layer.routers}
        self._trainable = [n for n, q in self.model.named_parameters() if q.requires_grad and id(q) not in routers]

    @property
    def layers(self) -> list[DuoFFN]:
        """The L converted FFNs, from the first to the last."""
        return [cast(DuoFFN, self.model.get_submodule(name)) for name in self.names]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks around them."""
        return [self.model.get_submodule(name) for name in self.block_names]

    def big_layers(self, budget: float) -> int:
        """How many layers are big in the static pattern of ``budget``: the nearest number, 1 to L - 1 where L > 1."""
        count = len(self.names)
        return max(1, min(count - 1, round(budget * count)))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"layers={len(self.names)}, choices={[OPTIONS[r] for r in self.choices]}, budgets={self.budgets}"

    # -- the dial -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """All skip (with bypass of FFNs), all small; for each budget random, fixed and router; all big."""
        found = [Point(policy="skip")] if self.bypass and self.bypass_scope == "ffn" else []
        found.append(Point(policy="small"))
        for budget in sorted(self.budgets):
            found += [Point(policy=name, budget=budget) for name in ("random", "fixed", "router")]
        return [*found, Point(policy="big")]

    def use(self, point: Mapping[str, Value]) -> Self:
        """Turn the dial; see ``Dynamic.use``."""
        super().use(point)
        for layer, route in zip(self.layers, self._routes(self.point), strict=True):
            layer.route = route
        return self

    def _routes(self, point: Point) -> list[Route]:
        """What each layer does at ``point``; all big where ``forward`` gives the choices itself."""
        policy = str(point["policy"])
        if policy in OPTIONS:
            return [OPTIONS.index(policy)] * len(self.names)
        index = self.budgets.index(float(point["budget"])) if policy != "random" else 0
        if policy == "fixed":
            return list(self.patterns[index].tolist())
        return [Learned(index) if policy == "router" else BIG] * len(self.names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output at the present setting; the rows of each option are computed together."""
        x = packed(args, kwargs)
        return call(self.model, x) if self.point["policy"] in ("small", "big", "fixed") else self._apart(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # which rows take what depends on them: there is no graph
    def _apart(self, x: Input) -> Any:
        """The model's output where every row takes an option of its own, or none."""
        if self.point["policy"] != "random":
            return call(self.model, x)
        budget = float(self.point["budget"])
        ids = first_tensor(x)
        rng = torch.Generator().manual_seed(self.seed) if not self.training else None
        return self.run(x, self.draw(ids.shape[0], ids.shape[1], (0.0, 1 - budget, budget), rng))

    def run(self, x: Input, choices: Tensor | Sequence[int]) -> Any:
        """The model's output with given choices: one for each layer (L,), or for each layer and token (L, B, T).

        Raises:
            ValueError: the shape differs, or a choice is not 0 (skip), 1 (small) or 2 (big), or skip without bypass.
        """
        given = choices if isinstance(choices, Tensor) else torch.tensor(choices)
        wanted = (len(self.names), *first_tensor(x).shape[:2])
        if given.shape not in ((wanted[0],), wanted) or given.is_floating_point():
            raise ValueError(
                f"choices: shape {tuple(given.shape)}, {given.dtype}; allowed: ({wanted[0]},) or {wanted}, integers"
            )
        known = range(SKIP, BIG + 1) if self.bypass else (SMALL, BIG)
        if strange := sorted(set(torch.unique(given).tolist()) - set(known)):
            raise ValueError(f"choices: {strange[0]} is not allowed; {', '.join(f'{r} ({OPTIONS[r]})' for r in known)}")
        routes: list[Route] = given.tolist() if given.ndim == 1 else list(given.to(first_tensor(x).device))
        with self._routed(routes):
            return call(self.model, x)

    def trace(self, x: Input) -> Trace:
        """Choices and logits of one pass at the present setting."""
        seen = [Seen() for _ in self.names]
        with torch.no_grad(), self._watched(seen):
            y = logits(self(**x) if isinstance(x, Mapping) else self(x))
        shape = first_tensor(x).shape[:2]
        return Trace(torch.stack([cast(Tensor, s.choice).view(shape) for s in seen]), y)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` at the present setting.

        Raises:
            ValueError: at a random setting, which is a control for whole sequences.
        """
        if self.point["policy"] == "random":
            raise ValueError("generate: the random setting is a control for whole sequences; choose another policy")
        return cast(Any, self.model).generate(*args, **kwargs)

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The plain network of "big", "small", "skip" and "fixed", in which each layer has the FFN that it uses."""
        point = self._known(point)
        if point["policy"] in ("random", "router"):
            raise NotStaticError(point, "every token takes its own path")
        plain = copy.deepcopy(self.model)
        for name, block, r in zip(self.names, self.block_names, self._routes(point), strict=True):
            hooks = plain.get_submodule(block)._forward_hooks
            for key in [k for k, h in hooks.items() if isinstance(getattr(h, "__self__", None), DuoFFN)]:
                del hooks[key]
                plain.get_submodule(block)._forward_hooks_with_kwargs.pop(key, None)
            places = self.parts[name]
            duo = cast(DuoFFN, plain.get_submodule(name))
            if r == SKIP:  # zeros for any input, without a product
                plain.set_submodule(places[0], nn.Threshold(math.inf, 0.0))
            elif len(places) == 1:
                plain.set_submodule(name, duo.big if r == BIG else duo.small)
            else:
                chain = duo.big if r == BIG else duo.small
                steps = list(chain) if isinstance(chain, nn.Sequential) else [chain]
                for place, step in zip(places, [*steps, nn.Identity(), nn.Identity()], strict=False):
                    plain.set_submodule(place, step)
        return plain.requires_grad_(True).eval()

    @contextmanager
    def _routed(self, routes: Sequence[Route]) -> Iterator[None]:
        """Other routes, in this thread, for the length of the block."""
        with ExitStack() as stack:
            for layer, route in zip(self.layers, routes, strict=True):
                stack.enter_context(layer.during(route))
            yield

    @contextmanager
    def _watched(self, seen: Sequence[Seen]) -> Iterator[None]:
        """Layers note what they see, in this thread, for the length of the block."""
        with ExitStack() as stack:
            for layer, record in zip(self.layers, seen, strict=True):
                stack.enter_context(layer.during(seen=record))
            yield

    def option_flops(self) -> list[tuple[int, int, int]]:
        """FLOPs of (skip, small, big) for one token in each layer, counted as executed; the router is not in it."""
        return [_option_flops(layer) for layer in self.layers]

    # -- training -----------------------------------------------------------------------------------------------------

    def draw(
        self, batch: int, length: int, p: Sequence[float] | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Independent choices (L, B, T) with probabilities ``p`` of skip, small, big (those of training by default)."""
        p0, p1, _ = self.p if p is None else p
        u = torch.rand(len(self.names), batch, length, generator=generator)
        return ((u >= p0).long() + (u >= p0 + p1).long()).to(device_of(self))

    def loss(self, batch: Batch | Tensor) -> Tensor:
        """Next-token cross entropy: of random paths, and in the routers' stage of the soft mixture + the budget loss.

        A tensor of token ids (B, T), or a mapping with "labels" (in step with the inputs, -100 ignored, as in
        transformers), or a pair (input, target) in which the target (B, T) stands where it is predicted. In evaluation
        mode: the cross entropy at the present setting.
        """
        x, target = aligned(batch)
        if not self.training:
            return next_token_loss(logits(call(self, x)), target)
        ids = first_tensor(x)
        if self.stage == "random" or not self.budgets:
            return next_token_loss(logits(self.run(x, self.draw(*ids.shape[:2]))), target)
        index = int(self.turn) % len(self.budgets)
        seen = [Seen() for _ in self.names]
        routes: list[Route] = [Learned(index, self.temperature)] * len(self.names)
        with self._routed(routes), self._watched(seen):
            lm = next_token_loss(logits(call(self.model, x)), target)
        self.turn += 1
        share = torch.stack([cast(Tensor, s.probability)[:, -1] for s in seen])  # (L, B T)
        return lm + self.beta * budget_loss(share, self.budgets[index])

    def schedule(self, progress: float) -> None:
        """Begin the routers' stage at its share of the training, and raise their temperature."""
        start = 1 - self.router_share
        routers = self.router_share > 0 and progress >= start
        if routers:
            done = min(1.0, (progress - start) / self.router_share)
            self.temperature = self.tau[0] * (self.tau[1] / self.tau[0]) ** done
        stage: Literal["random", "routers"] = "routers" if routers else "random"
        if stage != self.stage:
            self.stage = stage
            for w in (w for layer in self.layers for w in layer.routers):
                w.grad = None
        if (frozen := routers and not self.joint) != self.frozen:
            self._freeze(frozen)

    def _freeze(self, frozen: bool) -> None:
        """Hold the language model still, or let it learn again; what the user froze stays so."""
        self.frozen = frozen
        own = dict(self.model.named_parameters())
        for name in self._trainable:
            own[name].requires_grad_(not frozen)
            if frozen:
                own[name].grad = None  # a gradient that is zero and not None would move it still, by momentum

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The language model, and the routers without decay at ``router_lr`` times the learning rate."""
        routers = [w for layer in self.layers for w in layer.routers]
        theirs = {id(w) for w in routers}
        rest = [q for q in self.parameters() if q.requires_grad and id(q) not in theirs]
        groups = [
            {"params": rest, "weight_decay": weight_decay},
            {"params": routers, "weight_decay": 0.0, "lr_scale": self.router_lr},
        ]
        return [g for g in groups if g["params"]]

    def finish(self, train: Iterable[Batch]) -> None:
        """Choose the static patterns and set the routers' thresholds, on four training batches."""
        self._freeze(False)
        data = list(islice(iter(train), 4))
        if self.budgets and data:
            self.choose_patterns(data)
            self.calibrate(data)

    @torch.no_grad()
    def choose_patterns(self, data: Iterable[Batch | Tensor]) -> list[float]:
        """For each budget the static pattern of the lowest loss on ``data``; returns those losses.

        All C(L, k) patterns of k big layers are tried, or ``max_patterns`` drawn from them. In several processes the
        data of all of them count.
        """
        batches = _some(data)
        rng = torch.Generator().manual_seed(self.seed)
        best = []
        with evaluating(self):
            for budget in self.budgets:
                losses = [(self._loss_of(batches, p), p) for p in self._patterns(self.big_layers(budget), rng)]
                if not all(math.isfinite(value) for value, _ in losses):
                    raise ValueError("data: the loss on it is NaN or infinite")
                best.append(min(losses, key=lambda item: item[0]))
        if best:
            self.patterns.copy_(torch.tensor([pattern for _, pattern in best]))
        self.use(self.point)
        return [least for least, _ in best]

    def _patterns(self, k: int, rng: torch.Generator) -> list[list[int]]:
        """Patterns (L,) of k big and else small layers."""
        count = len(self.names)
        if math.comb(count, k) <= self.max_patterns:
            sets: Iterable[Iterable[int]] = combinations(range(count), k)
        else:
            sets = [torch.randperm(count, generator=rng)[:k].tolist() for _ in range(self.max_patterns)]
        return [[BIG if i in set(chosen) else SMALL for i in range(count)] for chosen in map(set, sets)]

    def _loss_of(self, batches: Sequence[Batch | Tensor], choices: Sequence[int]) -> float:
        """Mean loss for each token of one static pattern."""
        total, count = 0.0, 0.0
        for batch in batches:
            x, target = aligned(to_device(batch, device_of(self)))
            tokens = int((target != IGNORED).sum())
            total += next_token_loss(logits(self.run(x, choices)), target).item() * tokens
            count += tokens
        if _shared():
            both = torch.tensor([total, count], dtype=torch.float64, device=device_of(self))
            dist.all_reduce(both)
            total, count = both.tolist()
        return total / count

    @torch.no_grad()
    def calibrate(self, data: Iterable[Batch | Tensor], rounds: int = 5) -> list[float]:
        """Move each router's threshold until the realised share of big on ``data`` is its budget; returns the shares.

        A deeper layer sees what the layers before decided, so it takes a few ``rounds`` of: margins of big over the
        others in all layers, threshold at their quantile. In several processes the data of all of them count.
        """
        check.whole("rounds", rounds, at_least=1)
        batches = _some(data)
        shares = []
        with evaluating(self), self._shifts_kept():
            for i, budget in enumerate(self.budgets):
                closest = (math.inf, torch.zeros(()), 0.0)
                for turn in range(rounds + 1):
                    margins, share = self._margins(batches, i)
                    shift = self.layers[0].shift[i].clone()
                    closest = min(closest, (abs(share - budget), shift, share), key=lambda item: item[0])
                    if turn < rounds:
                        self._shift(i, shift - _quantile(margins, 1 - budget))
                self._shift(i, closest[1])
                shares.append(closest[2])
        return shares

    @contextmanager
    def _shifts_kept(self) -> Iterator[None]:
        """The thresholds are as before where the block ends in an exception."""
        before = [layer.shift.clone() for layer in self.layers]
        try:
            yield
        except BaseException:
            for layer, shift in zip(self.layers, before, strict=True):
                layer.shift.copy_(shift)
            raise

    def _shift(self, index: int, value: Tensor) -> None:
        for layer in self.layers:
            layer.shift[index] = value.to(layer.shift)

    def _margins(self, batches: Sequence[Batch | Tensor], index: int) -> tuple[Tensor, float]:
        """Scores of big less the best other, over all layers and tokens, and the share of big."""
        found, taken = [], []
        for batch in batches:
            seen = [Seen() for _ in self.names]
            routes: list[Route] = [Learned(index)] * len(self.names)
            with self._routed(routes), self._watched(seen):
                call(self.model, aligned(to_device(batch, device_of(self)))[0])
            score = torch.cat([cast(Tensor, s.score) for s in seen])
            found.append(score[:, -1] - score[:, :-1].amax(1))
            taken.append(torch.cat([cast(Tensor, s.choice) for s in seen]) == BIG)
        margins = _everywhere(torch.cat(found))
        if not bool(torch.isfinite(margins).all()):
            raise ValueError("data: the routers' scores on it are NaN or infinite")
        return margins, _everywhere(torch.cat(taken).double()).mean().item()

    # -- the oracle ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def oracle(
        self,
        ids: Tensor,
        positions: slice | Sequence[int] | None = None,
        *,
        choices: Sequence[str] | None = None,
        context: Context = "all_big",
        budget: int | None = None,
        samples: int = 0,
        attention_mask: Tensor | None = None,
        method: Method = "tree",
        max_paths: int = 65_536,
        seed: int = 0,
    ) -> Oracle:
        """The loss of the next token under every path, for every target position of sequences ``ids`` (B, T).

        Args:
            ids: token ids (B, T).
            positions: targets, 0 .. T - 2 (the last has no next token); all of them by default.
            choices: options of a layer, of "skip", "small", "big"; small and big by default.
            context: what the tokens before the target took. "all_big": the big path. "own": left to right, from the
                first target on, each the best path that was found for it. "shared": the whole sequence takes the path.
            budget: in ``context="own"`` the number of big layers of the paths that later tokens see; any by default.
            samples: labels drawn for each target from the all-big network, for the controls of ``Oracle.table``.
            attention_mask: (B, T), 1 where a token is; needed where a sequence begins with padding.
            method: "tree" (blocks as transformers has them), or "brute": a full pass for each path and target, which
                works with every model.
            max_paths: error where there are more; the default allows 16 layers of two choices and 10 of three.
            seed: of the drawn labels.

        Raises:
            ValueError: an argument is not what is described, there are too many paths, or the tree does not give
                the output of the model (use ``method="brute"``).
        """
        check.choice("context", context, Context)
        check.choice("method", method, Method)
        names = ("small", "big") if choices is None else tuple(choices)
        if len(set(names)) < len(names) or not {"big"} < set(names) <= set(OPTIONS):
            raise ValueError(f"choices: {names}; allowed: 'big' and at least one of 'skip', 'small', each once")
        options = tuple(sorted(OPTIONS.index(name) for name in names))
        if SKIP in options and not self.bypass:
            raise ValueError("choices: 'skip' needs a network with bypass=True")
        count = len(self.names)
        if len(options) ** count > max_paths:
            raise ValueError(
                f"max_paths: {len(options)}^{count} = {len(options) ** count} paths are more than {max_paths}; "
                "raise max_paths if you mean it"
            )
        if budget is not None and not 0 <= budget <= count:
            raise ValueError(f"budget: {budget} big layers; allowed: 0 to {count}")
        if samples < 0:
            raise ValueError(f"samples: {samples}; allowed: 0 or more")
        if ids.ndim != 2 or ids.is_floating_point() or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError(f"ids: shape {tuple(ids.shape)}, {ids.dtype}; allowed: token ids (B, T) with T >= 2")
        at = _positions(positions, ids.shape[1])
        padding = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        if attention_mask is None and isinstance(padding, int) and bool((ids[:, 0] == padding).any()):
            raise ValueError("attention_mask: a sequence begins with the padding token; give the mask")
        if attention_mask is not None and attention_mask.shape != ids.shape:
            raise ValueError(f"attention_mask: shape {tuple(attention_mask.shape)}; allowed: {tuple(ids.shape)}")
        search = _Search(self, ids.to(device_of(self)), attention_mask, options, samples, seed)
        with evaluating(self):
            return search.run(at, context, budget, method)


def _option_flops(layer: DuoFFN) -> tuple[int, int, int]:
    like = next(layer.big.parameters())
    u = torch.zeros(1, layer.features, device=like.device, dtype=like.dtype)
    with evaluating(layer):
        skip, small, big = (
            count_flops(lambda r=r: layer.option(r, u), nonzero=False).total  # type: ignore[misc]
            for r in (SKIP, SMALL, BIG)
        )
    return skip, small, big


# -- batches and losses ---------------------------------------------------------------------------------------------


def aligned(batch: Batch | Tensor) -> tuple[Any, Tensor]:
    """Input, and targets (B, T) that stand where they are predicted, -100 where there is none; see ``DuoLLM.loss``.

    Raises:
        ValueError: no target is left, or its shape is another.
    """
    if isinstance(batch, Tensor | Mapping):
        x, labels = (batch, batch) if isinstance(batch, Tensor) else split_batch(batch)
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    else:
        x, target = split_batch(batch)
    if not isinstance(target, Tensor) or target.shape != first_tensor(x).shape[:2]:
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"batch: targets of shape {got} for ids {tuple(first_tensor(x).shape)}; allowed: one per token"
        )
    if not bool((target != IGNORED).any()):
        raise ValueError(f"batch: no token of {tuple(target.shape)} has a target to predict")
    return x, target


def budget_loss(share: Tensor, budget: float) -> Tensor:
    """(mean P_big - budget)^2 over all layers and tokens: one global budget, wherever it is spent."""
    return (share.mean() - budget).square()


def _quantile(values: Tensor, q: float) -> Tensor:
    """The value below which a share ``q`` lies, half way to the next (torch.quantile has a limit on the size)."""
    order = values.sort().values
    at = min(max(round(q * len(order)), 1), len(order) - 1)
    return (order[at - 1] + order[at]) / 2


def _some(data: Iterable[Batch | Tensor]) -> list[Batch | Tensor]:
    batches: list[Batch | Tensor] = [data] if isinstance(data, Tensor) else list(data)
    if not batches:
        raise ValueError("data: it has no batches")
    return batches


def _shared() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _everywhere(values: Tensor) -> Tensor:
    """The values (n,) of all processes, one process after the other."""
    if not _shared():
        return values
    sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    longest = max(int(n) for n in sizes)
    parts = [values.new_zeros(longest) for _ in sizes]
    dist.all_gather(parts, F.pad(values, (0, longest - len(values))))
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])


def _match(ffn: Any) -> Match | None:
    """The argument ``ffn``: a pattern, several, a function, or None."""
    if ffn is None or callable(ffn):
        return ffn  # type: ignore[no-any-return]
    return check.text("ffn", ffn) if isinstance(ffn, str) else check.names("ffn", ffn, empty=False)


def _told(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """What a function of the caller's says, its errors under the argument's name."""
    try:
        return function(*args)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name}: the function fails when it is called: {first_line(error)}") from error


def _inside(name: str, value: Any) -> float:
    return check.number(name, value, above=0, below=1)


# -- conversion -----------------------------------------------------------------------------------------------------


def small_ffn(big: nn.Module, ratio: float, layers: int) -> nn.Module:
    """A fresh sibling of ``big`` with inner width max(1, round(ratio H)): the same module, its linear layers narrower.

    The last linear layer (of ``nn.Linear``, or the transposed ``Conv1D`` of GPT-2) maps H to d, all others d to H, or
    to a multiple of H where gate and up are one matrix.

    Raises:
        ValueError: the layers are not of that kind.
    """
    found = [(name, m) for name, m in big.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    sizes = {n: _sizes(m) for n, m in found}
    advice = "pass small=, a function from the big FFN to its sibling"
    if len(found) < 2:
        raise ValueError(f"ffn: {type(big).__name__} has {len(found)} linear layers, two or more are needed; {advice}")
    last = found[-1][0]
    inner, d = sizes[last]
    if any(i != d or o % inner for n, (i, o) in sizes.items() if n != last):
        raise ValueError(f"ffn: the linear layers of {type(big).__name__} have sizes {list(sizes.values())}; {advice}")
    h = max(1, round(ratio * inner))
    small = copy.deepcopy(big)
    for name, m in found:
        i, o = (h, d) if name == last else (d, sizes[name][1] // inner * h)
        bias = m.bias is not None
        fresh: Any = nn.Linear(i, o, bias) if isinstance(m, nn.Linear) else type(m)(o, i)
        nn.init.normal_(fresh.weight, std=_STD / math.sqrt(2 * layers) if name == last else _STD)
        if bias:
            nn.init.zeros_(fresh.bias)
        small.set_submodule(name, fresh)
    return small.requires_grad_(True)


def _sizes(m: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; the weight of Conv1D is (in, out)."""
    rows, columns = cast(Tensor, m.weight).shape
    return (columns, rows) if isinstance(m, nn.Linear) else (rows, columns)


def _places(name: str) -> tuple[str, ...]:
    """Module names in a name joined by '+': "a.b.fc1+act+fc2" is a.b.fc1, a.b.act, a.b.fc2."""
    first, *rest = name.split("+")
    prefix = first.rpartition(".")[0]
    return (first, *(f"{prefix}.{part}" if prefix else part for part in rest))


def _ffns(model: nn.Module, match: Match | None) -> list[tuple[str, list[nn.Module]]]:
    """Names and modules of the FFNs (the parts of a joined name), in the order of registration."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[str] = []
    if match is None:
        for name, m in modules.items():
            parent = modules.get(name.rpartition(".")[0])
            if not isinstance(parent, nn.ModuleList | nn.Sequential):
                continue
            if own := next((n for n in _NAMES if n in dict(m.named_children())), None):
                found.append(f"{name}.{own}")
            elif all(hasattr(m, part) for part in _PARTS):
                found.append(f"{name}.{'+'.join(_PARTS)}")
    elif callable(match):
        found = [name for name, m in modules.items() if name and _told("ffn", match, name, m)]
    else:
        for pattern in [match] if isinstance(match, str) else match:
            first, *rest = pattern.split("+")
            found += ["+".join([name, *rest]) for name in modules if name and fnmatchcase(name, first)]
    order = list(modules)
    found = sorted(dict.fromkeys(found), key=lambda name: order.index(name.split("+")[0]))
    if not found:
        known = ", ".join(n for n in order if n and n.count(".") < 4)
        what = "no block has one called " + ", ".join(_NAMES) if match is None else f"nothing matches {match!r}"
        raise ValueError(f"ffn: {what}; the model has: {known[:600]}")
    result = []
    for name in found:
        if missing := [place for place in _places(name) if place not in modules]:
            raise ValueError(f"ffn: the model has no module {missing[0]!r}")
        result.append((name, [modules[place] for place in _places(name)]))
    if len({id(parts[0]) for _, parts in result}) < len(result):
        raise ValueError("ffn: two of the modules are one and the same; shared FFNs cannot be routed apart")
    return result


def _widths(model: nn.Module, example: Input, found: Sequence[tuple[str, list[nn.Module]]]) -> list[int]:
    """Width of each FFN, seen in one pass; each must run once and keep the shape of (rows of) the input."""
    shapes: dict[str, list[tuple[Any, Any]]] = {name: [] for name, _ in found}

    def first(name: str) -> Callable[..., None]:
        return lambda m, args, kwargs: shapes[name].append(((args or tuple(kwargs.values()))[0].shape, None))

    def last(name: str) -> Callable[..., None]:
        def hook(m: nn.Module, args: Any, output: Any) -> None:
            shapes[name][-1] = (shapes[name][-1][0], output.shape if isinstance(output, Tensor) else type(output))

        return hook

    handles = []
    for name, parts in found:
        if not [p for part in parts for p in part.parameters()]:
            raise ValueError(f"ffn: {name} has no parameters")
        handles.append(parts[0].register_forward_pre_hook(first(name), with_kwargs=True))
        handles.append(parts[-1].register_forward_hook(last(name)))
    with removing(handles), evaluating(model), torch.no_grad():
        call(model, example)
    rows = math.prod(first_tensor(example).shape[:2])
    for name, seen in shapes.items():
        if len(seen) != 1 or seen[0][0] != seen[0][1] or math.prod(seen[0][0][:-1]) != rows:
            ran = f"maps {tuple(seen[0][0])} to {seen[0][1]}" if len(seen) == 1 else f"runs {len(seen)} times"
            raise ValueError(
                f"ffn: {name} {ran}; an FFN runs once and maps the rows (..., d) to (..., d), one for each token"
            )
    return [int(seen[0][0][-1]) for seen in shapes.values()]


@torch.no_grad()
def _check_rows(module: nn.Module, rows: Tensor, what: str) -> None:
    """Raise ValueError unless ``module`` maps each row (N, d) to one of the same width, whatever the others are."""
    with evaluating(module):
        try:
            y, alone = module(rows), module(rows[:1])
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"{what} does not accept single rows (N, {rows.shape[1]}): {error}") from error
    if not isinstance(y, Tensor) or y.shape != rows.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{what} maps {tuple(rows.shape)} to {got}; it must keep the shape")
    if not torch.allclose(y[:1], alone, rtol=0.05, atol=0.05 * float(y.abs().max())):
        raise ValueError(f"{what} mixes tokens, so tokens cannot be routed apart")


def _block_of(model: nn.Module, name: str) -> str:
    """The nearest ancestor that is an element of a list of modules; the parent where there is none."""
    at = name
    while parent := at.rpartition(".")[0]:
        if isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential) and at != name:
            return at
        at = parent
    return name.rpartition(".")[0]


def _positions(positions: slice | Sequence[int] | None, length: int) -> list[int]:
    """Target positions in ascending order."""
    if positions is None or isinstance(positions, slice):
        found = list(range(length - 1))[positions or slice(None)]
    else:
        found = [int(t) for t in positions]
        if strange := [t for t in found if not 0 <= t < length - 1]:
            raise ValueError(f"positions: {strange[0]} has no next token; allowed: 0 to {length - 2}")
    if not found or len(set(found)) < len(found):
        raise ValueError(f"positions: {positions} names no position or one twice; allowed: some of 0 to {length - 2}")
    return sorted(found)


# -- the oracle -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """Losses of n targets under P = C^L paths, and what the controls need. Losses are in nats.

    Attributes:
        loss: l_t(r) (n, P).
        paths: options (P, L), in lexicographic order.
        where: sequence and position of each target (n, 2).
        dense: loss of the all-big network (n,): its own plain pass.
        entropy: of each path's prediction (n, P).
        expected: of each path's loss where the label is drawn from the all-big prediction (n, P).
        sampled: losses for ``samples`` labels drawn so (n, P, S).
        evaluations: FFN evaluations for each target, skips counted.
        context: what the other tokens took.
        chosen: the path that later tokens saw in ``context="own"`` (n,).
    """

    loss: Tensor
    paths: Tensor
    where: Tensor
    dense: Tensor
    entropy: Tensor
    expected: Tensor
    sampled: Tensor
    evaluations: int
    context: Context
    chosen: Tensor | None = None

    @property
    def big(self) -> Tensor:
        """Number of big layers of each path (P,)."""
        return (self.paths == BIG).sum(1)

    def best(self, k: int | None = None, at_most: bool = False) -> tuple[Tensor, Tensor]:
        """Oracle_k, Oracle_<=k, or Oracle_any (k=None): the least loss (n,) and its path's number (n,).

        Paths within 1e-6 of the least are equal; the one of fewest big layers, then the first, is named.

        Raises:
            ValueError: ``k`` is not in 0..L.
        """
        columns = self._columns(k, at_most)
        return self.loss[:, columns].amin(1), columns[_first_least(self.loss[:, columns])]

    def difficulty(self, k: int | None = None) -> Tensor:
        """What more compute can gain: loss of the all-small path less the oracle's (n,), 0 or more.

        With ``k``: what it can gain with k big layers at most. Where "small" is no choice the all-skip path counts.
        """
        small = (self.paths == SMALL).all(1)
        return self.loss[:, int(small.int().argmax())] - self.best(k, at_most=True)[0]

    def histogram(self, k: int | None = None) -> Tensor:
        """Share of the targets whose best path (of k big layers) is big in each layer: (L,)."""
        return (self.paths[self.best(k)[1]] == BIG).double().mean(0)

    def fixed(self, k: int) -> int:
        """Number of the path of k big layers with the lowest mean loss: the best fixed one on these targets."""
        columns = self._columns(k)
        return int(columns[_first_least(self.loss[:, columns].double().mean(0, keepdim=True))[0]])

    def table(self, chosen_on: Oracle | None = None, trials: int = 100, seed: int = 0) -> list[dict[str, float]]:
        """Mean losses for each number k of big layers: the oracle, its baselines, and its controls.

        Args:
            chosen_on: where the best fixed path is chosen, such as a validation search; here itself by default, which
                favours it a little.
            trials: of random paths for each target.
            seed: of the trials.

        Columns: ``oracle``, ``oracle_at_most``; baselines ``mean_path``, ``best_fixed``, ``best_random``;
        ``all_big``; controls that do not read the true label: ``least_entropy``, ``drawn_label`` (the path that is
        best for a label drawn from the network, judged by the true one; NaN without samples), ``ensemble`` (the
        paths' probabilities averaged); and the null control, labels drawn from the network as truth: ``null_all_big``,
        ``null_fixed`` (the lowest expected loss of a path: no routing gains here), ``null_oracle``.
        """
        rng = torch.Generator().manual_seed(seed)
        rows = []
        everyone = torch.arange(len(self.loss), device=self.loss.device)
        for k in range(self.paths.shape[1] + 1):
            columns = self._columns(k)
            loss = self.loss[:, columns].double()
            sampled = self.sampled[:, columns].double()
            draws = torch.randint(len(columns), (trials, len(loss)), generator=rng).to(loss.device)
            row: dict[str, Any] = {
                "big": k,
                "oracle": loss.amin(1).mean(),
                "oracle_at_most": self.best(k, at_most=True)[0].double().mean(),
                "mean_path": loss.mean(),
                "best_fixed": self.loss[:, (chosen_on or self).fixed(k)].double().mean(),
                "best_random": loss[everyone, draws].mean(1).min(),
                "all_big": self.dense.double().mean(),
                "least_entropy": loss[everyone, _first_least(self.entropy[:, columns])].mean(),
                "drawn_label": loss.gather(1, sampled.argmin(1)).mean(),
                "ensemble": (math.log(len(columns)) - (-loss).logsumexp(1)).mean(),
                "null_all_big": self.sampled[:, -1].double().mean(),
                "null_fixed": self.expected[:, columns].double().mean(0).min(),
                "null_oracle": sampled.amin(1).mean(),
            }
            rows.append({name: float(value) for name, value in row.items()})
        return rows

    def _columns(self, k: int | None, at_most: bool = False) -> Tensor:
        """Numbers of the paths allowed, those of fewest big layers first, else in lexicographic order."""
        if k is not None and not 0 <= k <= self.paths.shape[1]:
            raise ValueError(f"k: {k} big layers; allowed: 0 to {self.paths.shape[1]}")
        big = self.big
        order = big.argsort(stable=True)
        if k is None:
            return order
        return order[(big[order] <= k) if at_most else (big[order] == k)]


def _first_least(values: Tensor) -> Tensor:
    """The first column within the tolerance of the least: (n, m) -> (n,)."""
    good = values <= values.amin(1, keepdim=True) + _TIE
    places = torch.arange(values.shape[1], device=values.device)
    return torch.where(good, places, len(places)).amin(1)


class _Base(NamedTuple):
    """One all-big pass: hidden states (B, T, d) before each block, its other arguments, and the logits."""

    hidden: list[Tensor]
    calls: list[dict[str, Any]]
    logits: Tensor


class _Search:
    """One search: the all-big pass, the tree (or brute force), and the tally."""

    def __init__(
        self, net: DuoLLM, ids: Tensor, mask: Tensor | None, options: tuple[int, ...], samples: int, seed: int
    ) -> None:
        self.net, self.ids, self.mask, self.options, self.samples = net, ids, mask, options, samples
        self.count = len(net.names)
        self.paths = torch.tensor(list(product(options, repeat=self.count)), device=ids.device)
        self.rng = torch.Generator().manual_seed(seed)
        self.parts: list[tuple[Tensor, ...]] = []
        self.tuples: list[bool] = []  # whether a block returns a tuple

    def run(self, at: Sequence[int], context: Context, budget: int | None, method: Method) -> Oracle:
        base, rows = self._all_big(), len(self.ids)
        words = base.logits.shape[-1]
        c, count, total = len(self.options), self.count, len(self.paths)
        evaluations = (c ** (count + 1) - c) // (c - 1) if method == "tree" and context != "shared" else count * total
        given = torch.full((count, *self.ids.shape), BIG, device=self.ids.device)
        times = torch.tensor(at, device=self.ids.device)
        every = torch.arange(rows, device=self.ids.device)
        where: list[Tensor] = []
        chosen: list[Tensor] = []
        if context == "shared":
            where.append(torch.cartesian_prod(every, times))
            self._tally(where[0], self._shared(where[0]), base)
        elif context == "own":
            big = (self.paths == BIG).sum(1)
            order = big.argsort(stable=True)
            order = order if budget is None else order[big[order] == budget]
            for t in times.split(1):  # type: ignore[no-untyped-call]  # later tokens see what this one took
                where.append(torch.cartesian_prod(every, t))
                levels = self._tree(base, every, t) if method == "tree" else None
                leaves = self._brute(where[-1], given) if levels is None else self._leaves(levels[-1], words)
                loss = self._tally(where[-1], leaves, base)
                path = order[_first_least(loss[:, order])]  # (B,)
                given[:, :, t] = self.paths[path].T[..., None]
                chosen.append(path)
                for depth in range(0 if levels is None else count):
                    state = path // c ** (count - depth)  # the first `depth` choices of the path
                    base.hidden[depth][:, t[0]] = cast(list[Tensor], levels)[depth][every, 0, state]
        else:
            room = max(1, _LEAVES // (total * base.hidden[0].shape[-1]))  # targets whose states are held at once
            for part in every.split(min(_SEQUENCES, max(1, room // len(at)))):  # type: ignore[no-untyped-call]
                for t in times.split(room):  # type: ignore[no-untyped-call]
                    where.append(torch.cartesian_prod(part, t))
                    brute = method == "brute"
                    leaves = (
                        self._brute(where[-1], given) if brute else self._leaves(self._tree(base, part, t)[-1], words)
                    )
                    self._tally(where[-1], leaves, base)
        stacked = [torch.cat(items) for items in zip(*self.parts, strict=True)]
        loss, uncertainty, expected, sampled, dense = stacked
        if method == "tree" and context != "shared":
            first = loss[:, -1] if context == "all_big" else loss[:rows, -1]  # later targets of "own" see other tokens
            limit = 0.1 if base.logits.element_size() < 4 else 1e-3
            if not torch.allclose(first, dense[: len(first)], rtol=limit, atol=limit):
                raise ValueError(
                    "method: the tree does not give the model's own output (its largest difference in loss on the "
                    f"all-big path is {(first - dense[: len(first)]).abs().max().item():.3g}); the blocks do more than "
                    'add attention and FFN, or ignore the mask. Use method="brute"'
                )
        return Oracle(
            loss,
            self.paths,
            torch.cat(where),
            dense,
            uncertainty,
            expected,
            sampled,
            evaluations,
            context,
            torch.cat(chosen) if chosen else None,
        )

    def _input(self, ids: Tensor, rows: Tensor | None = None) -> Input:
        """The model's input for sequences ``ids``, with the mask of ``rows`` where there is one."""
        if self.mask is None:
            return ids
        mask = self.mask if rows is None else self.mask[rows]
        return {"input_ids": ids, "attention_mask": mask.to(ids.device)}

    def _all_big(self) -> _Base:
        """Run the all-big path and keep what each block was given."""
        hidden: list[Tensor] = []
        calls: list[dict[str, Any]] = []
        self.tuples.clear()

        def before(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = list(inspect.signature(m.forward).parameters)
            named = dict(zip(names, args, strict=False)) | kwargs
            hidden.append(named.pop(names[0]).clone())
            calls.append(named)

        def after(m: nn.Module, args: Any, output: Any) -> None:
            self.tuples.append(isinstance(output, tuple))

        handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in self.net.blocks]
        handles += [b.register_forward_hook(after) for b in self.net.blocks]
        with removing(handles):
            output = logits(self.net.run(self._input(self.ids), [BIG] * self.count))
        if not bool(torch.isfinite(output).all()):
            raise ValueError("ids: the model's output on them contains NaN or infinity")
        return _Base(hidden, calls, output)

    def _tally(self, targets: Tensor, leaves: Iterator[Tensor], base: _Base) -> Tensor:
        """Add the logits (G, m, V) of targets (G, 2), some paths after others, to the result; their losses (G, P)."""
        b, t = targets.unbind(1)
        dense = _log_probability(base.logits[b, t])  # (G, V)
        q, label = dense.exp(), self.ids[b, t + 1]
        drawn = torch.zeros(len(q), self.samples, dtype=torch.int64, device=q.device)
        if self.samples:
            drawn = torch.multinomial(q.cpu(), self.samples, replacement=True, generator=self.rng).to(q.device)
        pieces = []
        for output in leaves:
            logp = _log_probability(output)
            width = logp.shape[1]
            pieces.append(
                (
                    -logp.gather(2, label[:, None, None].expand(-1, width, 1)).squeeze(2),
                    entropy(logp.exp()),
                    -torch.einsum("gv,gpv->gp", q, logp),
                    -logp.gather(2, drawn[:, None].expand(-1, width, -1)),
                )
            )
        joined = [torch.cat(items, 1) for items in zip(*pieces, strict=True)]
        self.parts.append((*joined, -dense.gather(1, label[:, None]).squeeze(1)))
        return joined[0]

    def _shared(self, targets: Tensor) -> Iterator[Tensor]:
        """Logits (G, 1, V) of one path after the other, which the whole sequence takes."""
        b, t = targets.unbind(1)
        for path in self.paths.tolist():
            yield logits(self.net.run(self._input(self.ids), path))[b, t][:, None]

    def _brute(self, targets: Tensor, given: Tensor) -> Iterator[Tensor]:
        """Logits (G, 1, V) of one path after the other: a full pass with the ``given`` choices but for the target's."""
        b, t = targets.unbind(1)
        each = torch.arange(len(b), device=b.device)
        for path in self.paths:
            choices = given[:, b].clone()
            choices[:, each, t] = path[:, None]
            yield logits(self.net.run(self._input(self.ids[b], b), choices))[each, t][:, None]

    def _tree(self, base: _Base, rows: Tensor, at: Tensor) -> list[Tensor]:
        """States (R, G, C^depth, d) of targets ``at`` (G,) in sequences ``rows`` (R,), at each depth from 0 to L."""
        levels = [base.hidden[0][rows][:, at, None]]
        whole = self.net.bypass_scope == "layer"
        for depth, layer in enumerate(self.net.layers):
            states = levels[-1]
            a, u = self._attend(base, depth, rows, at, states)
            options = [states if r == SKIP and whole else a + layer.option(r, u) for r in self.options]
            levels.append(torch.stack(options, 3).flatten(2, 3))
        return levels

    def _attend(self, base: _Base, depth: int, rows: Tensor, at: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Give a and u of states (R, G, S, d): extra positions behind the sequences, which see the tokens before."""
        count, length = len(rows), self.ids.shape[1]
        block, layer = self.net.blocks[depth], self.net.layers[depth]
        flat, times = states.flatten(1, 2), at.repeat_interleave(states.shape[2])
        found_a, found_u = [], []
        size = max(128, _PIECE // count)
        for part, t in zip(flat.split(size, 1), times.split(size), strict=True):  # type: ignore[no-untyped-call]
            x = torch.cat((base.hidden[depth][rows], part), 1)
            place = torch.cat((torch.arange(length, device=t.device), t))
            columns = torch.arange(length + len(t), device=t.device)
            own = columns[None] == columns[:, None]  # a state sees itself and not its siblings
            before = (columns[None] < place[:, None]) & (columns < length)
            if self.mask is not None:
                before = before & F.pad(self.mask[rows].to(t.device) > 0, (0, len(t)))[:, None]  # (R, T + M, T + M)
            allowed = (before | own).view(-1, 1, len(columns), len(columns))
            mask = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device)
            mask = mask.masked_fill(~allowed, torch.finfo(x.dtype).min).expand(count, -1, -1, -1)
            seen = Seen()
            with layer.during(Probe(), seen):
                output = block(x, **self._moved(base.calls[depth], rows, place, mask))
            found_a.append((output[0] if isinstance(output, tuple) else output)[:, length:])
            found_u.append(cast(Tensor, seen.u).view(x.shape)[:, length:])
        return torch.cat(found_a, 1).view_as(states), torch.cat(found_u, 1).view_as(states)

    def _moved(self, kwargs: Mapping[str, Any], rows: Tensor, place: Tensor, mask: Tensor) -> dict[str, Any]:
        """A block's keyword arguments for the positions ``place`` of sequences ``rows``, without a cache."""
        if "attention_mask" not in kwargs:
            raise ValueError('method: the blocks take no attention_mask; use method="brute"')

        def there(value: Tensor) -> Tensor:
            own = value[rows] if len(value) == len(self.ids) else value
            return own[:, place]  # (1 or R, T, ...) -> (1 or R, T + M, ...)

        moved = {k: None if k in _CACHES else v for k, v in kwargs.items()} | {"attention_mask": mask}
        if "use_cache" in moved:
            moved["use_cache"] = False
        if isinstance(pair := kwargs.get("position_embeddings"), tuple):
            moved["position_embeddings"] = tuple(there(v) for v in pair)
        if isinstance(kwargs.get("position_ids"), Tensor):
            moved["position_ids"] = there(kwargs["position_ids"])
        if isinstance(kwargs.get("cache_position"), Tensor):
            moved["cache_position"] = kwargs["cache_position"][place]
        return moved

    def _leaves(self, states: Tensor, words: int) -> Iterator[Tensor]:
        """Logits (R G, m, V) of final states (R, G, P, d), some paths after others."""
        flat = states.flatten(0, 1)
        for piece in flat.split(max(1, _LEAVES // (len(flat) * words)), 1):  # type: ignore[no-untyped-call]
            yield self._head(piece)

    def _head(self, states: Tensor) -> Tensor:
        """Logits (N, m, V) of final states (N, m, d): the model, with blocks that hand these states through."""
        flat, length = states.flatten(0, 1), self.ids.shape[1]
        rows = -(-len(flat) // length)
        padded = F.pad(flat, (0, 0, 0, rows * length - len(flat))).view(rows, length, -1)
        with ExitStack() as stack:
            for block, as_tuple in zip(self.net.blocks, self.tuples, strict=True):
                result = (padded,) if as_tuple else padded
                former = block.__dict__.get("forward")
                block.__dict__["forward"] = lambda *args, result=result, **kwargs: result
                stack.callback(_put_back, block, former)
            output = logits(call(self.net.model, self.ids[:1].expand(rows, -1)))
        return output.flatten(0, 1)[: len(flat)].view(*states.shape[:2], -1)


def _log_probability(output: Tensor) -> Tensor:
    """Log-softmax of logits, in float32 at least."""
    return (output if output.dtype is torch.float64 else output.float()).log_softmax(-1)


def _put_back(block: nn.Module, former: Any) -> None:
    if former is None:
        del block.__dict__["forward"]
    else:
        block.__dict__["forward"] = former
