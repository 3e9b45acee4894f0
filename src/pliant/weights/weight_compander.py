r"""Weight Compander: a simple weight reparameterization for regularization (Cakaj, Mehnert, Yang; arXiv 2306.16993).

Every weight w is written as w = Psi(v) and v is what gradient descent trains. Psi is odd, increasing, steep at zero
and saturates: saturation bounds \|w\|, so no single weight dominates, and steepness pushes trained weights away from
zero, so more of them take part. No term is added to the loss; after training the map is merged away.

Elementwise, for one layer's weight w and v of the same shape (O, I, ...), with two scalars a, b > 0 per layer::

    w     = Psi(v)    = a arctan(v / b)                |w| < a pi / 2
    v     = Psi^-1(w) = b tan(w / a)
    dw/dv = (a / b) / (1 + (v / b)^2)                  in (0, a / b]
    dw/da = arctan(v / b)       dw/db = -(a v / b^2) / (1 + (v / b)^2)
    one step of gradient descent on v:   dw = -lr (dw/dv)^2 dL/dw   to first order

Start: a = b = 3 std(w), which keeps the slope at zero at 1, and v = Psi^-1(w), which keeps the network's function.
Where a weight would lie beyond 0.95 of the bound, a and b grow for that layer and a warning says so.

The source is silent, or could not be reached, on the function (``fn`` has others for the same role), on the scope of
a and b (one pair for each layer here), on their start, and on how learned ones are kept from running away. Here log a
and log b are trained at a tenth of the learning rate, without decay, each gradient within [-1, 1], and stay within a
factor of ten of their start. ``mulaw`` has slope mu / ln(1 + mu) = 46 at v = 0 where a = b; its b starts at 46 a, so
that the slope is 1 for every function. ``decay_on="w"`` adds lam/2 \|w\|^2, which is what weight decay is to a plain w.

With bf16 or fp16 weights Psi is computed in float32. Adam divides by the gradient's size, so that one of the two
factors dw/dv cancels and the effect is weaker than with SGD. Averages over training (EMA, SWA) of v and of w differ:
average the weights of ``extract``, or use ``averaged``, which averages w.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant.core import check
from pliant.core.dynamic import Dynamic, Point, Value
from pliant.core.inputs import Batch, Input, call, check_example, packed, split_batch
from pliant.core.objective import Criterion, loss

FUNCTIONS = ("arctan", "tanh", "softsign", "mulaw", "identity")
TARGETS = ("Linear", "Conv1d", "Conv2d", "Conv3d")
_MU = 255.0
_LARGEST = 1e6  # of a scale: beyond it v / b would be too small for float32 to tell weights apart
_GUARD = 0.95  # largest share of the bound that a weight may have at the start
_RANGE = math.log(10.0)  # how far log a and log b may move from their start


def psi(v: Tensor, a: Tensor | float, b: Tensor | float, fn: str = "arctan") -> Tensor:
    """The weight w = Psi(v), elementwise; a and b are scalars."""
    x = v / b
    if fn == "arctan":
        return a * torch.arctan(x)
    if fn == "tanh":
        return a * torch.tanh(x)
    if fn == "softsign":
        x = x.clamp(-1e30, 1e30)  # infinity divided by infinity is no number
        return a * (x / (1 + x.abs()))
    if fn == "mulaw":  # the two halves in turn: |x| has no derivative at zero, and relu's there is 0
        positive, negative = torch.log1p(_MU * x.clamp(min=0)), torch.log1p(_MU * torch.relu(-x))
        return a * (positive - negative) / math.log1p(_MU)
    return v.clone()


def psi_inverse(w: Tensor, a: Tensor | float, b: Tensor | float, fn: str = "arctan") -> Tensor:
    """The stored v = Psi^-1(w), computed in float64 and given in w's type; w must lie within the bound."""
    y = w.double() / (a.double() if isinstance(a, Tensor) else a)
    scale = b.double() if isinstance(b, Tensor) else b
    if fn == "arctan":
        v = scale * torch.tan(y)
    elif fn == "tanh":
        v = scale * torch.atanh(y)
    elif fn == "softsign":
        v = scale * y / (1 - y.abs())
    elif fn == "mulaw":
        v = scale * torch.sign(y) * torch.expm1(y.abs() * math.log1p(_MU)) / _MU
    else:
        return w.clone()
    return v.to(w.dtype)


def _bound(fn: str) -> float:
    """Supremum of |Psi| divided by a."""
    return {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0}.get(fn, math.inf)


def _slope(fn: str) -> float:
    """Psi's slope at zero where a = b."""
    return _MU / math.log1p(_MU) if fn == "mulaw" else 1.0


class _Clip(torch.autograd.Function):
    """The identity, whose gradient is clipped to [-1, 1]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1.0, 1.0)


class Compander(nn.Module):
    """The parametrisation of one weight: ``forward`` is Psi, ``right_inverse`` is Psi^-1.

    Raises:
        ValueError: ``a`` or ``b`` is not a finite number above zero, or ``fn`` is unknown.
    """

    start: Tensor
    log_a: Tensor

    def __init__(
        self,
        a: float,
        b: float,
        fn: str = "arctan",
        *,
        learnable: bool = False,
        tie_slope: bool = False,
        init: str = "inverse",
        name: str = "weight",
    ) -> None:
        super().__init__()
        self.fn: str = check.choice("fn", fn, FUNCTIONS)
        self.learnable, self.tie_slope = check.boolean("learnable", learnable), check.boolean("tie_slope", tie_slope)
        self.init: str = check.choice("init", init, ("inverse", "value"))
        self.name = check.text("name", name)
        start = [check.positive("a", a), check.positive("b", b)]
        self.register_buffer("start", torch.tensor(start, dtype=torch.float64).log().float())
        if learnable:
            self.log_a = nn.Parameter(self.start[0].clone())
            if not tie_slope:
                self.log_b = nn.Parameter(self.start[1].clone())

    def scales(self) -> tuple[Tensor, Tensor]:
        """The scalars a and b."""
        if not self.learnable:
            both = self.start.exp()
            return both[0], both[1]
        log_a: Tensor = _Clip.apply(self.log_a)  # type: ignore[no-untyped-call]
        if self.tie_slope:  # b = a / slope
            return log_a.exp(), (log_a + (self.start[1] - self.start[0])).exp()
        log_b: Tensor = _Clip.apply(self.log_b)  # type: ignore[no-untyped-call]
        return log_a.exp(), log_b.exp()

    def forward(self, v: Tensor) -> Tensor:
        """From v (any shape) to w of the same shape and type."""
        a, b = self.scales()
        if v.dtype in (torch.float16, torch.bfloat16):
            return psi(v.float(), a.float(), b.float(), self.fn).to(v.dtype)
        return psi(v, a.to(v.dtype), b.to(v.dtype), self.fn)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """From w to v.

        Raises:
            ValueError: a weight lies at or beyond the bound.
        """
        return w.clone() if self.init == "value" else self.inverse(w)

    @torch.no_grad()
    def inverse(self, w: Tensor, clip: bool = False) -> Tensor:
        """Psi^-1(w), whatever ``init`` says; with ``clip`` weights beyond the bound are first moved inside it."""
        a, b = self.scales()
        # In float32 arctan cannot come nearer to the bound than this without v losing its meaning.
        limit = a.item() * _bound(self.fn) * (1 - 1e-4)
        largest = w.abs().max().item() if w.numel() else 0.0
        if not math.isfinite(largest):
            raise ValueError(f"{self.name}: it holds NaN or infinity")
        if largest >= limit:
            if not clip:
                raise ValueError(
                    f"{self.name}: max|w| = {largest:.4g} reaches the bound {a.item() * _bound(self.fn):.4g} of "
                    f"{self.fn} with a = {a.item():.4g}; pass clip=True, or a larger scale"
                )
            w = w.clamp(-limit, limit)
        return psi_inverse(w, a, b, self.fn)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep learned a and b within a factor of ten of their start."""
        for i, name in enumerate(("log_a", "log_b")):
            value = getattr(self, name, None)
            if value is not None:
                value.clamp_(self.start[i] - _RANGE, self.start[i] + _RANGE)

    def extra_repr(self) -> str:
        """The function and its scalars."""
        with torch.no_grad():
            a, b = self.scales()
        return f"{self.fn}, a={a.item():.4g}, b={b.item():.4g}, learnable={self.learnable}"


# -- on any module ----------------------------------------------------------------------------------------------------


def compand(
    model: nn.Module,
    *,
    fn: str = "arctan",
    scale: float = 3.0,
    learnable: bool = False,
    tie_slope: bool = False,
    init: str = "inverse",
    target_modules: Sequence[str] = TARGETS,
    exclude: Sequence[str] = (),
) -> nn.Module:
    """Reparameterise the weights of ``model`` in place and return it.

    Modules are chosen by the name of their class or of one of its bases; ``exclude`` holds module names, whole, as the
    beginning of a dotted path, or with wildcards. A weight that several modules share is companded once and stays
    shared; where one of its owners is excluded, all are left alone.

    Raises:
        ValueError: an argument is not allowed, nothing is chosen, a layer is companded already, or its weights are all
            zero or not finite.
        TypeError: a chosen weight is not real floating point (a quantised or complex layer).
    """
    check.module("model", model)
    check.choice("fn", fn, FUNCTIONS)
    check.number("scale", scale, above=0, at_most=_LARGEST)
    check.boolean("learnable", learnable)
    check.boolean("tie_slope", tie_slope)
    check.choice("init", init, ("inverse", "value"))
    target_modules = check.names("target_modules", target_modules, empty=False)
    exclude = check.names("exclude", exclude)
    everything = dict(model.named_modules())
    for pattern in exclude:
        if not any(_matches(name, pattern) for name in everything):
            raise ValueError(f"exclude: {pattern!r} matches no module; there are {', '.join(list(everything)[1:13])}")
    chosen = {n: m for n, m in everything.items() if any(c.__name__ in target_modules for c in type(m).__mro__)}
    kept = {n: m for n, m in chosen.items() if not any(_matches(n, pattern) for pattern in exclude)}
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}  # of each parameter: module name, module, attribute
    for name, module in everything.items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module, attribute))
    plan: list[tuple[str, nn.Module, list[tuple[str, nn.Module, str]], float]] = []
    seen: set[int] = set()
    for name, module in kept.items():
        if any(isinstance(p, Compander) for p in _chain(module)):
            raise ValueError(f"model: layer {name or 'itself'} is companded already; fold() it first")
        weight = getattr(module, "weight", None)
        weight = (
            weight() if callable(weight) and not isinstance(weight, Tensor) else weight
        )  # quantised layers: a method
        if not isinstance(weight, Tensor):
            raise TypeError(f"model: layer {name or 'itself'} has no weight tensor")
        if not weight.is_floating_point():
            raise TypeError(
                f"model: layer {name or 'itself'} has a weight of type {weight.dtype}; it must be real floating"
            )
        shared = owners.get(id(module._parameters.get("weight")), [])
        if id(weight) in seen and shared:
            continue
        seen.add(id(weight))
        if any(_matches(n, pattern) for n, _, _ in shared for pattern in exclude):
            continue
        plan.append((name, module, [o for o in shared if o[1] is not module], _start(name, weight, fn, scale)))
    if not plan:
        raise ValueError(f"target_modules: no module of {tuple(target_modules)} is left in the model to be companded")
    for name, module, others, a in plan:
        weight = module.weight
        assert isinstance(weight, Tensor)
        frozen = not weight.requires_grad
        map_ = Compander(
            a,
            a * _slope(fn),
            fn,
            learnable=learnable,
            tie_slope=tie_slope,
            init=init,
            name=f"{name}.weight".lstrip("."),
        ).to(weight.device)
        if frozen:
            map_.requires_grad_(False)
        beneath = parametrize.is_parametrized(module, "weight")
        parametrize.register_parametrization(module, "weight", map_)
        if beneath:  # torch appends to a chain without asking for the inverse
            with torch.no_grad():
                module.weight = weight.detach().clone()
        for _, other, attribute in others:
            original = _lists(module)["weight"].original
            with torch.no_grad():
                setattr(other, attribute, nn.Parameter(map_(original.detach()), requires_grad=not frozen))
            parametrize.register_parametrization(other, attribute, map_, unsafe=True)
            _lists(other)[attribute].original = original
    return model


def fold(model: nn.Module) -> nn.Module:
    """Write w = Psi(v) as ordinary parameters, in place, and return the model; outputs are bit-identical."""
    first: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        # A deep copy shares the class that holds the parametrised property; taking it away would break the other copy.
        cls = type(module)
        module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
        for attribute in list(_lists(module)):
            chain = _lists(module)[attribute]
            if not any(isinstance(p, Compander) for p in chain):
                continue
            shared = id(chain.original) if hasattr(chain, "original") else id(chain)
            trained = any(p.requires_grad for n, p in chain.named_parameters() if n.startswith("original"))
            with torch.no_grad():
                parametrize.remove_parametrizations(module, attribute)
            weight = first.setdefault(shared, nn.Parameter(getattr(module, attribute).detach(), requires_grad=trained))
            setattr(module, attribute, weight)
            others = {k: p for k, p in module._parameters.items() if k != attribute}
            module._parameters = {attribute: weight, **others}  # its place is the first, as in torch's layers
    return model


def companders(model: nn.Module) -> dict[str, tuple[nn.Module, str, Compander]]:
    """Of each companded weight, shared ones once: module name -> (module, attribute, its map)."""
    found: dict[str, tuple[nn.Module, str, Compander]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or not parametrize.is_parametrized(module):
            continue
        for attribute, chain in _lists(module).items():
            for map_ in chain:
                if isinstance(map_, Compander) and id(map_) not in seen:
                    seen.add(id(map_))
                    found[name] = (module, attribute, map_)
    return found


@torch.no_grad()
def stats(model: nn.Module) -> dict[str, dict[str, float]]:
    """Of each companded layer: a, b, bound, max|w|, share of |w| < 0.1 std(w), kurtosis (3 for a Gaussian)."""
    rows: dict[str, dict[str, float]] = {}
    for name, (module, attribute, map_) in companders(model).items():
        a, b = map_.scales()
        bound = a.item() * _bound(map_.fn)
        rows[name] = {"a": a.item(), "b": b.item(), "bound": bound, **histogram(getattr(module, attribute))}
    return rows


@torch.no_grad()
def histogram(w: Tensor) -> dict[str, float]:
    """max|w|, the share of |w| < 0.1 std(w), and the kurtosis of any weight tensor."""
    w = w.double()
    spread = w.std(unbiased=False)
    centred = w - w.mean()
    return {
        "max_abs": w.abs().max().item(),
        "near_zero": (w.abs() < 0.1 * spread).double().mean().item(),
        "kurtosis": (centred.pow(4).mean() / spread.pow(4)).item(),
    }


@torch.no_grad()
def averaged(model: nn.Module, average: nn.Module, share: float) -> nn.Module:
    """Move ``average``, a plain network as ``fold`` gives it, by ``share`` towards the used weights of ``model``."""
    now = fold(copy.deepcopy(model)).state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(now[name], share)
        else:
            value.copy_(now[name])
    return average


@torch.no_grad()
def load_plain(model: nn.Module, state: Mapping[str, Tensor], *, clip: bool = False) -> None:
    """Load the state dict of the plain model into a companded one: v = Psi^-1(w) where a layer is companded.

    Raises:
        ValueError: a weight lies beyond its layer's bound and ``clip`` is False, or the names or shapes do not fit.
    """
    state = dict(state)
    ready = model.state_dict()
    missing: list[str] = []
    # All owners of a shared weight are filled from its first name, whichever of its names the checkpoint holds.
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or not parametrize.is_parametrized(module):
            continue
        for attribute, chain in _lists(module).items():
            maps = [m for m in chain if isinstance(m, Compander)]
            if not maps:
                continue
            prefix = f"{name}." if name else ""
            w = state.pop(prefix + attribute, None)
            if w is None:
                missing.append(prefix + attribute)
                continue
            key = f"{prefix}parametrizations.{attribute}.original"
            if key not in ready:
                raise ValueError(f"{prefix}{attribute}: it has another parametrisation beneath; fold() before loading")
            if ready[key].shape != w.shape:
                raise ValueError(f"{prefix}{attribute}: shape {tuple(w.shape)}, expected {tuple(ready[key].shape)}")
            ready[key] = maps[0].inverse(w, clip).to(ready[key])
    known = {k for k in ready if ".parametrizations." not in f".{k}"}
    if missing or known - state.keys() or state.keys() - known:
        wrong = sorted([*missing, *(known - state.keys()), *(state.keys() - known)])
        raise ValueError(f"state: the names do not fit the model; missing or unexpected: {', '.join(wrong[:6])}")
    model.load_state_dict(ready | state)


def _lists(module: nn.Module) -> Any:
    """The parametrisations of a module by attribute; ``nn.Module`` does not type what is not its own."""
    return module.parametrizations


def _chain(module: nn.Module) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, "weight"):
        return []
    return list(_lists(module)["weight"])


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch(name, pattern)


def _start(name: str, weight: Tensor, fn: str, scale: float) -> float:
    """The start of a: scale times the spread, raised where the weights' tail needs it."""
    w = weight.detach().double()
    if not torch.isfinite(w).all() or not w.numel():
        raise ValueError(f"model: the weight of layer {name or 'itself'} is empty, or holds NaN or infinity")
    spread = w.std(unbiased=False).item() or w.square().mean().sqrt().item()
    if spread == 0:
        raise ValueError(
            f"model: the weights of layer {name or 'itself'} are all zero, so its scale is unknown; "
            "initialise it, or name it in exclude"
        )
    a, largest = scale * spread, w.abs().max().item()
    if largest >= _GUARD * a * _bound(fn):
        raised = largest / (_GUARD * _bound(fn))
        warnings.warn(
            f"layer {name or 'itself'}: max|w| = {largest:.4g} is beyond {_GUARD} of the bound {a * _bound(fn):.4g} "
            f"that scale={scale:g} gives; its a and b were raised from {a:.4g} to {raised:.4g}",
            stacklevel=3,
        )
        a = raised
    return a


# -- under the contract -----------------------------------------------------------------------------------------------


class WeightCompander(Dynamic):
    """``model`` with companded weights, (B, ...) -> what the model gives. One setting; ``extract`` merges the map away.

    Args:
        model: any network; it is copied, so that the caller's own stays plain.
        example: a batch of inputs that the model accepts.
        fn: "arctan", "tanh", "softsign", "mulaw" (unbounded) or "identity".
        scale: a and b at the start, in standard deviations of each layer's weights.
        learnable: train log a and log b as well.
        tie_slope: with ``learnable``, train a only and keep the slope a / b.
        init: "inverse" keeps the network's function; "value" starts at v = w.
        target_modules: names of classes whose ``weight`` is companded.
        exclude: names of modules that are left alone.
        decay_on: weight decay acts on "v", or on "w" by a term of the loss.
        hyper_lr_factor: learning rate of log a and log b as a share of the rest's.
        criterion: ``criterion(output, target)``; cross entropy by default.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        fn: str = "arctan",
        scale: float = 3.0,
        learnable: bool = False,
        tie_slope: bool = False,
        init: str = "inverse",
        target_modules: Sequence[str] = TARGETS,
        exclude: Sequence[str] = (),
        decay_on: str = "v",
        hyper_lr_factor: float = 0.1,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        check.module("model", model)
        self.decay_on: str = check.choice("decay_on", decay_on, ("v", "w"))
        self.hyper_lr_factor = check.positive("hyper_lr_factor", hyper_lr_factor)
        self.criterion = check.optional(check.function, "criterion", criterion)
        check_example(model, example)
        if check.boolean("tie_slope", tie_slope) and not check.boolean("learnable", learnable):
            raise ValueError("tie_slope: True has a meaning only with learnable=True")
        self.decay = 0.0  # of w; parameter_groups sets it
        self.model = compand(
            copy.deepcopy(model),
            fn=fn,
            scale=scale,
            learnable=learnable,
            tie_slope=tie_slope,
            init=init,
            target_modules=target_modules,
            exclude=exclude,
        )
        self.example, self.fn, self.scale, self.learnable, self.tie_slope = example, fn, scale, learnable, tie_slope
        self.init, self.target_modules, self.exclude = init, tuple(target_modules), tuple(exclude)
        self.point = self.points()[0]

    def points(self) -> list[Point]:
        """One setting: the compander is a way to train."""
        return [Point(compander=1)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for the same arguments."""
        return call(self.model, packed(args, kwargs))

    def loss(self, batch: Batch) -> Tensor:
        """The criterion, and with ``decay_on="w"`` lam/2 |Psi(v)|^2 of the companded weights."""
        x, target = split_batch(batch)
        with parametrize.cached():  # a weight that is read several times is computed once
            value = loss(call(self.model, x), target, self.criterion)
            if self.decay_on == "w" and self.decay:
                weights: Iterable[Tensor] = (getattr(m, name) for m, name, _ in companders(self.model).values())
                value = value + 0.5 * self.decay * torch.stack([w.square().sum() for w in weights]).sum()
        return value

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The plain model with w = Psi(v), bit-identical in its output."""
        self._known(point)
        return fold(copy.deepcopy(self.model)).eval()

    def schedule(self, progress: float) -> None:
        """Clamp learned a and b to a factor of ten around their start."""
        if self.learnable:
            for _, _, map_ in companders(self.model).values():
                map_.clamp()

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Decay for v and all else that is trained; none for log a and log b, and a share of the learning rate."""
        maps = companders(self.model).values()
        hyper = {id(p): p for _, _, m in maps for p in m.parameters() if p.requires_grad}
        inner = {id(p) for m, name, _ in maps for p in _lists(m)[name].parameters()} - hyper.keys()
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in hyper]
        on_w = self.decay_on == "w"
        self.decay = weight_decay if on_w else 0.0
        groups = [
            {"params": [p for p in rest if id(p) in inner], "weight_decay": 0.0 if on_w else weight_decay},
            {"params": [p for p in rest if id(p) not in inner], "weight_decay": weight_decay},
            {"params": list(hyper.values()), "weight_decay": 0.0, "lr_scale": self.hyper_lr_factor},
        ]
        return [g for g in groups if g["params"]]

    def stats(self) -> dict[str, dict[str, float]]:
        """``stats`` of the model."""
        return stats(self.model)

    def load_plain(self, state: Mapping[str, Tensor], *, clip: bool = False) -> None:
        """Take the weights of the plain model's ``state_dict()`` through Psi^-1."""
        load_plain(self.model, state, clip=clip)

    def extra_repr(self) -> str:
        """The function, its scale, and how many weights are companded."""
        maps = companders(self.model).values()
        count = sum(getattr(m, name).numel() for m, name, _ in maps)
        return f"{self.fn}, scale={self.scale:g}, learnable={self.learnable}, {len(maps)} layers, {count:,} weights"
