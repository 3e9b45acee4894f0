"""Dynamic-DINO: the numbers of the specification's exact properties stand in the names."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.dynamic import NotStaticError, Point
from pliant.core.experts import balance_loss
from pliant.core.frontier import measure
from pliant.core.persistence import load, save
from pliant.core.training import fit
from pliant.routing.dynamic_dino import GROUNDING_DINO, DynamicDINO, MoEFFN, find_sites

GATES = ("ste", "hard", "scaled")


class Block(nn.Module):
    """fc1, fc2 called inline, with the names that decoders of transformers use."""

    def __init__(self, width: int = 16, inner: int = 32, act: Any = torch.relu) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation_fn = act
        self.activation_dropout = 0.0
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.activation_fn(self.fc1(x)), self.activation_dropout, self.training)
        return self.norm(x + self.fc2(h))


class Gated(nn.Module):
    def __init__(self, width: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj, self.act_fn = nn.Linear(inner, width, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    """Tokens (B, T, 16) -> classes (B, 5); one feed-forward network of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(act=F.gelu)])
        self.gated = Gated()
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = x + self.gated(x)
        x = self.layer(x + self.mlp(x))
        return self.head(x.mean(1))


def net(**options: Any) -> DynamicDINO:
    torch.manual_seed(0)
    return DynamicDINO(Net(), torch.randn(4, 6, 16), **({"split": 2, "copies": 4} | options))


def data(rows: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, 16, generator=g), torch.randint(0, 5, (rows,), generator=g)


def mixture(split: int = 2, copies: int = 4, gate: str = "ste", double: bool = False, gated: bool = False) -> Any:
    torch.manual_seed(0)
    up, down = nn.Linear(8, 16), nn.Linear(16, 8)
    extra = nn.Linear(8, 16) if gated else None
    if double:
        up, down, extra = up.double(), down.double(), None if extra is None else extra.double()
    moe = MoEFFN(
        up, down, extra, F.relu, split=split, copies=copies, gate=gate, dropout=0.0, backend="loop"
    )  # fmt: skip
    with torch.no_grad():
        moe.router.copy_((0.02 * torch.randn(copies, 8)).repeat_interleave(split, 0))

    def dense(x: Tensor) -> Tensor:
        return down(F.relu(up(x))) if extra is None else down(F.relu(extra(x)) * up(x))

    return moe, dense


# -- exact properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("copies", [1, 2, 8])
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_1_the_mixture_is_the_dense_network_at_the_start(gate: str, copies: int, split: int, gated: bool) -> None:
    moe, dense = mixture(split, copies, gate, double=True, gated=gated)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    assert (moe(x) - dense(x)).abs().max() <= 1e-12
    moe, dense = mixture(split, copies, gate)
    assert torch.allclose(moe(x.float()), dense(x.float()), atol=1e-5)


def test_1_what_must_not_be_left_out() -> None:
    moe, dense = mixture(split=4, double=True)
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        moe.experts.down_bias.mul_(4)  # b2 in place of b2 / k
    assert (moe(x) - dense(x)).abs().max() > 1e-2
    moe, dense = mixture(double=True)
    probability = F.linear(x.float(), moe.router).softmax(-1)
    _, chosen = probability.topk(2)
    softmax = moe.experts(x, chosen, probability.gather(1, chosen).double())
    assert (softmax - dense(x)).abs().max() > 1e-2  # softmax weights scale the network


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_2_the_slices_of_one_copy_go_together_in_every_precision(dtype: torch.dtype) -> None:
    moe, _ = mixture(split=4, copies=8)
    moe.to(dtype)
    assert moe.router.dtype is torch.float32
    moe(torch.randn(900, 8).to(dtype))
    _, chosen = moe.routed
    assert (chosen // 4 == chosen[:, :1] // 4).all()
    assert (chosen.sort(1).values % 4 == torch.arange(4)).all()
    assert len(set((chosen[:, 0] // 4).tolist())) > 1  # not all tokens to one copy
    before = moe.router.detach().clone()
    moe.half().float()
    assert torch.equal(moe.router, before)  # nothing was rounded on the way


def test_3_one_copy_of_one_slice_is_the_dense_network_whatever_the_router() -> None:
    moe, dense = mixture(split=1, copies=1)
    with torch.no_grad():
        moe.router.normal_(0, 100)
    x = torch.randn(9, 8)
    assert torch.equal(moe(x), dense(x))


@given(st.permutations(range(4)), st.lists(st.integers(0, 2), min_size=4, max_size=4))
@settings(max_examples=20, deadline=None)
def test_4_any_selection_of_each_slice_once_is_the_dense_network(order: list[int], copies: list[int]) -> None:
    moe, dense = mixture(split=4, copies=3, double=True)
    x = torch.randn(1, 8, dtype=torch.float64)
    chosen = torch.tensor([[4 * copies[j] + j for j in order]])
    ones = torch.ones(1, 4, dtype=torch.float64)
    assert (moe.experts(x, chosen, ones) - dense(x)).abs().max() <= 1e-12
    chosen[0, 0] = chosen[0, 1]
    assert (moe.experts(x, chosen, ones) - dense(x)).abs().max() > 1e-6


def detector(kind: str = "GroundingDino") -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=128, window_size=2, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = transformers.BertConfig(
        vocab_size=1030, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=37,
        max_position_embeddings=64,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12,
        num_feature_levels=4, disable_custom_kernels=True,
    )  # fmt: skip
    ids = torch.tensor([[101, 5, 6, 1012, 7, 1012, 102]] * 2)
    x = {
        "pixel_values": torch.randn(2, 3, 128, 128),
        "pixel_mask": torch.ones(2, 128, 128, dtype=torch.long),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    return getattr(transformers, f"{kind}ForObjectDetection")(config).eval(), x


@pytest.mark.parametrize("kind", ["GroundingDino", "MMGroundingDino"])
@torch.no_grad()
def test_5_and_7_a_grounding_dino_detects_the_same_and_only_the_named_parts_learn(kind: str) -> None:
    model, x = detector(kind)
    before = model(**x)
    net = DynamicDINO(model, x, targets=("model.decoder.layers.*",), train=GROUNDING_DINO).eval()
    assert [s.name for s in net.sites] == ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"]
    after = net(**x)
    seen = torch.isfinite(before.logits)
    assert torch.equal(seen, torch.isfinite(after.logits))
    assert torch.allclose(after.logits[seen], before.logits[seen], atol=1e-5)
    assert torch.allclose(after.pred_boxes, before.pred_boxes, atol=1e-5)
    scores = [o.logits.amax(-1).argsort(-1, descending=True) for o in (before, after)]
    assert torch.equal(*scores)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    for name in learning:
        parts = ("fusion_layer", "bbox_embed", "class_embed", "fc1.experts", "fc1.router")
        assert any(part in name for part in parts), name
    for part in ("fusion_layer", "bbox_embed", "decoder.layers.0.fc1.experts.up", "decoder.layers.1.fc1.router"):
        assert any(part in name for name in learning)
    plain = net.extract(Point(copy=5))
    assert type(plain) is type(model)
    assert torch.equal(plain(**x).pred_boxes, before.pred_boxes)
    assert set(plain.state_dict()) == set(detector(kind)[0].state_dict())


@given(st.integers(1, 3), st.sampled_from([1, 2, 4]))
@settings(max_examples=9, deadline=None)
def test_6_added_parameters(copies: int, split: int) -> None:
    moe, _ = mixture(split, copies)
    d, inner, experts = 8, 16, split * copies
    h = inner // split
    added = experts * (2 * d * h + h + d) + experts * d - (2 * d * inner + inner + d)
    assert sum(p.numel() for p in moe.parameters()) - (2 * d * inner + inner + d) == added
    assert split * 2 * d * h == 2 * d * inner  # active matrix weights of a token


def test_8_the_balance_loss_is_one_per_layer_when_uniform_and_e_when_collapsed() -> None:
    n = net()
    x, _ = data()
    with torch.no_grad():
        for moe in n.mixtures():
            moe.router.zero_()  # uniform probabilities; equals go by index, so the load is not
    n.train()
    n(x)
    for moe in n.mixtures():
        probability, chosen = moe.routed
        assert moe.aux_loss().item() == pytest.approx(1.0, abs=1e-5)  # with uniform P it is 1 for any load
        uniform = torch.arange(chosen.numel()).view(chosen.shape) % 8
        assert balance_loss(probability, uniform).item() == pytest.approx(1.0, abs=1e-5)
    assert n.aux_loss().item() == pytest.approx(len(n.sites), abs=1e-4)
    moe, _ = mixture(split=1, copies=4)
    with torch.no_grad():
        moe.router.zero_()
        moe.router[2] = 1000.0
    moe(torch.rand(20, 8) + 1)
    assert moe.aux_loss().item() == pytest.approx(4.0)
    moe, _ = mixture()
    moe(torch.randn(20, 8))
    (grad,) = torch.autograd.grad(moe.aux_loss(), moe.router)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("gate", GATES)
def test_9_what_the_router_learns_from_the_task(gate: str) -> None:
    moe, _ = mixture(gate=gate, double=True)
    x = torch.randn(6, 8, dtype=torch.float64)
    target = torch.randn(6, 8, dtype=torch.float64)

    def loss(m: MoEFFN) -> Tensor:
        return (m(x) * target).sum()

    if gate == "hard":
        assert not any(
            g is not None and g.abs().max() > 0 for g in torch.autograd.grad(loss(moe), [moe.router], allow_unused=True)
        )
        return
    (found,) = torch.autograd.grad(loss(moe), moe.router)
    scaled, _ = mixture(gate="scaled", double=True)
    with torch.no_grad():
        scaled.router.copy_(moe.router)
    (same,) = torch.autograd.grad(loss(scaled), scaled.router)
    assert torch.allclose(found, same, atol=1e-6)
    # Finite differences of the scaled form, in the router's single precision; the choice stays as it is.
    scaled(x)
    chosen = scaled.routed[1]
    for index in ((int(chosen[0, 0]), 3), (int(chosen[0, 1]), 0)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                scaled.router[index] += sign * 1e-3
                probability = F.linear(x.float(), scaled.router).double().softmax(-1)
                picked = probability.gather(1, chosen)
                gates = 2 * picked / picked.sum(-1, keepdim=True)
                values.append((scaled.experts(x, chosen, gates) * target).sum())
                scaled.router[index] -= sign * 1e-3
        assert float(found[index]) == pytest.approx(float(values[0] - values[1]) / 2e-3, rel=2e-2, abs=1e-3)


def test_10_ways_to_run_agree_and_idle_experts_have_no_gradient() -> None:
    x, y = data()
    found = {}
    for backend in ("loop", "grouped", "dense"):
        n = net(backend=backend, copies=6).eval()
        n.loss((x, y)).backward()
        found[backend] = [p.grad for p in n.parameters()]
        for moe in n.mixtures():
            idle = torch.bincount(moe.routed[1].flatten(), minlength=12) == 0
            assert moe.experts.up.grad[idle].abs().sum() == 0
    for backend in ("grouped", "dense"):
        for a, b in zip(found["loop"], found[backend], strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_11_copies_merge_back_and_states_round_trip() -> None:
    torch.manual_seed(0)
    dense = Net().eval()
    x, y = data()
    expected = dense(x)
    n = DynamicDINO(copy.deepcopy(dense), x, split=2, copies=3).eval()
    for c in range(3):
        plain = n.extract(Point(copy=c))
        assert type(plain.blocks[0]) is Block
        assert torch.equal(plain(x), expected)
        for name, value in dense.state_dict().items():
            assert torch.equal(plain.state_dict()[name], value)
    n.train()
    optimizer = torch.optim.SGD(n.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        n.loss((x, y)).backward()
        optimizer.step()
    n.eval()
    for c in range(3):
        assert torch.equal(n.extract(Point(copy=c))(x), n.use(Point(copy=c))(x))
    n.use(Point(top_k=2))
    other = DynamicDINO(copy.deepcopy(dense), x, split=2, copies=3, seed=5).eval()
    other.load_state_dict(n.state_dict())
    assert torch.equal(other(x), n(x))
    assert torch.equal(copy.deepcopy(n)(x), n(x))


def test_12_co_selection_adds_up() -> None:
    n = net(split=2, copies=4)
    x, _ = data()
    for stats in n.stats([(x[:2], None), (x[2:], None)]).values():
        assert torch.equal(stats.together, stats.together.t())
        assert torch.equal(stats.together.diagonal(), stats.load)
        assert torch.equal(stats.together.sum(1), 2 * stats.load)
        assert stats.load.sum() == 2 * 36
        assert stats.partners == 1.0
        assert 0 <= stats.entropy <= 1
    random = net(split=2, copies=4, router_start="random")
    assert any(s.partners < 1.0 for s in random.stats(x).values())


# -- any network ----------------------------------------------------------------------------------------------------


def test_feed_forward_networks_of_every_kind_are_found() -> None:
    assert [(s.name, s.gate, s.inline) for s in find_sites(Net())] == [
        ("blocks.0.fc1", None, True),
        ("blocks.1.fc1", None, True),
        ("gated", "gate_proj", False),
        ("mlp", None, False),
        ("layer.linear1", None, True),
    ]
    assert [s.name for s in find_sites(Net(), ("blocks.*",))] == ["blocks.0.fc1", "blocks.1.fc1"]


def test_a_network_of_all_kinds_computes_the_same_at_the_start() -> None:
    torch.manual_seed(0)
    dense = Net().eval()
    x, _ = data()
    expected = dense(x)
    for gate in GATES:
        n = DynamicDINO(copy.deepcopy(dense), x, split=2, copies=4, gate=gate).eval()
        assert torch.allclose(n(x), expected, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(n(x), expected, atol=1e-5)  # the fused path of nn.TransformerEncoderLayer too
    n = DynamicDINO(copy.deepcopy(dense), x, expert_start="random").eval()
    assert not torch.allclose(n(x), expected, atol=1e-2)


def test_llama_and_vit_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()
    ids = torch.randint(0, 32, (2, 5))
    expected = llama(ids).logits
    n = DynamicDINO(llama, ids, split=2, copies=3).eval()
    assert len(n.sites) == 2
    assert torch.allclose(n(ids).logits, expected, atol=1e-5)
    assert torch.equal(n.extract(Point(copy=1))(ids).logits, expected)
    loss = n.train().loss({"input_ids": ids, "labels": ids})
    assert loss.item() > 0
    loss.backward()
    assert n.mixtures()[0].router.grad.abs().max() > 0


def test_fit_measures_saves_and_dropout_is_that_of_the_dense_network(tmp_path: Any) -> None:
    x, y = data(24)
    n = net(copies=2)
    assert n.mixtures()[3].experts.dropout == pytest.approx(0.1)
    fit(n, [(x[:12], y[:12]), (x[12:], y[12:])], epochs=2, lr=0.01, progress=False)
    n.eval()
    front = measure(n, [(x, y)], repeats=0)
    assert {r.point for r in front} == set(n.points())
    save(n, tmp_path / "net")
    other = load(tmp_path / "net", model=Net(), example=x[:4]).eval()
    for point in n.points():
        assert torch.equal(other.use(point)(x), n.use(point)(x))
    assert n.tune(32, repeats=3)["blocks.0.fc1"]["loop"] == 1.0  # another way to run may differ in the last bit
    config = n.arguments()
    assert (config["split"], config["copies"], config["train"]) == (2, 2, None)


def test_only_named_parts_learn() -> None:
    n = net(train=("head",))
    learning = {name for name, p in n.model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias", "blocks.0.fc1.router"} <= learning
    assert not any("norm" in name or "self_attn" in name for name in learning)
    assert all("experts" in name or "router" in name or name.startswith("head") for name in learning)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "soft"}, "gate: 'soft'"),
        ({"router_start": "zero"}, "router_start: 'zero'"),
        ({"expert_start": "zero"}, "expert_start: 'zero'"),
        ({"backend": "fast"}, "backend: 'fast'"),
        ({"split": 0}, "split: 0"),
        ({"copies": 0}, "copies: 0"),
        ({"router_std": -1.0}, "router_std: -1.0"),
        ({"aux_weight": float("nan")}, "aux_weight: nan"),
        ({"split": 5}, "split: 5 does not divide 'blocks.0.fc1', 32 units wide"),
        ({"targets": ("head",)}, "holds no feed-forward network"),
        ({"train": ("nothing",)}, "train: no module of the model is named 'nothing'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        net(**options)


def test_other_bad_input() -> None:
    x, _ = data()
    with pytest.raises(TypeError, match=r"copies: 1\.5"):
        net(copies=1.5)
    with pytest.raises(TypeError, match=r"targets: .*a sequence of at least one name"):
        net(targets="blocks")
    n = net()
    with pytest.raises(ValueError, match="converted already"):
        DynamicDINO(n.model, x)
    with pytest.raises(NotStaticError):
        n.extract(Point(top_k=2))
    with pytest.raises(ValueError, match="no inputs"):
        n.stats([])
    model = Net()
    model.blocks[0].activation_fn = nn.Softmax(-1)
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'activation_fn' of 'blocks.0.fc1' is not elementwise"):
        DynamicDINO(model, x)
    assert set(kept) == set(model.state_dict())  # nothing was converted by halves


# -- gates, precision, defaults -------------------------------------------------------------------------------------


def test_9_straight_through_gates_are_one_and_scaled_ones_are_not() -> None:
    x = torch.randn(9, 8)
    outputs, gradients = {}, {}
    for gate in GATES:
        moe, _ = mixture(2, 4, gate)
        with torch.no_grad():
            moe.router.add_(torch.randn(moe.router.shape, generator=torch.Generator().manual_seed(3)))  # unequal logits
        outputs[gate] = moe(x)
        outputs[gate].square().sum().backward()
        gradients[gate] = moe.router.grad
    assert torch.equal(outputs["ste"], outputs["hard"])
    assert (outputs["ste"] - outputs["scaled"]).abs().max() > 1e-3
    assert gradients["hard"] is None
    assert bool(gradients["ste"].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_2_the_router_is_in_float32_whatever_the_network_is_in(dtype: torch.dtype) -> None:
    n = net().to(dtype)
    for moe in n.mixtures():
        assert moe.router.dtype is torch.float32
        assert moe.experts.up.dtype is dtype
        x = torch.randn(50, moe.experts.features, dtype=dtype)
        moe(x)
        probability, chosen = moe.routed
        assert probability.dtype is torch.float32
        assert torch.equal(probability, F.linear(x.float(), moe.router).softmax(-1))
        assert torch.equal(chosen // 2, (chosen // 2)[:, :1].expand(-1, 2))  # the slices of one copy: no ties between


def test_defaults_are_the_papers() -> None:
    found = {n: p.default for n, p in inspect.signature(DynamicDINO.__init__).parameters.items()}
    assert (found["split"], found["split"] * found["copies"]) == (2, 16)  # the best setting: 2 of 16
    assert (found["aux_weight"], found["router_std"]) == (0.01, 0.02)
    assert (found["router_start"], found["expert_start"], found["gate"]) == ("replicated", "allocated", "ste")


def test_random_experts_start_as_linear_layers_do() -> None:
    n = net(expert_start="random")
    bank = n.mixtures()[0].experts  # 16 features, slices of 16 units out of 32
    for tensor, width in ((bank.up, bank.features), (bank.down, bank.hidden)):
        assert 0.95 * width**-0.5 < float(tensor.abs().max()) <= width**-0.5


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_every_point_answers_compiled_as_it_does_uncompiled(backend: str) -> None:
    n = net().eval()
    torch._dynamo.reset()
    compiled = torch.compile(n, backend=backend)
    points = [n.points()[0], n.points()[1], n.points()[-1]]
    for point in (*points, *points[::-1]):
        n.use(point)
        with torch.no_grad():
            torch.testing.assert_close(compiled(data()[0]), n(data()[0]), rtol=1e-4, atol=1e-5)


def test_four_threads_answer_as_one() -> None:
    n = net().eval()
    inputs = [torch.randn(4, 6, 16) for _ in range(4)]
    for point in (n.points()[0], n.points()[-1]):
        n.use(point)
        with ThreadPoolExecutor(4) as pool:
            alone = [n(x) for x in inputs]
            for _ in range(3):
                for a, b in zip(alone, pool.map(n, inputs), strict=True):
                    assert torch.equal(a, b)


def test_what_fails_leaves_the_network_as_it_was() -> None:
    def criterion(y: Tensor, t: Tensor) -> Tensor:
        calls.append(len(t))
        if len(calls) > 1:
            raise RuntimeError("boom")
        return F.cross_entropy(y, t)

    calls: list[int] = []
    n = net(criterion=criterion).train()
    n.use(Point(copy=1))
    n.loss(data())
    before = copy.deepcopy(n.state_dict())
    with pytest.raises(RuntimeError, match="boom"):
        n.loss(data())
    with pytest.raises(RuntimeError):
        n.stats([torch.randn(2, 6, 16), torch.randn(2, 6, 3)])
    assert all(torch.equal(t, before[name]) for name, t in n.state_dict().items())
    assert (n.point, n.training) == (Point(copy=1), True)
    assert all(moe.copy == 1 for moe in n.mixtures())
    model = Net()
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="train: no module"):
        DynamicDINO(model, data()[0], train=("nothing",))
    assert set(kept) == set(model.state_dict())  # nothing was converted
