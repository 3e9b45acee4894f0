"""What could be added, and the search for the incoming weights of new units.

``propose`` draws sets of new units for a block of sites, optimises their incoming weights on Delta' (Adam, or MALA as
SENN has it), and measures the best of them on all samples. All sets run through the network at once, in a ``_Probe``:
a copy in which every convolution and linear layer returns what was kept of it, plus the new channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.core.inputs import call, device_of, take
from pliant.elastic.self_expanding.scores import (
    INPUT_DAMPING,
    Geometry,
    Seen,
    chunks,
    damped,
    finite,
    layer_moments,
)
from pliant.elastic.self_expanding.surgery import (
    Gaps,
    Rows,
    Site,
    channel_statistics,
    insert,
    new_positions,
    old_positions,
    replace_module,
)

INITS = ("optimized", "mala", "random", "noise")
_ROWS = 1024  # samples times positions that proposals are optimised on; at least 32 samples
_FINALISTS = 4  # proposals that are measured on all samples after they were optimised on a part


@dataclass
class Candidate:
    """A possible addition: ``delta`` is its increase of the score, ``reference`` what that is compared to."""

    kind: str  # "units" or "layer"
    where: str
    delta: float
    reference: float
    added: int
    op: dict[str, Any]
    cost: float = 1.0
    rows: Rows = field(default_factory=dict)
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    basis: Tensor | None = None

    @property
    def ratio(self) -> float:
        """(reference + delta / cost) / reference."""
        if self.delta <= 0:
            return 1.0
        return 1 + self.delta / (self.cost * self.reference) if self.reference > 0 else math.inf


@dataclass(frozen=True)
class Expansion:
    """An addition that was made."""

    kind: str
    where: str
    eta_before: float
    eta_after: float
    ratio: float
    parameters: int  # added
    stage: int  # the newest stage since then


# -- a network with new channels --------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """Every consumer was reached; the rest of the network need not run."""


class _Station(nn.Module):
    """Stands in for a Linear or Conv2d: returns what it returned before, plus the new channels that it makes."""

    def __init__(self, module: nn.Module, output: Tensor, geometry: Geometry) -> None:
        super().__init__()
        self.module = module
        self.output, self.geometry = output, geometry
        self.input: Tensor | None = None
        self.given: Gaps = []
        self.new_rows: tuple[Tensor, Tensor | None] | None = None
        self.taken: Tensor | None = None  # positions of the new input channels
        self.caught: Tensor | None = None
        self.chained = False
        self.probe: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # networks that look at a layer's weight (its type) before they call it
            return getattr(super().__getattr__("module"), name)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        if self.taken is not None:
            self.caught = x.index_select(self.geometry.dim, self.taken)
            self.probe.missing.discard(id(self))
            if not self.probe.missing:
                raise _EnoughError
        if not self.given:
            return self.output
        if self.chained:
            assert self.caught is not None
            new = self.caught  # the identity on the new diagonal
        else:
            assert self.new_rows is not None
            assert self.input is not None
            new = self.geometry.apply(self.input, *self.new_rows)
        return insert(self.output, self.geometry.dim, self.given, new)


class _WideBetween(nn.Module):
    """A BatchNorm or PReLU with new channels: the old ones as before, the new ones by the batch's own statistics."""

    def __init__(self, module: nn.Module, size: int, gaps: Gaps, device: torch.device) -> None:
        super().__init__()
        self.module, self.gaps = module, gaps
        self.old, self.new = old_positions(size, gaps).to(device), new_positions(size, gaps).to(device)
        self.mean, self.var = torch.empty(0), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        old, new = self.module(x.index_select(1, self.old)), x.index_select(1, self.new)
        if isinstance(self.module, _BatchNorm):
            self.mean, self.var = channel_statistics(new)
            shape = [1, -1, *([1] * (x.ndim - 2))]
            new = (new - self.mean.view(shape)) / (self.var.view(shape) + self.module.eps).sqrt()
        else:
            new = torch.where(new >= 0, new, 0.25 * new)
        return insert(old, 1, self.gaps, new)


class _Probe:
    """A network with Q sets of C new channels at once, whose outgoing weights are zero, so that none sees another.

    Nothing that the new channels do not touch is computed again: convolutions and linear layers return what was kept.
    """

    def __init__(
        self, model: nn.Module, seen: Seen, block: Sequence[Site], sets: int, count: int, samples: int
    ) -> None:
        memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self.network = copy.deepcopy(model, memo).eval()
        self.x = take(seen.x, slice(0, samples))
        self.stations: dict[str, _Station] = {}
        self.betweens: dict[str, _WideBetween] = {}
        device = device_of(model)
        for name, output in seen.outputs.items():
            self.stations[name] = _Station(self.network.get_submodule(name), output[:samples], seen.geometry[name])
            replace_module(self.network, name, self.stations[name])
        made = {s.module for site in block for s in site.producers}
        read = {s.module for site in block for s in site.consumers}
        self.chained = {n for n in made & read if _is_chained(block, n)}
        self.consumers = [s.module for site in block for s in site.consumers]
        total = sets * count
        for site in block:
            for side in site.producers:
                station = self.stations[side.module]
                station.given, station.input = side.gaps(total), seen.inputs[side.module][:samples]
                station.chained = side.module in self.chained
            for side in site.between:
                module = self.network.get_submodule(side.module)
                size = int(getattr(module, "num_features", 0) or module.num_parameters)  # type: ignore[arg-type]
                self.betweens[side.module] = _WideBetween(module, size, side.gaps(total), device)
                replace_module(self.network, side.module, self.betweens[side.module])
            for side in site.consumers:
                station = self.stations[side.module]
                station.taken, station.probe = side.fresh(total).flatten().to(device), self
        self.missing: set[int] = set()

    def run(self, rows: Rows) -> dict[str, Tensor]:
        """a_p at every consumer: (N, Q * D', H, W) or (N, ..., Q * D'), D' = C * positions of a channel."""
        self.missing = {id(self.stations[n]) for n in self.consumers}
        for name, (weight, bias) in rows.items():
            like = self.stations[name].output
            self.stations[name].new_rows = (
                weight.flatten(0, 2).to(like), None if bias is None else bias.flatten(0, 2).to(like)
            )  # fmt: skip
        with suppress(_EnoughError):
            call(self.network, self.x)
        found = {}
        for name in self.consumers:
            caught = self.stations[name].caught
            assert caught is not None
            found[name] = caught
        return found


def _is_chained(block: Sequence[Site], name: str) -> bool:
    """Whether layer ``name`` leads from one site of the block to another."""
    makes = {site.name for site in block if any(s.module == name for s in site.producers)}
    reads = {site.name for site in block if any(s.module == name for s in site.consumers)}
    return bool(makes) and bool(reads) and makes != reads


# -- the search -------------------------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    """The best set of new units that was found for a block of sites."""

    delta: float  # Delta', or Delta, over all consumers
    rows: Rows
    statistics: dict[str, tuple[Tensor, Tensor]]  # of its channels on the batch, in every BatchNorm
    patches: dict[str, Tensor]  # (D, N * T) at every consumer


def propose(
    model: nn.Module,
    block: Sequence[Site],
    seen: Seen,
    count: int,
    *,
    init: str,
    generator: torch.Generator,
    proposals: int,
    steps: int,
    lr: float,
    temperature: float,
    noise: float,
    damping: float,
    increase: str,
) -> Proposal:
    """Incoming weights for ``count`` new units in each site of a block; ``SelfExpanding`` describes the options."""
    consumers = list(dict.fromkeys(s.module for site in block for s in site.consumers))
    residuals = {name: _residual(seen, name) for name in consumers}
    whitening = {}
    for name in consumers:
        whitening[name] = torch.linalg.cholesky(damped(layer_moments(seen, name).gradients, damping, "S").inverse())
    tempered = temperature * max(sum(layer_moments(seen, name).score(damping) for name in consumers), 1e-30)
    tried = proposals if init in ("optimized", "mala") else 1
    samples = _affordable(block, seen)
    probe = _Probe(model, seen, block, tried, count, samples)
    directions = _draw(block, seen, tried, count, generator, probe.chained)
    spreads = {n: _spread(seen.geometry[n], seen.inputs[n][:samples]) for n in directions}

    def weights(current: Rows) -> Rows:
        if init == "noise":
            return {n: (noise * w, None if b is None else noise * b) for n, (w, b) in current.items()}
        return _weights(current, spreads)

    def objective(current: Rows) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name, a_p in probe.run(weights(current)).items():
            p = _proposed_patches(seen.geometry[name], a_p, tried)
            r = residuals[name][:samples].flatten(0, 1)
            total = total + _white(p @ r / samples, p @ p.transpose(1, 2) / samples, whitening[name], damping)
        return total

    if init == "optimized" and steps:
        directions = _adam(directions, objective, steps, lr)
    elif init == "mala" and steps:
        directions = _mala(directions, objective, tempered, steps, lr, generator)
    with torch.no_grad():
        values = finite(objective(directions), "Delta' of the proposals")
        finalists = values.topk(min(_FINALISTS, tried)).indices
        sets = len(finalists)
        rows = {
            n: (w[:, finalists], None if b is None else b[:, finalists]) for n, (w, b) in weights(directions).items()
        }
        probe = _Probe(model, seen, block, sets, count, seen.samples)
        caught = probe.run(rows)
        deltas = torch.zeros(sets, dtype=torch.float64)
        for name, a_p in caught.items():
            cross, gram = _proposal_moments(seen.geometry[name], a_p, residuals[name], sets)
            deltas = deltas + _white(cross, gram, whitening[name], damping).cpu()
        q = int(deltas.argmax())
        best = {n: (w[:, q], None if b is None else b[:, q]) for n, (w, b) in rows.items()}
        statistics = {}
        for name, between in probe.betweens.items():
            if between.mean.numel():
                mean, var = (v.reshape(-1, sets, count)[:, q].flatten() for v in (between.mean, between.var))
                statistics[name] = (mean, var)
        patches = {}
        for name, a_p in caught.items():
            dim = seen.geometry[name].dim
            own = torch.unflatten(a_p.movedim(dim, 0), 0, (sets, -1))[q].movedim(0, dim)
            patches[name] = _proposed_patches(seen.geometry[name], own, 1)[0]
        delta = float(deltas[q])
        if increase == "schur":
            delta = sum(_schur(seen, n, patches[n], residuals[n], whitening[n]) for n in consumers)
        elif init == "mala":  # SENN decides by the softmax-weighted mean of all its proposals
            delta = float((torch.softmax(values / tempered, 0) * values).sum())
    return Proposal(delta, best, statistics, patches)


def _residual(seen: Seen, name: str) -> Tensor:
    """What the present inputs of a layer cannot explain of the gradients of its outputs: r (N, T, O)."""
    g = seen.geometry[name]
    guess = layer_moments(seen, name).explained().to(seen.inputs[name])
    columns = guess[:, :-1] if g.bias else guess
    weight = columns.reshape(len(guess), -1, *g.kernel) if g.conv else columns
    explained = g.apply(seen.inputs[name], weight, guess[:, -1] if g.bias else None)
    return g.rows(seen.gradients[name] - explained)


def _affordable(block: Sequence[Site], seen: Seen) -> int:
    """On how many samples proposals are optimised; the best are then measured on all."""
    positions = 1
    for site in block:
        for side in site.consumers:
            out = seen.outputs[side.module][:1]
            positions = max(positions, seen.geometry[side.module].rows(out).shape[1])
    return min(seen.samples, max(32, _ROWS // positions))


def _draw(
    block: Sequence[Site], seen: Seen, tried: int, count: int, generator: torch.Generator, chained: set[str]
) -> Rows:
    """Directions of first incoming weights, N(0, 1), in float32 at least: Adam's squares are too small for less."""
    rows: Rows = {}
    for side in (s for site in block for s in site.producers):
        if side.module in chained:
            continue
        g, a = seen.geometry[side.module], seen.inputs[side.module]
        shape = (a.shape[g.dim], *g.kernel) if g.conv else (a.shape[-1],)
        kind = torch.promote_types(a.dtype, torch.float32)
        w = torch.randn((len(side.runs), tried, count, *shape), generator=generator).to(a.device, kind)
        b = torch.randn((len(side.runs), tried, count), generator=generator).to(a.device, kind) if g.bias else None
        rows[side.module] = (w, b)
    return rows


def _weights(rows: Rows, spreads: Mapping[str, tuple[Tensor, Tensor]]) -> Rows:
    """Weights of the directions: pre-activations of variance 1 and mean b, so that no unit is dead or explodes."""
    found: Rows = {}
    for name, (w, b) in rows.items():
        mean, covariance = spreads[name]
        flat = w.flatten(3)
        # Inside the root, whose slope at 0 is infinite: a layer may be given nothing but zeros.
        spread = (((flat @ covariance) * flat).sum(-1).clamp(min=0) + 1e-12).sqrt()
        shift = None if b is None else b - (flat @ mean) / spread
        found[name] = (w / spread.reshape(*spread.shape, *([1] * (w.ndim - 3))), shift)
    return found


def _adam(rows: Rows, objective: Callable[[Rows], Tensor], steps: int, lr: float) -> Rows:
    """Steps of Adam on the sum of all proposals' Delta', which are independent."""
    leaves = _leaves(rows)
    first, second = [torch.zeros_like(p) for p in leaves], [torch.zeros_like(p) for p in leaves]
    for step in range(1, steps + 1):
        with torch.enable_grad():
            value = objective(_like(rows, leaves)).sum()
            found = torch.autograd.grad(-value, leaves, allow_unused=True)
        with torch.no_grad():
            for p, m, v, g in zip(leaves, first, second, found, strict=True):
                if g is not None:
                    m.lerp_(g, 0.1)
                    v.lerp_(g.square(), 0.001)
                    p -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-12)
    return _like(rows, [leaf.detach() for leaf in leaves])


def _mala(
    rows: Rows, objective: Callable[[Rows], Tensor], scale: float, steps: int, h: float, generator: torch.Generator
) -> Rows:
    """Metropolis adjusted Langevin steps on log p = Delta' / scale - |theta|^2 / 2, for each proposal alone.

    theta' = theta + h^2/2 grad log p + h xi; h times or over 1.3 keeps the acceptance near 0.6.
    """
    current = [leaf.detach() for leaf in _leaves(rows)]

    def each(t: Tensor) -> Tensor:  # the sum over everything but the proposals, which stand in dimension 1
        return t.double().movedim(1, 0).flatten(1).sum(1)

    def slope(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            live = [leaf.detach().requires_grad_() for leaf in leaves]
            tempered = objective(_like(rows, live)) / scale
            value = tempered - sum(each(p.square()) for p in live) / 2
            found = torch.autograd.grad(value.sum(), live, allow_unused=True)
        return value.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(live, found, strict=True)]

    value, gradient = slope(current)
    for _ in range(steps):
        xi = [torch.randn(p.shape, generator=generator).to(p) for p in current]
        moved = [p + h * h / 2 * g + h * z for p, g, z in zip(current, gradient, xi, strict=True)]
        new_value, new_gradient = slope(moved)
        forth = sum(each(z.square()) for z in xi)
        back = sum(
            each(((p - m - h * h / 2 * g) / h).square()) for p, m, g in zip(current, moved, new_gradient, strict=True)
        )
        log_ratio = new_value.to(forth) - value.to(forth) - (back - forth) / 2
        uniform = torch.rand(len(value), generator=generator).to(log_ratio)
        taken = uniform.log() < log_ratio

        def pick(new: Tensor, old: Tensor, taken: Tensor = taken) -> Tensor:
            return torch.where(taken.reshape(1, -1, *([1] * (new.ndim - 2))), new, old)

        current = [pick(m, p) for m, p in zip(moved, current, strict=True)]
        gradient = [pick(m, p) for m, p in zip(new_gradient, gradient, strict=True)]
        value = torch.where(taken.to(value.device), new_value, value)
        h = h * 1.3 if float(taken.double().mean()) > 0.6 else h / 1.3
    return _like(rows, current)


def _schur(seen: Seen, name: str, p: Tensor, residual: Tensor, whitening: Tensor) -> float:
    """Delta at one consumer: with A_p - A_pc A_c^-1 A_cp in place of A_p."""
    g, a, n = seen.geometry[name], seen.inputs[name], seen.samples
    present = layer_moments(seen, name).inputs
    p, residual = p.double(), residual.double()
    new = p.reshape(len(p), n, -1)
    cross = torch.zeros((len(p), len(present)), dtype=torch.float64, device=p.device)
    for part in chunks(n, a[:1].numel() * g.taps):
        cross += new[:, part].flatten(1) @ g.inputs(a[part]).flatten(0, 1).double() / n
    gram = p @ p.T / n
    share = INPUT_DAMPING * gram.diagonal().mean()
    schur = gram - cross @ torch.linalg.solve(damped(present, INPUT_DAMPING, "A"), cross.T)
    schur.diagonal().add_(share)
    c = p @ residual.flatten(0, 1) / n
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(schur), c, upper=False)
    return float((white @ whitening).square().sum())


def _proposed_patches(geometry: Geometry, a_p: Tensor, sets: int) -> Tensor:
    """(N, Q * D', ...) -> (Q, D, N * T), D = D' * taps."""
    if geometry.conv:
        u = F.unfold(a_p, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)  # (N, Q D, T)
        n, _, t = u.shape
        return u.reshape(n, sets, -1, t).permute(1, 2, 0, 3).reshape(sets, -1, n * t)
    flat = a_p.reshape(len(a_p), -1, a_p.shape[-1])  # (N, T, Q D)
    return flat.reshape(flat.shape[0] * flat.shape[1], sets, -1).permute(1, 2, 0)


def _white(cross: Tensor, gram: Tensor, whitening: Tensor, damping: float) -> Tensor:
    """Tr(S^-1 C' A_p^-1 C) for every proposal, S^-1 = whitening whitening', A_p damped."""
    cross, gram, whitening = cross.double(), gram.double(), whitening.double()
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + (max(damping, 1e-5) * scale + 1e-30) * eye)
    return cast(Tensor, (torch.linalg.solve_triangular(factor, cross, upper=False) @ whitening).square().sum((-1, -2)))


@torch.no_grad()
def _spread(geometry: Geometry, a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D) and covariance (D, D) of a layer's patches."""
    p = geometry.patches(a).flatten(0, 1)
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    mean = p.mean(0)
    return mean, (p - mean).T @ (p - mean) / len(p)


def _proposal_moments(geometry: Geometry, a_p: Tensor, residual: Tensor, sets: int) -> tuple[Tensor, Tensor]:
    """E[a_p r'] (Q, D, O) and A_p (Q, D, D) in float64, on all samples."""
    n = len(a_p)
    cross: Tensor | None = None
    gram: Tensor | None = None
    for part in chunks(n, a_p[:1].numel() * geometry.taps):
        p = _proposed_patches(geometry, a_p[part], sets)
        c, g = (p @ residual[part].flatten(0, 1)).double() / n, (p @ p.transpose(1, 2)).double() / n
        cross, gram = (c, g) if cross is None or gram is None else (cross + c, gram + g)
    assert cross is not None
    assert gram is not None
    return cross, gram


def _leaves(rows: Rows) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for pair in rows.values() for t in pair if t is not None]


def _like(rows: Rows, leaves: Sequence[Tensor]) -> Rows:
    """``leaves`` in the places of ``rows``."""
    rest = iter(leaves)
    return {name: (next(rest), None if b is None else next(rest)) for name, (_, b) in rows.items()}
