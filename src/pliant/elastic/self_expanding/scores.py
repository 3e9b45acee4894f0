"""The natural expansion score: of gradients, of moments, of a layer, of a network.

First the formulas alone (``exact_score``, ``diag_score``, ``kfac_score`` and the increases), then what they are made
of: per-sample gradients, the geometry by which a layer reads its input, and ``observe``, the one pass over the samples
from which every K-FAC moment of a check is taken. ``natural_expansion_score`` joins them. The package's docstring has
the notation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from pliant.core import check
from pliant.core.inputs import (
    IGNORED,
    Batch,
    Input,
    call,
    evaluating,
    logits,
    map_tensors,
    removing,
    rows_of,
    split_batch,
    take,
)
from pliant.core.objective import Criterion, cross_entropy

SCORES = ("kfac", "diag", "exact")
METRICS = ("empirical", "output")
INPUT_DAMPING = 1e-6  # of A, in units of its mean diagonal
_ELEMENTS = 8_000_000  # numbers that one tensor of a sum over samples may hold at once


# -- functions of gradients and moments -------------------------------------------------------------------------------


def exact_score(
    rows: Tensor, cotangent: Tensor | None = None, *, samples: int | None = None, damping: float = 0.0
) -> Tensor:
    """Score (1/N) w' K (K + N eps I)^-1 w with K = R R': SENN eq. 3, in whichever of the two forms is smaller.

    Args:
        rows: R, gradients G (N, P) for the empirical Fisher, or the outputs' Jacobian J (N * outputs, P).
        cotangent: w, g_y (N * outputs); ones for the empirical Fisher.
        samples: N; the number of rows by default.
        damping: eps. With 0 it is the projection of w on the range of R.

    Returns:
        a scalar in float64.
    """
    r = rows.double()
    w = torch.ones(len(r), dtype=torch.float64, device=r.device) if cotangent is None else cotangent.double().flatten()
    n = len(r) if samples is None else samples
    if damping == 0:
        u, s, _ = torch.linalg.svd(r, full_matrices=False)
        kept = s > s.max() * max(r.shape) * torch.finfo(torch.float64).eps
        return cast(Tensor, (u[:, kept].T @ w).square().sum() / n)
    if len(r) <= r.shape[1]:
        return gram_score(r @ r.T, w, n, damping)
    mean = r.T @ w / n
    fisher = r.T @ r / n
    fisher.diagonal().add_(damping)
    return cast(Tensor, mean @ torch.linalg.solve(fisher, mean))


def gram_score(gram: Tensor, w: Tensor, samples: int, damping: float) -> Tensor:
    """``exact_score`` where K = R R' is known and R is not."""
    if damping == 0:
        values, vectors = torch.linalg.eigh(gram)
        kept = vectors[:, values > values.max() * len(gram) * 1e-14]
        return cast(Tensor, (kept.T @ w).square().sum() / samples)
    shifted = gram.clone()
    shifted.diagonal().add_(samples * damping)
    return cast(Tensor, w @ gram @ torch.linalg.solve(shifted, w) / samples)


def diag_score(
    rows: Tensor, cotangent: Tensor | None = None, *, samples: int | None = None, eps: float = 1e-5
) -> Tensor:
    """Score sum_k g_k^2 / (F_kk + eps), SECNN; the arguments are those of ``exact_score``."""
    r = rows.double()
    n = len(r) if samples is None else samples
    mean = (r if cotangent is None else r * cotangent.double().reshape(-1, 1)).sum(0) / n
    return (mean.square() / (r.square().sum(0) / n + eps)).sum()


def kfac_score(
    inputs: Tensor, gradients: Tensor, cross: Tensor, *, damping: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Score Tr(S^-1 W A^-1 W') of one layer.

    Args:
        inputs: A (D, D).
        gradients: S (O, O).
        cross: W (O, D).
        damping: of A and of S, each in units of its mean diagonal.

    Raises:
        ValueError: a factor is singular; the message suggests damping.
    """
    a, s = damped(inputs, damping[0], "A"), damped(gradients, damping[1], "S")
    return cast(Tensor, (torch.linalg.solve(s, cross) * torch.linalg.solve(a, cross.T).T).sum())


def kfac_increase(
    gradients: Tensor, cross: Tensor, gram: Tensor, *, damping: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Tr(S^-1 C' M^-1 C): Delta' where M (..., D, D) is A_p, Delta where it is the Schur complement; C (..., D, O)."""
    m = damped(gram, damping[0], "A_p")
    factor = torch.linalg.cholesky(damped(gradients, damping[1], "S").inverse())
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(m), cross, upper=False)
    return cast(Tensor, (white @ factor).square().sum((-1, -2)))


def increase_bound(present: Tensor, gradients: Tensor, proposed: Tensor, *, samples: int | None = None) -> Tensor:
    """Delta' of SENN theorem 3.2 without damping.

    Args:
        present: a_c (n, D), with its constant column where the layer has a bias.
        gradients: d (n, O).
        proposed: a_p (n, D_p).
        samples: N; n by default. Convolutions have n = N * positions.
    """
    n = len(present) if samples is None else samples
    residual = _unexplained(gradients, present)
    return kfac_increase(gradients.T @ gradients / n, proposed.T @ residual / n, proposed.T @ proposed / n)


def increase_exact(present: Tensor, gradients: Tensor, proposed: Tensor, *, samples: int | None = None) -> Tensor:
    """Delta: the exact increase of ``kfac_score``; the arguments are those of ``increase_bound``."""
    n = len(present) if samples is None else samples
    residual = _unexplained(gradients, present)
    fresh = _unexplained(proposed, present)
    return kfac_increase(gradients.T @ gradients / n, proposed.T @ residual / n, fresh.T @ fresh / n)


def _unexplained(t: Tensor, present: Tensor) -> Tensor:
    """What is left of t (n, K) after its best linear guess from a_c."""
    return cast(Tensor, t - present @ torch.linalg.solve(present.T @ present, present.T @ t))


def penalised(eta: float, added: int, penalty: float) -> float:
    """SECNN's score of a larger network: eta exp(-lambda dp^2)."""
    return eta * math.exp(-penalty * added**2)


def damped(matrix: Tensor, share: float, name: str) -> Tensor:
    """``matrix`` + share * its mean diagonal; positive definite, or an error that suggests damping."""
    if share:
        scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        tiny = torch.finfo(matrix.dtype).tiny ** 0.5  # all gradients are zero: nothing to explain
        matrix = matrix + (share * scale + tiny) * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    if bool((torch.linalg.cholesky_ex(matrix.detach()).info != 0).any()):
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"score: the moments {name} hold NaN or infinity; the network or its loss has diverged")
        raise ValueError(
            f"damping: {name} ({matrix.shape[-1]} x {matrix.shape[-1]}) is singular, as it is with fewer samples than "
            "its size; give more samples, or a damping above 0 such as 0.1"
        )
    return matrix


# -- per-sample gradients ---------------------------------------------------------------------------------------------


def _outer_gradient(criterion: Criterion, output: Tensor, target: Any) -> Tensor:
    """g_y (N, outputs): the gradient of each sample's own loss with respect to its own output.

    Raises:
        ValueError: the criterion has no loss for each sample, or it is not finite.
    """
    half = output.dtype in (torch.float16, torch.bfloat16)
    out = (output.detach().float() if half else output.detach()).requires_grad_()
    return _row_gradients(criterion, out, target).to(output.dtype)


def _row_gradients(criterion: Criterion, out: Tensor, target: Any) -> Tensor:
    """``_outer_gradient`` for an output that is a leaf."""
    with torch.enable_grad():
        whole = criterion(out, target)
        if not isinstance(whole, Tensor) or whole.ndim > 1 or (whole.ndim == 1 and len(whole) != len(out)):
            got = f"shape {tuple(whole.shape)}" if isinstance(whole, Tensor) else type(whole).__name__
            raise ValueError(
                f"criterion: it returned {got}; allowed: a scalar, or one loss for each of {len(out)} rows"
            )
        finite(whole.detach(), "the loss")
        if whole.ndim == 1:
            (found,) = torch.autograd.grad(whole.sum(), out)
            return finite(found, "the gradient of the loss")

        if criterion is cross_entropy:  # a mean over what counts, in which no row sees another
            (found,) = torch.autograd.grad(whole, out)
            return finite(found * len(out), "the gradient of the loss")

        def single(o: Tensor, t: Any) -> tuple[Tensor, Tensor]:
            value = criterion(o[None], map_tensors(t, lambda v: v[None])).sum()
            return value, value

        try:
            found, values = vmap(grad(single, has_aux=True))(out.detach(), target)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                "criterion: per-sample gradients are needed, and it cannot be evaluated on single samples "
                f"({str(error).strip().splitlines()[0]}); return one loss for each sample (reduction='none')"
            ) from error
    if not any(
        torch.allclose(whole.detach().double(), v, rtol=1e-3, atol=1e-6)
        for v in (values.double().mean(), values.double().sum())
    ):
        raise ValueError(
            f"criterion: already reduced to a scalar ({whole.item():.6g}) that is neither the mean "
            f"({values.mean():.6g}) nor the sum ({values.sum():.6g}) of the samples' losses, so that they have no "
            "gradients of their own; return one loss for each sample (reduction='none')"
        )
    return finite(found, "the gradient of the loss")


def finite(t: Tensor, what: str) -> Tensor:
    """``t``, or an error where it holds NaN or infinity."""
    if not bool(torch.isfinite(t).all()):
        raise ValueError(f"score: {what} holds NaN or infinity; the network or its loss has diverged")
    return t


def sample_rows(model: nn.Module, x: Input, criterion: Criterion, y: Any, metric: str) -> tuple[Tensor, Tensor | None]:
    """G (N, P) and None, or J (N * outputs, P) and g_y (N * outputs), by ``torch.func``, in evaluation mode."""
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    others = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())

    def output(theta: dict[str, Tensor], one: Any) -> Tensor:
        alone = map_tensors(one, lambda t: t[None])
        args = (alone,) if isinstance(alone, Tensor) else () if isinstance(alone, Mapping) else tuple(alone)
        kwargs = dict(alone) if isinstance(alone, Mapping) else {}
        return logits(functional_call(model, theta | others, args, kwargs))[0]

    def loss(theta: dict[str, Tensor], one: Any, cotangent: Tensor) -> Tensor:
        return (output(theta, one) * cotangent).sum()

    x = dict(x) if isinstance(x, Mapping) else x
    with evaluating(model):
        with torch.no_grad():
            out = logits(call(model, x))
        outer = _outer_gradient(criterion, out, y)
        with torch.enable_grad():
            try:
                if metric == "output":
                    parts = []
                    for o in range(outer[0].numel()):  # over outputs, not over samples
                        one_hot = torch.zeros_like(outer[0]).flatten()
                        one_hot[o] = 1
                        found = vmap(grad(loss), in_dims=(None, 0, None))(
                            parameters, x, one_hot.reshape(outer[0].shape)
                        )
                        parts.append(torch.cat([v.reshape(len(outer), -1) for v in found.values()], 1))
                    rows = torch.stack(parts, 1).flatten(0, 1)
                    return finite(rows.detach(), "the Jacobian"), outer.flatten()
                # The loss's gradient is the output's, weighted by g_y; so the criterion itself need not be vmapped.
                found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, outer)
            except RuntimeError as error:
                raise ValueError(
                    f"model: torch.func cannot give per-sample gradients of it ({str(error).strip().splitlines()[0]}); "
                    "use the score 'kfac', which needs none"
                ) from error
    rows = torch.cat([v.reshape(len(outer), -1) for v in found.values()], 1)
    return finite(rows.detach(), "a sample's gradient"), None


def counted_rows(x: Input, y: Any) -> tuple[Any, Any]:
    """The batch without the samples whose targets are all ignored (-100): they have no loss.

    Raises:
        ValueError: no sample is left.
    """
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.ndim == 0 or len(y) != rows_of(x):
        return x, y
    counted = (y != IGNORED).reshape(len(y), -1).any(1)
    if bool(counted.all()):
        return x, y
    if not bool(counted.any()):
        raise ValueError("data: every target of the samples to score is -100, which does not count")
    return take(x, counted), y[counted]


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """The global random state after the block is the one before it."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        yield


# -- geometry of a layer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How a Linear or Conv2d reads its input."""

    conv: bool
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True

    @property
    def dim(self) -> int:
        """The dimension of the channels."""
        return 1 if self.conv else -1

    @property
    def taps(self) -> int:
        """Weights of one output for each input channel."""
        return self.kernel[0] * self.kernel[1]

    def patches(self, a: Tensor) -> Tensor:
        """(N, I, H, W) or (N, ..., I) -> (N, T, I * taps)."""
        if not self.conv:
            return a.reshape(len(a), -1, a.shape[-1])
        return F.unfold(a, self.kernel, self.dilation, self.padding, self.stride).transpose(1, 2)

    def inputs(self, a: Tensor) -> Tensor:
        """The patches (N, T, D), with the constant 1 of a bias as the last column."""
        patches = self.patches(a)
        return torch.cat([patches, patches.new_ones((*patches.shape[:2], 1))], 2) if self.bias else patches

    def rows(self, d: Tensor) -> Tensor:
        """(N, O, H, W) or (N, ..., O) -> (N, T, O)."""
        return d.flatten(2).transpose(1, 2) if self.conv else d.reshape(len(d), -1, d.shape[-1])

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with other weights: (O, I, kh, kw) or (O, I)."""
        if self.conv:
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
        return F.linear(x, weight, bias)


def geometry_of(module: nn.Module) -> Geometry | str:
    """How ``module`` reads its input, or why it cannot be grown."""
    if isinstance(module, nn.Linear):
        return Geometry(False, bias=module.bias is not None)
    if not isinstance(module, nn.Conv2d):
        return f"a {type(module).__name__} cannot be grown"
    if module.groups > 1:
        return "a convolution with groups cannot be grown"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r} is not supported"
    padding = module.padding
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if padding == "same" and any(t % 2 for t in total):
            return "padding='same' with an even kernel pads unevenly"
        padding = (total[0] // 2, total[1] // 2) if padding == "same" else (0, 0)
    kernel, stride, dilation = (
        cast("tuple[int, int]", tuple(v)) for v in (module.kernel_size, module.stride, module.dilation)
    )
    return Geometry(True, kernel, stride, cast("tuple[int, int]", tuple(padding)), dilation, module.bias is not None)


# -- one pass over the score batch, kept ------------------------------------------------------------------------------


@dataclass
class Seen:
    """Inputs and gradients of every Linear and Conv2d that runs once, on one batch, in evaluation mode."""

    samples: int
    x: Input
    y: Any
    outer: Tensor  # g_y (N, outputs)
    geometry: dict[str, Geometry] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # d, of the layer's output
    entering: dict[str, Tensor] = field(default_factory=dict)  # d loss / d input, through this layer alone
    behind: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # output and gradient at named modules
    jacobians: dict[str, list[Tensor]] = field(default_factory=dict)  # for the outputs' metric: d output_o / d ...
    moments: dict[str, Moments] = field(default_factory=dict)


@dataclass
class Moments:
    """A (D, D), S (O, O), W (O, D) of one layer, in float64."""

    inputs: Tensor
    gradients: Tensor
    cross: Tensor

    def score(self, damping: float) -> float:
        """The layer's score, Tr(S^-1 W A^-1 W')."""
        share = 0.0 if damping == 0 else INPUT_DAMPING
        return float(kfac_score(self.inputs, self.gradients, self.cross, damping=(share, damping)))

    def explained(self) -> Tensor:
        """W A^-1 (O, D): the best linear guess of d from the present inputs."""
        return cast(Tensor, torch.linalg.solve(damped(self.inputs, INPUT_DAMPING, "A"), self.cross.T).T)


def observe(
    model: nn.Module, x: Input, y: Any, criterion: Criterion, *, metric: str = "empirical", spots: Sequence[str] = ()
) -> Seen:
    """Run ``model`` once forward and backward; ``spots`` are modules whose outputs are wanted too."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    spotted: dict[str, Tensor] = {}
    entered: dict[str, Tensor] = {}
    layers = {n: (m, g) for n, m in model.named_modules() if isinstance(g := geometry_of(m), Geometry)}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            # A copy, so that its gradient is what comes through this layer alone.
            entered[name] = args[0].clone() if args[0].requires_grad else args[0].detach().clone().requires_grad_()
            return (entered[name], *args[1:])

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            calls.setdefault(name, []).append((args[0], output))
            return output.clone()  # an activation in place must not change what was noted

        return hook

    def behind(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            spotted[name] = output.clone() if output.requires_grad else output.detach().requires_grad_()
            return spotted[name].clone()

        return hook

    handles = [m.register_forward_pre_hook(before(n)) for n, (m, _) in layers.items()]
    handles += [m.register_forward_hook(after(n)) for n, (m, _) in layers.items()]
    handles += [model.get_submodule(n).register_forward_hook(behind(n)) for n in spots]
    with removing(handles), evaluating(model), torch.enable_grad():
        output = logits(call(model, x))
    outer = _outer_gradient(criterion, output, y)
    seen = Seen(rows_of(x), x, y, outer)
    once = [n for n, made in calls.items() if len(made) == 1 and made[0][1].shape[0] == seen.samples]
    wanted: list[Tensor] = []
    for name in once:
        a, s = calls[name][0]
        seen.geometry[name], seen.inputs[name], seen.outputs[name] = layers[name][1], a.detach(), s.detach()
        wanted += [s, entered[name]]
    wanted += list(spotted.values())
    if not wanted:
        return seen

    def gradients(cotangent: Tensor, keep: bool) -> list[Tensor]:
        found = torch.autograd.grad(output, wanted, cotangent, retain_graph=keep, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]

    def file(found: list[Tensor], store: dict[str, Any], entering: dict[str, Any], spot: dict[str, Any]) -> None:
        for i, name in enumerate(once):
            store[name], entering[name] = found[2 * i], found[2 * i + 1]
        for i, name in enumerate(spotted):
            spot[name] = found[2 * len(once) + i]

    loops = outer[0].numel() if metric == "output" else 0
    at_spots: dict[str, Tensor] = {}
    file(gradients(outer.reshape(output.shape), loops > 0), seen.gradients, seen.entering, at_spots)
    seen.behind = {n: (spotted[n].detach(), at_spots[n]) for n in spotted}
    for o in range(loops):  # over outputs, not over samples
        one_hot = torch.zeros_like(outer).flatten(1)
        one_hot[:, o] = 1
        parts: tuple[dict[str, Any], ...] = ({}, {}, {})
        file(gradients(one_hot.reshape(output.shape), o < loops - 1), *parts)
        for prefix, part in zip(("out", "in", "at"), parts, strict=True):
            for name, value in part.items():
                seen.jacobians.setdefault(f"{prefix} {name}", []).append(value)
    for name in once:
        finite(seen.inputs[name], f"the input of {name!r}")
        finite(seen.gradients[name], f"the gradient at {name!r}")
    return seen


def chunks(samples: int, numbers: int) -> Iterator[slice]:
    """Slices of the samples, of at most so many that each sample's ``numbers`` fit the memory set aside."""
    step = max(1, _ELEMENTS // max(numbers, 1))
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


def moments_of(geometry: Geometry, a: Tensor, d: Tensor, jacobians: Sequence[Tensor] | None = None) -> Moments:
    """A, S, W of a layer of that geometry; S is the outputs' metric where ``jacobians`` are given."""
    n = len(a)
    size = a[:1].numel() * geometry.taps
    total: list[Tensor] = []
    for part in chunks(n, size):
        # In float64 throughout: the least eigenvalues of A are what its inverse is made of.
        p, r = (t.flatten(0, 1).double() for t in (geometry.inputs(a[part]), geometry.rows(d[part])))
        sums = [p.T @ p, r.T @ r, r.T @ p]
        total = sums if not total else [t + s for t, s in zip(total, sums, strict=True)]
    if jacobians is not None:
        each = [geometry.rows(j).flatten(0, 1).double() for j in jacobians]
        total[1] = torch.stack([j.T @ j for j in each]).sum(0)
    return Moments(total[0] / n, total[1] / n, total[2] / n)


def layer_moments(seen: Seen, name: str) -> Moments:
    """The moments of layer ``name``, computed once."""
    if name not in seen.moments:
        jacobians = seen.jacobians.get(f"out {name}")
        seen.moments[name] = moments_of(seen.geometry[name], seen.inputs[name], seen.gradients[name], jacobians)
    return seen.moments[name]


# -- the score of a network -------------------------------------------------------------------------------------------


def natural_expansion_score(
    model: nn.Module,
    batch: Batch,
    criterion: Criterion | None = None,
    *,
    fisher: Literal["kfac", "diag", "exact"] = "kfac",
    metric: Literal["empirical", "output"] = "empirical",
    damping: float | None = None,
) -> float:
    """Score g' F^-1 g of ``model`` on one batch, in evaluation mode; SENN eq. 3, SECNN.

    Args:
        model: any network; weights, buffers, gradients, mode and random state are left as they are.
        batch: ``(input, target)``, or a mapping with ``"labels"``.
        criterion: ``criterion(output, target)``: a mean or a sum over samples, or one loss for each; cross entropy.
        fisher: "exact", "diag", or "kfac" (over its Linear and Conv2d layers alone).
        metric: the empirical Fisher, or the metric of the outputs.
        damping: "exact": eps, 1e-3 by default; "diag": eps, 1e-5; "kfac": of S in units of its mean diagonal, 0.1.

    Raises:
        ValueError: an argument is not allowed, the loss has no per-sample gradients, or something is not finite.
        TypeError: ``criterion`` is a loss that was computed already.
    """
    check.choice("fisher", fisher, SCORES)
    check.choice("metric", metric, METRICS)
    chosen = {"exact": 1e-3, "diag": 1e-5, "kfac": 0.1}[fisher] if damping is None else damping
    check.number("damping", chosen, at_least=0)
    chosen_criterion = criterion_of(criterion)
    x, y = counted_rows(*split_batch(batch))
    with keeping_random_state():
        if fisher == "kfac":
            seen = observe(model, x, y, chosen_criterion, metric=metric)
            if not seen.inputs:
                raise ValueError("model: it runs no Linear or Conv2d layer once, which the K-FAC score is made of")
            return sum(layer_moments(seen, n).score(chosen) for n in seen.inputs)
        rows, cotangent = sample_rows(model, x, chosen_criterion, y, metric)
        function = exact_score if fisher == "exact" else diag_score
        option = {"damping" if fisher == "exact" else "eps": chosen}
        return float(function(rows, cotangent, samples=rows_of(x), **option))


def criterion_of(criterion: Criterion | None) -> Criterion:
    """The criterion to use: cross entropy by default."""
    if isinstance(criterion, Tensor):
        raise TypeError(
            f"criterion: got a tensor of shape {tuple(criterion.shape)}, a loss already reduced; per-sample gradients "
            "are needed, so give the function criterion(output, target) itself"
        )
    check.optional(check.function, "criterion", criterion)
    return criterion or cross_entropy
