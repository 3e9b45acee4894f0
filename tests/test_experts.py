from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core.cost import count_flops
from pliant.core.experts import Experts, balance_loss, combine, dispatch, top_k

WAYS = ("loop", "grouped", "dense")


def by_hand(bank: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for t in range(len(x)):
        total = torch.zeros(bank.features, dtype=x.dtype)
        for e, w in zip(chosen[t].tolist(), weights[t], strict=True):
            up = bank.up[e] @ x[t] + (0 if bank.up_bias is None else bank.up_bias[e])
            hidden = bank.activation(up)
            if bank.gate is not None:
                gate = bank.gate[e] @ x[t] + (0 if bank.gate_bias is None else bank.gate_bias[e])
                hidden = bank.activation(gate) * up
            total = total + w * (bank.down[e] @ hidden + (0 if bank.down_bias is None else bank.down_bias[e]))
        rows.append(total)
    return torch.stack(rows)


@given(
    tokens=st.integers(1, 12), experts=st.integers(1, 6), data=st.data(), gated=st.booleans(), bias=st.booleans()
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_all_ways_agree_with_the_definition(tokens: int, experts: int, data, gated: bool, bias: bool) -> None:
    torch.manual_seed(tokens)
    k = data.draw(st.integers(1, experts))
    bank = Experts(8, 16, experts, activation=F.silu, gated=gated, bias=bias)
    x, weights = torch.randn(tokens, 8), torch.rand(tokens, k)
    chosen = top_k(torch.randn(tokens, experts), k)
    expected = by_hand(bank, x, chosen, weights)
    for way in WAYS:
        bank.backend = way
        assert torch.allclose(bank(x, chosen, weights), expected, atol=1e-5), way


def test_gradients_agree_and_an_expert_without_tokens_has_none() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(20, 8), torch.rand(20, 2)
    chosen = torch.randint(0, 4, (20, 2))  # expert 4 is never chosen
    grads = {}
    for way in WAYS:
        torch.manual_seed(1)
        bank = Experts(8, 16, 5, backend=way)
        inputs, gates = x.clone().requires_grad_(), weights.clone().requires_grad_()
        bank(inputs, chosen, gates).square().sum().backward()
        grads[way] = [inputs.grad, gates.grad, *(p.grad for p in bank.parameters())]
        for p in bank.parameters():
            assert p.grad[4].abs().max() == 0
    for way in ("grouped", "dense"):
        for a, b in zip(grads["loop"], grads[way], strict=True):
            assert torch.allclose(a, b, atol=1e-4), way


def test_the_loop_computes_what_was_chosen_and_no_more() -> None:
    bank = Experts(8, 16, 4, bias=False, backend="loop")
    x, chosen = torch.randn(10, 8), torch.randint(0, 4, (10, 2))
    counted = count_flops(lambda: bank(x, chosen, torch.ones(10, 2)))
    assert counted.total == 2 * 10 * 2 * (8 * 16 + 16 * 8)


def test_no_tokens_at_all() -> None:
    bank = Experts(8, 16, 4)
    assert bank(torch.zeros(0, 8), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, 8)


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_dispatch_sorts_stably_and_combine_undoes_it(choices: list[list[int]]) -> None:
    chosen = torch.tensor(choices)
    sent = dispatch(chosen, 5)
    assert sent.counts.tolist() == [sum(c == e for row in choices for c in row) for e in range(5)]
    experts = chosen.reshape(-1)[sent.order].tolist()
    assert experts == sorted(experts)
    bounds = [0, *sent.counts.cumsum(0).tolist()]
    assert all(sent.token[a:b].tolist() == sorted(sent.token[a:b].tolist()) for a, b in pairwise(bounds))
    rows = torch.randn(len(choices), 3)
    back = combine(rows[sent.token], sent, torch.ones(chosen.shape))
    assert torch.allclose(back, 2 * rows)


def test_equal_scores_go_by_index() -> None:
    assert top_k(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0]]), 4).tolist() == [[1, 2, 4, 0]]
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k: {k} of 3"):
            top_k(torch.zeros(2, 3), k)


def test_balance_loss_is_one_when_uniform_and_e_when_collapsed() -> None:
    uniform = torch.full((8, 4), 0.25)
    assert balance_loss(uniform, torch.arange(8).remainder(4)[:, None]).item() == pytest.approx(1.0)
    certain = F.one_hot(torch.zeros(8, dtype=torch.long), 4).float()
    assert balance_loss(certain, torch.zeros(8, 1, dtype=torch.long)).item() == pytest.approx(4.0)
    logits = torch.randn(8, 4, requires_grad=True)
    balance_loss(logits.softmax(-1), torch.zeros(8, 1, dtype=torch.long)).backward()
    assert logits.grad[:, 0].sum() > 0  # the overloaded expert's probability goes down


def test_tune_keeps_the_fastest_and_leaves_the_choice_of_the_caller() -> None:
    bank = Experts(8, 16, 4)
    found = bank.tune(32, 2, repeats=3)
    assert found["loop"] == 1.0
    assert bank.tuned == min(found, key=found.get)
    assert bank.backend == "auto"
    torch.manual_seed(0)
    x, chosen, weights = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    assert torch.allclose(bank(x, chosen, weights), by_hand(bank, x, chosen, weights), atol=1e-5)
    other = copy.deepcopy(bank)
    assert other.tuned == bank.tuned


def test_dropout_and_bad_input() -> None:
    bank = Experts(8, 16, 4, dropout=0.5)
    x, chosen, weights = torch.randn(5, 8), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    assert not torch.equal(bank(x, chosen, weights), bank(x, chosen, weights))
    bank.eval()
    assert torch.equal(bank(x, chosen, weights), bank(x, chosen, weights))
    for options, message in (
        ({"features": 0}, "features: 0"),
        ({"count": 0}, "count: 0"),
        ({"backend": "fast"}, "backend: 'fast'"),
        ({"dropout": 1.0}, "dropout: 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Experts(**({"features": 8, "hidden": 4, "count": 2} | options))
    with pytest.raises(ValueError, match="x, chosen, weights"):
        bank(torch.randn(5, 7), chosen, weights)
    assert isinstance(bank, nn.Module)


@pytest.mark.parametrize("gated", [False, True])
def test_experts_start_as_linear_layers_do(gated: bool) -> None:
    bank = Experts(4, 256, 64, gated=gated)  # fan in of up and gate: 4, of down: 256
    for matrix, bias, width in (
        (bank.up, bank.up_bias, 4),
        (bank.gate, bank.gate_bias, 4),
        (bank.down, bank.down_bias, 256),
    ):
        if matrix is None:
            continue
        linear = nn.Linear(matrix.shape[2], matrix.shape[1])
        for found, like in ((matrix, linear.weight), (bias, linear.bias)):
            assert found is not None
            bound = width**-0.5
            assert 0.98 * bound < float(found.abs().max()) <= bound
            assert float(like.abs().max()) <= bound
            assert float(found.std()) == pytest.approx(bound / 3**0.5, rel=0.08)
