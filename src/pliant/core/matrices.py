"""The matrices of a network, whatever module holds them: layers, stacked experts, recurrent weights, bare parameters.

A weight is a *matrix* where it multiplies activations, y = W x. Three kinds hold nearly all weights of a network:

=============  =====================================================================================================
``"layer"``    the weight of ``nn.Linear``, of a convolution, or of the ``Conv1D`` of transformers
``"experts"``  the stacked weights (E, O, I) of routed experts: those of transformers, and ``core.experts.Experts``
``"factor"``   any other parameter that the forward multiplies with activations: recurrent weights, the projections
               of ``nn.MultiheadAttention``, ``nn.Bilinear``, routers, parameters of modules of one's own
=============  =====================================================================================================

Factors are found by running an example and looking at the operands of every product (``Products``), so that tables
which are looked up or added (embeddings, positions, class tokens) are none. Norms and biases are none either.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pliant.core.experts import Dispatch, Experts, combine, dispatch
from pliant.core.inputs import Input, call, evaluating, removing, step_by_step
from pliant.core.labels import is_linear_1d

Kind = Literal["layer", "experts", "factor"]


@dataclass(frozen=True, eq=False)
class Matrix:
    """One parameter as the matrices that multiply vectors: (O, I), or a stack (E, O, I).

    Args:
        name: the layer's name for an attribute ``weight``, else the layer's and the attribute's.
        module: what holds the parameter.
        attribute: under which name.
        kind: see above.
        transposed: whether the parameter holds (..., I, O).
        unobserved: why the vectors that it multiplies cannot be told; empty where they can (``activations.observe``).
        multiply_adds: how often each entry of a factor was used by the example; 0 for other kinds.
    """

    name: str
    module: nn.Module
    attribute: str = "weight"
    kind: Kind = "layer"
    transposed: bool = False
    unobserved: str = ""
    multiply_adds: float = 0.0

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, as it is now."""
        return cast(nn.Parameter, getattr(self.module, self.attribute))

    @property
    def key(self) -> str:
        """Its name in the network's state dict."""
        return self.name if self.attribute != "weight" else f"{self.name}.weight" if self.name else "weight"

    @property
    def bias(self) -> Tensor | None:
        """What is added to the product, (O,) or (E, O); None where there is nothing, or nobody knows."""
        known = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, NonDynamicallyQuantizableLinear)
        if self.kind == "factor" and not isinstance(self.module, known):
            return None
        for name in (self.attribute.replace("weight", "bias"), f"{self.attribute}_bias"):
            found = self.module._parameters.get(name)
            if found is not None and name != self.attribute and found.shape == self.read().shape[:-1]:
                return found
        return None

    def read(self) -> Tensor:
        """The matrices, detached: (O, I) or (E, O, I)."""
        if self.kind == "layer" and is_matrix(self.module):
            return matrix(self.module)
        value = self.parameter.detach()
        return value.transpose(-1, -2) if self.transposed else value

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Put ``value`` into the parameter, in place; what ``read`` reads."""
        if self.kind == "layer":
            write_matrix(self.module, value)
        else:
            self.parameter.copy_(value.transpose(-1, -2) if self.transposed else value)


# -- the matrix of a layer ------------------------------------------------------------------------------------------


def is_matrix(module: nn.Module) -> bool:
    """Whether ``matrix`` knows this layer."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or is_linear_1d(module)


def matrix(module: nn.Module) -> Tensor:
    """The layer's weight as (O, I), detached.

    Raises:
        TypeError: the layer is none of those that are known.
    """
    if not is_matrix(module):
        raise TypeError(f"layer: {module} is not a Linear, a Conv1D, or a Conv2d of one group padded with zeros")
    weight = cast(Tensor, module.weight).detach()
    return weight.t() if is_linear_1d(module) else weight.flatten(1)


@torch.no_grad()
def write_matrix(module: nn.Module, value: Tensor) -> None:
    """Put ``value`` (O, I) into the layer's weight, in place; what ``matrix`` reads."""
    weight = cast(Tensor, module.weight)
    weight.copy_(value.t() if is_linear_1d(module) else value.reshape(weight.shape))


# -- stacked experts ------------------------------------------------------------------------------------------------


class Bank:
    """Stacked experts, ``down_e(act(up_e(x)))`` or gated: what each expert's matrices multiply.

    ``reads`` are the parameters that multiply the tokens, ``down`` the one that multiplies the hidden units.
    """

    def __init__(self, module: nn.Module, reads: tuple[str, ...], down: str, transposed: bool = False) -> None:
        self.module, self.reads, self.down, self.transposed = module, reads, down, transposed
        self.count = len(cast(Tensor, getattr(module, down)))

    @staticmethod
    def of(module: nn.Module) -> Bank | None:
        """The bank that ``module`` is; None where it is none, by the names and shapes of its parameters."""
        if isinstance(module, Experts):
            return Bank(module, ("up",) if module.gate is None else ("up", "gate"), "down")
        up_name = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
        up, down = module._parameters.get(up_name), module._parameters.get("down_proj")
        if up is None or down is None or up.dim() != 3 or down.dim() != 3 or len(up) != len(down):
            return None
        transposed = bool(getattr(module, "is_transposed", False))
        (out, into), (back, hidden) = (w.shape[:0:-1] if transposed else w.shape[1:] for w in (up, down))
        known = hasattr(module, "_apply_gate") or hasattr(module, "act_fn")
        wanted = 2 * hidden if up_name == "gate_up_proj" else hidden
        return Bank(module, (up_name,), "down_proj", transposed) if known and (wanted, back) == (out, into) else None

    def tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(x (T, d), chosen (T, K), weights (T, K)) of a call of the module.

        Raises:
            TypeError: it was called with something else.
        """
        given = list(inspect.signature(self.module.forward).bind(*args, **kwargs).arguments.values())[:3]
        x, chosen, weights = [*given, None, None, None][:3]
        fits = all(isinstance(t, Tensor) and t.dim() == 2 for t in (x, chosen, weights))
        if not fits or chosen.is_floating_point() or chosen.shape != weights.shape or len(chosen) != len(x):
            raise TypeError("its experts are not called with tokens (T, d), their experts (T, K) and weights (T, K)")
        return x, chosen, weights

    def sorted_rows(self, x: Tensor, chosen: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor, Dispatch]:
        """The tokens (S, d) sorted by their experts, and how many each expert has (E,); of counted tokens only."""
        if counted is not None:
            x, chosen = x[counted], chosen[counted]
        sent = dispatch(chosen, self.count)
        counts = sent.counts[: self.count]  # a choice beyond the last expert stands for none
        return x[sent.token[: int(counts.sum())]], counts, sent

    def hidden(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The hidden units (S, h), which ``down`` multiplies, for sorted tokens."""
        module = cast(Any, self.module)
        first = [self._product(name, rows, counts) for name in self.reads]
        if isinstance(self.module, Experts):
            return self.module._inner(first[0], first[1] if len(first) > 1 else None)
        if self.reads == ("up_proj",):
            return cast(Tensor, module.act_fn(first[0]))
        if hasattr(module, "_apply_gate"):
            return cast(Tensor, module._apply_gate(first[0]))
        gate, up = first[0].chunk(2, -1)
        return cast(Tensor, module.act_fn(gate) * up)

    def outputs(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What the module should answer, (T, d)."""
        rows, counts, sent = self.sorted_rows(x, chosen)
        parts = self._product(self.down, self.hidden(rows, counts), counts)
        if getattr(self.module, "has_post_expert_norm", False):
            parts = cast(Any, self.module).post_expert_norm(parts)
        none = parts.new_zeros(len(sent.order) - len(parts), parts.shape[-1])
        return combine(torch.cat([parts, none]), sent, weights)

    def _product(self, name: str, rows: Tensor, counts: Tensor) -> Tensor:
        """Every expert's layer on its slice of the sorted rows."""
        weight: Tensor = getattr(self.module, name)
        bias: Tensor | None = getattr(self.module, f"{name}_bias", None)
        weight = weight.transpose(1, 2) if self.transposed else weight
        parts = [
            F.linear(part, weight[e], None if bias is None else bias[e])
            for e, part in enumerate(torch.split(rows, counts.tolist()))
        ]
        return torch.cat(parts)


# -- products of a parameter with something else ----------------------------------------------------------------------

_aten = torch.ops.aten
_FACTORS = {  # where the two factors of each product stand among its arguments
    _aten.mm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.bmm: (0, 1),
    _aten.baddbmm: (1, 2),
    _aten.mv: (0, 1),
    _aten.addmv: (1, 2),
    _aten.linear: (0, 1),
    _aten.convolution: (0, 1),
    _aten._grouped_mm: (0, 1),
    _aten._trilinear: (0, 1),
}
_LOOKUPS = (_aten.embedding, _aten.index, _aten.index_select, _aten.gather)
_VECTORS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)


@dataclass(frozen=True)
class Product:
    """One product in which a parameter took part.

    ``vectors`` are what it multiplied, (N, I) or (E, N, I), and ``transposed`` says whether it holds (..., I, O); None
    where it took part in pieces or in another way. ``multiply_adds`` is their number.
    """

    parameter: int
    vectors: Tensor | None
    transposed: bool | None
    multiply_adds: float


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls ``note`` for every product of one of ``parameters`` with what is none of ``every`` parameter.

    ``derived``: of what is computed from one alone as well; all such copies are then kept for as long as this lives.
    """

    def __init__(
        self,
        every: Iterable[Tensor],
        parameters: Sequence[Tensor],
        note: Callable[[Product], None],
        derived: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters, self.note, self.derived = parameters, note, derived
        wanted = {id(p): (i,) for i, p in enumerate(parameters)}
        self.places: list[tuple[int, int, tuple[int, ...]]] = []  # from where to where in memory, and whose
        self.alive: list[Tensor] = []  # what was computed from parameters alone, kept so that its place stays its own
        for p in every:
            self._add(p, wanted.get(id(p), ()))

    def _add(self, tensor: Tensor, owners: tuple[int, ...]) -> None:
        insort(self.places, (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), owners))

    def _find(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The parameters that a tensor is a part of, or was computed from; None for anything else."""
        at = tensor.data_ptr()
        position = bisect_right(self.places, at, key=lambda place: place[0]) - 1
        return self.places[position][2] if position >= 0 and at < self.places[position][1] else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        where = _FACTORS.get(packet)
        if where is None:
            if self.derived and packet not in _LOOKUPS and isinstance(out, Tensor) and out.layout is torch.strided:
                self._derive(args, kwargs, out)
        elif all(args[w].layout is torch.strided for w in where):
            left, right = (args[w] for w in where)
            owners = self._find(left), self._find(right)
            if (owners[0] is None) != (owners[1] is None):  # of two parameters it is a weight, of none it has no weight
                used = _multiply_adds(packet, left, right, args, out)
                for number in owners[0] or owners[1] or ():
                    self.note(self._product(packet, number, left, right, owners[0] is not None, used))
        return out

    def _derive(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Remember what is computed from parameters alone: a copy in another order or type, a normalised weight."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
        owners = [self._find(t) for t in given]
        found = tuple(sorted({i for each in owners for i in each or ()}))
        if found and None not in owners and out.numel() and self._find(out) is None:
            self._add(out, found)
            self.alive.append(out)

    def _product(self, packet: Any, number: int, left: Tensor, right: Tensor, first: bool, used: int) -> Product:
        parameter = self.parameters[number]
        factor, other = (left, right) if first else (right, left)
        transposed = _holds_transposed(parameter, factor, first) if packet in _VECTORS else None
        vectors = None
        if transposed is not None:
            vectors = other.transpose(-1, -2) if first else other
            vectors = vectors[0] if vectors.dim() > parameter.dim() else vectors
        return Product(number, vectors, transposed, used)


def _multiply_adds(packet: Any, left: Tensor, right: Tensor, args: Any, out: Tensor) -> int:
    if packet is _aten.convolution:  # the seventh argument says whether it is a transposed one
        return (left if args[6] else out).numel() * right[0].numel()
    if packet is _aten._trilinear:
        return left.shape[0] * right.numel()
    if packet is _aten._grouped_mm:
        return len(left) * right.shape[-1] * right.shape[-2]
    return out.numel() * left.shape[-1]


def _holds_transposed(parameter: Tensor, factor: Tensor, first: bool) -> bool | None:
    """Whether a parameter, of which ``factor`` is the whole, holds (..., I, O); None where it is not the whole."""
    if factor.data_ptr() != parameter.data_ptr() or factor.numel() != parameter.numel():
        return None
    if factor.dim() == parameter.dim() + 1 and len(factor) == 1:
        factor = factor[0]
    for flipped in (False, True):
        view = factor.transpose(-1, -2) if flipped else factor
        if view.shape == parameter.shape and view.stride() == parameter.stride():
            return flipped if first else not flipped  # W x against x W
    return None


@contextmanager
def plain_kernels(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Recurrent layers and attention as products of matrices, where a fused kernel would hide them."""
    with ExitStack() as stack:
        if any(isinstance(m, nn.RNNBase) for m in modules):
            enabled = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags would warn of a type it does not touch
            stack.callback(torch._C._set_mkldnn_enabled, enabled)
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if any(isinstance(m, nn.MultiheadAttention) for m in modules):
            stack.enter_context(step_by_step())
        yield


# -- all matrices of a network ----------------------------------------------------------------------------------------

_NO_MATRIX = (nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class _Seen:
    """What the example told about one factor."""

    multiply_adds: float = 0.0
    layouts: set[bool | None] = field(default_factory=set)


def matrices(model: nn.Module, example: Input) -> list[Matrix]:
    """Every matrix of ``model`` in the model's order, tied ones once; ``example`` is run once where factors may be.

    A weight that some layer holds is a layer's, also where another module ties to it. Weights under a parametrisation
    are left out, since there is no parameter to look at.
    """
    found: dict[int, Matrix] = {}
    factors: dict[int, Matrix] = {}
    banks: list[Bank] = []
    order: dict[int, None] = {}
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        bank = Bank.of(module)
        banks += [] if bank is None else [bank]
        for attribute, p in module._parameters.items():
            if p is None or isinstance(p, nn.parameter.UninitializedParameter) or p.dim() < 2:
                continue
            if not p.is_floating_point():
                continue
            name = path if attribute == "weight" else f"{path}.{attribute}".lstrip(".")
            order[id(p)] = None
            fused = type(module) is NonDynamicallyQuantizableLinear  # attention reads its weight, and never calls it
            if attribute == "weight" and isinstance(module, _ConvNd | nn.Linear) and not fused:
                why = (
                    "" if is_matrix(module) else f"{type(module).__name__} is no Conv2d of one group padded with zeros"
                )
                found.setdefault(id(p), Matrix(name, module, unobserved=why))
            elif attribute == "weight" and is_linear_1d(module):
                found.setdefault(id(p), Matrix(name, module))
            elif bank is not None and attribute in (*bank.reads, bank.down):
                found.setdefault(id(p), Matrix(name, module, attribute, "experts", bank.transposed))
            elif not isinstance(module, _NO_MATRIX):
                factors.setdefault(id(p), Matrix(name, module, attribute, "factor"))
    factors = {key: m for key, m in factors.items() if key not in found}
    if factors or banks:
        wrong = _look(model, example, factors, banks)
        for key, m in found.items():
            if m.kind == "experts" and id(m.module) in wrong:
                found[key] = replace(m, unobserved=wrong[id(m.module)])
    every = found | factors
    return [every[key] for key in order if key in every]


def _look(model: nn.Module, example: Input, factors: dict[int, Matrix], banks: Sequence[Bank]) -> dict[int, str]:
    """Keep those of ``factors`` that are such, in place; and for each module of experts that is another, how."""
    keys, seen = list(factors), [_Seen() for _ in factors]
    wrong: dict[int, str] = {}

    def note(product: Product) -> None:
        entry = seen[product.parameter]
        entry.multiply_adds += product.multiply_adds
        entry.layouts.add(product.transposed)

    def compare(bank: Bank) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            try:
                ours = bank.outputs(*bank.tokens(args, kwargs))
                fits = isinstance(output, Tensor) and output.numel() == ours.numel()
                if not fits or (output.reshape(ours.shape) - ours).norm() > 0.05 * output.norm():
                    wrong[id(module)] = f"{type(module).__name__} computes something else than down(act(up(x)))"
            except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
                wrong[id(module)] = f"{type(module).__name__}: {str(error).splitlines()[0]}"

        return after

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(plain_kernels(list(model.modules())))
        hooks = [b.module.register_forward_hook(compare(b), with_kwargs=True) for b in banks]
        stack.enter_context(removing(hooks))
        if factors:
            stack.enter_context(Products(model.parameters(), [m.parameter for m in factors.values()], note, True))
        call(model, example)
    for key, entry in zip(keys, seen, strict=True):
        m = factors.pop(key)
        if entry.layouts:
            way = next(iter(entry.layouts)) if len(entry.layouts) == 1 else None
            why = "" if way is not None else "it is multiplied in pieces, in several ways, or in no matrix product"
            factors[key] = replace(
                m, transposed=bool(way), unobserved=why, multiply_adds=entry.multiply_adds / m.parameter.numel()
            )
    return wrong
