"""What pliant accepts: every layer of torch.nn and small models of many families, as docs/accepts.md lists them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
pytest.importorskip("transformers")

import accepts  # noqa: E402
import layers  # noqa: E402
from families import FAMILIES  # noqa: E402

from pliant.core.slicing import Slicing  # noqa: E402

# Layers through which channels are not cut as they stand: everything else must be cut through.
BOTH = {
    *("Linear", "LazyLinear", "Sequential", "ModuleList", "ModuleDict", "DataParallel"),
    *(f"{lazy}Conv{transposed}{n}d" for lazy in ("", "Lazy") for transposed in ("", "Transpose") for n in (1, 2, 3)),
    *("Conv2d, reflected border", "Conv2d, circular border"),
}
ENTERS = {
    *("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "LSTM, both directions", "LSTM, projected"),
    "AdaptiveLogSoftmaxWithLoss",
}
LEAVES = {"Embedding", "EmbeddingBag", "Bilinear"}
WHOLE = {
    "Conv2d, weight_norm": "parametrisation",
    "Linear, spectral_norm": "parametrisation",
    "CosineSimilarity": "over them",
    "PairwiseDistance": "over them",
    "CrossMapLRN2d": "cannot be followed",
    "LocalResponseNorm": "over them",
    "LayerNorm, over (channels, height, width)": "several dimensions",
    "LogSoftmax": "over them",
    "Softmax": "over them",
    "Softmax2d": "over them",
    "Softmin": "over them",
    "MultiheadAttention, keys of another width": "a width of their own",
    "Unflatten": "fix their number",
}
COUNTED = ("Linear", "Conv", "Bilinear", "MultiheadAttention", "Transformer", "RNN", "LSTM", "GRU")
FAST = ("DistilBERT", "GPT-2", "Llama", "ViT", "ConvNeXt", "ResNet", "OPT", "Qwen2")


def status_of(name: str) -> str:
    for status, names in (("both", BOTH), ("enters", ENTERS), ("leaves", LEAVES), ("whole", WHOLE)):
        if name in names:
            return status
    return "through"


def test_no_class_of_torch_nn_is_forgotten() -> None:
    kinds = {n.partition(",")[0] for n in layers.layers()}
    assert kinds | set(layers.OTHERS) | {n for n in layers.classes() if layers.is_loss(n)} == set(layers.classes())


@pytest.mark.parametrize("name", layers.layers())
def test_layer(name: str) -> None:
    row = accepts.try_layer(name)
    assert row.wrong == []
    assert row.status == status_of(name), row.reason
    assert WHOLE.get(name, "") in row.reason
    assert not row.flops.startswith("unknown")
    if name.partition(",")[0].removeprefix("Lazy").startswith(COUNTED):
        assert row.flops == "counted"


@pytest.mark.parametrize("name", FAST)
def test_family(name: str) -> None:
    row = accepts.try_model(name, train=False)
    assert row.wrong == []
    assert not row.refused
    assert not row.whole
    assert row.groups >= 6
    assert row.parameters[0] < 0.45


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    row = accepts.try_model(name)
    assert row.wrong == []
    assert not row.refused
    assert row.groups
    assert row.unknown == ()


class Queries(nn.Module):
    """The stream starts as zeros of the size of a stored embedding, which a layer reads: as in the decoder of DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(5, 8)
        self.read, self.value, self.out, self.head = (nn.Linear(i, o) for i, o in ((4, 8), (8, 6), (6, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        places = self.places.weight
        stream = torch.zeros_like(places)
        stream = stream + self.out(torch.tanh(self.value(stream)))
        return self.head(stream + places + self.read(x)[:, None])


class Border(nn.Module):
    """What is put around a channel is gone with the channel, also where the next function makes something of it."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.sigmoid(nn.functional.pad(self.make(x), (1, 1, 1, 1))))


@pytest.mark.parametrize("make", [Queries, Border])
def test_constants_follow_the_channels_that_they_meet(make: type[nn.Module]) -> None:
    slicing = Slicing(make(), torch.randn(2, 4) if make is Queries else torch.randn(2, 3, 5, 5))
    assert not slicing.whole
    assert {g.channels for g in slicing.groups} == ({8, 6} if make is Queries else {8})


def test_the_page_is_complete() -> None:
    text = (ROOT / "docs" / "accepts.md").read_text()
    assert "{{" not in text
    for name in layers.layers():
        kind, comma, variant = name.partition(",")
        assert f"| `{kind}`{comma}{variant} |" in text
    for family in FAMILIES:
        assert f"| {family} |" in text


def test_the_script_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accepts.main(["--only", "no such layer"])
    assert "no such layer" in capsys.readouterr().err
    assert accepts.main(["--only", "ReLU"]) == 0
    assert "| `ReLU` | cut | cut, the same | free |" in capsys.readouterr().out
