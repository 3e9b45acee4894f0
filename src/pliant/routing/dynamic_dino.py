"""Dynamic-DINO: fine-grained mixture of experts tuning of a trained detector. ICCV 2025, arXiv 2507.17436.

Every feed-forward network of a trained decoder becomes N copies of itself, each cut into k slices; the slices are the
experts, and k of the k N are active for a token, as many as make one network of the old width. The router starts so
that the k slices of one copy are always chosen together: before the first step the network computes what it did.

Shapes: d the width, H the inner width, h = H / k that of a slice, E = k N experts; FFN(x) = W2 act(W1 x + b1) + b2.

Weight allocation, expert e = n k + j for copy n and slice j::

    W1^e = W1[j h : (j + 1) h, :]    b1^e = b1[j h : (j + 1) h]    W2^e = W2[:, j h : (j + 1) h]    b2^e = b2 / k
    so that  sum_j E_{n, j}(x) = FFN(x)  for every copy n and elementwise act; of gated networks gate and up alike

Router, in float32 whatever the network is in, without bias::

    R(x) = softmax(C x)    C (E, d): N centroids ~ N(0, 0.02^2), each row repeated k times in a row
    S(x) = the k largest of R(x), equals by index
    out  = sum over e in S of g_e E_e(x)

    r_e = k R_e / sum_{S} R     1 for all of them while the logits of a copy are equal
    gate="hard": g = 1          the router learns from the balance loss alone
    gate="ste":  g = 1 in the forward, the gradient of r in the backward
    gate="scaled": g = r

    loss = the network's own + alpha sum over layers of  E sum_e f_e P_e      (core.experts.balance_loss)

MoE-Tuning trains the experts and routers, and besides them only what ``train`` names: in Grounding DINO the fusion
layers' cross-attention and the detection heads (``GROUNDING_DINO``).

Where the specification is silent or wrong:

- No code of the paper is public. What is taken from third-party readings of it, and what is chosen here (0.02, the
  gates' gradient, the form of the balance loss), the specification tells apart.
- The paper's gates are 0 or 1, which gives the router no gradient of the detection loss; "ste" is the default.
- b2 / k adds up to b2 without rounding only where k is a power of two.
- A dropout between the two layers becomes one of every slice: drawn for each token and hidden unit, as before.
- Weight decay and momentum act on N copies instead of one network; with the same gradients they stay equal, and copies
  differ only through the tokens that they are given.
- The dial offers the copies too, ``Point(copy=n)``: the dense network with copy n for all tokens. Right after the
  conversion each of them is the network that came in, bit for bit where k is a power of two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import check
from pliant.core.dynamic import Dynamic, NotStaticError, Point, Value
from pliant.core.experts import Backend, Experts, balance_loss, top_k
from pliant.core.inputs import (
    Batch,
    Input,
    call,
    check_example,
    device_of,
    evaluating,
    inputs_of,
    packed,
    split_batch,
    to_device,
)
from pliant.core.objective import Criterion, loss

Gate = Literal["ste", "hard", "scaled"]
RouterStart = Literal["replicated", "random"]
ExpertStart = Literal["allocated", "random"]
_MOST = 1024  # copies
GROUNDING_DINO = ("*fusion_layer*", "*bbox_embed*", "*class_embed*")  # what MoE-Tuning trains besides the experts


# -- finding feed-forward networks ----------------------------------------------------------------------------------

_PAIRS = (("fc1", "fc2"), ("linear1", "linear2"), ("lin1", "lin2"), ("wi", "wo"), ("c_fc", "c_proj"), ("w1", "w2"))
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_ACTIVATIONS = ("activation_fn", "act_fn", "activation", "act", "intermediate_act_fn")
_DROPOUTS = ("activation_dropout", "dropout")


@dataclass(frozen=True)
class Site:
    """One feed-forward network: the module that owns its layers, and their names there.

    ``gate`` is None for two-layer networks. ``inline``: the owner does more than this network (a decoder layer that
    calls fc1 and fc2 itself), so its layers are exchanged one by one and not the owner.
    """

    owner: str
    up: str
    down: str
    gate: str | None
    activation: str | None
    dropout: str | None
    inline: bool

    @property
    def name(self) -> str:
        """Where the experts stand in the converted model."""
        return f"{self.owner}.{self.up}" if self.inline else self.owner


def find_sites(model: nn.Module, targets: Sequence[str] = ("*",)) -> list[Site]:
    """The feed-forward networks inside the modules whose name matches ``targets`` (fnmatch), in the model's order.

    Found are two linear layers (fc1, fc2; linear1, linear2; ...) with an activation between them, gated networks of
    three (gate_proj, up_proj, down_proj), and ``nn.Sequential(Linear, activation, [Dropout,] Linear)``.
    """
    found = []
    for name, module in model.named_modules():
        if not name or not any(fnmatchcase(name, p) for p in targets):
            continue
        site = _sequential(name, module) or _gated(name, module) or _pair(name, module)
        if site is not None:
            found.append(site)
    return found


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    child = module._modules.get(name)
    return child if type(child) is nn.Linear else None


def _pair(name: str, module: nn.Module) -> Site | None:
    for first, second in _PAIRS:
        up, down = _linear(module, first), _linear(module, second)
        if up is None or down is None or up.out_features != down.in_features or up.in_features != down.out_features:
            continue
        act = next((a for a in _ACTIVATIONS if callable(getattr(module, a, None))), None)
        if act is None:
            continue
        drop = next((d for d in _DROPOUTS if isinstance(getattr(module, d, None), float | nn.Dropout)), None)
        if drop == "dropout" and not isinstance(module.dropout, nn.Dropout):
            drop = None  # a rate of that name belongs to the residual
        return Site(name, first, second, None, act, drop, inline=True)
    return None


def _gated(name: str, module: nn.Module) -> Site | None:
    for gate, up, down in _GATED:
        layers = [_linear(module, n) for n in (gate, up, down)]
        if any(layer is None for layer in layers):
            continue
        act = next((a for a in _ACTIVATIONS if callable(getattr(module, a, None))), None)
        others = {n for n in module._modules if n not in (gate, up, down, act)}
        if act is not None and not others:
            return Site(name, up, down, gate, act, None, inline=False)
    return None


def _sequential(name: str, module: nn.Module) -> Site | None:
    if type(module) is not nn.Sequential:
        return None
    children = list(module.named_children())
    linears = [n for n, m in children if type(m) is nn.Linear]
    drops = [n for n, m in children if isinstance(m, nn.Dropout)]
    others = [n for n, _ in children if n not in linears and n not in drops]
    if len(linears) != 2 or len(others) != 1 or len(drops) > 1:
        return None
    order = [n for n, _ in children]
    if order.index(linears[0]) != 0 or order.index(linears[1]) != len(order) - 1:
        return None
    if drops and order.index(drops[0]) != 2:
        return None
    first, second = (cast(nn.Linear, module._modules[n]) for n in linears)
    if first.out_features != second.in_features or first.in_features != second.out_features:
        return None
    return Site(name, linears[0], linears[1], None, others[0], drops[0] if drops else None, inline=False)


# -- one mixture ----------------------------------------------------------------------------------------------------


class MoEFFN(nn.Module):
    """The experts and the router in place of one feed-forward network: (..., d) -> (..., d)."""

    def __init__(
        self,
        up: nn.Linear,
        down: nn.Linear,
        gate_layer: nn.Linear | None,
        activation: Callable[[Tensor], Tensor],
        *,
        split: int,
        copies: int,
        gate: Gate,
        dropout: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.split, self.copies, self.gate = split, copies, gate
        biased = up.bias is not None or down.bias is not None
        self.experts = Experts(
            up.in_features,
            up.out_features // split,
            split * copies,
            activation=activation,
            gated=gate_layer is not None,
            bias=biased,
            dropout=dropout,
            backend=backend,
        ).to(up.weight)
        self.router = nn.Parameter(torch.zeros(split * copies, up.in_features, device=up.weight.device))
        self.copy: int | None = None  # all tokens to this copy, the router aside
        self.routed: tuple[Tensor, Tensor] | None = None  # R (T, E) and S (T, k) of the last forward
        with torch.no_grad():
            self.allocate(up, down, gate_layer)

    def allocate(self, up: nn.Linear, down: nn.Linear, gate_layer: nn.Linear | None) -> None:
        """Weights of the network that was there, slice by slice, for every copy."""
        bank, k, n = self.experts, self.split, self.copies
        bank.up.copy_(up.weight.view(k, -1, bank.features).repeat(n, 1, 1))
        bank.down.copy_(down.weight.view(bank.features, k, -1).transpose(0, 1).repeat(n, 1, 1))
        if bank.gate is not None and gate_layer is not None:
            bank.gate.copy_(gate_layer.weight.view(k, -1, bank.features).repeat(n, 1, 1))
        for target, layer in ((bank.up_bias, up), (bank.gate_bias, gate_layer)):
            if target is not None:
                bias = None if layer is None else layer.bias
                target.copy_(torch.zeros_like(target) if bias is None else bias.view(k, -1).repeat(n, 1))
        if bank.down_bias is not None:
            bank.down_bias.copy_((down.bias / k).expand(k * n, -1) if down.bias is not None else 0 * bank.down_bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Moves as every module does, but the router stays in float32: in bfloat16 the logits of copies would tie."""
        before = self.router.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.router.dtype is not before.dtype:
            self.router.data = before.to(self.router.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        if self.copy is not None:
            return self._dense(x, self.copy)
        tokens = x.reshape(-1, x.shape[-1])
        probability = F.linear(tokens.float(), self.router.float()).softmax(-1)  # R (T, E)
        chosen = top_k(probability.detach(), self.split)  # S (T, k)
        gates = self._gates(probability.gather(1, chosen))
        self.routed = (probability, chosen)
        return self.experts(tokens, chosen, gates).view(x.shape)  # type: ignore[no-any-return]

    def _gates(self, picked: Tensor) -> Tensor:
        """The gates g (T, k), from the chosen experts' probabilities."""
        if self.gate == "hard":
            return torch.ones_like(picked)
        r = self.split * picked / picked.sum(-1, keepdim=True)
        return r if self.gate == "scaled" else 1.0 + (r - r.detach())

    def merged(self, number: int) -> tuple[nn.Linear, nn.Linear, nn.Linear | None]:
        """The two (three) layers of copy ``number``, as they were before the cut: up, down, gate."""
        bank, k = self.experts, self.split
        own = slice(number * k, (number + 1) * k)

        def layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
            with torch.no_grad():
                made.weight.copy_(weight)
                if bias is not None:
                    made.bias.copy_(bias)
            return made

        with torch.no_grad():
            up = layer(bank.up[own].flatten(0, 1), None if bank.up_bias is None else bank.up_bias[own].flatten())
            down_weight = bank.down[own].transpose(0, 1).flatten(1)
            down = layer(down_weight, None if bank.down_bias is None else bank.down_bias[own].sum(0))
            gate = None
            if bank.gate is not None:
                bias = None if bank.gate_bias is None else bank.gate_bias[own].flatten()
                gate = layer(bank.gate[own].flatten(0, 1), bias)
        return up, down, gate

    def _dense(self, x: Tensor, number: int) -> Tensor:
        """Copy ``number`` for every token, as the dense network that it makes."""
        bank, k = self.experts, self.split
        own = slice(number * k, (number + 1) * k)
        up = F.linear(x, bank.up[own].flatten(0, 1), None if bank.up_bias is None else bank.up_bias[own].flatten())
        gate = None
        if bank.gate is not None:
            bias = None if bank.gate_bias is None else bank.gate_bias[own].flatten()
            gate = F.linear(x, bank.gate[own].flatten(0, 1), bias)
        down_bias = None if bank.down_bias is None else bank.down_bias[own].sum(0)
        return F.linear(bank._inner(up, gate), bank.down[own].transpose(0, 1).flatten(1), down_bias)

    def aux_loss(self) -> Tensor:
        """E sum_e f_e P_e of the last forward."""
        if self.routed is None:
            return self.router.new_zeros(())
        return balance_loss(*self.routed)

    def __getstate__(self) -> dict[str, Any]:
        """The state without what the last forward left, for ``copy.deepcopy`` and pickle."""
        return self.__dict__ | {"routed": None}

    def extra_repr(self) -> str:
        """The sizes."""
        return f"split={self.split}, copies={self.copies}, gate={self.gate!r}"


@dataclass(frozen=True)
class RoutingStats:
    """One mixture on a data set of T tokens.

    ``load`` (E,): choices of each expert; ``entropy`` of the load, as a share of that of a uniform one;
    ``together`` (E, E): how often two experts were chosen for one token, the loads on its diagonal; ``partners``: the
    share of tokens whose k experts are the slices of one copy.
    """

    load: Tensor
    entropy: float
    together: Tensor
    partners: float


# -- the method -----------------------------------------------------------------------------------------------------


class DynamicDINO(Dynamic):
    """A trained network whose feed-forward networks became mixtures of their own slices.

    The dial: ``Point(top_k=k)``, the mixture, and ``Point(copy=n)``, the dense network with copy n for all tokens, for
    every n (see ``extract``).

    Args:
        model: the trained network: a detector of transformers, or any other; it is converted in place.
        example: an input for it.
        targets: names (fnmatch patterns) of the modules whose feed-forward networks are converted, such as
            ``("model.decoder.layers.*",)``.
        split: k, slices of each copy, and experts active for a token.
        copies: N.
        gate: "ste", "hard" or "scaled".
        router_std: spread of the centroids.
        aux_weight: alpha of the balance loss.
        train: names (patterns) of modules that learn besides the mixtures; None: everything does.
        router_start: "replicated" rows, or "random" ones, which break the equality at the start (a control).
        expert_start: "allocated" weights, or "random" ones (a control).
        backend: how experts run, see ``core.experts``; "auto" until ``tune`` is the loop.
        criterion: ``criterion(output, target)`` for batches (input, target); cross entropy where it is None. A mapping
            with "labels" is given to the model, and its own loss taken.
        seed: of the centroids.

    Raises:
        ValueError: an argument is outside what is allowed, nothing to convert is found, a width is not divisible by
            ``split``, an activation is not elementwise, or the model was converted already.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Input,
        *,
        targets: Sequence[str] = ("*",),
        split: int = 2,
        copies: int = 8,
        gate: Gate = "ste",
        router_std: float = 0.02,
        aux_weight: float = 0.01,
        train: Sequence[str] | None = None,
        router_start: RouterStart = "replicated",
        expert_start: ExpertStart = "allocated",
        backend: Backend = "auto",
        criterion: Criterion | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check.module("model", model)
        self.targets = check.names("targets", targets, empty=False)
        self.split = check.whole("split", split, at_least=1)
        self.copies = check.whole("copies", copies, at_least=1, at_most=_MOST)
        self.gate: Gate = check.choice("gate", gate, Gate)
        self.router_std = check.number("router_std", router_std, at_least=0)
        self.aux_weight = check.number("aux_weight", aux_weight, at_least=0)
        self.train_names = check.optional(check.names, "train", train)
        self.router_start: RouterStart = check.choice("router_start", router_start, RouterStart)
        self.expert_start: ExpertStart = check.choice("expert_start", expert_start, ExpertStart)
        self.backend: Backend = check.choice("backend", backend, Backend)
        self.criterion = check.optional(check.function, "criterion", criterion)
        self.seed = check.seed("seed", seed)
        check_example(model, example)
        if any(isinstance(m, MoEFFN) for m in model.modules()):
            raise ValueError("model: it was converted already; convert the dense one")
        names = [n for n, _ in model.named_modules()]
        for pattern in self.train_names or ():
            if not any(fnmatchcase(n, pattern) for n in names):
                raise ValueError(f"train: no module of the model is named {pattern!r}")
        self.example, self.model = example, model
        self.sites = find_sites(model, self.targets)
        if not self.sites:
            linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
            raise ValueError(
                f"targets: {list(self.targets)} holds no feed-forward network (fc1/fc2, linear1/linear2, "
                f"gate_proj/up_proj/down_proj, or a Sequential of two Linear); linear layers: {', '.join(linears[:12])}"
            )
        self._replaced: list[dict[str, Any]] = []  # what stood where, for ``extract``
        self._convert()
        self._freeze()
        self.point = Point(top_k=split)

    # -- conversion ---------------------------------------------------------------------------------------------

    def _convert(self) -> None:
        made = []
        for site in self.sites:  # everything is looked at before anything is changed
            owner = self.model.get_submodule(site.owner)
            up, down = (cast(nn.Linear, owner._modules[n]) for n in (site.up, site.down))
            gate = None if site.gate is None else cast(nn.Linear, owner._modules[site.gate])
            activation = cast(Callable[[Tensor], Tensor], getattr(owner, cast(str, site.activation)))
            if up.out_features % self.split:
                raise ValueError(f"split: {self.split} does not divide {site.name!r}, {up.out_features} units wide")
            _check_elementwise(site, activation)
            drop = None if site.dropout is None else getattr(owner, site.dropout)
            rate = drop.p if isinstance(drop, nn.Dropout) else float(drop or 0.0)
            made.append(
                MoEFFN(
                    up, down, gate, activation, split=self.split, copies=self.copies, gate=self.gate, dropout=rate,
                    backend=self.backend,
                )
            )  # fmt: skip
        generator = torch.Generator().manual_seed(self.seed)
        for site, moe in zip(self.sites, made, strict=True):
            self._start(moe, generator)
            owner = self.model.get_submodule(site.owner)
            for name in (site.up, site.down, site.gate):
                if name is not None:
                    owner._modules[name] = cast(nn.Module, owner._modules[name]).to("meta")  # the experts hold it now
            if not site.inline:
                parent, _, leaf = site.owner.rpartition(".")
                self._replaced.append({"": owner})
                setattr(self.model.get_submodule(parent), leaf, moe)
                continue
            kept: dict[str, Any] = {}
            for attribute, value in (
                (site.up, moe),
                (site.down, nn.Identity()),
                (cast(str, site.activation), nn.Identity()),
                *(((site.dropout, _no_dropout(getattr(owner, site.dropout))),) if site.dropout else ()),
                # The fused path of nn.TransformerEncoderLayer would look for the weights of linear1.
                *((("activation_relu_or_gelu", 0),) if hasattr(owner, "activation_relu_or_gelu") else ()),
            ):
                kept[attribute] = getattr(owner, attribute)
                _set(owner, attribute, value)
            self._replaced.append(kept)

    def _start(self, moe: MoEFFN, generator: torch.Generator) -> None:
        rows = self.copies if self.router_start == "replicated" else self.copies * self.split
        centroids = self.router_std * torch.randn(rows, moe.experts.features, generator=generator)
        if self.router_start == "replicated":
            centroids = centroids.repeat_interleave(self.split, 0)
        with torch.no_grad():
            moe.router.copy_(centroids)
            if self.expert_start == "random":
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
                    moe.experts.reset_parameters()

    def _freeze(self) -> None:
        if self.train_names is None:
            return
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        chosen = [m for n, m in self.model.named_modules() if any(fnmatchcase(n, p) for p in self.train_names)]
        for module in [*chosen, *self.mixtures()]:
            module.requires_grad_(True)

    def mixtures(self) -> list[MoEFFN]:
        """The mixtures, in the order of the model."""
        return [cast(MoEFFN, self.model.get_submodule(site.name)) for site in self.sites]

    # -- the contract -------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """The copies, and the mixture."""
        return [*(Point(copy=n) for n in range(self.copies)), Point(top_k=self.split)]

    def use(self, point: Mapping[str, Value]) -> Self:
        """Turn the dial."""
        super().use(point)
        for moe in self.mixtures():
            moe.copy = int(cast(int, self.point["copy"])) if "copy" in self.point else None
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output at the setting in use."""
        return call(self.model, packed(args, kwargs))

    def loss(self, batch: Batch) -> Tensor:
        """The model's own loss (a mapping with "labels") or the criterion, and alpha times the balance losses."""
        if isinstance(batch, Mapping) and "labels" in batch and self.criterion is None:
            output = self.model(**batch)
            own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            value = own if isinstance(own, Tensor) else loss(output, batch["labels"])
        else:
            x, y = split_batch(batch)
            value = loss(call(self.model, x), y, self.criterion)
        return value + self.aux_weight * self.aux_loss() if self.training and "copy" not in self.point else value

    def aux_loss(self) -> Tensor:
        """The balance losses of the last forward, summed over the layers."""
        return torch.stack([moe.aux_loss() for moe in self.mixtures()]).sum()

    def extract(self, point: Mapping[str, Value]) -> nn.Module:
        """The dense network of a copy: the model's own class with its layers back in place.

        Raises:
            NotStaticError: at ``Point(top_k=k)``, where each token has experts of its own.
        """
        known = self._known(point)
        if "copy" not in known:
            raise NotStaticError(known, "the router chooses experts token by token; a single copy is static")
        number = int(cast(int, known["copy"]))
        plain = copy.deepcopy(self.model).eval()
        memo = copy.deepcopy(self._replaced)
        for site, kept in zip(self.sites, memo, strict=True):
            moe = cast(MoEFFN, plain.get_submodule(site.name))
            up, down, gate = moe.merged(number)
            owner = plain.get_submodule(site.owner) if site.inline else cast(nn.Module, kept[""])
            for attribute, value in kept.items():
                if attribute:
                    _set(owner, attribute, value)
            for name, layer in ((site.up, up), (site.down, down), (site.gate, gate)):
                if name is not None and layer is not None:
                    before = cast(nn.Linear, owner._modules[name])
                    if before.bias is None:  # the experts all have biases where one of the layers had one
                        layer.bias = None
                    owner._modules[name] = layer
            if not site.inline:
                parent, _, leaf = site.owner.rpartition(".")
                setattr(plain.get_submodule(parent), leaf, owner)
        return plain.eval()

    # -- what happens inside ------------------------------------------------------------------------------------

    @torch.no_grad()
    def stats(self, data: Any) -> dict[str, RoutingStats]:
        """Loads and co-selection of every mixture over ``data``: one input, or an iterable of inputs or batches.

        Raises:
            ValueError: there is no data.
        """
        experts = self.split * self.copies
        together = [torch.zeros(experts, experts, dtype=torch.float64) for _ in self.sites]
        partners, tokens = [0] * len(self.sites), [0] * len(self.sites)
        before = self.point
        given = [data] if isinstance(data, Mapping) and "labels" not in data else inputs_of(data)
        try:
            self.use(Point(top_k=self.split))
            with evaluating(self):
                for x in given:
                    call(self.model, to_device(x, device_of(self.model)))
                    for i, moe in enumerate(self.mixtures()):
                        _, chosen = cast(tuple[Tensor, Tensor], moe.routed)
                        picked = F.one_hot(chosen, experts).sum(1).double().cpu()  # (T, E) of 0 and 1
                        together[i] += picked.t() @ picked
                        own = chosen // self.split
                        partners[i] += int((own == own[:, :1]).all(1).sum())
                        tokens[i] += len(chosen)
        finally:
            self.use(before)
        if not tokens[0]:
            raise ValueError("data: it holds no inputs")
        found = {}
        for site, matrix, pairs, count in zip(self.sites, together, partners, tokens, strict=True):
            load = matrix.diagonal().clone()
            share = load / load.sum()
            entropy = -float(torch.special.xlogy(share, share).sum()) / math.log(experts) if experts > 1 else 1.0
            found[site.name] = RoutingStats(load, entropy, matrix, pairs / count)
        return found

    def tune(self, tokens: int, repeats: int = 7) -> dict[str, dict[str, float]]:
        """Time the ways to run experts on so many tokens and keep the fastest of each; see ``Experts.tune``."""
        return {
            s.name: m.experts.tune(tokens, self.split, repeats)
            for s, m in zip(self.sites, self.mixtures(), strict=True)
        }

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().arguments() | {"train": None if self.train_names is None else list(self.train_names)}

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"mixtures={len(self.sites)}, split={self.split}, copies={self.copies}, gate={self.gate!r}, at={self.point}"
        )


def _check_elementwise(site: Site, activation: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-2, 2, 12)
    try:
        whole, parts = activation(x), torch.cat([activation(x[:5]), activation(x[5:])])
        fits = whole.shape == x.shape and torch.equal(whole, parts)
    except (RuntimeError, ValueError, TypeError):
        fits = False
    if not fits:
        raise ValueError(
            f"model: the activation {site.activation!r} of {site.name!r} is not elementwise, so it cannot be cut"
        )


def _no_dropout(value: Any) -> Any:
    return nn.Identity() if isinstance(value, nn.Module) else 0.0


def _set(owner: nn.Module, attribute: str, value: Any) -> None:
    """Set an attribute that may change from a function to a module or back."""
    if attribute in owner._modules:
        if isinstance(value, nn.Module):
            owner._modules[attribute] = value
            return
        del owner._modules[attribute]
    owner.__dict__.pop(attribute, None)
    setattr(owner, attribute, value)
