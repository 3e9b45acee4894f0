"""DSL: dynamic sparse learning, a novel paradigm for efficient recommendation. WSDM 2024, arXiv 2402.02855.

A recommender is nearly all embedding tables. Train it sparse from the first step to deployment: every masked tensor
has a fixed number of active entries, and now and then the smallest of them give their places to inactive entries whose
gradient is largest. How many move follows a cosine down to almost none, so exploration turns into convergence.

Symbols: theta_p a masked tensor of any shape with N_p entries, M_p in {0, 1} its mask, D the density, n_p = nnz(M_p),
g_p = dL/dtheta_p at theta_p * M_p, dense, before the optimiser's step; T all steps, dT steps between updates.

Start (``init="exact"``)::

    n_p = round(D N_p) entries drawn by a permutation;   theta_p <- theta_p * M_p

Step t = 1..T::

    g_p       the gradient, of inactive entries too
    theta_p   <- optimiser(theta_p, g_p) * M_p;  the optimiser's moments are zero where M_p = 0

and where t mod dT = 0, tensor by tensor::

    alpha_t = eta + (alpha_0 - eta) / 2 * (1 + cos(pi t / T))        alpha_0 = 0.5, eta = 0.005
    k       = ceil(alpha_t n_p)
    drop    the k active entries of smallest |theta_p|, ties by flat index                     -> M'
    grow    the k entries of largest |g_p| where M' = 0, those just dropped included           -> M_p

The active entries of a tensor are the same number always. After training the masks are frozen; ``extract`` gives the
plain network, ``extract(..., sparse=True)`` one whose tables are stored by their active entries only.

Everything here is a simulation with dense tensors, dense gradients and a dense optimiser, as the reference is: training
becomes neither faster nor smaller. What becomes smaller is the saved file and the resident table of the network that
is deployed.

Where the specification is silent or wrong:

- The parameter itself holds the zeros. A mask inside the forward (``where``, a product) would take the gradient away
  from inactive entries, and growth needs it.
- Where fewer than k inactive entries have a gradient (a batch touches few rows), the rest is drawn at random among the
  inactive ones. The reference fills up with active entries there, and its density leaks away.
- ``fit`` tells progress before a step, so the cosine there stands at (t - 1) / T; with ``total_steps`` it is t / T.
- A tensor that is full (D = 1) or empty does not move; so D = 1 is the dense training bit by bit, for any ``regrow``.
- An entry that is dropped and regrown in one update never left: with ``regrow="keep"`` it keeps its value and its
  moments, with ``"zero"`` it loses both.
- ``grad_window=W`` takes |mean of g| over the last W steps, the gradient of a larger batch, not the mean of |g|.
- "R = D iff no exploration" of the coverage R needs a footnote: updates that regrow all they drop leave R alone.
- The loss is not the paper's part; a model without one of its own is trained by cross entropy.
- Column numbers of the CSR form take the narrowest integer that holds them (one byte up to 256 columns). The
  specification's 8 bytes an entry are those of 32-bit columns; with one byte CSR beats the bitmap below D = 1/8.
- "Scoring with a CSR table of 0.9 zeros is 1.5 to 3 times faster" does not hold for 64 columns on the CPU measured
  (benchmarks/bench_sparse_learning.py): it is 1.5 times slower, down to D = 0.05.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pliant.core import check
from pliant.core.dynamic import Dynamic, Point, Value, inner_optimizer
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    check_example,
    first_line,
    packed,
    split_batch,
)
from pliant.core.masks import global_masks, pack_bits, unpack_bits
from pliant.core.objective import Criterion, loss
from pliant.core.sparse import compile_sparse

Grow = Literal["gradient", "random"]
Regrow = Literal["keep", "zero"]
Init = Literal["exact", "bernoulli", "global"]
Format = Literal["bitmap", "csr"]
Choice = Iterable[str | nn.Module | nn.Parameter] | Callable[[str, nn.Parameter], bool]
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as floating point numbers
_FORMATS: tuple[Format, ...] = get_args(Format)
_LAYERS = (nn.Embedding, nn.EmbeddingBag, nn.Linear, _ConvNd)


# -- which entries --------------------------------------------------------------------------------------------------


def exploration(progress: float, alpha: float = 0.5, alpha_min: float = 0.005) -> float:
    """alpha_t, the share of active entries that moves at ``progress`` = t / T in [0, 1] of the training."""
    return alpha_min + 0.5 * (alpha - alpha_min) * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def lowest(values: Tensor, k: int, among: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The mask of exactly ``k`` entries of smallest value where ``among`` is true; ties go by flat index.

    Args:
        values: any shape, without NaN where ``among`` is true.
        k: how many.
        among: a boolean tensor of the same shape. What is false there is never chosen, whatever its value.
        generator: where the last places go to entries whose value is 0, draw them at random by it.

    Raises:
        ValueError: ``among`` has fewer than ``k`` entries.
    """
    candidates = int(among.sum())
    if not 0 <= k <= candidates:
        raise ValueError(f"k: {k} of {candidates} candidates; allowed: 0..{candidates}")
    chosen = torch.zeros_like(among).flatten()
    if k:
        flat = values.detach().flatten()
        flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
        allowed = among.flatten()
        flat = flat.masked_fill(~allowed, math.inf)
        last = flat.kthvalue(k).values  # a selection in linear time; sorting takes several times as long
        chosen = flat < last
        ties = ((flat == last) & allowed).nonzero().squeeze(1)
        if generator is not None and float(last) == 0.0:
            ties = ties[torch.randperm(len(ties), generator=generator).to(ties.device)]
        chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.view(among.shape)


@dataclass(frozen=True)
class Update:
    """One update of the masks: optimiser steps done, the share alpha_t, and counts by parameter name.

    ``moved`` is k, the entries dropped, and as many grown; ``regrown`` of them came back at once. ``fired`` counts the
    entries of all tensors that have been active at some time.
    """

    step: int
    alpha: float
    moved: dict[str, int]
    regrown: dict[str, int]
    fired: int


class _Mask(nn.Module):
    """The state of one masked tensor, all of its shape: its mask, what was ever active, the window's mean gradient."""

    mask: Tensor
    fired: Tensor
    window: Tensor
    gradient: Tensor | None

    def __init__(self, parameter: Tensor, mask: Tensor, windowed: bool) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(parameter.device))
        self.register_buffer("fired", self.mask.clone())
        self.gradient = None  # of the step under way, where the window is that one step
        if windowed:
            self.register_buffer("window", torch.zeros_like(parameter.detach(), dtype=_precise(parameter.dtype)))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


# -- the method -----------------------------------------------------------------------------------------------------


class SparseLearning(Dynamic):
    """A network whose masked tensors hold a fixed number of active entries, chosen anew again and again in training.

    The dial has one setting, ``Point(sparsity=1 - density)``: several densities are several trainings. ``fit`` does
    everything. A loop of your own tells the optimiser once, and then looks as always::

        net = SparseLearning(model, density=0.2, total_steps=steps)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        net.attach_optimizer(optimizer)
        for batch in batches:
            optimizer.zero_grad()
            net.loss(batch).backward()
            optimizer.step()

    A model with a method ``loss(batch)`` trains by it, on whatever batches it takes; otherwise the loss is
    ``criterion(output, target)`` of batches (input, target).

    Args:
        model: your own network; it is wrapped, not copied, and its masked tensors get their zeros at once.
        example: an input it accepts; needed only for timing the linear layers in ``extract(sparse=True)``.
        density: D in (0, 1], the share of active entries of every masked tensor; or a mapping of parameter names (or
            patterns, the first that matches counts) to densities, which then also says what is masked.
        params: what is masked: parameter names or patterns, modules, parameters, or ``predicate(name, parameter)``.
            By default the weights of all Embedding, Linear and Conv layers; no bias, nothing one-dimensional.
        update_every: dT, the optimiser steps between updates. The paper has 100 to 3000.
        total_steps: T of the cosine. ``fit`` tells progress itself; in a loop of your own give this, or call
            ``schedule(step / steps)`` before each step.
        alpha: alpha_0, the share that moves at first.
        alpha_min: eta, the share that moves at the end.
        drop: "magnitude".
        grow: "gradient", or "random" among the inactive entries (which is SET).
        grad_window: the gradient for growing is the mean over the last so many steps.
        regrow: whether an entry that is dropped and regrown in the same update keeps its value ("keep") or restarts
            at "zero".
        init: "exact" counts, drawn by a permutation; "bernoulli", each entry with probability D; "global", the largest
            |theta| of all masked tensors together (of a trained network: magnitude pruning).
        explore: False keeps the first mask: static sparse training.
        criterion: ``criterion(output, target)``, in place of the model's own loss; cross entropy by default.
        seed: of the first mask, and of the random choices when growing.

    Raises:
        TypeError: the model is no module, or ``params`` is of the wrong kind.
        ValueError: an argument is outside what is allowed, a name matches nothing, a tensor would keep no entry, is
            frozen, or belongs to an embedding with ``sparse=True`` (growing needs the gradient of every entry).
    """

    clock: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Input | None = None,
        *,
        density: float | Mapping[str, float] = 0.5,
        params: Choice | None = None,
        update_every: int = 100,
        total_steps: int | None = None,
        alpha: float = 0.5,
        alpha_min: float = 0.005,
        drop: Literal["magnitude"] = "magnitude",
        grow: Grow = "gradient",
        grad_window: int = 1,
        regrow: Regrow = "keep",
        init: Init = "exact",
        explore: bool = True,
        criterion: Criterion | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check.module("model", model)
        if isinstance(density, Mapping):
            check.mapping("density", density, _density, empty=False)
            if params is not None:
                raise ValueError("params: a mapping of densities says already what is masked; leave params out")
            if init == "global":
                raise ValueError("init: 'global' has one threshold for all, so it needs one density, not a mapping")
        else:
            _density("density", density)
        self.update_every = check.whole("update_every", update_every, at_least=1)
        self.total_steps = check.optional(check.whole, "total_steps", total_steps, at_least=1, at_most=10**12)
        self.alpha, self.alpha_min = check.share("alpha", alpha), check.share("alpha_min", alpha_min)
        if alpha_min > alpha:
            raise check.wrong("alpha_min", alpha_min, f"a number from 0 to alpha={self.alpha:g}")
        self.drop: Literal["magnitude"] = check.choice("drop", drop, ("magnitude",))
        self.grow: Grow = check.choice("grow", grow, Grow)
        self.grad_window = check.whole("grad_window", grad_window, at_least=1, at_most=self.update_every)
        self.regrow: Regrow = check.choice("regrow", regrow, Regrow)
        self.init: Init = check.choice("init", init, Init)
        self.explore = check.boolean("explore", explore)
        self.criterion = check.optional(check.function, "criterion", criterion)
        self.seed = check.seed("seed", seed)
        if example is not None:
            check_example(model, example)
        self.example = example
        self._densities = _selected(model, density, params)
        self._density = dict(density) if isinstance(density, Mapping) else density
        self.model = model
        self.masks = nn.ModuleList(self._first_masks(grad_window > 1 and grow == "gradient"))
        self.register_buffer("clock", torch.zeros((), dtype=torch.long))  # optimiser steps done
        self._steps = 0  # the same number, to be read without waiting for a device
        self._updates: list[Update] = []
        self._progress: float | None = None
        self._attached: weakref.ref[Optimizer] | None = None
        self._handles: tuple[RemovableHandle, ...] = ()
        self._warned = self._void = False
        self._enforce()
        sizes = [self.model.get_parameter(n).numel() for n in self._densities]
        share = sum(d * n for d, n in zip(self._densities.values(), sizes, strict=True)) / sum(sizes)
        self._points = [Point(sparsity=round(1.0 - share, 9))]
        self.point = self._points[0]

    # -- the contract ---------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network; its inactive entries are zeros in the parameters themselves."""
        return call(self.model, packed(args, kwargs))

    def loss(self, batch: Batch) -> Tensor:
        """The model's own ``loss(batch)`` where its class has one and no criterion was given, else the criterion."""
        if self.training and torch.is_grad_enabled() and self._optimizer() is None and not self._warned:
            self._warned = True
            warnings.warn(
                "no optimiser is attached, so nothing keeps inactive entries at zero and no mask will move; call "
                "net.attach_optimizer(optimizer) before the first step (fit does it itself)",
                stacklevel=2,
            )
        if self.criterion is None and callable(getattr(type(self.model), "loss", None)):
            found: Tensor = cast(Any, self.model).loss(batch)
            return found
        x, target = split_batch(batch)
        return loss(call(self.model, x), target, self.criterion)

    def points(self) -> list[Point]:
        """The one setting, ``Point(sparsity=1 - density)``; with several densities, of all masked entries together."""
        return list(self._points)

    def extract(self, point: Mapping[str, Value], sparse: bool = False, min_sparsity: float = 0.85) -> nn.Module:
        """The plain network, its zeros permanent.

        Args:
            point: the one of ``points()``.
            sparse: store embedding tables by their non-zero entries where that takes fewer bytes (``SparseEmbedding``),
                and linear layers of ``min_sparsity`` zeros or more where that is measured to be faster here. The
                network then has an attribute ``layouts``, which says for each layer what was chosen and why.
            min_sparsity: see ``core.sparse.compile_sparse``.
        """
        self._known(point)
        self._enforce()
        plain = copy.deepcopy(self.model).eval()
        if not sparse:
            return plain
        example = self.example
        layouts = compile_sparse(plain, min_sparsity, example)
        plain, tables = compress_embeddings(plain)
        plain.layouts = layouts | tables  # type: ignore[assignment]
        return plain

    def schedule(self, progress: float) -> None:
        """Where the cosine stands, in [0, 1]; ``total_steps`` counts instead where it was given."""
        self._progress = progress

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Let every ``optimizer.step()`` keep the zeros and, when it is time, move the masks. ``fit`` calls this.

        The optimiser before is let go. Copies of this network do not know it: attach their own.

        Raises:
            TypeError: it is no optimiser.
            ValueError: it does not hold a masked parameter.
        """
        inner = inner_optimizer(optimizer)
        held = {id(p) for group in inner.param_groups for p in group["params"]}
        for name in self._densities:
            if id(self.model.get_parameter(name)) not in held:
                raise ValueError(
                    f"optimizer: it does not hold the masked parameter {name!r}; build it from net.parameters() after "
                    "the network was moved to its device, or leave that parameter out with params="
                )
        for handle in self._handles:
            handle.remove()
        network = weakref.ref(self)

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (net := network()) is not None:
                net._before(optimizer, args, kwargs)

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (net := network()) is not None:
                net._after(optimizer)

        self._handles = (inner.register_step_pre_hook(before), inner.register_step_post_hook(after))
        self._attached = weakref.ref(inner)

    # -- exact counts ---------------------------------------------------------------------------------------------

    def active(self) -> dict[str, int]:
        """n_p, the number of active entries of each masked parameter."""
        return {name: int(slot.mask.sum()) for name, slot in self._slots()}

    def density(self) -> float:
        """The share of active entries among all masked tensors' entries."""
        return sum(self.active().values()) / self._entries()

    def coverage(self) -> float:
        """R, the share of entries that have been active at some time: never falls, and is the density at first."""
        return sum(int(slot.fired.sum()) for _, slot in self._slots()) / self._entries()

    def history(self) -> list[Update]:
        """All updates so far."""
        return list(self._updates)

    # -- one step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep g_p where growth will need it. It must be before the step: some optimisers write into the gradient."""
        if any(a is not None for a in (*args[1:], kwargs.get("closure"))):  # the first is the optimiser itself
            raise ValueError("closure: the gradient must be there before optimizer.step(), so a closure cannot be used")
        infinite = getattr(optimizer, "found_inf", None)  # a fused optimiser under a gradient scaler skips by itself
        self._void = infinite is not None and bool(infinite)
        t = self._steps + 1
        if self._void or not self.explore:
            return
        self._alpha(t)  # a missing total_steps is told at the first step, not at the first update
        if self.grow == "random" or -t % self.update_every >= self.grad_window:
            return
        scale = getattr(optimizer, "grad_scale", None)
        for name, slot in self._slots():
            parameter = self.model.get_parameter(name)
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)  # the batch did not use it at all
            elif gradient.layout is not torch.strided:
                raise ValueError(f"{name}: its gradient is sparse, but growing needs the gradient of every entry")
            if scale is not None:
                gradient = gradient / scale
            if self.grad_window == 1:
                slot.gradient = gradient.detach().clone()
            else:
                slot.window.add_(gradient.detach(), alpha=1.0 / self.grad_window)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        if self._void:
            return
        self._steps += 1
        self.clock.fill_(self._steps)
        self._enforce(optimizer)
        if self.explore and self._steps % self.update_every == 0:
            self._update(optimizer)

    @torch.no_grad()
    def _enforce(self, optimizer: Optimizer | None = None) -> None:
        """theta_p <- theta_p * M_p, and the optimiser's moments likewise."""
        for name, slot in self._slots():
            parameter = self.model.get_parameter(name)
            for tensor in [parameter, *_moments(optimizer, parameter)]:
                _clear(tensor, slot.mask)

    def _update(self, optimizer: Optimizer) -> None:
        """Drop and grow in every masked tensor."""
        alpha = self._alpha(self._steps)
        moved, regrown = {}, {}
        windowed = self.grad_window > 1 and self.grow == "gradient"
        for name, slot in self._slots():  # before any of them moves
            _finite(name, "weight", self.model.get_parameter(name))
            if (found := slot.window if windowed else slot.gradient) is not None:
                _finite(name, "gradient", found)
        for index, (name, slot) in enumerate(self._slots()):
            parameter = self.model.get_parameter(name)
            gradient, slot.gradient = slot.gradient, None
            if windowed:
                gradient = slot.window.clone()
                slot.window.zero_()
            active = int(slot.mask.sum())
            k = min(active, math.ceil(round(alpha * active, 9)))  # 0.07 * 100 is 7.000000000000001
            if k == 0 or active == slot.mask.numel():
                continue
            generator = self._generator("grow", self._steps, index)
            dropped = lowest(parameter.abs(), k, slot.mask)
            rest = slot.mask & ~dropped
            if gradient is None:  # grow="random"
                gradient = torch.zeros_like(parameter)
            grown = lowest(-gradient.abs(), k, ~rest, generator)
            back = dropped & grown
            if self.regrow == "zero":
                for tensor in [parameter, *_moments(optimizer, parameter)]:
                    _clear(tensor, ~back)
            slot.mask.copy_(rest | grown)
            slot.fired.logical_or_(slot.mask)
            moved[name], regrown[name] = k, int(back.sum())
        if moved:
            self._enforce(optimizer)
            fired = sum(int(slot.fired.sum()) for _, slot in self._slots())
            self._updates.append(Update(self._steps, alpha, moved, regrown, fired))

    def _alpha(self, t: int) -> float:
        if self.total_steps is not None:
            progress = t / self.total_steps
        elif self._progress is not None:
            progress = self._progress
        elif self.alpha == self.alpha_min:
            progress = 0.0
        else:
            raise ValueError(
                "total_steps: the cosine needs the number of steps of the whole training; give total_steps=, or call "
                "net.schedule(step / steps) before each step (fit does it itself)"
            )
        return exploration(progress, self.alpha, self.alpha_min)

    # -- what ``save`` writes -------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments; the masked parameters by their names, however they were chosen."""
        chosen = None if isinstance(self._density, dict) else list(self._densities)
        return super().arguments() | {"density": self._density, "params": chosen}

    def structure(self) -> dict[str, Any]:
        """The updates made."""
        return {"updates": [asdict(u) for u in self._updates]}

    def restructure(self, structure: dict[str, Any]) -> None:
        """Remember the updates of the network that was saved; masks and counts are tensors and come by themselves."""
        self._updates = [Update(**u) for u in structure["updates"]]

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode. A network that is evaluated is sparse, whoever moved its weights."""
        if not mode and hasattr(self, "masks"):
            self._enforce()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the optimiser, for ``copy.deepcopy`` and pickle."""
        return self.__dict__ | {"_attached": None, "_handles": ()}

    def extra_repr(self) -> str:
        """The settings."""
        return f"density={self._density}, tensors={len(self._densities)}, update_every={self.update_every}, {self.grow}"

    # -- inside ---------------------------------------------------------------------------------------------------

    def _slots(self) -> list[tuple[str, _Mask]]:
        return list(zip(self._densities, cast(Iterable[_Mask], self.masks), strict=True))

    def _entries(self) -> int:
        return sum(slot.mask.numel() for _, slot in self._slots())

    def _optimizer(self) -> Optimizer | None:
        return None if self._attached is None else self._attached()

    def _generator(self, *purpose: object) -> torch.Generator:
        """Random numbers as a function of the seed and the purpose: a resumed training draws the same ones."""
        return torch.Generator().manual_seed(random.Random(repr((self.seed, *purpose))).getrandbits(63))

    def _first_masks(self, windowed: bool) -> list[_Mask]:
        parameters = [self.model.get_parameter(name) for name in self._densities]
        if self.init == "global":
            sizes = [p.detach().abs() for p in parameters]
            _finite("model", "weight", torch.cat([size.flatten() for size in sizes]))
            total = sum(size.numel() for size in sizes)
            masks = global_masks(sizes, total - round(next(iter(self._densities.values())) * total))
        else:
            masks = []
            for index, (p, d) in enumerate(zip(parameters, self._densities.values(), strict=True)):
                generator = self._generator("init", index)
                if self.init == "bernoulli":
                    mask = torch.rand(p.numel(), generator=generator) < d
                else:
                    mask = torch.zeros(p.numel(), dtype=torch.bool)
                    mask[torch.randperm(p.numel(), generator=generator)[: round(d * p.numel())]] = True
                masks.append(mask.view(p.shape))
        return [_Mask(p, mask, windowed) for p, mask in zip(parameters, masks, strict=True)]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps = int(self.clock)


def _moments(optimizer: Optimizer | None, parameter: Tensor) -> list[Tensor]:
    """Everything that the optimiser keeps for each entry of the parameter: momentum, averages of g and of g^2."""
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    return [t for t in state.values() if isinstance(t, Tensor) and t.shape == parameter.shape]


def _clear(tensor: Tensor, mask: Tensor) -> None:
    """In place: +0 where the mask is false, whatever stood there (-3 * 0 would be -0, and infinity * 0 NaN).

    By the bits of the numbers, since ``masked_fill_`` with a random mask takes forty times as long on a CPU.
    """
    word = _WORDS[tensor.element_size()]
    tensor.view(word).bitwise_and_(mask.to(word).neg_())


def _density(name: str, value: Any) -> float:
    return check.number(name, value, above=0, at_most=1)


def _finite(name: str, what: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: its {what} contains NaN or infinity, so its entries cannot be ranked")


# -- what is masked -------------------------------------------------------------------------------------------------


def _selected(model: nn.Module, density: float | Mapping[str, float], params: Choice | None) -> dict[str, float]:
    """The masked parameters' names, in the model's order and shared ones once, with their densities."""
    every: dict[int, list[str]] = {}
    owned: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        every.setdefault(id(parameter), []).append(name)
        owned[id(parameter)] = parameter
    names = [name for group in every.values() for name in group]
    if isinstance(density, Mapping):
        _check_patterns("density", density, names)
        chosen = {key: _first_match(group, density) for key, group in every.items()}
        wanted = {key: d for key, d in chosen.items() if d is not None}
    else:
        keys = _chosen(model, every, owned, params)
        wanted = {key: density for key in every if key in keys}
    if not wanted:
        raise ValueError(
            f"params: they leave nothing of {type(model).__name__} to mask; by default that is the weights of "
            f"Embedding, Linear and Conv layers that require a gradient. Its parameters: {', '.join(names[:12])}"
        )
    refused = {
        id(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse
    }
    found = {}
    for key, value in wanted.items():
        name, parameter = every[key][0], owned[key]
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"model: the lazy parameter {name!r} has no shape yet; run the model once first")
        if key in refused:
            raise ValueError(
                f"model: the embedding {refused[key]!r} has sparse=True, whose gradient has only the rows of the "
                "batch; growing needs the gradient of every entry, so build it with sparse=False"
            )
        if parameter.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"params: {name!r} is of {parameter.dtype}; allowed: floating point of 16 to 64 bits")
        if not parameter.requires_grad:
            raise ValueError(f"params: {name!r} is frozen (requires_grad is False), so its mask could not be learnt")
        if round(value * parameter.numel()) < 1:
            raise ValueError(f"density: {value} keeps none of the {parameter.numel()} entries of {name!r}")
        found[name] = float(value)
    return found


def _chosen(
    model: nn.Module, every: Mapping[int, Sequence[str]], owned: Mapping[int, nn.Parameter], params: Choice | None
) -> set[int]:
    """Ids of the parameters that ``params`` chooses; ``every`` has all names of each."""
    if params is None:
        layers = [m.weight for m in model.modules() if isinstance(m, _LAYERS) and "weight" in m._parameters]
        return {id(p) for p in layers if p.requires_grad and p.ndim > 1}
    if isinstance(params, str | nn.Module | Tensor):
        raise TypeError(f"params: expected a list of names, modules or parameters, got {type(params).__name__}")
    if callable(params):
        try:
            return {key for key, group in every.items() if any(params(name, owned[key]) for name in group)}
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"params: the function fails when it is called: {first_line(error)}") from error
    if not isinstance(params, Iterable):
        raise check.wrong(
            "params", params, "names, modules, parameters, or a function of name and parameter", TypeError
        )
    found: set[int] = set()
    for item in params:
        if isinstance(item, str):
            _check_patterns("params", [item], [name for group in every.values() for name in group])
            matched = {key for key, group in every.items() if any(fnmatchcase(name, item) for name in group)}
        elif isinstance(item, nn.Module):
            matched = {id(p) for p in item.parameters() if p.ndim > 1} & owned.keys()
        elif isinstance(item, Tensor):
            matched = {id(item)} & owned.keys()
        else:
            raise TypeError(f"params: expected names, modules or parameters, got {type(item).__name__}")
        if not matched:
            raise ValueError(f"params: a {type(item).__name__} in it holds no weight of the model")
        found |= matched
    return found


def _check_patterns(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{argument}: {pattern!r} matches no parameter; there are: {', '.join(names[:12])}")


def _first_match(group: Sequence[str], density: Mapping[str, float]) -> float | None:
    for pattern, value in density.items():
        if any(fnmatchcase(name, pattern) for name in group):
            return value
    return None


# -- tables stored by their entries ---------------------------------------------------------------------------------


def table_bytes(rows: int, columns: int, nonzero: int, format: Format, value_bytes: int = 4) -> int:
    """Bytes of a sparse table: values * nnz, the index, and one pointer a row (4 bytes below 2^31 entries).

    The index of "bitmap" is a bit for each slot, rounded up to bytes row by row; that of "csr" one column number for
    each entry, of 1 byte up to 256 columns, 2 up to 32,768, else 4.
    """
    pointer = 4 if nonzero < 2**31 else 8
    index = rows * -(-columns // 8) if format == "bitmap" else nonzero * _column_type(columns).itemsize
    return value_bytes * nonzero + index + pointer * (rows + 1)


def _column_type(columns: int) -> torch.dtype:
    return torch.uint8 if columns <= 256 else torch.int16 if columns <= 2**15 else torch.int32


class SparseEmbedding(nn.Module):
    """An embedding table (rows, columns) stored by its non-zero entries; lookups are bitwise those of the dense table.

    ``values`` (nnz,) row by row and ``start`` (rows + 1,), where each row begins, and as index either ``bits`` (rows,
    ceil(columns / 8)), one bit for each slot, or ``column`` (nnz,). All are ordinary dense buffers: the module can be
    copied, moved, saved by its ``state_dict`` and loaded into one of another number of entries. Only the rows that are
    looked up become dense. It is for inference: nothing in it is trained.

    Args:
        table: an ``nn.Embedding``, or its weight (rows, columns).
        format: "bitmap" or "csr"; by default the one of fewer bytes.

    Raises:
        ValueError: the weight is not a matrix of floating point numbers, or the embedding has ``max_norm``, which
            changes the table while it is read.
    """

    format: Format
    values: Tensor
    start: Tensor
    bits: Tensor
    column: Tensor

    def __init__(self, table: nn.Embedding | Tensor, format: Format | None = None) -> None:
        super().__init__()
        if isinstance(table, nn.Embedding):
            if table.max_norm is not None:
                raise ValueError("table: an embedding with max_norm changes its table while it is read")
            weight = table.weight.detach()
        else:
            weight = table.detach()
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(f"table: expected a floating matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
        if format not in (None, *_FORMATS):
            raise ValueError(f"format: {format!r}; allowed: 'bitmap', 'csr', or None for the smaller one")
        self.num_embeddings, self.embedding_dim = weight.shape
        kept = (weight != 0) | torch.signbit(weight)  # a -0 is an entry, so that lookups are the same to the last bit
        nonzero = int(kept.sum())
        if format is None:
            rows, columns = weight.shape
            sizes = {f: table_bytes(rows, columns, nonzero, f, weight.element_size()) for f in _FORMATS}
            smaller: Format = min(_FORMATS, key=sizes.__getitem__)
            format = smaller
        self.format = format
        pointer = torch.int32 if nonzero < 2**31 else torch.int64
        start = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
        torch.cumsum(kept.sum(1), 0, out=start[1:])
        self.register_buffer("values", weight[kept].clone())
        self.register_buffer("start", start.to(pointer))
        if format == "bitmap":
            padded = nn.functional.pad(kept, (0, -weight.shape[1] % 8))
            self.register_buffer("bits", pack_bits(padded).view(len(weight), -1))
        else:
            self.register_buffer("column", kept.nonzero()[:, 1].to(_column_type(weight.shape[1])))

    def forward(self, index: Tensor) -> Tensor:
        """The rows (..., columns) of ``index`` (...).

        Raises:
            IndexError: an index is outside the table (checked on CPU, where the check costs no synchronisation).
        """
        rows = index.reshape(-1).long()
        if rows.device.type == "cpu" and len(rows):
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"index: {low}..{high}; the table has {self.num_embeddings} rows")
        found = self._from_bits(rows) if self.format == "bitmap" else self._from_columns(rows)
        return found.reshape(*index.shape, self.embedding_dim)

    def _from_bits(self, rows: Tensor) -> Tensor:
        """(B,) -> (B, columns). Two tables tell of each byte which of its 8 slots exist, and how many stand before."""
        places, kind = (len(rows), self.bits.shape[1], 8), self.start.dtype
        if not len(self.values):
            return self.values.new_zeros(len(rows), self.embedding_dim)
        shift = torch.arange(8, device=rows.device)
        exists = torch.arange(256, device=rows.device)[:, None] >> shift & 1
        before = (exists.cumsum(1) - exists).to(kind)
        byte = self.bits.index_select(0, rows).flatten().int()
        count = exists.sum(1).to(kind).index_select(0, byte).view(places[:2])
        first = self.start.index_select(0, rows)[:, None] + count.cumsum(1, dtype=kind) - count
        entry = (before.index_select(0, byte).view(places) + first[..., None]).flatten()
        out = self.values.index_select(0, entry.clamp_(max=len(self.values) - 1))
        _clear(out, exists.bool().index_select(0, byte).flatten())
        return out.view(len(rows), 8 * places[1])[:, : self.embedding_dim]

    def _from_columns(self, rows: Tensor) -> Tensor:
        """(B,) -> (B, columns): the rows' entries one after the other, each scattered to its row and column."""
        first = self.start.index_select(0, rows).long()
        count = self.start.index_select(0, rows + 1).long() - first
        entry = (first - count.cumsum(0) + count).repeat_interleave(count)
        entry += torch.arange(len(entry), device=rows.device)
        place = (torch.arange(len(rows), device=rows.device) * self.embedding_dim).repeat_interleave(count)
        place += self.column.index_select(0, entry)
        out = self.values.new_zeros(len(rows) * self.embedding_dim)
        return out.scatter_(0, place, self.values.index_select(0, entry)).view(len(rows), self.embedding_dim)

    @property
    def weight(self) -> Tensor:
        """The dense table (rows, columns), made anew at each call: for models that read the whole of it."""
        return self(torch.arange(self.num_embeddings, device=self.values.device))  # type: ignore[no-any-return]

    def csr(self) -> Tensor:
        """The table as a CSR tensor with 32-bit indices, for products with the whole of it."""
        if self.format == "csr":
            column = self.column
        else:
            slots = torch.Size((self.num_embeddings, 8 * self.bits.shape[1]))
            column = unpack_bits(self.bits.flatten(), slots).nonzero()[:, 1]
        size = (self.num_embeddings, self.embedding_dim)
        return torch.sparse_csr_tensor(
            self.start.to(torch.int32), column.to(torch.int32), self.values, size, check_invariants=False
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("values", "column"):  # their length is the number of entries of the table that was saved
            theirs = state_dict.get(prefix + name)
            if name in self._buffers and isinstance(theirs, Tensor) and theirs.ndim == 1:
                own = cast(Tensor, self._buffers[name])
                self._buffers[name] = own.new_empty(theirs.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}, nonzero={self.values.numel()}, format={self.format!r}"


def compress_embeddings(model: nn.Module, format: Format | None = None) -> tuple[nn.Module, dict[str, str]]:
    """Exchange every ``nn.Embedding`` that a sparse table stores in fewer bytes, in place; what was done, and why.

    Args:
        model: a plain network; one that is itself an embedding is returned as its sparse form.
        format: "bitmap" or "csr"; by default, for each table, the one of fewer bytes.

    Returns:
        the network, and for each embedding's name a line that says what was chosen.
    """
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    report = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if type(module) is not nn.Embedding or module.max_norm is not None or "weight" not in module._parameters:
            report[name] = "dense: only a plain nn.Embedding without max_norm can be exchanged"
            continue
        if uses[id(module.weight)] > 1:
            report[name] = "dense: its table is shared with another layer"
            continue
        sparse = SparseEmbedding(module, format).train(module.training)
        rows, columns, nonzero = *module.weight.shape, sparse.values.numel()
        width = module.weight.element_size()
        dense = module.weight.numel() * width
        sizes = {f: table_bytes(rows, columns, nonzero, f, width) for f in _FORMATS}
        told = f"bitmap {sizes['bitmap']:,}, csr {sizes['csr']:,}, dense {dense:,} bytes"
        if sizes[sparse.format] >= dense:
            report[name] = f"dense: the smallest, {told}"
            continue
        report[name] = f"{sparse.format}: {told}"
        if not name:
            return sparse, report
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, sparse)
    return model, report
