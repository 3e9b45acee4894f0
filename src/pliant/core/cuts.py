"""What a layer loses when channels on its sides fall away: which positions of which parameters, and its new sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pliant.core.labels import is_linear_1d

Runs = tuple[tuple[int, int], ...]  # kept positions along one dimension, as (start, length) pieces
Cuts = dict[int, Runs]  # by dimension


def module_cuts(module: nn.Module, gone: Mapping[str, set[int]]) -> tuple[dict[str, Cuts], dict[str, Any]]:
    """Which parameters of ``module`` lose which positions, and the static sizes that it has then."""
    if isinstance(module, _ConvNd | nn.Linear) or is_linear_1d(module):
        transposed = isinstance(module, _ConvTransposeNd) or is_linear_1d(module)  # (in, out)
        linear = not isinstance(module, _ConvNd)
        outs, ins = ("out_features", "in_features") if linear else ("out_channels", "in_channels")
        outs, ins = ("nf", "nx") if is_linear_1d(module) else (outs, ins)
        groups: int = 1 if linear else module.groups  # type: ignore[assignment]
        out_full, in_full = int(getattr(module, outs)), int(getattr(module, ins))
        if groups > 1:
            # The input and the output lose the same groups. In a depthwise convolution the two are the same channels.
            out_gone, in_gone = gone.get("out", set()), gone.get("in", set())
            if groups == in_full == out_full:
                runs = runs_of(groups, out_gone | in_gone)
                size = length_of(runs)
                cuts = {"weight": {0: runs}, "bias": {0: runs}}
                return _present(module, cuts), {outs: size, ins: size, "groups": size}
            lost_groups = {p * groups // out_full for p in out_gone} | {p * groups // in_full for p in in_gone}
            left = groups - len(lost_groups)
            out_size, in_size = out_full * left // groups, in_full * left // groups
            out_runs, in_runs = (
                runs_of(full, {p for p in range(full) if p * groups // full in lost_groups})
                for full in (out_full, in_full)
            )
            cuts = {"weight": {0: in_runs if transposed else out_runs}, "bias": {0: out_runs}}
            return _present(module, cuts), {outs: out_size, ins: in_size, "groups": left}
        weight: Cuts = {}
        attributes: dict[str, Any] = {}
        cuts = {"weight": weight}
        if "out" in gone:
            runs = runs_of(out_full, gone["out"])
            weight[1 if transposed else 0] = runs
            cuts["bias"] = {0: runs}
            attributes[outs] = length_of(runs)
        if "in" in gone:
            runs = runs_of(in_full, gone["in"])
            weight[0 if transposed else 1] = runs
            attributes[ins] = length_of(runs)
        return _present(module, cuts), attributes
    lost = set().union(*gone.values())
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        runs = runs_of(width, lost)
        size = length_of(runs)
        thrice = runs_of(3 * width, {p + i * width for p in lost for i in range(3)})
        cuts = {
            "in_proj_weight": {0: thrice, 1: runs},
            "in_proj_bias": {0: thrice},
            "out_proj.weight": {0: runs, 1: runs},
            "out_proj.bias": {0: runs},
            "bias_k": {2: runs},
            "bias_v": {2: runs},
        }
        cuts = {name: cut for name, cut in cuts.items() if _held(module, name)}
        heads = size // module.head_dim
        return cuts, {"embed_dim": size, "kdim": size, "vdim": size, "num_heads": heads}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        runs = runs_of(int(module.input_size), lost)
        names = [n for n in module._parameters if n == "weight_ih" or n.startswith("weight_ih_l0")]
        return {name: {1: runs} for name in names}, {"input_size": length_of(runs)}
    if isinstance(module, nn.Embedding):
        runs = runs_of(module.embedding_dim, lost)
        return {"weight": {1: runs}}, {"embedding_dim": length_of(runs)}
    if isinstance(module, nn.PReLU):
        if module.num_parameters == 1:  # one slope for all channels
            return {}, {}
        runs = runs_of(module.num_parameters, lost)
        return {"weight": {0: runs}}, {"num_parameters": length_of(runs)}
    tensors = ("weight", "bias", "running_mean", "running_var")
    if isinstance(module, nn.GroupNorm):
        runs = runs_of(module.num_channels, lost)
        size, full = length_of(runs), module.num_channels
        attributes = {"num_channels": size, "num_groups": max(1, size * module.num_groups // full)}
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        runs = runs_of(module.normalized_shape[0], lost)
        attributes = {"normalized_shape": (length_of(runs),)}
    else:
        runs = runs_of(int(module.num_features), lost)  # type: ignore[arg-type]
        attributes = {"num_features": length_of(runs)}
    return _present(module, {name: {0: runs} for name in tensors}), attributes


def _held(module: nn.Module, name: str) -> bool:
    """Whether a module, or the part of it that ``name`` points to, has this parameter."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path)._parameters.get(leaf) is not None


def _present(module: nn.Module, cuts: dict[str, Cuts]) -> dict[str, Cuts]:
    return {name: cut for name, cut in cuts.items() if isinstance(getattr(module, name, None), Tensor) and cut}


def can_crop(module: nn.Module, size: int) -> bool:
    """Whether the filters of ``module`` can shrink to their central ``size`` with the output keeping its shape."""
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd) or module.padding_mode != "zeros":
        return False
    full = module.kernel_size[0]
    if set(module.kernel_size) != {full} or size < 1 or size > full or (full - size) % 2:
        return False
    lost = [(full - size) // 2 * d for d in module.dilation]
    return isinstance(module.padding, str) or all(p >= n for p, n in zip(module.padding, lost, strict=True))


def crop(module: nn.Module, target: nn.Module | None, size: int, cuts: Cuts) -> None:
    """Cut the filters of ``module`` to their centre (in ``cuts``), and tell ``target``, its place in the skeleton."""
    if not can_crop(module, size):
        raise ValueError(f"kernels: {module} cannot be cropped to {size}")
    assert isinstance(module, _ConvNd)
    start = (module.kernel_size[0] - size) // 2
    for dim in range(2, 2 + len(module.kernel_size)):
        cuts[dim] = ((start, size),)
    if target is not None:
        target.kernel_size = (size,) * len(module.kernel_size)  # type: ignore[assignment]
        if not isinstance(module.padding, str):
            lost = [start * d for d in module.dilation]
            target.padding = tuple(p - n for p, n in zip(module.padding, lost, strict=True))  # type: ignore[assignment]


def runs_of(size: int, gone: set[int]) -> Runs:
    runs: list[tuple[int, int]] = []
    for p in range(size):
        if p in gone:
            continue
        if runs and sum(runs[-1]) == p:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((p, 1))
    return tuple(runs)


def length_of(runs: Runs) -> int:
    return sum(length for _, length in runs)
