"""Gates, uncertainty statistics and exit distributions: properties that a wrong implementation breaks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.core.gates import (
    binary_gate,
    calibration_error,
    exit_distribution,
    first_exit,
    uncertainty,
)

torch.set_num_threads(1)
gates = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0, 1 / 3])), min_size=1, max_size=9
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_gate_is_exactly_open_or_shut_in_every_precision(dtype):
    s = torch.randn(1000).mul(3).to(dtype)
    g = binary_gate(s)
    assert g.dtype is dtype
    assert torch.equal(g, (s >= 0).to(dtype))


def test_the_gradient_of_a_gate_is_that_of_its_sigmoid():
    s = torch.tensor([-2.0, 0.0, 0.7], dtype=torch.float64, requires_grad=True)
    binary_gate(s, temperature=0.5).sum().backward()
    soft = (s.detach() / 0.5).sigmoid()
    torch.testing.assert_close(s.grad, soft * (1 - soft) / 0.5)


def test_a_noisy_gate_opens_with_the_probability_of_its_sigmoid():
    s = torch.full((40_000,), 0.8)
    g = binary_gate(s, noise=True, generator=torch.Generator().manual_seed(0))
    assert set(g.unique().tolist()) == {0.0, 1.0}
    p = torch.sigmoid(torch.tensor(0.8)).item()
    assert abs(g.mean().item() - p) < 4 * math.sqrt(p * (1 - p) / 40_000)
    again = binary_gate(s, noise=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(g, again)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_gate_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        binary_gate(torch.zeros(2), temperature=temperature)


# -- property 8 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_statistics_of_uniform_and_certain_predictions(classes):
    u = uncertainty(torch.full((classes,), 3.0))
    torch.testing.assert_close(u, torch.tensor([1 / classes, math.log(classes), 0, math.log(classes)]))
    certain = torch.zeros(classes)
    certain[1] = 1e4
    assert torch.equal(uncertainty(certain), torch.tensor([1.0, 0, 1, 0]))


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=8), st.floats(-50, 50), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_statistics_know_neither_a_shift_nor_the_order_of_classes(logits, shift, random):
    a = torch.tensor(logits, dtype=torch.float64)
    order = list(range(len(a)))
    random.shuffle(order)
    torch.testing.assert_close(uncertainty(a[order] + shift), uncertainty(a), rtol=1e-7, atol=1e-9)


def test_the_tempered_entropy_is_that_of_squared_probabilities():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = p**2 / (p**2).sum()
    u = uncertainty(p.log())
    torch.testing.assert_close(u[3], -(q * q.log()).sum())
    torch.testing.assert_close(u[2], torch.tensor(0.2, dtype=torch.float64))


def test_statistics_are_detached_and_in_float32():
    a = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    u = uncertainty(a)
    assert u.dtype is torch.float32
    assert not u.requires_grad
    with pytest.raises(ValueError, match="2 classes"):
        uncertainty(torch.zeros(3, 1))


# -- properties 1 and 2 -----------------------------------------------------------------------------------------------


@given(gates)
@settings(max_examples=150, deadline=None)
def test_exit_probabilities_are_a_distribution_and_clip_the_sum_of_gates(gate):
    g = torch.tensor(gate, dtype=torch.float64)
    p = exit_distribution(g)
    assert (p >= 0).all()
    assert abs(p.sum().item() - 1) <= 1e-6
    torch.testing.assert_close(p[:-1].cumsum(0), g.cumsum(0).clamp_max(1), rtol=0, atol=1e-12)


@given(gates)
@settings(max_examples=150, deadline=None)
def test_the_recursive_and_the_clipped_sum_forms_agree_to_the_bit(gate):
    g = torch.tensor(gate, dtype=torch.float64)
    total, clipped = 0.0, []
    for value in gate:
        clipped.append(max(0.0, min(value, 1 - total)))
        total += value
    assert exit_distribution(g)[:-1].tolist() == clipped


@given(gates)
@settings(max_examples=200, deadline=None)
def test_the_decision_is_the_first_hazard_of_one_half_and_has_no_nan(gate):
    g = torch.tensor(gate, dtype=torch.float64)
    p = exit_distribution(g)
    expected, total = len(gate), 0.0
    for k, part in enumerate(p[:-1].tolist()):
        rest = 1 - total
        # Multiplied out where the division would round across the bar.
        if rest == 0 or part >= 0.5 * rest:
            expected = k
            break
        total += part
    assert first_exit(p).item() == expected
    assert not p.isnan().any()


def test_the_bar_falls_with_depth():
    below, above = torch.tensor([0.3, 0.34]), torch.tensor([0.3, 0.36])
    assert first_exit(exit_distribution(below)).item() == 2
    assert first_exit(exit_distribution(above)).item() == 1


def test_a_full_sum_leaves_at_once():
    assert first_exit(exit_distribution(torch.tensor([0.4, 0.7, 0.9]))).item() == 1
    assert first_exit(exit_distribution(torch.tensor([1.0, 1.0]))).item() == 0
    assert first_exit(exit_distribution(torch.zeros(3))).item() == 3


# -- calibration error ------------------------------------------------------------------------------------------------


def test_calibration_error_of_known_cases():
    confidence = torch.linspace(0.1, 0.9, 30)
    assert calibration_error(confidence, torch.ones(30)) == pytest.approx((1 - confidence).mean().item(), abs=1e-6)
    half = torch.full((1000,), 0.5)
    assert calibration_error(half, torch.arange(1000) % 2 == 0, bins=5) == pytest.approx(0, abs=1e-9)


def test_calibration_error_has_bins_of_equal_mass():
    # Two bins of two: gaps |0.1 - 0.0| and |0.75 - 1.0| whatever the widths are.
    confidence, right = torch.tensor([0.9, 0.1, 0.6, 0.1]), torch.tensor([1.0, 0, 1, 0])
    assert calibration_error(confidence, right, bins=2) == pytest.approx((0.1 + 0.25) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="bins"):
        calibration_error(confidence, right, bins=5)
