"""FLOPs of every kind of layer against counts by hand, forwards and backwards, fast paths and fused kernels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import flop_registry, register_flop_formula

from pliant.core import cost
from pliant.core.cost import count_flops
from pliant.core.flops import formula_of, is_free

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*RNN module weights.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LSTM with projections.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.triangular_solve:UserWarning"),
]
T = torch.randn
B, L, S, E, H, FF = 2, 6, 7, 8, 2, 20  # batch, queries, keys, width, heads, hidden units
PADDING = torch.tensor([[False] * 3 + [True] * 3, [False] * 4 + [True] * 2])  # 3 and 4 tokens of 6


def attention(batch: int, queries: int, keys: int, width: int) -> int:
    """Scores and values of all heads together."""
    return 2 * 2 * batch * queries * keys * width


def self_attention(batch: int = B, length: int = L, width: int = E) -> int:
    return 2 * batch * length * width * 4 * width + attention(batch, length, length, width)


def encoder_layer(batch: int = B, length: int = L) -> int:
    return self_attention(batch, length) + 2 * batch * length * E * FF * 2


def decoder_layer() -> int:
    cross = 2 * E * E * (B * L + 2 * B * S + B * L) + attention(B, L, S, E)
    return encoder_layer() + cross


def recurrent(gates: int, tokens: int, inputs: int, hidden: int, layers: int = 1, directions: int = 1) -> int:
    widths = [inputs] + [hidden * directions] * (layers - 1)
    return sum(2 * tokens * directions * gates * hidden * (w + hidden) for w in widths)


def mha(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(E, H, **options)


class Call(nn.Module):
    """A function, or a module called with options, as a module."""

    def __init__(self, inner: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, *args: Any) -> Any:
        return self.inner(*args, **self.options)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, H, FF, batch_first=True, dropout=0, **options)


X, Y = T(B, L, E), T(B, S, E)
SEQ = T(5, 3, 4)  # (time, batch, features)
IMAGE, IMAGE_1D, IMAGE_3D = T(2, 4, 9, 9), T(2, 4, 9), T(2, 4, 5, 5, 5)
IDS = torch.randint(0, 10, (3, 7))
Q4, K4, V4 = T(2, 4, 6, 8), T(2, 4, 5, 8), T(2, 4, 5, 3)  # (batch, heads, tokens, width)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], float]] = {
    "linear": (lambda: nn.Linear(5, 7), (T(3, 5),), 2 * 3 * 5 * 7),
    "linear, no bias, 3-D": (lambda: nn.Linear(5, 7, bias=False), (T(2, 3, 5),), 2 * 6 * 5 * 7),
    "linear, one vector": (lambda: nn.Linear(5, 7), (T(5),), 2 * 5 * 7),
    "linear, one vector, no bias": (lambda: nn.Linear(5, 7, bias=False), (T(5),), 2 * 5 * 7),
    # Each output unit is a matrix product of its own, and a dot product behind it.
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), (T(7, 3), T(7, 4)), 2 * 7 * 5 * (3 * 4 + 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (IMAGE_1D,), 2 * 2 * 6 * 4 * 3 * 9),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (IMAGE,), 2 * 2 * 6 * 4 * 9 * 49),
    "conv2d, strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (IMAGE,), 2 * 2 * 6 * 4 * 9 * 25),
    "conv2d, dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (IMAGE,), 2 * 2 * 6 * 4 * 9 * 25),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (IMAGE,), 2 * 2 * 6 * 2 * 9 * 49),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (IMAGE,), 2 * 2 * 4 * 9 * 49),
    "conv2d, unbatched": (lambda: nn.Conv2d(4, 6, 3), (IMAGE[0],), 2 * 6 * 4 * 9 * 49),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (IMAGE,), 2 * 2 * 6 * 4 * 16 * 81),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (IMAGE_3D,), 2 * 2 * 6 * 4 * 8 * 64),
    # Every input position meets the whole kernel.
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (IMAGE_1D,), 2 * 2 * 6 * 4 * 3 * 9),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (IMAGE,), 2 * 2 * 6 * 4 * 9 * 81),
    "transposed 2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (IMAGE,), 2 * 2 * 3 * 4 * 9 * 81),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (IMAGE_3D,), 2 * 2 * 6 * 4 * 8 * 125),
    "conv_tbc": (lambda: Call(torch.conv_tbc), (T(9, 2, 4), T(3, 4, 6), T(6)), 2 * 2 * 7 * 3 * 4 * 6),
    "embedding": (lambda: nn.Embedding(10, 6), (IDS,), 0),
    "bag": (lambda: nn.EmbeddingBag(10, 6), (IDS,), 0),
    "weighted bag": (lambda: nn.EmbeddingBag(10, 6, mode="sum"), (IDS, None, torch.rand(3, 7)), 0),
    "attention": (mha, (X.mT.mT.transpose(0, 1),) * 3, self_attention()),
    "attention, batch first": (lambda: mha(batch_first=True), (X, X, X), self_attention()),
    "attention, no weights": (
        lambda: Call(mha(batch_first=True), need_weights=False), (X, X, X), self_attention(),
    ),
    "attention, no bias": (lambda: mha(batch_first=True, bias=False), (X, X, X), self_attention()),
    "attention, one bias more": (
        lambda: mha(batch_first=True, add_bias_kv=True, add_zero_attn=True), (X, X, X),
        self_attention() - attention(B, L, L, E) + attention(B, L, L + 2, E),
    ),
    "attention, padding": (lambda: Call(mha(batch_first=True), key_padding_mask=PADDING), (X, X, X), self_attention()),
    "attention, causal": (
        lambda: Call(mha(batch_first=True), need_weights=False, is_causal=True,
                     attn_mask=nn.Transformer.generate_square_subsequent_mask(L)),
        (X, X, X), self_attention(),
    ),
    "attention, cross": (
        lambda: mha(batch_first=True), (X, Y, Y), 2 * E * E * (B * L + 2 * B * S + B * L) + attention(B, L, S, E),
    ),
    "attention, kdim, vdim": (
        lambda: mha(batch_first=True, kdim=5, vdim=3), (X, T(B, S, 5), T(B, S, 3)),
        2 * E * (2 * B * L * E + B * S * 5 + B * S * 3) + attention(B, L, S, E),
    ),
    "encoder layer": (layer, (X,), encoder_layer()),
    "encoder layer, gelu, norm first": (lambda: layer(norm_first=True, activation="gelu"), (X,), encoder_layer()),
    "encoder layer, no bias": (lambda: layer(bias=False), (X,), encoder_layer()),
    "encoder layer, padding": (lambda: Call(layer(), src_key_padding_mask=PADDING), (X,), encoder_layer()),
    "encoder": (lambda: nn.TransformerEncoder(layer(), 3), (X,), 3 * encoder_layer()),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(E, H, FF, batch_first=True, dropout=0), (X, Y), decoder_layer(),
    ),
    "transformer": (
        lambda: nn.Transformer(E, H, 2, 3, FF, batch_first=True, dropout=0), (Y, X),
        2 * encoder_layer(B, S) + 3 * decoder_layer(),
    ),
    "rnn": (lambda: nn.RNN(4, 6), (SEQ,), recurrent(1, 15, 4, 6)),
    "rnn, relu": (lambda: nn.RNN(4, 6, nonlinearity="relu"), (SEQ,), recurrent(1, 15, 4, 6)),
    "lstm": (lambda: nn.LSTM(4, 6), (SEQ,), recurrent(4, 15, 4, 6)),
    "lstm, no bias": (lambda: nn.LSTM(4, 6, bias=False), (SEQ,), recurrent(4, 15, 4, 6)),
    "lstm, batch first": (lambda: nn.LSTM(4, 6, batch_first=True), (SEQ,), recurrent(4, 15, 4, 6)),
    "lstm, unbatched": (lambda: nn.LSTM(4, 6), (SEQ[:, 0],), recurrent(4, 5, 4, 6)),
    "lstm, deep, both ways": (
        lambda: nn.LSTM(4, 6, num_layers=3, bidirectional=True, dropout=0.1), (SEQ,), recurrent(4, 15, 4, 6, 3, 2),
    ),
    "lstm, projected": (
        lambda: nn.LSTM(4, 6, num_layers=2, proj_size=3), (SEQ,),
        2 * 15 * (4 * 6 * (4 + 3) + 3 * 6) + 2 * 15 * (4 * 6 * (3 + 3) + 3 * 6),
    ),
    "lstm, packed": (
        lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True), (pack_padded_sequence(SEQ, [5, 4, 2]),),
        recurrent(4, 11, 4, 6, 2, 2),
    ),
    "gru": (lambda: nn.GRU(4, 6), (SEQ,), recurrent(3, 15, 4, 6)),
    "gru, deep, both ways": (
        lambda: nn.GRU(4, 6, num_layers=2, bidirectional=True), (SEQ,), recurrent(3, 15, 4, 6, 2, 2),
    ),
    "gru, packed": (lambda: nn.GRU(4, 6), (pack_padded_sequence(SEQ, [5, 4, 2]),), recurrent(3, 11, 4, 6)),
    "rnn cell": (lambda: nn.RNNCell(4, 6), (SEQ[0],), recurrent(1, 3, 4, 6)),
    "lstm cell": (lambda: nn.LSTMCell(4, 6), (SEQ[0],), recurrent(4, 3, 4, 6)),
    "gru cell": (lambda: nn.GRUCell(4, 6), (SEQ[0],), recurrent(3, 3, 4, 6)),
    "sdpa": (lambda: Call(F.scaled_dot_product_attention), (Q4, K4, K4), attention(2, 6, 5, 4 * 8)),
    "sdpa, narrow values": (
        lambda: Call(F.scaled_dot_product_attention), (Q4, K4, V4), 2 * 2 * 4 * 6 * 5 * (8 + 3),
    ),
    "sdpa, causal": (
        lambda: Call(F.scaled_dot_product_attention, is_causal=True), (Q4, Q4, Q4), attention(2, 6, 6, 4 * 8),
    ),
    "sdpa, mask": (
        lambda: Call(F.scaled_dot_product_attention, attn_mask=T(6, 5)), (Q4, K4, K4), attention(2, 6, 5, 4 * 8),
    ),
    "sdpa, shared heads": (
        lambda: Call(F.scaled_dot_product_attention, enable_gqa=True), (Q4, K4[:, :2], K4[:, :2]),
        attention(2, 6, 5, 4 * 8),
    ),
    "mm": (lambda: Call(torch.mm), (T(3, 4), T(4, 5)), 2 * 3 * 4 * 5),
    "mv": (lambda: Call(torch.mv), (T(3, 4), T(4)), 2 * 3 * 4),
    "dot": (lambda: Call(torch.dot), (T(9), T(9)), 2 * 9),
    "outer": (lambda: Call(torch.outer), (T(9), T(8)), 0),
    "bmm": (lambda: Call(torch.bmm), (T(2, 3, 4), T(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "addbmm": (lambda: Call(torch.addbmm), (T(3, 5), T(2, 3, 4), T(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "addmv": (lambda: Call(torch.addmv), (T(3), T(3, 4), T(4)), 2 * 3 * 4),
    "baddbmm": (lambda: Call(torch.baddbmm), (T(2, 3, 5), T(2, 3, 4), T(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "in place": (
        lambda: Call(lambda o, a, b: o.clone().addmm_(a, b)), (T(3, 5), T(3, 4), T(4, 5)), 2 * 3 * 4 * 5,
    ),
    "matmul, broadcast": (lambda: Call(torch.matmul), (T(2, 1, 3, 4), T(6, 4, 5)), 2 * 12 * 3 * 4 * 5),
    "matmul, complex": (
        lambda: Call(torch.matmul), (T(3, 4, dtype=torch.complex64), T(4, 5, dtype=torch.complex64)), 8 * 3 * 4 * 5,
    ),
    "einsum": (lambda: Call(lambda a, b: torch.einsum("bij,bjk->bik", a, b)), (T(2, 3, 4), T(2, 4, 5)), 2 * 2 * 60),
    "einsum, outer": (lambda: Call(lambda a, b: torch.einsum("i,j->ij", a, b)), (T(3), T(4)), 0),
    "tensordot": (lambda: Call(lambda a, b: torch.tensordot(a, b, 2)), (T(3, 4, 5), T(4, 5, 6)), 2 * 3 * 20 * 6),
    "cdist, small": (lambda: Call(torch.cdist), (T(3, 4), T(5, 4)), 2 * 3 * 5 * 4),
    "cdist, p=1": (lambda: Call(lambda a, b: torch.cdist(a, b, p=1.0)), (T(2, 3, 4), T(2, 5, 4)), 2 * 2 * 3 * 5 * 4),
    # From 25 rows on: the squares of both sides stand in two more columns.
    "cdist, large": (lambda: Call(torch.cdist), (T(30, 4), T(40, 4)), 2 * 30 * 40 * (4 + 2)),
    "pdist": (lambda: Call(torch.pdist), (T(5, 4),), 2 * 10 * 4),
    "fft": (lambda: Call(torch.fft.fft), (T(3, 16, dtype=torch.complex64),), 3 * 5 * 16 * 4),
    "rfft": (lambda: Call(torch.fft.rfft), (T(3, 16),), 3 * 2.5 * 16 * 4),
    "irfft": (lambda: Call(torch.fft.irfft), (T(3, 9, dtype=torch.complex64),), 3 * 2.5 * 16 * 4),
    "solve": (lambda: Call(torch.linalg.solve), (T(2, 6, 6), T(2, 6, 3)), round(2 * (2 * 6**3 / 3 + 2 * 36 * 3))),
    "inverse": (lambda: Call(torch.linalg.inv), (T(2, 6, 6),), 2 * 2 * 6**3),
    "cholesky": (lambda: Call(torch.linalg.cholesky), (torch.eye(6),), 6**3 / 3),
    "triangular": (
        lambda: Call(lambda a, b: torch.linalg.solve_triangular(a, b, upper=True)), (torch.eye(6), T(6, 2)), 36 * 2,
    ),
    "determinant": (lambda: Call(torch.linalg.det), (T(6, 6),), 2 * 6**3 / 3),
    "qr": (lambda: Call(torch.linalg.qr), (T(8, 6),), 2 * (2 * 8 * 36 - 2 * 6**3 / 3)),
    "norms, pools, activations": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(9), nn.LocalResponseNorm(2), nn.InstanceNorm2d(4),
            nn.GELU(), nn.PReLU(), nn.Softmax(1), nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bicubic"),
            nn.ReflectionPad2d(1), nn.LPPool2d(2, 2), nn.AdaptiveAvgPool2d(3), nn.PixelShuffle(2), nn.RMSNorm(6),
            nn.Dropout(),
        ),
        (IMAGE,), 0,
    ),
}  # fmt: skip


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.to_padded_tensor(0.0) if output.is_nested else output]
    if isinstance(output, PackedSequence):
        return [output.data]
    return [t for part in output if part is not None for t in flat(part)]


@pytest.mark.parametrize("name", CASES)
def test_every_layer_by_hand(name: str) -> None:
    """In evaluation by its fast path, in inference mode, in training mode, quickly; what is computed stays the same."""
    make, args, expected = CASES[name]
    torch.manual_seed(0)
    module = make().eval()
    exact = round(expected)
    seen: list[Any] = []
    assert count_flops(lambda: seen.append(module(*args))) == cost.Flops(exact, exact)
    assert count_flops(lambda: module(*args), nonzero=False) == cost.Flops(exact, exact)
    with torch.no_grad():
        plain = module(*args)
    assert all(torch.equal(a, b) for a, b in zip(flat(seen[0]), flat(plain), strict=True))
    with torch.inference_mode():
        assert count_flops(lambda: seen.append(module(*args))).total == exact
        # PyTorch sums a batch of matrices in another order here as soon as any dispatch mode is on.
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(flat(seen[1]), flat(module(*args)), strict=True))
    module.train()
    assert count_flops(lambda: module(*args)).total == exact
    assert count_flops(lambda: module(*args), backward=True).total == exact


ON_META = [n for n in CASES if not any(w in n for w in ("padding", "packed", "causal", "cdist, large", "mask"))]


@pytest.mark.parametrize("name", ON_META)
def test_counts_without_numbers(name: str) -> None:
    """On the meta device, where a search counts its candidates."""
    make, args, expected = CASES[name]
    module = make().eval().to("meta")
    moved = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    for nonzero in (False, True):
        assert count_flops(lambda: module(*moved), nonzero=nonzero).total == round(expected)


def test_padding_in_the_fast_path_is_counted_as_it_is_computed() -> None:
    """The encoder drops padding: projections of real tokens alone, scores among as many as the longest row has."""
    encoder = nn.TransformerEncoder(layer(), 2).eval()
    tokens, longest = 3 + 4, 4
    one = 2 * tokens * E * (4 * E + 2 * FF) + attention(B, longest, longest, E)
    counted = count_flops(lambda: encoder(X, src_key_padding_mask=PADDING))
    assert counted == cost.Flops(2 * one, 2 * one)
    assert count_flops(lambda: encoder(X, src_key_padding_mask=PADDING), nonzero=False).total == 2 * one
    encoder.use_nested_tensor = False
    assert count_flops(lambda: encoder(X, src_key_padding_mask=PADDING)).total == 2 * encoder_layer()


def products(function: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that a profiler sees inside of fused operators on CPU."""
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        function()
    found = 0
    for event in profile.events():
        shapes = [s for s in event.input_shapes if len(s) > 1]
        if event.name in ("aten::mm", "aten::addmm", "aten::_addmm_activation", "aten::bmm") and shapes:
            found += 2 * math.prod(shapes[0]) * shapes[1][-1]
    return found


def test_fused_operators_against_the_profiler() -> None:
    nested = torch.nested.nested_tensor([T(2, E), T(5, E)])
    attend, encoder = mha(batch_first=True).eval(), nn.TransformerEncoder(layer(), 2).eval()
    heads = torch.nested.nested_tensor([T(H, 4, E), T(H, 3, E)])
    functions: list[Callable[[], Any]] = [
        lambda: attend(X, X, X),
        lambda: attend(nested, nested, nested, need_weights=False),
        lambda: encoder(X),
        lambda: encoder(X, src_key_padding_mask=PADDING),
        lambda: F.scaled_dot_product_attention(heads, heads, heads),
        lambda: torch.bmm(nested, torch.nested.nested_tensor([T(E, 3), T(E, 6)])),
        lambda: encoder.layers[0].linear1(nested),
        lambda: torch.cdist(T(30, 4), T(40, 4)),
        lambda: nn.Bilinear(3, 4, 5)(T(7, 3), T(7, 4)),
    ]
    for i, function in enumerate(functions):
        assert count_flops(function).total == products(function) > 0, i
        with torch.inference_mode():
            assert count_flops(function).total == products(function), i


def test_jagged_tensors_count_their_tokens() -> None:
    jagged = torch.nested.nested_tensor([T(2, E), T(5, E)], layout=torch.jagged)
    linear = nn.Linear(E, 3)
    assert count_flops(lambda: linear(jagged)).total == 2 * 7 * E * 3
    assert count_flops(lambda: linear(jagged).values().sum().backward(), backward=True).total == 2 * 2 * 7 * E * 3


# -- backwards --------------------------------------------------------------------------------------------------------


def step(module: nn.Module, *args: Any, inputs: bool = True) -> cost.Flops:
    """One forward and one backward pass, with gradients of the floating-point inputs as well or not."""
    for a in args:
        if isinstance(a, Tensor) and a.is_floating_point():
            a.requires_grad_(inputs).grad = None

    def run() -> None:
        outputs = [o for o in flat(module(*args)) if o.requires_grad]
        sum((o.square().sum() for o in outputs), torch.zeros(())).backward()

    counted = count_flops(run, backward=True)
    assert count_flops(run, nonzero=False, backward=True).total == counted.total
    assert counted.unknown == ()
    return counted


THREEFOLD = [
    "linear", "linear, no bias, 3-D", "embedding", "norms, pools, activations", "mm", "bmm", "addbmm", "baddbmm",
    "matmul, broadcast", "einsum", "attention", "attention, batch first", "attention, cross", "attention, kdim, vdim",
    "lstm", "lstm, no bias", "lstm, deep, both ways",
    *(n for n in CASES if n.startswith(("conv1d", "conv2d", "conv3d", "transposed"))),
]  # fmt: skip


@pytest.mark.parametrize("name", THREEFOLD)
def test_two_gradients_for_each_product(name: str) -> None:
    """Each product has a gradient for each of its factors, so that a step costs three times the forward pass."""
    make, args, expected = CASES[name]
    copies = {id(a): a.clone() for a in args if isinstance(a, Tensor)}
    assert step(make().train(), *(copies.get(id(a), a) for a in args)).total == 3 * expected


def test_gradients_of_weights_alone() -> None:
    for name in ("linear", "conv2d", "conv2d, groups", "transposed 2d, groups"):
        make, args, expected = CASES[name]
        assert step(make(), *(a.clone() for a in args), inputs=False).total == 2 * expected, name
    frozen = nn.Conv2d(4, 6, 3, groups=2).requires_grad_(False)
    assert step(frozen, IMAGE.clone()).total == 2 * CASES["conv2d, groups"][2]


def test_fused_attention_backwards_by_hand() -> None:
    """Five products: the scores once more, and the gradients of both factors of the two."""
    q, k, v = Q4.clone(), K4.clone(), K4.clone()
    product = 2 * 2 * 4 * 6 * 5 * 8
    assert step(Call(F.scaled_dot_product_attention), q, k, v).total == (2 + 5) * product
    x = X.clone()
    linear, square = 2 * B * L * E * 4 * E, 2 * B * L * L * E
    module = Call(mha(batch_first=True), need_weights=False).train()
    assert step(module, x, x, x).total == 3 * linear + (2 + 5) * square


def test_recurrent_backwards_by_hand() -> None:
    """The state before the first step is a constant in a GRU; the fused LSTM kernel asks for its gradient too."""
    tokens, inputs, hidden = 15, 4, 6
    of_input, of_state = 2 * tokens * 3 * hidden * inputs, 2 * tokens * 3 * hidden * hidden
    assert step(nn.GRU(4, 6), SEQ.clone()).total == 3 * of_input + 3 * of_state - of_state // 5
    assert step(nn.LSTM(4, 6), SEQ.clone()).total == 3 * recurrent(4, 15, 4, 6)


# -- weights that are zero --------------------------------------------------------------------------------------------


def test_each_product_is_weighed_by_its_own_weight() -> None:
    attend, square = mha(batch_first=True).eval(), attention(B, L, L, E)
    projection = 2 * B * L * E * E
    with torch.no_grad():
        attend.in_proj_weight[:E] = 0  # all queries
        attend.out_proj.weight[: E // 4] = 0
    counted = count_flops(lambda: attend(X, X, X))
    assert counted.total == self_attention()
    assert counted.nonzero == 2 * projection + projection * 3 // 4 + square

    encoder = layer().eval()
    with torch.no_grad():
        encoder.linear1.weight[: FF // 2] = 0
        encoder.self_attn.out_proj.weight.zero_()
    counted = count_flops(lambda: encoder(X))
    assert counted.total - counted.nonzero == projection + B * L * E * FF

    lstm = nn.LSTM(4, 6, bidirectional=True)
    with torch.no_grad():
        lstm.weight_hh_l0[:6] = 0
    counted = count_flops(lambda: lstm(SEQ))
    assert counted.total - counted.nonzero == 2 * 15 * 6 * 6
    counted = count_flops(lambda: lstm(SEQ)[0].sum().backward(), backward=True)
    assert counted.total - counted.nonzero == 2 * (2 * 15 * 6 * 6)  # the gradient of the weight looks at no weight

    bilinear = nn.Bilinear(3, 4, 5)
    with torch.no_grad():
        bilinear.weight[:2] = 0
    counted = count_flops(lambda: bilinear(T(7, 3), T(7, 4)))
    assert counted.total - counted.nonzero == 2 * 7 * 2 * 3 * 4

    transposed = nn.ConvTranspose2d(4, 6, 3)
    with torch.no_grad():
        transposed.weight[0] = 0
    assert count_flops(lambda: transposed(IMAGE)).nonzero == 2 * 2 * 6 * 3 * 9 * 81


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_sparse_factors_count_what_they_hold() -> None:
    a = torch.eye(6)
    a[0, 3] = 1  # 7 numbers
    for layout in (torch.sparse_coo, torch.sparse_csr):
        s = a.to_sparse(layout=layout)
        for quick in (True, False):
            assert count_flops(lambda s=s: s @ torch.ones(6, 5), nonzero=quick).total == 2 * 7 * 5, layout  # type: ignore[misc]
        assert count_flops(lambda s=s: torch.sparse.mm(s, torch.ones(6, 5))).total == 2 * 7 * 5  # type: ignore[misc]
        assert count_flops(lambda s=s: torch.addmm(torch.ones(6, 5), s, torch.ones(6, 5))).total == 70  # type: ignore[misc]
    s = a.to_sparse_coo()
    # Row 0 of the product: 1 * 1 + 1 * 1 and 1 * 1, every other row one.
    assert count_flops(lambda: torch.sparse.mm(s, s)).total == 2 * (2 + 1 + 5)
    pattern = a.to_sparse_csr()
    assert count_flops(lambda: torch.sparse.sampled_addmm(pattern, T(6, 3), T(3, 6))).total == 2 * 7 * 3


# -- wider is dearer --------------------------------------------------------------------------------------------------

WIDTHS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "linear": lambda w: lambda: nn.Linear(w, 3)(T(2, w)),
    "conv": lambda w: lambda: nn.Conv2d(2, w, 3)(T(1, 2, 5, 5)),
    "attention": lambda w: lambda: mha_of(w)(T(1, 3, w), *[T(1, 3, w)] * 2),
    "encoder": lambda w: lambda: nn.TransformerEncoderLayer(8, 2, w, batch_first=True).eval()(T(1, 3, 8)),
    "lstm": lambda w: lambda: nn.LSTM(3, w)(T(4, 1, 3)),
    "gru": lambda w: lambda: nn.GRU(3, w)(T(4, 1, 3)),
    "bilinear": lambda w: lambda: nn.Bilinear(3, w, 2)(T(4, 3), T(4, w)),
    "sdpa": lambda w: lambda: F.scaled_dot_product_attention(*[T(1, 2, 3, w)] * 3),
    "cdist": lambda w: lambda: torch.cdist(T(3, w), T(4, w)),
}


def mha_of(width: int) -> nn.Module:
    return nn.MultiheadAttention(width, 1, batch_first=True).eval()


@pytest.mark.parametrize("kind", WIDTHS)
@settings(max_examples=10, deadline=None)
@given(narrow=st.integers(1, 12), more=st.integers(1, 12))
def test_wider_is_dearer(kind: str, narrow: int, more: int) -> None:
    small, large = (count_flops(WIDTHS[kind](w)).total for w in (narrow, narrow + more))
    assert 0 < small < large


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_cost_whichever_attention_runs(family: str) -> None:
    """The fused kernel and the matrix products written out are the same products; backwards the kernel has one more."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if family == "bert":
        config: Any = transformers.BertConfig(vocab_size=50, **sizes)
    else:
        config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)
    ids = torch.randint(0, 50, (2, 12))
    counts, steps = [], []
    for kind in ("sdpa", "eager"):
        model = transformers.AutoModel.from_config(config, attn_implementation=kind).eval()
        counts.append(count_flops(lambda m=model: m(ids)))  # type: ignore[misc]
        steps.append(count_flops(lambda m=model: m(ids)[0].square().sum().backward(), backward=True))  # type: ignore[misc]
    assert counts[0].total == counts[1].total
    tokens, keys = 24, {"bert": 32, "llama": 16}[family]
    feed_forward = {"bert": 2, "llama": 3}[family] * 2 * tokens * 32 * 64
    layers = 2 * (2 * tokens * 32 * (2 * 32 + 2 * keys) + attention(2, 12, 12, 32) + feed_forward)
    pooler = {"bert": 2 * 2 * 32 * 32, "llama": 0}[family]
    rotations = {"bert": 0, "llama": 2 * 12 * 4}[family]  # positions times frequencies, once
    assert counts[0].total - layers - pooler in (0, rotations, 2 * rotations)
    assert steps[0].total - steps[1].total in (0, attention(2, 12, 12, 32))  # half of two layers
    assert not any(c.unknown for c in (*counts, *steps))


# -- what is not known ------------------------------------------------------------------------------------------------


@pytest.fixture
def mystery() -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    @torch.library.custom_op("pliant_test::mystery", mutates_args=())
    def product(x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    yield product
    flop_registry.pop(torch.ops.pliant_test.mystery, None)


def test_an_unknown_operator_is_named(mystery: Callable[[Tensor, Tensor], Tensor]) -> None:
    large, small = (T(32, 32), T(32, 32)), (T(16, 32), T(32, 16))
    for nonzero in (True, False):
        with pytest.warns(UserWarning, match=r"pliant_test::mystery.* count 0"):
            counted = count_flops(lambda: mystery(*large) @ large[0], nonzero=nonzero)
        assert counted == cost.Flops(2 * 32**3, 2 * 32**3, ("pliant_test::mystery",))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert count_flops(lambda: mystery(*small), nonzero=nonzero) == cost.Flops(0, 0)
    model = Call(lambda x: mystery(x, x))
    with pytest.warns(UserWarning, match="mystery"):
        assert cost.flops_per_sample(model, large[0]).unknown == ("pliant_test::mystery",)
    register_flop_formula(torch.ops.pliant_test.mystery)(lambda x, y, **_: 2 * x[0] * x[1] * y[1])
    assert count_flops(lambda: mystery(*large)) == cost.Flops(2 * 32**3, 2 * 32**3)


def test_factorisations_without_a_formula_are_named() -> None:
    with pytest.warns(UserWarning, match="_linalg_svd"):
        assert count_flops(lambda: torch.linalg.svdvals(T(40, 40))).unknown == ("aten::_linalg_svd",)


def test_what_multiplies_is_never_taken_for_free() -> None:
    """Every operator of PyTorch whose name speaks of a product has a formula, or is not called free."""
    words = ("mm", "matmul", "convolution", "attention", "conv2d", "linear", "rnn_layer", "_cudnn_rnn", "bmm")
    harmless = (
        "prepack",
        "unpack",
        "flatten",
        "reorder",
        "upsample",
        "linear1d",
        "bilinear",
        "trilinear",
        "weight_norm",
    )
    checked = 0
    for name in torch._C._dispatch_get_all_op_names():
        space, rest = name.split("::")
        base, _, overload = rest.partition(".")
        if space not in ("aten", "quantized", "mkldnn", "onednn") or any(h in base for h in harmless):
            continue
        try:
            operator = getattr(getattr(getattr(torch.ops, space), base), overload or "default")
        except AttributeError:
            continue
        if any(base.endswith(w) or f"{w}_" in base for w in words) and "gamma" not in base and "comm" not in base:
            assert formula_of(operator) is not None or not is_free(operator), name
            checked += 1
    assert checked > 100


# -- what PyTorch runs in other ways ----------------------------------------------------------------------------------


def test_compiled_modules_count_what_they_were_made_from() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x, expected = T(3, 8), 2 * 3 * (8 * 16 + 16 * 4)
    with torch.no_grad():
        for fullgraph in (False, True):
            compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
            assert count_flops(lambda: compiled(x)).total == expected  # noqa: B023
            assert torch.equal(compiled(x), model(x))
            assert count_flops(lambda: compiled(x), nonzero=False).total == expected  # noqa: B023
    scripted = torch.jit.trace(model, x)
    assert count_flops(lambda: scripted(x)).total == expected


def test_operators_that_take_functions() -> None:
    x = T(6, 6)

    def twice(a: Tensor) -> Tensor:
        return a @ a @ a

    def once(a: Tensor) -> Tensor:
        return a @ a

    for chosen, expected in ((True, 2), (False, 1)):
        flag = torch.tensor(chosen)
        assert count_flops(lambda: torch.cond(flag, twice, once, (x,))).total == expected * 2 * 6**3  # noqa: B023
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    q = T(1, 2, 128, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        assert count_flops(lambda: flex(q, q, q)).total == attention(1, 128, 128, 32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_layers() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantized kernels on this machine")
    model = nn.Sequential(nn.Linear(8, 4), nn.LSTM(4, 6, num_layers=2, bidirectional=True))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM})
    counted = count_flops(lambda: quantized(T(5, 3, 8)))
    assert counted.total == 2 * 15 * 8 * 4 + recurrent(4, 15, 4, 6, 2, 2)
    assert counted.unknown == ()


def test_formulas_of_operators_of_other_machines() -> None:
    """Called with the arguments of their schemas, on shapes by hand: cuDNN's recurrent layer and its relatives."""

    def flops(name: str, *args: Any, result: Any = None, **options: Any) -> float:
        space, _, base = name.rpartition("::")
        packet = getattr(getattr(torch.ops, space or "aten"), base)
        operator = getattr(packet, packet.overloads()[0])
        return sum(f for f, _ in formula_of(operator)(*args, **options, result=result))  # type: ignore[misc]

    weights = [T(24, 4), T(24, 6), T(24), T(24)]
    assert flops("_cudnn_rnn", SEQ, weights, 4, None) == recurrent(4, 15, 4, 6)
    for mask, times in (([True] * 3 + [False], 1), ([True] * 4, 2)):
        assert flops("_cudnn_rnn_backward", SEQ, weights, 4, mask) == times * recurrent(4, 15, 4, 6)
    w = T(6, 2, 3, 3)
    out = T(2, 6, 7, 7)
    assert (
        flops("cudnn_convolution", IMAGE, w, [0, 0], [1, 1], [1, 1], 2, True, result=out) == CASES["conv2d, groups"][2]
    )
    q, k = T(2, 6, 4, 8), T(2, 5, 4, 8)  # (batch, tokens, heads, width)
    assert flops("_flash_attention_forward", q, k, k, None, None, 6, 5, 0.0, False, False) == attention(2, 6, 5, 32)
    backward = flops("_flash_attention_backward", q, q, k, k, q, None, None, None, 6, 5, 0.0, False, None, None)
    assert backward == attention(2, 6, 5, 32) * 5 // 2
    packed, offsets = T(7, 4, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    expected = 2 * 2 * (3 * 3 + 4 * 4) * 32
    assert flops("_flash_attention_forward", packed, packed, packed, offsets, offsets, 4, 4) == expected
    assert (
        flops("_efficient_attention_forward", packed[None], packed[None], packed[None], None, offsets, offsets, 4, 4)
        == expected
    )
    groups = torch.tensor([2, 7], dtype=torch.int32)
    assert flops("_grouped_mm", T(7, 3), T(2, 3, 5), groups) == 2 * 7 * 3 * 5
    assert flops("_weight_int4pack_mm", T(3, 8), torch.zeros(1, dtype=torch.int32), 32, T(1), result=T(3, 5)) == 240
    assert flops("_efficient_attention_backward", q, q, k, k, None, q, None, None, 6, 5) == backward
    assert flops("_lstm_mps", SEQ, [], weights) == recurrent(4, 15, 4, 6)
    x, a, b = T(5, 8), T(4, 8), T(8, 3)
    for name in ("_sparse_semi_structured_mm", "_sparse_semi_structured_addmm"):  # half of 16 columns is stored
        first = (T(3),) if "addmm" in name else ()
        assert flops(name, *first, a, torch.zeros(1), T(16, 3)) == 2 * 4 * 8 * 3
    assert flops("_sparse_semi_structured_linear", T(5, 16), a, torch.zeros(1)) == 2 * 5 * 4 * 8
    assert flops("inductor::_mm_plus_mm", a, b, T(4, 2), T(2, 3)) == 2 * 4 * 8 * 3 + 2 * 4 * 2 * 3
    assert flops("mkldnn_linear_backward", x, T(5, 4), a, [True, True, True]) == 2 * 2 * 5 * 4 * 8
    assert flops("mkldnn_linear_backward", x, T(5, 4), a, [False, True, True]) == 2 * 5 * 4 * 8
    assert flops("mkldnn_linear_backward_input", [5, 8], T(5, 4), a) == 2 * 5 * 4 * 8
    assert flops("mkldnn_linear_backward_weights", T(5, 4), x, a, True) == 2 * 5 * 4 * 8
    conv = CASES["conv2d, groups"][2]
    assert flops("mkldnn::_convolution_pointwise", IMAGE, w, T(6), [0, 0], [1, 1], [1, 1], 2, "", result=out) == conv
    assert flops("mkldnn::_convolution_pointwise", IMAGE, out, w, T(6), [0, 0], [1, 1], result=out) == conv
    assert flops("mkldnn::_convolution_pointwise_", out, IMAGE, w, T(6), [0, 0], [1, 1], result=out) == conv
    assert flops("onednn::qconv_pointwise", IMAGE, 1.0, 0, w, T(1), result=out) == conv
    assert flops("slow_conv_transpose2d", IMAGE, T(4, 6, 3, 3), [3, 3]) == CASES["transposed 2d"][2]

    class Packed:
        def __init__(self, weight: Tensor) -> None:
            self.weight = weight

        def unpack(self) -> tuple[Tensor, None]:
            return self.weight, None

    for name in ("conv1d", "conv2d", "conv3d"):
        assert flops(f"quantized::{name}", IMAGE, Packed(w), result=out) == conv
    assert flops("quantized::conv_transpose2d", IMAGE, Packed(T(4, 6, 3, 3)), result=out) == CASES["transposed 2d"][2]
    state, cell = T(3, 6), "quantized::quantized_{}_cell_dynamic"
    assert flops(cell.format("lstm"), SEQ[0], [state, state]) == recurrent(4, 3, 4, 6)
    assert flops(cell.format("gru"), SEQ[0], state) == recurrent(3, 3, 4, 6)
    assert flops(cell.format("rnn_tanh"), SEQ[0], state) == recurrent(1, 3, 4, 6)
    options = (True, 2, 0.0, False, True, False)
    gru = flops("quantized_gru", SEQ, T(4, 3, 6), [], *options, result=(T(5, 3, 12), T(4, 3, 6)))
    assert gru == recurrent(3, 15, 4, 6, 2, 2)


def test_rarer_operators_as_they_run() -> None:
    square, sides = torch.eye(6), T(6, 3)
    factor, pivots = torch.linalg.lu_factor(square)
    for function, expected in (
        (lambda: torch._foreach_mm([T(3, 4)] * 2, [T(4, 5)] * 2), 2 * 2 * 60),
        (lambda: torch.linalg.lu_solve(factor, pivots, sides), 2 * 36 * 3),
        (lambda: torch.cholesky_solve(sides, square), 2 * 36 * 3),
        (lambda: torch.triangular_solve(sides, square), 36 * 3),
        (lambda: torch.cholesky_inverse(square), 2 * 6**3 / 3),
        (lambda: torch.linalg.householder_product(T(8, 6), T(6)), 2 * 8 * 36 - 2 * 6**3 / 3),
    ):
        assert count_flops(function).total == round(expected)
    assert step(Call(lambda a, b: torch.cdist(a, b, p=1.0)), T(3, 4), T(5, 4)).total == 3 * 2 * 3 * 5 * 4
    assert step(Call(torch.pdist), T(5, 4)).total == 3 * 2 * 10 * 4
