"""Which column carries which channel, on forwards that move channels about; what cannot be cut, and what is said."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.inputs import call, predictions
from pliant.core.slicing import NothingToCutError, Slicing
from pliant.core.stacks import find_stacks
from pliant.elastic import BigNAS, SortedNet


def columns(slicing: Slicing, layer: str, group: str) -> dict[int, int]:
    """Position of the layer's input -> channel of the group."""
    members = [m for g in slicing.groups if g.name == group for m in g.members if m.module == layer and m.side == "in"]
    return {p: c for m in members for p, c in zip(m.positions, m.channels, strict=True)}


def assert_right(model: nn.Module, x: Any, **options: Any) -> Slicing:
    """At each width the cut network is what the full one computes without those channels, and extraction gives it."""
    torch.manual_seed(0)
    model.eval()
    slicing = Slicing(model, x, **options)
    for width in (0.05, 0.3, 0.5, 0.75):
        assert slicing.check(slicing.sizes(width)) is None
        network = slicing.subnetwork(width)
        network.skeleton.eval()
        with torch.no_grad():
            ours, plain = predictions(network.run(model, x)), predictions(call(network.extract(model), x))
        assert all(torch.equal(ours[k], plain[k]) for k in plain)
    return slicing


class Net(nn.Module):
    """Layers by name, and a forward given as a function."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


IMAGE, ROWS = torch.randn(3, 3, 8, 8), torch.randn(3, 4)


def conv(ins: int, outs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, padding=1, **options)


# -- item by item: positions by hand ----------------------------------------------------------------------------------


def test_channels_last_before_flatten() -> None:
    net = Net(lambda n, x: n.b(n.a(x).relu().permute(0, 2, 3, 1).flatten(1)), a=conv(3, 8), b=nn.Linear(512, 5))
    slicing = assert_right(net, IMAGE)
    assert columns(slicing, "b", "a") == {p: p % 8 for p in range(512)}


def test_channels_first_before_flatten() -> None:
    net = Net(lambda n, x: n.b(n.a(x).relu().flatten(1)), a=conv(3, 8), b=nn.Linear(512, 5))
    assert columns(assert_right(net, IMAGE), "b", "a") == {p: p // 64 for p in range(512)}


def test_flattened_embeddings() -> None:
    net = Net(lambda n, ids: n.b(n.a(ids).flatten(1)), a=nn.Embedding(10, 8), b=nn.Linear(40, 3))
    slicing = assert_right(net, torch.randint(0, 10, (3, 5)))
    assert columns(slicing, "b", "a") == {p: p % 8 for p in range(40)}


def test_stacked_and_flattened() -> None:
    net = Net(lambda n, x: n.c(torch.stack([n.a(x), n.b(x)], 2).flatten(1)),
              a=nn.Linear(4, 8), b=nn.Linear(4, 8), c=nn.Linear(16, 3))  # fmt: skip
    slicing = assert_right(net, ROWS)
    (group,) = slicing.groups
    assert group.units == 8  # channel i of both goes together: positions 2 i and 2 i + 1
    small = slicing.subnetwork(0.5).extract(net)
    assert torch.equal(small.c.weight, net.c.weight[:, :8])


def test_pooled_maps_of_several_sizes() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.a(x).relu()
        return n.b(torch.cat([F.adaptive_avg_pool2d(y, k).flatten(1) for k in (1, 2, 4)], 1))

    slicing = assert_right(Net(forward, a=conv(3, 8), b=nn.Linear(168, 3)), IMAGE)
    expected = [*range(8), *(c for c in range(8) for _ in range(4)), *(c for c in range(8) for _ in range(16))]
    assert columns(slicing, "b", "a") == dict(enumerate(expected))


def test_one_encoder_on_two_inputs() -> None:
    encoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))
    net = Net(lambda n, a, b: n.head(torch.cat((n.enc(a), n.enc(b)), 1)), enc=encoder, head=nn.Linear(32, 3))
    slicing = assert_right(net, (ROWS, ROWS + 1))
    half = slicing.subnetwork(0.5).extract(net)
    kept = [*range(8), *range(16, 24)]
    assert torch.equal(half.head.weight, net.head.weight[:, kept])
    weights = [p.clone() for p in net.parameters()]
    group = next(g for g in slicing.groups if g.name == "enc.2")
    with torch.no_grad():
        before = net(ROWS, ROWS + 1)
        slicing.permute(group, list(reversed(range(16))))
        assert torch.allclose(net(ROWS, ROWS + 1), before, atol=1e-6)  # the same function, other weights
    assert not all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))


@pytest.mark.parametrize("by_hand", [False, True])
def test_shuffled_channels(by_hand: bool) -> None:
    def shuffle(y: Tensor) -> Tensor:
        return y.view(len(y), 4, y.shape[1] // 4, *y.shape[2:]).transpose(1, 2).flatten(1, 2)

    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        return n.c(n.b(shuffle(y) if by_hand else n.shuffle(y)).relu().mean((2, 3)))

    net = Net(forward, a=conv(3, 16), shuffle=nn.ChannelShuffle(4), b=conv(16, 12), c=nn.Linear(12, 3))
    slicing = assert_right(net, IMAGE)
    group = next(g for g in slicing.groups if g.name == "a")
    assert (group.channels, group.units) == (16, 4)  # each of the four groups loses the same
    made = next(m for m in group.members if m.module == "a" and m.side == "out")
    kept = {p for p, c in zip(made.positions, made.channels, strict=True) if c < 8}
    assert kept == {0, 1, 4, 5, 8, 9, 12, 13}


def test_two_heads_of_output_and_a_tuple() -> None:
    def forward(n: Any, x: Tensor) -> Any:
        y = n.a(x).relu()
        return n.classes(y), {"boxes": n.boxes(y)}

    net = Net(forward, a=nn.Linear(4, 16), classes=nn.Linear(16, 3), boxes=nn.Linear(16, 4))
    assert [g.name for g in assert_right(net, ROWS).groups] == ["a"]


def test_split_by_a_number_that_the_module_keeps() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        p, q = n.a(x).split((n.half, n.half), 1)
        return n.c(torch.cat([p, n.b(q)], 1).mean((2, 3)))

    net = Net(forward, a=conv(3, 16), b=conv(8, 8), c=nn.Linear(16, 3))
    net.half = 8
    slicing = assert_right(net, IMAGE)
    assert {g.name: g.units for g in slicing.groups} == {"a": 8, "b": 8}
    assert slicing.subnetwork(0.5).extract(net).half == 4


def test_a_split_by_a_literal_stays_whole_and_says_so() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        p, q = n.a(x).split((8, 8), 1)
        return n.c(torch.cat([p, n.b(q)], 1).mean((2, 3)))

    net = Net(forward, a=conv(3, 16), b=conv(8, 8), c=nn.Linear(16, 3))
    with pytest.warns(UserWarning, match=r"'a': its forward seems to fix their number .*exclude=\['a'\]"):
        slicing = assert_right(net, IMAGE)
    assert [g.name for g in slicing.groups] == ["b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(net, IMAGE, exclude=["a"])  # the advice, followed


def test_padded_shortcuts_at_every_size() -> None:
    """At the smallest size 1 broadcasts; at others it does not."""

    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.a(x).relu()
        return n.c((n.b(y) + F.pad(y, (0, 0, 0, 0, 4, 4))).relu().mean((2, 3)))

    net = Net(forward, a=conv(3, 8), b=conv(8, 16), c=nn.Linear(16, 3))
    with pytest.warns(UserWarning, match="keep their full width"):
        slicing = assert_right(net, IMAGE)
    assert [g.name for g in slicing.groups] == ["a"]  # its channels meet channels 4..11 of b, which go with them
    assert slicing.subnetwork(0.5).extract(net).b.out_channels == 12


def test_a_buffer_of_prototypes() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        return n.b((n.a(x) + n.shift).relu())

    net = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    net.register_buffer("shift", torch.randn(1, 8))
    slicing = assert_right(net, ROWS)
    assert slicing.subnetwork(0.5).extract(net).shift.shape == (1, 4)
    far = Net(lambda n, x: -torch.cdist(n.a(x), n.prototypes), a=nn.Linear(4, 8))
    far.register_buffer("prototypes", torch.randn(5, 8))
    with pytest.raises(NothingToCutError, match="'a'"):
        Slicing(far, ROWS)


def test_gates_on_channels_and_on_places() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        y = y * n.excite(n.squeeze(y.mean((2, 3))).relu()).sigmoid()[..., None, None] * n.where(x).sigmoid()
        return n.c(y.mean((2, 3)))

    net = Net(forward, a=conv(3, 16), squeeze=nn.Linear(16, 4), excite=nn.Linear(4, 16), where=conv(3, 1),
              c=nn.Linear(16, 3))  # fmt: skip
    slicing = assert_right(net, IMAGE, exclude=["where"])
    assert {g.name: g.units for g in slicing.groups} == {"a": 16, "squeeze": 4}


def test_token_mixing_is_another_dimension() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.patches(x).flatten(2).transpose(1, 2)
        y = y + n.tokens(n.norm(y).transpose(1, 2)).transpose(1, 2)
        return n.c(n.hidden(y).relu().mean(1))

    net = Net(forward, patches=nn.Conv2d(3, 16, 2, 2), norm=nn.LayerNorm(16), tokens=nn.Linear(16, 16),
              hidden=nn.Linear(16, 24), c=nn.Linear(24, 3))  # fmt: skip
    slicing = assert_right(net, IMAGE, exclude=["tokens"])
    assert {g.name: g.units for g in slicing.groups} == {"patches": 16, "hidden": 24}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_written_by_hand_goes_by_heads(heads: tuple[int, int], fused: bool) -> None:
    queries, keys = heads

    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.embed(x)
        q, k, v = (f(y).view(*y.shape[:2], -1, 4).transpose(1, 2) for f in (n.q, n.k, n.v))
        k, v = (t.repeat_interleave(queries // keys, 1) for t in (k, v))
        if fused:
            z = F.scaled_dot_product_attention(q, k, v)
        else:
            z = ((q @ k.transpose(2, 3)) / 2).softmax(-1) @ v
        return n.head(n.out(z.transpose(1, 2).flatten(2)).mean(1))

    net = Net(forward, embed=nn.Linear(4, 8), q=nn.Linear(8, 4 * queries), k=nn.Linear(8, 4 * keys),
              v=nn.Linear(8, 4 * keys), out=nn.Linear(4 * queries, 8), head=nn.Linear(8, 3))  # fmt: skip
    slicing = assert_right(net, torch.randn(3, 5, 4))
    inner = next(g for g in slicing.groups if any(m.module == "q" and m.side == "out" for m in g.members))
    assert inner.units == keys
    assert slicing.subnetwork(0.5).extract(net).q.out_features == 2 * queries


def test_grouped_convolutions_lose_whole_groups() -> None:
    net = Net(lambda n, x: n.d(n.c(n.b(n.a(x))).relu().mean((2, 3))), a=conv(3, 16), b=conv(16, 32, groups=4),
              c=nn.ConvTranspose2d(32, 16, 2, 2, groups=4), d=nn.Linear(16, 3))  # fmt: skip
    slicing = assert_right(net, IMAGE)
    (group,) = slicing.groups
    assert group.units == 4
    small = slicing.subnetwork(0.5).extract(net)
    assert (small.b.groups, small.b.in_channels, small.b.out_channels) == (2, 8, 16)
    assert small.c.weight.shape == (16, 4, 2, 2)


def test_tied_weights_are_cut_alike() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.scale = nn.Embedding(20, 16), 4.0
            self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(F.embedding(ids, self.embed.weight) * self.scale).relu()).mean(1)

    net = Tied()
    slicing = assert_right(net, torch.randint(0, 20, (3, 5)))
    small = slicing.subnetwork(0.5).extract(net)
    assert small.head.weight is small.embed.weight
    assert small.head.weight.shape == (20, 8)


# -- what cannot be cut -----------------------------------------------------------------------------------------------


def test_parametrisations_are_named_for_what_they_are() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
    net = nn.Sequential(normed, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="parametrisation; take it off before: .*remove_parametrizations"):
        slicing = assert_right(net, ROWS)
    assert [g.name for g in slicing.groups] == ["2"]
    nn.utils.parametrize.remove_parametrizations(normed, "weight")  # the advice, followed
    assert [g.name for g in assert_right(net, ROWS).groups] == ["0", "2"]
    hooked = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="computes its weight in a hook"):
        assert_right(hooked, ROWS)


def test_all_that_stays_is_said_at_once_and_the_advice_works() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        for layer in n.layers:
            x = x + layer[1](layer[0](x).reshape(len(x), 8).relu())
        return n.head(n.free(x).relu())

    layers = nn.ModuleList(nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 4)]) for _ in range(3))
    net = Net(forward, layers=layers, free=nn.Linear(4, 8), head=nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="keep their full width") as caught:
        Slicing(net, ROWS)
    (message,) = [str(w.message) for w in caught]
    advice = re.search(r"exclude=(\[[^\]]*\])", message)
    assert advice is not None
    exclude = [part.strip(" '") for part in advice.group(1).strip("[]").split(",")]
    assert sorted(exclude) == ["layers.*.0", "layers.*.1"]  # inner widths by their shape, outer ones by the input
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(net, ROWS, exclude=exclude)


def test_a_group_is_excluded_by_the_name_that_is_shown() -> None:
    net = Net(lambda n, x: n.c(torch.cat([n.b(n.a(x)[:, :4]), n.a(x)[:, 4:]], 1)),
              a=nn.Linear(4, 8), b=nn.Linear(4, 6), c=nn.Linear(10, 3))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [g.name for g in Slicing(net, ROWS).groups]
    assert names
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert name not in [g.name for g in Slicing(net, ROWS, exclude=[name]).groups]
            except NothingToCutError:
                assert names == [name]


def test_excluding_a_layer_leaves_what_merely_enters_it() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    assert [g.name for g in Slicing(net, ROWS, exclude=["2"]).groups] == ["0"]


def test_a_network_of_which_nothing_can_be_cut_is_refused() -> None:
    """Groups that cannot shrink are no groups: four equal settings would be no choice."""
    for net in (nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 3)),
                nn.Sequential(nn.Linear(4, 8), nn.Softmax(1), nn.Linear(8, 3))):  # fmt: skip
        with pytest.raises(ValueError, match="none of its layers can be cut in width"):
            SortedNet(net, ROWS)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)) for _ in range(3)))
    net = nn.Sequential(blocks, nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"use depth alone: width=\(1\.0,\)"):
        SortedNet(net, ROWS, depth=(0.5, 1.0))
    assert len(SortedNet(net, ROWS, width=(1.0,), depth=(0.5, 1.0)).points()) == 2  # the advice, followed


# -- stacks -----------------------------------------------------------------------------------------------------------


def test_branches_side_by_side_are_no_stack() -> None:
    heads = Net(lambda n, x: torch.cat([h(n.a(x).relu()) for h in n.heads], 1),
                a=nn.Linear(4, 8), heads=nn.ModuleList(nn.Linear(8, 1) for _ in range(4)))  # fmt: skip
    assert find_stacks(heads, ROWS) == {}

    def pyramid(n: Any, x: Tensor) -> Tensor:
        a = n.a(x).relu()
        maps = [a, n.b(a).relu()]
        return n.head(torch.cat([out(y).mean((2, 3)) for out, y in zip(n.outs, maps, strict=True)], 1))

    net = Net(pyramid, a=conv(3, 8), b=nn.Conv2d(8, 8, 3, 2, 1), outs=nn.ModuleList(conv(8, 8) for _ in range(2)),
              head=nn.Linear(16, 3))  # fmt: skip
    assert Slicing(net, IMAGE).stacks == {}
    assert SortedNet(net, IMAGE, width=(0.5, 1.0)).slicing.stacks == {}


@pytest.mark.parametrize("residual", [True, False])
def test_blocks_one_behind_the_other_are_a_stack(residual: bool) -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        for block in n.blocks:
            y = y + block(y).relu() if residual else block(y).relu()
        return n.c(y)

    net = Net(forward, a=nn.Linear(4, 8), blocks=nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), c=nn.Linear(8, 3))
    slicing = Slicing(net, ROWS)
    assert slicing.stacks == {"blocks": 3}
    assert slicing.check({}, {"blocks": 1}) is None


def test_a_stack_whose_every_output_is_used_is_none() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        found = [n.a(x)]
        for block in n.blocks:
            found.append(block(found[-1]).relu())
        return n.c(torch.cat(found, 1))

    net = Net(forward, a=nn.Linear(4, 8), blocks=nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), c=nn.Linear(32, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Slicing(net, ROWS).stacks == {}
    with pytest.raises(ValueError, match=r"cannot be run at width=1 depth=0\.34"):
        SortedNet(net, ROWS, width=(1.0,), depth=(0.34, 1.0), stacks=["blocks"])


# -- the check itself -------------------------------------------------------------------------------------------------


def test_the_check_sees_exchanged_columns_and_lost_ties() -> None:
    """A wrong map is refused, also where weights start alike."""
    net = Net(lambda n, x: n.c(n.norm(n.a(x)).relu()), a=nn.Linear(4, 8), norm=nn.LayerNorm(8), c=nn.Linear(8, 3))
    slicing = Slicing(net, ROWS)
    (group,) = slicing.groups
    assert slicing.check({group.name: 4}) is None
    right = list(group.members)
    for i, m in enumerate(right):
        wrong = type(m)(m.module, m.side, m.positions[1:] + m.positions[:1], m.channels, m.dim)
        group.members[:] = [*right[:i], wrong, *right[i + 1 :]]
        assert slicing.check({group.name: 4}) is not None, m.module
        group.members[:] = [*right[:i], *right[i + 1 :]]
        assert slicing.check({group.name: 4}) is not None, m.module
    group.members[:] = right


def test_the_check_sees_heads_that_are_parted_otherwise() -> None:
    """Attention that starts even must not hide it: weights are enlarged for the comparison."""
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.01)
    net = Net(lambda n, x: n.c(n.b(n.a(x), n.a(x), n.a(x))[0].mean(1)), a=nn.Linear(4, 16), b=layer, c=nn.Linear(16, 3))
    slicing = Slicing(net, torch.randn(3, 5, 4))
    (group,) = slicing.groups
    assert (group.channels, group.units) == (16, 4)
    network = slicing.build({group.name: 8})
    for module in network.skeleton.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.num_heads, module.head_dim = 4, 2
    gone = slicing._gone({group.name: 8})
    assert slicing._agreement.problem(network.run, gone) is not None


# -- networks that run otherwise --------------------------------------------------------------------------------------


def test_recurrent_networks_are_cut_around_their_states() -> None:
    def forward(n: Any, ids: Tensor) -> Tensor:
        y = n.inner(n.lstm(n.embed(ids))[0][:, -1]).relu()
        for block in n.blocks:
            y = y + block(y).relu()
        return n.c(y)

    net = Net(forward, embed=nn.Embedding(10, 8), lstm=nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True),
              inner=nn.Linear(12, 8), blocks=nn.ModuleList(nn.Linear(8, 8) for _ in range(3)),
              c=nn.Linear(8, 3))  # fmt: skip
    ids, y = torch.randint(0, 10, (8, 5)), torch.randint(0, 3, (8,))
    slicing = assert_right(net, ids)
    assert {"embed", "inner"} <= {g.name for g in slicing.groups}
    assert slicing.subnetwork(0.5).extract(net).lstm.input_size == 4
    dial = SortedNet(net, ids, width=(0.5, 1.0), depth=(0.34, 1.0), mode="sum").train()
    dial.loss((ids, y)).backward()
    assert all(p.grad is not None for p in net.parameters())
    dial.eval()
    with torch.no_grad():
        for point in dial.points():
            assert torch.equal(dial.use(point)(ids), dial.extract(point)(ids))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24,
                                    image_size=8, patch_size=2, num_labels=5, hidden_dropout_prob=0.0)  # fmt: skip
    x, y = {"pixel_values": IMAGE}, torch.tensor([0, 1, 2])
    for wrap in (lambda m: SortedNet(m, x, width=(0.5, 1.0), depth=(0.5, 1.0), accumulate=1, replay=True, seed=3),
                 lambda m: BigNAS(m, x, width=(0.5, 1.0), depth=(0.5, 1.0), expansion=(1.0,))):  # fmt: skip
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = transformers.ViTForImageClassification(config)
            if checkpointing:
                model.gradient_checkpointing_enable()
                model._require_grads_hooks = [model.register_forward_hook(lambda m, a, o: None)]
                model = copy.deepcopy(model)  # such handles cannot be copied twice
            net = wrap(model).train()
            net.loss((x, y)).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert all(torch.allclose(g, gradients[1][n], atol=1e-6) for n, g in gradients[0].items())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_encoders_keep_their_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = Net(lambda n, ids, mask: n.c(n.encoder(n.embed(ids), src_key_padding_mask=mask)[:, 0]),
              embed=nn.Embedding(10, 8), encoder=nn.TransformerEncoder(layer, 3), c=nn.Linear(8, 3))  # fmt: skip
    ids, mask = torch.randint(0, 10, (3, 5)), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
    slicing = assert_right(net, (ids, mask))
    assert slicing.stacks == {"encoder.layers": 3}
    dial = SortedNet(net, (ids, mask), width=(0.5, 1.0), depth=(0.5, 1.0)).eval()
    with torch.no_grad():
        for point in dial.points():
            assert torch.equal(dial.use(point)(ids, mask), dial.extract(point)(ids, mask))


def test_a_dial_under_torch_compile() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    dial = SortedNet(net, ROWS, width=(0.5, 1.0)).eval()
    compiled = torch.compile(dial, backend="eager")
    with torch.no_grad():
        for point in dial.points():
            dial.use(point)
            assert torch.allclose(compiled(ROWS), dial(ROWS), atol=1e-6)


def test_bags_and_bilinear_layers_know_their_new_width() -> None:
    net = Net(lambda n, ids: n.c(n.pair(n.bag(ids), n.bag(ids)).relu()),
              bag=nn.EmbeddingBag(10, 8), pair=nn.Bilinear(8, 8, 6), c=nn.Linear(6, 3))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slicing = assert_right(net, torch.randint(0, 10, (3, 5)))
    small = slicing.subnetwork(0.5).extract(net)
    assert small.pair.out_features == len(small.pair.weight) == 3
    alone = Net(lambda n, ids: n.c(n.bag(ids)), bag=nn.EmbeddingBag(10, 8), c=nn.Linear(8, 3))
    small = assert_right(alone, torch.randint(0, 10, (3, 5))).subnetwork(0.5).extract(alone)
    assert small.bag.embedding_dim == small.bag.weight.shape[1] == 4


@pytest.mark.parametrize("shape", [(12,), (3, 12)])
def test_norms_along_positions_pass_channels_on(shape: tuple[int, ...]) -> None:
    if len(shape) == 1:
        net = Net(lambda n, x: n.b(n.norm(n.a(x))).mean(2), a=nn.Conv1d(3, 8, 3, padding=1), norm=nn.LayerNorm(12),
                  b=nn.Conv1d(8, 5, 1))  # fmt: skip
        x = torch.randn(2, 3, 12)
    else:
        net = Net(lambda n, x: n.b(n.norm(n.a(x))).mean((2, 3)), a=conv(3, 8), norm=nn.LayerNorm(shape), b=conv(8, 5))
        x = torch.randn(2, 3, *shape)
    assert [g.units for g in assert_right(net, x).groups] == [8]


def test_a_table_of_constants_ties_no_channels_and_what_it_fixes_is_told() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        table = torch.arange(5.0)[:, None] * torch.arange(1.0, 9.0)  # of 8 channels, whatever is left
        return n.b((y + table.sin()).relu()).mean(1)

    net = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 3))
    net.function = lambda n, x: n.c(forward(n, x))
    with pytest.warns(UserWarning, match="'a': its forward seems to fix their number"):
        slicing = assert_right(net, torch.randn(3, 5, 4))
    assert [g.name for g in slicing.groups] == ["b"]


def test_blocks_that_fit_at_full_width_alone_are_no_stack() -> None:
    net = Net(lambda n, x: n.c(n.blocks(n.a(x).relu())), a=nn.Linear(4, 8),
              blocks=nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 4, bias=False)),
              c=nn.Linear(4, 3))  # fmt: skip
    dial = SortedNet(net, ROWS, width=(0.5, 1.0), depth=(1.0,))
    for width in (0.5, 1.0):
        for depth in (0.5, 1.0) if dial.slicing.stacks else (1.0,):
            assert dial.slicing.check(dial.slicing.sizes(width), dial.slicing.depths(depth)) is None
