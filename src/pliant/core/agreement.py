"""What a cut network should compute, told by the full one without knowing where its channels go.

The full network runs with NaN in the channels that the cut one lacks. NaN goes wherever these channels go, through
whatever the forward does with them. A layer that reads them reads zero instead; a norm over channels sees only those
that are numbers; a block that fell away passes on what it gets. What comes out must be what the cut network computes,
to rounding. If the map of channels is wrong anywhere, other channels are missing there, and the two differ.

Weights are shaken first where they are all alike, and enlarged where they are small: scales that start at zero or one
and attention that starts even would hide an exchange of channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from pliant.core.channels import Carrier
from pliant.core.inputs import (
    Input,
    call,
    evaluating,
    first_line,
    map_tensors,
    predictions,
    removing,
    step_by_step,
    tensors_in,
)
from pliant.core.labels import is_linear_1d
from pliant.core.subnetwork import store_of

# Operations that put other numbers beside those of a channel, and over how many dimensions the unpooling ones do.
_UNPOOLING = {"max_unpool2d": 2, "max_unpool3d": 3}
_TOLERANCE = 2e-3  # of the largest number in the output; exchanged channels are off by a hundred times as much
Run = Callable[[nn.Module, Input], Any]


class Agreement:
    """Compares cut networks with the full one.

    Args:
        model: the full network.
        example: an input for it.
        norms: names of modules that divide by the root mean square of their channels (besides ``nn.RMSNorm``).
    """

    def __init__(self, model: nn.Module, example: Input, norms: Sequence[str] = ()) -> None:
        self.model, self.example, self.norms = model, example, tuple(norms)
        self._shaken: nn.Module | None = None

    def rest(self) -> None:
        """Let go of the copy of the network; it is made anew when it is needed."""
        self._shaken = None

    @property
    def shaken(self) -> nn.Module:
        """A copy of the network in which no two channels are alike."""
        if self._shaken is None:
            self._shaken = _shaken(self.model)
        return self._shaken

    def problem(
        self,
        run: Run,
        gone: Mapping[Carrier, Collection[int]],
        blocks: Collection[str] = (),
        kernels: Mapping[str, int] | None = None,
        x: Input | None = None,
    ) -> str | None:
        """Where ``run(full network, input)`` does not compute what it should; None where it does.

        Args:
            run: the cut network with the weights of the full network that it is given.
            gone: the positions that were cut.
            blocks: names of the blocks that were left out.
            kernels: filter sizes by the name of a convolution.
            x: an input; the example by default.
        """
        full = self.shaken
        x = self.example if x is None else x
        x = map_tensors(x, lambda t: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t)
        with torch.no_grad(), step_by_step():
            try:
                ours = predictions(run(full, x))
            except Exception as error:  # the user's forward may raise anything at another width
                return f"its forward seems to fix their number ({first_line(error)})"
            problem = None
            for instead in (_passed, _nothing) if blocks else (_passed,):
                with self._masked(full, gone, blocks, kernels or {}, instead):
                    problem = _difference(ours, predictions(call(full, x)))
                if problem is None:
                    return None
        return problem

    @contextmanager
    def _masked(
        self,
        full: nn.Module,
        gone: Mapping[Carrier, Collection[int]],
        blocks: Collection[str],
        kernels: Mapping[str, int],
        instead: Callable[[Any, Any], Any],
    ) -> Iterator[None]:
        """The full network with NaN in the channels that are gone."""
        handles: list[Any] = []
        with ExitStack() as stack:
            stack.enter_context(evaluating(full))
            for name, module in full.named_modules():
                if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm) or name in self.norms:
                    handles.append(module.register_forward_hook(_norm_of_numbers(name in self.norms)))
            for carrier, positions in gone.items():
                at = torch.tensor(sorted(positions))
                if carrier.side == "parameter":
                    stack.enter_context(_replaced(full, carrier.name, carrier.dim, at))
                    continue
                module = full.get_submodule(carrier.name)
                if isinstance(module, nn.MultiheadAttention):
                    for tensor in (module.in_proj_weight, module.in_proj_bias):
                        if tensor is not None:
                            stack.enter_context(_overwritten(tensor, 0, at + 2 * module.embed_dim, 0.0))
                    if module.bias_v is not None:
                        stack.enter_context(_overwritten(module.bias_v, 2, at, 0.0))
                    handles.append(module.register_forward_pre_hook(_read_zero, with_kwargs=True))
                    handles.append(module.register_forward_hook(_write_nan(at, -1)))
                elif carrier.side == "in" and getattr(module, "groups", 1) == 1:
                    handles.append(module.register_forward_pre_hook(_read_zero, with_kwargs=True))
                elif carrier.side == "out" and (
                    isinstance(module, nn.Linear | nn.Embedding | _ConvNd) or is_linear_1d(module)
                ):
                    dim = -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1
                    handles.append(module.register_forward_hook(_write_nan(at, dim)))
            for name in blocks:
                handles.append(full.get_submodule(name).register_forward_hook(_skipped(instead), with_kwargs=True))
            for name, size in kernels.items():
                weight: Any = full.get_submodule(name).weight
                lost = (weight.shape[-1] - size) // 2
                border = torch.tensor([i for i in range(weight.shape[-1]) if not lost <= i < lost + size]).long()
                for dim in range(2, weight.ndim):
                    stack.enter_context(_overwritten(weight, dim, border, 0.0))
            stack.enter_context(removing(handles))
            stack.enter_context(_FilledIn())  # type: ignore[no-untyped-call]
            yield


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    for name, b in theirs.items():
        a = ours.get(name)
        where = f" {name!r}" if name else ""
        if a is None:
            return f"its output{where} is not there any more"
        if a.shape != b.shape:
            return f"its output{where} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        if not a.is_floating_point():
            continue
        finite = b.isfinite() | b.isinf()
        if not bool(finite.all()):
            return f"channels that were removed reach its output{where}"
        if not torch.equal(a.isinf(), b.isinf()):
            return f"its output{where} is not what the full network computes without them"
        a, b = (torch.where(b.isinf(), 0.0, v.double()) for v in (a, b))
        scale = b.abs().max().item() if b.numel() else 0.0
        if not bool(((a - b).abs() <= _TOLERANCE * scale + 1e-30).all()):
            return f"its output{where} is not what the full network computes without them"
    return None


def _shaken(model: nn.Module) -> nn.Module:
    held = {p: p.grad for p in model.parameters() if p.grad is not None}
    for p in held:
        p.grad = None
    try:
        handles = [v for m in model.modules() for held in vars(m).values() if isinstance(held, list) for v in held]
        # A handle of a hook cannot be copied: it stays itself.
        full = copy.deepcopy(model, {id(v): v for v in handles if isinstance(v, RemovableHandle)})
    finally:
        for p, gradient in held.items():
            p.grad = gradient
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in full.parameters()):
        full = full.float()
    full.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t)

    for p in full.parameters():
        if not p.is_floating_point() or p.numel() < 2:
            continue
        size = p.abs().max().item()
        if p.ndim > 1 and size > 0:  # weights that are small at the start would leave attention even, gates half open
            p.mul_(max(1.0, p[0].numel() ** -0.5 / max(p.std().item(), 1e-12)))
            size = p.abs().max().item()
        if p.std().item() < 0.05 * size or size < 1e-3:
            p.add_(0.1 * noise(p) / (p[0].numel() ** 0.5 if p.ndim > 1 else 1.0))
    for module in full.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.add_(0.1 * noise(mean))
            var.mul_(1 + 0.3 * torch.tanh(noise(var)))
    return full


class _FilledIn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is put around or between the numbers of a channel is gone where the channel is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in _UNPOOLING and name != "constant_pad_nd":
            return out
        x: Tensor = args[0]
        number = _UNPOOLING[name] if name in _UNPOOLING else len(args[1]) // 2
        if not x.is_floating_point() or not number:
            return out
        gone = x.isnan()
        for dim in range(-number, 0):
            gone = gone.all(dim=dim, keepdim=True)
        return torch.where(gone, float("nan"), out)


def _read_zero(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def clean(t: Tensor) -> Tensor:
        return torch.where(t.isnan(), 0.0, t) if t.is_floating_point() else t

    return tuple(map_tensors(list(args), clean)), map_tensors(dict(kwargs), clean)


def _write_nan(at: Tensor, dim: int) -> Callable[[nn.Module, Any, Any], Any]:
    def write(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        written = first.index_fill(dim, at.to(first.device), float("nan"))
        return (written, *output[1:]) if isinstance(output, tuple) else written

    return write


def _norm_of_numbers(by_size: bool) -> Callable[[nn.Module, Any, Any], Any]:
    """A norm over channels sees those that are numbers."""

    def normalise(module: Any, args: Any, output: Any) -> Any:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not bool(x.isnan().any()):
            return None
        known = ~x.isnan()
        if torch.equal(output.isnan(), ~known):
            return None  # it works along another dimension: what is gone reaches nothing else
        if isinstance(module, nn.GroupNorm):
            if module.num_groups > 1:
                return None  # a group goes as a whole
            dims: list[int] = list(range(1, x.ndim))
            shape = [1, -1, *[1] * (x.ndim - 2)]
        elif len(getattr(module, "normalized_shape", (0,))) > 1:
            return None
        else:
            last = bool((known == known.reshape(-1, x.shape[-1])[0]).all())
            dims = [x.ndim - 1 if last else 1]
            shape = [-1 if d == dims[0] else 1 for d in range(x.ndim)]
        number = known.sum(dims, keepdim=True)
        if isinstance(module, nn.RMSNorm) or by_size:
            # Zeros in place of what is gone make the mean square too small by the share of what is left.
            factor = (x.shape[dims[0]] / number).sqrt()
            y = module.forward(torch.where(known, x, 0.0) * factor) / factor  # past this hook
            return torch.where(known, y, float("nan"))
        zeroed = torch.where(known, x, 0.0)
        mean = zeroed.sum(dims, keepdim=True) / number
        var = torch.where(known, (x - mean).square(), 0.0).sum(dims, keepdim=True) / number
        y = (x - mean) * (var + module.eps).rsqrt()
        if module.weight is not None:
            y = y * module.weight.reshape(shape)
        return y + module.bias.reshape(shape) if module.bias is not None else y

    return normalise


def _skipped(instead: Callable[[Any, Any], Any]) -> Callable[[nn.Module, Any, Any, Any], Any]:
    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = next(tensors_in([*args, *kwargs.values()]))
        if isinstance(output, tuple):
            return (instead(given, output[0]), *output[1:])
        return instead(given, output)

    return skip


def _passed(given: Any, output: Any) -> Any:
    return given


def _nothing(given: Any, output: Any) -> Any:
    return torch.zeros_like(output)


@contextmanager
def _overwritten(tensor: Tensor, dim: int, at: Tensor, value: float) -> Iterator[None]:
    before = tensor.detach().clone()
    try:
        with torch.no_grad():
            tensor.index_fill_(dim, at.to(tensor.device), value)
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(before)


@contextmanager
def _replaced(model: nn.Module, name: str, dim: int, at: Tensor) -> Iterator[None]:
    """NaN in a bare parameter or buffer; a layer that shares it keeps it as it is."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    held = store_of(module, leaf)
    before = held[leaf]
    after = before.detach().index_fill(dim, at.to(before.device), float("nan"))
    held[leaf] = nn.Parameter(after, requires_grad=False) if isinstance(before, nn.Parameter) else after
    try:
        yield
    finally:
        held[leaf] = before
