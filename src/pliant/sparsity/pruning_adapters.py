"""Structured pruning adapters (SPLoRA, SPPaRA, SPLoPA). arXiv 2211.10155 (2022).

One frozen pretrained network serves many tasks. For each task a small adapter, which can be fused into the weights, is
learned while channels (or blocks of weights) are pruned: the task's network is smaller and faster, and what has to be
stored for it is the adapter on the kept channels, biases, norms, the head and one bit for each channel.

Symbols: W (n_out, n_in) frozen, masks m_out, m_in, rank r, blocks of p x q, N prototypes of rank rho::

    W_task = (W + dW) * (m_out m_in^T)

    SPLoRA     dW = B A                 A (r, n_in), B (n_out, r)                    kind="splora"
    SPPaRA     dW = C                   C (n_out, n_in)                              kind="sppara"
    SPLoPA     dW = sum_i S_i (x) Pi_i  S_i (n_out / p, n_in / q), Pi_i = cols_i rows_i (p, q), (x) Kronecker; the
                                        prototypes are shared by all layers of one N, p, q, rho   kind="splopa"

    convolution: dW goes to the centre tap alone, W[:, :, k // 2, k // 2] += B A: a 1 x 1 convolution in parallel
    training:    y = W x + B (A x) + b, no dense gradient; evaluation: y = W_task x + b

Initialisation: B, C and cols uniform in +-1e-4; A by torch's kaiming_uniform(a = sqrt 5) as a (1, r, n_in) tensor, so
|A| <= 1 / sqrt(r n_in) and |dW| <= r 1e-4 / sqrt(r n_in) at the start.

Learned numbers, for kept sizes n'_in, n'_out: SPLoRA r (n'_in + n'_out), SPPaRA n'_in n'_out, and n'_out of bias;
fine-pruning would have n'_in n'_out k^2.

Channels: adapt the whole network; then, again and again, score the remaining channels over an epoch, normalise by
layer, remove the globally lowest 5 % of the original number (never a layer's last one), and recover. The score of
channel c of a layer's output y, summed over the batches of the epoch::

    weight |W_task,c|_1    gradient |mean dL/dy_c|    taylor |mean y_c dL/dy_c|    lrp |mean y_c dz_t/dy_c|

each divided by the layer's L2 norm (weight and lrp: by the layer's sum); mean over the rows of a batch and the map.
Channels that are added to each other are scored together, by the mean over the layers that write them.

How this file computes it: the smaller network runs in training too. Both the frozen W and what a setting learns are
read through the cuts of ``core.slicing``: what is removed is not in the computation, so no optimiser can bring it back,
and masked, sliced and fused network are one. The learned tensors themselves keep their shapes while they are trained,
so optimisers, gradients and other processes never see one change; what is stored is cut.

Where the paper is silent:

- "lrp" is gradient times activation of the true class's logit: for networks of ReLUs the same as LRP with the zero
  rule, up to biases.
- When the sign of a score is dropped: ``absolute``.
- Linear layers take SPPaRA's dense C too. Grouped convolutions share A among their groups, and are run fused, as are
  the four projections of ``nn.MultiheadAttention``.
- The score of a SPLoPA block is its part of the same sums (weight; or |sum of w dL/dw|), blocks instead of channels.
- After pruning the optimiser's state of the tensors that shrank is dropped, as a fresh optimiser would have none.
"""

from __future__ import annotations

import copy
import json
import math
import os
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self, cast

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from pliant.core import check
from pliant.core.cuts import Cuts
from pliant.core.dynamic import Dynamic, Point, Value, inner_optimizer
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    check_example,
    device_of,
    evaluating,
    follow_dtype,
    packed,
    removing,
    split_batch,
    to_device,
)
from pliant.core.masks import pack_bits, unpack_bits
from pliant.core.objective import Criterion, loss, target_outputs
from pliant.core.slicing import Group, NothingToCutError, Slicing
from pliant.core.sparse import compile_sparse
from pliant.core.subnetwork import SubNetwork

Kind = Literal["splora", "sppara", "splopa"]
Score = Literal["taylor", "gradient", "weight", "lrp"]
Absolute = Literal["reference", "batch"]
FORMAT = 1
_MOST_PROTOTYPES = 4096


# -- the adapters ---------------------------------------------------------------------------------------------------


class _Adapter(nn.Module, ABC):
    """A change dW (n_out, n_in) as a product of factors, which are applied one after the other."""

    @abstractmethod
    def factors(self, out: Tensor | None = None, inp: Tensor | None = None) -> tuple[Tensor, ...]:
        """Matrices in the order in which they are applied, dW x = f_n (... (f_1 x)); for these outputs and inputs."""

    def delta(self, out: Tensor | None = None, inp: Tensor | None = None) -> Tensor:
        """The whole change, or that of these outputs and inputs."""
        first, *rest = self.factors(out, inp)
        for factor in rest:
            first = factor @ first
        return first

    @abstractmethod
    def cut(self, out: Tensor | None, inp: Tensor | None) -> Self:
        """A copy with these outputs and inputs only."""


class SPLoRA(_Adapter):
    """dW = B A of rank r: ``rows`` is A (r, n_in), ``cols`` is B (n_out, r)."""

    def __init__(self, n_out: int, n_in: int, rank: int, init_range: float = 1e-4) -> None:
        super().__init__()
        rows = torch.empty(1, rank, n_in)
        nn.init.kaiming_uniform_(rows, a=math.sqrt(5))  # its fan-in is r n_in
        self.rows = nn.Parameter(rows[0].clone())
        self.cols = nn.Parameter(torch.empty(n_out, rank).uniform_(-init_range, init_range))

    def factors(self, out: Tensor | None = None, inp: Tensor | None = None) -> tuple[Tensor, ...]:
        """A, then B."""
        return _pick(self.rows, 1, inp), _pick(self.cols, 0, out)

    def cut(self, out: Tensor | None, inp: Tensor | None) -> Self:
        """Rows of B and columns of A."""
        made = copy.deepcopy(self)
        made.rows = nn.Parameter(_pick(self.rows, 1, inp).detach().clone())
        made.cols = nn.Parameter(_pick(self.cols, 0, out).detach().clone())
        return made


class SPPaRA(_Adapter):
    """dW = C (n_out, n_in), dense."""

    def __init__(self, n_out: int, n_in: int, init_range: float = 1e-4) -> None:
        super().__init__()
        self.full = nn.Parameter(torch.empty(n_out, n_in).uniform_(-init_range, init_range))

    def factors(self, out: Tensor | None = None, inp: Tensor | None = None) -> tuple[Tensor, ...]:
        """C."""
        return (_pick(_pick(self.full, 0, out), 1, inp),)

    def cut(self, out: Tensor | None, inp: Tensor | None) -> Self:
        """Rows and columns of C."""
        made = copy.deepcopy(self)
        made.full = nn.Parameter(self.factors(out, inp)[0].detach().clone())
        return made


class Prototypes(nn.Module):
    """N blocks Pi_i = cols_i rows_i (p, q) of rank rho, shared by the SPLoPA adapters of all layers."""

    def __init__(self, count: int, block: tuple[int, int], rank: int, init_range: float = 1e-4) -> None:
        super().__init__()
        self.cols = nn.Parameter(torch.empty(count, block[0], rank).uniform_(-init_range, init_range))
        self.rows = nn.Parameter(torch.empty(count, rank, block[1]))
        nn.init.kaiming_uniform_(self.rows, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """Pi (N, p, q)."""
        return self.cols @ self.rows


class SPLoPA(nn.Module):
    """dW = sum_i S_i (x) Pi_i with block weights ``S`` (N, n_out / p, n_in / q) and a mask of blocks."""

    mask: Tensor

    def __init__(self, n_out: int, n_in: int, count: int, block: tuple[int, int]) -> None:
        super().__init__()
        self.S = nn.Parameter(torch.empty(count, n_out // block[0], n_in // block[1]))
        nn.init.kaiming_uniform_(self.S, a=math.sqrt(5))
        self.register_buffer("mask", torch.ones(n_out // block[0], n_in // block[1], dtype=torch.bool))

    def delta(self, prototypes: Tensor) -> Tensor:
        """DW (n_out, n_in): block (a, b) is sum_i S_i[a, b] Pi_i, zero where it is masked."""
        blocks = torch.einsum("iab,ipq->apbq", self.S * self.mask, prototypes)
        return blocks.flatten(2).flatten(0, 1)

    def spread(self, block: tuple[int, int]) -> Tensor:
        """The mask of weights (n_out, n_in)."""
        return self.mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def _pick(tensor: Tensor, dim: int, at: Tensor | None) -> Tensor:
    """The positions ``at`` of one dimension; all of them where it is None."""
    return tensor if at is None else tensor.index_select(dim, at.to(tensor.device))


def _add_to_centre(weight: Tensor, delta: Tensor) -> Tensor:
    """W + dW, for a convolution at the centre tap."""
    if weight.dim() == 2:
        return weight + delta
    spatial = tuple(k // 2 for k in weight.shape[2:])
    changed = weight.clone()
    index: Any = (slice(None), slice(None), *spatial)
    changed[index] = changed[index] + delta
    return changed


_CONVS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def _parallel(layer: nn.Module, factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """DW x of a layer: pointwise products, for a convolution with its stride and as much padding as its centre sees."""
    if isinstance(layer, nn.Linear):
        for factor in factors:
            x = F.linear(x, factor)
        return x
    conv = cast(_ConvNd, layer)
    ones = [1] * len(conv.kernel_size)
    batch = x if x.dim() == len(ones) + 2 else x[None]
    centre = [k // 2 * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if conv.padding_mode != "zeros":  # the centre sees what is padded, where that is more than the kernel's half
        batch = F.pad(batch, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding: Sequence[int] = [0] * len(ones)
    elif isinstance(conv.padding, str):
        padding = {"same": centre, "valid": [0] * len(ones)}[conv.padding]
    else:
        padding = conv.padding
    offsets = [p - c for p, c in zip(padding, centre, strict=True)]
    for dim, offset in enumerate(offsets, 2):
        if offset < 0:  # the centre never sees the outermost rows
            batch = batch.narrow(dim, -offset, batch.shape[dim] + 2 * offset)
    run = _CONVS[len(ones) + 2]
    first, *rest = [f.view(*f.shape, *ones) for f in factors]
    batch = run(batch, first, stride=conv.stride, padding=[max(o, 0) for o in offsets])
    for factor in rest:
        batch = run(batch, factor)
    return batch if x.dim() == len(ones) + 2 else batch[0]


# -- one setting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """What an adapter changes: ``rows`` outputs from ``start`` on of a weight of the model.

    ``beside``: the layer has a forward of its own that the adapter can run in parallel with.
    """

    weight: str
    start: int
    rows: int
    beside: bool

    @staticmethod
    def of(name: str, module: nn.Module) -> dict[str, _Place]:
        """By the name of the adapter: the layer's, with q, k, v behind it for the inputs of an attention."""
        if not isinstance(module, nn.MultiheadAttention):
            beside = getattr(module, "groups", 1) == 1
            return {name: _Place(f"{name}.weight", 0, len(cast(Tensor, module.weight)), beside)}
        size = module.embed_dim
        found = {f"{name}.out_proj": _Place(f"{name}.out_proj.weight", 0, size, False)}
        for i, letter in enumerate("qkv"):
            if module.in_proj_weight is not None:
                found[f"{name}.{letter}"] = _Place(f"{name}.in_proj_weight", i * size, size, False)
            else:
                found[f"{name}.{letter}"] = _Place(f"{name}.{letter}_proj_weight", 0, size, False)
        return found


class _Skeletons(threading.local):
    """A network without weights for each thread, so that none sees what another one puts into its own."""

    network: SubNetwork | None = None
    source: SubNetwork | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Skeletons:
        return _Skeletons()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Skeletons, ())


@dataclass(frozen=True)
class _Cut:
    """Where the kept outputs and inputs of a layer stand in its adapter; ``at``: where they begin in the cut weight."""

    out: Tensor | None = None
    inp: Tensor | None = None
    at: int = 0


class _Setting(nn.Module):
    """What a task owns at one density: adapters, its own parameters and buffers, and which channels are kept.

    Its tensors have the channels ``stored``, of which ``kept`` are in use: while it is trained it keeps all that it
    began with. ``own``: names of tensors of the whole model -> the setting's, under names without dots.
    """

    def __init__(self, task: str, own: Mapping[str, Tensor], adapters: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.task = task
        self.kept: dict[str, tuple[int, ...]] = {}  # of the groups that lost channels
        self.stored: dict[str, tuple[int, ...]] = {}
        # Of its own tensors, by dimension: the kept positions among the stored.
        self.index: dict[str, dict[int, Tensor]] = {}
        self.cuts: dict[str, _Cut] = {}  # of the adapters
        self.network: SubNetwork | None = None  # built when it first runs
        self.running = _Skeletons()
        self.frozen: tuple[Any, dict[str, Tensor]] | None = None  # the base's tensors, cut, and what they were cut from
        self.names: dict[str, str] = {}
        for i, (name, tensor) in enumerate(own.items()):
            self.names[name] = f"own{i}"
            value = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"own{i}", nn.Parameter(value))
            else:
                self.register_buffer(f"own{i}", value)
        self.layers = {layer: f"adapter{i}" for i, layer in enumerate(adapters)}
        for layer, adapter in adapters.items():
            self.add_module(self.layers[layer], adapter)

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is built when it is needed."""
        return self.__dict__ | {"network": None, "running": _Skeletons(), "frozen": None}

    def own(self) -> dict[str, Tensor]:
        """Its tensors by their names in the whole model, cut to what is kept."""
        found = {}
        for name, place in self.names.items():
            value = getattr(self, place)
            for dim, at in self.index.get(name, {}).items():
                value = _pick(value, dim, at)
            found[name] = value
        return found

    @torch.no_grad()
    def update(self, used: Mapping[str, Tensor]) -> None:
        """Take back the buffers that a training step wrote into cut copies of: statistics of norms."""
        for name, index in self.index.items():
            stored = getattr(self, self.names[name])
            if not isinstance(stored, nn.Parameter):
                ((dim, at),) = index.items()
                stored.index_copy_(dim, at.to(stored.device), used[name])

    def adapter(self, layer: str) -> nn.Module:
        """The adapter of a layer."""
        return self.get_submodule(self.layers[layer])

    def factors(self, layer: str) -> tuple[Tensor, ...]:
        """The factors of a layer's adapter, cut to what is kept."""
        cut = self.cuts.get(layer, _Cut())
        return cast(_Adapter, self.adapter(layer)).factors(cut.out, cut.inp)

    def delta(self, layer: str) -> Tensor:
        """The change of a layer's weight, cut to what is kept."""
        cut = self.cuts.get(layer, _Cut())
        return cast(_Adapter, self.adapter(layer)).delta(cut.out, cut.inp)

    @torch.no_grad()
    def learned(self) -> int:
        """Learned numbers among what is kept; a mask takes one bit for each channel or block besides."""
        total = sum(t.numel() for n, t in self.own().items() if isinstance(getattr(self, self.names[n]), nn.Parameter))
        for layer in self.layers:
            adapter = self.adapter(layer)
            if isinstance(adapter, SPLoPA):  # what is masked is not stored
                total += len(adapter.S) * int(adapter.mask.sum())
            else:
                total += sum(f.numel() for f in self.factors(layer))
        return total

    @torch.no_grad()
    def compact(self) -> _Setting:
        """A copy that stores what is kept and nothing else."""
        own = {
            n: nn.Parameter(t.detach()) if isinstance(getattr(self, self.names[n]), nn.Parameter) else t
            for n, t in self.own().items()
        }
        adapters: dict[str, nn.Module] = {}
        for layer in self.layers:
            adapter, cut = self.adapter(layer), self.cuts.get(layer, _Cut())
            adapters[layer] = adapter.cut(cut.out, cut.inp) if isinstance(adapter, _Adapter) else copy.deepcopy(adapter)
        made = _Setting(self.task, own, adapters)
        made.kept = made.stored = dict(self.kept)
        made.cuts = {layer: _Cut(at=cut.at) for layer, cut in self.cuts.items()}
        return made


# -- the method -----------------------------------------------------------------------------------------------------


class PruningAdapters(Dynamic):
    """A frozen network, and for each task and density an adapter, masks, biases, norms and a head.

    The dial is ``Point(task=..., density=...)``, one for each setting that was made: density is the share of channels
    (blocks, for SPLoPA) that is left. A new network has one setting, the task ``task`` at density 1. ``fit`` adapts it
    for the share ``adapt`` of its time, then prunes ``step`` of the channels again and again, with equal time to
    recover in between, down to the least of ``density``; at each of the others a copy is kept as a setting. In a loop
    of your own call ``prune``. What is trained is always the setting in use.

    Args:
        model: the pretrained network; it is wrapped, not copied, and none of its tensors ever changes.
        example: an input for it.
        kind: "splora", "sppara" or "splopa".
        rank: r of SPLoRA: a number, or a share in (0, 1) of a layer's outputs. No more than the layer's smaller side.
        init_range: range of the uniform initial values of the factor that starts small.
        targets: names (fnmatch patterns) of the layers that get an adapter; an ``nn.MultiheadAttention`` named attn
            has attn.q, attn.k, attn.v and attn.out_proj. Other weights are frozen, but for ``head``:
            ``targets=(), head=("*",)`` is fine-pruning, where a task owns every Conv and Linear weight.
        exclude: names (patterns) of modules whose channels are never pruned.
        head: names (patterns) of layers that a task owns and trains whole; by default the last one that runs.
        density: shares of the channels that ``fit`` stops at, descending.
        adapt: share of ``fit`` before the first pruning.
        step: share of the original number of channels that one round of pruning removes.
        score: "taylor", "gradient", "weight" or, in ``prune`` with data only, "lrp".
        absolute: when a score loses its sign. "reference": taylor and gradient when all batches are summed up, lrp
            for each single activation; "batch": every score after each batch, so that batches never cancel out.
        block: p, q of SPLoPA.
        prototypes: N of SPLoPA.
        prototype_rank: rho of SPLoPA.
        task: name of the first task.
        seed: of the adapters' initial values.
        criterion: ``criterion(output, target)``; cross entropy where it is None.

    Raises:
        ValueError: an argument is outside what is allowed, or a layer cannot carry the adapter; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        kind: Kind = "splora",
        rank: float = 8,
        init_range: float = 1e-4,
        targets: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        head: Sequence[str] | None = None,
        density: Sequence[float] = (1.0, 0.5, 0.3),
        adapt: float = 0.3,
        step: float = 0.05,
        score: Score = "taylor",
        absolute: Absolute = "reference",
        block: tuple[int, int] = (32, 32),
        prototypes: int = 64,
        prototype_rank: int = 1,
        task: str = "task",
        seed: int = 0,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_example(model, example)
        self.kind = check.choice("kind", kind, Kind)
        self.rank = check.number("rank", rank, above=0, at_most=check.LARGEST)
        if rank >= 1 and rank != int(rank):
            raise check.wrong("rank", rank, "a whole number of 1 or more, or a share in (0, 1)")
        self.rank = int(rank) if rank >= 1 else self.rank
        self.init_range = check.number("init_range", init_range, at_least=0, at_most=1000)
        self.targets, self.exclude = check.names("targets", targets), check.names("exclude", exclude)
        self.head = check.optional(check.names, "head", head, empty=False)
        self.density = check.sequence("density", density, lambda n, v: check.number(n, v, above=0, at_most=1))
        if sorted(set(self.density), reverse=True) != list(self.density):
            raise check.wrong("density", density, "shares in (0, 1], descending, none twice")
        self.adapt = check.number("adapt", adapt, at_least=0, below=1)
        self.step = check.number("step", step, above=0, below=1)
        self.score = check.choice("score", score, ("taylor", "gradient", "weight"))
        self.absolute = check.choice("absolute", absolute, Absolute)
        self.block = check.sequence("block", block, lambda n, v: check.whole(n, v, at_least=1), length=2)
        self.prototypes = check.whole("prototypes", prototypes, at_least=1, at_most=_MOST_PROTOTYPES)
        self.prototype_rank = check.whole("prototype_rank", prototype_rank, at_least=1)
        self.task, self.seed = check.text("task", task), check.seed("seed", seed)
        self.criterion = check.optional(check.function, "criterion", criterion)
        self.example, self.model = example, model
        for p in model.parameters():
            p.requires_grad_(False)
        self._heads, self._adapted = self._choose_layers()
        self.slicing = self._slice()
        self._warn_of_rank()
        self.blocks = self._make_prototypes()
        self.settings = nn.ModuleList([self._new_setting(task, seed)])
        self.point = self.points()[0]
        self.rounds = 0  # of pruning that the training under way has made
        self._optimizer: Callable[[], Optimizer | None] | None = None
        self._sums: dict[str, Tensor] = {}  # scores since the epoch began, by layer
        self._epoch: dict[str, Tensor] = {}  # of the last whole epoch
        self._scored_at = 0  # the setting that they belong to

    # -- construction -------------------------------------------------------------------------------------------

    def _choose_layers(self) -> tuple[list[str], dict[str, _Place]]:
        """Names of the layers that a task owns whole, and what gets an adapter."""
        order: list[str] = []
        modules = dict(self.model.named_modules())
        attentions = {n: m for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
        inside = {f"{n}.out_proj" for n in attentions}  # read by the attention, never called
        layers = {n: m for n, m in modules.items() if isinstance(m, _ConvNd | nn.Linear) and n not in inside}
        names = {name: n for n, m in modules.items() if n in layers or n in attentions for name in _Place.of(n, m)}

        def note(name: str) -> Callable[..., None]:
            return lambda *_: order.append(name)

        hooks = [m.register_forward_hook(note(n)) for n, m in (layers | attentions).items()]
        with removing(hooks), evaluating(self.model), torch.no_grad():
            call(self.model, self.example)
        called = [n for n in order if n in layers]
        if not called:
            raise ValueError("model: it runs no Conv or Linear layer")
        for name, patterns, known in (("targets", self.targets, names), ("head", self.head or (), layers)):
            for pattern in patterns:
                if not any(fnmatchcase(n, pattern) for n in known):
                    raise ValueError(
                        f"{name}: {pattern!r} matches no Conv or Linear layer; there are: {list(known)[:12]}"
                    )
        heads = [called[-1]] if self.head is None else [n for n in layers if any(fnmatchcase(n, p) for p in self.head)]
        adapted: dict[str, _Place] = {}
        for name, owner in names.items():
            if name in heads or owner not in order or not any(fnmatchcase(name, p) for p in self.targets):
                continue
            layer, place = modules[owner], _Place.of(owner, modules[owner])[name]
            if self.kind == "splopa":
                if isinstance(layer, _ConvNd):
                    continue
                shape = (place.rows, _named(self.model, place.weight).shape[1])
                if any(size % b for size, b in zip(shape, self.block, strict=True)):
                    raise ValueError(
                        f"block: {self.block} does not divide {name!r}, a weight of {shape}; leave it out with "
                        "targets=[...] or choose another block"
                    )
            elif isinstance(layer, _ConvTransposeNd) or (isinstance(layer, _ConvNd) and not _has_centre(layer)):
                raise ValueError(
                    f"targets: {name!r} is {layer}; an adapter needs a convolution with an odd kernel, equal in all "
                    "dimensions. Leave it out: it stays frozen"
                )
            adapted[name] = place
        if not adapted and self.targets:
            raise ValueError(f"targets: {list(self.targets)} leaves no layer for kind={self.kind!r}")
        return heads, adapted

    def _slice(self) -> Slicing:
        """The channels that can go; a network all of whose channels have to stay is adapted and not pruned."""
        try:
            return Slicing(self.model, self.example, width=self.kind != "splopa", exclude=self.exclude, stacks=())
        except NothingToCutError as error:
            warnings.warn(f"{error}; it is adapted, and stays at density 1", stacklevel=3)
            return Slicing(self.model, self.example, width=False, exclude=self.exclude, stacks=())

    def _rank(self, n_out: int) -> int:
        return int(self.rank) if self.rank >= 1 else max(1, round(self.rank * n_out))

    def _sides(self, place: _Place) -> tuple[int, int]:
        """Outputs and inputs of what an adapter changes."""
        return place.rows, _named(self.model, place.weight).shape[1]

    def _warn_of_rank(self) -> None:
        high = [n for n, place in self._adapted.items() if self._rank(place.rows) > min(self._sides(place))]
        if high and self.kind == "splora":
            warnings.warn(
                f"rank: {self.rank:g} is above what {', '.join(map(repr, high[:6]))} can use, which get the highest "
                "that they can",
                stacklevel=3,
            )

    def _make_prototypes(self) -> Prototypes | None:
        if self.kind != "splopa":
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            rank = min(self.prototype_rank, *self.block)
            made = Prototypes(self.prototypes, cast("tuple[int, int]", self.block), rank, self.init_range)
        return made.to(device_of(self.model))

    def _new_setting(self, task: str, seed: int, classes: int | None = None) -> _Setting:
        adapters: dict[str, nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, place in self._adapted.items():
                n_out, n_in = self._sides(place)
                if self.kind == "splora":
                    rank = min(self._rank(n_out), n_out, n_in)
                    adapters[name] = SPLoRA(n_out, n_in, rank, self.init_range)
                elif self.kind == "sppara":
                    adapters[name] = SPPaRA(n_out, n_in, self.init_range)
                else:
                    adapters[name] = SPLoPA(n_out, n_in, self.prototypes, cast("tuple[int, int]", self.block))
                adapters[name].to(_named(self.model, place.weight))
            setting = _Setting(task, self._owned(), adapters)
            if classes is not None:
                self._new_heads(setting, classes)
        return setting

    def _owned(self) -> dict[str, Tensor]:
        """What a task owns of the model besides adapters: heads, every bias, and the norms with their statistics."""
        found: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            norm = isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
            layer = isinstance(module, _ConvNd | nn.Linear | nn.MultiheadAttention)
            for leaf, parameter in module.named_parameters(recurse=False):
                if norm or name in self._heads or (layer and leaf in ("bias", "in_proj_bias")):
                    found[f"{name}.{leaf}" if name else leaf] = parameter
            for leaf, buffer in module.named_buffers(recurse=False):
                if norm:
                    found[f"{name}.{leaf}" if name else leaf] = buffer
        return found

    def _new_heads(self, setting: _Setting, classes: int) -> None:
        for name in self._heads:
            layer = self.model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"classes: the head {name!r} is {type(layer).__name__}; only a Linear can be resized")
            fresh = nn.Linear(layer.in_features, classes, layer.bias is not None).to(layer.weight)
            for leaf, value in fresh.named_parameters():
                setattr(setting, setting.names[f"{name}.{leaf}"], value)

    # -- the contract -------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """All settings, task by task, from the least density to the largest."""
        found = [self._point_of(s) for s in self._all()]
        tasks = list(dict.fromkeys(p["task"] for p in found))
        return sorted(found, key=lambda p: (tasks.index(p["task"]), cast(float, p["density"])))

    def use(self, point: Mapping[str, Value]) -> Self:
        """Turn the dial; from then on this setting's parameters are those that can be trained."""
        super().use(point)
        for setting in self._all():
            setting.requires_grad_(setting is self._setting())
        return self

    @torch.compiler.disable(reason="compile what extract gives")  # type: ignore[no-untyped-call,untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for the setting in use, computed by the smaller network.

        Any number of threads may call it at once, as long as none turns the dial or trains. ``torch.compile`` leaves
        it as it is: compile the network that ``extract`` gives.
        """
        return self._run(packed(args, kwargs))

    @torch.compiler.disable(reason="compile what extract gives")  # type: ignore[no-untyped-call,untyped-decorator]
    def loss(self, batch: Batch) -> Tensor:
        """The criterion at the setting in use (a scalar)."""
        x, y = split_batch(batch)
        outputs: dict[str, Tensor] | None = None
        if self.training and self.score != "weight" and torch.is_grad_enabled():
            outputs = {}
            self._own_scores()
        value = loss(self._run(x, outputs), y, self.criterion)
        for name, output in (outputs or {}).items():
            if output.requires_grad:
                output.register_hook(self._summing(name, output.detach()))  # type: ignore[no-untyped-call]
        return value

    def _own_scores(self) -> None:
        """Drop scores that another setting than the one in use has gathered: they are those of its own channels."""
        at = self._all().index(self._setting())
        if at != self._scored_at:
            self._reset_scores()
            self._scored_at = at

    def _summing(self, name: str, value: Tensor) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            self._add_score(self._sums, name, self.score, value, grad)

        return hook

    def schedule(self, progress: float) -> None:
        """Adapt, then one round of pruning after another until the least density; see the class.

        A round waits for scores, one step of training at least. Rounds that are due at once, in a training of few
        steps, are one pruning, though never across a density that is to be kept.
        """
        if progress == 0.0:
            self.rounds = 0
        self._own_scores()
        if not self.adapt <= progress < 1.0 or not (self.score == "weight" or self._epoch or self._sums):
            return
        total = math.ceil(round((1.0 - self.density[-1]) / self.step, 6))
        due = min(math.floor((progress - self.adapt) / (1.0 - self.adapt) * total + 1e-9) + 1, total) - self.rounds
        now = float(cast(float, self.point["density"]))
        near = self.step / 2  # whole channels: a density is met to within half a round
        below = [d for d in self.density if d < now - near]
        if due > 0 and below:
            amount = min(due * self.step, now - below[0])
            self.prune(amount, keep=any(abs(now - d) < near for d in self.density))
            self.rounds += math.ceil(round(amount / self.step, 6))

    def epoch_end(self, validation: Iterable[Batch] | None) -> None:
        """Scores are those of the last whole epoch."""
        if self._sums:
            self._epoch, self._sums = _over_processes(self._sums), {}

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Pruning drops the state that ``optimizer`` holds for the tensors that it cuts. ``fit`` calls this."""
        self._optimizer = weakref.ref(inner_optimizer(optimizer))

    def __getstate__(self) -> dict[str, Any]:
        """The state without the optimiser, for ``copy.deepcopy`` and pickle."""
        return self.__dict__ | {"_optimizer": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The examples follow where the network changes its precision."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.slicing.example = follow_dtype(self.slicing.example, fn)
        for setting in self._all():
            setting.network = None
        return self

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The setting in use; the adapters are decayed as everything else (towards the pretrained weights)."""
        self.use(self.point)
        found = [*self._setting().parameters(), *(self.blocks.parameters() if self.blocks is not None else ())]
        return [{"params": found, "weight_decay": weight_decay}]

    def extract(self, point: Mapping[str, Value], sparse: bool = False) -> nn.Module:
        """The plain network of ``point``: adapters fused, channels cut, masked blocks zero.

        Args:
            point: one of ``points()``.
            sparse: store layers sparsely where that is faster on this machine, for SPLoPA's zero blocks; the network
                then has an attribute ``layouts`` that tells what was chosen.
        """
        setting = self._setting(self._known(point))
        with torch.no_grad():
            tensors = self._tensors(setting, self._network(setting), fused=True)
        plain = self._network(setting).extract(self.model, tensors)
        for p in plain.parameters():
            p.requires_grad_(p.is_floating_point())
        for name in self._heads:
            layer = plain.get_submodule(name)
            if isinstance(layer, nn.Linear):
                layer.out_features = len(layer.weight)
        if sparse:
            example = to_device(self.example, device_of(plain))
            plain.layouts = compile_sparse(plain, example=example)  # type: ignore[assignment]
        return plain

    def fuse(self) -> nn.Module:
        """``extract`` of the setting in use."""
        return self.extract(self.point)

    # -- tasks --------------------------------------------------------------------------------------------------

    def add_task(self, name: str, classes: int | None = None, seed: int | None = None) -> Self:
        """A new task at density 1 with a fresh adapter, and the dial on it.

        Args:
            name: of the task.
            classes: outputs of a new head; without it the head starts as the pretrained one.
            seed: of the adapter and head; by default another one than those of the other tasks.

        Raises:
            ValueError: there is a task of that name.
        """
        if any(s.task == name for s in self._all()):
            raise ValueError(f"name: there is a task {name!r} already")
        number = self.seed + len({s.task for s in self._all()}) if seed is None else seed
        self.settings.append(self._new_setting(name, number, classes))
        self._reset_scores()
        return self.use(self._point_of(self._all()[-1]))

    # -- pruning ------------------------------------------------------------------------------------------------

    def prune(
        self,
        step: float | None = None,
        data: Iterable[Batch] | None = None,
        *,
        score: str | None = None,
        keep: bool = False,
    ) -> int:
        """Remove the lowest-scored channels (blocks), ``step`` of their original number, from the setting in use.

        Args:
            step: share of the original number; ``self.step`` by default.
            data: batches to score on, in evaluation mode. Without them the scores are those that ``loss`` summed up
                in training over the last epoch (since the last pruning, before one has ended).
            score: another one than ``self.score``.
            keep: keep a copy of the setting as it is now.

        Returns:
            How many channels (blocks) went. The last unit of a layer stays.

        Raises:
            RuntimeError: there are no scores yet.
        """
        share = self.step if step is None else check.number("step", step, above=0, at_most=1)
        kind = self.score if score is None else check.choice("score", score, Score)
        if not self._units(None)[1]:  # no channel can go
            return 0
        scores = self.score_layers(data, kind)
        setting = self._setting()
        if keep:
            self._copy_of(setting)
        count = round(share * self._units(None)[1])
        drop = self._prune_blocks if self.kind == "splopa" else self._drop
        gone = drop(setting, scores, count)
        self._reset_scores()
        self.point = self._point_of(setting)
        return gone

    def score_layers(self, data: Iterable[Batch] | None = None, score: str | None = None) -> dict[str, Tensor]:
        """Normalised scores of every writing layer's remaining outputs (SPLoPA: of the blocks), by layer name.

        Raises:
            RuntimeError: ``data`` is None and no training step has been made since the last pruning.
            ValueError: an unknown score, no batches, or one that is not finite.
        """
        kind = self.score if score is None else check.choice("score", score, Score)
        if kind == "weight":
            sums = {n: self._weight_sums(n, weight.abs()) for n, weight in self._scored_weights().items()}
        elif data is not None:
            sums = self._scored_on(data, kind)
        else:
            self._own_scores()
            sums = self._epoch or _over_processes(self._sums)
            if not sums or kind != self.score:
                raise RuntimeError(f"prune: no training step has summed up {kind!r} scores yet; give data=")
        found = {}
        for name, value in sums.items():
            value = value.abs()
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"score: that of layer {name!r} is not finite")
            size = value.sum() if kind in ("weight", "lrp") else value.norm()
            found[name] = value / size if size > 0 else value
        return found

    def _scored(self) -> list[str]:
        """The layers whose outputs are scored: those that write the channels of a group, or carry block masks."""
        if self.kind == "splopa":
            return list(self._adapted)
        return list(dict.fromkeys(name for g in self.slicing.groups for name, _, _ in self._writers(g)))

    def _writers(self, group: Group) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        found = []
        for m in group.members:
            module = self.model.get_submodule(m.module) if m.side != "parameter" else None
            depthwise = isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1
            layer = isinstance(module, _ConvNd | nn.Linear | nn.MultiheadAttention)
            if m.side == "out" and layer and not depthwise:
                found.append((m.module, m.positions, m.channels))
        return found

    def _written(self, name: str) -> str:
        """The weight whose rows are the outputs of a layer."""
        attention = isinstance(self.model.get_submodule(name), nn.MultiheadAttention)
        return f"{name}.out_proj.weight" if attention else f"{name}.weight"

    def _scored_on(self, data: Iterable[Batch], kind: str) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        device, seen = device_of(self.model), False
        with evaluating(self), torch.enable_grad():
            for batch in data:
                x, y = to_device(split_batch(batch), device)
                outputs: dict[str, Tensor] = {}
                output = self._run(x, outputs)
                goal = target_outputs(output, y) if kind == "lrp" else loss(output, y, self.criterion)
                names = list(outputs)
                grads = torch.autograd.grad(goal, [outputs[n] for n in names], allow_unused=True)
                for name, grad in zip(names, grads, strict=True):
                    if grad is not None:
                        self._add_score(sums, name, kind, outputs[name].detach(), grad)
                seen = True
        if not seen:
            raise ValueError("data: it holds no batches; scores need some")
        return sums

    def _add_score(self, sums: dict[str, Tensor], name: str, kind: str, value: Tensor, grad: Tensor) -> None:
        product = grad if kind == "gradient" else value * grad
        signed = self.absolute == "reference"
        if self.kind == "splopa":  # the value is the weight W_task
            part = self._weight_sums(name, product)
        else:
            layer = self.model.get_submodule(name)
            dim = product.dim() - 1
            if isinstance(layer, _ConvNd):
                dim -= len(layer.kernel_size)
            others = [d for d in range(product.dim()) if d != dim]
            part = product.abs().sum(others) if kind == "lrp" and signed else product.mean(others)
        part = (part if signed else part.abs()).detach().double()
        sums[name] = sums[name] + part if name in sums else part

    @torch.no_grad()
    def _scored_weights(self) -> dict[str, Tensor]:
        """The weights of the layers that are scored, as the setting in use has them."""
        pieces: dict[str, Tensor] = {}
        setting = self._setting()
        tensors = self._tensors(setting, self._network(setting), fused=True, pieces=pieces)
        return {n: pieces[n] if self.kind == "splopa" else tensors[self._written(n)] for n in self._scored()}

    def _weight_sums(self, name: str, weight: Tensor) -> Tensor:
        """The sum over each output's weights, for SPLoPA over each block's."""
        if self.kind != "splopa":
            return weight.double().flatten(1).sum(1)
        p, q = self.block
        return weight.double().view(len(weight) // p, p, -1, q).sum((1, 3))

    def _reset_scores(self) -> None:
        self._sums, self._epoch = {}, {}

    def _drop(self, setting: _Setting, scores: Mapping[str, Tensor], count: int) -> int:
        """Remove channels, unit by unit, until ``count`` are gone."""
        network = self._network(setting)
        groups = {g.name: g for g in self.slicing.groups}
        kept = {name: set(setting.kept.get(name, range(g.channels))) for name, g in groups.items()}
        candidates = []
        for group in groups.values():
            total, writers = torch.zeros(group.channels, dtype=torch.float64), 0
            for name, positions, channels in self._writers(group):
                weight = self._written(name)
                full = torch.zeros(len(_named(self.model, weight)), dtype=torch.float64)
                full[_positions(network.cuts.get(weight, {}), 0, len(full))] = scores[name].cpu()
                total.index_add_(0, torch.tensor(channels), full[list(positions)])
                writers += 1
            for unit, score in enumerate(total.view(group.units, -1).mean(1) / writers if writers else ()):
                if unit * group.bundle in kept[group.name]:
                    candidates.append((float(score), group.name, unit))
        gone = 0
        for _, name, unit in sorted(candidates):
            if gone >= count:
                break
            bundle = groups[name].bundle
            if len(kept[name]) > bundle:  # not the last unit of its layer
                kept[name] -= set(range(unit * bundle, (unit + 1) * bundle))
                gone += bundle
        self._shrink(setting, kept)
        return gone

    def _prune_blocks(self, setting: _Setting, scores: Mapping[str, Tensor], count: int) -> int:
        flat = [(n, cast(SPLoPA, setting.adapter(n)).mask) for n in self._adapted]
        everything = torch.cat([torch.where(m, scores[n].to(m.device), math.inf).flatten() for n, m in flat])
        layer = torch.cat([torch.full((m.numel(),), i) for i, (_, m) in enumerate(flat)])
        left = [int(m.sum()) for _, m in flat]
        offsets = [0]
        for _, m in flat:
            offsets.append(offsets[-1] + m.numel())
        gone = 0
        for index in torch.argsort(everything, stable=True).tolist():
            i = int(layer[index])
            if gone >= count or not math.isfinite(float(everything[index])):
                break
            if left[i] <= 1:
                continue
            flat[i][1].view(-1)[index - offsets[i]] = False
            left[i] -= 1
            gone += 1
        return gone

    def set_kept(self, kept: Mapping[str, Iterable[int]]) -> Self:
        """Keep these channels of the groups that are named (see ``slicing.groups``) in the setting in use.

        Raises:
            ValueError: an unknown group, or a channel that is gone already.
        """
        setting = self._setting()
        groups = {g.name: g for g in self.slicing.groups}
        wanted = {name: set(setting.kept.get(name, range(g.channels))) for name, g in groups.items()}
        for name, channels in kept.items():
            if name not in groups:
                raise ValueError(f"kept: there is no group {name!r}; there are: {list(groups)[:12]}")
            chosen = set(channels)
            if not chosen <= wanted[name]:
                raise ValueError(
                    f"kept: {name!r} has lost {sorted(chosen - wanted[name])[:8]} already, or never had them"
                )
            wanted[name] = chosen
        self._shrink(setting, wanted)
        self.point = self._point_of(setting)
        self._reset_scores()
        return self

    def _shrink(self, setting: _Setting, kept: Mapping[str, Iterable[int]]) -> None:
        """Leave the channels that are kept in use, and no others."""
        groups = {g.name: g for g in self.slicing.groups}
        smaller = {n: tuple(sorted(c)) for n, c in kept.items() if len(set(c)) < groups[n].channels}
        network = self.slicing.build(cast(Any, smaller))  # refuses what cannot be
        whole = self.slicing.build(cast(Any, setting.stored)).cuts if setting.stored else {}

        def index(name: str, dim: int, start: int = 0, size: int | None = None) -> Tensor | None:
            full = _named(self.model, name).shape[dim]
            part = range(start, full if size is None else start + size)
            old = [p for p in _positions(whole.get(name, {}), dim, full) if p in part]
            new = [p for p in _positions(network.cuts.get(name, {}), dim, full) if p in part]
            place = {p: i for i, p in enumerate(old)}
            return None if old == new else torch.tensor([place[p] for p in new])

        found: dict[str, dict[int, Tensor]] = {}
        for name in setting.names:
            for dim in network.cuts.get(name, {}):
                if (at := index(name, dim)) is not None:
                    found.setdefault(name, {})[dim] = at
        cuts = {}
        for layer, place in self._adapted.items():
            rows = _positions(network.cuts.get(place.weight, {}), 0, len(_named(self.model, place.weight)))
            out = index(place.weight, 0, place.start, place.rows)
            cuts[layer] = _Cut(out, index(place.weight, 1), sum(p < place.start for p in rows))
        setting.kept, setting.network, setting.frozen = smaller, network, None
        setting.index, setting.cuts = found, cuts
        optimizer = self._optimizer() if self._optimizer is not None else None
        for parameter in setting.parameters():
            parameter.grad = None
            if optimizer is not None:
                optimizer.state.pop(parameter, None)

    # -- running ------------------------------------------------------------------------------------------------

    def _all(self) -> list[_Setting]:
        return cast("list[_Setting]", list(self.settings))

    def _setting(self, point: Point | None = None) -> _Setting:
        wanted = self.point if point is None else point
        return next(s for s in self._all() if self._point_of(s) == wanted)

    def _units(self, setting: _Setting | None) -> tuple[int, int]:
        """Kept and all channels (blocks)."""
        if self.kind == "splopa":
            masks = [cast(SPLoPA, (setting or self._all()[0]).adapter(n)).mask for n in self._adapted]
            return sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
        total = sum(g.channels for g in self.slicing.groups)
        lost = 0 if setting is None else sum(
            g.channels - len(setting.kept[g.name]) for g in self.slicing.groups if g.name in setting.kept
        )  # fmt: skip
        return total - lost, total

    def _point_of(self, setting: _Setting) -> Point:
        kept, total = self._units(setting)
        return Point(task=setting.task, density=round(kept / total, 4) if total else 1.0)

    def _copy_of(self, setting: _Setting) -> None:
        """A copy of ``setting`` beside it, in place of an older one of the same density."""
        copied = setting.compact()
        copied.requires_grad_(False)
        same = [
            i for i, s in enumerate(self._all()) if s is not setting and self._point_of(s) == self._point_of(setting)
        ]
        if same:
            self.settings[same[0]] = copied
        else:
            self.settings.append(copied)

    def _network(self, setting: _Setting) -> SubNetwork:
        """The setting's network in evaluation mode; what is run is a copy, see ``_running``."""
        if setting.network is None:
            setting.network = self.slicing.build(cast(Any, setting.kept))
            setting.network.skeleton.eval()
        return setting.network

    def _running(self, setting: _Setting) -> SubNetwork:
        """The copy of the setting's network that belongs to this thread, in the present mode."""
        source, mine = self._network(setting), setting.running
        if mine.network is None or mine.source is not source:
            mine.source, mine.network = source, copy.deepcopy(source)
        if self.training or mine.network.skeleton.training:
            mine.network.set_mode(self.model, self.training)
        return mine.network

    def _tensors(
        self, setting: _Setting, network: SubNetwork, fused: bool, pieces: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Every tensor that the setting's network needs.

        Args:
            setting: whose.
            network: its own, or a copy.
            fused: with the adapters in the weights, also where they could run beside them.
            pieces: takes the weights that carry block masks, by layer.
        """
        tensors = setting.own()
        frozen = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        training = network.skeleton.training
        key = (training, *((t.data_ptr(), t._version) for n, t in frozen.items() if n not in tensors))
        held = setting.frozen
        if held is None or held[0] != key:
            with torch.no_grad():
                views = network.views(self.model)
            held = setting.frozen = (key, {n: t.detach() for n, t in views.items() if n not in tensors})
        tensors |= held[1]
        prototypes = self.blocks() if self.blocks is not None else None
        for layer, place in self._adapted.items():
            weight, adapter = tensors[place.weight], setting.adapter(layer)
            if isinstance(adapter, SPLoPA):
                assert prototypes is not None
                whole = weight.narrow(0, place.start, place.rows) + adapter.delta(prototypes)
                changed = torch.where(adapter.spread(cast(Any, self.block)), whole, whole.new_zeros(()))
                if pieces is not None:
                    pieces[layer] = changed = changed if changed.requires_grad else changed.clone()
                start = place.start
            elif fused or not place.beside:
                delta, start = setting.delta(layer), setting.cuts.get(layer, _Cut(at=place.start)).at
                changed = _add_to_centre(weight.narrow(0, start, len(delta)), delta)
            else:
                continue
            if len(changed) < len(weight):
                changed = torch.cat([weight[:start], changed, weight[start + len(changed) :]])
            tensors[place.weight] = changed
        return tensors

    def _run(self, x: Input, outputs: dict[str, Tensor] | None = None) -> Any:
        """The setting in use; ``outputs`` takes what the scored layers give (SPLoPA: their weights)."""
        setting = self._setting()
        network = self._running(setting)
        if torch.is_grad_enabled():
            pieces = outputs if self.kind == "splopa" else None
            tensors = self._tensors(setting, network, fused=not self.training, pieces=pieces)
        else:
            with torch.inference_mode(False), torch.no_grad():
                tensors = self._tensors(setting, network, fused=True)
            # As in the extracted network: torch.matmul chooses a kernel by this flag.
            tensors = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
        hooks = []
        if self.training and torch.is_grad_enabled() and self.kind != "splopa":
            for layer in [n for n, place in self._adapted.items() if place.beside]:
                module = network.skeleton.get_submodule(layer)
                hooks.append(module.register_forward_hook(_adding(setting.factors(layer))))
        if outputs is not None and self.kind != "splopa":
            for name in self._scored():
                hooks.append(network.skeleton.get_submodule(name).register_forward_hook(_noting(outputs, name)))
        args = (x,) if isinstance(x, Tensor) else () if isinstance(x, Mapping) else tuple(x)
        kwargs = dict(x) if isinstance(x, Mapping) else {}
        with removing(hooks) if hooks else nullcontext():
            found = functional_call(network.skeleton, tensors, args, kwargs, tie_weights=False)
        if self.training:
            setting.update(tensors)
        return found

    # -- what is stored -----------------------------------------------------------------------------------------

    def learned_numbers(self, point: Mapping[str, Value] | None = None) -> int:
        """Learned numbers of a setting (the one in use by default): adapters, biases, norms and head, as kept.

        SPLoPA's prototypes, which all layers and tasks share, are counted once.
        """
        setting = self._setting(None if point is None else self._known(point))
        return setting.learned() + (sum(p.numel() for p in self.blocks.parameters()) if self.blocks is not None else 0)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those of the setting in use (and SPLoPA's prototypes)."""
        return list(self.parameter_groups()[0]["params"])

    def save_task(self, path: str | Path, point: Mapping[str, Value] | None = None) -> Path:
        """Write one setting alone, without the base network, as a safetensors file; replaced in one step.

        Masks take one bit a channel; the file is loaded by ``load_task`` of a network with the same base.
        """
        setting = self._setting(None if point is None else self._known(point)).compact()
        tensors = {n: t.detach().contiguous().clone() for n, t in setting.state_dict().items()}
        if self.blocks is not None:
            tensors |= {f"blocks.{n}": t.detach().clone() for n, t in self.blocks.state_dict().items()}
            for name in [n for n in tensors if n.endswith(".mask")]:
                tensors[name] = pack_bits(tensors[name])
        meta = {"format": FORMAT, **self._description(setting), "base": self._base()}
        target = Path(path)
        temporary = target.with_name(target.name + ".part")
        temporary.write_bytes(safetensors.torch.save(tensors, {"pliant": json.dumps(meta)}))
        os.replace(temporary, target)
        return target

    def load_task(self, path: str | Path, name: str | None = None) -> Self:
        """Take in a setting that ``save_task`` wrote, as task ``name`` (by default its own), and turn the dial to it.

        Raises:
            ValueError: the file is damaged, or was made for another base network or kind of adapter.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
                meta = json.loads((file.metadata() or {})["pliant"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {path} is no task file of pliant, or it is damaged: {error}") from error
        if meta.get("format") != FORMAT:
            raise ValueError(f"path: {path} has format {meta.get('format')}; this version reads {FORMAT}")
        if meta["base"] != self._base():
            raise ValueError(f"path: {path} was made for another network, kind of adapter or rank than this one's")
        task = name or meta["task"]
        setting = self._restored(meta | {"task": task, "stored": meta["kept"]})
        blocks = {n.removeprefix("blocks."): tensors.pop(n) for n in list(tensors) if n.startswith("blocks.")}
        for key, shape in {k: t.shape for k, t in setting.state_dict().items() if k.endswith(".mask")}.items():
            tensors[key] = unpack_bits(tensors[key], shape)
        try:
            setting.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"path: {path} does not fit: {str(error).splitlines()[-1].strip()}") from error
        if self.blocks is not None:
            mine = self.blocks.state_dict()
            if any(not torch.equal(blocks[n].to(t), t) for n, t in mine.items()) and len(self._all()) > 1:
                warnings.warn("load_task: the prototypes are replaced, for all tasks", stacklevel=2)
            self.blocks.load_state_dict(blocks)
        same = [i for i, s in enumerate(self._all()) if self._point_of(s) == self._point_of(setting)]
        if same:
            self.settings[same[0]] = setting
        else:
            self.settings.append(setting)
        self._reset_scores()
        return self.use(self._point_of(setting))

    def _base(self) -> dict[str, Any]:
        """What a task file must have been made for."""
        shapes = {n: list(self._sides(place)) for n, place in self._adapted.items()}
        kinds = {"kind": self.kind, "rank": self.rank, "block": list(self.block), "prototypes": self.prototypes}
        return {**kinds, "prototype_rank": self.prototype_rank, "heads": self._heads, "layers": shapes}

    def _description(self, setting: _Setting) -> dict[str, Any]:
        groups = {g.name: g for g in self.slicing.groups}

        def packed_bits(kept: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
            found = {}
            for name, channels in kept.items():
                bits = torch.zeros(groups[name].channels, dtype=torch.bool)
                bits[list(channels)] = True
                found[name] = bytes(pack_bits(bits).tolist()).hex()
            return found

        own = setting.own()
        heads = {n: len(own[f"{n}.weight"]) for n in self._heads}
        return {
            "task": setting.task,
            "kept": packed_bits(setting.kept),
            "stored": packed_bits(setting.stored),
            "heads": heads,
        }

    def _channels(self, bits: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        """What ``_description`` packed."""
        sizes = {g.name: torch.Size([g.channels]) for g in self.slicing.groups}
        found = {n: torch.tensor(list(bytes.fromhex(code)), dtype=torch.uint8) for n, code in bits.items()}
        return {n: tuple(unpack_bits(b, sizes[n]).nonzero().flatten().tolist()) for n, b in found.items()}

    def _restored(self, description: Mapping[str, Any]) -> _Setting:
        """A setting as described, with room for its tensors."""
        setting = self._new_setting(description["task"], self.seed)
        for name, classes in description["heads"].items():
            if classes != len(setting.own()[f"{name}.weight"]):
                self._new_heads(setting, classes)
        if description["stored"]:
            self._shrink(setting, self._channels(description["stored"]))
            setting = setting.compact()
        if description["kept"]:
            self._shrink(setting, self._channels(description["kept"]))
        setting.requires_grad_(False)
        return setting

    def structure(self) -> dict[str, Any]:
        """The settings (task, masks, size of the head), and where a training under way stands: rounds and scores."""
        at = self._all().index(self._setting())
        scores = {"epoch": self._epoch, "sums": self._sums}
        return {
            "settings": [self._description(s) for s in self._all()],
            "at": at,
            "rounds": self.rounds,
            "scores": {k: {n: t.tolist() for n, t in found.items()} for k, found in scores.items()},
        }

    def restructure(self, structure: dict[str, Any]) -> None:
        """Make those settings, empty; one that fits already stays, and an optimiser that holds it."""
        wanted, mine = structure["settings"], self._all()
        made = []
        for i, description in enumerate(wanted):
            same = i < len(mine) and self._description(mine[i]) | {"kept": description["kept"]} == description
            if same:
                self._shrink(mine[i], self._channels(description["kept"]))
            made.append(mine[i] if same else self._restored(description))
        self.settings = nn.ModuleList(made)
        self.rounds = structure["rounds"]
        device = device_of(self.model)
        scores = {
            k: {n: torch.tensor(v, dtype=torch.float64, device=device) for n, v in found.items()}
            for k, found in structure["scores"].items()
        }
        self._epoch, self._sums = scores["epoch"], scores["sums"]
        self._scored_at = structure["at"]
        self.use(self._point_of(self._all()[structure["at"]]))
        if any(scores.values()):
            shapes = {n: self._weight_sums(n, w).shape for n, w in self._scored_weights().items()}
            if wrong := [n for found in scores.values() for n, t in found.items() if t.shape != shapes.get(n)]:
                raise ValueError(f"structure: the scores of {wrong[0]!r} are not those of its outputs")

    def extra_repr(self) -> str:
        """The options."""
        settings = f"settings={len(self.settings)}, at={self.point}"
        return f"kind={self.kind!r}, rank={self.rank}, layers={len(self._adapted)}, {settings}"


def _adding(factors: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + _parallel(module, factors, args[0])

    return hook


def _noting(outputs: dict[str, Tensor], name: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output  # an attention tells its weights too
        # In front of everything that learns no gradient would come back, but channels are scored there as well.
        value = first if first.requires_grad or not torch.is_grad_enabled() else first.detach().requires_grad_()
        outputs[name] = value
        return (value, *output[1:]) if isinstance(output, tuple) else value

    return hook


def _over_processes(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes of a training, each of which has seen its own batches."""
    if not (sums and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sums
    together = torch.cat([t.flatten() for t in sums.values()])
    dist.all_reduce(together)
    parts = torch.split(together, [t.numel() for t in sums.values()])
    return {name: part.view_as(sums[name]) for name, part in zip(sums, parts, strict=True)}


def _positions(cuts: Cuts, dim: int, size: int) -> list[int]:
    """The positions of one dimension that are kept."""
    if dim not in cuts:
        return list(range(size))
    return [p for start, length in cuts[dim] for p in range(start, start + length)]


def _named(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), leaf)
    return found


def _has_centre(layer: _ConvNd) -> bool:
    sizes = set(layer.kernel_size)
    return len(sizes) == 1 and next(iter(sizes)) % 2 == 1
