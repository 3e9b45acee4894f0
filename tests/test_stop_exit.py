"""The early stop and exit controller: every exact property of its specification, on four families of decoders."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.cost import count_flops
from pliant.core.dynamic import NotStaticError, Point
from pliant.core.frontier import measure, next_token_accuracy
from pliant.core.persistence import load, save
from pliant.core.rows import block_rows
from pliant.core.training import fit
from pliant.routing.stop_exit import (
    CONTINUE,
    EXIT,
    STOP,
    Confidence,
    Controller,
    Cost,
    FixedExit,
    Generated,
    Parts,
    StopExit,
    controller_loss,
    decide,
    exit_labels,
    rouge_l,
    taus_of,
    weighted_mean,
)

transformers = pytest.importorskip("transformers")

V, M, D = 53, 4, 16
END = 2
FAMILIES = ("llama", "qwen2", "gpt2", "opt")


def decoder(kind: str = "llama", dtype: torch.dtype = torch.float64, attention: str = "sdpa", seed: int = 0) -> Any:
    """A random decoder whose blocks matter."""
    common: dict[str, Any] = {"vocab_size": V, "eos_token_id": END, "bos_token_id": 1, "pad_token_id": None}
    wide: dict[str, Any] = {"hidden_size": D, "num_hidden_layers": M, "num_attention_heads": 4}
    wide |= {"max_position_embeddings": 48}
    if kind in ("llama", "qwen2"):
        make = transformers.LlamaConfig if kind == "llama" else transformers.Qwen2Config
        config = make(**common, **wide, intermediate_size=32, num_key_value_heads=2)
    elif kind == "gpt2":
        config = transformers.GPT2Config(**common, n_embd=D, n_layer=M, n_head=4, n_positions=48)
    elif kind == "codegen":
        sizes = {"n_embd": D, "n_layer": M, "n_head": 4, "n_positions": 48, "n_ctx": 48, "rotary_dim": 4}
        config = transformers.CodeGenConfig(**common, **sizes)
    else:
        config = transformers.OPTConfig(**common, **wide, ffn_dim=32, word_embed_proj_dim=D)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(6.0)
                elif p.abs().max() == 0:
                    p.normal_(0, 0.1)
    return model


def lively(model: Any, **options: Any) -> StopExit:
    """A controller that says all three things: random, and blind to what hidden states have in common."""
    net = StopExit(model, **options).eval()
    states = net._trace(prompts(4, 12), None, set(range(net.layers)))
    means = torch.stack([h.mean((0, 1)) for h in states.values()]).double()
    common = torch.linalg.qr(means.T)[0]
    spread = torch.cat(list(states.values())).double()
    with torch.no_grad():
        w = torch.randn(3, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        w = w - w @ common @ common.T
        net.controller.weight.copy_(w / (spread @ w.T).std())
    return net


def prompts(rows: int = 3, length: int = 6, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def cached(model: Any, ids: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Keys and values of every block, and the last logits, as transformers computes them token by token."""
    out = model(ids[:, :-1], use_cache=True)
    name = "cache" if getattr(out, "cache", None) is not None else "past_key_values"
    out = model(ids[:, -1:], **{name: getattr(out, name)}, use_cache=True)
    return [(layer.keys, layer.values) for layer in getattr(out, name).layers], out.logits[:, -1]


class Says:
    """A policy from a table: what the rows do after each block."""

    def __init__(self, actions: dict[int, list[int]]) -> None:
        self.actions, self.layers = actions, tuple(actions)

    def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, None]:
        said = self.actions[layer]
        return torch.tensor((said * len(h))[: len(h)]), None


def blocks_of(net: StopExit) -> list[str]:
    names = {id(m): n for n, m in net.model.named_modules()}
    return [names[id(b)] for b in net.decoder.blocks]


# -- the exact properties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_thresholds_it_is_the_backbone(kind: str, dtype: torch.dtype) -> None:  # property 1
    model = decoder(kind, dtype)
    net = lively(model)
    ids = prompts()
    out = net.generate(ids, max_new_tokens=7, exit_threshold=math.inf, stop_threshold=math.inf, keep_cache=True)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False, pad_token_id=END
    )
    assert torch.equal(out.sequences, expected)
    assert not out.stopped.any()
    assert out.cache is not None
    two = net.generate(ids, max_new_tokens=2, exit_threshold=math.inf, keep_cache=True)
    stored, _ = cached(model, two.sequences[:, :-1])
    assert two.cache is not None
    for (k, v), (own_k, own_v) in zip(stored, two.cache, strict=True):
        assert torch.equal(k, own_k)
        assert torch.equal(v, own_v)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_exit_emits_its_own_head(kind: str) -> None:  # property 2
    model = decoder(kind)
    net = lively(model)
    ids = prompts()
    plain = net.generate(ids, max_new_tokens=6, eos_token_id=[])
    for i in net.heads:
        out = net.generate(ids, max_new_tokens=2, policy=FixedExit(net, i), eos_token_id=[])
        text = out.sequences[:, :-1]
        h = model(text, output_hidden_states=True).hidden_states[i + 1][:, -1]
        weight = net.exit_heads[i].weight
        assert torch.equal(out.sequences[:, -1], (h @ weight.T).argmax(-1))
        assert out.exit_layers.tolist() == [[M, i + 1]] * 3
    forced = net.generate(ids, max_new_tokens=6, policy=Says({M - 1: [EXIT]}), eos_token_id=[])
    assert torch.equal(forced.sequences, plain.sequences)
    assert (forced.exit_layers == M).all()


@pytest.mark.parametrize("kind", [*FAMILIES, "codegen"])
@pytest.mark.parametrize("i", range(M - 1))
def test_the_cache_after_an_exit(kind: str, i: int) -> None:  # property 3
    model = decoder(kind)
    net = lively(model)
    ids = prompts()
    out = net.generate(ids, max_new_tokens=3, policy=Says({i: [EXIT]}), eos_token_id=[], keep_cache=True)
    text = out.sequences[:, :-1]  # what is in the cache: the prompt, and two tokens that left after block i
    assert out.cache is not None
    hidden = model(text[:, :-1], output_hidden_states=True).hidden_states[i + 1][:, -1:]  # of the first of them
    full, _ = cached(model, text)
    at = ids.shape[1]
    context = net.decoder.embed(text[:, at : at + 1], torch.full((3, 1), at))[1]
    for j, ((k, v), (full_k, _)) in enumerate(zip(out.cache, full, strict=True)):
        assert k.shape == full_k.shape
        if j <= i:
            torch.testing.assert_close(k[:, :, : at + 1], full_k[:, :, : at + 1], rtol=0, atol=1e-12)
        else:
            by_hand = _by_hand(kind, net, j, hidden, at)
            if by_hand is not None:
                torch.testing.assert_close(k[:, :, at : at + 1], by_hand[0], rtol=0, atol=1e-6)
                torch.testing.assert_close(v[:, :, at : at + 1], by_hand[1], rtol=0, atol=1e-6)
            own = Parts.keys_values(net.decoder, j, hidden, context)
            torch.testing.assert_close(k[:, :, at : at + 1], own[0], rtol=0, atol=1e-6)
            # the block right after reads h_i in a full run as well
            assert torch.allclose(k[:, :, at], full_k[:, :, at]) == (j == i + 1)
        assert not torch.allclose(v[:, :, at], torch.zeros(()).double())

    # the next token's logits are those of an offline pass in which blocks j > i are given h_i at that position
    found = net.decide(text, policy=Once({i: {at}}, M, at))
    handles, state = [], []
    blocks = list(net.decoder.blocks)
    handles.append(blocks[i].register_forward_hook(lambda m, a, o: state.append(_first(o)[:, at].clone())))
    for block in blocks[i + 1 :]:

        def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            h = args[0].clone()
            h[:, at] = state[0]
            return (h, *args[1:]), kwargs

        handles.append(block.register_forward_pre_hook(swap, with_kwargs=True))
    offline = model(text).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found.logits[:, at + 1], offline[:, at + 1], rtol=0, atol=1e-10)
    if i < M - 2:  # nothing changes where the one block left out would have read the same
        assert not torch.allclose(found.logits[:, at + 1], model(text).logits[:, at + 1])


class Once:
    """Exit after block ``layer`` at the named positions, in teacher forcing (the first position is never asked)."""

    def __init__(self, where: dict[int, set[int]], depth: int, at: int) -> None:
        (self.layer, self.at), self.layers = next(iter(where.items())), tuple(where)
        self.position = 0

    def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, None]:
        self.position += 1
        return torch.full((len(h),), EXIT if self.position in self.at else CONTINUE), None


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _by_hand(kind: str, net: StopExit, j: int, h: Tensor, at: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values of norm_j(h_i), written out."""
    block: Any = net.decoder.blocks[j]
    if kind == "codegen":
        return None  # through the block itself
    if kind == "gpt2":
        q_k_v = block.ln_1(h) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        k, v = q_k_v[..., D : 2 * D], q_k_v[..., 2 * D :]
    else:
        x = (block.self_attn_layer_norm if kind == "opt" else block.input_layernorm)(h)
        k, v = block.self_attn.k_proj(x), block.self_attn.v_proj(x)
    k, v = (t.view(len(h), 1, -1, 4).transpose(1, 2) for t in (k, v))
    if kind in ("llama", "qwen2"):
        angle = at * 10_000.0 ** -(torch.arange(0, 4, 2) / 4.0)
        cos, sin = torch.cat((angle, angle)).cos(), torch.cat((angle, angle)).sin()
        k = k * cos + torch.cat((-k[..., 2:], k[..., :2]), -1) * sin
    return k, v


@pytest.mark.parametrize("kind", FAMILIES)
def test_keys_and_values_alone_are_those_of_the_fused_projection(kind: str) -> None:  # property 4
    # A slice of one fused weight is summed in another order: one unit in the last place, and not a bit for bit.
    exact = 1e-14 if kind == "gpt2" else 0.0
    for dtype, tolerance in ((torch.float64, exact), (torch.float32, 1e-6)):
        model = decoder(kind, dtype)
        small, fused = StopExit(model), StopExit(model, fill="qkv")
        assert (small.fill, fused.fill) == ("kv", "qkv")
        h = torch.randn(5, 1, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        context = small.decoder.embed(torch.zeros(5, 1, dtype=torch.int64), torch.arange(5)[:, None])[1]
        for j in range(M):
            for a, b in zip(small._fill(j, h, context), fused._fill(j, h, context), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
        cost = [count_flops(partial(n._fill, 1, h, context)).total for n in (small, fused)]
        assert cost[0] < cost[1]  # and is cheaper


def test_labels() -> None:  # property 5
    f = torch.tensor([0, 1, 3])
    correct = torch.arange(1, 4)[:, None] == f  # (3 places, 3 tokens)
    assert exit_labels(correct).T.tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 1]]
    assert exit_labels(correct).dtype == torch.int64
    assert exit_labels(torch.tensor([[True], [False], [True]]), "self_correct").flatten().tolist() == [1, 2, 1]
    assert exit_labels(torch.tensor([[True], [False]]), "self_correct").flatten().tolist() == [1, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_labels_by_definition(places: int, seed: int) -> None:  # property 5
    correct = torch.rand(places, 17, generator=torch.Generator().manual_seed(seed)) < 0.3
    labels = exit_labels(correct)
    for t in range(17):
        f = next((i + 1 for i in range(places) if correct[i, t]), 0)
        assert labels[:, t].tolist() == [0 if f == 0 else 1 if f <= i + 1 else 2 for i in range(places)]
    is_exit = (labels == EXIT).int()
    assert (is_exit.diff(dim=0) >= 0).all()  # once exit, always exit
    stop = labels == STOP
    assert (stop == stop[:1]).all()
    assert not (labels[-1] == CONTINUE).any()
    own = exit_labels(correct, "self_correct")
    assert torch.equal(own == EXIT, correct)
    assert not (own[-1] == CONTINUE).any()


def test_weights_of_the_controllers_loss() -> None:  # property 6
    x = torch.tensor(0.7)
    assert weighted_mean(x.expand(3)).item() == pytest.approx(0.7)
    assert weighted_mean(torch.stack((x, x, 2 * x))).item() == pytest.approx(0.7 + 0.7 * 3 / 6)
    scores = [torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    labels = torch.randint(0, 3, (3, 2, 5), generator=torch.Generator().manual_seed(9))
    labels[:, 0, 1] = -100
    ce = [
        -torch.stack([s[b, t].log_softmax(-1)[y[b, t]] for b in range(2) for t in range(5) if y[b, t] >= 0]).mean()
        for s, y in zip(scores, labels, strict=True)
    ]
    expected = (1 * ce[0] + 2 * ce[1] + 3 * ce[2]) / 6
    assert controller_loss(scores, labels).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_loss_of_the_network_is_the_papers() -> None:  # the objectives, written out
    model = decoder("gpt2")
    net = lively(model)
    ids = prompts(2, 8)
    hidden = model(ids[:, :-1], output_hidden_states=True).hidden_states
    h = [*hidden[1:M]]
    z = [h[i] @ net.exit_heads[i].weight.T for i in range(M - 1)]
    y = ids[:, 1:]
    expected = sum(F.cross_entropy(a.transpose(1, 2), y) for a in z)
    torch.testing.assert_close(net.loss(ids), expected)

    net.phase = "controller"
    correct = torch.stack([a.argmax(-1) == y for a in [*z, model(ids[:, :-1]).logits]])
    states = net._trace(ids[:, :-1], None, set(range(M)))
    labels = exit_labels(correct)
    loss = [(i + 1) * F.cross_entropy(net.controller(states[i]).transpose(1, 2), labels[i]) for i in range(M)]
    torch.testing.assert_close(net.loss(ids), torch.stack(loss).sum() / 10)
    torch.testing.assert_close(net.loss(net.make_labels([ids])[0]), net.loss(ids))
    assert net.make_labels([ids])[0].labels.shape == (M, 2, 7)


def test_a_stop_never_emits_its_token() -> None:  # property 7
    net = lively(decoder("gpt2"))
    ids = prompts(2)
    says = Says({2: [CONTINUE]})
    free = net.generate(ids, max_new_tokens=8, policy=says, eos_token_id=[])
    calls = []

    class StopThird(Says):
        def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, None]:
            calls.append(len(h))
            return torch.tensor([STOP if len(calls) == 3 else CONTINUE, CONTINUE][: len(h)]), None

    out = net.generate(ids, max_new_tokens=8, policy=StopThird({2: []}), eos_token_id=60)
    assert out.stopped.tolist() == [True, False]
    assert out.lengths.tolist() == [3, 8]
    assert out.sequences[0, 6:].tolist() == [*free.sequences[0, 6:9].tolist(), *[60] * 5]
    assert torch.equal(out.sequences[1], free.sequences[1])  # the other row does not notice
    assert out.exit_layers[0].tolist() == [M, M, M, 3, -1, -1, -1, -1]
    assert calls == [2, 2, 2, 1, 1, 1, 1]  # the row is gone for good
    assert out.depth_by_completion == pytest.approx(((3 * M + 3) / 4 + M) / 2)
    assert out.depth == pytest.approx((3 * M + 3 + 8 * M) / 12)


def said(scores: Tensor, exit_threshold: float, stop_threshold: float) -> Tensor:
    return decide(scores, taus_of(exit_threshold, stop_threshold, scores))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_never_exits_earlier(seed: int, low: float, high: float) -> None:  # property 8
    low, high = sorted((low, high))
    scores = 2 * torch.randn(6, 40, 3, generator=torch.Generator().manual_seed(seed))  # (blocks, tokens, 3)

    def first(tau: float) -> Tensor:
        actions = torch.stack([said(s, tau, math.inf) for s in scores])
        exits = torch.cat((actions == EXIT, torch.ones(1, 40, dtype=torch.bool)))
        return exits.int().argmax(0)

    assert (first(low) <= first(high)).all()


def test_thresholds_are_strict() -> None:  # property 9
    scores = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(said(scores, 0.0, 0.0), scores.argmax(-1))
    p = scores.softmax(-1)
    for cls in (STOP, EXIT):
        row = (p.argmax(-1) == cls).nonzero()[0, 0]
        tau = p[row, cls].item()
        taus = {STOP: (0.0, tau), EXIT: (tau, 0.0)}[cls]
        assert said(scores[row : row + 1], *taus).item() == CONTINUE  # equal does not fire
        below = {STOP: (0.0, tau - 1e-12), EXIT: (tau - 1e-12, 0.0)}[cls]
        assert said(scores[row : row + 1], *below).item() == cls
    assert (said(scores, 100.0, 100.0) == CONTINUE).all()
    likely = torch.tensor([[math.log(0.3), math.log(0.3), math.log(0.4)]])
    assert said(likely, 0.1, 0.1).item() == CONTINUE  # above the threshold, but not the largest class
    half = torch.zeros(1, 3, dtype=torch.float64)
    half[0, 2] = -1e9
    assert (half.softmax(-1)[0, :2] == 0.5).all()
    assert said(half, 0.5, 0.5).item() == CONTINUE


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_stage_moves_its_own_weights_alone(decay: float) -> None:  # property 10
    net = lively(decoder("gpt2"), heads_share=0.5)
    net.train()
    assert not net.model.training
    optimizer = torch.optim.AdamW(net.parameter_groups(decay), lr=1e-2)
    before = {n: t.clone() for n, t in net.state_dict().items()}

    def moved() -> set[str]:
        return {
            n.partition(".")[0] for n, t in net.state_dict().items() if n != "stage" and not torch.equal(t, before[n])
        }

    for step in range(4):
        net.schedule(step / 8)
        optimizer.zero_grad(set_to_none=False)  # the worst case: old gradients of zero
        net.loss(prompts(2, 7, step)).backward()
        optimizer.step()
    assert net.phase == "heads"
    assert moved() == {"exit_heads"}
    before = {n: t.clone() for n, t in net.state_dict().items()}
    for step in range(4, 8):
        net.schedule(step / 8)
        optimizer.zero_grad(set_to_none=False)
        net.loss(prompts(2, 7, step)).backward()
        optimizer.step()
    assert net.phase == "controller"
    assert moved() == {"controller"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_is_each_prompt_alone(kind: str) -> None:  # property 11
    net = lively(decoder(kind))
    ids = prompts(5, 8)
    mask = torch.ones_like(ids)
    mask[1, :3], mask[4, :5] = 0, 0
    for options in ({"exit_threshold": 0.0, "stop_threshold": 0.5}, {"exit_threshold": 0.4}):
        found: list[Any] = []

        def run(found: list[Any] = found, options: dict[str, float] = options) -> None:
            found.append(net.generate(ids, mask, max_new_tokens=9, **options))

        counted = block_rows(net.model, blocks_of(net), run)
        (batch,) = found
        assert sum(counted.values()) == int(batch.exit_layers.clamp_min(0).sum())
        assert batch.cost.prompt + batch.cost.blocks == sum(counted.values())
        assert len(set(batch.exit_layers.flatten().tolist())) > 2  # rows do differ
        assert bool(batch.stopped.any()) == ("stop_threshold" in options)
        for row in range(5):
            alone = net.generate(ids[row : row + 1, mask[row] == 1], max_new_tokens=9, **options)
            new = alone.exit_layers.shape[1]
            assert batch.exit_layers[row, :new].tolist() == alone.exit_layers[0].tolist()
            assert batch.sequences[row, 8 : 8 + new].tolist() == alone.sequences[0, -new:].tolist()
            assert (batch.exit_layers[row, new:] == -1).all()
            assert bool(batch.stopped[row]) == bool(alone.stopped[0])
            assert int(batch.lengths[row]) == int(alone.lengths[0])


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_cache_of_a_batch_is_that_of_each_prompt(kind: str) -> None:  # property 11, padding and depths mixed
    net = lively(decoder(kind))
    ids = prompts(4, 7)
    mask = torch.ones_like(ids)
    mask[1, :3], mask[3, :5] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 7, "exit_threshold": 0.2, "eos_token_id": [], "keep_cache": True}
    batch = net.generate(ids, mask, **options)
    assert batch.cache is not None
    for row in range(4):
        alone = net.generate(ids[row : row + 1, mask[row] == 1], **options)
        assert alone.cache is not None
        for both, own in zip(batch.cache, alone.cache, strict=True):
            for a, b in zip(both, own, strict=True):
                torch.testing.assert_close(a[row : row + 1, :, 7 - int(mask[row].sum()) :], b, rtol=0, atol=1e-10)


def test_the_first_token_has_full_depth() -> None:  # property 12
    net = lively(decoder())
    asked: list[int] = []

    class Watch(Says):
        def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, None]:
            asked.append(len(h))
            return torch.full((len(h),), EXIT), None

    out = net.generate(prompts(), max_new_tokens=3, policy=Watch({0: []}), eos_token_id=[])
    assert (out.exit_layers[:, 0] == M).all()
    assert (out.exit_layers[:, 1:] == 1).all()
    assert asked == [3, 3]
    forced = net.decide(prompts(), policy=Watch({0: []}))
    assert (forced.exit_layers[:, 0] == M).all()
    assert (forced.exit_layers[:, 1:] == 1).all()


# -- cost ----------------------------------------------------------------------------------------------------


def test_what_a_token_costs() -> None:  # the specification's arithmetic for the shape of GPT-2 small
    d, depth = 32, 12
    config = transformers.GPT2Config(vocab_size=2093, n_embd=d, n_layer=depth, n_head=2, n_positions=16)
    net = StopExit(transformers.GPT2LMHeadModel(config).eval())
    ids = torch.ones(1, 1, dtype=torch.int64)

    def flops(**options: Any) -> int:
        found = [net.generate(ids, max_new_tokens=n, count=True, eos_token_id=[], **options).cost.flops for n in (1, 2)]
        assert found[0] is not None
        assert found[1] is not None
        return found[1] - found[0]

    whole = flops(exit_threshold=2.0)
    for fill, shares in (("kv", (0.47, 0.57, 0.71, 0.86)), ("qkv", (0.53, 0.61, 0.74, 0.87))):
        net.fill = fill
        for layers, share in zip((1, 3, 6, 9), shares, strict=True):
            assert flops(policy=FixedExit(net, layers - 1)) / whole == pytest.approx(share, abs=0.012)


def test_confidence_pays_for_its_heads() -> None:
    net = lively(decoder())
    ids = prompts(4)
    never = net.generate(ids, max_new_tokens=5, policy=Confidence(net, 2.0), eos_token_id=[])
    assert torch.equal(never.sequences, net.generate(ids, max_new_tokens=5, eos_token_id=[]).sequences)
    assert never.cost.heads == 4 + 4 * 4 * M  # one after the prompt, then one after every block
    always = net.generate(ids, max_new_tokens=5, policy=Confidence(net, -1.0, "probability"), eos_token_id=[])
    first = net.generate(ids, max_new_tokens=5, policy=FixedExit(net, 0), eos_token_id=[])
    assert torch.equal(always.sequences, first.sequences)
    assert always.cost.heads == first.cost.heads == 4 * 5
    assert first.cost.fills == 4 * 4 * (M - 1)
    h = torch.randn(20, D, dtype=torch.float64)
    p = net.read(1, h).softmax(-1).sort(-1, descending=True).values
    gap = p[:, 0] - p[:, 1]
    action, z = Confidence(net, gap.median().item())(1, h)
    assert torch.equal(action == EXIT, gap > gap.median())
    assert z is not None
    assert torch.equal(z, net.read(1, h))


# -- the contract --------------------------------------------------------------------------------------------


def pairs(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    found = []
    for seed in range(count):
        start = torch.randint(0, V, (4, 1), generator=torch.Generator().manual_seed(seed))
        ids = (start + 3 * torch.arange(9)) % V
        found.append((ids[:, :-1], ids[:, 1:]))
    return found


def test_fit_measure_and_the_dial() -> None:
    net = StopExit(decoder("llama", torch.float32), thresholds=(0.4, (0.4, 0.9)), heads_share=0.6)
    assert [str(p) for p in net.points()] == [
        "exit=0",
        "exit=1",
        "exit=2",
        "exit_threshold=0.4 stop_threshold=0.9",
        "exit_threshold=0.4",
        "exit=3",
    ]
    assert net.point == Point(exit=3)
    before = [net.loss(b).item() for b in pairs()]
    frozen = copy.deepcopy(net.model.state_dict())
    history = fit(net, pairs(), epochs=30, optimizer=lambda g: torch.optim.AdamW(g, lr=2e-2), progress=False)
    assert history.steps == 120
    assert net.phase == "controller"
    assert all(torch.equal(t, frozen[n]) for n, t in net.model.state_dict().items())
    net.phase = "heads"
    assert sum(net.loss(b).item() for b in pairs()) < 0.75 * sum(before)
    front = measure(net, pairs(2), metric=next_token_accuracy, repeats=0)
    quality = {str(r.point): (r.quality, r.flops, r.static) for r in front}
    assert quality["exit=2"][0] > 0.5
    assert quality["exit=0"][1] < quality["exit=2"][1]
    assert quality["exit=0"][2]
    assert not quality["exit_threshold=0.4"][2]
    assert net.use({"exit_threshold": 0.123}).point == Point(exit_threshold=0.123)  # any threshold is a setting
    x = pairs()[0][0]
    torch.testing.assert_close(net.use({"exit_threshold": 2.0})(x), net.model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*FAMILIES, "codegen"])
@pytest.mark.parametrize("head_norm", [None, "ln_f"])
def test_extract(kind: str, head_norm: str | None) -> None:
    model = decoder(kind, torch.float32)
    net = lively(model, head_norm=head_norm)
    ids = prompts()
    for k in range(M):
        small = net.extract({"exit": k})
        assert isinstance(small, type(model))
        with torch.no_grad():
            assert torch.equal(small(ids).logits, net.use({"exit": k})(ids))
        own = net.generate(ids, max_new_tokens=5)
        theirs: Any = small
        plain = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=END
        )
        assert torch.equal(own.sequences, plain)
        assert (own.exit_layers[:, 0] == k + 1).all()
        assert own.cost.fills == own.cost.decisions == 0
    assert sum(p.numel() for p in net.extract({"exit": 0}).parameters()) < sum(p.numel() for p in model.parameters())
    for point in ({"exit_threshold": 0.5}, {"exit_threshold": 0.5, "stop_threshold": 0.5}):
        with pytest.raises(NotStaticError, match="controller chooses"):
            net.extract(point)
    small = net.extract({"exit": 1})
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert net.generate(ids, max_new_tokens=2).sequences.shape == (3, 8)  # weights of its own


@pytest.mark.parametrize("kind", [*FAMILIES, "codegen", "opt-350m"])
@pytest.mark.parametrize("head_norm", [None, "ln_f"])
def test_extracted_networks_survive_their_files(kind: str, head_norm: str | None, tmp_path: Path) -> None:
    if kind == "opt-350m":
        net = lively(relative(kind).float(), head_norm=head_norm)
    else:
        net = lively(decoder(kind, torch.float32), head_norm=head_norm)
    ids = prompts()
    for k in range(M):
        small: Any = net.extract({"exit": k})
        small.save_pretrained(tmp_path / str(k))
        own = type(small).from_pretrained(tmp_path / str(k))
        known = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(k), trust_remote_code=True)
        plain = type(net.model)
        for again in (own.eval(), known.eval()):
            assert isinstance(again, plain)
            with torch.no_grad():
                assert torch.equal(again(ids).logits, small(ids).logits)
        if head_norm is None and k < M - 1 and kind != "opt-350m":  # a norm that starts anew must not go unseen
            with pytest.raises((RuntimeError, ValueError)):
                plain.from_pretrained(tmp_path / str(k))


def test_every_block_is_asked_whether_it_can_be_filled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = lively(relative("smollm3"))  # its last block does not rotate
    assert (net.fill, net._alone) == ("kv", {0, 1, 2})
    net.thresholds = ()
    ids = prompts(4, 6)
    out = net.generate(ids, max_new_tokens=8, policy=FixedExit(net, 0), eos_token_id=[], keep_cache=True)
    net.fill = "qkv"
    slow = net.generate(ids, max_new_tokens=8, policy=FixedExit(net, 0), eos_token_id=[], keep_cache=True)
    assert torch.equal(out.sequences, slow.sequences)
    assert out.cache is not None
    assert slow.cache is not None
    for a, b in zip(out.cache, slow.cache, strict=True):
        torch.testing.assert_close(a, b)
    block = type(net.decoder.blocks[0].self_attn)
    monkeypatch.setattr(block, "forward", shifted(block.forward))  # what is cached depends on more than the input
    with pytest.raises(ValueError, match=r"decoded token by token|caches other keys"):
        StopExit(relative("smollm3"))


def shifted(forward: Any) -> Any:
    """The forward of an attention whose decoding steps differ from its pass over the whole text."""

    def other(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        store = kwargs.get("cache", kwargs.get("past_key_values"))
        step = getattr(store, "column", 0) > 0
        return forward(self, hidden_states * (2 if step else 1), **kwargs)

    return other


def test_teacher_forcing_is_decoding() -> None:
    net = lively(decoder())
    ids = prompts(3, 1)
    out = net.generate(ids, max_new_tokens=7, exit_threshold=0.2, eos_token_id=[])
    found = net.use({"exit_threshold": 0.2}).decide(out.sequences[:, :-1])
    assert torch.equal(found.exit_layers, out.exit_layers)
    assert torch.equal(found.logits.argmax(-1), out.sequences[:, 1:])
    assert torch.equal(net(out.sequences[:, :-1]), found.logits)
    padded = torch.cat((torch.zeros(3, 2, dtype=torch.int64), out.sequences[:, :-1]), 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    again = net.decide(padded, mask)
    torch.testing.assert_close(again.logits[:, 2:], found.logits)
    assert torch.equal(again.exit_layers[:, 2:], found.exit_layers)
    stops = net.decide(out.sequences, policy=Says({1: [STOP]}))
    assert stops.stopped[:, 1:].all()
    assert not stops.stopped[:, 0].any()
    assert (stops.logits[:, 1:].argmax(-1) == END).all()  # predicts the end, at its place alone


class OnceAt:
    """A policy that does ``action`` after block 1 of the token at one step, and else goes on."""

    layers = (1,)

    def __init__(self, step: int, action: int) -> None:
        self.left, self.action = step, action

    def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, None]:
        self.left -= 1
        return torch.full((len(h),), self.action if self.left == 0 else CONTINUE), None


def test_a_stop_in_teacher_forcing_fills_the_cache_as_an_exit_does() -> None:
    net = lively(decoder())
    ids = prompts(3, 8)
    stops, exits = (net.decide(ids, policy=OnceAt(2, action)) for action in (STOP, EXIT))
    assert stops.stopped[:, 2].all()
    assert torch.equal(stops.logits[:, 3:], exits.logits[:, 3:])  # the text goes on with keys and values in place
    assert not torch.allclose(stops.logits[:, 3:], net.decide(ids, policy=OnceAt(9, STOP)).logits[:, 3:])


def test_every_point_answers_compiled_as_it_does_uncompiled() -> None:
    net = lively(decoder("llama", torch.float32), heads=2, thresholds=(0.3, (0.3, 0.5)))
    ids = prompts(2, 5)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend)
        for point in (*net.points(), *net.points()[::-1]):
            net.use(point)
            assert torch.equal(compiled(ids), net(ids))


def test_four_threads_answer_as_one() -> None:
    net = lively(decoder("llama", torch.float32), heads=2, thresholds=(0.3,))
    texts = [prompts(2, 5, seed) for seed in range(4)]
    for point in net.points():
        net.use(point)
        alone = [(net(x), net.generate(x, max_new_tokens=3).sequences) for x in texts]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                found = list(pool.map(lambda x: (net(x), net.generate(x, max_new_tokens=3).sequences), texts))
                for a, b in zip(alone, found, strict=True):
                    assert torch.equal(a[0], b[0])
                    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_save_and_load(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pliant.core.persistence._catalogue", lambda: ["pliant.routing.stop_exit:StopExit"])
    net = lively(decoder(kind, torch.float32), heads=2, thresholds=(0.1, (0.2, 0.9)), label_rule="self_correct")
    net.phase = "controller"
    net.use({"exit_threshold": 0.1})
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", model=decoder(kind, torch.float32, seed=5))
    assert isinstance(again, StopExit)
    assert (again.heads, again.thresholds, again.phase) == (net.heads, net.thresholds, "controller")
    assert again.label_rule == "self_correct"
    ids = prompts()
    assert torch.equal(again(ids), net(ids))
    a, b = (n.generate(ids, max_new_tokens=5) for n in (net, again))
    assert torch.equal(a.sequences, b.sequences)
    assert torch.equal(a.exit_layers, b.exit_layers)


def test_a_copy_is_its_own() -> None:
    net = lively(decoder())
    twin = copy.deepcopy(net)
    before = net.generate(prompts(), max_new_tokens=4, exit_threshold=0.1)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.3)
    after = net.generate(prompts(), max_new_tokens=4, exit_threshold=0.1)
    assert torch.equal(before.sequences, after.sequences)
    assert twin.decoder.blocks[0] is not net.decoder.blocks[0]
    assert twin.decoder.blocks[0] in set(twin.model.modules())


# -- variants ------------------------------------------------------------------------------------------------


def test_the_codegen_variant() -> None:
    model = decoder("codegen", torch.float32)
    net = StopExit(model, heads=2, decision_layers=(0, 2), train_final=True)
    assert (net.heads, net.decision_layers, net.fill) == ((0, 2), (0, 2), "qkv")
    assert StopExit(_deep(20), heads=3).heads == (0, 3, 6, 9, 12, 15, 18)
    ids = prompts(2, 8)
    states = net._trace(ids[:, :-1], None, {0, 2, 3})
    ce = [F.cross_entropy(net.read(i, states[i]).transpose(1, 2), ids[:, 1:]) for i in (0, 2, 3)]
    torch.testing.assert_close(net.loss(ids), torch.stack(ce).sum())
    net.loss(ids).backward()
    assert net.final_head is not None
    assert net.final_head.weight.grad is not None
    assert all(p.grad is None for p in net.model.parameters())
    with torch.no_grad():
        net.final_head.weight.normal_()
    small: Any = net.extract({"exit": M - 1})
    assert torch.equal(small(ids).logits, net.use({"exit": M - 1})(ids))
    assert not torch.allclose(small(ids).logits, model(ids).logits)
    net.phase = "controller"
    scores = [net.controller(states[i]).flatten(0, 1) for i in (0, 2)]
    labels = net.make_labels([ids])[0].labels
    assert labels.shape == (3, 2, 7)
    ce = [F.cross_entropy(s, y.flatten()) for s, y in zip(scores, labels[:2], strict=True)]
    torch.testing.assert_close(net.loss(ids), (ce[0] + 2 * ce[1]) / 3)


def relative(kind: str) -> Any:
    """A random decoder of a family that differs from the four in one thing."""
    common: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": M, "num_attention_heads": 4}
    common |= {"max_position_embeddings": 48, "eos_token_id": END, "pad_token_id": None}
    if kind == "qwen3":  # keys are normed
        config = transformers.Qwen3Config(**common, intermediate_size=32, num_key_value_heads=2, head_dim=4)
    elif kind == "smollm3":  # every fourth block does not rotate
        common |= {"bos_token_id": 1, "intermediate_size": 32}
        config = transformers.SmolLM3Config(**common, num_key_value_heads=2)
    else:  # norms after the attention, embeddings of another width
        config = transformers.OPTConfig(**common, ffn_dim=32, word_embed_proj_dim=8, do_layer_norm_before=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4.0 if p.dim() > 1 else 1.0)
    return model


@pytest.mark.parametrize("kind", ["opt-350m", "qwen3", "smollm3"])
def test_relatives(kind: str) -> None:
    model = relative(kind)
    net = lively(model)
    assert net.fill == {"qwen3": "qkv", "opt-350m": "kv", "smollm3": "kv"}[kind]
    ids = prompts(3, 6)
    plain = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=END
    )
    assert torch.equal(net.generate(ids, max_new_tokens=5).sequences, plain)
    whole = net.generate(ids, max_new_tokens=6, exit_threshold=0.0, eos_token_id=[])
    for row in range(3):
        alone = net.generate(ids[row : row + 1], max_new_tokens=6, exit_threshold=0.0, eos_token_id=[])
        assert torch.equal(alone.sequences[0], whole.sequences[row])
    small = net.extract({"exit": 1})
    assert torch.equal(small(ids).logits, net.use({"exit": 1})(ids))
    assert StopExit(model, head_norm="ln_f").read(0, torch.zeros(1, D, dtype=torch.float64)).shape == (1, V)


def _deep(layers: int) -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **sizes))


def test_initial_heads() -> None:
    model = decoder("llama")
    net = StopExit(model, head_init="lm_head", head_norm="ln_f")
    h = torch.randn(3, D, dtype=torch.float64)
    torch.testing.assert_close(net.read(0, h), model.lm_head(model.model.norm(h)))
    raw = StopExit(model)
    torch.testing.assert_close(raw.read(1, h), h @ raw.exit_heads[1].weight.T)
    assert raw.exit_heads[0].weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(StopExit(model).exit_heads[0].weight, raw.exit_heads[0].weight)  # by the seed
    assert not torch.equal(StopExit(model, seed=1).exit_heads[0].weight, raw.exit_heads[0].weight)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_and_attention(attention: str) -> None:
    model = decoder("qwen2", attention=attention)
    net = lively(model)
    ids = prompts(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    both = net.generate(ids, mask, max_new_tokens=5, exit_threshold=0.3)
    alone = net.generate(ids[1:, 4:], max_new_tokens=5, exit_threshold=0.3)
    new = alone.sequences.shape[1] - 3
    assert both.sequences[1, 7 : 7 + new].tolist() == alone.sequences[0, 3:].tolist()
    plain = model.generate(
        ids[1:, 4:], attention_mask=mask[1:, 4:], max_new_tokens=5, do_sample=False, pad_token_id=END
    )
    whole = net.use({"exit": M - 1}).generate(ids, mask, max_new_tokens=5)
    new = plain.shape[1] - 3
    assert whole.sequences[1, 7 : 7 + new].tolist() == plain[0, 3:].tolist()


def test_batches_in_every_form_give_one_loss() -> None:
    net = lively(decoder())
    ids = prompts(2, 8)
    expected = net.loss(ids)
    torch.testing.assert_close(net.loss((ids[:, :-1], ids[:, 1:])), expected)
    torch.testing.assert_close(net.loss({"input_ids": ids, "labels": ids}), expected)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 3] = -100  # nothing real comes before the first token
    torch.testing.assert_close(net.loss({"input_ids": padded, "labels": labels, "attention_mask": mask}), expected)


def test_a_stop_without_an_end_token() -> None:
    net = lively(decoder())
    out = net.generate(prompts(), max_new_tokens=5, policy=Says({0: [STOP]}), eos_token_id=[], pad_token_id=5)
    assert out.sequences[:, 7:].tolist() == [[5]] * 3  # nothing goes on once all have stopped
    assert out.stopped.all()
    assert out.lengths.tolist() == [1, 1, 1]
    assert out.exit_layers.tolist() == [[M, 1]] * 3
    assert out.cost.fills == 0


def test_settings_of_transformers() -> None:
    net = lively(decoder())
    ids = prompts(2)
    free = net.generate(ids, max_new_tokens=6, eos_token_id=[])
    end = int(free.sequences[0, 8])
    config = transformers.GenerationConfig(max_new_tokens=6, eos_token_id=[end, 60], pad_token_id=0)
    out = net.generate(ids, generation_config=config)
    first = free.sequences[0, 6:].tolist().index(end)
    assert out.sequences[0, 6:].tolist()[: first + 2] == [*free.sequences[0, 6 : 7 + first].tolist(), 0]
    assert int(out.lengths[0]) == first
    assert (out.exit_layers[0, first + 1 :] == -1).all()
    assert net.generate(ids, eos_token_id=[]).sequences.shape == (2, 26)  # 20 by default, as in transformers
    config = transformers.GenerationConfig(max_length=9, eos_token_id=60)
    assert net.generate(ids, generation_config=config).sequences.shape[1] == 9


def test_calibrate() -> None:
    net = lively(decoder())
    ids = prompts(6)
    truth = net.generate(ids, max_new_tokens=5, eos_token_id=[]).sequences[:, 6:]
    found = net.calibrate(ids, truth, max_drop=0.0, grid=(0.0, 0.5, 2.0))
    assert net.point == found
    loose = net.calibrate(ids, truth, max_drop=1.0, grid=(0.0, 0.5))
    assert loose == Point(exit_threshold=0.0)
    both = net.calibrate(ids, truth, max_drop=1.0, grid=(0.0,), stop_threshold=0.9)
    assert set(both) == {"exit_threshold", "stop_threshold"} or both == Point(exit=M - 1)
    with pytest.raises(ValueError, match="prompts, references"):
        net.calibrate(ids, truth[:2])


def test_max_drop_is_a_difference_and_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    net = lively(decoder())
    truth = torch.arange(10).expand(5, 10)

    def told(x: Tensor, exit_threshold: float, **_: Any) -> Generated:
        right = [5] * 5 if exit_threshold == math.inf else [5, 5, 5, 5, 3]  # ROUGE-L 0.5 and 0.46
        new = torch.stack([torch.where(torch.arange(10) < n, torch.arange(10), 40) for n in right])
        layers = torch.full((5, 10), M if exit_threshold == math.inf else 1)
        stopped = torch.zeros(5, dtype=torch.bool)
        return Generated(torch.cat((x, new), 1), layers, stopped, torch.full((5,), 10), Cost())

    monkeypatch.setattr(net, "generate", told)
    for max_drop, point in ((0.05, Point(exit_threshold=0.5)), (0.03, Point(exit=M - 1))):
        assert net.calibrate(prompts(5), truth, max_drop=max_drop, grid=(0.5,)) == point


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_rouge_l(a: list[int], b: list[int]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    expected = 2 * table[-1][-1] / (len(a) + len(b))
    padded = torch.tensor([[*a, 0, 0]])
    assert rouge_l(padded, torch.tensor([b]), torch.tensor([len(a)])).item() == pytest.approx(expected)
    assert rouge_l(torch.tensor([a]), torch.tensor([a])).item() == 1.0
    assert rouge_l(torch.tensor([a]), torch.tensor([b]), torch.tensor([0])).item() == 0.0


# -- a decoder of one's own ----------------------------------------------------------------------------------


class OwnBlock(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.i, self.norm = i, nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, h: Tensor, mask: Tensor | None, store: Any) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        k, v = k[:, None], v[:, None]
        if store is not None:
            k, v = store.update(k, v, self.i)
        return h + self.out(F.scaled_dot_product_attention(q[:, None], k, v, attn_mask=mask)[:, 0])


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(V, D), nn.Embedding(32, D)
        self.stack = nn.ModuleList([OwnBlock(i) for i in range(3)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        h = self.embed(ids) + self.place(torch.arange(t))
        for block in self.stack:
            h = block(h, torch.ones(t, t, dtype=torch.bool).tril(), None)
        z: Tensor = self.head(self.norm(h))
        return z


class OwnParts(Parts):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.own, self.blocks, self.head, self.max_length = model, model.stack, model.head, 32

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.own.embed(ids) + self.own.place(positions), {}

    def block(self, i: int, h: Tensor, mask: Tensor | None, context: Mapping[str, Tensor], store: Any) -> Tensor:
        out: Tensor = self.blocks[i](h, mask, store)
        return out

    def normed(self, h: Tensor) -> Tensor:
        out: Tensor = self.own.norm(h)
        return out


def test_a_decoder_of_ones_own() -> None:
    torch.manual_seed(0)
    model = Own().double()
    with pytest.raises(ValueError, match="laid out like none"):
        StopExit(model)
    net = lively(model, parts=OwnParts, eos_token_id=END)
    ids = prompts(4, 5)
    plain = ids
    for _ in range(6):
        plain = torch.cat((plain, model(plain)[:, -1:].argmax(-1)), 1)
    out = net.generate(ids, max_new_tokens=6, eos_token_id=[])
    assert torch.equal(out.sequences, plain)
    mixed = net.generate(ids, max_new_tokens=6, exit_threshold=0.34, eos_token_id=[])
    alone = [net.generate(row[None], max_new_tokens=6, exit_threshold=0.34, eos_token_id=[]) for row in ids]
    assert torch.equal(mixed.sequences, torch.cat([a.sequences for a in alone]))
    assert mixed.exit_layers.tolist() == [a.exit_layers[0].tolist() for a in alone]
    net.loss(ids).backward()
    with pytest.raises(NotImplementedError, match="truncated"):
        net.extract({"exit": 0})


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "some"}, "heads: 'some'"),
        ({"heads": 0}, "heads: 0"),
        ({"heads": (0, 3)}, "heads: .*out of 0..2"),
        ({"heads": (1, 0)}, "heads: "),
        ({"heads": ()}, "heads: "),
        ({"heads": (0,), "decision_layers": (1,)}, "decision_layers: "),
        ({"decision_layers": ()}, "decision_layers: "),
        ({"head_norm": "rms"}, "head_norm: "),
        ({"head_init": "zero"}, "head_init: "),
        ({"head_std": 0.0}, "head_std: "),
        ({"label_rule": "best"}, "label_rule: "),
        ({"heads_share": 1.5}, "heads_share: "),
        ({"fill": "none"}, "fill: "),
        ({"thresholds": (-0.1,)}, r"thresholds\[0\]: -0.1"),
        ({"thresholds": ((0.5, float("nan")),)}, r"thresholds\[0\]\[1\]: nan"),
        ({"thresholds": ((0.5, 0.5, 0.5),)}, r"thresholds\[0\]: .*exactly 2"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StopExit(decoder(), **options)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="model"):
        StopExit("gpt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="laid out like none"):
        StopExit(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="fewer than 2 blocks"):
        StopExit(_deep(1))
    broken = decoder()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        StopExit(broken)
    windows = decoder()
    windows.config.sliding_window = 4
    with pytest.raises(ValueError, match="window"):
        StopExit(windows)
    flash = decoder()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        StopExit(flash)

    class Scaled(type(decoder())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    scaled = decoder()
    scaled.__class__ = Scaled
    with pytest.raises(ValueError, match="does not give the model's own logits"):
        StopExit(scaled)


def test_bad_calls() -> None:
    model = decoder()
    net = lively(model)
    ids = prompts()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_new_tokens": 60}, "positions for 48"),
        ({"exit_threshold": -1.0}, "exit_threshold: -1.0"),
        ({"do_sample": True}, "do_sample"),
        ({"num_beams": 3}, "num_beams"),
        ({"output_attentions": True}, "output_attentions"),
        ({"generation_config": transformers.GenerationConfig(do_sample=True)}, "do_sample"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask: shape"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]] * 3)}, "pad prompts on the left"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            net.generate(ids, **options)
    for wrong in (ids.float(), ids[0], ids[:, :0], ids + V):
        with pytest.raises(ValueError, match="input_ids"):
            net.generate(wrong)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        net.generate(ids, stop_threshold=0.5)
    with pytest.raises(ValueError, match="end-of-sequence"):
        net.use({"exit_threshold": 0.5, "stop_threshold": 0.5})
    net.generate(ids, stop_threshold=0.5, eos_token_id=7, max_new_tokens=2)
    with pytest.raises(ValueError, match="not a setting"):
        net.use({"exit": 9})
    with pytest.raises(ValueError, match="has no head"):
        FixedExit(net, M - 1)
    with pytest.raises(ValueError, match="score"):
        Confidence(net, 0.5, "entropy")
    with pytest.raises(ValueError, match="exit_threshold"):
        Controller(net, float("nan"))
    with pytest.raises(ValueError, match="phase"):
        net.phase = "stop"
    for batch, message in (
        (ids[:, :1], "batch: ids"),
        ((ids, ids[:, 1:]), "one place on"),
        ({"input_ids": ids, "labels": torch.full_like(ids, -100)}, "no token is left"),
        ((ids, ids + V), "target: tokens run"),
        (ids.float(), "input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            net.loss(batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there are none"):
        net.make_labels([])
    with pytest.raises(ValueError, match="candidate, reference"):
        rouge_l(ids, ids[:2])
