"""Consensus sub-network: polarisation regularisation and one pass of training. arXiv 2302.10798 (2023, v5 2025).

Input-dependent gates decide which residual branches or channels run, and a regulariser makes all inputs agree about
each of them. After one training every gate is open for everybody or shut for everybody: what is open is cut out as an
ordinary smaller network, and the gates are thrown away.

Symbols: B samples, K gates, g[b, k] in {0, 1} gate k for sample b, gbar_k its mean over the batch, c_k the cost behind
gate k in multiply-adds, rho the share of it that is to be kept.

Gates (layers: one for each residual branch F_l; channels: one for each inner channel of it)::

    x_{l+1} = act(skip(x_l) + g_l(x_l) F_l(x_l))                                 granularity="layer"
    F_l = norm2(conv2(h)),  h = act(norm1(conv1(x_l))) * g_l(x_l)                granularity="channel"

    z = W2 relu(W1 pool(x_l) + b1) + b2       (B, G_l);  W1 (16, C), W2 (G_l, 16), b2 = 2: open at the start
    p = sigmoid(z);   forward g = 1[p >= 1/2], backward dg/dp = 1

Objective::

    L       = CE + lam_p L_polar + lam_c L_cost
    L_polar = (1/K) sum_k gbar_k (1 - gbar_k)            in [0, 1/4]; 0 if and only if every gate is unanimous
    L_cost  = (sum_k c_k gbar_k / sum_k c_k - rho)^2     (budget="max": only what is above rho counts)

L_polar is the variance of the gates over the batch. Its gradient, (1 - 2 gbar_k) / (B K) for every sample, moves all
samples towards what the majority does now. Both weights are 0 for the first tenth of the training; lam_c is ramped up
over the next tenth, lam_p until six tenths: a strong lam_p at once freezes the majority of the start, which is open.

Cutting out: m_k is the mean of gate k over a data set in evaluation mode, s_k = 1[m_k >= 1/2] stays, and
``agreement`` = mean_k max(m_k, 1 - m_k) says how unanimous the gates were.

What is the paper's and what is not: no code was released, and the paper's body was not at hand. Its abstract gives
binary differentiable gates, the polarisation of them, one training, layers and channels, and "about 50 % of the
connections at a loss of at most 1 %". The formulas above, the sizes of the gates, the schedule and the weights are this
file's own choice and must not be quoted as the authors'.

Where the specification is silent:

- A branch is found where a module adds two of its values: the side whose own layers have more weights, if the other
  side starts at the same value. What it finds stands in ``branches``. Branches that hold further branches are left out.
- A forward that takes ``**kwargs``, as the layers of transformers do, cannot be traced: channels can be gated there.
- Channels are gated where one convolution or linear layer alone writes them, and no norm mixes them on the way to the
  layers that read them; the first layer never. The gate sits where they are read.
- c_k counts the Conv and Linear layers; with channels of neighbouring layers both gated, their product is counted as
  if the other layer were whole.
- A group of channels whose gates are all shut keeps one channel that nothing reads: a layer of no channels is none.
- Where the gates disagree the normalisation statistics are those of the gated network; ``recalibrate`` makes new ones.
"""

from __future__ import annotations

import copy
import operator
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from threading import Lock, get_ident
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pliant.core import check
from pliant.core.cost import flops_per_sample
from pliant.core.dynamic import Dynamic, NotStaticError, Point, Value
from pliant.core.gates import binary_gate
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    check_example,
    device_of,
    evaluating,
    inputs_of,
    packed,
    removing,
    rows_of,
    split_batch,
    take,
    to_device,
)
from pliant.core.masks import multiply_adds, prunable
from pliant.core.objective import Criterion, loss
from pliant.core.slicing import Group, Slicing
from pliant.core.subnetwork import SubNetwork

Granularity = Literal["layer", "channel"]
Cost = Literal["macs", "parameters", "gates"]
Budget = Literal["match", "max"]
Gate = Literal["input", "free"]
GATED = Point(gates="input")
_HIDDEN = 16
_OPEN = 2.0  # b2: sigmoid(2) = 0.88
_ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)


# -- residual branches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branch:
    """One residual branch: module ``block`` adds it to a skip. All names are those of modules of the whole model.

    ``add`` is the name of the addition in the block's graph, ``side`` (0 or 1) the branch among its two arguments,
    ``entry`` the name of the value that the branch starts from, ``members`` the modules that run for it alone.
    """

    block: str
    add: str
    side: int
    entry: str
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        """A name to read: the block, and the first module of the branch."""
        return f"{self.block or 'model'} ({self.members[0]})"


class _Shallow(fx.Tracer):
    """Traces the forward of one module; all modules that it calls are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def find_branches(model: nn.Module, blocks: Sequence[str] = ("*",)) -> list[Branch]:
    """The residual branches of all modules whose name matches ``blocks`` (fnmatch), in the order of the modules.

    A module whose forward ``torch.fx`` cannot trace by itself has none.
    """
    found: list[Branch] = []
    for name, module in model.named_modules():
        if not any(fnmatchcase(name, p) for p in blocks) or not any(True for _ in module.children()):
            continue
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue
        try:
            graph = _Shallow().trace(module)
        except Exception:  # whatever a forward can raise on symbolic values
            continue
        found += _branches_of(name, module, graph)
    return [b for b in found if not any(_inside(o.block, m) for m in b.members for o in found)]


def _inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _branches_of(block: str, module: nn.Module, graph: fx.Graph) -> Iterator[Branch]:
    before: dict[fx.Node, set[fx.Node]] = {}  # every value that a value comes from, itself included
    for node in graph.nodes:
        before[node] = {node}.union(*(before[n] for n in node.all_input_nodes))
    for node in graph.nodes:
        if not _is_add(node):
            continue
        own = [
            [n for n in graph.nodes if n.op == "call_module" and n in before[a] and n not in before[b]]
            for a, b in (node.args, node.args[::-1])
        ]
        sizes = [sum(p.numel() for n in side for p in module.get_submodule(str(n.target)).parameters()) for side in own]
        if sizes[0] == sizes[1]:
            continue
        side = 0 if sizes[0] > sizes[1] else 1
        entry = own[side][0].args[0] if own[side][0].args else None
        if not isinstance(entry, fx.Node) or entry not in before[cast(fx.Node, node.args[1 - side])]:
            continue  # the other side does not pass the branch's input on
        prefix = f"{block}." if block else ""
        yield Branch(block, node.name, side, entry.name, tuple(f"{prefix}{n.target}" for n in own[side]))


def _is_add(node: fx.Node) -> bool:
    is_add = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return is_add and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs


def _rewrite(
    module: nn.Module, branches: Mapping[int, Branch], closed: set[int], gate: Callable[[int], Any] | None
) -> fx.GraphModule:
    """The block with its ``closed`` branches taken out, and the others multiplied by ``gate(k)(branch, entry)``."""
    graph = _Shallow().trace(module)
    nodes = {n.name: n for n in graph.nodes}
    for k, branch in branches.items():
        add = nodes[branch.add]
        value, skip = cast(fx.Node, add.args[branch.side]), cast(fx.Node, add.args[1 - branch.side])
        if k not in closed:
            if gate is not None:
                with graph.inserting_before(add):
                    gated = graph.call_function(gate(k), (value, nodes[branch.entry]))
                add.update_arg(branch.side, gated)
            continue
        if any(_in_place(module, user) for user in add.users):  # it would now change what the skip still holds
            with graph.inserting_before(add):
                skip = graph.call_method("clone", (skip,))
        add.replace_all_uses_with(skip)
        graph.erase_node(add)
    fx.GraphModule(module, graph)  # dead code is told by what the modules do, so the graph needs an owner first
    graph.eliminate_dead_code()
    rewritten = fx.GraphModule(module, graph, type(module).__name__)  # takes along what the graph still names
    rewritten.training = module.training
    return rewritten


def _in_place(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace", False)) or name.endswith("_") or name in ("iadd", "imul", "isub")


class _Passing:
    """What belongs to this network object alone; copies of it are empty.

    ``forwards``: blocks with some branches gated or taken out, made when first asked for. ``gates``: those of the last
    forward, by branch or group, and ``finite``, whether none of their logits was NaN. ``sliced``: the sub-network of
    the channels that stay; its skeleton serves one thread at a time.
    """

    def __init__(self) -> None:
        self.forwards: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.gates: dict[int, Tensor] = {}
        self.finite: Tensor | None = None
        self.ran = False
        self.lock = Lock()
        self.sliced: tuple[tuple[bool, ...], SubNetwork] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Passing:
        return _Passing()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Passing, ())


# -- the gates ------------------------------------------------------------------------------------------------------


class _Head(nn.Module):
    """z = W2 relu(W1 pool(x) + b1) + b2, for one branch or one group of channels."""

    def __init__(self, channels: int, gates: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, _HIDDEN)
        self.second = nn.Linear(_HIDDEN, gates)
        with torch.no_grad():
            self.second.weight.mul_(0.1)
            self.second.bias.fill_(_OPEN)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) maps, (B, T, C) sequences or (B, C) -> logits (B, G)."""
        pooled = x.mean(1) if x.dim() == 3 else x.flatten(2).mean(2) if x.dim() > 3 else x
        found: Tensor = self.second(torch.relu(self.first(pooled)))
        return found


class _Free(nn.Module):
    """Logits that do not look at the input: the baseline of one learned bit for each gate."""

    def __init__(self, channels: int, gates: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((gates,), _OPEN))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> logits (B, G), the same for every sample."""
        return self.logits.expand(len(x), -1)


@dataclass(frozen=True)
class _Readers:
    """A gated group of channels: who writes it, and for each reader which inputs belong to which channel."""

    group: Group
    writer: str
    readers: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name -> (positions, channels)


@dataclass(frozen=True)
class Report:
    """What the gates do.

    ``kept`` is the share of the cost behind the gates that stays, ``polarization`` and ``unanimous`` (share of gates)
    are over the last set that ``find_consensus`` saw, ``flops`` and ``parameters`` are shares of the whole network.
    """

    kept: float
    agreement: float
    polarization: float
    unanimous: float
    frozen: int
    flops: float
    parameters: float
    gates: dict[str, tuple[float, ...]]


# -- the method -----------------------------------------------------------------------------------------------------


class Consensus(Dynamic):
    """Binary gates that learn to agree, and the plain sub-network that they agree on.

    The dial has two settings: ``Point(sparsity=...)``, the consensus sub-network, and ``Point(gates="input")``, the
    network whose gates decide for every input. Training always runs the gates. ``fit`` ends with ``find_consensus`` on
    the training data; before that everything is open, and ``sparsity`` is what was asked for, ``1 - keep``. Afterwards
    it is what was reached, the share of the cost behind the gates that is gone.

    Args:
        model: your network; it is wrapped, not copied.
        example: an input for it.
        granularity: "layer" gates whole residual branches, "channel" the inner channels.
        blocks: names (fnmatch patterns) of the modules whose forward adds the branches (layers), or of the layers
            that write the channels (channels).
        exclude: names (patterns) of modules whose channels ``Slicing`` is to leave whole.
        keep: rho, the share of the cost behind the gates that stays, in (0, 1].
        cost: what c_k counts: "macs", "parameters", or "gates" (1 each).
        budget: "match" the share, or let it be the "max".
        lam_polar: lam_p.
        lam_cost: lam_c. Three times lam_p at least, or the gates agree to stay open.
        warmup: share of the training without regularisers; ``polar_until``: share at which lam_p reaches its value.
        polar_until: see ``warmup``.
        gate: "input" (a small head on what the branch starts from) or "free" (one learned logit for each gate).
        freeze_after: fix a gate that was unanimous for so many whole epochs. A branch fixed shut is no longer computed.
            None: never.
        min_agreement: ``extract`` refuses below this agreement.
        seed: of the heads' initial weights.
        criterion: ``criterion(output, target)``; cross entropy where it is None.

    Raises:
        ValueError: an argument is outside what is allowed, or there is nothing to gate.
    """

    costs: Tensor
    means: Tensor
    found: Tensor
    agreement: Tensor
    frozen: Tensor
    streak: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        granularity: Granularity = "layer",
        blocks: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        keep: float = 0.5,
        cost: Cost = "macs",
        budget: Budget = "match",
        lam_polar: float = 3.0,
        lam_cost: float = 10.0,
        warmup: float = 0.1,
        polar_until: float = 0.6,
        gate: Gate = "input",
        freeze_after: int | None = None,
        min_agreement: float = 0.5,
        seed: int = 0,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        check.module("model", model)
        self.granularity: Granularity = check.choice("granularity", granularity, Granularity)
        self.blocks = check.names("blocks", blocks, empty=False)
        self.exclude = check.names("exclude", exclude)
        self.keep = check.number("keep", keep, above=0, at_most=1)
        self.cost: Cost = check.choice("cost", cost, Cost)
        self.budget: Budget = check.choice("budget", budget, Budget)
        self.lam_polar = check.number("lam_polar", lam_polar, at_least=0)
        self.lam_cost = check.number("lam_cost", lam_cost, at_least=0)
        self.warmup, self.polar_until = check.share("warmup", warmup), check.share("polar_until", polar_until)
        if not warmup < polar_until:
            raise check.wrong("warmup", warmup, f"a number from 0 and below polar_until={self.polar_until:g}")
        self.gate: Gate = check.choice("gate", gate, Gate)
        self.freeze_after = check.optional(check.whole, "freeze_after", freeze_after, at_least=1)
        self.min_agreement = check.number("min_agreement", min_agreement, at_least=0.5, at_most=1)
        self.seed = check.seed("seed", seed)
        self.criterion = check.optional(check.function, "criterion", criterion)
        check_example(model, example)
        for pattern in self.exclude:
            if not any(fnmatchcase(n, pattern) for n, _ in model.named_modules()):
                raise ValueError(f"exclude: no module of the model is named {pattern!r}")
        self.example, self.model = example, model
        self.progress = 1.0  # until ``schedule`` says otherwise
        self.point = GATED
        self.branches: list[Branch] = []
        self.slicing: Slicing | None = None
        self._channels: list[_Readers] = []
        if granularity == "layer":
            self.branches = self._find_branches()
        else:
            self.slicing = Slicing(model, example, exclude=self.exclude, stacks=())
            self._channels = self._find_channels(self.slicing)
        self._passing = _Passing()
        self._frozen_norms: set[str] = set()  # layers that training leaves in evaluation mode
        self._make_gates()

    # -- construction -------------------------------------------------------------------------------------------

    def _find_branches(self) -> list[Branch]:
        names = [n for n, _ in self.model.named_modules()]
        for pattern in self.blocks:
            if not any(fnmatchcase(n, pattern) for n in names):
                raise ValueError(f"blocks: no module of the model is named {pattern!r}")
        found = find_branches(self.model, self.blocks)
        if not found:
            raise ValueError(
                "model: no residual branch was found (a module that adds a value to what it computed from it, and "
                "whose forward torch.fx can trace by itself); granularity='channel' needs none"
            )
        runs = {b.block: 0 for b in found}
        modules = [(b, self.model.get_submodule(b)) for b in runs]

        def count(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                runs[name] += 1

            return hook

        with (
            removing(m.register_forward_hook(count(n)) for n, m in modules),
            evaluating(self.model),
            torch.no_grad(),
        ):
            call(self.model, self.example)
        for name, times in runs.items():
            if times != 1:
                raise ValueError(
                    f"blocks: {name!r} runs {times} times in a forward pass; a gated block runs exactly once. "
                    f"Name the others: blocks=[...]"
                )
        return found

    def _find_channels(self, slicing: Slicing) -> list[_Readers]:
        order = _order(self.model, self.example)
        found = []
        for group in slicing.groups:
            entry = self._readers_of(group)
            if entry is None or entry.writer == order[0]:
                continue
            if any(fnmatchcase(entry.writer, p) for p in self.blocks):
                found.append(entry)
        if not found:
            raise ValueError(
                f"blocks: {list(self.blocks)} leaves no layer whose channels can be gated (written by one layer alone, "
                "not the first one, and mixed by no norm)"
            )
        return sorted(found, key=lambda r: order.index(r.writer))

    def _readers_of(self, group: Group) -> _Readers | None:
        writers, readers = [], {}
        for m in group.members:
            if m.side == "parameter":
                return None
            module = self.model.get_submodule(m.module)
            if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.MultiheadAttention | nn.Embedding):
                return None
            if not isinstance(module, _ConvNd | nn.Linear):
                continue
            if isinstance(module, _ConvNd) and module.groups > 1:
                if module.groups < module.in_channels:
                    return None
                continue  # depthwise: what comes in goes out
            if m.side == "out":
                writers.append(m.module)
            else:
                readers[m.module] = (m.positions, m.channels)
        if len(writers) != 1 or not readers or group.bundle != 1:
            return None
        return _Readers(group, writers[0], readers)

    def _make_gates(self) -> None:
        sizes = [1] * len(self.branches) if self.branches else [r.group.channels for r in self._channels]
        widths = self._entry_widths()
        kind = _Head if self.gate == "input" else _Free
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.heads = nn.ModuleList(kind(w, g) for w, g in zip(widths, sizes, strict=True))
        device = device_of(self.model)
        self.heads.to(device)
        total = sum(sizes)
        self._bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        costs = self._gate_costs()
        self.register_buffer("costs", torch.tensor(costs, dtype=torch.float64, device=device), persistent=False)
        self.register_buffer("means", torch.ones(total, dtype=torch.float64, device=device))
        self.register_buffer("found", torch.zeros((), dtype=torch.bool, device=device))  # whether the means are of data
        self.register_buffer("agreement", torch.ones((), dtype=torch.float64, device=device))
        self.register_buffer("frozen", torch.full((total,), -1, dtype=torch.int8, device=device))  # -1: not, else 0, 1
        self.register_buffer("streak", torch.zeros(total, dtype=torch.int64, device=device))
        self.register_buffer("lowest", torch.ones(total, device=device))
        self.register_buffer("highest", torch.zeros(total, device=device))

    def _entry_widths(self) -> list[int]:
        """Channels of what each head looks at, seen in one run."""
        if self._channels:
            widths = []
            for r in self._channels:
                writer = self.model.get_submodule(r.writer)
                widths.append(int(getattr(writer, "in_channels", 0) or getattr(writer, "in_features", 0)))
            return widths
        seen: dict[int, int] = {}

        def look(k: int) -> Callable[[Tensor, Tensor], Tensor]:
            def note(branch: Tensor, entry: Tensor) -> Tensor:
                if not isinstance(entry, Tensor) or entry.dim() < 2:
                    raise ValueError(f"blocks: the branch {self.branches[k].name!r} does not start from a batch")
                seen[k] = entry.shape[-1] if entry.dim() in (2, 3) else entry.shape[1]
                return branch

            note.__name__ = f"gate_{k}"
            return note

        with evaluating(self.model), torch.no_grad():
            forwards = {
                block: _rewrite(self.model.get_submodule(block), ks, set(), look).forward.__func__  # type: ignore[attr-defined]
                for block, ks in self._by_block().items()
            }
            with _replaced(self.model, forwards):
                call(self.model, self.example)
        return [seen[k] for k in range(len(self.branches))]

    def _gate_costs(self) -> list[float]:
        weights = prunable(self.model)
        uses = multiply_adds(self.model, weights, self.example) if self.cost == "macs" else [1] * len(weights)
        per = {name: u for w, u in zip(weights, uses, strict=True) for name in [w.name]}
        if self.cost == "gates":
            return [1.0] * self._bounds[-1]
        sizes = {w.name: w.parameter.numel() for w in weights}
        if self.branches:
            found = [
                float(sum(per[n] * sizes[n] for n in sizes if any(_inside(n, m) for m in b.members)))
                for b in self.branches
            ]
            for branch, number in zip(self.branches, found, strict=True):
                if not number:
                    raise ValueError(f"cost: the branch {branch.name!r} has no Conv or Linear layer; use cost='gates'")
            return found
        costs = []
        for r in self._channels:
            touched = {m.module for m in r.group.members if m.module in per}
            each = sum(per[n] * sizes[n] / _side(self.model.get_submodule(n), r, n) for n in touched)
            costs += [each] * r.group.channels
        return costs

    def _by_block(self) -> dict[str, dict[int, Branch]]:
        found: dict[str, dict[int, Branch]] = {}
        for k, branch in enumerate(self.branches):
            found.setdefault(branch.block, {})[k] = branch
        return found

    # -- the contract -------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """The consensus sub-network, and the network whose gates look at the input."""
        kept = float(self.kept_share((self.means >= 0.5).double())) if self.found else self.keep
        return [Point(sparsity=round(1.0 - kept, 6)), GATED]

    def _known(self, point: Mapping[str, Value]) -> Point:
        """The sub-network answers to the sparsity that was asked for as well, which code held before the training."""
        asked = Point(sparsity=round(1.0 - self.keep, 6))
        return self.points()[0] if dict(point) == dict(asked) else super()._known(point)

    def use(self, point: Mapping[str, Value]) -> Self:
        """Turn the dial; see ``Dynamic.use``."""
        super().use(point)
        self._prepare()
        return self

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode."""
        super().train(mode)
        self._prepare()
        return self

    def _prepare(self) -> None:
        """Make the blocks' forwards now: tracing changes ``nn.Module`` itself, which no other thread should see."""
        if hasattr(self, "means") and self.branches:
            self._made(True, self._fixed_shut())
            self._made(False, self._closed())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output: with its gates in training and at ``gates=input``, else of the consensus sub-network."""
        return self._run(packed(args, kwargs))

    def loss(self, batch: Batch) -> Tensor:
        """The objective of the module's docstring (a scalar); in evaluation mode the criterion alone.

        Raises:
            ValueError: a batch of one sample, for which all gates are unanimous.
        """
        x, y = split_batch(batch)
        if self.training:
            norms = ((n, m) for n, m in self.model.named_modules() if isinstance(m, _BatchNorm))
            self._frozen_norms = {n for n, m in norms if not m.training}
        value = loss(self._run(x), y, self.criterion)
        return value + self.regularizer() if self.training else value

    def regularizer(self) -> Tensor:
        """lam_p L_polar + lam_c L_cost of the gates of the last forward, weighted as the progress says.

        Raises:
            RuntimeError: no forward with gates has run.
            ValueError: it ran on one sample.
        """
        gbar = self.gate_means()
        polar, cost = self.weights()
        return polar * polarization(gbar) + cost * self._cost_loss(gbar)

    def gate_means(self) -> Tensor:
        """The means gbar (K,) of the last forward, over the batches of all processes; gradients flow through it."""
        if not self._passing.ran:
            raise RuntimeError("regularizer: no forward has run the gates yet; call the network on a batch first")
        parts, rows = [], 0
        for i, (a, b) in enumerate(pairwise(self._bounds)):
            g = self._passing.gates.get(i)
            if g is None:  # all of them are fixed
                parts.append(self.frozen[a:b].float())
                continue
            rows = len(g)
            parts.append(g.float().sum(0))
        if rows == 1:
            raise ValueError("batch: one sample agrees with itself; the regulariser needs two or more, eight to work")
        total = torch.cat(parts)
        live = torch.cat([
            torch.full((b - a,), i in self._passing.gates, device=total.device)
            for i, (a, b) in enumerate(pairwise(self._bounds))
        ])  # fmt: skip
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            summed = torch.cat([total.detach(), total.new_tensor([float(rows)])])
            torch.distributed.all_reduce(summed)
            # The value of the joined batch; gradients for this process's samples, times the number of processes,
            # by which DistributedDataParallel will divide.
            joined = summed[:-1] + world * (total - total.detach())
            gbar = torch.where(live, joined / summed[-1].clamp_min(1.0), total)
        else:
            gbar = torch.where(live, total / max(rows, 1), total)
        fixed = self.frozen >= 0
        return torch.where(fixed, self.frozen.to(gbar.dtype), gbar)

    def weights(self) -> tuple[float, float]:
        """(lam_p, lam_c) at the present progress of the training."""
        ramp = 0.1
        polar = (self.progress - self.warmup) / (self.polar_until - self.warmup)
        cost = (self.progress - self.warmup) / ramp
        return self.lam_polar * min(max(polar, 0.0), 1.0), self.lam_cost * min(max(cost, 0.0), 1.0)

    def _cost_loss(self, gbar: Tensor) -> Tensor:
        over = self.kept_share(gbar) - self.keep
        return torch.relu(over).square() if self.budget == "max" else over.square()

    def kept_share(self, gbar: Tensor) -> Tensor:
        """sum_k c_k gbar_k / sum_k c_k."""
        c = self.costs.to(gbar.dtype)
        return (c * gbar).sum() / c.sum()

    def schedule(self, progress: float) -> None:
        """Remember how far the training is; the weights of the regularisers follow from it."""
        self.progress = progress
        if progress == 0.0:
            self._start_epoch()

    def epoch_end(self, validation: Iterable[Batch] | None) -> None:
        """Count for how many epochs each gate has been unanimous, and fix those that have been for long enough."""
        ran = self.lowest <= self.highest
        now_open, now_shut = ran & (self.lowest == 1.0), ran & (self.highest == 0.0)
        # A streak is kept with its sign: so many epochs open, or so many (negative) epochs shut.
        longer_open, longer_shut = self.streak.clamp_min(0) + 1, self.streak.clamp_max(0) - 1
        zero = torch.zeros_like(self.streak)
        self.streak.copy_(torch.where(now_open, longer_open, torch.where(now_shut, longer_shut, zero)))
        if self.freeze_after is not None:
            fix = (self.streak.abs() >= self.freeze_after) & (self.frozen < 0)
            self.frozen.copy_(torch.where(fix, (self.streak > 0).to(torch.int8), self.frozen))
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.lowest.fill_(1.0)
        self.highest.fill_(0.0)

    def finish(self, train: Iterable[Batch]) -> None:
        """Find the consensus on the training data."""
        self.find_consensus(train)

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The gates without weight decay, which would slowly turn them over."""
        heads = {id(p) for p in self.heads.parameters()}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in heads]
        return [
            {"params": rest, "weight_decay": weight_decay},
            {"params": list(self.heads.parameters()), "weight_decay": 0.0},
        ]

    def extract(self, point: Mapping[str, Value], force: bool = False) -> nn.Module:
        """The consensus sub-network: the user's modules and ``torch.fx`` graphs of them, no gates.

        Args:
            point: ``Point(sparsity=...)`` of ``points()``.
            force: cut it out also when the gates agree less than ``min_agreement`` asks.

        Raises:
            NotStaticError: at ``gates=input``.
            ValueError: the gates agree less than ``min_agreement``.
        """
        known = self._known(point)
        if known == GATED:
            raise NotStaticError(known, "the gates look at the input; the consensus sub-network is static")
        if float(self.agreement) < self.min_agreement and not force:
            raise ValueError(
                f"min_agreement: the gates agree to {float(self.agreement):.3f}, less than {self.min_agreement}; train "
                "on with a larger lam_polar, or give force=True"
            )
        if self.slicing is not None:
            return self._sliced(self.slicing).extract(self.model, self._shut_columns())
        plain = copy.deepcopy(self.model).eval()
        closed = self._closed()
        for block, branches in sorted(self._by_block().items(), key=lambda item: -item[0].count(".")):
            if not closed & set(branches):
                continue
            rewritten = _rewrite(plain.get_submodule(block), branches, closed, None)
            if not block:
                return rewritten
            parent, _, leaf = block.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, rewritten)
        return plain

    # -- running ------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compile what ``extract`` gives
    def _run(self, x: Input) -> Any:
        return self._run_gated(x) if self.training or self.point == GATED else self._run_consensus(x)

    def _run_gated(self, x: Input) -> Any:
        self._passing.gates, self._passing.ran, self._passing.finite = {}, True, None
        if self._channels:
            output = self._run_channels(x)
        else:
            with _replaced(self.model, self._made(True, self._fixed_shut())):
                output = call(self.model, x)
        if self.training and self._passing.gates:
            self._watch()
        return output

    def _run_consensus(self, x: Input) -> Any:
        if self.slicing is not None:
            shut = self._shut_columns()  # copies, which a change of the weights does not reach: put in place each time
            key = object() if shut else None
            with self._passing.lock:
                return self._sliced(self.slicing).infer(self.model, x, lambda: shut, key)
        with _replaced(self.model, self._made(False, self._closed())):
            return call(self.model, x)

    def _sliced(self, slicing: Slicing) -> SubNetwork:
        """The sub-network of the channels that stay, built when they changed."""
        key = tuple((self.means >= 0.5).tolist())
        if self._passing.sliced is None or self._passing.sliced[0] != key:
            network = slicing.build(cast(Any, self._kept_channels()))
            network.skeleton.eval()
            self._passing.sliced = (key, network)
        return self._passing.sliced[1]

    def _made(self, gated: bool, closed: set[int]) -> dict[str, Callable[..., Any]]:
        """The forwards of all blocks that differ from their own, by name."""
        found = {}
        for block, branches in self._by_block().items():
            mine = closed & set(branches)
            if not gated and not mine:
                continue
            module = self.model.get_submodule(block)
            key = (block, module.training, gated, tuple(sorted(mine)))
            if key not in self._passing.forwards:
                rewritten = _rewrite(module, branches, mine, self._gate_function if gated else None)
                self._passing.forwards[key] = rewritten.forward.__func__  # type: ignore[attr-defined]
            found[block] = self._passing.forwards[key]
        return found

    def _gate_function(self, k: int) -> Callable[[Tensor, Tensor], Tensor]:
        def gate(branch: Tensor, entry: Tensor) -> Tensor:
            g = self._decide(k, entry)
            return branch if g is None else branch * g.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))

        gate.__name__ = f"gate_{k}"
        return gate

    def _decide(self, i: int, entry: Tensor) -> Tensor | None:
        """Gates (B, G) of branch or group ``i``; None where all of them are fixed open."""
        fixed = self.frozen[self._bounds[i] : self._bounds[i + 1]]
        if bool((fixed == 1).all()):
            return None
        if bool((fixed == 0).all()):
            return entry.new_zeros(len(entry), len(fixed))
        z = self.heads[i](entry)
        finite = ~torch.isnan(z.detach()).any()
        self._passing.finite = finite if self._passing.finite is None else self._passing.finite & finite
        g = binary_gate(z)
        if bool((fixed >= 0).any()):
            g = torch.where(fixed >= 0, fixed.to(g.dtype), g)
        self._passing.gates[i] = g
        return g

    def _run_channels(self, x: Input) -> Any:
        """Hooks for one forward: the writer's input decides, the readers' inputs are multiplied."""
        now: dict[int, Tensor | None] = {}
        owner = get_ident()  # other threads run the same modules; their hooks are not ours

        def decide(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if get_ident() != owner:
                    return
                entry = args[0]
                if isinstance(module, nn.Linear) and entry.dim() > 3:
                    entry = entry.flatten(1, -2)
                now[i] = self._decide(i, entry)

            return hook

        def multiply(i: int, positions: Sequence[int], channels: Sequence[int]) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
                if get_ident() != owner or (g := now[i]) is None:
                    return None
                value = args[0]
                dim = value.dim() - 1 if isinstance(module, nn.Linear) else 1
                width = value.shape[dim]
                spread = g.new_ones(len(g), width)
                spread[:, list(positions)] = g[:, list(channels)]
                shape = [len(g)] + [1] * (value.dim() - 1)
                shape[dim] = width
                return (value * spread.to(value.dtype).view(shape), *args[1:])

            return hook

        hooks = []
        for i, r in enumerate(self._channels):
            hooks.append(self.model.get_submodule(r.writer).register_forward_pre_hook(decide(i)))
            for name, (positions, channels) in r.readers.items():
                reader = self.model.get_submodule(name)
                hooks.append(reader.register_forward_pre_hook(multiply(i, positions, channels)))
        with removing(hooks):
            return call(self.model, x)

    @torch.no_grad()
    def _watch(self) -> None:
        """The smallest and the largest share of open gates of this epoch's batches."""
        rows = next(iter(self._passing.gates.values()))
        if len(rows) < 2:
            return
        gbar = self.gate_means()
        finite = self._passing.finite  # of an input that is not, the gates say nothing
        assert finite is not None
        self.lowest.copy_(torch.where(finite, torch.minimum(self.lowest, gbar), self.lowest))
        self.highest.copy_(torch.where(finite, torch.maximum(self.highest, gbar), self.highest))

    # -- the consensus ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def find_consensus(self, data: Iterable[Any] | Input) -> Self:
        """m_k over ``data`` in evaluation mode; from then on s_k = 1[m_k >= 1/2] is the sub-network.

        Raises:
            ValueError: ``data`` has no batches, or the gates' logits on it are NaN.
        """
        device = device_of(self.model)
        total = torch.zeros_like(self.means)
        rows = 0
        finite = True
        with evaluating(self):
            for x in inputs_of(data):
                n = rows_of(x)
                self._run_gated(to_device(x, device))
                for i, (a, b) in enumerate(pairwise(self._bounds)):
                    g = self._passing.gates.get(i)
                    total[a:b] += n * self.frozen[a:b].double() if g is None else g.double().sum(0)
                rows += n
                finite = finite and (self._passing.finite is None or bool(self._passing.finite))
        if not rows:
            raise ValueError("data: it holds no batches; the consensus needs some")
        if not finite:
            raise ValueError("data: the gates' logits on it are NaN")
        self.means.copy_(total / rows)
        self.found.fill_(True)
        self.agreement.copy_(torch.maximum(self.means, 1 - self.means).mean())
        self._passing.gates = {}
        if self.point != GATED:
            self.point = self.points()[0]
        self._prepare()
        if float(self.agreement) < 1.0:
            split = int(((self.means > 0) & (self.means < 1)).sum())
            warnings.warn(
                f"consensus: {split} of {len(self.means)} gates are not unanimous (agreement "
                f"{float(self.agreement):.4f}); the sub-network differs from the gated one: measure both, and see "
                "recalibrate()",
                stacklevel=2,
            )
        return self

    @torch.no_grad()
    def recalibrate(self, data: Iterable[Any] | Input) -> Self:
        """Estimate the statistics of BatchNorm layers anew, as means over ``data`` on the consensus sub-network.

        Layers that training left in evaluation mode (frozen ones) keep theirs.

        They are the model's own buffers, so the network with gates uses them too from then on.
        """
        norms = [
            m for n, m in self.model.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None and n not in self._frozen_norms
        ]  # fmt: skip
        momenta = [m.momentum for m in norms]
        kept = [[b.clone() for b in m.buffers()] for m in norms]
        device, before, seen = device_of(self.model), self.point, False
        with evaluating(self):
            self.use(self.points()[0])
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a mean over all batches
                norm.train()
            try:
                for x in inputs_of(data):
                    self._run_consensus_full(to_device(x, device))
                    seen = True
                if not seen:
                    raise ValueError("data: it holds no batches, so there are no statistics to be had")
            except BaseException:
                for norm, buffers in zip(norms, kept, strict=True):
                    for buffer, value in zip(norm.buffers(), buffers, strict=True):
                        buffer.copy_(value)
                raise
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
                self.use(before)
        return self

    def _run_consensus_full(self, x: Input) -> Any:
        """The consensus on the model's own modules, so that its own buffers learn: channels masked instead of cut."""
        if self.slicing is None:
            return self._run_consensus(x)
        chosen = (self.means >= 0.5).to(torch.int8)
        before = self.frozen.clone()
        self.frozen.copy_(chosen)
        try:
            return self._run_channels(x)
        finally:
            self.frozen.copy_(before)

    def _fixed_shut(self) -> set[int]:
        """The branches that are fixed shut, which training no longer computes."""
        return {k for k, fixed in enumerate(self.frozen.tolist()) if fixed == 0}

    def _closed(self) -> set[int]:
        return set((self.means < 0.5).nonzero().flatten().tolist())

    def _kept_channels(self) -> dict[str, set[int]]:
        """The channels of each group that stay: those of open gates, or one that nothing reads (``_shut_columns``)."""
        found = {}
        for r, (a, b) in zip(self._channels, pairwise(self._bounds), strict=True):
            open_ = (self.means[a:b] >= 0.5).nonzero().flatten().tolist()
            found[r.group.name] = set(open_) or {0}
        return found

    def _shut_columns(self) -> dict[str, Tensor]:
        """For groups without an open gate: their readers' weights, with the one channel that stays unread."""
        assert self.slicing is not None
        shut = [
            r
            for r, (a, b) in zip(self._channels, pairwise(self._bounds), strict=True)
            if not bool((self.means[a:b] >= 0.5).any())
        ]
        if not shut:
            return {}
        kept = self._kept_channels()
        views = self._sliced(self.slicing).views(self.model)
        replaced: dict[str, Tensor] = {}
        for r in shut:
            for name, (positions, channels) in r.readers.items():
                gone = {p for p, c in zip(positions, channels, strict=True) if c not in kept[r.group.name]}
                stays = [p for p, c in zip(positions, channels, strict=True) if c in kept[r.group.name]]
                index = [p - sum(q < p for q in gone) for p in stays]
                key = f"{name}.weight"
                value = replaced.get(key, views[key]).detach().clone()
                value[:, index] = 0.0
                replaced[key] = value
        return replaced

    def report(self) -> Report:
        """What the gates decided on the set that ``find_consensus`` saw last, and what is left of the network."""
        chosen = (self.means >= 0.5).double()
        x = take(self.example, slice(0, 1))
        plain = self.extract(self.points()[0], force=True)
        names = [b.name for b in self.branches] or [r.writer for r in self._channels]
        spans = zip(names, pairwise(self._bounds), strict=True)
        return Report(
            kept=float(self.kept_share(chosen)),
            agreement=float(self.agreement),
            polarization=float(polarization(self.means)),
            unanimous=float(((self.means == 0) | (self.means == 1)).double().mean()),
            frozen=int((self.frozen >= 0).sum()),
            flops=flops_per_sample(plain, x).total / flops_per_sample(self.model, x).total,
            parameters=sum(p.numel() for p in plain.parameters()) / sum(p.numel() for p in self.model.parameters()),
            gates={name: tuple(self.means[a:b].tolist()) for name, (a, b) in spans},
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"granularity={self.granularity!r}, gates={self._bounds[-1]}, keep={self.keep}, at={self.point}"


def polarization(gbar: Tensor) -> Tensor:
    """L_polar = (1/K) sum_k gbar_k (1 - gbar_k): the variance of binary gates, for their means (K,)."""
    return (gbar * (1 - gbar)).mean()


class _Switch:
    """The forward of a module while some threads want another one: theirs for them, its own for all others."""

    def __init__(self, module: nn.Module) -> None:
        self.own = module.forward
        self.before = vars(module).get("forward")
        self.of: dict[int, list[Callable[..., Any]]] = {}  # by thread, the innermost last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mine = self.of.get(get_ident())
        return mine[-1](*args, **kwargs) if mine else self.own(*args, **kwargs)


_SWITCHING = Lock()  # held while switches are put in place or taken away, and not while anything runs


@contextmanager
def _replaced(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for some modules, in this thread, inside the block; all else about the modules stays the same."""
    modules = [model.get_submodule(name) for name in forwards]
    me, placed = get_ident(), list[tuple[nn.Module, _Switch]]()
    try:
        for module, forward in zip(modules, forwards.values(), strict=True):
            with _SWITCHING:
                switch = vars(module).get("forward")
                if not isinstance(switch, _Switch):
                    switch = vars(module)["forward"] = _Switch(module)
                switch.of.setdefault(me, []).append(types.MethodType(forward, module))
            placed.append((module, switch))
        yield
    finally:
        for module, switch in placed:
            with _SWITCHING:
                switch.of[me].pop()
                if not switch.of[me]:
                    del switch.of[me]
                if switch.of:
                    continue
                if switch.before is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = switch.before


def _order(model: nn.Module, example: Input) -> list[str]:
    """Names of the Conv and Linear layers in the order in which they first run."""
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if name not in order:
                order.append(name)

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)]
    with removing(m.register_forward_hook(note(n)) for n, m in layers), evaluating(model), torch.no_grad():
        call(model, example)
    return order


def _side(module: nn.Module, r: _Readers, name: str) -> float:
    """By how many channels of the group the weight of a layer is shared out."""
    if name not in r.readers:
        return float(r.group.channels)
    width = getattr(module, "in_channels", 0) or getattr(module, "in_features", 0)
    return float(width) / (len(r.readers[name][0]) / r.group.channels)
