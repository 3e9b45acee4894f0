from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pliant.core.activations import InputStatistics, StackedStatistics, answer_mask, observe, tell_apart, token_masks
from pliant.core.experts import Experts, top_k
from pliant.core.matrices import is_matrix, matrices, matrix, write_matrix


@given(splits=st.lists(st.integers(0, 30), max_size=5), offset=st.sampled_from([0.0, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_any_split_of_the_stream_gives_the_statistics_of_one_pass(splits: list[int], offset: float) -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    seen = InputStatistics(5, hessian=True)
    cuts = [0, *sorted(splits), 60]
    for a, b in pairwise(cuts):
        seen.update(x[a:b])
    assert seen.count == 60
    assert torch.allclose(seen.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(seen.variance, x.var(0, unbiased=False), rtol=1e-6)  # a mean of 1e6 and a spread of 1
    assert torch.allclose(seen.norm, x.norm(dim=0), rtol=1e-9)
    assert torch.allclose(seen.hessian, 2 / 60 * x.t() @ x, rtol=1e-9)


def test_single_precision_with_a_large_mean_keeps_its_variance() -> None:
    x = (torch.randn(4096, 3) + 1000).float()
    seen = InputStatistics(3)
    for part in x.split(100):
        seen.update(part)
    assert torch.allclose(seen.variance, x.double().var(0, unbiased=False), rtol=1e-6)


def test_variance_within_sequences_leaves_out_what_differs_between_them() -> None:
    x = torch.randn(4, 10, 3, dtype=torch.float64) + 5 * torch.randn(4, 1, 3, dtype=torch.float64)
    seen = InputStatistics(3, variance="within")
    seen.update(x[:3])
    seen.update(x[3:])
    assert torch.allclose(seen.variance, x.var(1, unbiased=False).mean(0))
    assert torch.allclose(seen.mean, x.mean((0, 1)))


def test_merge_is_the_union_and_needs_the_same_sums() -> None:
    x = torch.randn(20, 3, dtype=torch.float64)
    a, b = InputStatistics(3), InputStatistics(3)
    a.update(x[:7])
    b.update(x[7:])
    a.merge(b)
    assert torch.allclose(a.variance, x.var(0, unbiased=False))
    whole = InputStatistics(3, hessian=True)
    with pytest.raises(ValueError, match="hessian=True"):
        whole.merge(a)
    with pytest.raises(ValueError, match="hessian"):
        _ = a.hessian


def test_bad_input_is_named() -> None:
    seen = InputStatistics(3)
    with pytest.raises(ValueError, match="no vector has been seen"):
        _ = seen.norm
    with pytest.raises(ValueError, match="4 features"):
        seen.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        seen.update(torch.tensor([[1.0, float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="variance"):
        InputStatistics(3, variance="between")
    layer = nn.Linear(3, 2)
    with observe({"fc": layer}), pytest.raises(ValueError, match=r"layer 'fc'.*NaN"):
        layer(torch.full((1, 3), float("inf")))
    with pytest.raises(TypeError, match="Conv2d of one group"), observe({"d": nn.Conv2d(4, 4, 3, groups=4)}):
        pass


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (2, 3, 6)),
        (nn.Conv2d(3, 4, (3, 2), 2, 1, 2), (2, 3, 9, 8)),
        (nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last), (3, 9, 8)),
    ],
)
def test_the_mean_output_of_a_layer_is_its_matrix_times_the_mean_input(layer: nn.Module, shape: tuple) -> None:
    x = torch.randn(shape)
    with observe({"a": layer}, hessian=True) as seen:
        y = layer(x)
    y = y.flatten(-2).transpose(-1, -2) if isinstance(layer, nn.Conv2d) else y
    mean = matrix(layer).double() @ seen["a"].mean + layer.bias.double()
    assert torch.allclose(y.reshape(-1, 4).double().mean(0), mean, atol=1e-5)
    layer(x)
    assert seen["a"].count == y.reshape(-1, 4).shape[0]  # closed: nothing more is seen
    write_matrix(layer, torch.zeros_like(matrix(layer)))
    assert torch.count_nonzero(layer.weight) == 0


def test_the_transposed_layer_of_gpt2() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)
    x = torch.randn(5, 6)
    assert is_matrix(conv1d)
    assert torch.allclose(x @ matrix(conv1d).t() + conv1d.bias, conv1d(x), atol=1e-6)
    write_matrix(conv1d, torch.ones(4, 6))
    assert conv1d.weight.shape == (6, 4)
    assert bool((conv1d.weight == 1).all())
    with observe({"a": conv1d}) as seen:
        conv1d(x)
    assert torch.allclose(seen["a"].mean, x.double().mean(0))
    assert not is_matrix(nn.LayerNorm(4))


# -- positions that count, experts, and matrices in any module ------------------------------------------------------


@pytest.mark.parametrize("variance", ["total", "within"])
def test_what_does_not_count_may_be_anything(variance: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 7, 3, generator=rng, dtype=torch.float64)
    counted = torch.rand(4, 7, generator=rng) < 0.6
    counted[2] = False
    seen, alone = (InputStatistics(3, hessian=True, variance=variance) for _ in range(2))  # type: ignore[arg-type]
    seen.update(x.masked_fill(~counted[..., None], float("nan")), counted)
    for sequence, mask in zip(x, counted, strict=True):
        alone.update(sequence[mask][None])
    assert seen.count == alone.count == int(counted.sum())
    for name in ("mean", "variance", "norm", "hessian"):
        assert torch.allclose(getattr(seen, name), getattr(alone, name), rtol=1e-12)
    whole = InputStatistics(3)
    whole.update(x)
    assert not torch.allclose(whole.mean, seen.mean)
    with pytest.raises(ValueError, match="counted"):
        seen.update(x, counted[:, :3])


def test_each_expert_has_the_statistics_of_its_own_tokens() -> None:
    torch.manual_seed(0)
    bank = Experts(6, 5, 4, gated=True).double()
    model = Routed(bank).double()
    x = torch.randn(30, 6, dtype=torch.float64) + 1
    found = {m.name: m for m in matrices(model, x)}
    assert list(found) == ["router", "bank.up", "bank.gate", "bank.down"]
    assert all(not m.unobserved for m in found.values())
    with observe(found, hessian=True) as seen, torch.no_grad():
        model(x[:11])
        model(x[11:])
    chosen = top_k(x @ model.router.weight.t(), 2)
    hit = [x[(chosen == e).any(1)] for e in range(4)]
    assert seen["bank.up"].counts == [len(rows) for rows in hit]
    assert seen["router"].count == 30
    for e, rows in enumerate(hit):
        hidden = torch.relu(rows @ bank.gate[e].t() + bank.gate_bias[e]) * (rows @ bank.up[e].t() + bank.up_bias[e])
        for name, a in (("bank.up", rows), ("bank.gate", rows), ("bank.down", hidden)):
            assert torch.allclose(seen[name].mean[e], a.mean(0), atol=1e-12)
            assert torch.allclose(seen[name].variance[e], a.var(0, unbiased=False), atol=1e-12)
            assert torch.allclose(seen[name].norm[e], a.norm(dim=0), atol=1e-12)
            assert torch.allclose(seen[name].hessian[e], 2 / len(a) * a.t() @ a, atol=1e-12)


class Routed(nn.Module):
    """A bank of experts behind a linear router: each token visits two."""

    def __init__(self, bank: Experts) -> None:
        super().__init__()
        self.router = nn.Linear(bank.features, bank.count, bias=False)
        self.bank = bank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = top_k(self.router(flat), 2)
        y: torch.Tensor = self.bank(flat, chosen, torch.full(chosen.shape, 0.5))
        return y.view(*x.shape[:-1], -1)


def test_an_expert_without_tokens_has_zeros_and_says_so() -> None:
    seen = StackedStatistics(3, 2, hessian=True)
    seen.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [0, 2, 0])
    assert seen.counts == [0, 2, 0]
    assert seen.count == 2
    assert seen.mean.tolist() == [[0, 0], [2, 3], [0, 0]]
    assert seen.variance.tolist() == [[0, 0], [1, 1], [0, 0]]
    assert not seen.norm[0].any()
    assert seen.hessian.shape == (3, 2, 2)


class Own(nn.Module):
    """Bare parameters in every use: either way round, stacked, tables that are no matrices, a normalised weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.columns = nn.Parameter(torch.randn(6, 8))
        self.rows = nn.Parameter(torch.randn(8, 8))
        self.stack = nn.Parameter(torch.randn(2, 8, 8))
        self.normal = nn.Parameter(torch.randn(5, 8))
        self.position = nn.Parameter(torch.randn(4, 6))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.table = nn.Embedding(10, 6)
        self.never = nn.Parameter(torch.randn(3, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(len(ids), -1, -1), self.table(ids) + self.position], 1)
        h = (self.rows @ (x @ self.columns).flatten(0, 1).t()).t()  # (B 5, 8)
        h = torch.bmm(h.expand(2, -1, -1), self.stack).sum(0)
        return nn.functional.linear(h, nn.functional.normalize(self.normal)).view(len(ids), 5, 5)


def test_a_parameter_is_a_matrix_where_it_multiplies_activations() -> None:
    model, ids = Own(), torch.randint(0, 10, (3, 4))
    found = {m.name: m for m in matrices(model, ids)}
    assert list(found) == ["columns", "rows", "stack", "normal"]
    assert [m.transposed for m in found.values()] == [True, False, True, False]
    assert [bool(m.unobserved) for m in found.values()] == [False, False, False, True]
    assert [m.multiply_adds for m in found.values()] == [15, 15, 15, 15]
    assert found["columns"].read().shape == (8, 6)
    assert found["columns"].key == "columns"
    del found["normal"]
    with observe(found) as seen, torch.no_grad():
        model(ids)
        x = torch.cat([model.token.expand(3, -1, -1), model.table(ids) + model.position], 1).flatten(0, 1)
        h = x @ model.columns
        assert torch.allclose(seen["columns"].mean, x.double().mean(0), atol=1e-6)
        assert torch.allclose(seen["rows"].mean, h.double().mean(0), atol=1e-6)
        assert torch.allclose(seen["stack"].mean, (h @ model.rows.t()).double().mean(0).expand(2, -1), atol=1e-5)
    with pytest.raises(TypeError, match="in pieces"), observe({m.name: m for m in matrices(model, ids)}):
        pass


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_multiply_the_inputs_and_the_states_before(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = Last(kind(3, 4, batch_first=True, bidirectional=True))
    x = torch.randn(5, 7, 3)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[1, 4:] = False
    found = {m.name: m for m in matrices(model, x)}
    assert {m.attribute for m in found.values()} == {
        f"weight_{s}_l0{r}" for s in ("ih", "hh") for r in ("", "_reverse")
    }
    with observe(found) as seen, torch.no_grad():
        seen.masks = [mask]
        states = model(x)
    before = torch.cat([torch.zeros(5, 1, 4), states[:, :-1, :4]], 1)[mask].double()
    after = torch.cat([states[:, 1:, 4:], torch.zeros(5, 1, 4)], 1)[mask].double()
    for name, a in (("weight_ih_l0", x[mask].double()), ("weight_hh_l0", before), ("weight_hh_l0_reverse", after)):
        assert seen[f"layer.{name}"].count == 32
        assert torch.allclose(seen[f"layer.{name}"].mean, a.mean(0), atol=1e-6), name
    assert torch.backends.mkldnn.is_available() == torch._C._get_mkldnn_enabled()  # as it was


class Last(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)[0]
        return y


def test_attention_is_seen_through_its_fused_kernel() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
    x = torch.randn(3, 5, 6)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 2:] = False
    found = {m.name: m for m in matrices(model, x)}
    assert list(found) == ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
    with observe(found) as seen, torch.no_grad():
        seen.masks = [mask]
        model(x)
    assert torch.allclose(seen["self_attn.in_proj_weight"].mean, x[mask].double().mean(0), atol=1e-6)
    assert all(seen[name].count == 12 for name in found)
    assert found["self_attn.in_proj_weight"].bias is model.self_attn.in_proj_bias


def test_masks_of_an_input_and_of_an_answer() -> None:
    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None: ...

    model = nn.Linear(2, 2)
    model.forward = forward  # type: ignore[method-assign]
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]])
    for x in ({"input_ids": ids, "attention_mask": mask}, (ids, mask)):
        assert torch.equal(token_masks(model, x)[0], mask == 1)
        assert torch.equal(answer_mask(model, x, torch.ones(2, 3, 9)), mask == 1)
        assert answer_mask(model, x, torch.ones(2, 3)) is None
    assert token_masks(model, {"input_ids": ids, "attention_mask": torch.ones_like(mask)}) == []
    both = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    assert answer_mask(model, both, torch.ones(2, 3, 9)) is None  # all of the decoder's tokens count
    apart = tell_apart(both)
    assert apart["decoder_input_ids"].shape == (2, 4)
    assert [m.tolist() for m in token_masks(model, apart)] == [(mask == 1).tolist(), [[True] * 3 + [False]] * 2]
    assert tell_apart({"input_ids": ids, "attention_mask": mask})["attention_mask"] is mask
