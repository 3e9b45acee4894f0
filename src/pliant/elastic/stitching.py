"""Stitchable Neural Networks (SN-Net): from a few trained networks, dozens between their sizes.

Pan, Cai, Zhuang: "Stitchable neural networks", CVPR 2023, arXiv:2302.06586.

The idea: run the first blocks of one trained network (an *anchor*), map its features by one linear *stitching layer*
into the space of another, and run the remaining blocks of that one. Each position of the seam is a network of another
cost. The layers start as least-squares solutions; a short joint training with a random path at each step does the rest.

Notation: anchors A_0..A_{M-1} from the cheapest to the dearest, each an embedding e_m, blocks B_m[0..L_m-1] and a head
h_m; D_m its width. F_m[i] (N, T, D_m), (N, D_m, H, W) or (N, D_m) is the output of block i, F_m[-1] that of the
embedding. A path (a -> b; j, k):

    y = h_b(B_b[L_b-1](... B_b[k](S(B_a[j](... B_a[0](e_a(x)))))))            the embedding of b does not run
    X = [F_a[j] as rows | 1]   (R, D_a + 1)          R = N T or N H W rows
    Y = F_b[k-1] as rows       (R, D_b)              for k = 0 what the embedding of b gives
    W = argmin |X W - Y|_F = pinv(X) Y  (D_a + 1, D_b);     S.weight = W[:-1].T,  S.bias = W[-1]
    loss at a path drawn uniformly, anchors included:
    L = (1 - t) CE(y, target) + t CE(y, argmax teacher(x))                     t = 1/2 with a teacher, else 0

Which (j, k). Equal depths: windows of K consecutive blocks at stride s; every ordered pair inside a window is a path,
and pairs that no earlier window had share one layer (K = 2, s = 1). Depths L_f < L_b: back block i is entered from
front block j = floor(i L_f / L_b) where j < i, one layer for each front block. Hierarchical networks stitch within a
stage. A shared layer starts as the mean of its solutions. Ids: the anchors, then pair by pair in that order.

Where the paper is silent, or its code differs from its text (the specification's traps):

- The least-squares problem has a bias column (code; the paper's formula has none) and is solved on networks in
  *evaluation* mode and plain images; the code fits in training mode on mixed ones. Float64 normal equations are summed
  over batches; where X has not full rank the solution is that of least norm, as of ``pinv``.
- The unpaired map is that of the text; the code's is shifted by one layer, since (0, 0) is skipped in one of two lists.
- From the larger to the smaller network (``direction``) unpaired depths use the mirror image of the map: front block i
  leads into back block floor(i L_b / L_f) where that is < i, one layer for each back block. Within stages a seam
  never enters at block 0, in either direction (the paper's rules have k > j there).
- Without ``nearest`` the ids of the nearest rule stay as they are; other pairs follow, then chains of three networks
  (second seam at or behind the first, j2 >= k1), which share the pairs' layers.
- A step on a frozen anchor would train nothing: ``train_anchors=False`` draws among the stitched paths alone.
- The reference trains class tokens along with the stitches when anchors are frozen, which changes the anchors. Here
  ``train_anchors=False`` leaves them bit for bit; ``train_anchors=["*cls_token"]`` is the reference's way.
- BatchNorm: every id has statistics of its own, estimated by ``initialize`` and ``finish``; anchors begin with theirs.

How a network is cut. Its forward is traced by ``torch.fx`` down to the blocks and no further: everything that does not
contain a block stays a module, so only the loop over the blocks need be traceable. The seam is the place before or
behind a block where a *single* tensor carries all that was computed from the input; what is a function of the input
alone (masks, positions) is computed again for the network that is entered. A path is the graph that remains, run as
generated Python on the anchors' own modules; ``extract`` hands out the same graph with copies of them.
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
import math
import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.node import map_arg
from torch.fx.proxy import Attribute, TraceError
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from pliant.core import check
from pliant.core.calibration import NormTable, batches_of
from pliant.core.cost import count_flops, flops_per_sample
from pliant.core.dynamic import Dynamic, Point, Value
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    check_example,
    device_of,
    evaluating,
    first_line,
    first_tensor,
    inputs_of,
    logits,
    packed,
    rows_of,
    split_batch,
    take,
    to_device,
)
from pliant.core.objective import Criterion, hard_distillation, loss
from pliant.core.objective import distillation as soft_distillation
from pliant.core.stacks import find_stacks

Shape = tuple[int, ...]
Blocks = str | Sequence[str] | Callable[[nn.Module], Any] | None
Adapter = Callable[[Shape, Shape], nn.Module]
_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}
_POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


# -- the space of stitches --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stitch:
    """One seam: leave network ``front`` after its block j, enter ``back`` at its block k, through ``layer``."""

    front: int
    back: int
    stage: int
    j: int
    k: int
    layer: int


@dataclass(frozen=True)
class Configuration:
    """One path: the networks that it runs through and the seams between them; an anchor has no seam."""

    id: int
    anchors: tuple[int, ...]
    stitches: tuple[Stitch, ...] = ()


def paired(depth: int, window: int = 2, stride: int = 1, repeats: bool = True) -> list[tuple[int, int, int]]:
    """(j, k, layer) of all stitches between two stacks of ``depth`` blocks, by sliding windows.

    Args:
        depth: L, blocks in each of the two.
        window: K, consecutive blocks in a window.
        stride: s, blocks between the starts of two windows.
        repeats: keep pairs with k <= j, which run a part of the depth twice.

    >>> [(j, k) for j, k, layer in paired(12) if layer < 2]
    [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    """
    found: dict[tuple[int, int], int] = {}
    layer = 0
    for start in range(0, depth, stride):
        inside = range(start, min(start + window, depth))
        fresh = [p for p in itertools.product(inside, inside) if p not in found and (repeats or p[0] < p[1])]
        found.update(dict.fromkeys(fresh, layer))
        layer += bool(fresh)
    return [(j, k, layer) for (j, k), layer in found.items()]


def unpaired(front: int, back: int) -> list[tuple[int, int, int]]:
    """(j, k, layer) of all stitches from ``front`` blocks into ``back`` blocks, the two numbers being different.

    The block i of the deeper stack belongs to block floor(i * shallow / deep) of the other, and (0, 0) is skipped.

    >>> unpaired(2, 4)
    [(0, 1, 0), (1, 2, 1), (1, 3, 1)]
    """
    shallow, deep = sorted((front, back))
    pairs = [(i * shallow // deep, i) for i in range(deep) if i * shallow // deep < i]
    layers = {block: n for n, block in enumerate(sorted({s for s, _ in pairs}))}
    return [((s, i, layers[s]) if front < back else (i, s, layers[s])) for s, i in pairs]


# -- least squares ----------------------------------------------------------------------------------------------------


class NormalEquations:
    """min |[X 1] W - Y|_F over rows that come in batches: X'X and X'Y in float64, for several Y at once."""

    def __init__(self) -> None:
        self.rows = 0
        self.gram: Tensor | None = None
        self.cross: dict[Any, Tensor] = {}
        self._inverse: tuple[float, Tensor] | None = None

    def add(self, x: Tensor, targets: Mapping[Any, Tensor]) -> None:
        """Rows x (R, D), and for each target (R, D')."""
        x = nn.functional.pad(x.double(), (0, 1), value=1.0)
        gram = x.T @ x
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        for key, y in targets.items():
            cross = x.T @ y.double()
            self.cross[key] = self.cross[key].add_(cross) if key in self.cross else cross
        self.rows += len(x)
        self._inverse = None

    def solve(self, key: Any, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
        """Weight (D', D) and bias (D',) for the target ``key``, of least norm where X has not full rank.

        Args:
            key: one of the targets.
            ridge: adds ridge * trace(X'X) / (D + 1) to the diagonal of X'X.

        Raises:
            ValueError: there are fewer rows than D + 1.
        """
        if self.gram is None or self.rows < len(self.gram):
            need = 1 if self.gram is None else len(self.gram)
            raise ValueError(f"data: {self.rows} rows; least squares needs at least {need}, one more than the width")
        gram = self.gram
        if ridge:
            gram = gram + ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        if self._inverse is None or self._inverse[0] != ridge:
            values, vectors = torch.linalg.eigh(gram)
            alive = values > values[-1].clamp_min(0) * len(gram) * torch.finfo(gram.dtype).eps
            vectors = vectors[:, alive]
            self._inverse = ridge, (vectors / values[alive]) @ vectors.T
        inverse, cross = self._inverse[1], self.cross[key]
        w = inverse @ cross
        w = w + inverse @ (cross - gram @ w)  # one step of refinement: the squared condition number costs digits
        return w[:-1].T.contiguous(), w[-1]


# -- cutting a network ------------------------------------------------------------------------------------------------


class _Parts(nn.Module):
    """A network as the caller took it apart; only ever traced, so it owns nothing."""

    def __init__(self, network: nn.Module, embed: Any, blocks: Sequence[nn.Module], head: Any) -> None:
        super().__init__()
        self.network, self.embed, self.head = network, embed, head  # network first: its names win
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = self.embed(*args, **kwargs)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass
class _Outline:
    """Where a network's blocks are; ``embed`` and ``head`` where the caller gave them."""

    stages: list[list[nn.Module]]
    embed: Any = None
    head: Any = None

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage]

    def root(self, network: nn.Module) -> nn.Module:
        return network if self.head is None else _Parts(network, self.embed, self.blocks, self.head)


class _Value(Proxy):
    """A value of the example seen by the tracer, which knows what does not depend on numbers: length, shape, dtype."""

    def __len__(self) -> int:
        return len(self.node.meta["value"])

    def __getattr__(self, k: str) -> Any:
        return _ValueAttribute(self, k)  # type: ignore[no-untyped-call]


class _ValueAttribute(_Value, Attribute):
    """An attribute or a method of one."""


class _BlockTracer(Tracer):
    """Traces a forward down to the blocks, on real inputs: a module is opened only where it contains a block.

    Each node keeps the shape of its value and the FLOPs that it cost. Questions about shapes and types (``if
    x.shape[1] == n``) are answered as for the example; one about numbers in a tensor ends the tracing, since another
    input may answer otherwise.
    """

    proxy_buffer_attributes = True  # a buffer is looked up when the path runs, and moves with the network

    def __init__(self, root: nn.Module, opened: set[int], inputs: Mapping[str, Any], by_name: bool) -> None:
        super().__init__(param_shapes_constant=True)  # type: ignore[no-untyped-call]
        self.known, self.opened, self.inputs, self.by_name = {id(m) for m in root.modules()}, opened, inputs, by_name
        self.computing = False  # a value: modules run as they are

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.computing or id(m) not in self.known:  # ``nn.ReLU()(x)``: made by the forward itself
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self.opened

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The example's inputs are placeholders; every other argument of forward keeps its default."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs]

        def run(root: nn.Module, *given: Any) -> Any:
            forward: Any = root.forward  # which may be the object's own
            out = forward(**dict(zip(self.inputs, given, strict=True))) if self.by_name else forward(*given)
            if isinstance(out, Proxy):
                return out
            found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
            if not isinstance(found, Proxy):
                raise TypeError(f"its forward returned {type(out).__name__}; a tensor, or something with 'logits'")
            return found

        return run, [self.root, *proxies]

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **named)  # type: ignore[no-untyped-call]
        if kind == "output":
            return node
        self.computing = True
        try:
            flops = count_flops(lambda: node.meta.update(value=self._value(node))).total
            node.meta["blind"] = kind == "call_module" and self._is_blind(node)
        finally:
            self.computing = False
        value = node.meta["value"]
        node.meta.update(flops=flops, shape=tuple(value.shape) if isinstance(value, Tensor) else None)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        source, value = proxy.node.all_input_nodes, proxy.node.meta["value"] if kind == "call_function" else None
        if target is operator.getitem and source[0].op == "call_module" and _is_numbers(value):
            return value  # sizes that a module gives along with its features are those of the example
        return proxy

    def _value(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
        if node.op == "placeholder":
            return self.inputs[str(node.target)]
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return (self.root.get_submodule(node.target) if isinstance(node.target, str) else node.target)(*args, **kwargs)

    def _is_blind(self, node: Node) -> bool:
        """Whether a module without weights looks at no number of its first input, as rotary embeddings do."""
        module = self.root.get_submodule(str(node.target))
        first = node.args[0].meta["value"] if node.args and isinstance(node.args[0], Node) else None
        if any(True for _ in module.parameters()) or not isinstance(first, Tensor) or not first.is_floating_point():
            return False
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
        others = [module(other, *args[1:], **kwargs) for other in (torch.randn_like(first), torch.zeros_like(first))]
        own = pytree.tree_leaves(node.meta["value"])
        return all(
            isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
            for other in others
            for a, b in zip(own, pytree.tree_leaves(other), strict=True)
        )

    def proxy(self, node: Node) -> Proxy:
        return _Value(node, self)

    def to_bool(self, obj: Any) -> bool:
        value = obj.node.meta["value"]
        if isinstance(value, Tensor):
            raise TraceError(f"it branches on the numbers in a tensor ({obj.node})")
        return bool(value)

    def iter(self, obj: Any) -> Any:
        return iter([obj[i] for i in range(len(obj.node.meta["value"]))])


class _Cut:
    """The graph of one network, and the values at its seams.

    ``exit[stage, j]`` is what leaves block j, ``entry[stage, k]`` what enters block k (the embedding's output for the
    first). Targets are named as in the network's root.
    """

    def __init__(
        self, network: nn.Module, outline: _Outline, inputs: Sequence[str], by_name: bool, x: Input, who: str
    ) -> None:
        self.who = who
        root = outline.root(network)
        names = {id(m): name for name, m in reversed(list(root.named_modules(remove_duplicate=False)))}
        opened = {id(root)}
        for block in outline.blocks:
            if id(block) not in names:
                raise ValueError(f"blocks: of {who}, a {type(block).__name__} is not a module of the network")
            path = names[id(block)].split(".")
            opened |= {id(root.get_submodule(".".join(path[:i]))) for i in range(len(path))}
        opened -= {id(b) for b in outline.blocks}
        args, kwargs = _unpacked(x)
        tracer = _BlockTracer(root, opened, dict(zip(inputs, [*args, *kwargs.values()], strict=True)), by_name)
        devices = [first_tensor(x).device] if first_tensor(x).device.type == "cuda" else []
        flags = [(m, m.training) for m in root.modules() if id(m) in opened]
        try:
            # The graph is that of the network's mode; looking at it changes no statistics and draws no random number.
            with torch.no_grad(), torch.random.fork_rng(devices), evaluating(root):
                for module, training in flags:
                    module.training = training
                self.graph = tracer.trace(root)
        except Exception as error:
            line = first_line(error)
            raise ValueError(
                f"blocks: {who} cannot be cut, since its forward around the blocks does not trace ({line}); give "
                "blocks=lambda network: (embed, list_of_blocks, head)"
            ) from error
        for node in self.graph.nodes:
            node.meta.pop("value", None)
        self._keep_constants(root, network)
        self.nodes = list(self.graph.nodes)
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.result: Node = self.nodes[-1].args[0]  # type: ignore[assignment]
        self._find_seams(root, outline, names)

    def _keep_constants(self, root: nn.Module, network: nn.Module) -> None:
        """Tensors that the forward made out of nothing become buffers of the network, so that they move with it."""
        inside = "network." if root is not network else ""
        for node in self.graph.nodes:
            if node.op == "get_attr" and "." not in node.target and node.target not in dict(root.named_parameters()):
                value = root.__dict__.get(node.target)
                if isinstance(value, Tensor):
                    delattr(root, node.target)
                    network.register_buffer(node.target, value, persistent=False)
                    node.target = inside + node.target

    def _find_seams(self, root: nn.Module, outline: _Outline, names: Mapping[int, str]) -> None:
        place = {node: i for i, node in enumerate(self.nodes)}
        by_module: dict[int, list[Node]] = {}
        # What a node's value is a function of: the input, a weight. Shapes and types count as neither.
        given, weighted = set(self.inputs), set()
        for n in self.nodes:
            if n.op == "call_module":
                module = root.get_submodule(str(n.target))
                by_module.setdefault(id(module), []).append(n)
                own = any(True for _ in module.parameters())
            else:
                own = n.op == "get_attr" and isinstance(operator.attrgetter(str(n.target))(root), nn.Parameter)
            sources = [a for a in n.all_input_nodes if not (_is_metadata(n) and a is n.args[0])]
            if any(a in given for a in sources):
                given.add(n)
            if own or any(a in weighted for a in sources):
                weighted.add(n)
        calls = []
        for block in outline.blocks:
            found = by_module.get(id(block), [])
            if len(found) != 1:
                raise ValueError(
                    f"blocks: of {self.who}, {names[id(block)]!r} runs {len(found)} times in a forward pass; exactly "
                    "once is needed"
                )
            calls.append(found[0])
        if sorted(calls, key=place.__getitem__) != calls:
            raise ValueError(f"blocks: those of {self.who} are not listed in the order in which they run")
        features = self.features = given & weighted
        last_use = {n: max((place[u] for u in n.users), default=-1) for n in features}
        live: list[list[Node]] = [[] for _ in self.nodes]
        for n in features:
            for p in range(place[n], last_use[n]):
                live[p].append(n)

        def single(positions: Iterable[int]) -> Node | None:
            """The tensor that carries everything at the first of the positions where one does."""
            for p in positions:
                if len(live[p]) == 1 and self._is_tensor(live[p][0]):
                    return live[p][0]
            return None

        self.entry: dict[tuple[int, int], Node] = {}
        self.exit: dict[tuple[int, int], Node] = {}
        where = [(s, i) for s, stage in enumerate(outline.stages) for i in range(len(stage))]
        for n, (key, node) in enumerate(zip(where, calls, strict=True)):
            before = place[calls[n - 1]] if n else 0
            after = place[calls[n + 1]] if n + 1 < len(calls) else len(self.nodes) - 1
            enters = single(range(place[node] - 1, before - 1, -1))
            if enters is None and n == 0:  # nothing with weights stands before the blocks
                enters = next(iter(node.all_input_nodes), None)
                enters = None if enters in features else enters
            leaves = single(range(place[node], after))
            if enters is None or leaves is None:
                side = "before" if enters is None else "behind"
                crossing = live[place[node] - 1] if enters is None else live[max(place[node], after - 1)]
                raise ValueError(
                    f"blocks: {self.who} cannot be cut {side} {names[id(outline.blocks[n])]!r}: "
                    f"{len(crossing)} values cross there ({', '.join(map(str, crossing[:5]))}) instead of one tensor; "
                    "give blocks=lambda network: (embed, list_of_blocks, head)"
                )
            self.entry[key], self.exit[key] = enters, leaves

    def _is_tensor(self, n: Node) -> bool:
        shape = n.meta["shape"]
        return shape is not None and len(shape) > 1

    def graft(
        self,
        into: Graph,
        env: dict[Node, Node],
        wanted: Node,
        rename: Callable[[str], str],
        entered: Node | None = None,
    ) -> Node:
        """Copy into another graph whatever ``wanted`` needs beyond the values in ``env``; return its copy.

        Where the network is entered at the value ``entered``, shapes and types of features of the same shape are
        those of that value.
        """
        needed: set[Node] = set()
        waiting = [wanted]
        while waiting:
            node = waiting.pop()
            if node in env or node in needed:
                continue
            if entered is not None and _is_metadata(node):
                of: Any = node.args[0]
                if of in self.features and of not in env and of.meta["shape"] == entered.meta["shape"]:
                    env[of] = env[entered]
            needed.add(node)
            waiting.extend(node.all_input_nodes)
        order = [node for node in self.nodes if node in needed]
        if entered is not None:
            before = set(self.nodes[: self.nodes.index(entered)])
            if left := [n for n in order if n in before and n in self.features]:
                raise ValueError(
                    f"blocks: {self.who} cannot be entered at {entered}: what follows still needs {left[-1]}, which "
                    "comes before; give blocks=lambda network: (embed, list_of_blocks, head)"
                )
        for node in order:
            copied = into.node_copy(node, env.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copied.target = rename(str(node.target))
            env[node] = copied
        return env[wanted]


# -- the seam itself --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seam:
    """Methods of a tensor to call before and after the layer, and where the channels of each side are."""

    before: tuple[tuple[Any, ...], ...]
    after: tuple[tuple[Any, ...], ...]
    axis: int  # of the channels of what goes into the layer: 1 or -1
    back_axis: int  # of the channels of what the back network takes
    front: Shape  # of the front's features, without the batch


def _rearranged(here: Shape, there: Shape) -> list[tuple[Any, ...]]:
    """Methods of a tensor with its channels last that give as many positions another arrangement."""
    if here == there:
        return []
    flat: list[tuple[Any, ...]] = [("flatten", 1, -2)] if len(here) > 1 else [] if here else [("unsqueeze", 1)]
    return flat + ([("unflatten", 1, there)] if len(there) > 1 else [] if there else [("squeeze", 1)])


def _rows(h: Tensor, axis: int) -> Tensor:
    """Features (N, ..., D) or (N, D, ...) as rows (R, D)."""
    return h.movedim(axis, -1).flatten(0, -2)


def _axis(shape: Shape, block: nn.Module, channels_last: bool | None) -> int:
    """Where the channels are in the features (N, ...) at a block: 1 or -1."""
    if len(shape) == 2:
        return -1
    if channels_last is not None:
        return -1 if channels_last else 1
    first = last = False
    for m in block.modules():
        if isinstance(m, _ConvNd):
            first |= shape[1] in (m.in_channels, m.out_channels)
        elif isinstance(m, _NormBase):
            first |= m.num_features == shape[1]
        elif isinstance(m, nn.LayerNorm | nn.RMSNorm):
            last |= m.normalized_shape[-1] == shape[-1]
        elif isinstance(m, nn.Linear):
            last |= shape[-1] in (m.in_features, m.out_features)
    # A map with squeeze-and-excitation has both kinds of layer, and so have tokens with a convolution beside.
    return (-1 if last and not first else 1) if len(shape) > 3 else (1 if first and not last else -1)


class _Body(nn.Module):
    """All that has weights. The generated code of a path runs with this as its ``self``."""

    def __init__(self, anchors: Sequence[nn.Module]) -> None:
        super().__init__()
        self.anchors = nn.ModuleList(anchors)
        self.parts = nn.ModuleDict()  # modules that ``blocks`` made around the anchors' own
        self.layers = nn.ModuleList()  # the stitching layers
        self.adapters = nn.ModuleDict()

    def forward(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(self, *args, **kwargs)


@dataclass
class _Program:
    """Generated code ``function(body, *inputs)``, and the normalisation layers that run in it."""

    function: Callable[..., Any]
    norms: dict[str, nn.Module] = field(default_factory=dict)


# -- the method -------------------------------------------------------------------------------------------------------


class StitchNet(Dynamic):
    """Several trained networks, and the stitched ones between them; a new one stands at the dearest anchor.

    Args:
        anchors: two or more networks (a sequence or an ``nn.ModuleList``) with the same inputs and outputs. They are
            wrapped, not copied, and sorted by their cost, with a warning where that changes their order.
        example: an input batch that all of them accept.
        blocks: where the blocks are, in every anchor. The name of a ``ModuleList`` or ``Sequential``; a list of names,
            the stages of hierarchical networks; a function from a network to one of these or to
            ``(embed, blocks, head)``, blocks being a list of modules or a list of such lists; None finds the lists of
            repeated blocks by themselves.
        window: K, consecutive blocks in a window of the paired space.
        stride: s, blocks from one window to the next.
        direction: "fast-to-slow" (the paper's), "slow-to-fast" or "both".
        nearest: stitch only networks that are neighbours in cost. False adds the other pairs and chains of three.
        order: of the ids of hierarchical networks: "pairs" of networks one after the other, or "stages", all pairs of
            the first stage before those of the second, as published checkpoints have them. Layers are numbered alike.
        stages: which stages of hierarchical networks are stitched: "all", "swin" (without the last), "resnet"
            (without the first and the last) or a list of numbers.
        repeats: keep paired stitches with k <= j; by default as in the paper, in flat networks and not in stages.
        stitches: the seams to use in place of those rules, as (front, back, j, k) or (front, back, stage, j, k), each
            with a layer of its own; networks are numbered from the cheapest.
        adapter: for seams where token counts or spatial sizes differ: "resize", or a function from the two shapes
            (without the batch) to a module that gives the front's features the back's positions.
        channels_last: whether maps have their channels last, for all anchors or one by one; guessed by default.
        train_anchors: train the anchors along with the stitching layers; False freezes them; patterns of parameter
            names (fnmatch) freeze all others. What is frozen stays in evaluation mode.
        anchor_lr_scale: learning rate of the anchors as a share of the layers' (Swin in the paper: 0.1).
        teacher: a network whose predictions are learned as well; it is not saved.
        teacher_weight: t in the loss above.
        distillation: the teacher's "hard" predictions (classes), or its "soft" ones (probabilities).
        calibration_batches: batches that ``finish`` estimates BatchNorm statistics on.
        seed: of the layers' random start and of the sampler. Draw number n is a function of (seed, n), so
            that all ranks of a parallel run draw alike.
        criterion: ``criterion(output, target)``; cross entropy by default.

    Shapes: the anchors' inputs, and their prediction tensor (N, C, ...).

    Raises:
        TypeError: ``anchors`` is no sequence of networks.
        ValueError: an argument is out of range, the anchors do not fit each other, or one cannot be cut.
    """

    draws: Tensor
    initialized: Tensor

    def __init__(
        self,
        anchors: Sequence[nn.Module] | nn.ModuleList,
        example: Input,
        *,
        blocks: Blocks = None,
        window: int = 2,
        stride: int = 1,
        direction: Literal["fast-to-slow", "slow-to-fast", "both"] = "fast-to-slow",
        nearest: bool = True,
        order: Literal["pairs", "stages"] = "pairs",
        stages: Literal["all", "swin", "resnet"] | Sequence[int] = "all",
        repeats: bool | None = None,
        stitches: Sequence[Sequence[int]] | None = None,
        adapter: Adapter | Literal["resize"] | None = None,
        channels_last: bool | Sequence[bool] | None = None,
        train_anchors: bool | Sequence[str] = True,
        anchor_lr_scale: float = 1.0,
        teacher: nn.Module | None = None,
        teacher_weight: float = 0.5,
        distillation: Literal["hard", "soft"] = "hard",
        calibration_batches: int = 16,
        seed: int = 0,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__()
        if not (blocks is None or isinstance(blocks, str) or callable(blocks)):
            check.names("blocks", blocks, empty=False)
        check.whole("window", window, at_least=1)
        check.whole("stride", stride, at_least=1)
        check.choice("direction", direction, ("fast-to-slow", "slow-to-fast", "both"))
        check.boolean("nearest", nearest)
        check.choice("order", order, ("pairs", "stages"))
        if not isinstance(stages, str):
            check.sequence("stages", stages, lambda n, v: check.whole(n, v, at_least=0))
        check.optional(check.boolean, "repeats", repeats)
        check.optional(check.sequence, "stitches", stitches, _check_seam)
        if adapter is not None and adapter != "resize" and not callable(adapter):
            raise check.wrong("adapter", adapter, "'resize', or a function from two shapes to a module", TypeError)
        if not isinstance(channels_last, bool):
            check.optional(check.sequence, "channels_last", channels_last, check.boolean)
        if not isinstance(train_anchors, bool):
            check.names("train_anchors", train_anchors)
        check.positive("anchor_lr_scale", anchor_lr_scale)
        check.optional(check.module, "teacher", teacher)
        check.share("teacher_weight", teacher_weight)
        check.choice("distillation", distillation, ("hard", "soft"))
        check.whole("calibration_batches", calibration_batches, at_least=1)
        check.seed("seed", seed)
        check.optional(check.function, "criterion", criterion)
        networks = _sequence_of_networks(anchors)
        if channels_last is None or isinstance(channels_last, bool):
            last: list[bool | None] = [channels_last] * len(networks)
        elif len(channels_last) == len(networks):
            last = list(channels_last)
        else:
            raise ValueError(f"channels_last: {len(channels_last)} values for {len(networks)} anchors")
        ranks = _by_cost(networks, example)
        networks, self._channels_last = [networks[i] for i in ranks], [last[i] for i in ranks]
        self.blocks, self.window, self.stride, self.direction, self.nearest = blocks, window, stride, direction, nearest
        self.order, self.distillation = order, distillation
        self.stages = stages if isinstance(stages, str) else [int(s) for s in stages]
        self.repeats, self.adapter, self.channels_last = repeats, adapter, channels_last
        self.stitches = None if stitches is None else [[int(v) for v in s] for s in stitches]
        self.train_anchors = train_anchors if isinstance(train_anchors, bool) else list(train_anchors)
        self.anchor_lr_scale, self.teacher_weight = float(anchor_lr_scale), float(teacher_weight)
        self.calibration_batches, self.seed, self.criterion = calibration_batches, seed, criterion
        self.example = example
        self._warned = False
        self._teacher = (teacher,)  # in a tuple: its weights are no part of this network
        self.body = _Body(networks)
        self._inputs = (
            list(example) if isinstance(example, Mapping)
            else ["x"] if isinstance(example, Tensor) else [f"x{i}" for i in range(len(example))]
        )  # fmt: skip
        self._outlines = [self._outline(m) for m in range(len(networks))]
        self._cuts: dict[tuple[int, bool], _Cut] = {}
        self._programs: dict[Any, _Program] = {}
        self._one_at_a_time = threading.RLock()
        with evaluating(self.body):
            self.configurations = self._enumerate()
            self._seams: dict[int, _Seam] = {}
            layer_flops = self._make_layers()
            self._costs = [self._cost(c, layer_flops) for c in self.configurations]
        ids = sorted(range(len(self.configurations)), key=lambda i: (self._costs[i]["flops"], i))
        self._by_id = [Point(stitch=i) for i in range(len(self.configurations))]
        self._points = [self._by_id[i] for i in ids]
        self._at = {p: p for p in self._points}
        self.norms = NormTable(self.body, self._by_id)
        self._norm_names = {id(self.body.get_submodule(name)): name for name in self.norms.columns}
        for m in range(len(networks)):
            self.norms.trust(self._by_id[m])
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.point = self._by_id[len(networks) - 1]
        self._check_paths()
        self._freeze()

    # -- construction -------------------------------------------------------------------------------------------

    @property
    def anchors(self) -> nn.ModuleList:
        """The networks, from the cheapest to the dearest."""
        return self.body.anchors

    @property
    def layers(self) -> nn.ModuleList:
        """The stitching layers."""
        return self.body.layers

    @property
    def teacher(self) -> nn.Module | None:
        """The network whose predictions are learned as well."""
        return self._teacher[0]

    def _outline(self, m: int) -> _Outline:
        """The blocks of anchor m, stage by stage."""
        network = self.body.anchors[m]
        who = _who(m, network)
        try:
            found = self.blocks(network) if callable(self.blocks) else self.blocks
        except Exception as error:  # a function of the caller's own may raise anything
            raise ValueError(f"blocks: called with {who} it raised {first_line(error)}") from error
        if found is None:
            names = list(find_stacks(network, self.example))
            if not names:
                raise ValueError(
                    f"blocks: {who} has no list of repeated blocks; name one, blocks='layers', or give "
                    "blocks=lambda network: (embed, list_of_blocks, head)"
                )
            found = names
        if isinstance(found, str):
            found = [found]
        if isinstance(found, list | tuple) and found and all(isinstance(name, str) for name in found):
            return _Outline([_children(network, name, who) for name in found])
        taken_apart = isinstance(found, tuple) and len(found) == 3 and isinstance(found[1], Iterable)
        if not (taken_apart and callable(found[0]) and callable(found[2])):
            raise ValueError(
                f"blocks: gave {found!r:.200} for {who}; allowed: a name, a list of names, or a tuple "
                "(embed, list_of_blocks, head)"
            )
        embed: Any = found[0]
        listed: Any = list(found[1])
        head: Any = found[2]
        nested = any(isinstance(stage, list | tuple | nn.ModuleList) for stage in listed)
        outline = _Outline([list(stage) for stage in (listed if nested else [listed])], embed, head)
        if not outline.blocks or not all(isinstance(b, nn.Module) for b in outline.blocks):
            raise ValueError(f"blocks: of {who}, expected a list of modules, got {listed!r:.200}")
        parts = nn.ModuleDict({"blocks": nn.ModuleList(outline.blocks)})
        parts.update({n: v for n, v in (("embed", embed), ("head", head)) if isinstance(v, nn.Module)})
        own = {id(p) for p in network.parameters()}
        if strange := [name for name, p in parts.named_parameters() if id(p) not in own]:
            raise ValueError(f"blocks: gave {who} the parameter {strange[0]!r}, which is not one of the network's own")
        self.body.parts[str(m)] = parts
        return outline

    def _cut(self, m: int) -> _Cut:
        """The graph of anchor m in its present mode, traced when it is first needed."""
        network = self.body.anchors[m]
        key = m, network.training
        if key not in self._cuts:
            x = to_device(take(self.example, slice(0, 2)), device_of(self.body))
            by_name, who = isinstance(x, Mapping), _who(m, network)
            self._cuts[key] = _Cut(network, self._outlines[m], self._inputs, by_name, x, who)
        return self._cuts[key]

    def _enumerate(self) -> tuple[Configuration, ...]:
        """All paths in the order of their ids."""
        count = len(self.body.anchors)
        depths = [[len(stage) for stage in outline.stages] for outline in self._outlines]
        if len({len(d) for d in depths}) > 1:
            raise ValueError(f"blocks: the anchors have {[len(d) for d in depths]} stages; the same number is needed")
        found = [Configuration(m, (m,)) for m in range(count)]
        if self.stitches is not None:
            for layer, given in enumerate(self.stitches):
                found.append(self._given(given, layer, depths, len(found)))
            return tuple(found)
        up = [pair for pair in itertools.combinations(range(count), 2) if not self.nearest or pair[1] == pair[0] + 1]
        if not self.nearest:  # the ids of the nearest rule come first
            up.sort(key=lambda pair: (pair[1] - pair[0] > 1, pair))
        ways = {"fast-to-slow": [up], "slow-to-fast": [[(b, a) for a, b in up]]}
        ways["both"] = ways["fast-to-slow"] + ways["slow-to-fast"]
        chosen, layer = self._chosen_stages(len(depths[0])), 0
        for pairs in ways[self.direction]:
            seams: dict[tuple[int, int], list[Stitch]] = {pair: [] for pair in pairs}
            places = [(pair, s) for pair in pairs for s in chosen]
            if self.order == "stages":
                places.sort(key=lambda place: place[1])
            for (a, b), s in places:
                stitches = self._stage(depths[a][s], depths[b][s], hierarchical=len(depths[0]) > 1)
                fresh = [Stitch(a, b, s, j, k, layer + n) for j, k, n in stitches]
                layer += len({n for _, _, n in stitches})
                seams[a, b] += fresh
                found += [Configuration(len(found) + n, (a, b), (seam,)) for n, seam in enumerate(fresh)]
            for (a, b), between in seams.items():
                if not between:
                    raise ValueError(
                        f"blocks: anchors {a} and {b} have no stitch between them, with {depths[a]} and {depths[b]} "
                        f"blocks in the stages {chosen} that are stitched"
                    )
            if not self.nearest:
                for (a, b), (c, d) in itertools.product(seams, seams):
                    if b == c:
                        for one, two in itertools.product(seams[a, b], seams[c, d]):
                            if (two.stage, two.j) >= (one.stage, one.k):
                                found.append(Configuration(len(found), (a, b, d), (one, two)))
        return tuple(found)

    def _stage(self, front: int, back: int, *, hierarchical: bool) -> list[tuple[int, int, int]]:
        if front != back:
            found = unpaired(front, back)
            if hierarchical:  # the first block of a stage may change the resolution; its features fit no other block's
                found = [stitch for stitch in found if stitch[1] > 0]
                layers = {layer: n for n, layer in enumerate(sorted({layer for _, _, layer in found}))}
                found = [(j, k, layers[layer]) for j, k, layer in found]
            return found
        repeats = not hierarchical if self.repeats is None else self.repeats
        return paired(front, self.window, self.stride, repeats)

    def _chosen_stages(self, count: int) -> list[int]:
        named = {"all": range(count), "swin": range(count - 1), "resnet": range(1, count - 1)}
        if isinstance(self.stages, str):
            if self.stages not in named:
                raise ValueError(f"stages: {self.stages!r} is not one of 'all', 'swin', 'resnet', or a list of numbers")
            chosen = list(named[self.stages])
        else:
            chosen = sorted(set(self.stages))
        if not chosen or chosen[0] < 0 or chosen[-1] >= count:
            raise ValueError(
                f"stages: {self.stages} leaves {chosen} of the anchors' {count} stages; allowed: 0..{count - 1}"
            )
        return chosen

    def _given(self, given: Sequence[int], layer: int, depths: Sequence[Sequence[int]], number: int) -> Configuration:
        """A seam that the caller listed, checked."""
        a, b, s, j, k = given if len(given) == 5 else (*given[:2], 0, *given[2:])
        if not (0 <= a < len(depths) and 0 <= b < len(depths)) or a == b:
            raise ValueError(f"stitches: {tuple(given)} must name two different anchors of 0..{len(depths) - 1}")
        if not 0 <= s < len(depths[0]):
            raise ValueError(f"stitches: {tuple(given)} names stage {s}; the anchors have 0..{len(depths[0]) - 1}")
        for name, m, block in (("j", a, j), ("k", b, k)):
            if not 0 <= block < depths[m][s]:
                raise ValueError(
                    f"stitches: {tuple(given)} has {name}={block}, but the blocks of anchor {m} there are "
                    f"0..{depths[m][s] - 1}"
                )
        return Configuration(number, (a, b), (Stitch(a, b, s, j, k, layer),))

    def _make_layers(self) -> dict[int, int]:
        """One stitching layer for each number; returns the FLOPs of each per sample."""
        seams: dict[int, list[Stitch]] = {}
        for c in self.configurations:
            for stitch in c.stitches if len(c.stitches) == 1 else ():
                seams.setdefault(stitch.layer, []).append(stitch)
        flops: dict[int, int] = {}
        device = device_of(self.body)
        dtype = next((p.dtype for p in self.body.parameters() if p.is_floating_point()), torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # and no GPU's
            for layer in sorted(seams):
                shapes = {self._shapes(s) for s in seams[layer]}
                if len(shapes) > 1:
                    s = seams[layer][0]
                    raise ValueError(
                        f"blocks: the features of anchors {s.front} and {s.back} have several shapes in one stack, "
                        f"{sorted(shapes)[:2]}; name the stages one by one: blocks=['layer1', 'layer2']"
                    )
                seam, module, adapter = self._seam(seams[layer][0], shapes.pop())
                self._seams[layer] = seam
                self.body.layers.append(module.to(device, dtype))
                if adapter is not None:
                    self.body.adapters[str(layer)] = adapter.to(device, dtype)
                h = torch.zeros(1, *seam.front, dtype=dtype, device=device)
                flops[layer] = count_flops(lambda h=h, n=layer: self.body.layers[n](self._prepared(h, n))).total  # type: ignore[misc]
        return flops

    def _shapes(self, s: Stitch) -> tuple[Shape, Shape]:
        """The features (without the batch) that leave the front and that enter the back."""
        out = self._cut(s.front).exit[s.stage, s.j].meta["shape"]
        into = self._cut(s.back).entry[s.stage, s.k].meta["shape"]
        return out[1:], into[1:]

    def _seam(self, s: Stitch, shapes: tuple[Shape, Shape]) -> tuple[_Seam, nn.Module, nn.Module | None]:
        """How features of the first shape become features of the second: steps, the layer, the adapter."""
        front, back = shapes
        sides = (s.front, s.j, front), (s.back, s.k, back)
        a, b = (
            _axis((1, *shape), self._outlines[m].stages[s.stage][block], self._channels_last[m])
            for m, block, shape in sides
        )
        before: list[tuple[Any, ...]] = []
        adapter: nn.Module | None = None
        d_in, d_out = front[0 if a == 1 else -1], back[0 if b == 1 else -1]
        here, there = _positions(front, a), _positions(back, b)
        if math.prod(here) != math.prod(there) or (len(here) == len(there) and here != there):
            if self.adapter is None or (self.adapter == "resize" and len(here) != len(there)):
                raise ValueError(
                    f"anchors: after block {s.j} of anchor {s.front} (stage {s.stage}) the features have shape "
                    f"{front}, before block {s.k} of anchor {s.back} {back}; their {here} and {there} positions "
                    "differ. Give channels_last= where their channels were taken for positions, "
                    f"adapter='resize', or adapter=lambda front, back: module, which gives features of the "
                    "first shape the positions of the second"
                )
            if self.adapter == "resize":
                if a != 1:
                    before.append(("movedim", -1, 1))
                small = all(t <= h for h, t in zip(here, there, strict=True))
                adapter = (
                    _POOL[len(there)](there) if small
                    else nn.Upsample(there, mode=_SMOOTH[len(there)], align_corners=False)
                )  # fmt: skip
                a, here = 1, there
            else:
                assert callable(self.adapter)
                adapter = self.adapter(front, back)
                if not isinstance(adapter, nn.Module):
                    raise TypeError(f"adapter: gave a {type(adapter).__name__}; an nn.Module is needed")
                with torch.no_grad(), evaluating(adapter):
                    shape = tuple(adapter(torch.zeros(1, *front)).shape[1:])
                d_in, here = shape[0 if a == 1 else -1], _positions(shape, a)
                if here != there:
                    raise ValueError(f"adapter: it gives shape {shape} for {front}, which does not fit {back}")
        steps: list[tuple[Any, ...]] = [("adapter",)] if adapter is not None else []
        convolution = a == 1 and b == 1 and here == there
        after: list[tuple[Any, ...]] = []
        if not convolution:
            if a == 1:
                steps.append(("movedim", 1, -1))
            steps += _rearranged(here, there)
            if b == 1:
                after.append(("movedim", -1, 1))
            a = -1
        layer = _CONV[len(there)](d_in, d_out, 1) if convolution else nn.Linear(d_in, d_out)
        return _Seam((*before, *steps), tuple(after), a, b, front), layer, adapter

    def _prepared(self, h: Tensor, layer: int) -> Tensor:
        """What goes into a stitching layer."""
        for name, *args in self._seams[layer].before:
            h = self.body.adapters[str(layer)](h) if name == "adapter" else getattr(h, name)(*args)
        return h

    def _cost(self, c: Configuration, layer_flops: Mapping[int, int]) -> dict[str, int]:
        """FLOPs per sample: the sum over the nodes of the path; parameters: those that it reaches."""
        graph = self._graph(c, _body_names)
        rows = min(rows_of(self.example), 2)
        flops = round(sum(n.meta.get("flops", 0) for n in graph.nodes) / rows)
        flops += sum(layer_flops[s.layer] for s in c.stitches)
        held: dict[int, int] = {}
        for n in graph.nodes:
            if n.op in ("call_module", "get_attr"):
                value = operator.attrgetter(str(n.target))(self.body)
                for p in value.parameters() if isinstance(value, nn.Module) else (value,):
                    if isinstance(p, nn.Parameter):
                        held[id(p)] = p.numel()
        return {"flops": flops, "parameters": sum(held.values())}

    def _check_paths(self) -> None:
        """Every anchor, run by its graph, must say what it says itself."""
        rows = torch.arange(3, device=first_tensor(self.example).device) % rows_of(self.example)
        with evaluating(self.body), torch.no_grad():
            for m, network in enumerate(self.body.anchors):
                for x in (self.example, take(self.example, rows)):  # a number of rows that tracing has not seen
                    own, why = logits(call(network, x)), "its output differs"
                    try:
                        if torch.equal(own, self._run(self._by_id[m], x)):
                            continue
                    except (RuntimeError, TypeError, ValueError, IndexError) as error:
                        why = str(error).strip().splitlines()[0]
                    raise ValueError(
                        f"blocks: {_who(m, network)} answers otherwise when it is taken apart ({why}); its forward "
                        "around the blocks may work in place (x.add_(y)), or depend on the number of rows. Give "
                        "blocks=lambda network: (embed, list_of_blocks, head)"
                    )

    def _freeze(self) -> None:
        if self.train_anchors is True:
            return
        names = [name for name, _ in self.body.anchors.named_parameters()]
        patterns = [] if self.train_anchors is False else self.train_anchors
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"train_anchors: no parameter of the anchors is named {pattern!r}")
        for name, p in self.body.anchors.named_parameters():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                p.requires_grad_(False)

    # -- the contract -------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """One for each path, ``stitch=id``, from the smallest cost to the largest."""
        return list(self._points)

    def use(self, point: Mapping[str, Value]) -> Self:
        """Turn the dial to a path; nothing is moved or copied."""
        known = self._at.get(point) if isinstance(point, Point) else None
        self.point = self._known(point) if known is None else known
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The prediction (N, C, ...) of the path in use, in training mode as well.

        Raises:
            RuntimeError: in evaluation mode, the normalisation statistics of this path are stale.
        """
        if not self.training:
            self.norms.check(self.point)
        return self._run(self.point, packed(args, kwargs))

    def loss(self, batch: Batch) -> Tensor:
        """The objective of the module's docstring (a scalar) at a path drawn anew; in evaluation mode at ``point``."""
        draws = self.draws.clone()
        try:
            return self._loss(batch)
        except BaseException:  # the next call draws the same path again
            self.draws.copy_(draws)
            raise

    def _loss(self, batch: Batch) -> Tensor:
        x, y = split_batch(batch)
        if self.training:
            if not self._warned and self.configurations[-1].stitches and not self.initialized:
                warnings.warn(
                    "StitchNet: the stitching layers are still random; net.initialize(train) before training starts "
                    "them at their least-squares solutions",
                    stacklevel=2,
                )
                self._warned = True
            self._move()
        output = self._run(self.draw() if self.training else self.point, x)
        value = loss(output, y, self.criterion)
        if self.teacher is not None and self.teacher_weight:
            teacher = self.teacher.to(device_of(self))
            with torch.no_grad(), evaluating(teacher):
                told = call(teacher, x)
            if self.distillation == "soft":
                imitation = soft_distillation(output, told, y, criterion=self.criterion)
            else:
                imitation = hard_distillation(output, told, y, self.criterion)
            value = (1 - self.teacher_weight) * value + self.teacher_weight * imitation
        return value

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The network of a path: a ``GraphModule`` of copies of the anchors' modules and of the layer, and no more.

        Its children are ``anchor0``, ``anchor1``, ... (what runs of each) and ``stitch0`` (``stitch1`` in chains).

        Raises:
            RuntimeError: the normalisation statistics of this path are stale.
            ValueError: ``point`` is not one of ``points()``.
        """
        known = self._known(point)
        self.norms.check(known)
        c = self.configurations[int(known["stitch"])]
        number = {s.layer: n for n, s in enumerate(c.stitches)}
        root = nn.Module()
        for m in c.anchors:
            root.add_module(f"anchor{m}", self.body.anchors[m])
            if str(m) in self.body.parts:
                root.add_module(f"parts{m}", self.body.parts[str(m)])
        for layer, n in number.items():
            root.add_module(f"stitch{n}", self.body.layers[layer])
            if str(layer) in self.body.adapters:
                root.add_module(f"adapter{n}", self.body.adapters[str(layer)])

        def rename(kind: str, index: int, rest: str) -> str:
            index = number[index] if kind in ("layers", "adapters") else index
            start = {"anchors": "anchor", "parts": "parts", "layers": "stitch", "adapters": "adapter"}[kind]
            return f"{start}{index}.{rest}" if rest else f"{start}{index}"

        with evaluating(self.body):
            graph = self._graph(c, rename)
        for n in graph.nodes:
            n.meta = {}
        plain = GraphModule(root, graph, "Stitched" if c.stitches else "Anchor")
        rows = {name: (self._norm_names[id(m)], m) for name, m in plain.named_modules() if id(m) in self._norm_names}
        copied = copy.deepcopy(plain)
        for name, (full, module) in rows.items():
            for buffer, t in self.norms.tensors(known, {full: module}).items():
                copied.get_submodule(name)._buffers[buffer.rpartition(".")[2]] = t.detach().clone()
        return copied.eval()

    def finish(self, train: Iterable[Batch]) -> None:
        """Estimate the normalisation statistics of every path anew."""
        if self.norms:
            self.calibrate(train, batches=self.calibration_batches)

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The stitching layers, and the anchors with their share of the learning rate."""
        anchors = [p for p in self.body.anchors.parameters() if p.requires_grad]
        held = {id(p) for p in anchors}
        fresh = [p for p in self.parameters() if p.requires_grad and id(p) not in held]
        groups = [
            {"params": fresh, "weight_decay": weight_decay},
            {"params": anchors, "weight_decay": weight_decay, "lr_scale": self.anchor_lr_scale},
        ]
        return [g for g in groups if g["params"]]

    def train(self, mode: bool = True) -> Self:
        """Training mode; anchors that are frozen stay in evaluation mode."""
        super().train(mode)
        if mode and self.train_anchors is not True:
            self.body.anchors.eval()
            self.body.parts.eval()
        return self

    # -- training -----------------------------------------------------------------------------------------------

    def draw(self) -> Point:
        """The next path, each with the same probability. Draw number n is a function of (seed, n).

        Anchors are among them, unless they are frozen: a step on one would change nothing.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.draws))
        self.draws += 1
        first = len(self.body.anchors) if self.train_anchors is False else 0
        return self._by_id[int(torch.randint(first, len(self._by_id), (), generator=generator))]

    def _move(self) -> None:
        """A step will change the weights, so that the statistics are no longer theirs."""
        if self.norms:
            self.norms.stale()
            if self.train_anchors is False:
                for m in range(len(self.body.anchors)):
                    self.norms.trust(self._by_id[m])

    @torch.no_grad()
    def initialize(
        self, data: Iterable[Any] | Input, *, images: int = 500, ridge: float = 0.0, recalibrate: bool = True
    ) -> Self:
        """Set every stitching layer to its least-squares solution W = pinv(X) Y and return self.

        Args:
            data: batches, or one input; plain images, not mixed ones.
            images: how many samples to use (the reference code: 100). Their rows must exceed the width.
            ridge: share of the mean diagonal of X'X that is added to it; see ``NormalEquations.solve``.
            recalibrate: estimate the BatchNorm statistics of the stitched paths on the same data; False keeps those
                that the anchors came with.

        Raises:
            ValueError: ``data`` is empty or has too few rows, or a feature is NaN or infinite.
        """
        if images < 1:
            raise ValueError(f"images: {images} is not a positive number")
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"ridge: {ridge} is not allowed; a finite number of 0 or more")
        seams = sorted({s for c in self.configurations for s in c.stitches}, key=lambda s: (s.layer, s.stage, s.j, s.k))
        if not seams:
            return self
        device = device_of(self.body)
        systems: dict[tuple[Any, ...], NormalEquations] = {}
        taken: list[Any] = []
        amp = torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()
        with evaluating(self.body), amp:
            left = images
            for x in inputs_of(data):
                x = to_device(take(x, slice(0, left)), device)
                left -= rows_of(x)
                taken.append(x)
                self._accumulate(x, seams, systems)
                if left <= 0:
                    break
            if not taken:
                raise ValueError("data: it has no batches to initialise on")
            found: dict[int, list[tuple[Tensor, Tensor]]] = {}
            for s in seams:
                found.setdefault(s.layer, []).append(systems[self._front_key(s)].solve(s, ridge))
            for number, solutions in found.items():
                layer: Any = self.body.layers[number]
                weight = torch.stack([w for w, _ in solutions]).mean(0)
                layer.weight.copy_(weight.view_as(layer.weight))
                layer.bias.copy_(torch.stack([b for _, b in solutions]).mean(0))
        self.initialized.fill_(True)
        if self.norms:
            stitched = self._by_id[len(self.body.anchors) :]
            if recalibrate:
                self.calibrate([(x, None) for x in taken], batches=len(taken), points=stitched)
            else:
                for point in stitched:
                    self.norms.trust(point)
        return self

    def _front_key(self, s: Stitch) -> tuple[Any, ...]:
        """Seams with the same key have the same X."""
        adapted = s.layer if str(s.layer) in self.body.adapters else -1
        return s.front, s.stage, s.j, self._seams[s.layer].before, adapted

    def _accumulate(self, x: Input, seams: Sequence[Stitch], systems: dict[tuple[Any, ...], NormalEquations]) -> None:
        """Add the features of one batch to the normal equations of all seams."""
        features: dict[tuple[int, str, int, int], Tensor] = {}
        for m in range(len(self.body.anchors)):
            wanted = {("exit", s.stage, s.j) for s in seams if s.front == m}
            wanted |= {("entry", s.stage, s.k) for s in seams if s.back == m}
            if wanted:
                features |= {(m, *tap): h for tap, h in self._features(m, sorted(wanted), x).items()}
        for (m, side, stage, i), h in features.items():
            if not torch.isfinite(h).all():
                block = f"{'after' if side == 'exit' else 'before'} block {i}"
                raise ValueError(f"data: the features of anchor {m} {block} (stage {stage}) contain NaN or infinity")
        groups: dict[tuple[Any, ...], list[Stitch]] = {}
        for s in seams:
            groups.setdefault(self._front_key(s), []).append(s)
        for key, group in groups.items():
            s = group[0]
            rows = _rows(self._prepared(features[s.front, "exit", s.stage, s.j], s.layer), self._seams[s.layer].axis)
            targets = {s: _rows(features[s.back, "entry", s.stage, s.k], self._seams[s.layer].back_axis) for s in group}
            systems.setdefault(key, NormalEquations()).add(_wide(rows), {s: _wide(y) for s, y in targets.items()})

    def _features(self, m: int, taps: Sequence[tuple[str, int, int]], x: Input) -> dict[tuple[str, int, int], Tensor]:
        """What leaves and enters blocks of anchor m in one run of it: ("exit" or "entry", stage, block) -> features."""
        cut = self._cut(m)
        nodes = {tap: (cut.exit if tap[0] == "exit" else cut.entry)[tap[1:]] for tap in taps}
        key = "taps", m, tuple(taps)
        if key not in self._programs:
            graph = Graph()
            env = dict(zip(cut.inputs, map(graph.placeholder, self._inputs), strict=True))
            place = {n: i for i, n in enumerate(cut.nodes)}
            copies: dict[Node, Node] = {}
            for node in sorted(set(nodes.values()), key=place.__getitem__):
                # A copy at once: the next block may work in place on what it is given.
                inner = cut.graft(graph, env, node, lambda t: self._named(m, t, _body_names))
                copies[node] = graph.call_method("clone", (inner,))
            graph.output(tuple(copies[nodes[tap]] for tap in taps))
            self._programs[key] = self._compile(graph)
        return dict(zip(taps, self._execute(self._programs[key], self._by_id[m], x), strict=True))

    @torch.no_grad()
    def calibrate(
        self,
        data: Iterable[Any] | Input,
        *,
        batches: int = 16,
        points: Sequence[Mapping[str, Value]] | None = None,
    ) -> None:
        """Estimate the BatchNorm statistics of paths on ``batches`` batches; of all paths, but for frozen anchors.

        Raises:
            ValueError: ``data`` has no batches.
        """
        if not self.norms:
            return
        taken = batches_of(data, batches, device_of(self.body))
        first = len(self.body.anchors) if self.train_anchors is False else 0
        chosen = self._by_id[first:] if points is None else [self._known(p) for p in points]
        with evaluating(self.body):
            for point in chosen:
                program = self._program(point)

                def run(x: Any, tensors: Mapping[str, Tensor], program: _Program = program) -> Any:
                    here = {n: t for n, t in tensors.items() if n.rpartition(".")[0] in program.norms}
                    return functional_call(self.body, here, (program.function, *_unpacked(x)), tie_weights=False)

                self.norms.estimate(point, self.body, run, taken)

    # -- running ------------------------------------------------------------------------------------------------

    def _named(self, m: int, target: str, names: Callable[[str, int, str], str]) -> str:
        """The name in the body of what anchor m's graph calls ``target``."""
        if self._outlines[m].head is None:
            return names("anchors", m, target)
        if target.startswith("network."):
            return names("anchors", m, target.removeprefix("network."))
        return names("parts", m, target)

    def _graph(self, c: Configuration, names: Callable[[str, int, str], str]) -> Graph:
        """The path as one graph: what each network has to compute, and the layers between."""
        graph = Graph()
        inputs = [graph.placeholder(name) for name in self._inputs]
        h: Node | None = None
        for n, m in enumerate(c.anchors):
            cut = self._cut(m)
            env: dict[Node, Node] = dict(zip(cut.inputs, inputs, strict=True))
            entered: Node | None = None
            if n:
                assert h is not None
                entered = cut.entry[c.stitches[n - 1].stage, c.stitches[n - 1].k]
                env[entered] = h
            last = n == len(c.stitches)
            wanted = cut.result if last else cut.exit[c.stitches[n].stage, c.stitches[n].j]
            h = cut.graft(graph, env, wanted, lambda target, m=m: self._named(m, target, names), entered)  # type: ignore[misc]
            if last:
                continue
            layer = c.stitches[n].layer
            seam = self._seams[layer]
            for name, *args in seam.before:
                if name == "adapter":
                    h = graph.create_node("call_module", names("adapters", layer, ""), (h,), {})
                else:
                    h = graph.call_method(name, (h, *args))
            h = graph.create_node("call_module", names("layers", layer, ""), (h,), {})
            for name, *args in seam.after:
                h = graph.call_method(name, (h, *args))
        graph.output(h)
        return graph

    def _compile(self, graph: Graph) -> _Program:
        """Python code that runs the graph on the body's own modules."""
        module = GraphModule(self.body, graph)
        norms = {self._norm_names[id(m)]: m for m in module.modules() if id(m) in self._norm_names}
        return _Program(type(module).forward, norms)

    def _program(self, point: Point) -> _Program:
        c = self.configurations[int(point["stitch"])]
        key = c.id, tuple(self.body.anchors[m].training for m in c.anchors)
        if key not in self._programs:
            self._programs[key] = self._compile(self._graph(c, _body_names))
        return self._programs[key]

    def _run(self, point: Point, x: Input) -> Tensor:
        # Tracing looks at every module that runs meanwhile, and statistics take the places of the body's own for one
        # run; other threads wait for both.
        with self._one_at_a_time:
            program = self._program(point)
            if program.norms:
                return self._execute(program, point, x)  # type: ignore[no-any-return]
        return self._execute(program, point, x)  # type: ignore[no-any-return]

    def _execute(self, program: _Program, point: Point, x: Input) -> Any:
        args, kwargs = _unpacked(x)
        if not program.norms:
            return program.function(self.body, *args, **kwargs)
        tensors = self.norms.tensors(point, program.norms)
        return functional_call(self.body, tensors, (program.function, args, kwargs), tie_weights=False)

    # -- choosing -----------------------------------------------------------------------------------------------

    def find(self, front: int, back: int, j: int, k: int, stage: int = 0) -> Point:
        """The point of the path that leaves ``front`` after block j and enters ``back`` at block k.

        Raises:
            ValueError: there is no such path.
        """
        for c in self.configurations:
            if len(c.stitches) == 1:
                s = c.stitches[0]
                if (s.front, s.back, s.stage, s.j, s.k) == (front, back, stage, j, k):
                    return self._by_id[c.id]
        raise ValueError(
            f"stitch: no path leaves anchor {front} after block {j} for block {k} of anchor {back} (stage {stage})"
        )

    def costs(self) -> dict[Point, dict[str, int]]:
        """FLOPs per sample (2 per multiply-add, for inputs of the example's size) and parameters of every path."""
        return {p: dict(self._costs[int(p["stitch"])]) for p in self._points}

    def __getstate__(self) -> dict[str, Any]:
        """Without the traced graphs and generated code, which are made again when they are needed, and the lock."""
        return {k: v for k, v in self.__dict__.items() if k != "_one_at_a_time"} | {"_cuts": {}, "_programs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._one_at_a_time = threading.RLock()
        self._norm_names = {id(self.body.get_submodule(name)): name for name in self.norms.columns}

    def extra_repr(self) -> str:
        """How many paths there are, and where the dial stands."""
        count = len(self.configurations)
        return f"{len(self.body.anchors)} anchors, {count} paths, {len(self.body.layers)} layers, at={self.point}"


# -- small things -----------------------------------------------------------------------------------------------------


def _check_seam(name: str, seam: Any) -> tuple[int, ...]:
    """(front, back, j, k) or (front, back, stage, j, k)."""
    found = check.sequence(name, seam, lambda n, v: check.whole(n, v, at_least=-check.LARGEST))
    if len(found) not in (4, 5):
        raise check.wrong(name, seam, "(front, back, j, k) or (front, back, stage, j, k)")
    return found


def _body_names(kind: str, index: int, rest: str) -> str:
    return f"{kind}.{index}.{rest}" if rest else f"{kind}.{index}"


def _is_metadata(n: Node) -> bool:
    """Whether a node asks its first input for nothing but shape, type and place."""
    if n.meta.get("blind"):
        return True
    if n.op == "call_method":
        return n.target in ("size", "dim", "ndimension")
    return n.target is getattr and n.args[1] in ("shape", "dtype", "device", "ndim")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple | list) and all(isinstance(v, int) for v in value))


def _who(m: int, network: nn.Module) -> str:
    return f"anchor {m} ({type(network).__name__})"


def _is_list(module: Any) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _positions(shape: Shape, axis: int) -> Shape:
    """Spatial sizes or token count of features without their batch and channels."""
    return shape[1:] if axis == 1 else shape[:-1]


def _wide(rows: Tensor) -> Tensor:
    """Float64, on the CPU where the device has none."""
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


def _unpacked(x: Input) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, tuple | list) else ((x,), {})


def _children(network: nn.Module, name: str, who: str) -> list[nn.Module]:
    """The blocks in the list ``name`` of a network."""
    try:
        container = network.get_submodule(name)
    except AttributeError:
        known = ", ".join(n for n, m in network.named_modules() if n and _is_list(m))
        raise ValueError(f"blocks: {who} has no module {name!r}; its lists of modules: {known or 'none'}") from None
    if not _is_list(container):
        raise ValueError(f"blocks: {name!r} of {who} is a {type(container).__name__}, not a ModuleList or Sequential")
    found = list(container.children())
    if not found:
        raise ValueError(f"blocks: {name!r} of {who} is empty")
    return found


def _sequence_of_networks(anchors: Any) -> list[nn.Module]:
    if isinstance(anchors, nn.Module) and not isinstance(anchors, nn.ModuleList):
        raise TypeError(f"anchors: expected a sequence of networks, got one {type(anchors).__name__}")
    networks = list(
        check.sequence(
            "anchors", list(anchors) if isinstance(anchors, nn.ModuleList) else anchors, check.module, empty=True
        )
    )
    if len(networks) < 2:
        raise ValueError(f"anchors: {len(networks)} network; two or more are needed to stitch")
    if len({id(n) for n in networks}) < len(networks):
        raise ValueError("anchors: one network is listed twice; give a copy of it (copy.deepcopy)")
    return networks


def _by_cost(networks: Sequence[nn.Module], example: Input) -> list[int]:
    """Places of the networks from the cheapest to the dearest; they must answer in the same shape."""
    shapes = []
    for m, network in enumerate(networks):
        try:
            shapes.append(tuple(check_example(network, example).shape))
        except ValueError as error:
            raise ValueError(f"anchors: network {m} ({type(network).__name__}): {error}") from error
    if len(set(shapes)) > 1:
        raise ValueError(f"anchors: their outputs have the shapes {shapes}; the same number of classes is needed")
    x = take(example, slice(0, 1))
    costs = [flops_per_sample(network, x).total for network in networks]
    order = sorted(range(len(networks)), key=costs.__getitem__)
    if order != list(range(len(networks))):
        warnings.warn(f"anchors: sorted by cost, {costs} FLOPs; their numbers are now {order}", stacklevel=3)
    return order
