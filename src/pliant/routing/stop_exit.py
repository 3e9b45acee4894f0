"""Stop & Exit Controller (SEC): a decoder that emits a token early, or ends a completion that is not worth finishing.

Sun, Du, Song, Wang, Li: *When Neural Code Completion Models Size up the Situation: Attaining Cheaper and Faster
Completion through Dynamic Model Inference*, ICSE 2024, arXiv 2401.09964.

The idea: many tokens are right after a few blocks, and some stay wrong whatever is computed. Heads on the blocks of a
frozen language model read tokens early; one linear controller, shared by all blocks, looks at the hidden state of the
current token and says *stop the completion*, *exit here* or *go on to the next block*.

Batch B, tokens T, width d, vocabulary V, blocks i = 0..M-1, heads at H (places in the list: heads in order, then the
network's own head, L = len(H) + 1)::

    h_i     (B, T, d)   residual stream after block i, no final norm
    z_i     = h_i U_i               (B, T, V)   i in H;  z_{M-1} = lm_head(norm(h_{M-1}))
    c_i     = h_i W                 (B, T, 3)   one W for all blocks; 0 stop, 1 exit, 2 continue

    heads        L_1 = sum_{i in H} CE(z_i, next token)                                    everything else frozen
    labels       f_t = 1 + the first place whose argmax is the next token, 0 where there is none
                 label[l, t] = 0 if f_t = 0;  1 if 1 <= f_t <= l + 1;  2 if f_t > l + 1    (L, B, T)
    controller   L_3 = sum_l (l + 1) CE(c_l, label[l]) / sum_l (l + 1)                     all but W frozen

    decoding, after a first token of full depth; pi = softmax(h_i W) of the current token, after each decision block
        argmax pi = 0 and pi_0 > tau_stop:  the completion ends, the token is not emitted
        argmax pi = 1 and pi_1 > tau_exit:  emit argmax z_i;  k_j, v_j of the skipped blocks j > i from norm_j(h_i)

Rows of a batch leave block by block, so that each block runs on only the rows that need it; the skipped keys and
values of all rows that left are filled in one product for each block. A token that leaves after block i of M still
costs the fill (2 d^2 of a block's 12 d^2 multiply-adds) in each later block, and a head (d V): after the first of the
12 blocks of GPT-2 small, 0.47 of a whole token.

Where the specification is silent, or this file differs:

* Decision blocks are those with a head, and the last; there "exit" changes nothing and "stop" still stops. CodeGen's
  variant is ``heads=3, decision_layers=net.heads``, ``train_final=True``.
* The network is in evaluation mode in all stages: labels made with dropout would not be those of decoding.
* ``label_rule="self_correct"`` is not the paper's: exit where head l itself is right, continue where a later one is,
  else stop. Weights (l + 1) count the decision blocks; in both of the reference's settings that is the place in H.
* Exits are static too: ``exit=k`` truncates the network, prompt included, and needs no fill. The paper has no such
  setting; it is what a smaller network would cost. ``FixedExit`` is the policy with a prompt of full depth.
* Rows of a batch have one column of the cache for each step, prompts are padded on the left, positions follow the mask.
* Teacher forcing (``forward``) has no completion to end: a stop there predicts end-of-sequence at that place alone, and
  the row goes on with its keys and values filled as after an exit.
* K/V-only fill equals the fused one bit for bit only where the projections are separate (Llama, Qwen2, OPT). A slice of
  GPT-2's fused weight differs by one unit in the last place in float64: the matrix product sums in another order.
* Families that cannot be taken apart (CodeGen's interleaved weight, normed keys) are filled through the block's own
  projection, with the queries computed for nothing: 3 d^2 in place of 2 d^2.
"""

from __future__ import annotations

import atexit
import copy
import importlib.util
import inspect
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import check
from pliant.core.cost import count_flops
from pliant.core.dynamic import Dynamic, NotStaticError, Point, Value
from pliant.core.inputs import (
    IGNORED,
    Batch,
    device_of,
    first_line,
    logits,
    next_token_loss,
    split_batch,
    take,
    to_device,
)
from pliant.core.rows import hidden_of

STOP, EXIT, CONTINUE = 0, 1, 2
GRID = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)  # the thresholds that the paper's code tries
_HEADS, _CONTROLLER = 0, 1

LabelRule = Literal["first_correct", "self_correct"]
Phase = Literal["heads", "controller"]

Context = Mapping[str, Tensor]


# -- a decoder taken apart ----------------------------------------------------------------------------------------


class Store:
    """Keys and values (rows, heads, length, width) of every block, written by column and read up to it.

    Blocks see it as the cache of transformers: ``update(keys, values, block)`` writes and returns all up to now.
    ``rows`` are the places of the rows present, None for all of them.
    """

    def __init__(self, layers: int, rows: int, length: int) -> None:
        self.count, self.length = rows, length
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.rows: Tensor | None = None
        self.column = 0

    def write(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write keys and values (n, heads, q, width) of one block at the present rows and columns; its whole store."""
        if self.keys[layer] is None:
            shape = self.count, keys.shape[1], self.length
            self.keys[layer] = keys.new_zeros(*shape, keys.shape[3])
            self.values[layer] = values.new_zeros(*shape, values.shape[3])
        k, v = self.keys[layer], self.values[layer]
        assert k is not None
        assert v is not None
        here: Any = slice(None) if self.rows is None else self.rows
        columns = slice(self.column, self.column + keys.shape[2])
        k[here, :, columns], v[here, :, columns] = keys, values
        return k, v

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write, and return what the present rows attend to: (n, heads, column + q, width) each."""
        k, v = self.write(keys, values, layer)
        end = self.column + keys.shape[2]
        if self.rows is None:
            return k[:, :, :end], v[:, :, :end]
        return k[self.rows, :, :end], v[self.rows, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, for good."""
        self.count = len(rows)
        self.keys = [None if k is None else k[rows] for k in self.keys]
        self.values = [None if v is None else v[rows] for v in self.values]


class _CaughtError(Exception):
    """Ends a block once its keys and values are known."""


class _Catcher:
    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        raise _CaughtError


class Parts:
    """A decoder taken apart; subclass it for a decoder of your own and give the class as ``parts``.

    Attributes:
        blocks: the M blocks, in order.
        head: hidden states after the final norm (..., d) to logits (..., V).
        max_length: most positions, None where there is no limit.
        needs_mask: whether ``block`` wants a mask where nothing is padded; else None means causal.
    """

    blocks: nn.ModuleList
    head: nn.Module
    max_length: int | None = None
    needs_mask: bool = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Context]:
        """Input of block 0 (n, q, d) of ids and positions (n, q), and tensors of n rows that the blocks need."""
        raise NotImplementedError

    def block(self, i: int, h: Tensor, mask: Tensor | None, context: Context, store: Any) -> Tensor:
        """Block i: (n, q, d) to (n, q, d). Where ``store`` is given, attend to what ``store.update(k, v, i)`` returns.

        ``mask`` is bool and broadcasts to (n, 1, q, keys), True where a query may look; None for one query that may
        look at everything.
        """
        raise NotImplementedError

    def normed(self, h: Tensor) -> Tensor:
        """What the head reads: the final norm of h (..., d)."""
        raise NotImplementedError

    def keys_values(self, i: int, h: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values of block i for inputs h (n, 1, d), by running the block until it hands them to its cache."""
        caught = _Catcher()
        try:
            self.block(i, h, None, context, caught)
        except _CaughtError:
            return caught.keys, caught.values
        raise TypeError(f"parts: block {i} was given a cache and never called its update(keys, values, block)")

    def truncated(self, k: int, head: nn.Module, norm: bool) -> nn.Module:
        """A plain network of blocks 0..k that reads out with ``head``, after the final norm where ``norm``."""
        raise NotImplementedError(f"extract: {type(self).__name__} has no truncated(k, head, norm)")


class _Layout(NamedTuple):
    base: str
    embed: str
    positions: str
    blocks: str
    norm: str
    before: str
    attention: str


_LAYOUTS = (
    _Layout("model", "embed_tokens", "rotary_emb", "layers", "norm", "input_layernorm", "self_attn"),  # Llama, Qwen2
    _Layout("transformer", "wte", "wpe", "h", "ln_f", "ln_1", "attn"),  # GPT-2
    _Layout("transformer", "wte", "rotary_emb", "h", "ln_f", "ln_1", "attn"),  # CodeGen
    _Layout(
        "model.decoder",
        "embed_tokens",
        "embed_positions",
        "layers",
        "final_layer_norm",
        "self_attn_layer_norm",
        "self_attn",
    ),  # OPT
)


class TransformersParts(Parts):
    """Decoders of transformers: the Llama family (Llama, Mistral without windows, Qwen2, ...), GPT-2, CodeGen, OPT.

    Raises:
        ValueError: another layout, windows of attention, or an attention other than "sdpa" and "eager".
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for layout in _LAYOUTS:
            parts = (layout.embed, layout.positions, layout.blocks, layout.norm)
            if all(_has(model, f"{layout.base}.{name}") for name in parts) and hasattr(model, "lm_head"):
                break
        else:
            raise ValueError(
                f"model: {type(model).__name__} is laid out like none of Llama, Qwen2, GPT-2, CodeGen and OPT; "
                "give parts=, a subclass of pliant.routing.stop_exit.Parts that takes it apart"
            )
        self.layout = layout
        self.base: Any = _at(model, layout.base)
        config: Any = model.config
        windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if windows or (getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None)):
            raise ValueError("model: some of its blocks attend to a window only, which the cache here does not do")
        attention = config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f'model: its attention is {attention!r}; load it with attn_implementation="sdpa"')
        self.needs_mask = attention == "eager"
        self.blocks = getattr(self.base, layout.blocks)
        self.head = getattr(model, "lm_head")  # noqa: B009 - nn.Module knows no such attribute
        self.max_length = getattr(config, "max_position_embeddings", None)
        names = inspect.signature(type(self.blocks[0]).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Context]:
        """Token and position embeddings; the rotary cosine and sine (n, q, width of a head) as context."""
        base = self.base
        h = getattr(base, self.layout.embed)(ids)
        if self.layout.positions == "rotary_emb":
            first, second = base.rotary_emb(h, position_ids=positions)
            return h, {"first": first, "second": second}
        if self.layout.positions == "wpe":
            return base.drop(h + base.wpe(positions)), {}
        if base.project_in is not None:
            h = base.project_in(h)
        return h + base.embed_positions(torch.ones_like(positions), 0, position_ids=positions), {}

    def block(self, i: int, h: Tensor, mask: Tensor | None, context: Context, store: Any) -> Tensor:
        """The model's own block, with ``store`` in the place of its cache."""
        if mask is not None and self.needs_mask:  # eager attention adds its mask
            mask = torch.zeros(mask.shape, dtype=h.dtype, device=h.device).masked_fill(~mask, torch.finfo(h.dtype).min)
        rotary = {"position_embeddings": (context["first"], context["second"])} if context else {}
        return hidden_of(self.blocks[i](h, attention_mask=mask, **{self.cache_name: store}, **rotary))

    def normed(self, h: Tensor) -> Tensor:
        """The final norm, and OPT's projection to the width of its embeddings."""
        norm = getattr(self.base, self.layout.norm)
        if norm is not None:
            h = norm(h)
        project = getattr(self.base, "project_out", None)
        return h if project is None else project(h)

    def keys_values(self, i: int, h: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values alone: the fused weight of GPT-2 is sliced, queries are not computed."""
        block: Any = self.blocks[i]
        attention = getattr(block, self.layout.attention)
        x = getattr(block, self.layout.before)(h) if getattr(block, "do_layer_norm_before", True) else h
        if hasattr(attention, "c_attn"):
            d = attention.split_size
            x = torch.addmm(attention.c_attn.bias[d:], x.flatten(0, -2), attention.c_attn.weight[:, d:])
            k, v = x.view(*h.shape[:2], -1).chunk(2, dim=2)
        elif hasattr(attention, "k_proj"):
            k, v = attention.k_proj(x), attention.v_proj(x)
        else:
            raise NotImplementedError(f"{type(attention).__name__} has no projection that can be taken apart")
        shape = (*h.shape[:2], -1, attention.head_dim)
        k, v = k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2)
        if context:
            cos, sin = context["first"].unsqueeze(1), context["second"].unsqueeze(1)
            left, right = k.chunk(2, dim=-1)
            k = k * cos + torch.cat((-right, left), dim=-1) * sin
        return k, v

    def truncated(self, k: int, head: nn.Module, norm: bool) -> nn.Module:
        """A copy of the model with k + 1 blocks and another head: it generates, saves and loads as any of its class.

        Without the final norm it is of a subclass, since no configuration of transformers switches the norm off. Its
        code is saved beside the weights: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.
        """
        model: Any = copy.deepcopy(self.model)
        base = _at(model, self.layout.base)
        del getattr(base, self.layout.blocks)[k + 1 :]
        if not norm:
            projected = getattr(base, "project_out", None) is not None
            owner: type = type(model)
            model.__class__ = _without_norm(owner, self.layout.base, self.layout.norm, projected)
            model.drop_norm()
        model.lm_head = copy.deepcopy(head)
        model.config.num_hidden_layers = k + 1
        model.config.tie_word_embeddings = False
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[: k + 1]
        whole: nn.Module = model
        return whole


_WITHOUT_NORM = '''"""A {name} whose head reads the residual stream itself, with no norm before it."""

import torch
from {module} import {name}
from torch import nn


class {name}WithoutNorm({name}):
    def __init__(self, config):
        super().__init__(config)
        self.drop_norm()

    def drop_norm(self):
        base = self.{base}
        base.{norm} = nn.Identity()
        # A file of this class does not fit {name} itself, which would start a norm anew and say nothing.
        base.{norm}.register_buffer("weight", torch.empty(0))
        {projection}
'''


@cache
def _without_norm(owner: type, base: str, norm: str, projected: bool) -> type:
    """The subclass of a model of transformers that has no final norm, in a module of its own that is saved with it."""
    name = owner.__name__
    projection = (
        "base.project_out, self.lm_head = None, nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)"
    )
    projection = projection if projected else ""
    text = _WITHOUT_NORM.format(name=name, module=owner.__module__, base=base, norm=norm, projection=projection)
    folder = Path(tempfile.mkdtemp(prefix="without_norm_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / f"{name.lower()}_without_{norm}{'_' * projected}.py"
    path.write_text(text.rstrip() + "\n")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Any = getattr(module, f"{name}WithoutNorm")
    made.register_for_auto_class("AutoModelForCausalLM")
    found: type = made
    return found


def _has(model: nn.Module, path: str) -> bool:
    try:
        _at(model, path)
    except AttributeError:
        return False
    return True


def _at(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


# -- the equations, one function each -------------------------------------------------------------------------------


def exit_labels(correct: Tensor, rule: str = "first_correct") -> Tensor:
    """What the controller should say, from which places are right: (L, ...) bool to (L, ...) int64.

    "first_correct" (the paper's): exit from the first place that is right on, continue before it, stop where none is.
    "self_correct": exit where this place is right, continue where only a later one is, else stop.
    """
    check.choice("label_rule", rule, LabelRule)
    found = correct.new_full(correct.shape, CONTINUE, dtype=torch.int64)
    if rule == "first_correct":
        seen = correct.cumsum(0) > 0
        return found.masked_fill(seen, EXIT).masked_fill(~seen[-1:], STOP)
    ahead = correct.flip(0).cumsum(0).flip(0) > 0
    return found.masked_fill(~ahead, STOP).masked_fill(correct, EXIT)


def controller_loss(scores: Sequence[Tensor], labels: Tensor) -> Tensor:
    """``sum_l (l + 1) CE_l / sum_l (l + 1)`` of scores, one (..., 3) for each decision block, and labels (L, ...)."""
    ce = [
        F.cross_entropy(c.flatten(0, -2), y.flatten(), ignore_index=IGNORED)
        for c, y in zip(scores, labels, strict=True)
    ]
    return weighted_mean(torch.stack(ce))


def weighted_mean(ce: Tensor) -> Tensor:
    """``sum_l (l + 1) x_l / sum_l (l + 1)`` of (L,): later blocks count more."""
    weight = torch.arange(1, len(ce) + 1, dtype=ce.dtype, device=ce.device)
    return (weight * ce).sum() / weight.sum()


def decide(scores: Tensor, taus: Tensor) -> Tensor:
    """STOP, EXIT or CONTINUE (n,) of controller scores (n, 3): the largest class, if its probability is *above* tau.

    ``taus`` are (tau_stop, tau_exit, anything), see ``taus_of``.
    """
    p, top = scores.softmax(-1).max(-1)
    return top.masked_fill(p <= taus[top], CONTINUE)


def taus_of(exit_threshold: float, stop_threshold: float, like: Tensor) -> Tensor:
    """The thresholds (3,) of the classes stop, exit and continue, as ``decide`` wants them."""
    return like.new_tensor([stop_threshold, exit_threshold, math.inf])


def rouge_l(candidate: Tensor, reference: Tensor, lengths: Tensor | None = None) -> Tensor:
    """ROUGE-L on token ids: the F-measure of the longest common subsequence of (N, n) and (N, m), in [0, 1]: (N,).

    Args:
        candidate: completions.
        reference: true continuations, all of length m.
        lengths: tokens (N,) of each completion that count; all n by default. An empty one scores 0.
    """
    if candidate.dim() != 2 or reference.dim() != 2 or len(candidate) != len(reference):
        raise ValueError(
            f"candidate, reference: shapes {tuple(candidate.shape)} and {tuple(reference.shape)}; (N, n) and (N, m)"
        )
    n, m = candidate.shape[1], reference.shape[1]
    counted = torch.full((len(candidate),), n, device=candidate.device) if lengths is None else lengths
    inside = torch.arange(n, device=candidate.device) < counted[:, None]
    equal = (candidate[:, :, None] == reference[:, None, :]) & inside[:, :, None]
    row = torch.zeros(len(candidate), m + 1, dtype=torch.int64, device=candidate.device)
    for i in range(n):  # the table of the dynamic programme, one row for each token; samples side by side
        reach = torch.where(equal[:, i], row[:, :-1] + 1, row[:, 1:])
        row = F.pad(reach.cummax(1).values, (1, 0))
    common = row[:, -1].double()
    return 2 * common / (counted + m).clamp_min(1)


# -- who decides ----------------------------------------------------------------------------------------------------


class Policy(Protocol):
    """Says after a block what each row does. ``layers`` are the blocks at which it is asked."""

    layers: tuple[int, ...]

    def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Actions (n,) for hidden states (n, d), and the logits (n, V) where they had to be computed for it."""


class Controller:
    """The paper's: one linear classifier and two thresholds; a threshold above 1 switches its action off."""

    def __init__(self, net: StopExit, exit_threshold: float = math.inf, stop_threshold: float = math.inf) -> None:
        for name, value in (("exit_threshold", exit_threshold), ("stop_threshold", stop_threshold)):
            _threshold(name, value)
        self.layers = net.decision_layers
        self.w = net.controller.weight.detach().T  # W (d, 3)
        self.taus = taus_of(exit_threshold, stop_threshold, self.w)

    def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """``decide`` of ``h W``."""
        return decide(h @ self.w, self.taus), None


class Confidence:
    """The usual opponent: exit where the prediction of the head itself is sure (CALM, Schuster et al., 2022).

    ``score`` is "margin", the gap between the two largest probabilities, or "probability". Needs every head on the way.
    """

    def __init__(self, net: StopExit, threshold: float, score: str = "margin") -> None:
        self.score = check.choice("score", score, ("margin", "probability"))
        self.net, self.layers, self.threshold = net, net.heads, threshold

    def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Exit where the score is above the threshold."""
        z = self.net.read(layer, h)
        p = z.softmax(-1).topk(2, dim=-1).values
        score = p[:, 0] - p[:, 1] if self.score == "margin" else p[:, 0]
        return torch.where(score > self.threshold, EXIT, CONTINUE), z


class FixedExit:
    """Every token but the first leaves after the same block."""

    def __init__(self, net: StopExit, layer: int) -> None:
        if layer not in net.heads:
            raise ValueError(f"layer: {layer} has no head; one of {net.heads}")
        self.layers: tuple[int, ...] = (layer,)

    def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Exit."""
        return torch.full((len(h),), EXIT, device=h.device), None


# -- what comes out -------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What was executed, in rows: prompt rows through blocks, decoding rows through blocks, fills, heads, decisions.

    ``flops`` (2 for each multiply-add, counted by dispatch) where it was asked for.
    """

    prompt: int = 0
    blocks: int = 0
    fills: int = 0
    heads: int = 0
    decisions: int = 0
    flops: int | None = None


class Generated(NamedTuple):
    """A batch of completions.

    Attributes:
        sequences: prompts and new tokens (B, T + new), as ``generate`` of transformers gives them.
        exit_layers: blocks run for each new token (B, new), counted from 1; that of the decision for a stop; -1 after.
        stopped: (B,) bool, whether the controller ended the completion.
        lengths: new tokens (B,), end-of-sequence not counted.
        cost: what was executed.
        cache: keys and values (rows left, heads, length, width) of every block, where asked for.
    """

    sequences: Tensor
    exit_layers: Tensor
    stopped: Tensor
    lengths: Tensor
    cost: Cost
    cache: tuple[tuple[Tensor, Tensor], ...] | None = None

    @property
    def depth(self) -> float:
        """Mean blocks for each token, all tokens alike: the first and those of stops included."""
        return self.exit_layers[self.exit_layers > 0].double().mean().item()

    @property
    def depth_by_completion(self) -> float:
        """Mean over completions of their mean depth, as the paper's code has it."""
        ran = self.exit_layers > 0
        return ((self.exit_layers * ran).sum(1) / ran.sum(1).clamp_min(1)).double().mean().item()


class Decision(NamedTuple):
    """Teacher forcing: logits (B, T, V), blocks run (B, T) from 1, and whether the controller said stop (B, T)."""

    logits: Tensor
    exit_layers: Tensor
    stopped: Tensor


class Labelled(NamedTuple):
    """A batch with the controller's labels (L, B, T), -100 where none; ``loss`` takes it as any other batch."""

    ids: Tensor
    mask: Tensor | None
    labels: Tensor


# -- the network ------------------------------------------------------------------------------------------------------


class StopExit(Dynamic):
    """Early exit and early stop for a causal language model, with one linear controller.

    Args:
        model: a trained decoder: Llama, Qwen2, GPT-2, CodeGen, OPT of transformers, or your own with ``parts``. It is
            frozen, and shared, not copied.
        heads: blocks with a head: "all" but the last, an interval (3: 0, 3, 6, ...), or their numbers from 0. Each has
            d V parameters, for GPT-2 small 425 million together.
        decision_layers: blocks after which the controller is asked; those with a head, and the last, by default.
        head_norm: None reads the raw residual stream (the paper); "ln_f" puts the model's final norm before each head,
            which half precision may need.
        head_init: "normal" (the paper) or "lm_head", a copy of the model's own head.
        head_std: standard deviation of "normal", and of the controller.
        label_rule: "first_correct" (the paper) or "self_correct"; see ``exit_labels``.
        heads_share: share of the training, by ``schedule``, in which the heads train; then the controller does.
        train_final: train a copy of the model's own head with the others, as the CodeGen variant does.
        thresholds: the adaptive points: tau_exit, or pairs (tau_exit, tau_stop). ``use`` takes any others as well.
        fill: "kv" computes the keys and values of skipped blocks alone where that gives what the block itself would
            cache, which is tried for each of them; "qkv" runs the block's whole projection.
        eos_token_id: the end of a sequence; the model's own by default.
        parts: takes a decoder of another layout apart: a subclass of ``Parts``.
        seed: of the initial heads and controller.

    Shapes:
        input: token ids (B, T), and optionally a mask (B, T); output: logits (B, T, V) by teacher forcing, the first
        token with all blocks. ``generate`` completes.
    """

    stage: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: str | int | Sequence[int] = "all",
        decision_layers: Sequence[int] | None = None,
        head_norm: str | None = None,
        head_init: str = "normal",
        head_std: float = 0.02,
        label_rule: str = "first_correct",
        heads_share: float = 0.5,
        train_final: bool = False,
        thresholds: Sequence[float | Sequence[float]] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
        fill: str = "kv",
        eos_token_id: int | None = None,
        parts: Callable[[nn.Module], Parts] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check.module("model", model)
        self.head_norm = check.optional(check.choice, "head_norm", head_norm, ("ln_f",))
        self.head_init = check.choice("head_init", head_init, ("normal", "lm_head"))
        self.head_std = check.positive("head_std", head_std)
        self.label_rule: LabelRule = check.choice("label_rule", label_rule, LabelRule)
        self.heads_share = check.share("heads_share", heads_share)
        self.train_final = check.boolean("train_final", train_final)
        self.thresholds = check.sequence("thresholds", thresholds, _thresholds)
        check.choice("fill", fill, ("kv", "qkv"))
        self.eos_token_id = check.optional(check.whole, "eos_token_id", eos_token_id, at_least=0)
        self.parts = check.optional(check.function, "parts", parts)
        self.seed = check.seed("seed", seed)
        self.decoder = TransformersParts(model) if parts is None else _taken_apart(parts, model)
        self.model = model.requires_grad_(False).eval()
        self.layers = len(self.decoder.blocks)
        if self.layers < 2:
            raise ValueError("model: it has fewer than 2 blocks, so there is nowhere to leave")
        self.heads = _places(heads, self.layers)
        known = (*self.heads, self.layers - 1)
        asked = known if decision_layers is None else decision_layers
        self.decision_layers: tuple[int, ...] = check.choices("decision_layers", asked, known)
        if list(self.decision_layers) != sorted(self.decision_layers):
            raise check.wrong("decision_layers", asked, f"in order, out of {known}")
        hidden, out = self._probe()
        self.width, self.vocabulary = hidden.shape[-1], out.shape[-1]
        self._alone = self._fillable()
        self.fill = fill if self._alone else "qkv"

        like: dict[str, Any] = {"device": out.device, "dtype": hidden.dtype, "bias": False}
        self.exit_heads = nn.ModuleList([nn.Linear(self._read_width(), self.vocabulary, **like) for _ in self.heads])
        self.controller = nn.Linear(self.width, 3, **like)
        self.final_head = copy.deepcopy(self.decoder.head).requires_grad_(True) if train_final else None
        self.register_buffer("stage", torch.tensor(_HEADS if heads_share else _CONTROLLER))
        self.reset_parameters()
        for pair in map(_pair, self.thresholds):
            self._policy(*pair)
        self.point = self.points()[-1]

    def reset_parameters(self) -> None:
        """Fresh heads and controller, from ``seed``."""
        rng = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for weight in (*self.exit_heads.parameters(), self.controller.weight):
                weight.copy_(torch.randn(weight.shape, generator=rng) * self.head_std)
            if self.head_init == "lm_head":
                own = self.decoder.head
                if not isinstance(own, nn.Linear) or own.weight.shape != next(self.exit_heads.parameters()).shape:
                    raise ValueError(
                        'head_init: "lm_head" needs a linear head on the width of the blocks; use "normal"'
                    )
                for weight in self.exit_heads.parameters():
                    weight.copy_(own.weight)

    def extra_repr(self) -> str:
        """The sizes."""
        return (
            f"layers={self.layers}, heads={self.heads}, width={self.width}, vocabulary={self.vocabulary}, "
            f"fill={self.fill!r}"
        )

    def train(self, mode: bool = True) -> Self:
        """Training mode for heads and controller; the model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    # -- the dial ---------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Truncations ``exit=k``, the thresholds from the lowest tau_exit up, and the whole network ``exit=M-1``."""
        return [
            *(Point(exit=k) for k in self.heads),
            *(_point(*pair) for pair in sorted(map(_pair, self.thresholds))),
            Point(exit=self.layers - 1),
        ]

    def _known(self, point: Mapping[str, Value]) -> Point:
        """Any pair of thresholds is a setting, listed or not."""
        wanted = point if isinstance(point, Point) else Point(**point)
        if wanted and set(wanted) <= {"exit_threshold", "stop_threshold"}:
            self._policy(*_taus(wanted))
            return wanted
        return super()._known(wanted)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what runs depends on every token: there is no graph
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) at the current setting: what each token was followed by, and decided on, in decoding."""
        return self.decide(input_ids, attention_mask).logits

    def decide(self, input_ids: Tensor, attention_mask: Tensor | None = None, policy: Policy | None = None) -> Decision:
        """Teacher forcing, token by token, on only the rows that need each block; at once where the point is static.

        The first token of each row has full depth. A stop predicts end-of-sequence at its place.
        """
        ids, mask = self._ids(input_ids, attention_mask)
        depth = ids.new_full(ids.shape, self.layers)
        if policy is None and "exit" in self.point:
            k = int(self.point["exit"])
            h = self._trace(ids, mask, {k}, k)[k]
            return Decision(self.read(k, h), depth.fill_(k + 1), torch.zeros_like(depth, dtype=torch.bool))
        with torch.no_grad():
            policy = policy if policy is not None else self._policy(None, None)
            run = _Decoding(self, len(ids), mask, ids.shape[1], policy)
            first = 1 if mask is None else min(int(mask.int().argmax(1).max()) + 1, ids.shape[1])
            z = [self.read(self.layers - 1, run.prompt(ids[:, :first]))]
            stopped = torch.zeros_like(depth, dtype=torch.bool)
            for t in range(first, ids.shape[1]):
                found, depth[:, t], stopped[:, t] = run.step(ids[:, t], forced=True)
                z.append(found[:, None])
            out = torch.cat(z, 1)
            if stopped.any():
                end = torch.full_like(out[0, 0], torch.finfo(out.dtype).min)
                end[self._end()] = 0
                out[stopped] = end
        return Decision(out, depth, stopped)

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The truncated network of ``exit=k`` with its own head, of the model's own class; nothing of pliant in it."""
        point = self._known(point)
        if "exit" not in point:
            raise NotStaticError(point, "the controller chooses a depth for every token")
        k = int(point["exit"])
        head = self._head(k)
        plain = self.decoder.truncated(k, head, norm=self.head_norm is not None or k == self.layers - 1)
        return plain.requires_grad_(True).eval()

    # -- generation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        exit_threshold: float | None = None,
        stop_threshold: float | None = None,
        policy: Policy | None = None,
        generation_config: Any = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        count: bool = False,
        keep_cache: bool = False,
        **unsupported: Any,
    ) -> Generated:
        """Greedy completions at the current setting, or at the thresholds or the policy given here.

        Args:
            input_ids: prompts (B, T), shorter ones padded on the left.
            attention_mask: (B, T), 0 at the padding.
            max_new_tokens: as in transformers, where 20 is the default.
            exit_threshold: tau_exit; off where only the other one is given.
            stop_threshold: tau_stop; off where only the other one is given.
            policy: anything else that decides, such as ``Confidence``.
            generation_config: of transformers; its lengths and special tokens are used.
            eos_token_id: one or several that end a completion.
            pad_token_id: what stands after an end; that of the end by default.
            count: count FLOPs by dispatch, which takes longer.
            keep_cache: return the keys and values.
            unsupported: sampling, beams, ``output_attentions`` and the like are refused by name.

        Raises:
            ValueError: an argument is not what is described here, a completion would be too long for the model, or
                ``tau_stop`` is on and there is no end-of-sequence token.
        """
        ids, mask = self._ids(input_ids, attention_mask)
        if mask is not None and not mask[:, -1].all():
            raise ValueError("attention_mask: its last column has zeros; pad prompts on the left to complete them")
        new, ends, pad = self._settings(
            ids.shape[1], max_new_tokens, generation_config, eos_token_id, pad_token_id, unsupported
        )
        layers = self.layers
        if policy is None:
            if exit_threshold is None and stop_threshold is None and "exit" in self.point:
                layers = int(self.point["exit"]) + 1
            else:
                policy = self._policy(exit_threshold, stop_threshold, ends)
        found: list[Generated] = []

        def complete() -> None:
            run = _Decoding(self, len(ids), mask, ids.shape[1] + new, policy, layers)
            found.append(self._complete(run, ids, new, ends, pad, keep_cache))

        if not count:
            complete()
            return found[0]
        flops = count_flops(complete, nonzero=False).total
        found[0].cost.flops = flops
        return found[0]

    def _complete(
        self, run: _Decoding, ids: Tensor, new: int, ends: Sequence[int], pad: int, keep_cache: bool
    ) -> Generated:
        rows = len(ids)
        live = torch.arange(rows, device=ids.device)
        tokens = ids.new_full((rows, new), pad)
        depth = ids.new_full((rows, new), -1)
        stopped = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=ids.device)
        end = torch.tensor(ends, dtype=ids.dtype, device=ids.device)
        z = run.read(run.prompt(ids)[:, -1])
        layers, halted = torch.full_like(live, run.layers), torch.zeros_like(stopped)
        for s in range(new):
            token = z.argmax(-1).masked_fill(halted, ends[0] if ends else pad)
            over = halted | torch.isin(token, end)
            tokens[live, s], depth[live, s], stopped[live] = token, layers, halted
            lengths[live] += ~over
            if s + 1 == new:
                break
            if over.any():
                keep = (~over).nonzero().squeeze(1)
                live, token = live[keep], token[keep]
                if not len(live):
                    break
                run.keep(keep)
            z, layers, halted = run.step(token)
        sequences = torch.cat((ids, tokens[:, : s + 1]), 1)
        cache = run.cache() if keep_cache else None
        return Generated(sequences, depth[:, : s + 1], stopped, lengths, run.cost, cache)

    def calibrate(
        self,
        prompts: Tensor,
        references: Tensor,
        *,
        max_drop: float = 0.01,
        stop_threshold: float | None = None,
        grid: Sequence[float] = GRID,
        batch_size: int = 64,
    ) -> Point:
        """Turn the dial to the tau_exit of least depth whose ROUGE-L is within ``max_drop`` of the whole network's.

        Args:
            prompts: held-out prompts (N, T) of one length.
            references: their true continuations (N, new).
            max_drop: in ROUGE-L, between 0 and 1. With ``stop_threshold`` the shorter completions count as they are.
            stop_threshold: tau_stop that goes with it.
            grid: values of tau_exit to try.
            batch_size: prompts at once.

        Returns:
            The point now in use: the whole network where no value of the grid qualifies.
        """
        if prompts.dim() != 2 or references.dim() != 2 or len(prompts) != len(references) or not len(prompts):
            raise ValueError(
                f"prompts, references: shapes {tuple(prompts.shape)}, {tuple(references.shape)}; (N, T) and (N, new)"
            )

        def scored(exit_threshold: float, stop: float) -> tuple[float, float]:
            score, blocks, tokens = 0.0, 0.0, 0
            for start in range(0, len(prompts), batch_size):
                x, y = prompts[start : start + batch_size], references[start : start + batch_size]
                found = self.generate(x, max_new_tokens=y.shape[1], exit_threshold=exit_threshold, stop_threshold=stop)
                completions = F.pad(found.sequences[:, x.shape[1] :], (0, y.shape[1]))[:, : y.shape[1]]
                score += rouge_l(completions.cpu(), y.cpu(), found.lengths.cpu()).sum().item()
                ran = found.exit_layers > 0
                blocks += float((found.exit_layers * ran).sum())
                tokens += int(ran.sum())
            return score / len(prompts), blocks / tokens

        whole, depth = scored(math.inf, math.inf)
        best = Point(exit=self.layers - 1)
        for tau in grid:
            score, blocks = scored(tau, math.inf if stop_threshold is None else stop_threshold)
            if score >= whole - max_drop and blocks < depth:
                best, depth = _point(tau, math.inf if stop_threshold is None else stop_threshold), blocks
        self.use(best)
        return best

    # -- training -------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """What ``loss`` trains: "heads" or "controller". ``schedule`` sets it; so may you."""
        return "controller" if int(self.stage) == _CONTROLLER else "heads"

    @phase.setter
    def phase(self, name: str) -> None:
        check.choice("phase", name, Phase)
        self.stage.fill_(_CONTROLLER if name == "controller" else _HEADS)
        # Gradients that are zero and not None would still move idle weights, by momentum and weight decay.
        for p in self.controller.parameters() if name == "heads" else self._head_parameters():
            p.grad = None

    def schedule(self, progress: float) -> None:
        """Heads for the first ``heads_share`` of the training, then the controller."""
        if progress < 1 or self.heads_share < 1:
            self.phase = "heads" if progress < self.heads_share else "controller"

    def loss(self, batch: Batch | Tensor | Labelled) -> Tensor:
        """Of the heads, the sum of their cross entropies; of the controller, its weighted cross entropy.

        ``batch`` is token ids (B, T); a mapping with "input_ids", "labels" in step with them (-100 ignored, as in
        transformers) and perhaps "attention_mask"; a pair of ids and the ids one place on; or what ``make_labels``
        gives.
        """
        if isinstance(batch, Labelled):
            ids, mask, labels = to_device(batch, self.controller.weight.device)
            return self._controller_loss(self._trace(ids, mask, set(self.decision_layers)), labels)
        ids, mask, target = self._batch(batch)
        if self.phase == "heads":
            trained = (*self.heads, self.layers - 1) if self.train_final else self.heads
            states = self._trace(ids, mask, set(trained))
            ce = [next_token_loss(self.read(i, states[i]), target) for i in trained]
            return torch.stack(ce).sum()
        states = self._trace(ids, mask, {*self.heads, self.layers - 1})
        return self._controller_loss(states, self._labels(states, target))

    def make_labels(self, batches: Iterable[Batch | Tensor]) -> list[Labelled]:
        """Stage 2, once for all: the controller's labels for every batch, by the heads as they are now."""
        found = []
        for batch in batches:
            ids, mask, target = self._batch(batch)
            states = self._trace(ids, mask, {*self.heads, self.layers - 1})
            found.append(Labelled(ids, mask, self._labels(states, target)))
        if not found:
            raise ValueError("batches: there are none")
        return found

    @torch.no_grad()
    def _labels(self, states: Mapping[int, Tensor], target: Tensor) -> Tensor:
        correct = torch.stack([self.read(i, states[i]).argmax(-1) == target for i in (*self.heads, self.layers - 1)])
        return exit_labels(correct, self.label_rule).masked_fill(target == IGNORED, IGNORED)

    def _controller_loss(self, states: Mapping[int, Tensor], labels: Tensor) -> Tensor:
        places = [(*self.heads, self.layers - 1).index(i) for i in self.decision_layers]
        return controller_loss([self.controller(states[i]) for i in self.decision_layers], labels[places])

    def _batch(self, batch: Batch | Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids, mask, and the token (or -100) that follows each of the ids."""
        mask: Tensor | None = None
        if isinstance(batch, Tensor) or (isinstance(batch, Mapping) and "labels" in batch):
            x = batch if isinstance(batch, Tensor) else batch["input_ids"]
            y = batch if isinstance(batch, Tensor) else batch["labels"]
            if x.dim() != 2 or x.shape != y.shape or x.shape[1] < 2:
                raise ValueError(
                    f"batch: ids {tuple(x.shape)} and labels {tuple(y.shape)}; allowed: (B, T) both, T of 2 or more"
                )
            given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = None if given is None else given[:, :-1]
            x, y = x[:, :-1], y[:, 1:]
        else:
            x, y = split_batch(batch)
            if isinstance(x, Mapping):
                x, mask = x["input_ids"], x.get("attention_mask")
            if not isinstance(y, Tensor) or y.shape != x.shape:
                raise ValueError("batch: of a pair, the target must be the ids one place on, of the same shape (B, T)")
        ids, mask = self._ids(x, mask)
        target = y.to(ids.device)
        if mask is not None:
            target = target.masked_fill(~mask, IGNORED)
        valid = target[target != IGNORED]
        if not len(valid):
            raise ValueError("batch: no token is left to predict (all are padding or -100)")
        if int(valid.min()) < 0 or int(valid.max()) >= self.vocabulary:
            raise ValueError(
                f"target: tokens run from {int(valid.min())} to {int(valid.max())}; allowed: 0..{self.vocabulary - 1}"
            )
        return ids, mask, target

    # -- inside ---------------------------------------------------------------------------------------------------

    def read(self, layer: int, h: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., d) after a block that has a head, or the last."""
        if layer == self.layers - 1 or self.head_norm is not None:
            h = self.decoder.normed(h)
        z: Tensor = self._head(layer)(h)
        return z

    def _head(self, layer: int) -> nn.Module:
        if layer == self.layers - 1:
            return self.decoder.head if self.final_head is None else self.final_head
        return self.exit_heads[self.heads.index(layer)]

    def _head_parameters(self) -> list[nn.Parameter]:
        own = [] if self.final_head is None else list(self.final_head.parameters())
        return [*self.exit_heads.parameters(), *own]

    @torch.no_grad()
    def _trace(self, ids: Tensor, mask: Tensor | None, wanted: set[int], last: int | None = None) -> dict[int, Tensor]:
        """Hidden states (B, T, d) after the wanted blocks, of one whole forward pass."""
        decoder, found = self.decoder, {}
        h, context = decoder.embed(ids, _positions(ids, mask))
        allowed = self._causal(ids, mask)
        for i in range(self.layers if last is None else last + 1):
            h = decoder.block(i, h, allowed, context, None)
            if i in wanted:
                found[i] = h
        return found

    def _causal(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """True where a token may look: at itself and at those before it that are no padding."""
        if mask is None and not self.decoder.needs_mask:
            return None
        t = ids.shape[1]
        allowed = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()[None, None]
        if mask is not None:  # padding looks at itself, so that nothing is divided by zero
            allowed = allowed & (mask[:, None, None] | torch.eye(t, dtype=torch.bool, device=ids.device))
        return allowed

    def _fill(self, layer: int, h: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values of a skipped block for states (n, 1, d)."""
        if self.fill == "kv" and layer in self._alone:
            return self.decoder.keys_values(layer, h, context)
        return Parts.keys_values(self.decoder, layer, h, context)

    def _policy(self, exit_: float | None, stop: float | None, ends: Sequence[int] | None = None) -> Policy:
        if exit_ is None and stop is None:
            exit_, stop = _taus(self.point)
        exit_, stop = (math.inf if v is None else v for v in (exit_, stop))
        if stop <= 1 and not (self._ends() if ends is None else ends):
            raise ValueError("stop_threshold: it is on, and there is no end-of-sequence token; give eos_token_id")
        return Controller(self, exit_, stop)

    def _ends(self) -> tuple[int, ...]:
        """The tokens that end a sequence: ours, or those of the model's generation config."""
        found = self.eos_token_id
        if found is None:
            found = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        if found is None:
            found = getattr(getattr(self.model, "config", None), "eos_token_id", None)
        return () if found is None else (found,) if isinstance(found, int) else tuple(found)

    def _end(self) -> int:
        return self._ends()[0]

    def _settings(
        self,
        prompt: int,
        max_new_tokens: int | None,
        config: Any,
        eos_token_id: int | Sequence[int] | None,
        pad_token_id: int | None,
        unsupported: Mapping[str, Any],
    ) -> tuple[int, tuple[int, ...], int]:
        """New tokens, ends and padding, by the arguments, then the config given, then the model's own."""
        given = {
            name: getattr(config, name, None)
            for name in ("do_sample", "num_beams", "repetition_penalty", "no_repeat_ngram_size")
        }
        for name, value in {**given, **unsupported}.items():
            if value in (None, False, 0) or (name in ("num_beams", "repetition_penalty") and value == 1):
                continue
            raise ValueError(f"{name}: {value!r} is not supported; exits and stops are defined for greedy decoding")
        new = max_new_tokens
        if new is None:
            new = getattr(config, "max_new_tokens", None)
        if new is None and getattr(config, "max_length", None):
            new = config.max_length - prompt
        new = 20 if new is None else new
        if isinstance(new, bool) or not isinstance(new, int) or new < 1:
            raise ValueError(f"max_new_tokens: {new!r} is not allowed; a whole number of 1 or more")
        most = self.decoder.max_length
        if most is not None and prompt + new > most:
            raise ValueError(f"max_new_tokens: {prompt} + {new} tokens; the model has positions for {most}")
        found = eos_token_id if eos_token_id is not None else getattr(config, "eos_token_id", None)
        ends = self._ends() if found is None else (found,) if isinstance(found, int) else tuple(found)
        pad = pad_token_id if pad_token_id is not None else getattr(config, "pad_token_id", None)
        if pad is None:
            pad = getattr(getattr(self.model, "generation_config", None), "pad_token_id", None)
        return new, ends, int(pad) if pad is not None else ends[0] if ends else 0

    def _ids(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids and mask (B, T) on our device; the mask as bool, None where nothing is padded."""
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2 or 0 in ids.shape:
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"input_ids: {got} is not allowed; whole numbers (B, T), B and T of 1 or more")
        device = self.controller.weight.device
        ids = ids.to(device)
        if device.type == "cpu" and (int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary):
            raise ValueError(
                f"input_ids: tokens run from {int(ids.min())} to {int(ids.max())}; allowed: 0..{self.vocabulary - 1}"
            )
        if mask is None:
            return ids, None
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask: shape {tuple(mask.shape)}; allowed: {tuple(ids.shape)}, as input_ids")
        mask = mask.to(device).bool()
        return ids, None if bool(mask.all()) else mask

    def _read_width(self) -> int:
        """What an early head reads: the residual stream, or the final norm of it."""
        if self.head_norm is None:
            return self.width
        probe = torch.zeros(1, self.width, device=device_of(self.model), dtype=next(self.model.parameters()).dtype)
        with torch.no_grad():
            return self.decoder.normed(probe).shape[-1]

    @torch.no_grad()
    def _probe(self) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of a few tokens; the parts must add up to the model."""
        ids = torch.arange(4, device=device_of(self.model))[None]
        try:
            expected = logits(self.model(ids))
            h = self._trace(ids, None, {self.layers - 1})[self.layers - 1]
        except (RuntimeError, IndexError, AttributeError, KeyError) as error:
            line = first_line(error)
            raise ValueError(f"model: it does not run on token ids (1, 4), whole or taken apart: {line}") from error
        found = self.decoder.head(self.decoder.normed(h))
        if not torch.isfinite(expected).all():
            raise ValueError("model: its logits contain NaN or infinity")
        if not _alike([found], [expected]):
            raise ValueError(
                f"model: {type(self.model).__name__} taken apart does not give the model's own logits (it scales or "
                "adds something between embedding, blocks, norm and head); give parts="
            )
        return h, found

    @torch.no_grad()
    def _fillable(self) -> frozenset[int]:
        """The blocks whose keys and values alone are what a pass with all blocks leaves in the cache.

        Every block is asked: some families (SmolLM3) mix blocks that rotate their keys with blocks that do not.

        Raises:
            ValueError: a block's own projection gives another cache than the pass, or decoding other logits.
        """
        ids = torch.arange(4, device=device_of(self.model))[None]
        run = _Decoding(self, 1, None, 4, None)
        run.prompt(ids[:, :3])
        h, context = self.decoder.embed(ids[:, 3:], run.positions)
        alone = set()
        for i in range(self.layers):
            entry = h
            h = self.decoder.block(i, h, None, context, run.store)
            cached = [t[:, :, 3:] for t in (run.store.keys[i], run.store.values[i]) if t is not None]
            if not _alike(Parts.keys_values(self.decoder, i, entry, context), cached):
                raise ValueError(f"model: block {i} caches other keys and values than it computes from its input alone")
            if type(self.decoder).keys_values is Parts.keys_values:
                continue
            try:
                own = self.decoder.keys_values(i, entry, context)
            except (RuntimeError, AttributeError, TypeError):
                continue
            if _alike(own, cached):
                alone.add(i)
        found, expected = self.decoder.head(self.decoder.normed(h))[:, -1], logits(self.model(ids))[:, -1]
        if not _alike([found], [expected]):
            raise ValueError(f"model: {type(self.model).__name__} decoded token by token does not give its own logits")
        return frozenset(alone)


class _Decoding:
    """One batch being decoded: its cache, its padding, and what was executed. The state belongs to the one call."""

    def __init__(
        self,
        net: StopExit,
        rows: int,
        mask: Tensor | None,
        length: int,
        policy: Policy | None,
        layers: int | None = None,
    ) -> None:
        self.net, self.policy = net, policy
        self.layers = net.layers if layers is None else layers
        self.store = Store(self.layers, rows, length)
        self.valid = None if mask is None else F.pad(mask, (0, length - mask.shape[1]), value=True)
        self.cost = Cost()

    def read(self, h: Tensor) -> Tensor:
        self.cost.heads += len(h)
        return self.net.read(self.layers - 1, h)

    def prompt(self, ids: Tensor) -> Tensor:
        """All blocks on ids (B, q); the last hidden states (B, q, d)."""
        net, q = self.net, ids.shape[1]
        mask = None if self.valid is None else self.valid[:, :q]
        positions = _positions(ids, mask)
        h, context = net.decoder.embed(ids, positions)
        allowed = net._causal(ids, mask)
        for i in range(self.layers):
            h = net.decoder.block(i, h, allowed, context, self.store)
        self.cost.prompt += len(ids) * self.layers
        self.store.column = q
        self.positions = positions[:, -1:] + 1  # (B, 1), of the next token
        return h

    def step(self, token: Tensor, forced: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """One token (n,) more for every row: next logits (n, V), blocks run (n,), whether it was a stop (n,).

        Rows that stop are not filled, since they leave for good; with ``forced`` they are, since the text goes on.
        """
        net, store, last = self.net, self.store, self.layers - 1
        n = len(token)
        h, context = net.decoder.embed(token[:, None], self.positions)
        whole = context
        mask = None if self.valid is None else self.valid[:, None, None, : store.column + 1]
        here = torch.arange(n, device=token.device)
        depth = torch.full_like(here, self.layers)
        stopped = torch.zeros_like(here, dtype=torch.bool)
        answers: list[tuple[Tensor, Tensor]] = []  # places, logits
        left: list[tuple[int, Tensor, Tensor]] = []  # block, places, states of the rows that need a fill
        asked = self.policy.layers if self.policy is not None else ()
        for i in range(self.layers):
            store.rows = None if len(here) == n else here
            h = net.decoder.block(i, h, mask, context, store)
            self.cost.blocks += len(here)
            if i not in asked:
                continue
            assert self.policy is not None
            action, ready = self.policy(i, h[:, -1])
            self.cost.decisions += len(here)
            self.cost.heads += 0 if ready is None else len(here)
            said = action.tolist()  # the one wait for the device
            if STOP not in said and EXIT not in said:
                continue
            gone = (action != CONTINUE).nonzero().squeeze(1)
            depth[here[gone]] = i + 1
            halt = action[gone] == STOP
            stopped[here[gone[halt]]] = True
            out = gone[~halt]
            if len(out):
                if ready is None:
                    self.cost.heads += len(out)
                answers.append((here[out], net.read(i, h[out, -1]) if ready is None else ready[out]))
            fill = gone if forced else out
            if len(fill) and i < last:
                left.append((i, here[fill], h[fill]))
            keep = (action == CONTINUE).nonzero().squeeze(1)
            here, h, context = here[keep], h[keep], take(context, keep)
            mask = None if mask is None else mask[keep]
            if not len(here):
                break
        if len(here):
            answers.append((here, self.read(h[:, -1])))
        self._fill(left, whole, n)
        store.column += 1
        self.positions = self.positions + 1
        if len(answers) == 1 and len(answers[0][0]) == n:
            return answers[0][1], depth, stopped
        z = h.new_zeros(n, net.vocabulary)
        for places, part in answers:
            z[places] = part
        return z, depth, stopped

    def _fill(self, left: list[tuple[int, Tensor, Tensor]], context: Context, n: int) -> None:
        """Keys and values of the skipped blocks, for all rows that skip it at once."""
        for j in range(left[0][0] + 1 if left else self.layers, self.layers):
            skipping = [(places, h) for i, places, h in left if i < j]
            places = torch.cat([p for p, _ in skipping])
            h = torch.cat([h for _, h in skipping])
            self.store.rows = None if len(skipping) == 1 and len(places) == n else places
            small = context if self.store.rows is None else take(context, places)
            self.store.write(*self.net._fill(j, h, small), j)
            self.cost.fills += len(places)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, for good."""
        self.store.keep(rows)
        self.positions = self.positions[rows]
        self.valid = None if self.valid is None else self.valid[rows]

    def cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        pairs = zip(self.store.keys, self.store.values, strict=True)
        end = self.store.column
        return tuple((k[:, :, :end], v[:, :, :end]) for k, v in pairs if k is not None and v is not None)


# -- small things -----------------------------------------------------------------------------------------------------


def _taken_apart(parts: Callable[[nn.Module], Parts], model: nn.Module) -> Parts:
    """What the argument ``parts`` makes of the model."""
    try:
        found = parts(model)
    except TypeError as error:
        raise TypeError(f"parts: it does not take the model: {first_line(error)}") from error
    made: Parts = check.instance("parts", found, Parts)
    return made


def _alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors are equal to rounding."""
    return len(found) == len(expected) and all(
        a.shape == b.shape
        and torch.allclose(
            a, b, rtol=(scale := 1e-2 if a.element_size() < 4 else 1e-4), atol=scale * float(b.abs().max())
        )
        for a, b in zip(found, expected, strict=True)
    )


def _positions(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Positions (B, T) that begin after the padding."""
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return (mask.cumsum(1) - 1).clamp_min(0)


def _places(heads: str | int | Sequence[int], layers: int) -> tuple[int, ...]:
    """Numbers of the blocks with a head."""
    if isinstance(heads, str):
        check.choice("heads", heads, ("all",))
        return tuple(range(layers - 1))
    if isinstance(heads, int):
        return tuple(range(0, layers - 1, check.whole("heads", heads, at_least=1)))
    found: tuple[int, ...] = check.sequence("heads", heads, check.whole)
    if list(found) != sorted(set(found)) or found[0] < 0 or found[-1] > layers - 2:
        raise check.wrong("heads", heads, f"different blocks in order, out of 0..{layers - 2}")
    return found


def _threshold(name: str, value: Any) -> float:
    """A threshold: 0 or more, infinite ones too, since above 1 it switches its action off."""
    return math.inf if isinstance(value, float) and value == math.inf else check.number(name, value, at_least=0)


def _thresholds(name: str, value: Any) -> float | tuple[float, ...]:
    """tau_exit, or a pair (tau_exit, tau_stop)."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return check.sequence(name, value, _threshold, length=2)
    return _threshold(name, value)


def _pair(threshold: float | tuple[float, ...]) -> tuple[float, float]:
    """(tau_exit, tau_stop); the latter off where there is none."""
    return (threshold, math.inf) if isinstance(threshold, float) else (threshold[0], threshold[1])


def _point(exit_threshold: float, stop_threshold: float) -> Point:
    if stop_threshold == math.inf:
        return Point(exit_threshold=exit_threshold)
    if exit_threshold == math.inf:
        return Point(stop_threshold=stop_threshold)
    return Point(exit_threshold=exit_threshold, stop_threshold=stop_threshold)


def _taus(point: Mapping[str, Value]) -> tuple[float, float]:
    return float(point.get("exit_threshold", math.inf)), float(point.get("stop_threshold", math.inf))
