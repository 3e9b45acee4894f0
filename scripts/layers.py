"""A small network around every layer of torch.nn, and what the other classes there are: what ``accepts.py`` tries.

Each network is ``lead -> first -> the layer -> last``: ``first`` makes the channels that enter the layer, ``last``
reads those that leave it; ``lead`` only gives every network something that can be cut.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import loss as losses

C = 8  # channels that enter a layer
_INPUTS: dict[str, tuple[int, ...]] = {
    "features": (3, 4),
    "sequence": (3, 6, 4),  # (batch, time, channels)
    "1d": (3, 4, 12),
    "2d": (3, 4, 8, 8),
    "3d": (2, 4, 6, 6, 6),
}


def _applied(layer: Any, x: Tensor) -> Any:
    return layer(x)


@dataclass(frozen=True)
class Case:
    """One layer: how it is made, which kind of tensor it takes, and how it is called."""

    make: Callable[[], nn.Module]
    kind: str
    apply: Callable[[Any, Tensor], Any] = _applied
    enters: int = C


class Between(nn.Module):
    """``lead -> first -> layer -> last``."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        n = int(case.kind[0]) if case.kind[0].isdigit() else 0
        convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        self.lead: nn.Module = convolution(4, 6, 1) if n else nn.Linear(4, 6)
        self.first: nn.Module = convolution(6, case.enters, 1) if n else nn.Linear(6, case.enters)
        self.layer = case.make()
        self.case = case
        with torch.no_grad():
            y = self.middle(torch.randn(_INPUTS[case.kind]))
        if y.ndim <= 2 or not n:
            self.last: nn.Module = nn.Linear(y.shape[-1], 3)
        else:
            self.last = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[y.ndim - 3](y.shape[1], 3, 1)

    def middle(self, x: Tensor) -> Tensor:
        """What enters ``last``."""
        return self.case.apply(self.layer, self.first(torch.tanh(self.lead(x))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(x))  # type: ignore[no-any-return]


class Looked(nn.Module):
    """``layer -> last`` for layers that take indices: nothing enters but those."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.lead = nn.Linear(C, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.lead(self.layer(x))))  # type: ignore[no-any-return]


def network(name: str) -> tuple[nn.Module, Tensor]:
    """The network around the layer of that name, in evaluation mode, and an input for it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in _LOOKED:
            return Looked(_LOOKED[name]()).eval(), torch.randint(0, 20, (3, 5))
        case = CASES[name] if name in CASES else VARIANTS[name]
        return Between(case).eval(), torch.randn(_INPUTS[case.kind])


def _first(layer: Any, x: Tensor) -> Any:
    return layer(x)[0]


def _twice(layer: Any, x: Tensor) -> Any:
    return layer(x, x)


def _with_itself(layer: Any, x: Tensor) -> Any:
    return layer(x, x.flip(0))


def _distances(layer: Any, x: Tensor) -> Any:
    return layer(x[:, :, None], x[:, None])


def _attend(layer: Any, x: Tensor) -> Any:
    return layer(x, x, x, need_weights=False)[0]


def _step(layer: Any, x: Tensor) -> Any:
    state = layer(x)
    return state[0] if isinstance(state, tuple) else state


def _pooled_and_back(n: int) -> Callable[[Any, Tensor], Any]:
    pool = (nn.functional.max_pool1d, nn.functional.max_pool2d, nn.functional.max_pool3d)[n - 1]

    def apply(layer: Any, x: Tensor) -> Any:
        values, indices = pool(x, 2, return_indices=True)
        return layer(values, indices)

    return apply


def _by_dimension(names: str, make: Callable[[Any], nn.Module], dims: Iterable[int] = (1, 2, 3)) -> dict[str, Case]:
    found = {}
    for name in names.split():
        for n in dims:
            kind: Any = getattr(nn, f"{name}{n}d")
            found[f"{name}{n}d"] = Case(partial(make, kind), f"{n}d")
    return found


def _elementwise(names: str, *arguments: Any) -> dict[str, Case]:
    return {name: Case(partial(getattr(nn, name), *arguments), "features") for name in names.split()}


CASES: dict[str, Case] = {
    "Linear": Case(lambda: nn.Linear(C, 10), "features"),
    "LazyLinear": Case(lambda: nn.LazyLinear(10), "features"),
    "Bilinear": Case(lambda: nn.Bilinear(C, C, 10), "features", _with_itself),
    "Identity": Case(nn.Identity, "features"),
    **_by_dimension("Conv ConvTranspose", lambda k: k(C, 10, 3, padding=1)),
    **_by_dimension("LazyConv LazyConvTranspose", lambda k: k(10, 3, padding=1)),
    **_by_dimension("BatchNorm", lambda k: k(C)),
    **_by_dimension("InstanceNorm", lambda k: k(C, affine=True, track_running_stats=True)),
    **_by_dimension("LazyBatchNorm LazyInstanceNorm", lambda k: k()),
    "SyncBatchNorm": Case(lambda: nn.SyncBatchNorm(C), "2d"),
    "LayerNorm": Case(lambda: nn.LayerNorm(C), "sequence"),
    "RMSNorm": Case(lambda: nn.RMSNorm(C), "sequence"),
    "GroupNorm": Case(lambda: nn.GroupNorm(4, C), "2d"),
    "LocalResponseNorm": Case(lambda: nn.LocalResponseNorm(3), "2d"),
    "CrossMapLRN2d": Case(lambda: nn.CrossMapLRN2d(3), "2d"),
    **_by_dimension("Dropout", lambda k: k(0.1)),
    **_elementwise("Dropout AlphaDropout FeatureAlphaDropout", 0.1),
    **_elementwise(
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish RReLU ReLU ReLU6 SELU SiLU "
        "Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink"
    ),
    "Threshold": Case(lambda: nn.Threshold(0.1, 0.0), "features"),
    "PReLU": Case(lambda: nn.PReLU(C), "2d"),
    "GLU": Case(lambda: nn.GLU(-1), "features"),
    **_elementwise("Softmax Softmin LogSoftmax", -1),
    "Softmax2d": Case(nn.Softmax2d, "2d"),
    **_by_dimension("AvgPool MaxPool", lambda k: k(2)),
    **_by_dimension("AdaptiveAvgPool AdaptiveMaxPool", lambda k: k(2)),
    **_by_dimension("FractionalMaxPool", lambda k: k(2, output_size=3, _random_samples=_samples(k)), (2, 3)),
    **_by_dimension("LPPool", lambda k: k(2, 2)),
    **{
        f"MaxUnpool{n}d": Case(partial(getattr(nn, f"MaxUnpool{n}d"), 2), f"{n}d", _pooled_and_back(n))
        for n in (1, 2, 3)
    },
    **_by_dimension("CircularPad ReflectionPad ReplicationPad ZeroPad", lambda k: k(1)),
    **_by_dimension("ConstantPad", lambda k: k(1, 0.5)),
    "Upsample": Case(lambda: nn.Upsample(scale_factor=2, mode="bicubic"), "2d"),
    "UpsamplingBilinear2d": Case(lambda: nn.UpsamplingBilinear2d(scale_factor=2), "2d"),
    "UpsamplingNearest2d": Case(lambda: nn.UpsamplingNearest2d(scale_factor=2), "2d"),
    "PixelShuffle": Case(lambda: nn.PixelShuffle(2), "2d"),
    "PixelUnshuffle": Case(lambda: nn.PixelUnshuffle(2), "2d"),
    "ChannelShuffle": Case(lambda: nn.ChannelShuffle(2), "2d"),
    "Unfold": Case(lambda: nn.Unfold(2, stride=2), "2d"),
    "Fold": Case(lambda: nn.Fold((4, 6), 2, stride=2), "1d", lambda layer, x: layer(x[..., :6]), 16),
    "Flatten": Case(nn.Flatten, "2d"),
    "Unflatten": Case(lambda: nn.Unflatten(1, (2, C // 2)), "2d"),
    "CosineSimilarity": Case(lambda: nn.CosineSimilarity(-1), "sequence", _distances),
    "PairwiseDistance": Case(nn.PairwiseDistance, "sequence", _distances),
    "MultiheadAttention": Case(lambda: nn.MultiheadAttention(C, 4, batch_first=True), "sequence", _attend),
    "TransformerEncoderLayer": Case(lambda: nn.TransformerEncoderLayer(C, 4, 12, batch_first=True), "sequence"),
    "TransformerDecoderLayer": Case(lambda: nn.TransformerDecoderLayer(C, 4, 12, batch_first=True), "sequence", _twice),
    "TransformerEncoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 4, 12, batch_first=True), 2), "sequence"
    ),
    "TransformerDecoder": Case(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(C, 4, 12, batch_first=True), 2), "sequence", _twice
    ),
    "Transformer": Case(lambda: nn.Transformer(16, 4, 1, 1, 12, batch_first=True), "sequence", _twice, 16),
    **{
        name: Case(partial(getattr(nn, name), C, 10, 2, batch_first=True), "sequence", _first)
        for name in ("RNN", "LSTM", "GRU")
    },
    **{name: Case(partial(getattr(nn, name), C, 10), "features", _step) for name in ("RNNCell", "LSTMCell", "GRUCell")},
    "AdaptiveLogSoftmaxWithLoss": Case(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(C, 20, [6, 12]), "features", lambda layer, x: layer.log_prob(x)
    ),
    "Sequential": Case(lambda: nn.Sequential(nn.Linear(C, 10), nn.ReLU()), "features"),
    "ModuleList": Case(lambda: nn.ModuleList([nn.Linear(C, 10)]), "features", lambda layer, x: layer[0](x)),
    "ModuleDict": Case(lambda: nn.ModuleDict({"a": nn.Linear(C, 10)}), "features", lambda layer, x: layer["a"](x)),
    "ParameterList": Case(lambda: nn.ParameterList([torch.randn(C)]), "features", lambda layer, x: x * layer[0]),
    "ParameterDict": Case(lambda: nn.ParameterDict({"a": torch.randn(C)}), "features", lambda layer, x: x * layer["a"]),
    "DataParallel": Case(lambda: nn.DataParallel(nn.Linear(C, 10)), "features"),
}
# Layers with other options, by the name of the class, a comma, and what is different.
VARIANTS: dict[str, Case] = {
    "Conv2d, depthwise": Case(lambda: nn.Conv2d(C, C, 3, padding=1, groups=C), "2d"),
    "Conv2d, 4 groups": Case(lambda: nn.Conv2d(C, 12, 3, padding=1, groups=4), "2d"),
    "Conv2d, reflected border": Case(lambda: nn.Conv2d(C, 10, 3, padding=1, padding_mode="reflect"), "2d"),
    "Conv2d, circular border": Case(lambda: nn.Conv2d(C, 10, 3, padding=1, padding_mode="circular"), "2d"),
    "ConvTranspose2d, 4 groups": Case(lambda: nn.ConvTranspose2d(C, 12, 3, groups=4), "2d"),
    "Conv2d, weight_norm": Case(lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(C, 10, 3)), "2d"),
    "Linear, spectral_norm": Case(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(C, 10)), "features"),
    "GroupNorm, one group": Case(lambda: nn.GroupNorm(1, C), "2d"),
    "GroupNorm, a group per channel": Case(lambda: nn.GroupNorm(C, C), "2d"),
    "LayerNorm, over (channels, height, width)": Case(lambda: nn.LayerNorm((C, 8, 8)), "2d"),
    "InstanceNorm2d, not affine": Case(lambda: nn.InstanceNorm2d(C), "2d"),
    "BatchNorm2d, not affine": Case(lambda: nn.BatchNorm2d(C, affine=False), "2d"),
    "PReLU, one slope": Case(nn.PReLU, "2d"),
    "Softmax, over positions": Case(lambda: nn.Softmax(1), "sequence"),
    "FractionalMaxPool2d, drawn at each call": Case(lambda: nn.FractionalMaxPool2d(2, output_size=3), "2d"),
    **{
        f"Upsample, {mode} {n}d": Case(partial(nn.Upsample, scale_factor=2, mode=mode), f"{n}d")
        for mode, n in (
            ("nearest", 1), ("linear", 1), ("nearest", 2), ("nearest-exact", 2), ("bilinear", 2), ("nearest", 3),
            ("trilinear", 3),
        )
    },
    "Unflatten, one size left open": Case(lambda: nn.Unflatten(1, (-1, 2)), "2d"),
    "MultiheadAttention, time first": Case(lambda: nn.MultiheadAttention(C, 4), "sequence", _attend),
    "MultiheadAttention, bias_k and bias_v": Case(
        lambda: nn.MultiheadAttention(C, 4, batch_first=True, add_bias_kv=True), "sequence", _attend
    ),
    "MultiheadAttention, keys of another width": Case(
        lambda: nn.MultiheadAttention(C, 4, batch_first=True, kdim=4, vdim=4), "sequence",
        lambda layer, x: layer(x, x[..., :4], x[..., :4])[0],
    ),
    "TransformerEncoderLayer, norm_first": Case(
        lambda: nn.TransformerEncoderLayer(C, 4, 12, batch_first=True, norm_first=True), "sequence"
    ),
    "LSTM, both directions": Case(lambda: nn.LSTM(C, 6, batch_first=True, bidirectional=True), "sequence", _first),
    "LSTM, projected": Case(lambda: nn.LSTM(C, 10, batch_first=True, proj_size=6), "sequence", _first),
}  # fmt: skip
_LOOKED: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Embedding(20, C),
    "EmbeddingBag": lambda: nn.EmbeddingBag(20, C),
}
# Classes of torch.nn that are no layers, and what they are.
OTHERS: dict[str, str] = {
    "Module": "the base class of all layers",
    "Container": "an old name of `Module`",
    "RNNBase": "the base class of `RNN`, `LSTM` and `GRU`",
    "RNNCellBase": "the base class of the recurrent cells",
    "Parameter": "a tensor; parameters of your own modules are cut where they meet channels",
    "Buffer": "a tensor; buffers of your own modules are cut where they meet channels",
    "UninitializedParameter": "the parameter of a lazy layer that has not run",
    "UninitializedBuffer": "the buffer of a lazy layer that has not run",
    "LinearCrossEntropyOptions": "options of a loss",
}


def _samples(kind: Any) -> Tensor:
    """Where a fractional pooling pools; drawn anew at each call otherwise."""
    n = 2 if kind is nn.FractionalMaxPool2d else 3
    return torch.rand(_INPUTS[f"{n}d"][0], C, n, generator=torch.Generator().manual_seed(0))


def classes() -> list[str]:
    """The names of all public classes of torch.nn."""
    return [n for n in dir(nn) if not n.startswith("_") and inspect.isclass(getattr(nn, n))]


def is_loss(name: str) -> bool:
    """Whether a class of torch.nn is a loss."""
    return issubclass(getattr(nn, name), losses._Loss) or getattr(nn, name).__module__ == losses.__name__


def layers() -> list[str]:
    """The names of all layers and containers of torch.nn, in order.

    Raises:
        LookupError: torch.nn has a class that this file does not know.
    """
    known = {*CASES, *_LOOKED, *OTHERS}
    if lost := [n for n in classes() if n not in known and not is_loss(n)]:
        raise LookupError(f"torch.nn has classes that scripts/layers.py does not know: {', '.join(lost)}")
    found = []
    for name in classes():
        if name in CASES or name in _LOOKED:
            found += [name, *(v for v in VARIANTS if v.partition(",")[0] == name)]
    return found
