"""A sub-network as views: a skeleton of the user's modules without weights, and the cuts that give it its weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from pliant.core.configs import fitted_config
from pliant.core.cuts import Cuts
from pliant.core.inputs import Input, call, device_of, to_device


@dataclass(frozen=True)
class SubNetwork:
    """A skeleton and the cuts that give it its weights."""

    skeleton: nn.Module
    cuts: Mapping[str, Cuts]
    example: Input | None = field(default=None, compare=False, repr=False)
    _config: tuple[Any] | None = field(default=None, compare=False, repr=False)  # of a model of transformers

    @cached_property
    def _places(self) -> list[tuple[list[str], list[tuple[str, str]]]]:
        """Where the skeleton's tensors live: (path of the module, [(full name, name in the module)])."""
        places: dict[str, list[tuple[str, str]]] = {}
        for name in _tensors(self.skeleton):
            path, _, leaf = name.rpartition(".")
            places.setdefault(path, []).append((name, leaf))
        return [(path.split(".") if path else [], leaves) for path, leaves in places.items()]

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of the skeleton by name, shared ones under each of theirs."""
        return dict(self.skeleton.named_modules(remove_duplicate=False))

    @cached_property
    def _recurrent(self) -> list[nn.RNNBase]:
        return _recurrent_in(self.skeleton)

    def views(self, model: nn.Module) -> dict[str, Tensor]:
        """Every parameter and buffer that the skeleton needs, as views on those of the full ``model``.

        A leading range is a view. Two exceptions copy one tensor at a time: where the kept positions are several
        pieces (behind a concatenation, in the joined projection of ``nn.MultiheadAttention``) they are joined; and in
        evaluation mode a matrix that lost columns is made contiguous, because the product of a strided matrix with a
        single row takes another kernel on CPU and differs in the last bit (convolutions and training do not need it).
        """
        full = _lookup(model, self._places)
        # Views require a gradient where their parameter does, also under no_grad: ``torch.matmul`` looks at that flag
        # when it chooses a kernel, and would otherwise differ from the extracted network in the last bit.
        with torch.enable_grad():
            views = {name: _cut(t, self.cuts[name]) if name in self.cuts else t for name, t in full.items()}
            if not self.skeleton.training:
                views.update({name: v.contiguous() for name, v in views.items() if v.ndim == 2})
        return views

    def run(self, model: nn.Module, x: Input, replace: Mapping[str, Tensor] | None = None) -> Any:
        """The skeleton's output on ``x`` with views on ``model``'s weights; ``replace`` overrides some tensors.

        The views stay in the skeleton until the next run: activation checkpointing runs it again during backward.
        """
        tensors = self.views(model)
        tensors.update(replace or {})
        if torch.compiler.is_compiling():  # which follows no changes of a module's parameters
            args = (x,) if isinstance(x, Tensor) else () if isinstance(x, Mapping) else tuple(x)
            kwargs = dict(x) if isinstance(x, Mapping) else {}
            return functional_call(self.skeleton, tensors, args, kwargs, tie_weights=False)
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            store_of(self.modules[path], leaf)[leaf] = tensor
        _refresh(self._recurrent)
        return call(self.skeleton, x)

    def set_mode(self, model: nn.Module, training: bool = True) -> None:
        """Training or evaluation mode; what is in evaluation mode in ``model`` stays so (frozen normalisation)."""
        self.skeleton.train(training)
        if training:
            full = dict(model.named_modules(remove_duplicate=False))
            for name, module in self.modules.items():
                if name in full:
                    module.training = module.training and full[name].training

    def __deepcopy__(self, memo: dict[int, Any]) -> SubNetwork:
        return SubNetwork(hollow(self.skeleton), copy.deepcopy(self.cuts, memo), self.example)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SubNetwork, (hollow(self.skeleton), self.cuts, self.example))

    def infer(
        self, model: nn.Module, x: Input, replace: Callable[[], Mapping[str, Tensor]] = dict, key: object = None
    ) -> Any:
        """``run`` in evaluation mode, for many calls without gradients: views stay in place from one to the next.

        A view shows its parameter as it is now, whoever changed it and how; what has to be copied (see ``views``) is
        copied anew for each call. Everything is put in place again when a parameter was moved or replaced.

        Args:
            model: the full network.
            x: an input.
            replace: tensors that override some, asked for when they are put in place; views, so that they stay right.
            key: whatever tells that ``replace`` would give other tensors than last time.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.skeleton.training:
            return self.run(model, x, replace())
        full = _lookup(model, self._places)
        # A tensor's place in memory tells that it was moved; inference mode makes tensors of another kind.
        now = (key, torch.is_inference_mode_enabled(), *((id(t), t.data_ptr()) for t in full.values()))
        mount = self._mount
        if mount.key != now:
            with mount.lock:  # of several threads one builds, and the others find it built
                if mount.key != now:
                    mount.put(self, now, self.views(model), replace(), full)
        if mount.copied:
            with torch.enable_grad():
                for owner, leaf, name in mount.copied:
                    owner[leaf] = _cut(full[name], self.cuts[name]).contiguous()
            _refresh(mount.recurrent)
        return call(mount.network, x)  # type: ignore[arg-type]

    @cached_property
    def twin(self) -> SubNetwork:
        """The same sub-network with a skeleton of its own, for another mode at the same time."""
        return SubNetwork(hollow(self.skeleton), self.cuts, self.example)

    @cached_property
    def _mount(self) -> _Mount:
        return _Mount()

    def extract(self, model: nn.Module, replace: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A plain network with contiguous copies of the weights, in evaluation mode. Tied weights stay tied.

        A model of transformers gets a configuration that describes its new sizes.
        """
        network = hollow(self.skeleton)
        full, views = _tensors(model), self.views(model)
        views.update(replace or {})
        made: dict[int, Tensor] = {}
        for name, view in views.items():
            path, _, leaf = name.rpartition(".")
            owner = network.get_submodule(path)
            if id(full[name]) not in made:
                copied = view.detach().clone(memory_format=torch.contiguous_format)
                source = full[name]
                made[id(source)] = (
                    nn.Parameter(copied, source.requires_grad) if isinstance(source, nn.Parameter) else copied
                )
            store_of(owner, leaf)[leaf] = made[id(full[name])]
        _refresh(_recurrent_in(network))
        network.eval()
        if self._config is None and self.example is not None:
            example = to_device(self.example, device_of(model))
            object.__setattr__(self, "_config", (fitted_config(network, model, example),))
        if self._config is not None and self._config[0] is not None:
            _give_config(network, copy.deepcopy(self._config[0]))
        return network


class _Mount:
    """A copy of a skeleton with the views in place of its parameters. Copies of it are empty."""

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self.key: object = None  # set at last, when everything else is in place
        self.lock = threading.Lock()
        self.copied: list[tuple[dict[str, Any], str, str]] = []  # (tensors of a module, name there, full name)
        self.recurrent: list[nn.RNNBase] = []

    def put(
        self,
        of: SubNetwork,
        key: object,
        views: Mapping[str, Tensor],
        replaced: Mapping[str, Tensor],
        full: Mapping[str, Tensor],
    ) -> None:
        """Build the network anew."""
        held = {id(t): t for t in [*of.skeleton.parameters(), *of.skeleton.buffers()]}
        network, copied = _copy_of(of.skeleton, held).eval(), []
        for name, tensor in {**views, **replaced}.items():
            path, _, leaf = name.rpartition(".")
            tensors = store_of(network.get_submodule(path), leaf)
            tensors[leaf] = tensor
            own_memory = (
                name in of.cuts and tensor.untyped_storage().data_ptr() != full[name].untyped_storage().data_ptr()
            )
            if own_memory and name not in replaced:
                copied.append((tensors, leaf, name))
        recurrent = _recurrent_in(network)
        _refresh(recurrent)
        self.network, self.copied, self.recurrent = network, copied, recurrent
        self.key = key

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mount:
        return _Mount()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Mount, ())


def hollow(model: nn.Module) -> nn.Module:
    """A copy of the modules of ``model`` whose parameters and buffers hold no memory."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return _copy_of(model, memo)


_BASE = frozenset(nn.Module().__dict__)  # the dictionaries that every module keeps
_SHARED = (int, float, str, bool, type(None), torch.dtype, torch.device, RemovableHandle)


def _copy_of(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(module, memo)``, ten times faster where a module holds little besides tensors and submodules."""
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    if hasattr(module, "__deepcopy__"):
        return copy.deepcopy(module, memo)
    new = module.__class__.__new__(module.__class__)
    memo[id(module)] = new
    held = new.__dict__
    for name, value in module.__dict__.items():
        if name in _BASE:
            held[name] = value.copy() if isinstance(value, dict | set) else value
        elif isinstance(value, _SHARED) or (isinstance(value, tuple) and all(isinstance(v, _SHARED) for v in value)):
            held[name] = value
        elif isinstance(value, list) and any(isinstance(v, RemovableHandle) for v in value):
            held[name] = list(value)  # a handle cannot be copied
    for name, tensors in (("_parameters", module._parameters), ("_buffers", module._buffers)):
        held[name] = {k: None if t is None else memo[id(t)] for k, t in tensors.items()}
    held["_modules"] = {k: None if m is None else _copy_of(m, memo) for k, m in module._modules.items()}
    for name, value in module.__dict__.items():  # at last, when the submodules that it may name are in the memo
        if name not in held:
            held[name] = copy.deepcopy(value, memo)
    return new


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _lookup(model: nn.Module, places: Sequence[tuple[list[str], list[tuple[str, str]]]]) -> dict[str, Tensor]:
    """The tensors at ``places``, several times faster than walking the whole model for each forward pass."""
    found: dict[str, Tensor] = {}
    for path, leaves in places:
        module: Any = model
        for part in path:
            module = module._modules[part]
        for name, leaf in leaves:
            tensor = module._parameters.get(leaf)
            found[name] = module._buffers[leaf] if tensor is None else tensor
    return found


def _cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    for dim, runs in cuts.items():
        pieces = [tensor.narrow(dim, start, length) for start, length in runs]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return tensor


def _give_config(network: nn.Module, config: Any) -> None:
    """Put a configuration, and those inside it, in place of the old ones wherever modules hold them."""
    old = network.config
    replaced = {id(old): config}
    for name, value in vars(old).items():  # type: ignore[arg-type]
        if hasattr(value, "to_dict"):
            replaced[id(value)] = getattr(config, name)
    for module in network.modules():
        for attribute, value in vars(module).items():
            if id(value) in replaced:
                setattr(module, attribute, replaced[id(value)])


def store_of(module: nn.Module, leaf: str) -> dict[str, Any]:
    """The dictionary of ``module`` that holds its tensor ``leaf``: that of its parameters or of its buffers."""
    return module._parameters if leaf in module._parameters else module._buffers


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by name."""
    path, _, leaf = name.rpartition(".")
    found: Tensor = store_of(model.get_submodule(path), leaf)[leaf]
    return found


def _recurrent_in(network: nn.Module) -> list[nn.RNNBase]:
    return [module for module in network.modules() if isinstance(module, nn.RNNBase)]


def _refresh(recurrent: Iterable[nn.RNNBase]) -> None:
    """Recurrent layers keep a list of their weights beside the weights themselves."""
    for module in recurrent:
        module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]
