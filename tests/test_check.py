"""Checks of arguments: what passes comes back plain, what does not is named with its value and what is allowed."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pliant.core import check

Mode = Literal["one", "two"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check.number("a", "1"), "a: '1'; allowed: a finite number"),
        (lambda: check.number("a", True), "a: True; allowed: a finite number"),
        (lambda: check.number("a", float("nan"), above=0), "a: nan; allowed: a finite number above 0"),
        (lambda: check.number("a", 10**400), "a: a whole number of 1329 bits; allowed: a finite number"),
        (lambda: check.number("a", 2, at_least=0, below=1), "a: 2; allowed: a finite number of 0 or more and below 1"),
        (lambda: check.share("a", -0.1), "a: -0.1; allowed: a number from 0 to 1"),
        (lambda: check.positive("a", 0), "a: 0; allowed: a finite number above 0"),
        (lambda: check.whole("a", 64.0, at_least=1), "a: 64.0; allowed: a whole number from 1 to 1000000"),
        (lambda: check.whole("a", False), "a: False; allowed: a whole number up to 1000000"),
        (lambda: check.whole("a", 10**9), "a: 1000000000; allowed: a whole number up to 1000000"),
        (lambda: check.seed("seed", 1.5), "seed: 1.5; allowed: a whole number of 0 or more"),
        (lambda: check.seed("seed", -1), "seed: -1; allowed: a whole number of 0 or more"),
        (lambda: check.boolean("a", 1), "a: 1; allowed: True or False"),
        (lambda: check.choice("a", "three", Mode), "a: 'three'; allowed: 'one', 'two'"),
        (lambda: check.choice("a", None, Mode), "a: None; allowed: 'one', 'two'"),
        (lambda: check.choice("a", 1, (0, 2)), "a: 1; allowed: 0, 2"),
        (lambda: check.choice("a", True, (0, 1)), "a: True; allowed: 0, 1"),
        (lambda: check.choices("a", "one", Mode), "a: 'one'; allowed: at least one of 'one', 'two', each once"),
        (lambda: check.choices("a", ("one", "one"), Mode), "each once"),
        (lambda: check.names("a", "head"), "a: 'head'; allowed: a sequence of names or patterns"),
        (lambda: check.names("a", ("head", 3)), "a: ('head', 3); allowed: a sequence of names or patterns"),
        (lambda: check.names("a", (), empty=False), "a sequence of at least one name or pattern"),
        (lambda: check.text("a", ""), "a: ''; allowed: a text that is not empty"),
        (lambda: check.sequence("a", 0.5, check.share), "a: 0.5; allowed: a sequence of at least one"),
        (lambda: check.sequence("a", [0.5, 2], check.share), "a[1]: 2; allowed: a number from 0 to 1"),
        (lambda: check.sequence("a", (), check.share), "a: (); allowed: a sequence of at least one"),
        (lambda: check.sequence("a", (1,), check.share, length=2), "a: (1,); allowed: a sequence of exactly 2 items"),
        (lambda: check.sequence("a", range(10**9), check.share), "at most 10000 are allowed"),
        (lambda: check.mapping("a", {"k": -1}, check.share), "a['k']: -1; allowed: a number from 0 to 1"),
        (lambda: check.mapping("a", [], check.share), "a: []; allowed: a mapping from names to values"),
        (lambda: check.module("model", nn.Linear), "allowed: an nn.Module that was built, not its class"),
        (lambda: check.module("model", 3), "model: 3; allowed: an nn.Module"),
        (lambda: check.function("a", 3), "a: 3; allowed: a function"),
        (lambda: check.instance("a", 3, str, dict), "a: 3; allowed: a str or a dict"),
        (lambda: check.optional(check.positive, "a", 0), "a: 0; allowed: a finite number above 0; or None"),
        (lambda: check.distinct("a", (1, 1)), "a: [1, 1]; allowed: values that differ"),
        (lambda: check.number("a", torch.zeros(3)), "a: a tensor of shape (3,), torch.float32; allowed"),
    ],
)
def test_the_wording_names_the_argument_the_value_and_what_is_allowed(call, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


def test_the_kind_of_error_tells_a_wrong_kind_from_a_wrong_value():
    with pytest.raises(TypeError):
        check.whole("a", "3")
    with pytest.raises(ValueError, match="a: 0"):
        check.whole("a", 0, at_least=1)
    with pytest.raises(TypeError):
        check.choice("a", 3, Mode)
    with pytest.raises(ValueError, match="a: 'x'"):
        check.choice("a", "x", Mode)


def test_what_passes_comes_back_in_plain_form():
    assert type(check.number("a", np.float32(0.5))) is float
    assert type(check.number("a", 1)) is float
    assert type(check.whole("a", np.int64(3))) is int
    assert check.sequence("a", [1, 0.5], check.share) == (1.0, 0.5)
    assert check.sequence("a", (), check.share, empty=True) == ()
    assert check.names("a", ["x"]) == ("x",)
    assert check.names("a", {"y", "x"}) == ("x", "y")
    assert check.choices("a", ["two", "one"], Mode) == ("two", "one")
    assert check.choice("a", "one", Mode) == "one"
    assert check.optional(check.share, "a", None) is None
    assert check.mapping("a", {"k": 1}, check.share) == {"k": 1.0}
    assert check.boolean("a", False) is False


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=200),
    st.binary(max_size=20),
    st.lists(st.integers(), max_size=20),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.just(object()),
    st.just(10**5000),
    st.just(torch.zeros(2)),
    st.just(nn.ReLU()),
)


@given(WRONG)
def test_nothing_else_than_a_named_error_of_one_line_comes_out(value):
    for call in (
        lambda: check.number("argument", value),
        lambda: check.share("argument", value),
        lambda: check.whole("argument", value),
        lambda: check.seed("argument", value),
        lambda: check.boolean("argument", value),
        lambda: check.choice("argument", value, Mode),
        lambda: check.choices("argument", value, Mode),
        lambda: check.names("argument", value),
        lambda: check.sequence("argument", value, check.share),
        lambda: check.mapping("argument", value, check.share),
        lambda: check.module("argument", value),
        lambda: check.function("argument", value),
    ):
        message = "argument"
        try:
            call()
        except (TypeError, ValueError) as error:
            message = str(error)
        assert message.startswith("argument")
        assert "\n" not in message
        assert len(message) < 400
