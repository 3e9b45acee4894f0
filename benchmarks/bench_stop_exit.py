"""Does leaving blocks out become time? Stop & Exit against the whole model in the same decoding loop.

Two random GPT-2s; prompts of 32 tokens, 12 new ones; batches of 1 and 16. Every token but the first leaves after a
given block, or each row after a block drawn at random ("mixed", which shows compaction). Beside it: what the fill of
keys and values costs (K/V alone, the fused projection, and none at all, which would be wrong), what the controller
costs that never fires, and what a confidence threshold costs that never fires. Ratios of time and of FLOPs by dispatch,
of whole completions, prompt included. Written to ``benchmarks/results/stop_exit.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from pliant.core.cost import time_ratio
from pliant.core.dynamic import Point
from pliant.routing.stop_exit import CONTINUE, EXIT, Confidence, FixedExit, StopExit
from tables import write

NETWORKS = {"small (width 128, 2,048 tokens)": (128, 2048), "wide (width 512, 8,192 tokens)": (512, 8192)}
LAYERS, PROMPT, NEW = 8, 32, 12
BATCHES = (1, 16)
REPEATS = 9


class Mixed:
    """Each row leaves after a block drawn uniformly: mean depth about (M + 1) / 2."""

    def __init__(self, net: StopExit, seed: int) -> None:
        self.layers = net.heads
        self.left, self.rng = net.layers, torch.Generator().manual_seed(seed)

    def __call__(self, layer: int, h: Tensor) -> tuple[Tensor, None]:
        """Exit with a chance of one in the number of blocks left."""
        go = torch.rand(len(h), generator=self.rng) < 1 / (self.left - layer)
        return torch.where(go, EXIT, CONTINUE), None


class Unfilled(StopExit):
    """Leaves holes in the cache, to see what filling them costs."""

    def _fill(self, layer: int, h: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        hole = h.new_zeros(len(h), 4, 1, self.width // 4)
        return hole, hole


def _model(width: int, vocabulary: int) -> Any:
    sizes = {"n_embd": width, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": vocabulary}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def _arms(model: Any) -> dict[str, tuple[StopExit, Callable[[StopExit], dict[str, Any]]]]:
    net, fused, holes = StopExit(model), StopExit(model, fill="qkv"), Unfilled(model)
    with torch.no_grad():
        net.controller.weight.zero_()
    arms: dict[str, tuple[StopExit, Callable[[StopExit], dict[str, Any]]]] = {}
    for k in (1, 3, 5):
        share = f"{k + 1} of {LAYERS} blocks"
        for name, one in (("K/V fill", net), ("fused fill", fused), ("no fill (wrong)", holes)):
            arms[f"exit, {share}, {name}"] = one, lambda n, k=k: {"policy": FixedExit(n, k)}
        arms[f"truncated, {share}"] = net, lambda n, k=k: {"point": Point(exit=k)}
    arms["mixed depths, K/V fill"] = net, lambda n: {"policy": Mixed(n, 0)}
    arms["controller that never fires"] = net, lambda n: {"exit_threshold": 2.0}
    arms["margin that never fires"] = net, lambda n: {"policy": Confidence(n, 2.0)}
    return arms


def _complete(net: StopExit, x: Tensor, options: Callable[[StopExit], dict[str, Any]], count: bool = False) -> Any:
    given = options(net)
    net.use(given.pop("point", Point(exit=LAYERS - 1)))
    return net.generate(x, max_new_tokens=NEW, eos_token_id=[], count=count, **given)


def main() -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    rows = []
    for name, (width, vocabulary) in NETWORKS.items():
        model = _model(width, vocabulary)
        plain = StopExit(model)
        for batch in BATCHES:
            x = torch.randint(0, vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
            whole = partial(_complete, plain, x, lambda n: {})
            flops = _complete(plain, x, lambda n: {}, True).cost.flops
            for arm, (net, options) in _arms(model).items():
                found = _complete(net, x, options, True)
                ratio = time_ratio(partial(_complete, net, x, options), whole, repeats=REPEATS)
                row = {"network": name, "batch": batch, "arm": arm, "depth": round(found.depth, 2)}
                row |= {"flops": round(found.cost.flops / flops, 3), "time": round(ratio.median, 3)}
                row |= {"quartiles": [round(ratio.low, 3), round(ratio.high, 3)]}
                rows.append(row | {"tokens_a_second": round(batch * NEW / ratio.seconds)})
                print(rows[-1], flush=True)
            own = time_ratio(
                whole,
                lambda x=x, model=model: model.generate(
                    x,
                    attention_mask=torch.ones_like(x),
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=False,
                    pad_token_id=0,
                ),
                repeats=REPEATS,
            )
            rows.append({"network": name, "batch": batch, "arm": "whole model, our loop / generate of transformers"})
            rows[-1] |= {"time": round(own.median, 3), "quartiles": [round(own.low, 3), round(own.high, 3)]}
            print(rows[-1], flush=True)
    write(
        "stop_exit",
        "time and FLOPs of completing 12 tokens after a prompt of 32, as a share of the whole model's in the same loop "
        "(one thread, random GPT-2s of 8 blocks); the prompt pass, at full depth, is in both",
        rows=rows,
        in_words=_summary(rows),
    )


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    """Whether the saving becomes time, and what the parts cost, in words."""
    found = []
    for network in NETWORKS:
        for batch in BATCHES:
            at = {r["arm"]: r for r in rows if (r["network"], r["batch"]) == (network, batch)}
            parts = [
                f"{arm}: FLOPs {r['flops']}, time {r['time']}" for arm, r in at.items() if arm.endswith("K/V fill")
            ]
            share = "exit, 4 of 8 blocks"
            fill = at[f"{share}, K/V fill"]["time"] - at[f"{share}, no fill (wrong)"]["time"]
            fused = at[f"{share}, fused fill"]["time"] - at[f"{share}, no fill (wrong)"]["time"]
            saved = [r for arm, r in at.items() if arm.endswith("K/V fill") and r["quartiles"][1] < 0.97]
            word = "saves time" if len(saved) == len(parts) else "saves time at some depths" if saved else "saves none"
            found.append(
                f"{network}, batch {batch}: {word}. {'; '.join(parts)}. Of the whole model's time the fill of 4 blocks "
                f"takes {fill:+.3f} (fused {fused:+.3f}), a controller at every block "
                f"{at['controller that never fires']['time'] - 1:+.3f}, a margin at every block "
                f"{at['margin that never fires']['time'] - 1:+.3f}"
            )
    return found


if __name__ == "__main__":
    main()
