"""Sliced = extracted, on networks written by hand, by others, and drawn at random."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.inputs import call, logits
from pliant.core.slicing import Slicing, kept
from pliant.core.stacks import find_stacks
from pliant.core.subnetwork import SubNetwork
from pliant.tasks.images import ResidualBlock, SmallResNet

WIDTHS = (0.05, 0.25, 0.5, 0.75, 1.0)


def assert_sliced_equals_extracted(model: nn.Module, x: Any, **options: Any) -> Slicing:
    """At every width and depth, for the whole example and for its first row alone (another kernel on CPU)."""
    model.eval()
    slicing = Slicing(model, x, **options)
    first = {k: v[:1] for k, v in x.items()} if isinstance(x, dict) else x[:1]
    for width in WIDTHS if slicing.groups else (1.0,):
        for depth in (0.3, 0.6, 1.0) if slicing.stacks else (1.0,):
            network = slicing.subnetwork(width, depth)
            network.skeleton.eval()
            plain = network.extract(model)
            with torch.no_grad():
                for inputs in (x, first):
                    sliced = logits(network.run(model, inputs))
                    assert torch.equal(sliced, logits(call(plain, inputs))), (width, depth)
                    if width == depth == 1:
                        assert torch.equal(sliced, logits(call(model, inputs)))
            assert not any(type(m).__module__.startswith("pliant.core") for m in plain.modules())
            assert all(p.is_contiguous() for p in plain.parameters())
    return slicing


def randomise_statistics(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model


def test_baseline() -> None:
    slicing = assert_sliced_equals_extracted(randomise_statistics(SmallResNet()), torch.randn(3, 1, 28, 28))
    assert slicing.stacks == {"stages.0": 2, "stages.1": 2, "stages.2": 2}
    assert "head" not in {g.name for g in slicing.groups}  # classifier outputs are never cut


class Mixed(nn.Module):
    """Concatenation, depthwise and grouped convolutions, two GroupNorms, a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(14, 14, 3, padding=1, groups=14)
        self.norm1 = nn.GroupNorm(7, 14)
        self.c = nn.Conv2d(14, 12, 1)
        self.slope = nn.PReLU(12)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=4)
        self.norm2 = nn.GroupNorm(6, 24)
        self.up = nn.ConvTranspose2d(24, 10, 2, 2)
        self.norm3 = nn.InstanceNorm2d(10, affine=True)
        self.head = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        y = self.norm1(self.depthwise(torch.cat([a, self.b(a)], 1)))
        y = self.norm2(self.grouped(self.slope(self.c(y))))
        return self.head(F.adaptive_avg_pool2d(self.norm3(self.up(y)), 4).flatten(1))


def test_concatenation_groups_and_norms() -> None:
    slicing = assert_sliced_equals_extracted(Mixed(), torch.randn(3, 3, 8, 8))
    small = slicing.subnetwork(0.5).extract(slicing.model)
    assert small.a.out_channels == 4
    assert small.b.out_channels == 4  # 3 of 6 would part a group of the GroupNorm: two whole ones stay
    assert small.depthwise.groups == small.depthwise.in_channels == 8
    assert small.norm1.num_groups == 4
    assert small.grouped.groups * 3 == small.grouped.in_channels
    assert small.norm2.num_channels // small.norm2.num_groups == 4


@pytest.mark.parametrize("make", [SmallResNet, Mixed])
def test_any_whole_units_can_stay_not_only_the_first(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomise_statistics(make()).eval()
    x = torch.randn(3, *((1, 28, 28) if make is SmallResNet else (3, 8, 8)))
    slicing = Slicing(model, x)
    kept_channels = {}
    for g in slicing.groups:
        chosen = torch.randperm(g.units)[: max(1, g.units // 2)].tolist()
        kept_channels[g.name] = {c for c in range(g.channels) if c // g.bundle in chosen}
    network = slicing.build(kept_channels)
    network.skeleton.eval()
    plain = network.extract(model)
    assert torch.equal(network.run(model, x), plain(x))
    assert torch.equal(network.infer(model, x), plain(x))
    # A channel that is zero where it is read might as well not be there, but for the norms that mix channels.
    if make is SmallResNet:
        for g in slicing.groups:
            for m in g.members:
                if m.side == "in" and isinstance(model.get_submodule(m.module), nn.Conv2d | nn.Linear):
                    gone = [p for p, c in zip(m.positions, m.channels, strict=True) if c not in kept_channels[g.name]]
                    with torch.no_grad():
                        model.get_submodule(m.module).weight[:, gone] = 0
        # Residual streams of different groups meet nowhere, so the zeroed network computes what the sliced one does.
        assert torch.allclose(model(x), plain(x), atol=1e-5)


def test_channels_that_cannot_stay_are_refused() -> None:
    slicing = Slicing(Mixed(), torch.randn(2, 3, 8, 8))
    group = next(g for g in slicing.groups if g.bundle > 1)
    with pytest.raises(ValueError, match="whole units"):
        slicing.build({group.name: {0}})
    for bad in (set(), {-1}, {group.channels}):
        with pytest.raises(ValueError, match="some of its channels"):
            slicing.build({group.name: bad})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(x)))).mean(1)


def test_multihead_attention_rms_norm_and_tied_weights() -> None:
    slicing = assert_sliced_equals_extracted(Tied(), torch.randint(0, 20, (3, 5)))
    small = slicing.subnetwork(0.5).extract(slicing.model)
    assert small.layers.layers[0].self_attn.num_heads == 2
    assert small.layers.layers[0].self_attn.head_dim == 4
    assert small.head.weight is small.embed.weight


class FusedAttention(nn.Module):
    """Queries, keys and values in one projection, as in many vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_fused_projection_is_cut_by_whole_heads() -> None:
    model = nn.Sequential(nn.Linear(6, 16), FusedAttention(), nn.Linear(16, 3))
    x = torch.randn(2, 5, 6)
    slicing = assert_sliced_equals_extracted(model, x)
    inner = [g for g in slicing.groups if any(m.module == "1.proj" and m.side == "in" for m in g.members)]
    assert inner[0].units == 4
    assert slicing.subnetwork(0.5).extract(model)[1].num_heads == 2


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_networks_from_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    x = {"pixel_values": torch.randn(2, 1, 16, 16)}
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
            image_size=16, patch_size=8, num_channels=1, num_labels=10,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[16, 32], depths=[2, 3], layer_type="basic", num_labels=10
        )
        model = transformers.ResNetForImageClassification(config)
    slicing = assert_sliced_equals_extracted(randomise_statistics(model), x)
    assert slicing.stacks
    if kind == "vit":
        attention = [g for g in slicing.groups if "attention" in g.name]
        assert len(attention) == 4
        assert all(g.units == 4 for g in attention)  # whole heads


def test_llama_is_cut_by_whole_groups_of_heads_and_its_stream_with_its_norms() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, x = transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 7))}
    slicing = assert_sliced_equals_extracted(model, x)
    groups = {g.name: g for g in slicing.groups}
    assert groups["model.embed_tokens"].units == 32
    assert groups["model.layers.0.self_attn.q_proj"].units == 2  # a head of keys goes with its two of queries
    small = slicing.subnetwork(0.5).extract(model)
    assert small.model.layers[0].self_attn.q_proj.out_features == 16
    assert small.model.layers[0].self_attn.k_proj.out_features == 8
    assert small.model.norm.weight.shape == (16,)
    without = Slicing(model, x, exclude=["*.q_proj", "model.embed_tokens"])
    assert {g.channels for g in without.groups} == {64}  # the feed-forward layers
    assert slicing.stacks == {"model.layers": 3}


# -- networks drawn at random ---------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """A random chain: each block may be depthwise, residual, normalised in one of four ways, or a concatenation."""

    def __init__(self, stem: int, blocks: list[tuple[str, str, int]], repeats: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kinds = [kind for kind, _, _ in blocks]
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = stem
        for kind, norm, width in blocks:
            out = channels if kind in ("residual", "depthwise") else width
            groups = channels if kind == "depthwise" else 1
            self.convs.append(nn.Conv2d(channels, out, 3, padding=1, groups=groups))
            channels = channels + out if kind == "concat" else out
            self.norms.append(
                {
                    "batch": nn.BatchNorm2d(channels),
                    "group": nn.GroupNorm(channels // 2 if channels % 2 == 0 else 1, channels),
                    "instance": nn.InstanceNorm2d(channels, affine=True),
                    "none": nn.Identity(),
                }[norm]
            )
        self.trunk = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(repeats))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for kind, conv, norm in zip(self.kinds, self.convs, self.norms, strict=True):
            y = conv(x)
            y = torch.cat([x, y], 1) if kind == "concat" else x + y if kind == "residual" else y
            x = torch.relu(norm(y))
        for block in self.trunk:
            x = block(x)
        return self.head(x.mean((2, 3)))


BLOCK = st.tuples(
    st.sampled_from(["plain", "residual", "depthwise", "concat"]),
    st.sampled_from(["batch", "group", "instance", "none"]),
    st.integers(2, 9),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    stem=st.integers(2, 9),
    blocks=st.lists(BLOCK, min_size=1, max_size=4),
    repeats=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_random_architectures(stem: int, blocks: list[tuple[str, str, int]], repeats: int, seed: int) -> None:
    model = randomise_statistics(Drawn(stem, blocks, repeats, seed))
    stacks = ["trunk"] if repeats > 1 else []
    assert_sliced_equals_extracted(model, torch.randn(2, 3, 6, 6), stacks=stacks)


@given(st.integers(1, 64), st.integers(1, 8), st.floats(0.001, 1), st.floats(0.001, 1))
def test_kept_is_monotone_whole_and_full_at_one(units: int, bundle: int, a: float, b: float) -> None:
    channels = units * bundle
    low, high = sorted((a, b))
    assert bundle <= kept(channels, low, units) <= kept(channels, high, units) <= channels
    assert kept(channels, low, units) % bundle == 0
    assert kept(channels, 1.0, units) == channels


def test_rounding_is_half_up_not_to_even() -> None:
    assert [kept(c, 0.5) for c in (1, 3, 5, 7)] == [1, 2, 3, 4]


# -- memory, statics, bad input -------------------------------------------------------------------------------------


def test_views_share_memory_with_the_full_parameters() -> None:
    model = SmallResNet().train()
    network = Slicing(model, torch.randn(2, 1, 28, 28)).subnetwork(0.5)
    network.skeleton.train()
    for name, view in network.views(model).items():
        full = dict(model.named_parameters()) | dict(model.named_buffers())
        assert view.data_ptr() == full[name].data_ptr(), name
    assert all(p.is_meta for p in network.skeleton.parameters())


def test_extracted_network_owns_its_weights() -> None:
    model = SmallResNet().eval()
    x = torch.randn(2, 1, 28, 28)
    plain = Slicing(model, x).subnetwork(0.5).extract(model)
    before = plain(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(plain(x), before)
    copy.deepcopy(plain)


def test_excluded_modules_keep_their_width() -> None:
    model = SmallResNet()
    slicing = Slicing(model, torch.randn(2, 1, 28, 28), exclude=["stages.0"])
    small = slicing.subnetwork(0.25).extract(model)
    assert small.stages[0][0].conv1.out_channels == 16
    assert small.stages[1][0].conv1.out_channels == 8


def test_divisor() -> None:
    model = SmallResNet()
    small = Slicing(model, torch.randn(2, 1, 28, 28), divisor=8).subnetwork(0.3).extract(model)
    assert all(c.out_channels % 8 == 0 for c in small.modules() if isinstance(c, nn.Conv2d))


class FixedSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).reshape(len(x), 8) * torch.ones(8))


def test_a_module_that_cannot_be_sliced_is_named_and_can_be_excluded() -> None:
    with pytest.raises(ValueError, match="'first'"):
        Slicing(FixedSize(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="none of its layers can be cut in width"):
        Slicing(FixedSize(), torch.randn(2, 4), exclude=["first"])


def test_bad_input() -> None:
    model, x = SmallResNet(), torch.randn(2, 1, 28, 28)
    with pytest.raises(ValueError, match="does not accept an input of shape"):
        Slicing(model, torch.randn(2, 3, 28, 28))
    with pytest.raises(ValueError, match="exclude: no module"):
        Slicing(model, x, exclude=["nothing"])
    with pytest.raises(ValueError, match="stacks: the model has no module"):
        Slicing(model, x, stacks=["nothing"])
    with pytest.raises(ValueError, match="not a ModuleList"):
        Slicing(model, x, stacks=["head"])
    with pytest.raises(ValueError, match="divisor"):
        Slicing(model, x, divisor=0)
    slicing = Slicing(model, x)
    for width, depth in ((0.0, 1.0), (1.1, 1.0), (1.0, 0.0), (1.0, 2.0)):
        with pytest.raises(ValueError, match=r"not in \(0, 1\]"):
            slicing.subnetwork(width, depth)
    flat = Slicing(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    with pytest.raises(ValueError, match="no stack of blocks"):
        flat.subnetwork(1.0, 0.5)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


class Dictionary(Noisy):
    def forward(self, x: Tensor) -> Any:
        return {"scores": self.layer(x)}


def test_forwards_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="not deterministic"):
        Slicing(Noisy(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="inputs and outputs only"):  # a mapping is an output like any other
        Slicing(Dictionary(), torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"an nn\.Module"):
        Slicing("net", torch.randn(2, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no rows"):
        Slicing(nn.Linear(4, 2), torch.randn(0, 4))


def test_nested_stacks_count_once() -> None:
    block = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ModuleList(block)[0], nn.Sequential(*block[1:]))
    assert find_stacks(model, torch.randn(2, 4)) == {"2": 2, "3": 2}


@pytest.mark.parametrize("slopes", [1, 4])
def test_prelu_before_a_concatenation(slopes: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
            self.act, self.c, self.head = nn.PReLU(slopes), nn.Conv2d(10, 5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.act(self.a(x)), self.b(x).relu()], 1)
            return self.head(self.c(y).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 1, 8, 8)
    act = model.act
    network = Slicing(model, x).subnetwork(0.5)
    assert model.act is act
    network.skeleton.eval()
    small = network.extract(model)
    assert small.act.weight.numel() == max(1, slopes // 2)
    with torch.no_grad():
        assert torch.equal(network.run(model, x), small(x))


def test_a_model_that_is_nothing_but_blocks_is_no_stack_of_itself() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    assert find_stacks(model, x) == {}
    with pytest.raises(ValueError, match="depth: no stack of blocks"):
        Slicing(model, x, width=False).subnetwork(1.0, 0.5)


# -- views that stay in place ---------------------------------------------------------------------------------------


def _half(model: nn.Module, x: Tensor) -> SubNetwork:
    network = Slicing(model, x).subnetwork(0.5)
    network.skeleton.eval()
    return network


class Columns(nn.Module):
    """A convolution, whose cut is a view, and linear layers, whose cut columns are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.fc2(torch.tanh(self.fc1(y)))  # type: ignore[no-any-return]


def _check_infer(network: SubNetwork, model: nn.Module, x: Tensor, context: Any = torch.no_grad) -> None:
    with context():
        expected = network.run(model, x)
        for _ in range(2):
            assert torch.equal(network.infer(model, x), expected)


def test_infer_follows_whatever_happens_to_the_parameters() -> None:
    torch.manual_seed(0)
    model, x = Columns().eval(), torch.randn(4, 1, 8, 8)
    network = _half(model, x)
    _check_infer(network, model, x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    network.run(model, x).sum().backward()
    optimizer.step()
    _check_infer(network, model, x)
    for p in model.parameters():  # behind the back of the version counter
        p.data.mul_(1.1)
    _check_infer(network, model, x)
    model.fc2.weight = nn.Parameter(torch.randn(3, 6))
    _check_infer(network, model, x)
    model.fc1.weight.data = torch.randn(6, 8)
    _check_infer(network, model, x)
    model.norm.running_mean = torch.randn(8)
    _check_infer(network, model, x)
    model.load_state_dict(Columns().state_dict())
    _check_infer(network, model, x)
    _check_infer(network, model, x, torch.inference_mode)
    _check_infer(network, model, x)
    model.double()
    _check_infer(network, model, x.double())


def test_infer_with_tensors_in_place_of_others() -> None:
    torch.manual_seed(0)
    model, x = Columns().eval(), torch.randn(4, 1, 8, 8)
    network = _half(model, x)
    rows = torch.rand(2, 2, 4)

    def statistics(row: int) -> dict[str, Tensor]:
        return {"norm.running_mean": rows[row, 0], "norm.running_var": rows[row, 1]}

    with torch.no_grad():
        for row in (0, 1, 0):
            for _ in range(2):
                out = network.infer(model, x, lambda r=row: statistics(r), row)  # type: ignore[misc]
                assert torch.equal(out, network.run(model, x, statistics(row)))
            rows[row] += 1.0  # a view shows it
            assert torch.equal(
                network.infer(model, x, lambda r=row: statistics(r), row),  # type: ignore[misc]
                network.run(model, x, statistics(row)),
            )


def test_infer_leaves_gradients_and_copies_alone() -> None:
    torch.manual_seed(0)
    model, x = Columns().eval(), torch.randn(4, 1, 8, 8)
    network = _half(model, x)
    with torch.no_grad():
        expected = network.infer(model, x)
    network.infer(model, x).sum().backward()  # gradients are wanted: nothing stays in place
    assert model.conv.weight.grad is not None
    other = copy.deepcopy(network)
    with torch.no_grad():
        assert torch.equal(other.infer(model, x), expected)
        again = pickle.loads(pickle.dumps(network))
        assert torch.equal(again.infer(model, x), expected)
    assert all(p.is_meta for p in other.skeleton.parameters())
    child = network.extract(model)
    assert torch.equal(child(x), expected)
    network.skeleton.train()
    assert not torch.equal(network.infer(model, x), expected)  # batch statistics
