"""JEI-DNN: exits and their gates learned together on a frozen network.

Regol, Chataoui, Coates: *Jointly-Learned Exit and Inference for a Dynamic Neural Network*, ICLR 2024, arXiv 2310.09163.

The idea: hang a linear classifier (inference module, IM) and a tiny logistic gate after each block of a frozen network.
A confidence threshold put on afterwards shows each IM other samples than it was trained on; here the two learn in turn:
gates learn which exit has the least error plus cost, IMs learn on the samples that the gates send them.

Batch B, classes C, cost weights L (lambda; all trained at once), exits l = 0..G-1; index G is the network's own end::

    z_l = feature(h_l)                     (B, D_l)  frozen
    a_l = z_l W_l^T + b_l                  (B, C)    IM
    u_l = [max p, H(p), margin, H(p^2/sum p^2)]  (B, 4)  detached, p = softmax(a_l)
    g_l = sigmoid(w_l . u_l + b_l)         (B,)      gate: an unconditional probability, not a hazard
    P_l = max(0, min(g_l, 1 - sum_{j<l} P_j)),  P_G = 1 - sum_{l<G} P_l
    leave at the first l with  P_l >= (1 - sum_{j<l} P_j) / 2
    IC_l = cost to the decision at exit l, IMs and gates on the way included, divided by that of the end; IC_G = 1

    gate step   l* = argmin_l CE_l + lambda IC_l;  t_l = 1[l >= l*];  weighted BCE of (w_l . u_l + b_l) against t_l
    IM step     mean_{b, l<G} r_b P_bl CE_bl,  r_b = sum_l CE_bl / sum_l P_bl CE_bl, held constant
    warm-up     CE_G + sum_l (G + 1 - l) CE_l

Where the specification is silent, or this file differs:

* The published code does not hold ``r`` constant. The sum over l then gives ``sum_l CE_bl`` and the weighting vanishes,
  so the published runs trained with the plain mean: that is ``im_weighting="none"``; the method as described is "exit".
* A second, plainly trained set of IMs takes the same steps (warm-up, then the mean CE in IM phases). The static points
  ``exit=k`` and ``ThresholdExit`` use it, so the opponents of the gates are not handicapped.
* Each epoch begins with a gate phase, so an epoch shorter than two phases would never train the IMs; from the second
  epoch on a phase is at most half an epoch.
* The best weights, for each lambda, are those of the lowest ``CE + lambda IC`` of the decisions taken on validation;
  gated accuracy alone, as in the published code, forgets the cost.
* After a sample has left nothing is known of later exits: ``exit_probability`` gives their mass to its last column.
* The network is in evaluation mode always (the published code leaves drop-path active), and all is computed in torch.
* Pos-weights count ``l* == l`` but weigh cumulative targets; ``pos_weight="exact"`` counts ``l* <= l``.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import check
from pliant.core.cost import count_flops
from pliant.core.dynamic import Dynamic, NotStaticError, Point, Value
from pliant.core.gates import calibration_error, exit_distribution, first_exit, leaves, uncertainty
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    check_example,
    device_of,
    evaluating,
    first_line,
    packed,
    rows_of,
    split_batch,
    take,
    to_device,
)
from pliant.core.objective import Criterion, row_classes
from pliant.core.rows import Compact, ExitPlan, check_compact, hidden_of

Feature = Callable[[Tensor], Tensor]
Weighting = Literal["exit", "single", "none"]
GateScore = Literal["ce", "error", "confidence"]
PosWeight = Literal["code", "exact"]
Rule = Literal["confidence", "shares"]
_EPS = 1e-8
_WARMUP, _JOINT = 0, 1


class Decision(NamedTuple):
    """Logits (B, C), exit taken (B,), its relative cost (B,), and exit probabilities (B, G + 1)."""

    logits: Tensor
    exit: Tensor
    cost: Tensor
    exit_probability: Tensor


class Outcome(NamedTuple):
    """One setting on a data set: share correct, mean relative cost, expected calibration error of the answers."""

    point: Point
    accuracy: float
    cost: float
    calibration_error: float


class JEIDNN(Dynamic):
    """Early exits with jointly learned gates on a frozen network, one set for each cost weight.

    Args:
        model: a trained classifier whose forward gives logits (B, C). It is frozen, and shared, not copied.
        example: an input that it accepts.
        cost_weights: lambda, 0 or more; larger leaves earlier. Each is one point, ``cost_weight=...``.
        exits: names of modules in the order of execution; the repeated blocks but the last one by default.
        feature: hidden state to (B, D); by default the mean over space of (B, D, H, W), the first token of (B, N, D).
            For a transformer with a final norm: ``lambda h: model.norm(h[:, 0])``.
        im_weighting: "exit" trains IMs by exit probability; "single" each sample at the exit alone that it takes;
            "none" by the plain mean, as the published runs did.
        gate_score: what the gates' targets minimise beside the cost: "ce", "error" (0 or 1) or "confidence": -p_y where
            the answer is right, else 0.
        pos_weight: "code" counts samples whose best exit is l, "exact" those whose best exit is l or before.
        warmup: share of the training (``progress``) in which IMs train alone.
        patience: epochs without a better validation accuracy after which the warm-up of an IM stops.
        phase_batches: batches of a gate phase, then as many of an IM phase.
        compact: "always", "never" or a share of leaving rows; see ``pliant.core.rows``. Answers do not depend on it.
        criterion: loss ``(logits (N, C), target (N,))`` of each row (N,), or their mean, which is then asked for row by
            row; cross entropy by default.

    Shapes:
        input: whatever the model takes, B rows; output: logits (B, C).
    """

    costs: Tensor
    head_costs: Tensor
    pos_weights: Tensor
    clock: Tensor
    frozen: Tensor
    stale: Tensor
    best_accuracy: Tensor
    best_score: Tensor
    best_plain: Tensor
    best_joint: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        cost_weights: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        exits: Sequence[str] | None = None,
        feature: Feature | None = None,
        im_weighting: str = "exit",
        gate_score: str = "ce",
        pos_weight: str = "code",
        warmup: float = 0.3,
        patience: int = 2,
        phase_batches: int = 200,
        compact: Compact = "always",
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        weights: tuple[float, ...] = check.sequence("cost_weights", cost_weights, _at_least_zero)
        check.distinct("cost_weights", weights)
        check.module("model", model)
        self.cost_weights = weights
        self.exits = check.optional(check.names, "exits", exits, empty=False)
        self.feature = check.optional(check.function, "feature", feature)
        self.im_weighting: Weighting = check.choice("im_weighting", im_weighting, Weighting)
        self.gate_score: GateScore = check.choice("gate_score", gate_score, GateScore)
        self.pos_weight: PosWeight = check.choice("pos_weight", pos_weight, PosWeight)
        self.warmup = check.share("warmup", warmup)
        self.patience = check.whole("patience", patience, at_least=1)
        self.phase_batches = check.whole("phase_batches", phase_batches, at_least=1)
        self.compact = check_compact(compact)
        self.criterion = check.optional(check.function, "criterion", criterion)
        prediction = check_example(model, example)
        if prediction.ndim != 2 or prediction.shape[1] < 2:
            raise ValueError(
                f"model: its prediction has shape {tuple(prediction.shape)}; logits (B, C) of at least 2 classes"
            )
        self.model = model.requires_grad_(False).eval()
        self.example = example
        self.plan = ExitPlan(model, example, exits)
        with torch.no_grad():
            try:
                levels, _ = self.plan.collect(model, example, self._feature)
            except (RuntimeError, TypeError, IndexError) as error:
                raise ValueError(f"feature: it fails on a hidden state of the model: {first_line(error)}") from error
        self.widths = tuple(z.shape[1] for z in levels)
        self.classes = prediction.shape[1]
        g, n, c = len(self.plan), len(weights), self.classes
        like: dict[str, Any] = {"device": prediction.device, "dtype": torch.float32}

        self.plain_weight = nn.ParameterList([torch.empty(c, d, **like) for d in self.widths])  # (C, D_l) each
        self.plain_bias = nn.ParameterList([torch.empty(c, **like) for _ in self.widths])
        self.head_weight = nn.ParameterList([torch.empty(n, c, d, **like) for d in self.widths])  # (L, C, D_l)
        self.head_bias = nn.Parameter(torch.empty(n, g, c, **like))
        self.gate_weight = nn.Parameter(torch.empty(n, g, 4, **like))
        self.gate_bias = nn.Parameter(torch.empty(n, g, **like))
        joint = sum(c * (d + 1) + 5 for d in self.widths)
        for name, value in {
            "pos_weights": torch.ones(n, g, **like),
            "clock": torch.zeros(3, dtype=torch.int64),  # stage, batches in this epoch or stage, length of an epoch
            "frozen": torch.zeros(g, dtype=torch.bool),
            "stale": torch.zeros(g, dtype=torch.int64),
            "best_accuracy": torch.full((g,), -1.0),
            "best_score": torch.full((n,), math.inf),
            "best_plain": torch.zeros(sum(c * (d + 1) for d in self.widths), **like),
            "best_joint": torch.zeros(n, joint, **like),
        }.items():
            self.register_buffer(name, value)
        self.reset_parameters()
        end, heads = self._measure_costs()
        self.register_buffer("costs", end)  # (G + 1,) relative
        self.register_buffer("head_costs", heads)  # (2, G + 1) of static and of threshold exits
        self.point = self.points()[-1]

    def reset_parameters(self) -> None:
        """Fresh IMs and gates, drawn as ``nn.Linear`` draws them, and the beginning of the training."""
        with torch.no_grad():
            for w, b in zip(self.plain_weight, self.plain_bias, strict=True):
                bound = w.shape[1] ** -0.5
                w.uniform_(-bound, bound)
                b.uniform_(-bound, bound)
            self._copy_plain()
            self.gate_weight.uniform_(-0.5, 0.5)
            self.gate_bias.uniform_(-0.5, 0.5)
            self.pos_weights.fill_(1)
            self.clock.zero_()
            self.frozen.fill_(False)
            self.stale.zero_()
            self.best_accuracy.fill_(-1)
            self.best_score.fill_(math.inf)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"exits={len(self.plan)}, widths={self.widths}, classes={self.classes}, cost_weights={self.cost_weights}"

    def train(self, mode: bool = True) -> Self:
        """Training mode for IMs and gates; the network stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    # -- the dial -------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Truncations ``exit=0..G-1`` (plain IMs), gates from the largest cost weight down, the whole network."""
        g = len(self.plan)
        return [
            *(Point(exit=k) for k in range(g)),
            *(Point(cost_weight=w) for w in sorted(self.cost_weights, reverse=True)),
            Point(exit=g),
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the rows that a block gets depend on their values
    def forward(self, *args: Any, exit_features: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Logits (B, C) at the current setting, computed on only the rows that need each block."""
        return self.decide(*args, exit_features=exit_features, **kwargs).logits

    def decide(self, *args: Any, exit_features: Tensor | None = None, **kwargs: Any) -> Decision:
        """Logits, exits, relative costs and exit probabilities at the current setting."""
        if exit_features is not None:
            return self._decide_cached(exit_features)
        x = packed(args, kwargs)
        g = len(self.plan)
        if "exit" in self.point:
            k = int(self.point["exit"])
            if k == g:
                answer = self.plan.run(self.model, x, _nobody, only=())
            else:
                answer = self.plan.run(self.model, x, self._everybody, only=(k,))
            return Decision(*answer, self.head_costs[0][answer.exit], F.one_hot(answer.exit, g + 1).float())
        lam = self._index()
        mass = self.gate_bias.new_zeros(rows_of(x), g + 1)
        total = self.gate_bias.new_zeros(rows_of(x))

        def visit(l: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
            a = F.linear(self._feature(hidden), self.head_weight[l][lam], self.head_bias[lam, l])
            s = (uncertainty(a).to(self.gate_weight.dtype) * self.gate_weight[lam, l]).sum(-1) + self.gate_bias[lam, l]
            before = total[rows]
            p = torch.minimum(s.detach().sigmoid(), 1 - before).clamp_min(0)
            mass[rows, l] = p
            total[rows] = before + p
            return leaves(p, before), a

        answer = self.plan.run(self.model, x, visit, self.compact)
        return Decision(*answer, self.costs[answer.exit], _known_mass(mass, answer.exit))

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The truncated network of ``exit=k`` with its plain IM; the network itself for ``exit=G``.

        Traced by ``torch.export``: the parameters after the exit are gone, any batch size is taken.
        """
        point = self._known(point)
        if "exit" not in point:
            raise NotStaticError(point, "each sample takes the exit that its own gates choose")
        k = int(point["exit"])
        if k == len(self.plan):
            return copy.deepcopy(self.model).requires_grad_(True).eval()
        return _truncated(self, k)

    # -- training -------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """What ``loss`` trains now: "warmup", "gate" or "im"."""
        stage, batch, epoch = self.clock.tolist()
        if stage == _WARMUP:
            return "warmup"
        length = min(self.phase_batches, max(1, epoch // 2)) if epoch else self.phase_batches
        # The clock is one ahead: ``schedule`` counts a batch before it is trained on.
        return "im" if max(batch - 1, 0) // length % 2 else "gate"

    def schedule(self, progress: float) -> None:
        """Count the batch; end the warm-up at its share of the training."""
        if self.clock[0] == _WARMUP and progress >= self.warmup:
            self._begin_joint()
        if progress < 1:
            self.clock[1] += 1
        phase = self.phase
        idle = {"warmup": ("head", "gate"), "gate": ("plain", "head"), "im": ("gate",)}[phase]
        # Gradients that are zero and not None would still move idle weights, by momentum and weight decay.
        for name, p in self.named_parameters():
            if name.startswith(idle):
                p.grad = None

    def loss(self, batch: Batch) -> Tensor:
        """The sum over cost weights of the loss of the current phase.

        ``batch`` is (input, target), or a mapping with "exit_features" and "labels" as ``cache`` gives.
        """
        levels, final, y = self._inputs(batch)
        phase = self.phase
        if phase == "warmup":
            ce = self._row_loss(self._plain_logits(levels, skip_frozen=True), y)  # (B, G)
            g = ce.shape[1]
            depth = torch.arange(g + 1, 1, -1, device=ce.device)  # G + 1 - l
            return self._row_loss(final, y).mean() + (ce * depth).mean(0).sum()
        if phase == "gate":
            with torch.no_grad():
                a = self._joint_logits(levels)
                target, _ = self._targets(a, final, y)
            return gate_loss(self._gate_logits(a), target, self.pos_weights)
        a = self._joint_logits(levels)
        ce = self._row_loss(a, y)  # (L, B, G)
        plain = self._row_loss(self._plain_logits(levels), y)
        if self.im_weighting == "none":
            return ce.mean((1, 2)).sum() + plain.mean()
        with torch.no_grad():
            p = exit_distribution(self._gate_logits(a).sigmoid())
        if self.im_weighting == "single":
            every = torch.cat((ce, self._row_loss(final, y).expand(len(a), -1)[..., None]), -1)
            return every.gather(-1, first_exit(p)[..., None]).mean((1, 2)).sum() + plain.mean()
        return im_loss(ce, p[..., :-1]) + plain.mean()

    def epoch_end(self, validation: Iterable[Batch] | None) -> None:
        """Early stopping of the warm-up, pos-weights, and the best weights so far, all by ``validation``."""
        warm = bool(self.clock[0] == _WARMUP)
        self.clock[2] = self.clock[1].clone()
        self.clock[1] = 0
        if validation is None:
            return
        g = len(self.plan)
        counts = torch.zeros_like(self.pos_weights)
        score = torch.zeros_like(self.best_score)
        right = torch.zeros_like(self.best_accuracy)
        n = 0
        with torch.no_grad():
            for batch in validation:
                levels, final, y = self._inputs(batch)
                n += len(y)
                right += (self._plain_logits(levels).argmax(-1) == y[:, None]).sum(0)
                a = self._joint_logits(levels)
                _, best = self._targets(a, final, y)  # (L, B)
                hit = best[..., None] == torch.arange(g, device=best.device)
                counts += (hit if self.pos_weight == "code" else hit.cumsum(-1)).sum(1)
                ce = torch.cat((self._row_loss(a, y), self._row_loss(final, y).expand(len(a), -1)[..., None]), -1)
                value = ce + self._lambdas()[:, None, None] * self.costs
                exit_ = first_exit(exit_distribution(self._gate_logits(a).sigmoid()))
                score += value.gather(-1, exit_[..., None]).squeeze(-1).sum(1)
            if not n:
                raise ValueError("validation: it has no batches")
            self._keep_best(right / n, score / n, warm)
            if not warm:
                self.pos_weights.copy_(((n - counts) / counts.clamp_min(0.1)).clamp_max(5))
            elif self.frozen.all():
                self._begin_joint()

    def finish(self, train: Iterable[Batch]) -> None:
        """The best weights seen on validation, where there was any."""
        with torch.no_grad():
            self._restore_plain(self.best_accuracy >= 0)
            found = torch.isfinite(self.best_score)
            if found.any():
                self._set_joint(torch.where(found[:, None], self.best_joint, self._joint()))

    def cache(self, loader: Iterable[Batch], *, batch_size: int = 64, shuffle: bool = False) -> CachedFeatures:
        """Run the frozen network once over ``loader``; a re-iterable of batches for ``loss`` and ``epoch_end``."""
        rows, targets = [], []
        with torch.no_grad():
            for batch in loader:
                levels, final, y = self._inputs(batch)
                rows.append(torch.cat((*levels, final), 1))
                targets.append(y)
        if not rows:
            raise ValueError("loader: it has no batches")
        return CachedFeatures(torch.cat(rows), torch.cat(targets), batch_size, shuffle)

    # -- what it gives --------------------------------------------------------------------------------------------

    def curve(self, data: Iterable[Batch]) -> list[Outcome]:
        """Accuracy, mean relative cost and calibration error at every point, from one pass over ``data``."""
        seen: dict[Point, list[tuple[Tensor, ...]]] = {p: [] for p in self.points()}
        with torch.no_grad():
            for batch in data:
                levels, final, y = self._inputs(batch)
                plain, joint = self._plain_logits(levels), self._joint_logits(levels)
                exits = first_exit(exit_distribution(self._gate_logits(joint).sigmoid()))
                for k, a in enumerate((*plain.unbind(1), final)):
                    seen[Point(exit=k)].append(_judged(a, y, self.head_costs[0, k].expand(len(y))))
                for lam, w in enumerate(self.cost_weights):
                    a = _pick(joint[lam], final, exits[lam])
                    seen[Point(cost_weight=w)].append(_judged(a, y, self.costs[exits[lam]]))
        return [_outcome(point, parts) for point, parts in seen.items()]

    def conformal(self, validation: Iterable[Batch]) -> Conformal:
        """Conformal scores of every exit at the current setting, from ``validation``."""
        return _calibrated(self, validation, self._answers)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _index(self) -> int:
        return self.cost_weights.index(float(self.point["cost_weight"]))

    def _lambdas(self) -> Tensor:
        return torch.tensor(self.cost_weights, device=self.costs.device)

    def _feature(self, hidden: Tensor) -> Tensor:
        if self.feature is not None:
            z = self.feature(hidden)
        elif hidden.ndim >= 4:
            z = hidden.mean(tuple(range(2, hidden.ndim)))
        else:
            z = hidden[:, 0] if hidden.ndim == 3 else hidden
        if not isinstance(z, Tensor) or z.ndim != 2 or z.shape[0] != hidden.shape[0]:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"feature: gave {got} for a hidden state {tuple(hidden.shape)}; it must give (B, D)")
        return z.to(self.plain_weight[0].dtype) if hasattr(self, "plain_weight") else z

    def _everybody(self, l: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        a = F.linear(self._feature(hidden), self.plain_weight[l], self.plain_bias[l])
        return torch.ones_like(rows, dtype=torch.bool), a

    def _measure_costs(self) -> tuple[Tensor, Tensor]:
        """Relative costs by dispatch: of gated exits (G + 1,), and (2, G + 1) of static and of threshold exits."""
        g, c, n = len(self.plan), self.classes, rows_of(self.example)

        def flops(last: int, heads: bool) -> float:
            def visit(l: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
                _, a = self._everybody(l, hidden, rows)
                return torch.full_like(rows, l == last, dtype=torch.bool), a

            only = list(range(min(last + 1, g))) if heads else [last] if last < g else []
            with evaluating(self.model):
                return count_flops(lambda: self.plan.run(self.model, self.example, visit, only=only)).total / n

        # Statistics and gates are elementwise, which dispatch does not count: 9C + 6 multiply-adds for each gate
        # (C maximum, C + 1 margin, 2C entropy, 5C tempered entropy, 5 linear), C for a threshold.
        walk = torch.tensor([flops(k, True) for k in range(g + 1)], dtype=torch.float64)
        static = torch.tensor([flops(k, False) for k in range(g + 1)], dtype=torch.float64)
        passed = torch.arange(1, g + 2, dtype=torch.float64).clamp_max(g)
        gated = walk + 2 * (9 * c + 6) * passed
        device = device_of(self)
        others = torch.stack((static, walk + 2 * c * passed)) / gated[-1]
        return (gated / gated[-1]).float().to(device), others.float().to(device)

    def _inputs(self, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor]:
        """Features of every exit, (B, D_l) each, the network's own logits (B, C), and the targets."""
        x, y = split_batch(batch)
        device = self.head_bias.device
        x, y = to_device(x, device), row_classes(y, rows_of(x), "JEI-DNN").to(device)
        if isinstance(x, Mapping) and "exit_features" in x:
            levels, final = self._split(x["exit_features"])
            return levels, final, y
        with torch.no_grad():
            levels, final = self.plan.collect(self.model, x, self._feature)
        return levels, final, y

    def _split(self, features: Tensor) -> tuple[list[Tensor], Tensor]:
        width = sum(self.widths) + self.classes
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"exit_features: shape {tuple(features.shape)}; (B, {width}) as cache() gives")
        *levels, final = torch.split(features, [*self.widths, self.classes], 1)
        return levels, final

    def _plain_logits(self, levels: list[Tensor], skip_frozen: bool = False) -> Tensor:
        """(B, G, C) by the plain IMs; no gradient to those whose warm-up has stopped."""
        frozen = self.frozen.tolist() if skip_frozen else [False] * len(levels)
        parts = zip(levels, self.plain_weight, self.plain_bias, frozen, strict=True)
        return torch.stack([F.linear(z, w.detach(), b.detach()) if f else F.linear(z, w, b) for z, w, b, f in parts], 1)

    def _joint_logits(self, levels: list[Tensor]) -> Tensor:
        """(L, B, G, C) by the IMs of every cost weight."""
        parts = [torch.einsum("bd,lcd->lbc", z, w) for z, w in zip(levels, self.head_weight, strict=True)]
        return torch.stack(parts, 2) + self.head_bias[:, None]

    def _gate_logits(self, a: Tensor) -> Tensor:
        """(L, B, G, C) -> (L, B, G)."""
        return (uncertainty(a).to(self.gate_weight.dtype) * self.gate_weight[:, None]).sum(-1) + self.gate_bias[:, None]

    def _row_loss(self, a: Tensor, y: Tensor) -> Tensor:
        """Loss of (..., B, C) or (..., B, G, C) logits for each prediction, without the last dimension."""
        target = y if a.ndim == 2 else y[:, None].expand(a.shape[-4:-1] if a.ndim == 4 else a.shape[:-1])
        return _row_loss(a.reshape(-1, a.shape[-1]), target.reshape(-1), self.criterion).view(a.shape[:-1])

    def _targets(self, a: Tensor, final: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gate targets (L, B, G) and best exits (L, B) of joint logits (L, B, G, C)."""
        every = torch.cat((a, final[None, :, None].expand(len(a), -1, 1, -1)), 2)  # (L, B, G + 1, C)
        if self.gate_score == "ce":
            score = self._row_loss(every, y)
        elif self.gate_score == "error":
            score = (every.argmax(-1) != y[:, None]).float()
        else:
            top = every.softmax(-1).max(-1)
            score = -(top.values * (top.indices == y[:, None]))
        return gate_targets(score, self.costs, self._lambdas())

    # -- best weights ---------------------------------------------------------------------------------------------

    def _plain(self) -> Tensor:
        return torch.cat([p.detach().flatten() for pair in self._pairs() for p in pair])

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.plain_weight, self.plain_bias, strict=True)

    def _slices(self) -> list[slice]:
        ends = torch.tensor([self.classes * (d + 1) for d in self.widths]).cumsum(0).tolist()
        return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]

    def _restore_plain(self, which: Tensor) -> None:
        for k, (part, (w, b)) in enumerate(zip(self._slices(), self._pairs(), strict=True)):
            if which[k]:
                values = self.best_plain[part]
                w.copy_(values[: w.numel()].view_as(w))
                b.copy_(values[w.numel() :])

    def _joint_parameters(self) -> list[Tensor]:
        return [*self.head_weight, self.head_bias, self.gate_weight, self.gate_bias]

    def _joint(self) -> Tensor:
        return torch.cat([p.detach().flatten(1) for p in self._joint_parameters()], 1)  # (L, all)

    def _set_joint(self, values: Tensor) -> None:
        parameters = self._joint_parameters()
        parts = torch.split(values, [p[0].numel() for p in parameters], 1)
        for p, part in zip(parameters, parts, strict=True):
            p.copy_(part.view_as(p))

    def _copy_plain(self) -> None:
        for k, (w, b) in enumerate(self._pairs()):
            self.head_weight[k].data.copy_(w.data.expand_as(self.head_weight[k]))
            self.head_bias.data[:, k] = b.data

    def _keep_best(self, accuracy: Tensor, score: Tensor, warm: bool) -> None:
        better = accuracy > self.best_accuracy
        now = self._plain()
        for k, part in enumerate(self._slices()):
            if better[k] and not (warm and self.frozen[k]):
                self.best_plain[part] = now[part]
        self.best_accuracy.copy_(torch.where(better, accuracy, self.best_accuracy))
        if warm:
            self.stale.copy_(torch.where(better, 0, self.stale + 1))
            stopped = (self.stale >= self.patience) & ~self.frozen
            self._restore_plain(stopped)
            self.frozen.logical_or_(stopped)
        else:
            won = score < self.best_score
            self.best_joint.copy_(torch.where(won[:, None], self._joint(), self.best_joint))
            self.best_score.copy_(torch.where(won, score, self.best_score))

    def _begin_joint(self) -> None:
        """Best warm-up weights everywhere, all IMs free again, and the IMs of every cost weight start from them."""
        with torch.no_grad():
            self._restore_plain(self.best_accuracy >= 0)
            self._copy_plain()
            self.frozen.fill_(False)
            self.clock[0], self.clock[1] = _JOINT, 0

    def _decide_cached(self, features: Tensor) -> Decision:
        every, p, exit_ = self._answers(*self._split(features.to(self.head_bias.device)))
        cost = self.head_costs[0] if "exit" in self.point else self.costs
        a = every[torch.arange(len(every), device=every.device), exit_]
        return Decision(a, exit_, cost[exit_], _known_mass(p, exit_))

    def _answers(self, levels: list[Tensor], final: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of every exit (B, G + 1, C), exit probabilities (B, G + 1), exits (B,), at the current setting."""
        if "exit" in self.point:
            every = torch.cat((self._plain_logits(levels), final[:, None]), 1)
            exit_ = torch.full((len(final),), int(self.point["exit"]), device=final.device)
            return every, F.one_hot(exit_, len(levels) + 1).float(), exit_
        a = self._joint_logits(levels)
        lam = self._index()
        p = exit_distribution(self._gate_logits(a)[lam].sigmoid())
        return torch.cat((a[lam], final[:, None]), 1), p, first_exit(p)


class CachedFeatures:
    """Batches ``{"exit_features": (B, sum D_l + C), "labels": (B,)}`` of a frozen network, as often as wanted."""

    def __init__(self, features: Tensor, labels: Tensor, batch_size: int = 64, shuffle: bool = False) -> None:
        self.batch_size = check.whole("batch_size", batch_size, at_least=1)
        self.features, self.labels, self.shuffle = features, labels, check.boolean("shuffle", shuffle)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        n = len(self.labels)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        order = order.to(self.labels.device)
        for start in range(0, n, self.batch_size):
            rows = order[start : start + self.batch_size]
            yield {"exit_features": self.features[rows], "labels": self.labels[rows]}


# -- the equations, one function each ---------------------------------------------------------------------------------


def gate_targets(score: Tensor, costs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``t_l = 1[l >= l*]`` (L, B, G) and ``l* = argmin_l score_l + lambda IC_l`` (L, B), the lowest among equals.

    Args:
        score: (L, B, G + 1), of every exit and the end.
        costs: IC (G + 1,).
        weights: lambda (L,).
    """
    value = score + weights[:, None, None] * costs
    # argmin does not promise the first among equals; this does.
    best = (value == value.amin(-1, keepdim=True)).int().argmax(-1)
    depth = torch.arange(score.shape[-1] - 1, device=score.device)
    return (depth >= best[..., None]).to(score.dtype), best


def gate_loss(s: Tensor, target: Tensor, pos_weight: Tensor) -> Tensor:
    """Sum over cost weights of the weighted binary cross entropy of gate logits (L, B, G); pos_weight (L, G)."""
    m = torch.where(target > 0, pos_weight[:, None], 1.0)
    return F.binary_cross_entropy_with_logits(s, target, m, reduction="none").mean((1, 2)).sum()


def im_loss(ce: Tensor, p: Tensor) -> Tensor:
    """Sum over cost weights of ``mean_{b,l} r_b P_bl CE_bl`` for CE and P (L, B, G).

    ``r`` keeps the size of each sample's loss and is a constant: with its gradient the weighting would vanish. A sample
    that never leaves (P = 0 at every exit) contributes nothing.
    """
    weighted = (p * ce).sum(-1)
    r = (ce.sum(-1) / (weighted + _EPS)).detach()
    return (r * weighted).mean(1).sum() / ce.shape[-1]


# -- conformal sets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conformal:
    """Prediction sets that hold the true class with probability ``1 - alpha``, one quantile for each exit.

    ``scores`` (n, G + 1) are ``1 - p_y`` of every exit on the validation samples, ``exits`` (n,) where those left. An
    exit that at most 20 of them took uses the quantile over all samples.
    """

    net: JEIDNN | ThresholdExit
    scores: Tensor
    exits: Tensor

    def quantile(self, exit: int, alpha: float) -> float:
        """The score that bounds the set of a sample that left at ``exit``."""
        taken = self.exits == exit
        scores = self.scores[taken if taken.sum() > 20 else slice(None), exit]
        return conformal_quantile(scores, alpha)

    def predict_set(self, *args: Any, alpha: float = 0.05, **kwargs: Any) -> Tensor:
        """Classes (B, C) bool that stay possible for each input."""
        found = self.net.decide(*args, **kwargs)
        q = torch.tensor([self.quantile(k, alpha) for k in range(self.scores.shape[1])], device=found.logits.device)
        return 1 - found.logits.float().softmax(-1) <= q[found.exit, None]


def conformal_quantile(scores: Tensor, alpha: float) -> float:
    """Quantile ("higher") of scores (n,) at level ``ceil((n + 1)(1 - alpha)) / n``, at most 1."""
    n = len(scores)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: {alpha} is not allowed; between 0 and 1")
    if not n:
        raise ValueError("scores: there are none")
    k = min(math.ceil((n + 1) * (1 - alpha) - 1e-9), n)
    return scores.sort().values[-(-k * (n - 1) // n)].item()


# -- the opponents ----------------------------------------------------------------------------------------------------


class ThresholdExit(Dynamic):
    """Confidence thresholds on the plain IMs of a ``JEIDNN``: the usual early exit, for comparison.

    A sample leaves at the first exit whose largest probability reaches the threshold of that exit. Thresholds are
    chosen on validation for each target cost: ``rule="confidence"`` takes one threshold for all exits;
    ``rule="shares"`` sends shares ``p_k ~ rho^k`` of the samples to the exits, as MSDNet does (Huang et al., 2018).

    Args:
        net: the network, whose frozen model and plain IMs are shared.
        rule: "confidence" or "shares".
        target_costs: mean relative cost of each setting, in the unit of ``net.costs``.
    """

    thresholds: Tensor

    def __init__(
        self, net: JEIDNN, *, rule: str = "confidence", target_costs: Sequence[float] = (0.4, 0.6, 0.8)
    ) -> None:
        super().__init__()
        self.net: JEIDNN = check.instance("net", net, JEIDNN)
        self.rule: Rule = check.choice("rule", rule, Rule)
        self.target_costs = tuple(sorted(check.sequence("target_costs", target_costs, _relative_cost)))
        check.distinct("target_costs", self.target_costs)
        shape = len(self.target_costs), len(net.plan)
        self.register_buffer("thresholds", torch.full(shape, math.nan, device=device_of(net)))
        self.point = self.points()[-1]

    def points(self) -> list[Point]:
        """One for each target cost."""
        return [Point(target_cost=t) for t in self.target_costs]

    def loss(self, batch: Batch) -> Tensor:
        """The mean cross entropy of the plain IMs."""
        levels, _, y = self.net._inputs(batch)
        return self.net._row_loss(self.net._plain_logits(levels), y).mean()

    def epoch_end(self, validation: Iterable[Batch] | None) -> None:
        """``calibrate`` where there is validation data."""
        if validation is not None:
            self.calibrate(validation)

    def calibrate(self, validation: Iterable[Batch]) -> Self:
        """Choose the thresholds of every target cost on ``validation`` and return self."""
        net = self.net
        parts = []
        with torch.no_grad():
            for batch in validation:
                levels, _, _ = net._inputs(batch)
                parts.append(net._plain_logits(levels).softmax(-1).amax(-1))
            if not parts:
                raise ValueError("validation: it has no batches")
            confidence = torch.cat(parts)  # (n, G)
            if not bool(torch.isfinite(confidence).all()):
                raise ValueError("validation: the predictions on it are NaN or infinite")
            candidates = _one_threshold(confidence) if self.rule == "confidence" else _shares(confidence)
            costs = torch.stack([net.head_costs[1][_first_over(confidence, t)].mean() for t in candidates])
            for i, target in enumerate(self.target_costs):
                self.thresholds[i] = candidates[int((costs - target).abs().argmin())]
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as the network's own
    def forward(self, *args: Any, exit_features: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Logits (B, C) at the current setting."""
        return self.decide(*args, exit_features=exit_features, **kwargs).logits

    def decide(self, *args: Any, exit_features: Tensor | None = None, **kwargs: Any) -> Decision:
        """Logits, exits and relative costs; the exit probabilities are 0 or 1."""
        net, bars = self.net, self._bars()
        if exit_features is not None:
            every, p, exit_ = self._answers(*net._split(exit_features.to(bars.device)))
            a = every[torch.arange(len(every), device=every.device), exit_]
            return Decision(a, exit_, net.head_costs[1][exit_], p)

        def visit(l: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
            _, a = net._everybody(l, hidden, rows)
            return a.softmax(-1).amax(-1) >= bars[l], a

        x = packed(args, kwargs)
        answer = net.plan.run(net.model, x, visit, net.compact)
        return Decision(*answer, net.head_costs[1][answer.exit], F.one_hot(answer.exit, len(bars) + 1).float())

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """Raises NotStaticError: each sample takes an exit of its own."""
        raise NotStaticError(self._known(point), "each sample leaves where its confidence reaches the threshold")

    def curve(self, data: Iterable[Batch]) -> list[Outcome]:
        """Accuracy, mean relative cost and calibration error at every point."""
        cached = [self.net._inputs(batch) for batch in data]
        before, found = self.point, []
        try:
            with torch.no_grad():
                for point in self.points():
                    self.use(point)
                    parts = []
                    for levels, final, y in cached:
                        every, _, exit_ = self._answers(levels, final)
                        a = every[torch.arange(len(y), device=y.device), exit_]
                        parts.append(_judged(a, y, self.net.head_costs[1][exit_]))
                    found.append(_outcome(point, parts))
        finally:
            self.use(before)
        return found

    def conformal(self, validation: Iterable[Batch]) -> Conformal:
        """Conformal scores of every exit at the current setting, from ``validation``."""
        return _calibrated(self, validation, self._answers)

    def _bars(self) -> Tensor:
        bars = self.thresholds[self.target_costs.index(float(self.point["target_cost"]))]
        if bars.isnan().any():
            raise RuntimeError("ThresholdExit has no thresholds yet: call calibrate(validation) first")
        return bars

    def _answers(self, levels: list[Tensor], final: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain = self.net._plain_logits(levels)
        exit_ = _first_over(plain.softmax(-1).amax(-1), self._bars())
        return torch.cat((plain, final[:, None]), 1), F.one_hot(exit_, len(levels) + 1).float(), exit_


def _first_over(confidence: Tensor, bars: Tensor) -> Tensor:
    over = torch.cat((confidence >= bars, torch.ones_like(confidence[:, :1], dtype=torch.bool)), 1)
    return over.int().argmax(1)


def _one_threshold(confidence: Tensor) -> list[Tensor]:
    """The same bar at all exits, at 400 levels that the validation samples themselves mark."""
    levels = torch.quantile(confidence.flatten()[: 1 << 23], torch.linspace(0, 1, 400, device=confidence.device))
    return [level.expand(confidence.shape[1]) for level in torch.cat((levels, levels.new_tensor([1.1])))]


def _shares(confidence: Tensor) -> list[Tensor]:
    """Bars that send a share ``~ rho^k`` of the samples to exit k, k = 0..G, for 200 values of rho."""
    n, g = confidence.shape
    found = []
    for rho in torch.logspace(-2, 2, 200).tolist():
        share = torch.tensor([rho**k for k in range(g + 1)], dtype=torch.float64)
        wanted = (share / share.sum() * n).round().long().tolist()
        here = torch.ones(n, dtype=torch.bool, device=confidence.device)
        bars = []
        for k in range(g):
            left = confidence[here, k].sort(descending=True).values
            count = min(wanted[k], len(left))
            bars.append(left[count - 1] if count else confidence.new_tensor(1.1))
            here = here & (confidence[:, k] < bars[-1])
        found.append(torch.stack(bars))
    return found


# -- small things -----------------------------------------------------------------------------------------------------


def _at_least_zero(name: str, value: Any) -> float:
    return check.number(name, value, at_least=0)


def _relative_cost(name: str, value: Any) -> float:
    return check.number(name, value, above=0, at_most=1)


def _nobody(l: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    raise AssertionError("the whole network has no exits to visit")


def _row_loss(a: Tensor, y: Tensor, criterion: Criterion | None) -> Tensor:
    if criterion is not None:
        found = criterion(a, y)
        if not found.ndim and len(y) > 1:  # a mean over the batch, as most criteria give it: of each row by itself
            found = torch.func.vmap(lambda row, target: criterion(row[None], target[None]))(a, y)
        if found.shape != y.shape:
            raise ValueError(f"criterion: gave {tuple(found.shape)}; one loss for each of {len(y)} rows")
        return found
    try:
        return F.cross_entropy(a, y, reduction="none")
    except IndexError:
        raise ValueError(
            f"target: labels run from {int(y.min())} to {int(y.max())}, but the model has {a.shape[1]} outputs"
        ) from None


def _known_mass(p: Tensor, exit_: Tensor) -> Tensor:
    """Exit probabilities as far as they were computed; the rest of the mass in the last column."""
    g = p.shape[1] - 1
    known = p[:, :g] * (torch.arange(g, device=p.device) <= exit_[:, None])
    return torch.cat((known, (1 - known.sum(1, keepdim=True)).clamp_min(0)), 1)


def _pick(joint: Tensor, final: Tensor, exit_: Tensor) -> Tensor:
    return torch.cat((joint, final[:, None]), 1)[torch.arange(len(final), device=final.device), exit_]


def _judged(a: Tensor, y: Tensor, cost: Tensor) -> tuple[Tensor, ...]:
    top = a.float().softmax(-1).max(-1)
    return top.values, top.indices == y, cost


def _outcome(point: Point, parts: list[tuple[Tensor, ...]]) -> Outcome:
    if not parts:
        raise ValueError("data: it has no batches")
    confidence, right, cost = (torch.cat(column) for column in zip(*parts, strict=True))
    ece = calibration_error(confidence, right, min(15, len(right)))
    return Outcome(point, right.float().mean().item(), cost.mean().item(), ece)


def _calibrated(
    net: JEIDNN | ThresholdExit,
    validation: Iterable[Batch],
    answers: Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor, Tensor]],
) -> Conformal:
    inner = net.net if isinstance(net, ThresholdExit) else net
    scores, exits = [], []
    with torch.no_grad():
        for batch in validation:
            levels, final, y = inner._inputs(batch)
            every, _, exit_ = answers(levels, final)
            p = every.softmax(-1).gather(-1, y[:, None, None].expand(*every.shape[:2], 1)).squeeze(-1)
            scores.append(1 - p)
            exits.append(exit_)
    if not scores:
        raise ValueError("validation: it has no batches")
    # The setting may be turned later; the sets belong to the one that was calibrated.
    return Conformal(net, torch.cat(scores), torch.cat(exits))


def _truncated(net: JEIDNN, k: int) -> nn.Module:
    """``model`` up to exit k, ``feature`` and the plain IM, as a graph of PyTorch operations."""
    names = list(net.example) if isinstance(net.example, Mapping) else []

    class Truncated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net.model  # and no copy, since ``feature`` may speak of its modules
            self.head = nn.Linear(net.widths[k], net.classes, device=net.head_bias.device, dtype=net.head_bias.dtype)
            self.head.load_state_dict({"weight": net.plain_weight[k], "bias": net.plain_bias[k]})

        def forward(self, *tensors: Tensor) -> Tensor:
            # The model runs to its end: the tracer loses count when a forward pass is cut off. What follows the exit
            # is dead code, removed below.
            reached: list[Tensor] = []
            block = self.model.get_submodule(net.plan.names[k])
            handle = block.register_forward_hook(lambda module, given, output: reached.append(hidden_of(output)))
            try:
                call(self.model, dict(zip(names, tensors, strict=True)) if names else tensors)
            finally:
                handle.remove()
            z: Tensor = self.head(net._feature(reached[0]))
            return z

    # Three rows: sizes 0 and 1 would be fixed in the graph.
    n = rows_of(net.example)
    x = take(net.example, torch.arange(3, device=net.head_bias.device) % n)
    values = list(x.values()) if isinstance(x, Mapping) else list(x) if isinstance(x, tuple | list) else [x]
    local = Truncated().eval()
    shapes = {"tensors": tuple({0: torch.export.Dim.DYNAMIC} for _ in values)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter warns of its own deprecated internals
        program = torch.export.export(local, tuple(values), dynamic_shapes=shapes, strict=False)
        program = program.run_decompositions({})  # in-place operations become plain ones, so that dead code is dead
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    graph = module.graph
    graph.set_codegen(torch.fx.graph.CodeGen())  # a plain signature: the input's own names, one tensor out
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        node.target = node.name = names[i] if names else "x" if len(values) == 1 else f"x{i}"
    (end,) = graph.find_nodes(op="output")
    end.args = (end.args[0][0],)
    # Dropout in evaluation mode and shape checks count as effects; none of them is one here.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    # A new module takes over only what the graph mentions: the blocks after the exit stay behind.
    small = torch.fx.GraphModule(module, graph, "Truncated")
    small.meta.clear()  # remarks of the tracer about the whole model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(small).requires_grad_(True).eval()
