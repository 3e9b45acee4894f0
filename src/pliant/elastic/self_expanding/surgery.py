"""Surgery on a network that lives: where it can grow, and how it grows without changing its function.

A *site* is a set of coupled channels that ``core/slicing`` has read off the network: who makes them, who normalises
them, who reads them. New channels are *gaps* in the tensors of its modules, which *edits* name; they are filled with
zeros (weights) or neutral values (norms). A new layer is a unit that computes the identity. Parameters stay the same
objects, and the state of the optimiser grows with them.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from pliant.core.inputs import Input, call, device_of, evaluating, first_line, logits, removing, to_device
from pliant.core.slicing import Group, NothingToCutError, Slicing
from pliant.elastic.self_expanding.scores import geometry_of, keeping_random_state

Gaps = list[tuple[int, int]]  # where new entries go in: (before which old position, how many)
Edits = dict[str, dict[str, Gaps]]  # module -> "out" / "in" -> gaps
Rows = dict[str, tuple[Tensor, Tensor | None]]  # producer -> weights (runs, Q, C, I, ...) and biases (runs, Q, C)
Change = tuple[nn.Parameter, tuple[int, ...], dict[int, Gaps]]  # parameter, its old shape, gaps by dimension
Fresh = list[tuple[nn.Parameter, nn.Parameter]]  # new parameters, each with a neighbour that was there before

_SHARED = (
    "model: {name!r} runs {times} times in one forward, so that its weights are shared; exclude it by name: "
    "exclude=[{name!r}]"
)
_CLIP = 1e-3  # least singular value of a split's basis, in units of their mean


# -- where a network can grow -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """Where the channels of a site stand in a module: runs (end position, positions of each channel)."""

    module: str
    runs: tuple[tuple[int, int], ...]

    def gaps(self, count: int) -> Gaps:
        """Where ``count`` new channels go in: at the end of every run."""
        return [(end, each * count) for end, each in self.runs]

    def fresh(self, count: int) -> Tensor:
        """Positions of the new channels in the grown module, (count, runs * each): a row for each channel."""
        rows, shift = [], 0
        for end, each in self.runs:
            rows.append(torch.arange(end + shift, end + shift + count * each).reshape(count, each))
            shift += count * each
        return torch.cat(rows, 1)


@dataclass(frozen=True)
class Site:
    """Coupled channels that can be widened: who makes them, who normalises them, who reads them."""

    name: str
    channels: int
    producers: tuple[_Side, ...]
    between: tuple[_Side, ...]  # BatchNorm, LayerNorm, PReLU
    consumers: tuple[_Side, ...]
    layer_norm: bool = False

    def sides(self) -> dict[str, dict[str, _Side]]:
        """By module: "out" and "in"."""
        found: dict[str, dict[str, _Side]] = {}
        for label, sides in (("out", self.producers), ("out", self.between), ("in", self.consumers)):
            for side in sides:
                found.setdefault(side.module, {})[label] = side
        return found


def _runs(positions: Sequence[int], channels: Sequence[int], count: int) -> tuple[tuple[int, int], ...] | None:
    """The runs of a member, each with all channels in order, equally often; None where it is no such thing."""
    pairs = sorted(zip(positions, channels, strict=True))
    runs: list[list[tuple[int, int]]] = []
    for pair in pairs:
        if not runs or pair[0] != runs[-1][-1][0] + 1 or pair[1] < runs[-1][-1][1]:
            runs.append([])
        runs[-1].append(pair)
    found = []
    for run in runs:
        each, rest = divmod(len(run), count)
        if rest or [c for _, c in run] != [c for c in range(count) for _ in range(each)]:
            return None
        found.append((run[-1][0] + 1, each))
    return tuple(found)


def _site(model: nn.Module, group: Group, heads: Iterable[str]) -> Site | str:
    """The group as a site, or why it cannot be grown."""
    if group.name in heads or group.units != group.channels:
        return "its channels come in heads or groups"
    sides: dict[str, dict[str, _Side]] = {"producers": {}, "between": {}, "consumers": {}}
    layer_norm = False
    for member in group.members:
        if member.side == "parameter":
            return f"the bare parameter {member.module!r} carries its channels"
        module = model.get_submodule(member.module)
        if isinstance(module, _BatchNorm | nn.LayerNorm | nn.PReLU):
            kind = "between"
            layer_norm = layer_norm or isinstance(module, nn.LayerNorm)
            if isinstance(module, nn.PReLU) and module.num_parameters == 1:
                continue
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                return f"{member.module!r} keeps no running statistics"
        else:
            kind = "producers" if member.side == "out" else "consumers"
            if isinstance(geometry := geometry_of(module), str):
                return f"{member.module!r}: {geometry}"
        parameters = module._parameters
        if "weight" not in parameters and not isinstance(module, _BatchNorm):
            return f"{member.module!r} has a reparameterised weight"
        runs = _runs(member.positions, member.channels, group.channels)
        if runs is None or (kind != "consumers" and any(each != 1 for _, each in runs)):
            return f"the order of its channels in {member.module!r} is not understood"
        sides[kind][member.module] = _Side(member.module, runs)
    if not sides["producers"]:
        return "no Linear or Conv2d makes its channels"
    if not sides["consumers"]:
        return "no Linear or Conv2d reads its channels"
    parts = [tuple(sides[k].values()) for k in ("producers", "between", "consumers")]
    return Site(group.name, group.channels, parts[0], parts[1], parts[2], layer_norm)


def find_sites(
    model: nn.Module, example: Input, exclude: Sequence[str], patterns: Sequence[str] | None
) -> tuple[list[Site], dict[str, str]]:
    """The sites of ``model`` whose names match ``patterns``, and why other sets of channels cannot be widened.

    Raises:
        ValueError: a weight is shared where it would grow, or ``exclude`` names nothing.
    """
    example = to_device(example, device_of(model))
    try:
        slicing = Slicing(model, example, exclude=exclude, stacks=(), growing=True)
    except ValueError as error:
        with keeping_random_state():
            counts, _ = _count_calls(model, example)
        for name, times in counts.items():  # the likelier cause, and the clearer message
            if times > 1 and isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d):
                raise ValueError(_SHARED.format(name=name, times=times)) from error
        if isinstance(error, NothingToCutError) and "inputs and outputs only" in str(error):
            return [], {}
        raise
    names: dict[int, str] = {}
    tied: dict[str, str] = {}  # module -> what it shares
    for name, p in model.named_parameters(remove_duplicate=False):
        other = names.setdefault(id(p), name)
        if other != name:
            tied[name.rpartition(".")[0]] = tied[other.rpartition(".")[0]] = f"{other!r} and {name!r}"
    found: list[Site] = []
    skipped: dict[str, str] = {}
    with keeping_random_state():
        counts, before = _count_calls(model, example)

        def obstacle(site: Site) -> str | None:
            modules = site.sides()
            if patterns is not None and not any(fnmatch.fnmatch(site.name, p) for p in patterns):
                return "it is not named in sites"
            if shared := [m for m in modules if m in tied]:
                raise ValueError(
                    f"model: {tied[shared[0]]} are one shared weight, which cannot grow on one side alone; "
                    f"exclude it by name: exclude=[{shared[0]!r}]"
                )
            if often := [m for m in modules if counts.get(m, 0) != 1]:
                if counts.get(often[0], 0) > 1:
                    raise ValueError(_SHARED.format(name=often[0], times=counts[often[0]]))
                return f"{often[0]!r} is not called as a module"
            return _attempt(model, site, example, before)

        for group in slicing.groups:
            site = _site(model, group, slicing.heads.values())
            why = site if isinstance(site, str) else obstacle(site)
            if isinstance(site, Site) and why is None:
                found.append(site)
            else:
                skipped[group.name] = str(why)
    return found, skipped


def _attempt(model: nn.Module, site: Site, example: Input, before: Tensor) -> str | None:
    """Widen a copy by one channel: None where the output stays, else what went wrong."""
    trial = copy.deepcopy(model)
    try:
        _widen(trial, edits_of([site], 1))
        for side in site.producers:
            weight = cast(Tensor, trial.get_submodule(side.module).weight)
            rows = side.fresh(1).flatten()
            with torch.no_grad():
                if site.layer_norm:
                    _mean_rows(trial.get_submodule(side.module), rows)
                else:
                    weight[rows] = weight.detach().abs().mean()
        with evaluating(trial), torch.no_grad():
            after = logits(call(trial, example))
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        return first_line(error)
    scale = float(before.abs().max()) + 1e-6
    if after.shape != before.shape or not torch.allclose(after, before, rtol=1e-3, atol=1e-4 * scale):
        return "an added channel changes the output: its channels are read by more than the layers that were found"
    return None


def _count_calls(model: nn.Module, example: Input) -> tuple[dict[str, int], Tensor]:
    """How often each module runs, and the output."""
    counts: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules(remove_duplicate=False)]
    with removing(handles), evaluating(model), torch.no_grad():
        output = logits(call(model, example))
    return counts, output


# -- new channels -----------------------------------------------------------------------------------------------------


def _count(gaps: Gaps) -> int:
    return sum(length for _, length in gaps)


def insert(old: Tensor, dim: int, gaps: Gaps, new: Tensor | float) -> Tensor:
    """``old`` with entries put in along ``dim``: those of ``new`` in order, or one number."""
    dim = dim % old.ndim
    if not isinstance(new, Tensor):
        shape = [*old.shape[:dim], _count(gaps), *old.shape[dim + 1 :]]
        new = old.new_full(shape, new)
    pieces, start, used = [], 0, 0
    for at, length in gaps:
        pieces += [old.narrow(dim, start, at - start), new.narrow(dim, used, length)]
        start, used = at, used + length
    return torch.cat([*pieces, old.narrow(dim, start, old.shape[dim] - start)], dim)


def old_positions(size: int, gaps: Gaps) -> Tensor:
    """Where the ``size`` old entries stand after the insertion."""
    return insert(torch.ones(size), 0, gaps, 0.0).nonzero().flatten()


def new_positions(size: int, gaps: Gaps) -> Tensor:
    """Where the new entries stand after the insertion into ``size`` old ones."""
    return insert(torch.zeros(size), 0, gaps, 1.0).nonzero().flatten()


def edits_of(sites: Sequence[Site], count: int) -> Edits:
    """What ``count`` new channels in every one of ``sites`` change."""
    found: Edits = {}
    for site in sites:
        for module, sides in site.sides().items():
            for label, side in sides.items():
                if label in found.get(module, {}):
                    raise ValueError(f"model: {module!r} would be widened twice on its {label} side")
                found.setdefault(module, {})[label] = side.gaps(count)
    return found


def is_read_twice(sites: Sequence[Site]) -> bool:
    """Whether one layer reads, or makes, several of the sets, as behind a concatenation."""
    ends = [(module, label) for site in sites for module, sides in site.sides().items() for label in sides]
    return len(set(ends)) < len(ends)


def as_lists(edits: Edits) -> dict[str, dict[str, list[list[int]]]]:
    """``edits`` as JSON has them."""
    return {m: {s: [list(g) for g in gaps] for s, gaps in sides.items()} for m, sides in edits.items()}


def _tensors_of(module: nn.Module, gaps: Mapping[str, Gaps]) -> list[tuple[str, dict[int, Gaps], float]]:
    """Which tensors of a module grow: (name, gaps by dimension, value of the new entries)."""
    out, into = gaps.get("out"), gaps.get("in")
    if isinstance(module, nn.Linear | nn.Conv2d):
        by_dim = {d: g for d, g in ((0, out), (1, into)) if g}
        return [("weight", by_dim, 0.0)] + ([("bias", {0: out}, 0.0)] if out and module.bias is not None else [])
    assert out is not None
    if isinstance(module, nn.PReLU):
        return [("weight", {0: out}, 0.25)]
    values = (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0))
    return [(n, {0: out}, v) for n, v in values if isinstance(getattr(module, n, None), Tensor)]


def added_parameters(model: nn.Module, edits: Edits) -> int:
    """dp: the parameters that ``edits`` would add."""
    total = 0
    for name, gaps in edits.items():
        module = model.get_submodule(name)
        for tensor, by_dim, _ in _tensors_of(module, gaps):
            old = getattr(module, tensor)
            if isinstance(old, nn.Parameter):
                shape = [s + _count(by_dim.get(d, [])) for d, s in enumerate(old.shape)]
                total += math.prod(shape) - old.numel()
    return total


@torch.no_grad()
def _widen(model: nn.Module, edits: Edits) -> list[Change]:
    """Put new entries into every tensor: zero for weights, the neutral value for norms."""
    changes: list[Change] = []
    for name, gaps in edits.items():
        module = model.get_submodule(name)
        for tensor, by_dim, value in _tensors_of(module, gaps):
            old = getattr(module, tensor)
            new = old.detach()
            for dim, where in by_dim.items():
                new = insert(new, dim, where, value)
            if isinstance(old, nn.Parameter):
                shape, gradient = tuple(old.shape), old.grad
                _resize(old, new)
                if gradient is not None:
                    for dim, where in by_dim.items():
                        gradient = insert(gradient, dim, where, 0.0)
                    old.grad = gradient
                changes.append((old, shape, by_dim))
            else:
                module._buffers[tensor] = new
        grown = {side: _count(where) for side, where in gaps.items()}
        if isinstance(module, nn.Linear):
            module.out_features += grown.get("out", 0)
            module.in_features += grown.get("in", 0)
        elif isinstance(module, nn.Conv2d):
            module.out_channels += grown.get("out", 0)
            module.in_channels += grown.get("in", 0)
        elif isinstance(module, nn.PReLU):
            module.num_parameters += grown["out"]
        elif isinstance(module, _BatchNorm):
            module.num_features += grown["out"]
        elif isinstance(module, nn.LayerNorm):
            # With new features at the mean of the old ones: variance' = variance n / (n + C), undone by gamma and eps.
            n = module.normalized_shape[0]
            module.normalized_shape = (n + grown["out"],)
            share = n / (n + grown["out"])
            module.eps *= share
            if isinstance(module.weight, Tensor):
                module.weight[old_positions(n, gaps["out"]).to(module.weight.device)] *= math.sqrt(share)
    return changes


def _resize(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter a value of another shape and keep the object, so that optimisers need not be told."""
    parameter.grad = None
    # Autograd remembers the shape while a graph of an earlier step is alive. A change of type makes it forget.
    other = torch.float16 if value.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=value.device)
    parameter.data = value.contiguous()


@torch.no_grad()
def fill(
    model: nn.Module,
    op: Mapping[str, Any],
    before: Iterable[Site],
    rows: Rows,
    statistics: Mapping[str, tuple[Tensor, Tensor]],
    generator: torch.Generator,
) -> None:
    """Write the incoming weights and the statistics of new channels, which ``op`` has added to the sites ``before``."""
    edits: Mapping[str, dict[str, Any]] = op["edits"]
    count: int = op["count"]
    sides = {}
    norm_rows = set()
    for site in before:
        for side in site.producers:
            if "out" in edits.get(side.module, {}):
                sides[side.module] = side
                if site.layer_norm:
                    norm_rows.add(side.module)
    reading = {s.module: s for site in before for s in site.consumers if "in" in edits.get(s.module, {})}
    for name, side in sides.items():
        module = model.get_submodule(name)
        fresh = side.fresh(count)  # (count, runs)
        weight = cast(Tensor, module.weight)
        if name in rows:
            w, b = rows[name]  # (runs, count, I, ...), (runs, count)
            into = edits[name].get("in", [])
            columns = old_positions(weight.shape[1] - _count(into), into).to(weight.device)
            for run in range(len(side.runs)):
                new = fresh[:, run].to(weight.device)
                weight[new[:, None], columns[None, :]] = w[run].to(weight)
                if b is not None:
                    cast(Tensor, module.bias)[new] = b[run].to(weight)
        elif name in norm_rows:
            _mean_rows(module, fresh.flatten())
        elif name in reading:  # an added layer inside a block: the identity on the new diagonal
            columns = reading[name].fresh(count)[:, 0]
            centre = [torch.tensor(k // 2) for k in weight.shape[2:]]
            weight.index_put_((fresh[:, 0], columns, *centre), torch.ones((), device=weight.device).to(weight))
    for name, (mean, var) in statistics.items():
        norm = cast(_BatchNorm, model.get_submodule(name))
        new = new_positions(norm.num_features - _count(edits[name]["out"]), edits[name]["out"])
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean[new] = mean.to(norm.running_mean)
        norm.running_var[new] = var.to(norm.running_var)
    for name in {m for m, gaps in edits.items() if isinstance(model.get_submodule(m), nn.LayerNorm)}:
        norm = cast(Any, model.get_submodule(name))
        if norm.bias is not None:  # otherwise the new units would be constant zeros, and never leave them
            new = new_positions(len(norm.bias) - _count(edits[name]["out"]), edits[name]["out"])
            drawn = torch.randn(len(new), generator=generator.clone_state())  # the same for every norm, in any order
            norm.bias[new] = drawn.to(norm.bias)


@torch.no_grad()
def _mean_rows(module: nn.Module, rows: Tensor) -> None:
    """New outputs that are the mean of the old ones."""
    weight, bias = cast(Tensor, module.weight), module.bias
    kept = torch.ones(len(weight), dtype=torch.bool)
    kept[rows] = False
    weight[rows] = weight[kept].mean(0)
    if isinstance(bias, Tensor):
        bias[rows] = bias[kept].mean()


# -- new layers -------------------------------------------------------------------------------------------------------


class Rational(nn.Module):
    """SENN's learnable unit, for each feature: (l x + (2 v x + c) / (1 + x^2)) / sqrt(v^2 + c^2 + l^2 + 1e-8).

    The identity at v = c = 0, l = 1, where it starts. (..., features) -> (..., features).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.v, self.c = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))
        self.l = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., features)."""
        bump = (2 * self.v * x + self.c) / (1 + x * x)
        return (self.l * x + bump) / torch.sqrt(self.v * self.v + self.c * self.c + self.l * self.l + 1e-8)


def make_unit(spec: Mapping[str, Any]) -> nn.Sequential:
    """A new layer of ``spec``, which computes the identity (the statistics of its BatchNorm are set by ``absorb``)."""
    size, bias = int(spec["features"]), bool(spec["bias"])
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if spec["conv"]:
        kernel = int(spec["kernel"])
        convolution = nn.Conv2d(size, size, kernel, padding=kernel // 2, bias=bias)
        nn.init.dirac_(convolution.weight)
        parts["layer"] = convolution
    else:
        linear = nn.Linear(size, size, bias=bias)
        nn.init.eye_(linear.weight)
        parts["layer"] = linear
    if bias:
        nn.init.zeros_(cast(Tensor, parts["layer"].bias))
    if spec["norm"]:
        parts["norm"] = nn.BatchNorm2d(size) if spec["conv"] else nn.BatchNorm1d(size)
    kind = spec["activation"]
    parts["act"] = (
        Rational(size) if kind == "rational" else nn.PReLU(size, init=1.0) if kind == "prelu" else nn.LeakyReLU(1.0)
    )
    return nn.Sequential(parts)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x (N, C, ...) in each channel."""
    dims = [d for d in range(x.ndim) if d != 1]
    return x.mean(dims), x.var(dims, unbiased=False)


@torch.no_grad()
def absorb(unit: nn.Sequential, x: Tensor) -> None:
    """BatchNorm as the identity: running mean m and variance v of ``x``, gamma = sqrt(v + eps), beta = m."""
    norm = unit._modules.get("norm")
    if not isinstance(norm, _BatchNorm):
        return
    mean, var = channel_statistics(cast(Tensor, unit._modules["layer"](x)))  # type: ignore[misc]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm.weight.copy_((var + norm.eps).sqrt())
    norm.bias.copy_(mean)


def bounded(basis: Tensor) -> tuple[Tensor, Tensor]:
    """``basis`` in float64 with its singular values raised to 1e-3 of their mean, and the inverse of that."""
    u, s, v = torch.linalg.svd(basis.double())
    s = s.clamp(min=_CLIP * s.mean().item())
    return u @ torch.diag(s) @ v, v.T @ torch.diag(1 / s) @ u.T


@torch.no_grad()
def split_linear(layer: nn.Linear, basis: Tensor, shift: Tensor | None = None) -> nn.Linear:
    """SENN's split of y = W x + b into h = W1 x + b1 and y = W2 h + b2: returns the first; ``layer`` becomes the other.

    W2 = W W1^-1 and b2 = b - W2 b1. Singular values of ``basis`` below 1e-3 of their mean are raised to that.

    Args:
        layer: (O, I).
        basis: W1 (I, I).
        shift: b1 (I); it needs a bias in ``layer``.
    """
    if tuple(basis.shape) != (layer.in_features, layer.in_features):
        raise ValueError(f"basis: shape {tuple(basis.shape)}; allowed: {(layer.in_features, layer.in_features)}")
    if shift is not None and layer.bias is None:
        raise ValueError("shift: the layer has no bias that could take it up")
    forth, back = bounded(basis)
    first = nn.Linear(layer.in_features, layer.in_features, bias=layer.bias is not None).to(layer.weight)
    first.weight.copy_(forth)
    second = layer.weight.double() @ back
    layer.weight.copy_(second)
    if layer.bias is not None:
        b1 = torch.zeros(layer.in_features) if shift is None else shift
        first.bias.copy_(b1)
        layer.bias.copy_(layer.bias.double() - second @ b1.to(second))
    return first


# -- one expansion of the structure -----------------------------------------------------------------------------------


def apply_op(
    model: nn.Module, op: Mapping[str, Any], wrappers: set[str]
) -> tuple[list[Change], Fresh, nn.Sequential | None]:
    """One expansion of the structure; the parameters that grew, those that are new with a neighbour, the new layer."""
    if op["kind"] == "units":
        edits = {
            m: {s: [(int(a), int(n)) for a, n in gaps] for s, gaps in sides.items()} for m, sides in op["edits"].items()
        }
        return _widen(model, edits), [], None
    where = str(op["where"])
    present = model.get_submodule(where)
    neighbour = _neighbour(model, where)
    unit = make_unit(op["unit"]).to(neighbour).train(present.training)
    parent = where.rpartition(".")[0]
    if op["place"] == "behind":
        if where in wrappers:
            cast(nn.Sequential, present).append(unit)
        else:
            replace_module(model, where, nn.Sequential(present, unit).train(present.training))
            wrappers.add(where)
    elif parent in wrappers:
        cast(nn.Sequential, model.get_submodule(parent)).insert(int(where.rpartition(".")[2]), unit)
    else:
        replace_module(model, where, nn.Sequential(unit, present).train(present.training))
        wrappers.add(where)
    return [], [(p, neighbour) for p in unit.parameters()], unit


def _neighbour(model: nn.Module, where: str) -> nn.Parameter:
    """A parameter at ``where``, or the last one before it."""
    inside = list(model.get_submodule(where).parameters())
    if inside:
        return inside[0]
    last: nn.Parameter | None = None
    for name, module in model.named_modules():
        if name == where and last is not None:
            return last
        for p in module.parameters(recurse=False):
            last = p
    return next(model.parameters())


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one called ``name``."""
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path)._modules[leaf] = module


# -- optimisers -------------------------------------------------------------------------------------------------------


def check_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse a state that cannot grow, before anything is changed."""
    for p in parameters:
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape:
                raise ValueError(
                    f"optimizer: {type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a "
                    f"parameter of shape {tuple(p.shape)}; allowed: optimisers whose state is shaped alike (SGD, Adam)"
                )


def grow_state(optimizer: Optimizer, changes: Iterable[Change]) -> None:
    """Surviving entries keep their state, new ones start at zero, step counts stay."""
    for p, shape, by_dim in changes:
        state = optimizer.state.get(p, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and tuple(value.shape) == shape and value.ndim:
                for dim, gaps in by_dim.items():
                    value = insert(value, dim, gaps, 0.0)
                state[key] = value


def join_groups(optimizer: Optimizer, fresh: Fresh) -> None:
    """New parameters enter the group of the neighbour given with each."""
    for p, neighbour in fresh:
        groups = optimizer.param_groups
        if any(p is q for g in groups for q in g["params"]):
            continue
        for group in groups:
            if any(q is neighbour for q in group["params"]):
                group["params"].append(p)
                break
