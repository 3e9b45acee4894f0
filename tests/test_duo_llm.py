"""Duo-LLM. The numbers in the comments are those of the specification's exact properties."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import pliant.core.persistence as persistence
import pliant.routing.duo_llm as duo_llm
from pliant.core.cost import count_flops
from pliant.core.dynamic import NotStaticError, Point
from pliant.core.frontier import measure, next_token_accuracy
from pliant.core.inputs import logits, next_token_loss
from pliant.core.training import fit
from pliant.routing.duo_llm import (
    BIG,
    SKIP,
    SMALL,
    DuoFFN,
    DuoLLM,
    Learned,
    Oracle,
    aligned,
    budget_loss,
    small_ffn,
)

transformers = pytest.importorskip("transformers")
WORDS, WIDTH, T = 40, 16, 12
BYPASS: dict[str, Any] = {"bypass": True, "p": (0.2, 0.4, 0.4)}


def decoder(kind: str = "llama", layers: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A fresh small decoder whose weights are large enough that a path matters."""
    names = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in ("llama", "qwen2"):
            config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
            sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": layers}
            sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
            own = config(**names, **sizes)
            model = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}[kind](own)
        elif kind == "gpt2":
            sizes = {"n_embd": WIDTH, "n_layer": layers, "n_head": 2, "n_positions": 32}
            off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**names, **sizes, **off))
        else:
            sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 32, "num_hidden_layers": layers}
            sizes |= {"num_attention_heads": 2, "max_position_embeddings": 32}
            model = transformers.OPTForCausalLM(transformers.OPTConfig(**names, **sizes, dropout=0.0))
        with torch.no_grad():
            for q in model.parameters():
                if q.dim() > 1:
                    q.mul_(8)
    return model.to(dtype).eval()


def ids(rows: int = 3, length: int = T, seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def duo(kind: str = "llama", layers: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> DuoLLM:
    """A converted decoder, its siblings and routers large enough to matter, in evaluation mode."""
    net = DuoLLM(decoder(kind, layers, dtype), ids(), **{"small_ratio": 0.25, **options})
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in net.layers:
            for q in layer.small.parameters():
                q.normal_(0, 0.3)
            for q in layer.routers:
                q.normal_(0, 1)
    return net.eval()


class Block(nn.Module):
    """A block of one's own: causal attention without a mask argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.ffn(self.norm2(x))


class Own(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for block in self.blocks:
            y = block(y)
        return self.head(y)


def run(net: DuoLLM, x: Any, choices: Any) -> Tensor:
    with torch.no_grad():
        return logits(net.run(x, choices))


# -- property 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["all_big", "own", "shared"])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "qwen2"])
def test_tree_is_brute_force(kind: str, context: Any) -> None:
    net = duo(kind, **BYPASS)
    for choices in (("small", "big"), ("skip", "small", "big")):
        options: dict[str, Any] = {"positions": slice(3, 7), "choices": choices, "context": context}
        tree, brute = net.oracle(ids(), **options), net.oracle(ids(), **options, method="brute")
        # RMS norms of transformers compute in float32 whatever the type
        limit = 1e-10 if kind in ("gpt2", "opt") else 1e-5
        torch.testing.assert_close(tree.loss, brute.loss, rtol=0, atol=limit)
        assert (tree.loss.amax(1) - tree.loss.amin(1)).min() > 0.01  # paths differ, or nothing was compared
        assert torch.equal(tree.where, brute.where)
        c, count = len(choices), 3
        if context != "shared":  # 1: 2^(L+1) - 2, (3^(L+1) - 3) / 2
            assert tree.evaluations == {2: 2**4 - 2, 3: (3**4 - 3) // 2}[c]
            assert brute.evaluations == count * c**count


@pytest.mark.parametrize(("layers", "choices"), [(5, ("small", "big")), (4, ("skip", "small", "big"))])
def test_tree_against_rerouted_full_passes(layers: int, choices: tuple[str, ...]) -> None:
    """1: written out by hand, token by token, in float32, with the evaluations really counted."""
    net = duo("gpt2", layers, torch.float32, **BYPASS)
    x = ids(1)
    rows = {"n": 0}
    true = DuoFFN.option

    def counted(self: DuoFFN, r: int, u: Tensor) -> Tensor:
        rows["n"] += u.shape[:-1].numel()
        return true(self, r, u)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DuoFFN, "option", counted)
        found = net.oracle(x, [4, 8], choices=choices)
    c = len(choices)
    assert rows["n"] == 2 * found.evaluations + layers * T  # and one plain pass of all T tokens
    assert found.evaluations == (c ** (layers + 1) - c) // (c - 1)
    for p in range(0, len(found.paths), 7):
        for n, t in enumerate((4, 8)):
            given = torch.full((layers, 1, T), BIG)
            given[:, 0, t] = found.paths[p]
            loss = F.cross_entropy(run(net, x, given)[0, t], x[0, t + 1])
            assert abs(loss - found.loss[n, p]) < 1e-5


@pytest.mark.parametrize("scope", ["ffn", "layer"])
def test_tree_with_padding_and_scope(scope: Any) -> None:
    net = duo("llama", bypass_scope=scope, **BYPASS)
    x = ids()
    mask = torch.ones_like(x)
    x[1, :4], mask[1, :4] = 0, 0
    options: dict[str, Any] = {"positions": [5, 9], "choices": ("skip", "small", "big"), "attention_mask": mask}
    tree = net.oracle(x, **options)
    torch.testing.assert_close(tree.loss, net.oracle(x, **options, method="brute").loss, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask"):
        net.oracle(x)


def test_a_search_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net = duo("gpt2", 4, **BYPASS)
    options: dict[str, Any] = {"choices": ("skip", "small", "big"), "samples": 2}
    whole = net.oracle(ids(), **options)  # 11 * 27 states in front of the last block: more than one attention call
    monkeypatch.setattr(duo_llm, "_LEAVES", 81 * WIDTH * 2)
    pieces = net.oracle(ids(), **options)
    assert torch.equal(whole.where, pieces.where)
    for name in ("loss", "entropy", "expected", "dense"):
        torch.testing.assert_close(getattr(whole, name), getattr(pieces, name), rtol=0, atol=1e-10)
    brute = net.oracle(ids(), [7], choices=options["choices"], method="brute")
    torch.testing.assert_close(whole.loss[whole.where[:, 1] == 7], brute.loss, rtol=0, atol=1e-10)


def test_own_context_sees_the_chosen_paths() -> None:
    net = duo("gpt2")
    found = net.oracle(ids(2), slice(2, 6), context="own", budget=1)
    assert found.chosen is not None
    given = torch.full((3, 2, T), BIG)
    for n, (b, t) in enumerate(found.where.tolist()):
        assert (found.paths[found.chosen[n]] == BIG).sum() == 1
        assert found.chosen[n] == found.best(1)[1][n]
        given[:, b, t] = found.paths[found.chosen[n]]
    y = run(net, ids(2), given)
    for n, (b, t) in enumerate(found.where.tolist()):
        loss = F.cross_entropy(y[b, t], ids(2)[b, t + 1])
        torch.testing.assert_close(loss, found.loss[n, found.chosen[n]], rtol=0, atol=1e-10)


# -- properties 2 and 3 ---------------------------------------------------------------------------------------------


def test_order_of_the_oracles() -> None:
    net = duo(**BYPASS)
    two, three = net.oracle(ids()), net.oracle(ids(), choices=("skip", "small", "big"))
    before = torch.full_like(two.dense, math.inf)
    for k in range(4):  # 2
        at_most = two.best(k, at_most=True)[0]
        assert (two.best()[0] <= at_most).all()
        assert (at_most[:, None] <= two.loss[:, two.big <= k]).all()
        assert (at_most <= before).all()
        assert torch.equal(two.best(k)[0], two.loss[:, two.big == k].amin(1))
        before = at_most
    assert torch.equal(two.best(0)[0], two.loss[:, 0])
    assert torch.equal(two.paths[0], torch.full((3,), SMALL))
    assert torch.equal(two.best(3)[0], two.loss[:, -1])
    torch.testing.assert_close(two.loss[:, -1], two.dense, rtol=0, atol=1e-6)
    assert (three.best()[0] <= two.best()[0] + 1e-9).all()
    difficulty = two.difficulty()  # 3
    assert (difficulty >= 0).all()
    assert torch.equal(difficulty == 0, two.loss[:, 0] == two.loss.amin(1))
    assert (difficulty > 0).any()
    assert (two.difficulty(1) <= difficulty).all()


def handmade(loss: Tensor, layers: int = 2) -> Oracle:
    paths = torch.cartesian_prod(*[torch.tensor([SMALL, BIG])] * layers)
    n = len(loss)
    return Oracle(
        loss, paths, torch.zeros(n, 2, dtype=torch.long), loss[:, -1], loss, loss, loss[..., None], 6, "all_big"
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(0, 9), min_size=4, max_size=4), min_size=1, max_size=5))
def test_order_holds_for_any_losses(values: list[list[float]]) -> None:
    """2 and 3."""
    found = handmade(torch.tensor(values, dtype=torch.float64))
    budgets = torch.stack([found.best(k, at_most=True)[0] for k in range(3)])
    assert (budgets.diff(dim=0) <= 0).all()
    assert torch.equal(budgets[-1], found.best()[0])
    assert (found.difficulty() >= 0).all()
    assert torch.equal(found.difficulty() == 0, found.loss[:, 0] <= found.loss.amin(1))
    for row in found.table(trials=5):
        assert row["oracle_at_most"] - 1e-9 <= row["oracle"] <= row["best_fixed"] + 1e-9
        assert row["oracle"] - 1e-9 <= row["best_random"] <= found.loss.max() + 1e-9


def test_ties_take_the_fewest_big_layers_then_the_first() -> None:
    close = [[1.0, 0.5 + 1e-8, 0.5, 0.5 - 1e-8], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.5, 0.4]]
    found = handmade(torch.tensor(close, dtype=torch.float64))
    assert found.best()[1].tolist() == [1, 0, 3]
    assert found.best(1)[1].tolist() == [1, 1, 2]
    assert found.histogram(1).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert found.fixed(1) == 2
    three = torch.ones(1, 8, dtype=torch.float64)
    three[0, 3:5] = 0.5  # small big big, and big small small
    assert handmade(three, 3).best()[1].tolist() == [4]


# -- property 4 -----------------------------------------------------------------------------------------------------


def told(paths: list[list[int]], loss: list[list[float]]) -> Oracle:
    """An oracle of given losses (n, P)."""
    table = torch.tensor(loss, dtype=torch.float64)
    n, p = table.shape
    rest = torch.zeros(n, p, 0), 1, "all_big"
    return Oracle(table, torch.tensor(paths), torch.zeros(n, 2), table[:, -1], table, table, *rest)


def test_difficulty_is_the_gain_over_all_small_whatever_else_may_be_chosen() -> None:  # 3
    paths = [[a, b] for a in (SKIP, SMALL, BIG) for b in (SKIP, SMALL, BIG)]
    loss = [[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 4.5], [1.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 6.0, 4.5]]
    found = told(paths, loss)
    assert found.difficulty().tolist() == [3.0, 4.0]  # 5 less the least; not 9, of all skip
    assert found.difficulty(0).tolist() == [0.0, 4.0]
    without = told([[a, b] for a in (SKIP, BIG) for b in (SKIP, BIG)], [[9.0, 7.0, 3.0, 4.0]])
    assert without.difficulty().tolist() == [6.0]  # no small path: the cheapest


def test_difficulty_at_k_is_of_k_big_layers_at_most() -> None:  # 3
    found = told([[SMALL, SMALL], [SMALL, BIG], [BIG, SMALL], [BIG, BIG]], [[2.0, 1.0, 1.5, 3.0]])
    assert [found.difficulty(k).item() for k in (0, 1, 2)] == [0.0, 1.0, 1.0]  # with exactly two: -1


@pytest.mark.slow
def test_two_processes_calibrate_on_the_joined_data(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        start = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"] if processes == 2 else []
        command = [sys.executable, *start, str(script), str(out), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


_SCRIPT = """
    import os, sys, torch
    sys.path.insert(0, sys.argv[2])
    from test_duo_llm import duo, ids
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    net = duo(budgets=(0.25, 0.5))
    data = [ids(2, 9, 1), ids(3, 7, 2)]  # of two sizes
    mine = data[rank : rank + 1] if world > 1 else data
    losses = net.choose_patterns(mine)
    shares = net.calibrate(mine)
    if rank == 0:
        torch.save([torch.tensor(losses), torch.tensor(shares), net.patterns, net.layers[0].shift], sys.argv[1])
"""


def test_data_that_is_not_finite_moves_no_threshold() -> None:
    net = duo()
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net.layers[-1].routers[1].fill_(math.nan)
    with pytest.raises(ValueError, match="data: the routers' scores"):
        net.calibrate([ids()])
    with torch.no_grad():
        net.layers[0].small.down_proj.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="data: the loss"):
        net.choose_patterns([ids()])
    after = net.state_dict()
    for name in before:
        if name.endswith(("shift", "patterns")):
            assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("scope", ["ffn", "layer"])
def test_four_threads_answer_as_one(scope: Any) -> None:
    net = duo(**BYPASS, bypass_scope=scope, layers=2)
    texts = [ids(2, 8, seed) for seed in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for point in net.points():
            net.use(point)
            alone = [logits(net(x)) for x in texts]
            with torch.no_grad(), ThreadPoolExecutor(4) as pool:
                for _ in range(6):
                    for x, y in zip(alone, pool.map(lambda x: logits(net(x)), texts), strict=True):
                        assert torch.equal(x, y)
    finally:
        sys.setswitchinterval(before)


def test_every_point_answers_compiled_as_it_does_uncompiled() -> None:
    net = duo(**BYPASS, layers=2, dtype=torch.float32)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend)
        for point in (*net.points(), *net.points()[::-1]):
            net.use(point)
            with torch.no_grad():
                torch.testing.assert_close(logits(compiled(ids(2, 6))), logits(net(ids(2, 6))))


def test_a_loss_that_fails_leaves_no_trace() -> None:
    net = duo(budgets=(0.25, 0.5)).train()
    net.schedule(0.9)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="target"):
        net.loss((ids(), torch.full((3, T), -100)))

    def fail(*_: Any) -> None:
        raise RuntimeError("boom")

    handle = net.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        net.loss(ids())
    handle.remove()
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not layer.routes and not layer.watchers and not layer.taken for layer in net.layers)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_path_leaves_what_comes_before(kind: str) -> None:
    net = duo(kind, dtype=torch.float32, execution="masked", **BYPASS)
    t, kept = 6, []
    for m in net.model.modules():
        if type(m).__name__.endswith("Attention"):
            key = m.k_proj if hasattr(m, "k_proj") else m.c_attn
            key.register_forward_hook(lambda m, a, y: kept.append(y.detach().clone()))
    first = net.draw(3, T, generator=torch.Generator().manual_seed(0))
    other = first.clone()
    other[:, :, t] = (first[:, :, t] + 1) % 3
    a, keys = run(net, ids(), first), list(kept)
    kept.clear()
    b = run(net, ids(), other)
    assert torch.equal(a[:, :t], b[:, :t])  # 4, bit for bit
    assert not torch.equal(a[:, t], b[:, t])
    assert all(torch.equal(x[:, :t], y[:, :t]) for x, y in zip(keys, kept, strict=True))
    assert not torch.equal(keys[-1][:, t], kept[-1][:, t])


# -- properties 5 and 6 ---------------------------------------------------------------------------------------------


def test_equal_siblings_leave_nothing_to_choose() -> None:
    net = DuoLLM(decoder(), ids(), small=copy.deepcopy).eval()
    found = net.oracle(ids(), samples=4)
    torch.testing.assert_close(found.loss, found.loss[:, :1].expand_as(found.loss), rtol=0, atol=1e-6)  # 5
    assert found.difficulty().abs().max() < 1e-6
    assert all(abs(row["oracle"] - row["all_big"]) < 1e-6 for row in found.table())
    assert (found.best()[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt"])
def test_all_big_is_the_dense_model(kind: str, dtype: torch.dtype) -> None:
    plain, net = decoder(kind, dtype=dtype), duo(kind, dtype=dtype, **BYPASS)
    with torch.no_grad():
        assert torch.equal(logits(net(ids())), logits(plain(ids())))  # 6
        assert torch.equal(run(net, ids(), torch.full((3, 3, T), BIG)), logits(plain(ids())))
        assert logits(net.use({"policy": "router", "budget": 0.5})(ids())).dtype is dtype


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_all_skip_is_attention_only(kind: str, execution: Any) -> None:
    plain, net = decoder(kind), duo(kind, execution=execution, **BYPASS)
    with torch.no_grad():
        for name, q in plain.named_parameters():  # an FFN that gives zero
            if any(part in name for part in ("mlp.down_proj", "mlp.c_proj", "fc2")):
                q.zero_()
        wanted = logits(plain(ids()))
    for skip in ([SKIP] * 3, torch.full((3, 3, T), SKIP)):
        assert torch.equal(run(net, ids(), skip), wanted)  # 6
    with torch.no_grad():
        assert torch.equal(logits(net.use({"policy": "skip"})(ids())), wanted)


def test_whole_layer_bypass() -> None:
    net = duo(bypass_scope="layer", **BYPASS)
    model: Any = net.model
    with torch.no_grad():
        bare = model.lm_head(model.model.norm(model.model.embed_tokens(ids())))
    assert torch.equal(run(net, ids(), [SKIP] * 3), bare)
    mixed = torch.full((3, 3, T), BIG)
    mixed[1, :, 5] = SKIP
    ffn_only = duo(**BYPASS)
    assert not torch.allclose(run(net, ids(), mixed)[:, 5], run(ffn_only, ids(), mixed)[:, 5])
    assert Point(policy="skip") not in net.points()
    plain = net.extract({"policy": "big"})
    with torch.no_grad():
        assert torch.equal(logits(plain(ids())), logits(net.use({"policy": "big"})(ids())))
    assert not any(
        isinstance(getattr(h, "__self__", None), DuoFFN) for m in plain.modules() for h in m._forward_hooks.values()
    )


# -- property 7 -----------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_random_choices(seed: int, big: float) -> None:
    net = _SHARED
    p = ((1 - big) / 2, (1 - big) / 2, big)
    choices = net.draw(20, 50, p, torch.Generator().manual_seed(seed))
    assert choices.shape == (3, 20, 50)
    for option, chance in enumerate(p):  # 7
        sigma = math.sqrt(chance * (1 - chance) / choices.numel())
        assert abs((choices == option).double().mean() - chance) <= 4 * sigma
    assert torch.equal(choices, net.draw(20, 50, p, torch.Generator().manual_seed(seed)))
    assert not torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[:, 0], choices[:, 1])


_SHARED = duo()


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_both_siblings_learn_in_every_layer(execution: Any) -> None:
    net = duo(execution=execution).train()
    torch.manual_seed(0)
    net.loss(ids(8)).backward()  # 8 * 12 >= 64
    for layer in net.layers:  # 7
        for part in (layer.big, layer.small):
            assert all(q.grad is not None and q.grad.abs().sum() > 0 for q in part.parameters())
        assert all(q.grad is None for q in layer.routers)


# -- properties 8 and 9 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bypass", [False, True])
def test_soft_becomes_hard(bypass: bool) -> None:
    net = duo(**(BYPASS if bypass else {}))
    layer = net.layers[1]
    u = torch.randn(50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        choice = layer.decide(layer.score(u, 0))
        assert len(choice.unique()) == len(net.choices)
        one_hot = (choice[:, None] == torch.tensor(net.choices)).double()
        torch.testing.assert_close(layer.soft(u, one_hot), layer.hard(u, choice), rtol=0, atol=1e-6)  # 8
        layer.route = Learned(0)
        hard = layer(u)
        gaps = []
        for tau in (1.0, 10.0, 1e6):
            layer.route = Learned(0, tau)
            gaps.append((layer(u) - hard).abs().max().item())
    assert gaps[-1] < 1e-6
    assert gaps[0] > gaps[1] > gaps[2]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.9))
def test_budget_loss(seed: int, target: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    share = torch.rand(4, 10, dtype=torch.float64, generator=rng).requires_grad_()
    loss = budget_loss(share, target)
    loss.backward()
    assert budget_loss(torch.full((4, 10), target, dtype=torch.float64), target) < 1e-20  # 9
    assert torch.equal(share.grad.sign(), (share.mean() - target).sign().expand_as(share))
    shuffled = share[torch.randperm(4, generator=rng)]
    torch.testing.assert_close(budget_loss(shuffled, target), loss, rtol=1e-9, atol=1e-15)
    uneven = torch.cat((torch.ones(2, 10), torch.zeros(2, 10)))  # spent in two layers, or evenly: the same
    torch.testing.assert_close(budget_loss(uneven, target), budget_loss(torch.full((4, 10), 0.5), target))


def test_budget_loss_is_in_the_objective() -> None:
    net = duo(budgets=(0.2, 0.8), router_share=1.0, beta=0.0).train()
    net.schedule(0.5)
    assert net.temperature == pytest.approx(math.sqrt(10))
    plain = [net.loss(ids()).item() for _ in range(2)]
    net.beta, net.turn = 3.0, torch.zeros_like(net.turn)
    for i, target in enumerate((0.2, 0.8)):
        shares: list[Tensor] = []

        def note(m: DuoFFN, args: Any, i: int = i, shares: list[Tensor] = shares) -> None:
            shares.append((net.temperature * m.score(args[0].flatten(0, 1), i)).softmax(-1)[:, -1])

        for layer in net.layers:
            layer.register_forward_pre_hook(note)
        value = net.loss(ids()).item()
        assert value == pytest.approx(plain[i] + 3 * (torch.stack(shares).mean().item() - target) ** 2)
        for layer in net.layers:
            layer._forward_pre_hooks.clear()


# -- property 10 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_compact_is_masked_and_computes_less(kind: str) -> None:
    compact, masked = (duo(kind, dtype=torch.float32, execution=e, **BYPASS) for e in ("compact", "masked"))
    choices = compact.draw(3, T, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run(compact, ids(), choices), run(masked, ids(), choices), rtol=1e-6, atol=1e-5)  # 10
    with torch.no_grad():
        for layer, other in zip(compact.layers, masked.layers, strict=True):
            u = torch.randn(30, WIDTH)
            mine = torch.arange(30) % 3
            torch.testing.assert_close(layer.hard(u, mine), other.hard(u, mine), rtol=0, atol=1e-6)
    each = compact.option_flops()
    ran: dict[tuple[int, str], int] = {}
    for i, layer in enumerate(compact.layers):
        for name in ("small", "big"):
            getattr(layer, name).register_forward_hook(
                lambda m, a, y, key=(i, name): ran.__setitem__(key, y.shape[:-1].numel())
            )
    spent = count_flops(lambda: run(compact, ids(), choices), nonzero=False).total
    rest = count_flops(lambda: run(compact, ids(), [SKIP] * 3), nonzero=False).total
    wanted = sum(each[i][r] * int((choices[i] == r).sum()) for i in range(3) for r in range(3))
    assert spent - rest == wanted  # 10
    for (i, name), rows in ran.items():
        assert rows == int((choices[i] == {"small": SMALL, "big": BIG}[name]).sum())
    assert each[0][SKIP] == 0
    assert each[0][BIG] == 4 * each[0][SMALL]


# -- property 11 ----------------------------------------------------------------------------------------------------


def near(big: nn.Module) -> nn.Module:
    """A sibling that is as good as the big one, but different."""
    small = copy.deepcopy(big)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for q in small.parameters():
            q.add_(0.3 * q.std() * torch.randn_like(q))
    return small


def test_null_control() -> None:
    net = DuoLLM(decoder(), ids(), small=near).eval()
    x = ids(4, 24)
    found = net.oracle(x, samples=16)
    # nothing to gain in expectation, token by token (Gibbs) ...
    assert (found.expected >= found.expected[:, -1:] - 1e-9).all()
    torch.testing.assert_close(found.expected[:, -1], found.entropy[:, -1])
    # ... yet the oracle on such labels lies below all big  (11)
    for row in found.table()[1:-1]:
        assert row["null_oracle"] < row["null_all_big"] - 0.01
        assert row["null_fixed"] >= found.expected[:, -1].mean() - 1e-9
    n = found.sampled[:, -1].numel()
    noise = found.sampled[:, -1].std() / math.sqrt(n)
    assert abs(found.sampled[:, -1].mean() - found.entropy[:, -1].mean()) < 5 * noise
    again = net.oracle(x, samples=16)
    assert torch.equal(found.sampled, again.sampled)


def test_controls_by_hand() -> None:
    net = duo("gpt2")
    found = net.oracle(ids(), [4, 7], samples=3)
    row = found.table(trials=7)[1]
    columns = [p for p in range(8) if (found.paths[p] == BIG).sum() == 1]
    loss, entropy, sampled = found.loss[:, columns], found.entropy[:, columns], found.sampled[:, columns]
    n = range(len(loss))
    assert row["oracle"] == pytest.approx(loss.amin(1).mean().item())
    assert row["best_fixed"] == pytest.approx(loss.mean(0).amin().item())
    assert row["mean_path"] == pytest.approx(loss.mean().item())
    assert row["least_entropy"] == pytest.approx(sum(loss[i, entropy[i].argmin()].item() for i in n) / len(loss))
    drawn = [loss[i, sampled[i, :, s].argmin()].item() for i in n for s in range(3)]
    assert row["drawn_label"] == pytest.approx(sum(drawn) / len(drawn))
    assert row["ensemble"] == pytest.approx((-(-loss).exp().mean(1).log()).mean().item())
    assert row["null_oracle"] == pytest.approx(sampled.amin(1).mean().item())
    assert row["all_big"] == pytest.approx(found.dense.mean().item())
    assert math.isnan(net.oracle(ids(), [4]).table()[1]["null_oracle"])
    y = run(net, ids(), [SMALL, SMALL, SMALL])  # entropy of a path, in the shared context
    p = y[:, 4].softmax(-1)
    shared = net.oracle(ids(), [4], context="shared")
    torch.testing.assert_close(shared.entropy[:, 0], -(p * p.log()).sum(-1))


# -- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "own"])
def test_extract(kind: str) -> None:
    net = DuoLLM(Own(), ids(), **BYPASS).eval() if kind == "own" else duo(kind, dtype=torch.float32, **BYPASS)
    for point in net.points():
        net.use(point)
        if point["policy"] in ("random", "router"):
            with pytest.raises(NotStaticError):
                net.extract(point)
            continue
        plain = net.extract(point)
        assert all(type(m).__module__.partition(".")[0] != "pliant" for m in plain.modules())
        with torch.no_grad():
            assert torch.equal(logits(plain(ids())), logits(net(ids())))
        assert net.point == point
    before = Own() if kind == "own" else decoder(kind)
    assert set(net.extract({"policy": "big"}).state_dict()) == set(before.state_dict())


def test_points_and_use() -> None:
    net = duo(budgets=(0.75, 0.25))
    assert [str(p) for p in net.points()] == [
        "policy=small",
        *(f"policy={p} budget={b}" for b in (0.25, 0.75) for p in ("random", "fixed", "router")),
        "policy=big",
    ]
    assert net.point == Point(policy="big")
    assert (net.patterns == BIG).sum(1).tolist() == [2, 1]
    x = ids(4, 20)
    for budget in (0.25, 0.75):
        net.use({"policy": "random", "budget": budget})
        trace = net.trace(x)
        assert abs(trace.share().mean() - budget) < 0.15
        assert torch.equal(trace.logits, net.trace(x).logits)  # the same choices in evaluation mode
        net.use({"policy": "fixed", "budget": budget})
        assert torch.equal(net.trace(x).choices[:, 0, 0], net.patterns[net.budgets.index(budget)])
        assert net.trace(x).entropy().abs().max() == 0
    with pytest.raises(ValueError, match=r"policy=router budget=0\.5 is not a setting"):
        net.use({"policy": "router", "budget": 0.5})
    assert DuoLLM(Own(), ids(), budgets=()).points() == [Point(policy="small"), Point(policy="big")]
    assert net.use({"policy": "router", "budget": 0.25}).trace(x).entropy().max() > 0


def test_router_decides_by_its_scores() -> None:
    net = duo(**BYPASS).use({"policy": "router", "budget": 0.5})
    inputs: list[Tensor] = []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    trace = net.trace(ids())
    for layer, u, choice in zip(net.layers, inputs, trace.choices, strict=True):
        assert torch.equal((u @ layer.routers[1].T).argmax(-1), choice)
    torch.testing.assert_close(run(net, ids(), trace.choices), trace.logits)
    sampled = duo(decision="sample", tau=(1.0, 1e4)).use(net.point)
    assert torch.equal(sampled.trace(ids()).choices, duo().use(net.point).trace(ids()).choices)  # sharp: the same
    drawn = duo(decision="sample", tau=(1.0, 0.01)).use(net.point)
    assert 0.3 < drawn.trace(ids(8)).share().mean() < 0.7  # flat: even


def test_generate_follows_the_dial() -> None:
    net = duo(dtype=torch.float32).use({"policy": "router", "budget": 0.5})
    x = ids(2, 5)
    told = net.generate(x, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for t in range(5, 9):  # the cache is complete: a plain pass over the whole says the same
        with torch.no_grad():
            assert torch.equal(logits(net(told[:, :t]))[:, -1].argmax(-1), told[:, t])
    with pytest.raises(ValueError, match="random"):
        net.use({"policy": "random", "budget": 0.5}).generate(x)


def test_stages() -> None:
    net = duo(dtype=torch.float32, router_share=0.5, budgets=(0.5,)).train()
    frozen = next(iter(net.model.parameters()))
    optimizer = torch.optim.AdamW(net.parameter_groups(0.1), lr=1e-2)
    groups = net.parameter_groups(0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert len(groups[1]["params"]) == 3

    def step(progress: float) -> tuple[bool, bool]:
        net.schedule(progress)
        before = frozen.detach().clone(), net.layers[0].routers[0].detach().clone()
        optimizer.zero_grad(set_to_none=False)
        net.loss(ids(6)).backward()
        optimizer.step()
        return not torch.equal(before[0], frozen), not torch.equal(before[1], net.layers[0].routers[0])

    torch.manual_seed(0)
    assert step(0.0) == (True, False)
    assert step(0.4) == (True, False)
    assert net.stage == "random"
    assert step(0.5) == (False, True)
    assert net.temperature == 1.0
    assert step(0.99) == (False, True)
    assert net.temperature == pytest.approx(10**0.98)
    net.joint = True
    assert step(0.0) == (True, False)
    assert step(0.7) == (True, True)


def test_fit_and_measure() -> None:
    x = ids(1, 8).repeat(24, 1).roll(1, 0)
    x = (x + torch.arange(24)[:, None]) % (WORDS - 3) + 3  # each word is followed by a fixed other one, nearly
    net = DuoLLM(Own(), x[:2], budgets=(0.5,), router_share=0.4, small_ratio=0.25)
    history = fit(
        net,
        [x[i : i + 8] for i in range(0, 24, 8)],
        epochs=10,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        progress=False,
    )
    assert history.losses[5] < history.losses[0]
    assert all(q.requires_grad for q in net.parameters())
    test = [(x[:, :-1], x[:, 1:])]
    front = measure(net, test, metric=next_token_accuracy, repeats=0)
    cost = {str(r.point): r.flops for r in front.rows}
    assert len(cost) == 5
    assert cost["policy=small"] < cost["policy=fixed budget=0.5"] < cost["policy=big"]
    assert cost["policy=small"] < cost["policy=router budget=0.5"] < cost["policy=big"]
    assert {r.point["policy"]: r.static for r in front.rows}["router"] is False
    assert front.best(flops=cost["policy=big"])


def test_inputs_by_name() -> None:
    net = duo(dtype=torch.float32, budgets=(0.5,), **BYPASS)
    mask = torch.ones_like(ids())
    fit(net, [{"input_ids": ids(), "attention_mask": mask, "labels": ids()}] * 3, epochs=2, lr=0.01, progress=False)
    x = {"input_ids": ids()[:, :-1], "attention_mask": mask[:, :-1]}
    front = measure(net, [(x, ids()[:, 1:])], metric=next_token_accuracy, repeats=0)
    assert len(front) == len(net.points()) == 6
    with torch.no_grad():
        for point in net.points():
            assert torch.equal(logits(net.use(point)(**x)), logits(net(x["input_ids"])))
            assert torch.equal(net.trace(x).logits, logits(net(**x)))


def test_a_run_goes_on_where_it_stopped(tmp_path: Any) -> None:
    """The stage, the turn of the routers and the random paths are those of the unbroken run."""

    def train(stop: int | None, folder: Any) -> DuoLLM:
        net = DuoLLM(decoder(dtype=torch.float32), ids(), budgets=(0.3, 0.6), router_share=0.5)

        def on_step(step: int, total: int, loss: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        try:
            fit(
                net,
                [ids()] * 8,
                steps=8,
                lr=0.05,
                checkpoint=folder,
                checkpoint_every=1,
                progress=False,
                on_step=on_step,
            )
        except KeyboardInterrupt:
            return train(None, folder)
        return net

    whole, broken = train(None, tmp_path / "a"), train(6, tmp_path / "b")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, broken.state_dict()[name]), name


def test_a_loop_of_ones_own_and_batches() -> None:
    net = DuoLLM(Own(), ids())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = net.loss(ids(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    net.eval()
    with torch.no_grad():
        wanted = net.loss(ids())
        assert net.loss((ids()[:, :-1], ids()[:, 1:])) == pytest.approx(wanted.item(), abs=1e-5)
    labels = ids().clone()
    labels[:, :6] = -100
    other = duo()
    masked = other.loss({"input_ids": ids(), "labels": labels})
    y = logits(other(ids())).detach()
    torch.testing.assert_close(
        masked.detach(), F.cross_entropy(y[:, 5:-1].flatten(0, 1), ids()[:, 6:].flatten()).float().double()
    )
    assert next_token_accuracy(y, aligned(ids())[1]) == pytest.approx(
        (y[:, :-1].argmax(-1) == ids()[:, 1:]).float().mean().item()
    )
    with pytest.raises(ValueError, match="no token"):
        net.loss({"input_ids": ids(), "labels": torch.full_like(ids(), -100)})
    with pytest.raises(ValueError, match="targets of shape"):
        net.loss((ids(), ids()[:, 1:]))


def test_choose_patterns_and_calibrate() -> None:
    net = duo(budgets=(0.3, 0.7), dtype=torch.float32)
    data = [ids(4, 20, 1), ids(2, 20, 2)]
    best = net.choose_patterns(data)
    for budget, least, pattern in zip(net.budgets, best, net.patterns, strict=True):
        k = net.big_layers(budget)
        assert (pattern == BIG).sum() == k
        tried = {}
        for path in torch.cartesian_prod(*[torch.tensor([SMALL, BIG])] * 3):
            if (path == BIG).sum() == k:
                each = [next_token_loss(run(net, x, path), aligned(x)[1]).item() * len(x) for x in data]
                tried[tuple(path.tolist())] = sum(each) / 6
        assert min(tried, key=tried.__getitem__) == tuple(pattern.tolist())
        assert least == pytest.approx(min(tried.values()), rel=1e-5)
    shares = net.calibrate(data, rounds=8)
    for budget, share in zip(net.budgets, shares, strict=True):
        assert share == pytest.approx(budget, abs=0.05)
        net.use({"policy": "router", "budget": budget})
        traces = [net.trace(x).choices.flatten() for x in data]
        assert (torch.cat(traces) == BIG).double().mean() == pytest.approx(share, abs=1e-6)
    assert net.layers[0].shift.equal(net.layers[2].shift)


def test_router_learns_its_budget() -> None:
    net = duo(dtype=torch.float32, budgets=(0.25,), router_share=1.0, beta=10.0).train()
    optimizer = torch.optim.Adam([w for layer in net.layers for w in layer.routers], lr=0.05)
    for step in range(60):
        net.schedule(step / 60)
        optimizer.zero_grad()
        net.loss(ids(4, 20)).backward()
        optimizer.step()
    net.eval().calibrate(ids(4, 20))
    assert net.use({"policy": "router", "budget": 0.25}).trace(ids(4, 20)).share().mean() == pytest.approx(
        0.25, abs=0.08
    )


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_save_and_load(kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "_catalogue", lambda: ["pliant.routing.duo_llm:DuoLLM"])
    net = duo(kind, dtype=torch.float32, budgets=(0.4,), **BYPASS)
    net.choose_patterns(ids())
    net.calibrate(ids())
    for point in net.points():
        net.use(point)
        persistence.save(net, tmp_path / "net")
        other = persistence.load(tmp_path / "net", model=decoder(kind, dtype=torch.float32)).eval()
        assert other.point == point
        with torch.no_grad():
            assert torch.equal(logits(other(ids())), logits(net(ids())))
    with pytest.raises(ValueError, match="model"):
        persistence.load(tmp_path / "net")


def test_deepcopy_is_apart() -> None:
    net = duo(**BYPASS, bypass_scope="layer").use({"policy": "router", "budget": 0.5})
    other = copy.deepcopy(net)
    with torch.no_grad():
        wanted = logits(net(ids()))
        assert torch.equal(logits(other(ids())), wanted)
        for q in other.parameters():
            q.zero_()
        assert torch.equal(logits(net.use({"policy": "router", "budget": 0.5})(ids())), wanted)
    other.use({"policy": "big"})
    assert net.point["policy"] == "router"


def test_nothing_is_left_after_a_call() -> None:
    net = duo().use({"policy": "router", "budget": 0.5})
    state = [(m, dict(m.__dict__.get("_forward_hooks", {})), "forward" in m.__dict__) for m in net.modules()]
    net.oracle(ids(), [4])
    with pytest.raises(ValueError, match="choices"):
        net.run(ids(), torch.full((3, 2, T), BIG))
    assert [(m, dict(m._forward_hooks), "forward" in m.__dict__) for m in net.modules()] == state
    assert all(layer.route == Learned(1) and layer.seen is None for layer in net.layers)


# -- conversion -----------------------------------------------------------------------------------------------------


def test_which_modules_are_ffns() -> None:
    assert DuoLLM(decoder("gpt2"), ids(), ffn="transformer.h.*.mlp").names == [
        f"transformer.h.{i}.mlp" for i in range(3)
    ]
    assert DuoLLM(decoder(), ids(), ffn=["*.0.mlp", "*.2.mlp"]).names == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert DuoLLM(decoder(), ids(), ffn=lambda n, m: n.endswith("1.mlp")).names == ["model.layers.1.mlp"]
    opt = DuoLLM(decoder("opt"), ids(), ffn="model.decoder.layers.*.fc1+activation_fn+fc2")
    assert opt.names == DuoLLM(decoder("opt"), ids()).names
    own = DuoLLM(Own(), ids()).eval()
    assert own.names == ["blocks.0.ffn", "blocks.1.ffn"]
    with pytest.raises(ValueError, match='method="brute"'):
        own.oracle(ids())
    found = own.oracle(ids(), [3], method="brute")
    torch.testing.assert_close(found.loss[:, -1], found.dense)


def test_small_siblings() -> None:
    net = DuoLLM(decoder(dtype=torch.float32), ids())  # 32 / 16
    small: Any = net.layers[0].small
    assert small.gate_proj.weight.shape == small.up_proj.weight.shape == (2, WIDTH)
    assert small.down_proj.weight.shape == (WIDTH, 2)
    gpt: Any = DuoLLM(decoder("gpt2", dtype=torch.float32), ids()).layers[0].small
    assert gpt.c_fc.weight.shape == (WIDTH, 4)
    assert gpt.c_fc.bias.abs().sum() == 0
    wide = small_ffn(nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)), 0.5, 8)
    assert wide[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert wide[2].weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8)
    fused = small_ffn(nn.Sequential(nn.Linear(4, 32), nn.GLU(), nn.Linear(16, 4)), 0.25, 1)
    assert fused(torch.randn(3, 4)).shape == (3, 4)
    a, b = DuoLLM(decoder(), ids(), seed=3), DuoLLM(decoder(), ids(), seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    frozen = decoder().requires_grad_(False)
    learning = {n.split(".")[-3] for n, q in DuoLLM(frozen, ids()).named_parameters() if q.requires_grad}
    assert learning == {"small", "mlp"}  # siblings and routers


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"small_ratio": 0.0}, "small_ratio: 0.0"),
        ({"small_ratio": 1.5}, "small_ratio: 1.5"),
        ({"p": (0.5, 0.5)}, "p: "),
        ({"p": (0.0, 0.5, 0.6)}, "p: "),
        ({"p": (0.2, 0.4, 0.4)}, "bypass=True"),
        ({"budgets": (0.5, 1.0)}, r"budgets\[1\]: "),
        ({"budgets": (0.5, 0.5)}, "budgets: "),
        ({"budgets": (math.nan,)}, r"budgets\[0\]: "),
        ({"tau": (0.0, 1.0)}, r"tau\[0\]: "),
        ({"router_share": 1.2}, "router_share: 1.2"),
        ({"beta": -1.0}, "beta: -1.0"),
        ({"router_lr": math.inf}, "router_lr: inf"),
        ({"execution": "fast"}, "execution: 'fast'"),
        ({"decision": "coin"}, "decision: 'coin'"),
        ({"bypass_scope": "net"}, "bypass_scope: 'net'"),
        ({"max_patterns": 0}, "max_patterns: 0"),
        ({"ffn": "nothing.*"}, "nothing matches 'nothing"),
        ({"ffn": "blocks.0.qkv"}, "ffn: blocks.0.qkv maps"),
        ({"ffn": "blocks.0.norm2"}, "0 linear layers"),
        ({"ffn": "blocks.*.ffn+gone"}, "no module 'blocks.0.gone'"),
        ({"small": lambda big: nn.Linear(WIDTH, 3)}, "small: the sibling"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model = Own()
    with pytest.raises(ValueError, match=message):
        DuoLLM(model, ids(), **options)
    assert not any(isinstance(m, DuoFFN) for m in model.modules())  # all of the conversion or none


def test_bad_models_and_inputs() -> None:
    with pytest.raises(TypeError, match="small: gave int"):
        DuoLLM(Own(), ids(), small=lambda big: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="model: 3; allowed"):
        DuoLLM(3, ids())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ffn: no block"):
        DuoLLM(nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)), ids())
    with pytest.raises(ValueError, match="logits"):
        DuoLLM(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), torch.randn(2, 4))
    shared = Own()
    shared.blocks[1].ffn = shared.blocks[0].ffn
    with pytest.raises(ValueError, match=r"one and the same|runs 2 times"):
        DuoLLM(shared, ids())

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

        def forward(self, u: Tensor) -> Tensor:
            return self.down(self.up(u).relu()).cumsum(-2).flip(-2)

    mixing = Own()
    mixing.blocks[0].ffn = Mixing()
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn mixes tokens"):
        DuoLLM(mixing, ids())
    net = DuoLLM(Own(), ids())
    with pytest.raises(ValueError, match="converted already"):
        DuoLLM(net.model, ids())
    with pytest.warns(UserWarning, match="bypass"):
        DuoLLM(Own(), ids(), bypass=True)
    for choices in (torch.full((2, 3, T), 3), [SKIP, BIG], torch.ones(2)):
        with pytest.raises(ValueError, match="choices"):
            net.run(ids(), choices)
    with pytest.raises(ValueError, match="no batches"):
        net.choose_patterns([])
    with pytest.raises(ValueError, match="rounds"):
        net.calibrate(ids(), rounds=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": [T - 1]}, "has no next token"),
        ({"positions": []}, "positions"),
        ({"positions": [3, 3]}, "one twice"),
        ({"choices": ("small",)}, "choices"),
        ({"choices": ("skip", "big")}, "bypass=True"),
        ({"choices": ("tiny", "big")}, "choices"),
        ({"context": "none"}, "context: 'none'"),
        ({"method": "guess"}, "method: 'guess'"),
        ({"budget": 4}, "budget: 4"),
        ({"samples": -1}, "samples: -1"),
        ({"max_paths": 7}, "max_paths: 2\\^3 = 8"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask"),
    ],
)
def test_bad_searches(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _SHARED.oracle(ids(), **options)


def test_bad_search_inputs() -> None:
    for bad in (torch.randn(2, 5), ids(2, 1), ids()[0]):
        with pytest.raises(ValueError, match="ids"):
            _SHARED.oracle(bad)
    with pytest.raises(ValueError, match="k: 4"):
        _SHARED.oracle(ids(), [3]).best(4)
    many = DuoLLM(decoder(layers=17, dtype=torch.float32), ids())
    with pytest.raises(ValueError, match="max_paths"):
        many.oracle(ids())
    broken = duo()
    with torch.no_grad():
        next(broken.model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        broken.oracle(ids())


def test_a_tree_that_is_not_the_model_is_noticed() -> None:
    """Blocks that scale what the FFN gives are not a + FFN(u)."""

    class Scaled(Block):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
            mask = None if attention_mask is None else attention_mask.squeeze(1)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None))
            return x + 3 * self.ffn(self.norm2(x))

    class Model(Own):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Scaled(), Scaled()])

        def forward(self, x: Tensor) -> Tensor:
            y = self.embed(x)
            for block in self.blocks:
                y = block(y, attention_mask=None)
            return self.head(y)

    net = DuoLLM(Model(), ids()).eval()
    with pytest.raises(ValueError, match="does not give the model's own output"):
        net.oracle(ids())
    assert net.oracle(ids(), [3], method="brute").loss.shape == (3, 4)
