"""``SelfExpanding``: a network that grows while it trains, under the contract of ``Dynamic``.

SENN, arXiv:2307.04526; SECNN, arXiv:2401.05686. The package's docstring has the equations and the decisions. Here is
what joins the chapters: which additions are looked at (``candidates``), which one is made (the rules), how the network
before it is kept as a stage, how the optimiser follows, what a file needs.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Optimizer

from pliant.core import check
from pliant.core.cost import count_parameters, flops_per_sample
from pliant.core.dynamic import Dynamic, Point, Value, inner_optimizer
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    check_example,
    device_of,
    packed,
    rows_of,
    split_batch,
    take,
    to_device,
)
from pliant.core.objective import Criterion, loss
from pliant.elastic.self_expanding.proposals import INITS, Candidate, Expansion, Proposal, propose
from pliant.elastic.self_expanding.scores import (
    METRICS,
    SCORES,
    Geometry,
    Seen,
    counted_rows,
    criterion_of,
    diag_score,
    geometry_of,
    gram_score,
    keeping_random_state,
    layer_moments,
    moments_of,
    observe,
    penalised,
    sample_rows,
)
from pliant.elastic.self_expanding.surgery import (
    Change,
    Fresh,
    Rational,
    Site,
    absorb,
    added_parameters,
    apply_op,
    as_lists,
    bounded,
    check_state,
    edits_of,
    fill,
    find_sites,
    grow_state,
    is_read_twice,
    join_groups,
    make_unit,
    replace_module,
    split_linear,
)

CAPACITIES = ("parameters", "flops", "units", "layers")


@dataclass
class _Base:
    """eta of the present network, w of its rows, and their Gram matrix (the exact score alone)."""

    eta: float
    cotangent: Tensor | None = None
    gram: Tensor | None = None


class SelfExpanding(Dynamic):
    """A network that grows while it trains; one point for each stage of its growth.

    Args:
        model: your network; it is wrapped, not copied, and grows in place.
        example: an input for it, of any number of rows.
        rule: ``"senn"`` or ``"secnn"``, the decision rules of the module's docstring.
        score: ``"kfac"``, ``"diag"`` or ``"exact"``.
        metric: the ``"empirical"`` Fisher, or the one of the ``"output"``.
        actions: ``"units"``, ``"layers"``, or both.
        tau: least ratio of the scores after and before; 1.15, with ``rule="secnn"`` 2.
        alpha: least increase relative to the score's bound (``rule="senn"`` alone).
        units: channels or neurons in one addition.
        every: a check at every so many calls of ``maybe_expand`` (``fit`` makes one after each epoch).
        cooldown: calls after an expansion in which nothing grows; 0, with ``rule="secnn"`` 10.
        per_check: most expansions at one check; None repeats until none is accepted, as SENN does, whose checks are
            10 to 30 epochs apart.
        capacity: limits: ``"parameters"`` and ``"flops"`` (per sample) of the network, ``"units"`` of one coupled set
            of channels, ``"layers"`` added at one place.
        init: incoming weights of new units: ``"optimized"``, ``"mala"``, ``"random"``, ``"noise"``; the first, with
            ``rule="secnn"`` ``"noise"``.
        proposals: sets of new units that are tried at each place.
        proposal_steps: steps of their optimisation.
        proposal_lr: Adam's learning rate, or MALA's first step size, for directions that start as N(0, 1).
        temperature: of MALA's target exp(Delta' / (temperature eta_l)).
        noise: spread of incoming weights with ``init="noise"``.
        increase: ``"bound"`` decides by Delta', ``"schur"`` by the exact Delta (K-FAC alone).
        identity: new layers are ``"dirac"``, or SENN's ``"split"`` (K-FAC, Linear layers alone).
        activation: behind a dirac layer, ``"prelu"`` or ``"leaky"``; a split has a rational unit.
        slope: where the slope of ``"leaky"`` goes from 1, over the checks of the cooldown.
        kernel: of new convolutions, an odd number.
        layer_cost: divides the ratio of layers (``rule="senn"``).
        layers_behind: names of modules (fnmatch patterns) behind which layers may be added; in front of every layer
            that reads a growing set of channels by default.
        sites: patterns of the sets of channels that may be widened; all by default.
        penalty: lambda of exp(-lambda dp^2) (``rule="secnn"``).
        damping: of K-FAC's S in units of its mean diagonal.
        eps: of the score "diag"; with "exact" it is the damping.
        score_samples: training samples kept for the next check.
        score_data: a batch to score instead, such as the first 512 training images.
        exclude: names of modules (fnmatch patterns) that must not be touched.
        seed: of the proposals; those of check number n are a function of (seed, n).
        criterion: ``criterion(output, target)``: a mean over samples, or one loss for each; cross entropy by default.

    Shapes: whatever the model takes and returns.

    Raises:
        ValueError: an argument is not allowed; the model has nothing that can grow, or shares weights where it would;
            a capacity lies below the present size.
    """

    clock: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        rule: Literal["senn", "secnn"] = "senn",
        score: Literal["kfac", "diag", "exact"] = "kfac",
        metric: Literal["empirical", "output"] = "empirical",
        actions: Sequence[str] = ("units", "layers"),
        tau: float | None = None,
        alpha: float = 2.5e-3,
        units: int = 2,
        every: int = 1,
        cooldown: int | None = None,
        per_check: int | None = 1,
        capacity: Mapping[str, int] | None = None,
        init: Literal["optimized", "mala", "random", "noise"] | None = None,
        proposals: int = 64,
        proposal_steps: int = 30,
        proposal_lr: float = 0.05,
        temperature: float = 1.0,
        noise: float = 1e-4,
        increase: Literal["bound", "schur"] = "bound",
        identity: Literal["dirac", "split"] = "dirac",
        activation: Literal["prelu", "leaky"] = "prelu",
        slope: float = 0.2,
        kernel: int = 3,
        layer_cost: float = 20.0,
        layers_behind: Sequence[str] | None = None,
        sites: Sequence[str] | None = None,
        penalty: float = 0.0,
        damping: float = 0.1,
        eps: float | None = None,
        score_samples: int = 512,
        score_data: Batch | None = None,
        exclude: Sequence[str] = (),
        seed: int = 0,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        check.module("model", model)
        check.choice("rule", rule, ("senn", "secnn"))
        secnn_rule = rule == "secnn"
        check.choice("score", score, SCORES)
        check.choice("metric", metric, METRICS)
        check.choices("actions", actions, ("units", "layers"))
        if not (isinstance(tau, float) and tau == math.inf):  # at which nothing grows
            check.optional(check.number, "tau", tau, at_least=0)
        check.number("alpha", alpha)
        check.whole("units", units, at_least=1, at_most=10_000)
        check.whole("every", every, at_least=1)
        check.optional(check.whole, "cooldown", cooldown, at_least=0)
        check.optional(check.whole, "per_check", per_check, at_least=1)
        check.optional(check.mapping, "capacity", capacity, lambda n, v: check.whole(n, v, at_least=0, at_most=10**18))
        check.optional(check.choice, "init", init, INITS)
        check.whole("proposals", proposals, at_least=1, at_most=100_000)
        check.whole("proposal_steps", proposal_steps, at_least=0)
        check.number("proposal_lr", proposal_lr, at_least=0)
        check.positive("temperature", temperature)
        check.number("noise", noise, at_least=0)
        check.choice("increase", increase, ("bound", "schur"))
        check.choice("identity", identity, ("dirac", "split"))
        check.choice("activation", activation, ("prelu", "leaky"))
        check.number("slope", slope, at_least=0)
        check.whole("kernel", kernel, at_least=1, at_most=1001)
        check.positive("layer_cost", layer_cost)
        check.optional(check.names, "layers_behind", layers_behind)
        check.optional(check.names, "sites", sites)
        check.number("penalty", penalty, at_least=0)
        check.number("damping", damping, at_least=0)
        check.optional(check.number, "eps", eps, at_least=0)
        check.whole("score_samples", score_samples, at_least=1, at_most=10**9)
        if score_data is not None:
            check.instance("score_data", score_data, tuple, list, Mapping, allowed="a batch, or None")
            if not isinstance(score_data, Mapping) and len(score_data) != 2:
                raise check.wrong("score_data", score_data, "a batch (input, target), or a mapping with 'labels'")
            if isinstance(score_data, Mapping) and "labels" not in score_data:
                raise check.wrong("score_data", score_data, "a batch (input, target), or a mapping with 'labels'")
        check.names("exclude", exclude)
        check.seed("seed", seed)
        self._criterion = criterion_of(criterion)
        if kernel % 2 == 0:
            raise check.wrong("kernel", kernel, "an odd number, which has a centre")
        self.init = init if init is not None else "noise" if secnn_rule else "optimized"
        self.tau = float(tau) if tau is not None else 2.0 if secnn_rule else 1.15
        self.cooldown = cooldown if cooldown is not None else 10 if secnn_rule else 0
        self.per_check = per_check
        self.eps = float(eps) if eps is not None else 1e-3 if score == "exact" else 1e-5
        if identity == "split" and score != "kfac":
            raise ValueError("identity: 'split' changes the weights of the layer behind; use score='kfac'")
        if increase == "schur" and score != "kfac":
            raise ValueError("increase: 'schur' belongs to score='kfac'")
        self.rule, self.score, self.metric, self.actions = rule, score, metric, tuple(actions)
        self.alpha, self.units, self.every = alpha, units, every
        self.capacity = dict(capacity or {})
        self.proposals, self.proposal_steps, self.proposal_lr = proposals, proposal_steps, proposal_lr
        self.temperature, self.noise, self.increase = temperature, noise, increase
        self.identity, self.activation, self.slope, self.kernel = identity, activation, slope, kernel
        self.layer_cost, self.penalty, self.damping = layer_cost, penalty, damping
        self.layers_behind = None if layers_behind is None else tuple(layers_behind)
        self.sites = None if sites is None else tuple(sites)
        self.score_samples, self.score_data, self.exclude = score_samples, score_data, tuple(exclude)
        self.seed, self.criterion = seed, criterion
        check_example(model, example)
        self.example = example
        self.model = model
        self.stages = nn.ModuleList()  # the networks before each expansion
        self.register_buffer("clock", torch.zeros(2, dtype=torch.int64))  # calls so far, call of the last expansion
        self.ops: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self._trained: list[set[str]] = []  # of every stage, the names of its trainable parameters
        self._wrappers: set[str] = set()
        self._added_units: list[nn.Module] = []  # where they are in the model is looked up
        self._found: list[Site] | None = None
        self._recent: list[tuple[Input, Any]] = []
        self._attached: weakref.ref[Optimizer] | None = None
        if not self.growing():
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[:4])
            raise ValueError(
                "model: it has no hidden channels that can be widened, made and read by Linear or Conv2d layers whose "
                f"successors are known{f' ({reasons})' if reasons else ''}"
            )
        self._check_capacity()
        self.point = self.points()[-1]

    # -- the contract -------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """``stage=0`` (the start), ..., ``stage=n`` after n expansions, the live network."""
        return [Point(stage=i) for i in range(len(self.stages) + 1)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the stage in use; it takes what the model takes."""
        return call(self._network(self.point), packed(args, kwargs))

    def loss(self, batch: Batch) -> Tensor:
        """The criterion of the live network on one batch (a scalar), whatever stage is in use."""
        x, y = split_batch(batch)
        value = loss(call(self.model, x), y, self._criterion)
        if self.training and self.score_data is None:
            self._remember(x, y)
        return value.mean() if value.ndim else value

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The plain network of a stage, with weights of its own, in evaluation mode."""
        known = self._known(point)
        network = copy.deepcopy(self._network(known))
        stage = int(known["stage"])
        for name, parameter in network.named_parameters():
            parameter.grad = None
            if stage < len(self.stages):  # kept frozen; as it was while it was trained
                parameter.requires_grad_(name in self._trained[stage])
        for name, module in list(network.named_modules()):
            if isinstance(module, Rational):  # as a module of torch's own
                replace_module(network, name, torch.fx.symbolic_trace(module))
        return network.eval()

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Expansions from now on keep ``optimizer`` valid; ``fit`` calls this, a loop of your own may, once.

        It is not kept alive, and copies of this network, pickled ones too, do not know it. Where an expansion is made
        and no optimiser is known, none is patched: build a new one then.

        Raises:
            TypeError: it is no optimiser.
        """
        self._attached = weakref.ref(inner_optimizer(optimizer))

    def __getstate__(self) -> dict[str, Any]:
        """The state without the optimiser, for ``copy.deepcopy`` and pickle."""
        return self.__dict__ | {"_attached": None}

    def epoch_end(self, validation: Iterable[Batch] | None) -> None:
        """A check for an expansion, on training samples."""
        if self._recent or self.score_data is not None:
            self.maybe_expand()

    def finish(self, train: Iterable[Batch]) -> None:
        """Training is over: forget the samples."""
        self._recent = []

    def train(self, mode: bool = True) -> SelfExpanding:
        """Training mode for the live network; earlier stages stay in evaluation mode."""
        super().train(mode)
        self.stages.eval()
        return self

    def structure(self) -> dict[str, Any]:
        """The expansions made, the log, the slopes of LeakyReLUs, and in training the samples for the next check."""
        networks = [*self.stages, self.model]
        slopes = [
            {n: m.negative_slope for n, m in net.named_modules() if isinstance(m, nn.LeakyReLU)} for net in networks
        ]
        samples = [[x, y] for x, y in self._recent] if self.training else []
        return {
            "ops": copy.deepcopy(self.ops), "history": copy.deepcopy(self.history), "slopes": slopes,
            "samples": samples,
        }  # fmt: skip

    def restructure(self, structure: dict[str, Any]) -> None:
        """Make the same expansions again, without their weights.

        Raises:
            ValueError: this network has grown in another way.
        """
        ops = structure["ops"]
        if ops[: len(self.ops)] != self.ops:
            raise ValueError("structure: this network has grown in another way; build it anew from a fresh model")
        newest = self.point == self.points()[-1]
        optimizer = self._known_optimizer(None)  # the caller's own, where ``fit`` resumes with it
        for op in ops[len(self.ops) :]:
            self._snapshot()
            changes, fresh, _ = self._restructured(op)
            if optimizer is not None:
                grow_state(optimizer, changes)
                join_groups(optimizer, fresh)
            self.ops.append(copy.deepcopy(op))
        events = check.sequence("history", structure["history"], lambda n, v: check.instance(n, v, dict), empty=True)
        self.history = [copy.deepcopy(event) for event in events]
        self._recent = [(x, y) for x, y in structure.get("samples", [])]
        for network, slopes in zip([*self.stages, self.model], structure["slopes"], strict=True):
            for name, slope in slopes.items():
                cast(nn.LeakyReLU, network.get_submodule(name)).negative_slope = float(slope)
        self._found = None
        if newest:
            self.point = self.points()[-1]

    # -- what may grow ------------------------------------------------------------------------------------------

    def growing(self) -> list[Site]:
        """The sets of channels that can be widened; ``skipped`` tells of the others why not."""
        if self._found is None:
            self._found, self.skipped = find_sites(self.model, self.example, self.exclude, self.sites)
        return list(self._found)

    def _check_capacity(self) -> None:
        for name in self.capacity:
            if name not in CAPACITIES:
                raise ValueError(f"capacity: unknown {name!r}; allowed: {', '.join(CAPACITIES)}")
        now: dict[str, int] = {"parameters": count_parameters(self.model)}
        if "flops" in self.capacity:
            now["flops"] = self._flops(self.model)
        now["units"] = max(site.channels for site in self.growing())
        for name, value in now.items():
            if name in self.capacity and self.capacity[name] < value:
                raise ValueError(f"capacity: {name} {self.capacity[name]} is below the present size, {value}")
        if self.tau <= 1 and self.per_check is None and not set(self.capacity) & {"parameters", "flops", "units"}:
            raise ValueError(
                f"tau: at {self.tau} all is accepted; give a capacity in parameters, flops or units, or per_check"
            )

    def _flops(self, network: nn.Module) -> int:
        x = to_device(take(self.example, slice(0, 1)), device_of(network))
        return flops_per_sample(network, x).total

    def _fits(self, op: dict[str, Any], added: int, sites: Sequence[Site]) -> bool:
        """Whether the network stays within its capacity with one more ``op``."""
        if count_parameters(self.model) + added > self.capacity.get("parameters", math.inf):
            return False
        if op["kind"] == "units" and any(
            s.channels + op["count"] > self.capacity.get("units", math.inf) for s in sites
        ):
            return False
        if op["kind"] == "layer" and self._layers_at(op) >= self.capacity.get("layers", math.inf):
            return False
        if "flops" in self.capacity:
            trial = copy.deepcopy(self.model)
            apply_op(trial, op, set(self._wrappers))
            return self._flops(trial) <= self.capacity["flops"]
        return True

    def _layers_at(self, op: Mapping[str, Any]) -> int:
        """Layers that were added at the same place."""
        where = op["where"]
        path = where if op["place"] == "behind" else where.rpartition(".")[0]
        if path not in self._wrappers:
            return 0
        return len(cast(nn.Sequential, self.model.get_submodule(path))) - 1

    def _blocks(self) -> list[list[Site]]:
        """What is widened together: single sites; in SECNN those that are joined by added layers."""
        sites = self.growing()
        if self.rule == "senn":
            return [[s] for s in sites if not s.layer_norm]
        added = {id(m) for m in self._added_units}
        names = {n for n, m in self.model.named_modules() if id(m) in added}
        blocks: list[list[Site]] = []
        for site in sites:
            links = {s.module for s in (*site.producers, *site.consumers) if s.module.rpartition(".")[0] in names}
            joined = [b for b in blocks if any(_touches(other, links) for other in b)]
            blocks = [b for b in blocks if b not in joined] + [[s for b in joined for s in b] + [site]]
        # A layer that reads two of the sets side by side cannot grow for both at once.
        blocks = [part for b in blocks for part in ([[s] for s in b] if is_read_twice(b) else [b])]
        for block in blocks:  # named by the site that was there first
            block.sort(key=lambda s: any(p.module.rpartition(".")[0] in names for p in s.producers))
        return [b for b in blocks if not any(s.layer_norm for s in b)]

    # -- checks -------------------------------------------------------------------------------------------------

    def maybe_expand(
        self, data: Batch | Iterable[Batch] | None = None, *, optimizer: Optimizer | None = None
    ) -> Expansion | None:
        """Ask whether an addition is worth it, and make it; call it once after each epoch (``fit`` does).

        Args:
            data: a batch, or batches of which the first ``score_samples`` samples are taken; by default ``score_data``,
                or else the last training samples that ``loss`` saw.
            optimizer: the one to keep valid; by default the one of ``attach_optimizer`` (``fit`` attaches its own).
                With neither, no optimiser is patched.

        Returns:
            the last expansion made, or None; ``history`` has them all, and what was turned down.

        Raises:
            ValueError: there is nothing to score, a score is not finite, or the optimiser's state cannot be extended.
        """
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            raise RuntimeError("growth in several processes is not supported: train in one, or use a stage as it is")
        known = self._known_optimizer(optimizer)
        batch = self._score_batch(data)
        recent, clock, slopes = self._recent, self.clock.clone(), [a.negative_slope for a in self._leaky()]
        try:
            return self._maybe(batch, known)
        except BaseException:  # the next call asks the same question again
            self._recent = recent
            self.clock.copy_(clock)
            for act, slope in zip(self._leaky(), slopes, strict=False):
                act.negative_slope = slope
            raise

    def _maybe(self, batch: tuple[Input, Any], known: Optimizer | None) -> Expansion | None:
        self._recent = []
        self.clock[0] += 1
        calls, last = int(self.clock[0]), int(self.clock[1])
        self._decay_slopes()
        if calls % self.every or (last and calls - last <= self.cooldown):
            return None
        made: Expansion | None = None
        tried = 0
        while self.per_check is None or tried < self.per_check:
            found = self._check(batch, known, tried)
            if found is None:
                break
            made, tried = found, tried + 1
            self.clock[1] = calls
        return made

    def _known_optimizer(self, given: Optimizer | None) -> Optimizer | None:
        """The optimiser ``given``, else the one attached while it lives."""
        if given is not None:
            known = inner_optimizer(given)
        elif self._attached is None or (alive := self._attached()) is None:
            return None
        else:
            known = alive
        own = {id(p) for p in self.model.parameters()}
        if not any(id(p) in own for g in known.param_groups for p in g["params"]):
            raise ValueError("optimizer: it holds no parameter of this network")
        return known

    def _score_batch(self, data: Batch | Iterable[Batch] | None) -> tuple[Input, Any]:
        source: Any = data if data is not None else self.score_data
        parts: list[tuple[Input, Any]] = []
        if source is None:
            parts = list(self._recent)
        elif (isinstance(source, Mapping) and "labels" in source) or (
            isinstance(source, tuple | list) and len(source) == 2 and not isinstance(source[0], tuple | list)
        ):
            parts = [split_batch(source)]
        else:
            rows = 0
            for batch in cast("Iterable[Batch]", source):
                parts.append(split_batch(batch))
                rows += rows_of(parts[-1][0])
                if rows >= self.score_samples:
                    break
        if not parts:
            raise ValueError("data: no samples to score; give a batch, or train with net.loss(batch) before")
        x, y = _joined([x for x, _ in parts]), _joined([y for _, y in parts])
        kept = slice(-self.score_samples, None) if source is None else slice(0, self.score_samples)
        device = device_of(self.model)
        return counted_rows(to_device(take(x, kept), device), to_device(take(y, kept), device))

    def _remember(self, x: Input, y: Any) -> None:
        self._recent.append((x, y))
        while sum(rows_of(a) for a, _ in self._recent[1:]) >= self.score_samples:
            self._recent.pop(0)

    def _check(self, batch: tuple[Input, Any], optimizer: Optimizer | None, turn: int) -> Expansion | None:
        """One question: score all candidates, write the log, make the best one if it is accepted."""
        eta, seen, candidates = self.candidates(batch, turn=turn)
        largest = float(seen.outer.flatten(1).square().sum(1).mean()) if self.metric == "output" else 1.0
        for c in candidates:
            if not (math.isfinite(c.delta) and math.isfinite(c.reference)):
                raise ValueError(f"score: the increase by {c.kind} at {c.where!r} is {c.delta} over {c.reference}")
        best, accepted, reason = self._decide(eta, candidates, largest)
        entry: dict[str, Any] = {
            "check": int(self.clock[0]), "stage": len(self.stages), "eta": eta,
            "best": None if best is None else eta + best.delta, "delta": None if best is None else best.delta,
            "reference": None if best is None else best.reference,
            "ratio": None if best is None or not math.isfinite(self._ratio(eta, best)) else self._ratio(eta, best),
            "kind": None if best is None else best.kind, "where": None if best is None else best.where,
            "accepted": accepted, "reason": reason, "parameters": count_parameters(self.model),
        }  # fmt: skip
        if best is not None and accepted:
            self._make(best, seen, optimizer)
            entry["parameters"] = count_parameters(self.model)
        self.history.append(entry)
        if best is None or not accepted:
            return None
        return Expansion(
            best.kind, best.where, eta, eta + best.delta, self._ratio(eta, best), best.added, len(self.stages)
        )

    def _ratio(self, eta: float, candidate: Candidate) -> float:
        if self.rule == "senn":
            return candidate.ratio
        grown = penalised(eta + candidate.delta, candidate.added, self.penalty)
        return grown / eta if eta > 0 else math.inf

    def _decide(
        self, eta: float, candidates: Sequence[Candidate], largest: float
    ) -> tuple[Candidate | None, bool, str]:
        """The best candidate, whether it is accepted, and why."""
        if not candidates:
            return None, False, "nothing within the capacity"
        ranked = sorted(candidates, key=lambda c: self._ratio(eta, c), reverse=True)
        if self.rule == "secnn":
            best = ranked[0]
            tied = [c for c in ranked if c.kind != best.kind and self._ratio(eta, c) == self._ratio(eta, best)]
            if tied:
                return best, False, "a layer and units score alike"
            good = self._ratio(eta, best) > self.tau
            return best, good, "accepted" if good else "below tau"
        strong = [c for c in ranked if c.ratio - 1 > self.tau - 1]
        if not strong:
            return ranked[0], False, "below tau"
        for c in strong:
            if c.delta / largest > self.alpha:
                return c, True, "accepted"
        return strong[0], False, "below alpha"

    def candidates(
        self, data: Batch | Iterable[Batch] | None = None, *, turn: int = 0
    ) -> tuple[float, Seen, list[Candidate]]:
        """Score of the live network, what was seen of it, and every addition within the capacity with its increase.

        Weights, buffers, gradients, modes and the global random state are left as they are.
        """
        x, y = self._score_batch(data)
        with keeping_random_state():
            behind = self._spots_behind()
            seen = observe(self.model, x, y, self._criterion, metric=self.metric, spots=behind)
            base = self._base(seen)
            found: list[Candidate | None] = []
            if "units" in self.actions:
                for i, block in enumerate(self._blocks()):
                    found.append(self._units_candidate(block, seen, base, self._generator(turn, i)))
            if "layers" in self.actions:
                places = [(n, "behind") for n in behind] if behind or self.layers_behind is not None else [
                    (side.module, "before") for site in self.growing() for side in site.consumers
                ]  # fmt: skip
                for i, (where, place) in enumerate(dict.fromkeys(places)):
                    found.append(self._layer_candidate(where, place, seen, base, self._generator(turn, 1000 + i)))
        return base.eta, seen, [c for c in found if c is not None]

    def _generator(self, turn: int, number: int) -> torch.Generator:
        key = ((self.seed * 1_000_003 + int(self.clock[0])) * 1009 + turn) * 10_007 + number
        return torch.Generator().manual_seed(key % (1 << 62))

    def _spots_behind(self) -> list[str]:
        if self.layers_behind is None:
            return []
        names = [n for n, _ in self.model.named_modules()]
        found = [n for n in names if any(fnmatch.fnmatch(n, p) for p in self.layers_behind)]
        if not found:
            raise ValueError(f"layers_behind: no module of the model is named {self.layers_behind!r}")
        return found

    def _base(self, seen: Seen) -> _Base:
        """The present score, and what the increases of the other scores are added to."""
        if self.score == "kfac":
            return _Base(sum(layer_moments(seen, n).score(self.damping) for n in seen.inputs))
        rows, cotangent = sample_rows(self.model, seen.x, self._criterion, seen.y, self.metric)
        w = torch.ones(len(rows), dtype=torch.float64, device=rows.device) if cotangent is None else cotangent.double()
        if self.score == "diag":
            return _Base(float(diag_score(rows, cotangent, samples=seen.samples, eps=self.eps)), w)
        gram = rows.double() @ rows.double().T
        return _Base(float(gram_score(gram, w, seen.samples, self.eps)), w, gram)

    def _increase(self, rows: Tensor, seen: Seen, base: _Base) -> float:
        """What parameters with these per-sample gradients (or Jacobian rows) add to the score."""
        assert base.cotangent is not None
        if self.score == "diag":
            return float(diag_score(rows, base.cotangent, samples=seen.samples, eps=self.eps))
        assert base.gram is not None
        more = rows.double() @ rows.double().T
        return float(gram_score(base.gram + more, base.cotangent, seen.samples, self.eps)) - base.eta

    def _gradient_list(self, seen: Seen, kind: str, name: str, plain: Tensor) -> list[Tensor]:
        """The gradients whose outer products make the Fisher: those of the loss, or of every output."""
        return seen.jacobians[f"{kind} {name}"] if self.metric == "output" else [plain]

    # -- units --------------------------------------------------------------------------------------------------

    def _widening(self, where: str, block: Sequence[Site], count: int) -> Candidate:
        """``count`` more channels in every site of a block; what they are worth is not asked."""
        edits = edits_of(block, count)
        op = {"kind": "units", "where": where, "count": count, "edits": as_lists(edits)}
        return Candidate("units", where, 0.0, 0.0, added_parameters(self.model, edits), op)

    def _units_candidate(
        self, block: Sequence[Site], seen: Seen, base: _Base, generator: torch.Generator
    ) -> Candidate | None:
        """The best of the proposals for one block, if it is within the capacity."""
        candidate = self._widening(block[0].name, block, self.units)
        if not self._fits(candidate.op, candidate.added, block):
            return None
        best = self.propose(block, seen, self.units, self.init, generator)
        candidate.delta, candidate.rows, candidate.statistics = best.delta, best.rows, best.statistics
        candidate.reference = base.eta
        if self.score == "kfac" and self.rule == "senn":
            names = [s.module for site in block for s in site.consumers]
            candidate.reference = sum(layer_moments(seen, n).score(self.damping) for n in names)
        if self.score != "kfac":
            parts = []
            for name, p in best.patches.items():
                a = p.reshape(p.shape[0], seen.samples, -1)  # (D, N, T)
                each = [
                    torch.einsum("nto,dnt->nod", seen.geometry[name].rows(d), a).flatten(1)
                    for d in self._gradient_list(seen, "out", name, seen.gradients[name])
                ]
                parts.append(torch.stack(each, 1).flatten(0, 1))  # (N * outputs, O D)
            candidate.delta = self._increase(torch.cat(parts, 1), seen, base)
        return candidate

    def propose(self, block: Sequence[Site], seen: Seen, count: int, init: str, generator: torch.Generator) -> Proposal:
        """The best incoming weights found for ``count`` new units in each site of a block."""
        return propose(
            self.model, block, seen, count, init=init, generator=generator, proposals=self.proposals,
            steps=self.proposal_steps, lr=self.proposal_lr, temperature=self.temperature, noise=self.noise,
            damping=self.damping, increase=self.increase,
        )  # fmt: skip

    # -- layers -------------------------------------------------------------------------------------------------

    def _identity(
        self, where: str, place: str, seen: Seen, generator: torch.Generator
    ) -> tuple[Candidate, nn.Sequential] | None:
        """A layer that is the identity at one place, what it is worth not asked; None where none is possible."""
        x = seen.inputs[where] if place == "before" else seen.behind[where][0]
        conv = seen.geometry[where].conv if place == "before" else x.ndim == 4
        split = self.identity == "split"
        if split and (conv or place != "before"):
            return None
        features = x.shape[1 if conv else -1]
        wanted: type[nn.Module] = nn.BatchNorm2d if conv else nn.BatchNorm1d
        norm = not split and (conv or x.ndim == 2) and any(isinstance(m, wanted) for m in self.model.modules())
        bias = seen.geometry[where].bias if split else not norm
        spec = {
            "conv": conv, "features": features, "kernel": self.kernel if conv else 1, "norm": norm, "bias": bias,
            "activation": "rational" if split else self.activation, "split": split,
        }  # fmt: skip
        op = {"kind": "layer", "where": where, "place": place, "unit": spec}
        unit = make_unit(spec)
        candidate = Candidate("layer", where, 0.0, 0.0, count_parameters(unit), op)
        if split:
            drawn = torch.randn((features, features), generator=generator, dtype=torch.float64)
            candidate.basis = drawn / math.sqrt(features)  # W1
        return candidate, unit

    def _layer_candidate(
        self, where: str, place: str, seen: Seen, base: _Base, generator: torch.Generator
    ) -> Candidate | None:
        """An identity at one place, and what its own parameters add to the score, if it is within the capacity."""
        made = self._identity(where, place, seen, generator)
        if made is None or not self._fits(made[0].op, made[0].added, ()):
            return None
        candidate, unit = made
        if place == "before":
            x, cotangent, kind = seen.inputs[where], seen.entering[where], "in"
        else:
            (x, cotangent), kind = seen.behind[where], "at"
        unit = unit.to(x).eval()
        absorb(unit, x)
        candidate.reference = base.eta
        candidate.cost = self.layer_cost if self.rule == "senn" else 1.0
        each = self._gradient_list(seen, kind, where, cotangent)
        if self.score == "kfac":
            if self.rule == "senn" and place == "before":
                candidate.reference = layer_moments(seen, where).score(self.damping)
            if candidate.basis is not None:  # h = W1 x: d_h = W1^-T d_x
                inverse = bounded(candidate.basis)[1].to(x)
                cotangent, each = cotangent @ inverse, [e @ inverse for e in each]
            geometry = geometry_of(unit.get_submodule("layer"))
            assert isinstance(geometry, Geometry)
            moments = moments_of(geometry, x, cotangent, each if self.metric == "output" else None)
            candidate.delta = moments.score(self.damping)
            return candidate
        parameters = {n: p.detach() for n, p in unit.named_parameters()}
        buffers = dict(unit.named_buffers())

        def inner(theta: dict[str, Tensor], one: Tensor, d: Tensor) -> Tensor:
            return cast(Tensor, (functional_call(unit, theta | buffers, (one[None],))[0] * d).sum())

        parts = []
        for d in each:
            found = vmap(grad(inner), in_dims=(None, 0, 0))(parameters, x, d)
            parts.append(torch.cat([v.reshape(seen.samples, -1) for v in found.values()], 1))
        candidate.delta = self._increase(torch.stack(parts, 1).flatten(0, 1), seen, base)
        return candidate

    # -- growth -------------------------------------------------------------------------------------------------

    def widen(
        self,
        where: str,
        count: int | None = None,
        *,
        init: str = "random",
        data: Batch | Iterable[Batch] | None = None,
        optimizer: Optimizer | None = None,
    ) -> Expansion:
        """Add units to one set of channels now, without asking; ``growing()`` names the sets.

        Raises:
            ValueError: there is no such set (the message says why, where that is known), or an argument is not allowed.
        """
        check.choice("init", init, INITS)
        count = self.units if count is None else count
        check.whole("count", count, at_least=1, at_most=10_000)
        known = self._known_optimizer(optimizer)
        blocks = [b for b in [*self._blocks(), *([s] for s in self.growing())] if any(s.name == where for s in b)]
        if not blocks:
            why = self.skipped.get(where, "no Linear or Conv2d with a known successor has that name")
            names = ", ".join(s.name for s in self.growing())
            raise ValueError(f"where: {where!r} cannot be widened: {why}; allowed: {names}")
        candidate = self._widening(where, blocks[0], count)
        with keeping_random_state():
            seen = self._glimpse(data)
            if not any(site.layer_norm for site in blocks[0]):
                best = self.propose(blocks[0], seen, count, init, self._generator(7, len(self.ops)))
                candidate.rows, candidate.statistics = best.rows, best.statistics
        self._make(candidate, seen, known)
        return self._by_hand(candidate)

    def deepen(
        self,
        where: str,
        *,
        data: Batch | Iterable[Batch] | None = None,
        optimizer: Optimizer | None = None,
    ) -> Expansion:
        """Add a layer in front of ``where``, which reads a set of channels, or behind it (``layers_behind``)."""
        known = self._known_optimizer(optimizer)
        behind = self._spots_behind()
        places = dict.fromkeys(s.module for site in self.growing() for s in site.consumers)
        if where not in behind and where not in places:
            raise ValueError(f"where: no layer can be added at {where!r}; allowed: {', '.join([*behind, *places])}")
        with keeping_random_state():
            seen = self._glimpse(data)
            place = "behind" if where in behind else "before"
            made = self._identity(where, place, seen, self._generator(8, len(self.ops)))
        if made is None:
            raise ValueError(f"where: {where!r} is no Linear layer, which identity='split' needs")
        self._make(made[0], seen, known)
        return self._by_hand(made[0])

    def _by_hand(self, candidate: Candidate) -> Expansion:
        self.history.append(
            {
                "check": int(self.clock[0]), "stage": len(self.stages) - 1, "eta": None, "best": None, "delta": None,
                "reference": None, "ratio": None, "kind": candidate.kind, "where": candidate.where, "accepted": True,
                "reason": "asked for", "parameters": count_parameters(self.model),
            }
        )  # fmt: skip
        nan = math.nan
        return Expansion(candidate.kind, candidate.where, nan, nan, nan, candidate.added, len(self.stages))

    def _glimpse(self, data: Batch | Iterable[Batch] | None) -> Seen:
        """What the live network does on the score batch, or on the example where there is none."""
        spots = self._spots_behind()
        if data is None and self.score_data is None and not self._recent:
            x = to_device(self.example, device_of(self.model))
            return observe(
                self.model, x, None, lambda out, _: out.flatten(1).square().sum(1), metric=self.metric, spots=spots
            )
        x, y = self._score_batch(data)
        return observe(self.model, x, y, self._criterion, metric=self.metric, spots=spots)

    @torch.no_grad()
    def _make(self, candidate: Candidate, seen: Seen, optimizer: Optimizer | None) -> None:
        """Keep the present network as a stage, change the live one, and let the optimiser follow."""
        newest = self.point == self.points()[-1]
        if optimizer is not None and candidate.kind == "units":
            touched = [p for n in candidate.op["edits"] for p in self.model.get_submodule(n).parameters(recurse=False)]
            check_state(optimizer, touched)
        before = self.growing()
        self._snapshot()
        changes, fresh, unit = self._restructured(candidate.op)
        if candidate.kind == "units":
            generator = self._generator(9, len(self.ops))
            fill(self.model, candidate.op, before, candidate.rows, candidate.statistics, generator)
        else:
            assert unit is not None
            where, place = candidate.op["where"], candidate.op["place"]
            absorb(unit, seen.inputs[where] if place == "before" else seen.behind[where][0])
            if candidate.basis is not None:
                path = self._consumer_of(unit)
                first = split_linear(path, candidate.basis.to(path.weight.device))
                own = cast(nn.Linear, unit._modules["layer"])
                own.weight.copy_(first.weight)
                if own.bias is not None:
                    own.bias.copy_(first.bias)
        if optimizer is not None:
            grow_state(optimizer, changes)
            join_groups(optimizer, fresh)
        self.ops.append(candidate.op)
        self._found = None
        if newest:
            self.point = self.points()[-1]

    def _consumer_of(self, unit: nn.Module) -> nn.Linear:
        """The layer right behind an added unit."""
        for path in self._wrappers:
            children = list(self.model.get_submodule(path).children())
            for child, following in pairwise(children):
                if child is unit:
                    return cast(nn.Linear, following)
        raise RuntimeError("an added layer has nothing behind it")

    def _restructured(self, op: Mapping[str, Any]) -> tuple[list[Change], Fresh, nn.Sequential | None]:
        changes, fresh, unit = apply_op(self.model, op, self._wrappers)
        if unit is not None:
            self._added_units.append(unit)
        return changes, fresh, unit

    def _snapshot(self) -> None:
        """Keep the live network as it is now."""
        network = copy.deepcopy(self.model)
        self._trained.append({n for n, p in network.named_parameters() if p.requires_grad})
        for p in network.parameters():
            p.grad = None
            p.requires_grad_(False)
        self.stages.append(network.eval())

    def _network(self, point: Mapping[str, Value]) -> nn.Module:
        stage = int(point["stage"])
        return self.model if stage == len(self.stages) else self.stages[stage]

    def _decay_slopes(self) -> None:
        """LeakyReLUs of added layers go from slope 1 to ``slope`` in equal steps, one at each check."""
        step = (1 - self.slope) / max(self.cooldown, 1)
        for act in self._leaky():
            act.negative_slope = max(self.slope, act.negative_slope - step)

    def _leaky(self) -> list[nn.LeakyReLU]:
        """The LeakyReLUs of added layers."""
        acts = (unit._modules.get("act") for unit in self._added_units)
        return [act for act in acts if isinstance(act, nn.LeakyReLU)]

    def extra_repr(self) -> str:
        """The rule, the score, the stages."""
        return (
            f"rule={self.rule}, score={self.score}, tau={self.tau:g}, stages={len(self.stages) + 1}, "
            f"parameters={count_parameters(self.model)}, at={getattr(self, 'point', None)}"
        )


def _touches(site: Site, links: set[str]) -> bool:
    return any(s.module in links for s in (*site.producers, *site.consumers))


def _joined(parts: Sequence[Any]) -> Any:
    """Batches one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {k: _joined([p[k] for p in parts]) for k in first}
    return tuple(_joined([p[i] for p in parts]) for i in range(len(first)))
