"""Row compaction on models of many shapes: same answers, fewer rows, nothing left behind."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pliant.core.rows import ExitPlan, block_rows
from pliant.tasks.images import SmallResNet

torch.set_num_threads(1)
BLOCKS = 5


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))

    def forward(self, h):
        return h + torch.tanh(self.inner(h))


class Tower(nn.Module):
    """Blocks in a list, with a final norm and head."""

    def __init__(self, depth=BLOCKS):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class TupleBlock(Block):
    def forward(self, h, mask=None, *, scale=None):
        h = super().forward(h) * mask
        return h, (h * 2 if scale is None else scale.expand(len(h), 1)), torch.ones(3)


class TupleTower(Tower):
    """Blocks that return tuples and take a mask with one row per sample, by position and by name."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(TupleBlock() for _ in range(BLOCKS))

    def forward(self, x):
        h = self.embed(x)
        mask, scale = (x[:, :1] > 0).float() + 0.5, x[:, 1:2]
        for block in self.blocks:
            h, side, _ = block(h, mask, scale=scale)
            h = h + side * 0.1
        return self.head(h)


def plan_of(model, x):
    torch.manual_seed(0)
    return ExitPlan(model.eval(), x)


def leave_at(exits, log=None):
    """Row n leaves at exit ``exits[n]`` with an answer that tells the row's hidden state."""

    def visit(k, hidden, rows):
        if log is not None:
            log.append((k, len(hidden)))
        return exits[rows] == k, hidden.flatten(1)[:, :3] + k

    return visit


@pytest.fixture(scope="module")
def towers():
    torch.manual_seed(1)
    return Tower().eval(), TupleTower().eval()


@given(st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=12), st.sampled_from(["never", 0.3, 0.6]))
@settings(max_examples=40, deadline=None)
def test_answers_do_not_depend_on_compaction(towers, exits, other):
    where = torch.tensor(exits)
    x = torch.randn(len(exits), 4, generator=torch.Generator().manual_seed(len(exits)))
    for model in towers:
        plan = plan_of(model, torch.randn(3, 4))
        with torch.no_grad():
            a = plan.run(model, x, leave_at(where))
            b = plan.run(model, x, leave_at(where), compact=other)
            alone = [plan.run(model, x[i : i + 1], leave_at(where[i : i + 1])) for i in range(len(x))]
        torch.testing.assert_close(a.output, b.output, rtol=0, atol=1e-5)
        assert torch.equal(a.exit, b.exit)
        assert torch.equal(a.exit, where)
        torch.testing.assert_close(a.output, torch.cat([o.output for o in alone]), rtol=0, atol=1e-5)


def test_in_float64_they_agree_to_1e_12(towers):
    model = Tower().double().eval()
    x, where = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % BLOCKS
    plan = plan_of(model, x)
    a, b = (plan.run(model, x, leave_at(where), compact=c).output for c in ("always", "never"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_only_the_rows_that_stay_are_computed(towers):
    model = towers[0]
    plan = plan_of(model, torch.randn(2, 4))
    where = torch.tensor([0, 0, 1, 3, 4, 4])
    names = [f"blocks.{i}" for i in range(BLOCKS)]
    log = []
    rows = block_rows(model, names, lambda: plan.run(model, torch.randn(6, 4), leave_at(where, log)))
    assert [rows[n] for n in names] == [6, 4, 3, 3, 2]
    assert log == [(0, 6), (1, 4), (2, 3), (3, 3)]


def test_a_share_waits_until_enough_rows_are_done(towers):
    model = towers[0]
    plan = plan_of(model, torch.randn(2, 4))
    where = torch.tensor([0, 1, 1, 4])
    names = [f"blocks.{i}" for i in range(BLOCKS)]
    rows = block_rows(model, names, lambda: plan.run(model, torch.randn(4, 4), leave_at(where), compact=0.5))
    assert [rows[n] for n in names] == [4, 4, 1, 1, 1]


def test_the_pass_ends_when_all_rows_have_left_and_nothing_stays_on_the_model(towers):
    model = towers[0]
    plan = plan_of(model, torch.randn(2, 4))
    rows = block_rows(
        model, ["blocks.1", "blocks.2", "head"],
        lambda: plan.run(model, torch.randn(5, 4), leave_at(torch.tensor([1, 0, 1, 1, 0]))),
    )  # fmt: skip
    assert dict(rows) == {"blocks.1": 3}
    assert _hooks(model) == 0


def test_an_exception_leaves_no_hooks_and_no_state(towers):
    model = towers[0]
    x = torch.randn(4, 4)
    plan = plan_of(model, x)
    before = model(x)
    state = {k: dict(vars(m)) for k, m in model.named_modules()}

    def visit(k, hidden, rows):
        if k == 2:
            raise KeyError("mine")
        return rows == k, hidden[:, :3]

    with pytest.raises(KeyError, match="mine"):
        plan.run(model, x, visit)
    assert _hooks(model) == 0
    assert {k: set(vars(m)) for k, m in model.named_modules()} == {k: set(v) for k, v in state.items()}
    assert torch.equal(model(x), before)


def test_two_threads_may_run_one_model(towers):
    model = towers[0]
    x = torch.randn(6, 4)
    plan = plan_of(model, x)
    everywhere = {k: torch.full((6,), k) for k in range(BLOCKS)}
    expected = {k: plan.run(model, x, leave_at(w)).output for k, w in everywhere.items()}
    wrong = []

    def work(k):
        for _ in range(30):
            if not torch.equal(plan.run(model, x, leave_at(everywhere[k])).output, expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 3, 4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_gradients_flow_through_a_compacted_pass(towers):
    model = towers[0]
    x = torch.randn(5, 4, requires_grad=True)
    plan = plan_of(model, torch.randn(2, 4))
    where = torch.tensor([0, 4, 2, 1, 4])
    grads = []
    for compact in ("always", "never"):
        (grad,) = torch.autograd.grad(plan.run(model, x, leave_at(where), compact).output.sum(), x)
        grads.append(grad)
    torch.testing.assert_close(*grads)
    assert (grads[0].abs().sum(1) > 0).all()


# -- default exits ----------------------------------------------------------------------------------------------------


def test_default_exits_are_the_blocks_but_the_last():
    assert plan_of(SmallResNet(), torch.randn(2, 1, 28, 28)).names == (
        "stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "stages.2.0",
    )  # fmt: skip
    assert plan_of(Tower(), torch.randn(2, 4)).names == tuple(f"blocks.{i}" for i in range(BLOCKS - 1))
    assert plan_of(TupleTower(), torch.randn(2, 4)).names == tuple(f"blocks.{i}" for i in range(BLOCKS - 1))


def test_default_exits_of_plain_layers():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    assert plan_of(model, torch.randn(2, 4)).names == ("0", "2")


def test_default_exits_of_transformers():
    transformers = pytest.importorskip("transformers")
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
                               image_size=8, patch_size=4, num_channels=1, num_labels=3)
    )  # fmt: skip
    names = plan_of(vit, {"pixel_values": torch.randn(2, 1, 8, 8)}).names
    assert [type(vit.get_submodule(n)).__name__ for n in names] == ["ViTLayer"] * 2
    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], layer_type="basic",
                                  num_channels=1, num_labels=3)
    )  # fmt: skip
    names = plan_of(resnet, {"pixel_values": torch.randn(2, 1, 16, 16)}).names
    assert [type(resnet.get_submodule(n)).__name__ for n in names] == ["ResNetBasicLayer"] * 3


def test_masks_shrink_with_the_rows_of_a_language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                intermediate_size=16, num_labels=3)
    ).eval()  # fmt: skip
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[torch.arange(5), torch.arange(5)] = 0
    x = {"input_ids": torch.randint(0, 20, (6, 5)), "attention_mask": mask}
    plan = plan_of(model, x)
    where = torch.tensor([0, 2, 1, 2, 0, 2])
    with torch.no_grad():
        answer = plan.run(model, x, lambda k, h, rows: (where[rows] == k, h[:, 0, :3]))
        plain = model(**x).logits
    torch.testing.assert_close(answer.output[where == 2], plain[where == 2], rtol=0, atol=1e-6)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(model, x, names, match):
    with pytest.raises(ValueError, match=match):
        ExitPlan(model.eval(), x, names)
    assert _hooks(model) == 0


def test_bad_names_are_refused():
    x = torch.randn(2, 4)
    refused(Tower(), x, ["blocks.9"], "no module 'blocks.9'")
    refused(Tower(), x, ["blocks.1", "blocks.0"], "order of execution")
    refused(Tower(), x, ["blocks.1", "blocks.1"], "order of execution")
    refused(Tower(), x, [], "empty")
    refused(nn.Sequential(nn.Linear(4, 3)), x, None, "no repeated blocks")


def test_a_module_that_runs_twice_or_never_is_no_exit():
    class Twice(Tower):
        def forward(self, x):
            return super().forward(x) + self.head(self.blocks[0](self.embed(x)))

    refused(Twice(), torch.randn(2, 4), ["blocks.0"], "runs 2 times")
    tower = Tower()
    tower.spare = nn.Linear(2, 2)
    refused(tower, torch.randn(2, 4), ["spare"], "runs 0 times")


def test_a_skip_across_the_exit_is_refused():
    class Skip(Tower):
        def forward(self, x):
            h = first = self.blocks[0](self.embed(x))
            for block in self.blocks[1:]:
                h = block(h)
            return self.head(h + first)

    refused(Skip(), torch.randn(2, 4), ["blocks.1"], "rows cannot leave at blocks.1")


def test_a_model_that_mixes_rows_is_refused():
    class Mixing(Tower):
        def forward(self, x):
            h = self.embed(x)
            for block in self.blocks:
                h = block(h - h.mean(0))
            return self.head(h)

    refused(Mixing(), torch.randn(4, 4), ["blocks.1"], "mixes its rows")


@pytest.mark.parametrize("compact", ["sometimes", 0.0, 1.5, -0.1])
def test_compact_has_three_forms(towers, compact):
    plan = plan_of(towers[0], torch.randn(2, 4))
    with pytest.raises(ValueError, match="compact"):
        plan.run(towers[0], torch.randn(2, 4), leave_at(torch.zeros(2)), compact=compact)


def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
