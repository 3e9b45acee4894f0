"""ALF-LB: the load of a mixture of experts balanced by prices instead of by a loss.

Han, Zhong: *A theoretical framework for auxiliary-loss-free load balancing of sparse mixture-of-experts in large-scale
AI models*, arXiv 2512.03915 (2025), on the procedure of Wang, Gao, Zhao, Sun, Dai, arXiv 2408.15664 (2024).

The idea: each expert has a price p_k that is added to the scores for the choice of experts only, never to the gate
weights, so it disturbs no gradient. After each optimiser step an expert with too many tokens becomes dearer, one with
too few cheaper. This is a step of subgradient descent on the dual of the balanced assignment of tokens to experts.

T tokens of the global batch, E experts, K of them for each token, target load L = K T / E::

    gamma = sigmoid(x R^T)            (T, E)  float32 (or softmax)
    sel   = top-K of gamma + p        (T, K)  p (E,) float32, starts at 0, no gradient
    w     = gamma[sel] / sum gamma[sel] * scale                    (T, K)  from the scores without prices
    A_k   = tokens that chose k       (E,)    sum_k A_k = K T

    sign          p_k += u sign(L - A_k)      in whole numbers: sign(sum A - E A_k)
    proportional  p_k += u (L - A_k) / T
    general       p_k += u eps_k (L - A_k)    eps a function of load and step
    decay         u_n = u, u / n, u / sqrt(n)
    centred       dp -= mean(dp)              the same routing; without it sum p drifts

    primal      max  sum x gamma   with  sum_k x_ik = K,  sum_i x_ik = L,  x in {0, 1}      ``solve``
    Lagrangian  Lag(x, p) = sum x (gamma + p) - L sum p                                     ``lagrangian``
    dual        D(p) = max_x Lag = sum_i (sum of the K largest of gamma_i + p) - L sum p    ``dual``
    subgradient dD / dp_k = A_k - L

``LossFreeBalancer`` does it in a model of the user's: in ``Router`` and ``MoE`` of this file, and in every module that
has a tensor named ``expert_bias`` or ``e_score_correction_bias``. In transformers 5.24 those are the routers of afmoe,
axk1, axk2, bailing_hybrid, beam, deepseek_v3, deepseek_v32, deepseek_v4, dots1, dots3_note, ernie4_5_moe,
ernie4_5_vl_moe, exaone_moe, glm4_moe, glm4_moe_lite, glm4v_moe, glm5_next, glm_moe_dsa, hy_v3, hy_v4, hy_v4_vl,
inkling, inkling2, inkling2_loop, kimi_linear, kolibri1, laguna, lfm2_moe, longcat_flash, mimo_v2_flash, minimax_m2,
minimax_m3_vl, muse_spark, nemotron_h, solar_open and step3p7 (read in the sources; eight of them run in the tests). All
of them hand their choice on as whole numbers (T, K): the module that has the prices returns it; or its child does,
where the block has the prices and its router the scores (afmoe, dots3_note's vision part, hy_v3, lfm2_moe, minimax_m2);
or its parent (the two ernie). A forward hook counts what was chosen there, so nothing is computed again and nothing
guessed.

Where the specification is silent, or this file differs:

* A recomputation by ``torch.utils.checkpoint`` is recognised (it runs inside a backward pass) and not counted again, so
  no rule sees doubled loads. With reentrant checkpoints the first pass runs without gradients and looks like a
  validation pass; there the recomputation is counted instead. Both ways: once.
* K chosen experts come in the order of their numbers, not of their scores, so that prices cannot change even the order
  in which gate weights and outputs are summed up.
* Padding: ``MoE`` leaves masked tokens out altogether (they get 0), and elsewhere the model's ``attention_mask`` says
  what to count.
* A layer that saw no token in a step keeps its prices; ``step()`` complains only where no layer saw any.
* ``centre`` is on by default, as in torchtitan; the procedure as published does not centre.
* Statement S1 holds for any dp if its last sum is written ``- sum_k dp_k (L - A_k)``; S8's rate is proved for a common
  step eta_n = 1 / (mu n), which ``rule="proportional", decay="1/n", rate=1/mu`` is.
* A point is the number of experts a token visits. ``extract`` gives a plain copy of a model of other modules (the
  prices are its own buffers, so it needs no pliant any more); ``MoE`` of this file is no plain network: NotStaticError.
* Not supported: routers whose chosen experts are renumbered by expert parallelism, prices sharded by FSDP, pipelines
  whose ranks hold different layers.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pliant.core import check
from pliant.core.dynamic import Dynamic, NotStaticError, Point, Value
from pliant.core.experts import Activation, Backend, Experts, top_k
from pliant.core.inputs import (
    Batch,
    call,
    device_of,
    evaluating,
    logits,
    rows_of,
    split_batch,
    to_device,
)
from pliant.core.objective import Criterion, cross_entropy, loss

StepSize = Callable[[Tensor, int], Tensor]
Rule = Literal["sign", "proportional"]
Decay = Literal["constant", "1/n", "1/sqrt(n)"]
Score = Literal["sigmoid", "softmax"]
_MOST = 65_536  # experts
PRICES = ("expert_bias", "e_score_correction_bias")
_DECAY: dict[str, Callable[[int], float]] = {
    "constant": lambda n: 1.0,
    "1/n": lambda n: 1.0 / n,
    "1/sqrt(n)": lambda n: n**-0.5,
}

# -- the assignment problem -------------------------------------------------------------------------------------------


def route(gamma: Tensor, p: Tensor, k: int) -> Tensor:
    """The best response x (T, E) of 0 and 1 to prices: the ``k`` largest of gamma + p in each row, ties by index."""
    return torch.zeros_like(gamma).scatter_(-1, top_k(gamma + p, k), 1.0)


def lagrangian(x: Tensor, gamma: Tensor, p: Tensor) -> Tensor:
    """Sum of x (gamma + p) - L sum p for an assignment x (T, E), scores (T, E) and prices (E,); L = sum x / E."""
    return (x * (gamma + p)).sum() - x.sum() / gamma.shape[-1] * p.sum()


def dual(gamma: Tensor, p: Tensor, k: int) -> Tensor:
    """D(p) = max over x of the Lagrangian: convex in p, never below the value of a balanced assignment."""
    tokens, experts = gamma.shape
    return (gamma + p).topk(k, -1).values.sum() - k * tokens / experts * p.sum()


def solve(gamma: Tensor, k: int) -> Tensor:
    """The balanced assignment of the largest total score, x (T, E), by linear programming.

    Whole numbers where K T / E is whole (the constraints are those of a bipartite graph); shares of tokens otherwise.

    Args:
        gamma: scores (T, E), finite.
        k: experts of each token, 1..E.

    Raises:
        ValueError: ``gamma`` is no finite matrix, or ``k`` is not in 1..E.
        ImportError: scipy is missing.
    """
    if gamma.dim() != 2 or not gamma.numel() or not bool(torch.isfinite(gamma).all()):
        raise ValueError(f"gamma: shape {tuple(gamma.shape)}; allowed: finite scores (T, E)")
    tokens, experts = gamma.shape
    if not 1 <= k <= experts:
        raise ValueError(f"k: {k} of {experts} experts; allowed: 1..{experts}")
    try:
        optimize, sparse = importlib.import_module("scipy.optimize"), importlib.import_module("scipy.sparse")
    except ImportError as error:
        raise ImportError("solve needs scipy: pip install scipy") from error
    rows = sparse.kron(sparse.eye(tokens), sparse.csr_array([[1.0] * experts]))  # sum_k x_ik
    columns = sparse.kron(sparse.csr_array([[1.0] * tokens]), sparse.eye(experts))  # sum_i x_ik
    found = optimize.linprog(
        -gamma.detach().double().cpu().numpy().ravel(),
        A_eq=sparse.vstack((rows, columns)),
        b_eq=[float(k)] * tokens + [k * tokens / experts] * experts,
        bounds=(0.0, 1.0),
        method="highs-ds",  # a simplex method ends in a corner, and corners are whole numbers
    )
    if found.status:
        raise RuntimeError(f"the linear programme was not solved: {found.message}")
    return torch.from_numpy(found.x).view(tokens, experts).to(gamma)


def price_step(
    load: Tensor,
    tokens: Tensor | int,
    *,
    rate: float,
    rule: Rule | StepSize = "sign",
    centre: bool = True,
    n: int = 1,
) -> Tensor:
    """What one step adds to the prices: (..., E), float64.

    Args:
        load: A (..., E), whole numbers, of the global batch.
        tokens: T, those that were counted; only "proportional" reads it.
        rate: u of this step.
        rule: "sign", "proportional", or a function ``(load, n) -> eps`` of the shape of ``load``.
        centre: take the mean away, so that the sum of the prices stays as it is.
        n: the number of this step, 1 for the first; handed to the function.
    """
    # Whole numbers until here: a mean of counts in floating point can miss zero by 1e-7, and its sign is then 1.
    excess = load.sum(-1, keepdim=True) - load.shape[-1] * load  # E (L - A)
    if rule == "sign":
        step = rate * excess.sign().double()
    elif rule == "proportional":
        step = rate * excess.double() / (load.shape[-1] * torch.as_tensor(tokens).clamp(min=1))
    elif callable(rule):
        step = rate * rule(load, n).double() * excess.double() / load.shape[-1]
    else:
        raise _wrong_rule(rule)
    return step - step.mean(-1, keepdim=True) if centre else step


def max_violation(load: Tensor) -> float:
    """MaxVio = max_k A_k / L - 1 of a load (E,): 0 at balance, E / K - 1 at the worst; NaN where it is empty."""
    return float(load.max() * len(load) / load.sum() - 1.0)


# -- a router and a layer ---------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """What a router says: experts (T, K) in rising order, gate weights (T, K), and for all experts (T, E) both the
    logits and the scores without prices.
    """

    chosen: Tensor
    weights: Tensor
    logits: Tensor
    scores: Tensor


class Router(nn.Module):
    """Scores, a choice by score plus price, and gate weights that know nothing of the price: (T, d) -> Routing.

    Args:
        features: d.
        experts: E.
        top_k: K; may be set anew at any time.
        score: "sigmoid", or "softmax", whose scores are of the order 1 / E: a rate of 1e-3 is E times larger for it.
        normalise: divide the K weights by their sum.
        scale: factor of the weights.
        groups: the experts in this many groups of neighbours; a token may use only its best ``top_groups`` of them,
            a group being as good as its two best experts (DeepSeek-V3's node-limited routing).
        top_groups: groups that a token may use.

    ``expert_bias`` (E,) holds the prices. It has no gradient, is saved, and stays float32 under ``.bfloat16()``: a step
    of 1e-3 is lost on a bfloat16 price of 0.5.
    """

    expert_bias: Tensor

    def __init__(
        self,
        features: int,
        experts: int,
        top_k: int = 2,
        *,
        score: Score = "sigmoid",
        normalise: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        super().__init__()
        self.features = check.whole("features", features, at_least=1)
        self.experts = check.whole("experts", experts, at_least=1, at_most=_MOST)
        self.groups = check.whole("groups", groups, at_least=1)
        self.top_groups = check.whole("top_groups", top_groups, at_least=1, at_most=self.groups)
        if experts % groups:
            raise ValueError(f"groups: {groups} groups do not share out {experts} experts evenly")
        if groups > 1 and experts // groups < 2:
            raise ValueError(f"groups: {groups} groups of one expert; a group is scored by its two best")
        self.top_k = check.whole("top_k", top_k, at_least=1, at_most=experts // groups * top_groups)
        self.score: Score = check.choice("score", score, Score)
        self.normalise = check.boolean("normalise", normalise)
        self.scale = check.positive("scale", scale)
        self.weight = nn.Parameter(torch.empty(experts, features))
        self.register_buffer("expert_bias", torch.zeros(experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` starts, and prices of zero."""
        nn.init.uniform_(self.weight, -(self.features**-0.5), self.features**-0.5)
        nn.init.zeros_(self.expert_bias)

    def forward(self, x: Tensor) -> Routing:
        """Choose for tokens x (T, d)."""
        with torch.autocast(x.device.type, enabled=False):
            z = F.linear(x.float(), self.weight.float())
            gamma = z.sigmoid() if self.score == "sigmoid" else z.softmax(-1)
            chosen = self.choose(gamma)
            w = gamma.gather(-1, chosen)
            if self.normalise:
                w = w / (w.sum(-1, keepdim=True) + 1e-20)
        return Routing(chosen, w * self.scale, z, gamma)

    @torch.no_grad()
    def choose(self, gamma: Tensor) -> Tensor:
        """Experts (T, K) of scores (T, E) at the current prices, in rising order."""
        biased = gamma + self.expert_bias
        if self.groups > 1:
            grouped = biased.view(len(biased), self.groups, -1)
            best = top_k(grouped.topk(2, -1).values.sum(-1), self.top_groups)
            closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=gamma.device).scatter_(1, best, False)
            biased = grouped.masked_fill(closed[..., None], -math.inf).flatten(1)
        return top_k(biased, self.top_k).sort(-1).values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = exact.to(self.expert_bias.device)
        return self

    def extra_repr(self) -> str:
        """The sizes."""
        limit = f", groups={self.groups}, top_groups={self.top_groups}" if self.groups > 1 else ""
        return f"{self.features}, experts={self.experts}, top_k={self.top_k}, score={self.score!r}{limit}"


class MoE(nn.Module):
    """A router, its experts and shared experts in the place of a feed-forward network: (B, T, d) -> (B, T, d).

    Args:
        features: d.
        hidden: width of one expert.
        experts: E.
        top_k: K.
        shared: that many more experts, used by every token without a gate.
        activation: between the two layers of an expert.
        gated: experts with a third matrix, as in Llama.
        bias: whether experts have biases.
        backend: how experts run, see ``pliant.core.experts``.
        router: further arguments of ``Router``.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        experts: int,
        top_k: int = 2,
        *,
        shared: int = 0,
        activation: Activation = F.relu,
        gated: bool = False,
        bias: bool = True,
        backend: Backend = "auto",
        **router: Any,
    ) -> None:
        super().__init__()
        check.whole("shared", shared, at_least=0, at_most=_MOST)
        options: dict[str, Any] = {"activation": activation, "gated": gated, "bias": bias}
        self.router = Router(features, experts, top_k, **router)
        self.experts = Experts(features, hidden, experts, backend=backend, **options)
        self.shared = Experts(features, hidden * shared, 1, **options) if shared else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run tokens x (..., d); where ``mask`` (...) is zero a token is padding: not routed, not counted, output 0."""
        rows = x.reshape(-1, x.shape[-1])
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"mask: shape {tuple(mask.shape)}; allowed: {tuple(x.shape[:-1])}, as x without d")
            kept = mask.reshape(-1).nonzero().squeeze(1)
            rows = rows[kept]
        routing = self.router(rows)
        y: Tensor = self.experts(rows, routing.chosen, routing.weights)
        if self.shared is not None:
            y = y + self.shared(rows, torch.zeros_like(routing.chosen[:, :1]), torch.ones_like(routing.weights[:, :1]))
        if mask is not None:
            y = y.new_zeros(mask.numel(), y.shape[-1]).index_copy(0, kept, y)
        return y.view(x.shape)


# -- the method -------------------------------------------------------------------------------------------------------


class LossFreeBalancer(Dynamic):
    """Balances the experts of a model by prices, one step for each optimiser step.

    Args:
        model: a network with one or more routers that have prices; it is shared, not copied.
        rate: u. 1e-3 for sigmoid scores; 1e-4 is slow at the beginning, 1e-2 fluctuates at the end.
        rule: "sign", "proportional", or a function ``(load (R, E), n) -> eps (R, E)`` for ``p += u eps (L - A)``; it
            is called with a row for each of the R routers that have E experts.
        decay: "constant", "1/n" or "1/sqrt(n)": the rate at the n-th step.
        centre: keep the sum of the prices.
        freeze_after: share of the training after which prices stay (DeepSeek-V3: 0.966).
        top_ks: numbers of experts for the dial, where all routers are ``Router``; the routers' own by default.
        aux_weight: of the Switch balance loss of each router, for comparison; 0 in this method.
        sequence_weight: of the same loss for each sequence by itself; DeepSeek-V3 adds 1e-4.
        z_weight: of the mean squared log-sum-exp of the router's logits (ST-MoE: 1e-3).
        criterion: loss of (logits, target); the model's own ``loss`` where its output has one, cross entropy otherwise.
        padding: the argument of the model's forward that is 0 at padding tokens, (B, T).
        names: of the tensors that hold prices.

    Each point is ``top_k=K``. ``fit`` calls ``step`` after every optimiser step; in a loop of your own call it
    yourself, or ``attach_optimizer(optimizer)`` once. Loads are counted in training mode with gradients enabled only.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float = 1e-3,
        rule: Rule | StepSize = "sign",
        decay: Decay = "constant",
        centre: bool = True,
        freeze_after: float = 1.0,
        top_ks: Sequence[int] | None = None,
        aux_weight: float = 0.0,
        sequence_weight: float = 0.0,
        z_weight: float = 0.0,
        criterion: Criterion | None = None,
        padding: str = "attention_mask",
        names: Sequence[str] = PRICES,
    ) -> None:
        super().__init__()
        self.model = check.module("model", model)
        self.rate = check.positive("rate", rate)
        if not callable(rule) and rule not in ("sign", "proportional"):
            raise _wrong_rule(rule)
        self.rule: Rule | StepSize = rule
        self.decay: Decay = check.choice("decay", decay, Decay)
        self.centre = check.boolean("centre", centre)
        self.freeze_after = check.number("freeze_after", freeze_after, above=0, at_most=1)
        self.top_ks = check.optional(check.sequence, "top_ks", top_ks, check.whole)
        self.aux_weight = check.number("aux_weight", aux_weight, at_least=0)
        self.sequence_weight = check.number("sequence_weight", sequence_weight, at_least=0)
        self.z_weight = check.number("z_weight", z_weight, at_least=0)
        self.criterion = check.optional(check.function, "criterion", criterion)
        self.padding = check.text("padding", padding)
        self.names = check.names("names", names, empty=False)

        self.steps, self._frozen, self._final = 0, False, False
        self.sites = _find(self, model, self.names)
        self._points = self._dial()
        self._padding = _Padding(self, model, padding)
        self._audit: dict[str, Tensor] | None = None  # where loads go while ``loads`` looks
        self._heard: list[tuple[_Site, Any]] | None = None  # outputs of routers, for the auxiliary losses
        self._attached: RemovableHandle | None = None
        self._handles = [model.register_forward_pre_hook(self._padding.before, with_kwargs=True)]
        for site in self.sites:
            self._handles += site.listen()
        self.point = self._points[-1]
        self.use(self.point)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        return self.model(*args, **kwargs)

    # -- the dial -------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """``top_k=K`` from the smallest K to the largest."""
        return list(self._points)

    def use(self, point: Mapping[str, Value]) -> Self:
        """Let every token visit ``top_k`` experts from now on."""
        super().use(point)
        if self.top_ks is not None:
            for site in self.sites:
                if isinstance(site.owner, Router):
                    site.owner.top_k = int(self.point["top_k"])
        return self

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """A copy of the model without anything of pliant: its prices are buffers of its own, which no longer move.

        Raises:
            NotStaticError: the model is built of this file's ``Router``, which is no plain module.
        """
        point = self._known(point)
        if any(type(m).__module__.partition(".")[0] == "pliant" for m in self.model.modules()):
            raise NotStaticError(point, "each token visits experts of its own, in modules of pliant (release() it)")
        twin = copy.deepcopy(self)
        return twin.release().eval()

    def release(self) -> nn.Module:
        """Take all hooks off and return the user's model, prices included. This balancer is of no use afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._attached is not None:
            self._attached.remove()
            self._attached = None
        return self.model

    def _dial(self) -> list[Point]:
        if self.top_ks is None:
            return [Point(top_k=max(site.top_k() for site in self.sites))]
        routers = [site.owner for site in self.sites if isinstance(site.owner, Router)]
        if len(routers) < len(self.sites) and len(self.top_ks) != 1:
            raise ValueError(f"top_ks: {self.top_ks}; only pliant's Router can be turned, and the model has others")
        most = min(r.experts // r.groups * r.top_groups for r in routers) if routers else self.sites[0].experts
        if len(set(self.top_ks)) < len(self.top_ks) or not all(1 <= k <= most for k in self.top_ks):
            raise check.wrong("top_ks", self.top_ks, f"different numbers of experts in 1..{most}")
        return [Point(top_k=int(k)) for k in sorted(self.top_ks)]

    # -- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor:
        """The model's own loss, plus the auxiliary ones that have a weight."""
        wanted = bool(self.aux_weight or self.sequence_weight or self.z_weight)
        self._heard = [] if wanted else None
        counted = [(site, site.tally.clone(), site.calls, site.forwards) for site in self.sites]
        try:
            value = self._task_loss(batch)
            if self._heard is not None:
                value = value + self._auxiliary(self._heard, rows_of(split_batch(batch)[0]))
        except BaseException:  # a batch that no step will follow does not count
            for site, tally, calls, forwards in counted:
                site.tally, site.calls, site.forwards = tally, calls, forwards
            raise
        finally:
            self._heard = None
        return value

    def _task_loss(self, batch: Batch) -> Tensor:
        x, y = split_batch(batch)
        if self.criterion is None and isinstance(batch, Mapping) and "labels" in self._padding.arguments:
            output = self(**batch)
            own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            if isinstance(own, Tensor):
                return own
        else:
            output = call(self, x)
        if self.criterion is not None:
            return loss(output, y, self.criterion)
        return cross_entropy(logits(output), y, last=True)  # classes last, as language models have them

    def _auxiliary(self, heard: list[tuple[_Site, Any]], sequences: int) -> Tensor:
        """The weighted sum of balance and z losses, each the mean over the routers."""
        scores = [_scores(output, site) for site, output in heard]
        if self.training and torch.is_grad_enabled() and not any(z.requires_grad for z in scores):
            raise RuntimeError(
                "aux_weight: no router ran with gradients, so there is nothing to balance (checkpoints need "
                "use_reentrant=False)"
            )
        total = torch.zeros((), device=self.sites[0].price.device)
        for z, (site, output) in zip(scores, heard, strict=True):
            chosen = _chosen(output, site.experts)
            assert chosen is not None
            chosen = chosen.reshape(len(z), -1)
            real = self._padding.of(len(z))
            real = torch.ones_like(z[:, 0]) if real is None else real.to(z)
            probability = z.softmax(-1)
            if isinstance(output, Routing):
                probability = output.scores / output.scores.sum(-1, keepdim=True)
            if self.aux_weight:
                total = total + self.aux_weight * _balance(probability, chosen, real, 1)
            if self.sequence_weight:
                if len(z) % sequences:
                    raise ValueError(f"sequence_weight: {len(z)} tokens do not share out to {sequences} sequences")
                total = total + self.sequence_weight * _balance(probability, chosen, real, sequences)
            if self.z_weight:
                total = total + self.z_weight * (z.logsumexp(-1).square() * real).sum() / real.sum()
        return total / len(heard)

    def schedule(self, progress: float) -> None:
        """Hold the prices in the last part of the training, from ``freeze_after`` on."""
        self._final = self.freeze_after < 1 and progress >= self.freeze_after

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Call ``step`` after each step of ``optimizer``; of the last one attached only."""
        if self._attached is not None:
            self._attached.remove()
        self._attached = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Move the prices by the loads counted since the last step, over all ranks, and forget the loads.

        Raises:
            RuntimeError: no token was counted.
        """
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not shared and not any(site.calls for site in self.sites):
            raise RuntimeError(
                "step: no token was counted since the last step; loads are counted in training mode with gradients "
                "enabled, once for each optimiser step (attach_optimizer and fit call step by themselves)"
            )
        where = self.sites[0].price.device
        tallies = [site.tally.to(where) for site in self.sites]
        if shared:  # one message for all layers
            flat = torch.cat(tallies)
            dist.all_reduce(flat)
            tallies = list(torch.split(flat, [len(t) for t in tallies]))
        if self.steps == 0:
            self._warn_of_silence()
        self.steps += 1
        rate = self.rate * _DECAY[self.decay](self.steps)
        for experts in dict.fromkeys(site.experts for site in self.sites):
            sites = [site for site in self.sites if site.experts == experts]
            rows = torch.stack([t for t in tallies if len(t) == experts + 1])  # (R, E + 1)
            load, tokens = rows[:, :-1], rows[:, -1:]
            if not self.frozen:
                step = price_step(load, tokens, rate=rate, rule=self.rule, centre=self.centre, n=self.steps)  # type: ignore[arg-type]
                for site, dp in zip(sites, step.float(), strict=True):
                    site.move(dp)
            for site, last in zip(sites, load, strict=True):
                site.last = last
                site.clear()

    def _warn_of_silence(self) -> None:
        silent = [site.name for site in self.sites if site.source is None]
        if silent:
            warnings.warn(
                f"the routers {', '.join(silent)} did not run, or hand on no choice (T, K); their prices stay",
                stacklevel=3,
            )

    @property
    def frozen(self) -> bool:
        """Whether prices stay as they are."""
        return self._frozen or self._final

    def freeze(self, frozen: bool = True) -> Self:
        """Hold the prices from now on (or move them again), for the final phase or a model that must not change."""
        self._frozen = frozen
        return self

    # -- what is known --------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, dict[str, Any]]:
        """Of each router: ``load`` (E,) of the last step, its ``max_vio`` and ``min_share`` (1 / E at balance; both NaN
        before the first step), and ``p_range``, the largest price less the smallest.
        """
        found = {}
        for site in self.sites:
            load = site.last
            p = site.price.detach().float()
            found[site.name] = {
                "load": load,
                "max_vio": max_violation(load),
                "min_share": float(load.min() / load.sum()),
                "p_range": float(p.max() - p.min()),
            }
        return found

    @torch.no_grad()
    def loads(self, data: Iterable[Batch]) -> dict[str, Tensor]:
        """Loads (E,) of each router over all of ``data`` in evaluation mode; neither counters nor prices change.

        Raises:
            ValueError: ``data`` is empty.
        """
        self._audit = {site.name: torch.zeros(site.experts, dtype=torch.int64) for site in self.sites}
        try:
            empty = True
            with evaluating(self):
                for batch in data:
                    call(self, to_device(split_batch(batch)[0], device_of(self)))
                    empty = False
            if empty:
                raise ValueError("data: it has no batches, so there is nothing to count")
            return self._audit
        finally:
            self._audit = None

    def _count(self, site: _Site, chosen: Tensor, output: Any) -> None:
        """One router's choice (..., K), if it is one that counts."""
        if self._audit is not None:
            self._audit[site.name] += self._tally(site, chosen, output)[:-1].cpu()
            return
        backward = torch._C._current_graph_task_id() != -1  # a checkpoint runs its region again
        if self._heard is not None and not backward:
            self._heard.append((site, output))
        if not (site.owner.training and torch.is_grad_enabled()) or (backward and site.forwards):
            return
        site.forwards += not backward
        site.calls += 1
        tally = self._tally(site, chosen, output)
        site.tally = site.tally.to(tally.device) + tally

    def _tally(self, site: _Site, chosen: Tensor, output: Any) -> Tensor:
        """Tokens of each expert, then their number: (E + 1,). A token whose scores are NaN chose nothing."""
        rows = chosen.detach().reshape(-1, chosen.shape[-1]).long()
        tally = torch.zeros(site.experts + 1, dtype=torch.int64, device=rows.device)
        real = self._padding.of(len(rows))
        for t in _tensors(output):
            if t.is_floating_point() and t.dim() >= 2 and t.numel() // t.shape[-1] == len(rows):
                known = ~t.detach().reshape(len(rows), t.shape[-1]).isnan().any(1)
                real = known if real is None else real & known
        # No boolean index and no bincount: both would wait for the GPU.
        if real is not None:
            real = real[:, None].to(rows)
            tally.scatter_add_(0, rows.flatten(), real.expand_as(rows).flatten())
            tally[-1] = real.sum()
        else:
            tally.scatter_add_(0, rows.flatten(), tally.new_ones(1).expand(rows.numel()))
            tally[-1] = len(rows)
        return tally

    # -- storage --------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Steps done, and whether the prices are held."""
        return torch.tensor([self.steps, int(self._frozen)])

    def set_extra_state(self, state: Tensor) -> None:
        """What ``get_extra_state`` gave."""
        steps, frozen = state.tolist()
        self.steps, self._frozen = int(steps), bool(frozen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = [site.price.detach() for site in self.sites]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for site, price in zip(self.sites, exact, strict=True):
            site.keep_exact(price)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the hook on the optimiser: a copy has another one."""
        return self.__dict__ | {"_attached": None}

    def extra_repr(self) -> str:
        """The rule and the routers."""
        rule = self.rule if isinstance(self.rule, str) else "a function"
        return f"routers={len(self.sites)}, rule={rule!r}, rate={self.rate:g}, decay={self.decay!r}"


class _Listener:
    """Has hooks on a model and tells a balancer. Copied with it; in a copy of the model alone it tells no one."""

    balancer: LossFreeBalancer | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.balancer = memo.get(id(self.balancer))
        if twin.balancer is not None:
            rest = {name: value for name, value in self.__dict__.items() if name != "balancer"}
            twin.__dict__ |= copy.deepcopy(rest, memo)
        return twin


class _Padding(_Listener):
    """Remembers which tokens of the model's input are real: (B T,), or None where nothing says so."""

    def __init__(self, balancer: LossFreeBalancer, model: nn.Module, name: str) -> None:
        self.balancer = balancer
        self.name = name
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        self.mask: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward hook on the model."""
        if self.balancer is not None:
            mask = (dict(zip(self.arguments, args, strict=False)) | kwargs).get(self.name)
            self.mask = mask.reshape(-1) != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def of(self, tokens: int) -> Tensor | None:
        """The mask, if it speaks of that many tokens: a layer may have left padding out by itself."""
        return self.mask if self.mask is not None and len(self.mask) == tokens else None


class _Site(_Listener):
    """One router: where its prices are, who says what was chosen, and the loads counted since the last step."""

    def __init__(
        self, balancer: LossFreeBalancer, name: str, attribute: str, owner: nn.Module, near: list[nn.Module]
    ) -> None:
        self.balancer = balancer
        self.name, self.attribute, self.owner, self.near = name, attribute, owner, near
        self.source: nn.Module | None = None  # the first of ``near`` that hands on a choice
        self.experts = self.price.numel()
        self.last = torch.zeros(self.experts, dtype=torch.int64)
        self.tally = torch.zeros(self.experts + 1, dtype=torch.int64, device=self.price.device)  # loads, then tokens
        self.clear()
        self.keep_exact(self.price.detach())
        self.price.requires_grad_(False)

    @property
    def price(self) -> Tensor:
        """The prices, (E,) or (1, E), a tensor of the owner's."""
        found: Tensor = getattr(self.owner, self.attribute)
        return found

    def clear(self) -> None:
        """Forget the loads."""
        self.tally.zero_()
        self.calls = self.forwards = 0  # in Python, so that no step has to wait for a GPU

    def move(self, step: Tensor) -> None:
        """Add ``step`` (E,) to the prices."""
        self.keep_exact(self.price.detach())  # the model alone may have been cast since
        price = self.price.detach()
        price.add_(step.to(price.device).view_as(price))

    def keep_exact(self, value: Tensor) -> None:
        """Have float32 prices of that value, on the device where they are now, if they are of another type."""
        now = self.price
        if now.dtype == torch.float32:
            return
        exact = value.to(now.device, torch.float32)
        if isinstance(now, nn.Parameter):
            now.data = exact
        else:
            setattr(self.owner, self.attribute, exact)

    def top_k(self) -> int:
        """K of this router, as its module, its neighbours or the model's configuration tell it."""
        assert self.balancer is not None
        for module in self.near:
            if isinstance(k := getattr(module, "top_k", None), int):
                return k
        config = getattr(self.balancer.model, "config", None)
        if isinstance(k := getattr(config, "num_experts_per_tok", None), int):
            return k
        raise ValueError(f"model: {self.name} does not tell how many experts a token visits; give top_ks=(K,)")

    def listen(self) -> list[RemovableHandle]:
        """Hooks on the modules that may hand on the choice."""
        return [module.register_forward_hook(self.after) for module in self.near]

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: count what was chosen."""
        if self.balancer is None or (self.source is not None and module is not self.source):
            return
        chosen = _chosen(output, self.experts)
        if chosen is not None:
            self.source = module
            self.balancer._count(self, chosen, output)


def _find(balancer: LossFreeBalancer, model: nn.Module, names: Sequence[str]) -> list[_Site]:
    """The routers of a model: modules that have prices, each with the modules near it."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    sites = []
    for path, owner in model.named_modules():
        for attribute in names:
            price = owner._buffers.get(attribute, owner._parameters.get(attribute))
            if price is None:
                continue
            if price.dim() < 1 or price.numel() != price.shape[-1]:
                raise ValueError(f"model: {path}.{attribute} has shape {tuple(price.shape)}; allowed: (E,) or (1, E)")
            children = list(owner.children())
            # The parent may hand the choice on only where the prices have a small module of their own.
            near = [owner, *children] if children else [owner, *filter(None, [parents.get(id(owner))])]
            for module in near:
                hooks = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
                if any(isinstance(s, _Site) and s.balancer not in (None, balancer) for s in hooks):
                    raise ValueError(f"model: {path} is balanced by another LossFreeBalancer; release() that one first")
            sites.append(_Site(balancer, path or type(owner).__name__, attribute, owner, near))
    if not sites:
        raise ValueError(
            f"model, names: no router found in {type(model).__name__}: no module has a tensor named "
            + " or ".join(names)
        )
    return sites


def _tensors(output: Any) -> list[Tensor]:
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    return [part for part in parts if isinstance(part, Tensor)]


def _chosen(output: Any, experts: int) -> Tensor | None:
    """The one tensor of whole numbers (..., K) in what a module returned, K <= E."""
    whole = [t for t in _tensors(output) if t.dtype in (torch.int64, torch.int32) and t.dim() >= 2]
    return whole[0] if len(whole) == 1 and whole[0].shape[-1] <= experts else None


def _scores(output: Any, site: _Site) -> Tensor:
    """The router's logits (T, E)."""
    if isinstance(output, Routing):
        return output.logits
    for t in _tensors(output):
        if t.is_floating_point() and t.dim() >= 2 and t.shape[-1] == site.experts:
            return t.reshape(-1, site.experts).float()
    raise ValueError(
        f"aux_weight: the router {site.name} returns no logits (T, {site.experts}), so it has no such loss"
    )


def _balance(probability: Tensor, chosen: Tensor, real: Tensor, sequences: int) -> Tensor:
    """The mean over sequences of E sum_e f_e P_e, ``balance_loss`` of each, over tokens where ``real`` (T,) is 1."""
    real = real.view(sequences, -1, 1)
    p = (probability.view(sequences, -1, probability.shape[-1]) * real).sum(1) / real.sum(1).clamp(min=1)
    choices = real.expand(-1, -1, chosen.shape[-1]).flatten(1)
    f = torch.zeros_like(p).scatter_add_(1, chosen.view(sequences, -1), choices)
    f = f / choices.sum(1, keepdim=True).clamp(min=1)
    return probability.shape[-1] * (f * p).sum(-1).mean()


def _wrong_rule(rule: object) -> Exception:
    kind = ValueError if isinstance(rule, str) else TypeError
    return check.wrong("rule", rule, "'sign', 'proportional', or a function (load, n) -> eps", kind)
