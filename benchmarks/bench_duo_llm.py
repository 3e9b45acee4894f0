"""Does a small FFN for some tokens become time? Duo-LLM's settings against its all-big network, beside the FLOPs.

Llamas of three widths with random weights, routers calibrated to their budgets on random tokens; a prefill (many tokens
at once), a step of batched decoding (one token for each of 64 sequences) and one token alone. Attention, norms and the
head are in the time, as are routers, gathering and putting back. Ratios of time, timed in turn in one run. Written to
``benchmarks/results/duo_llm.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pliant.core.cost import Ratio, count_flops, time_ratio
from pliant.routing.duo_llm import DuoLLM
from pliant.tasks import language
from tables import write

WIDTHS = {"48 x 6": (48, 6), "192 x 4": (192, 4), "512 x 2": (512, 2)}
INPUTS = {"prefill 8 x 128": (8, 128), "decode 64 x 1": (64, 1), "decode 1 x 1": (1, 1)}
BUDGETS = (0.25, 0.5, 0.75)
REPEATS, TOKENS, PASSES = 15, 640, 20  # in one timing: that many tokens, if that many passes are enough


def _rounded(ratio: Ratio) -> list[float]:
    return [round(v, 2) for v in (ratio.median, ratio.low, ratio.high)]


def _several(network: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Enough passes for a time that can be measured."""

    def run() -> None:
        for _ in range(max(1, min(PASSES, TOKENS // x.numel()))):
            network(x)

    return run


def _rows(name: str, width: int, layers: int) -> list[dict[str, Any]]:
    model = language.small_decoder("llama", 256, width, layers, 4, 128)
    ids = torch.randint(256, (8, 128), generator=torch.Generator().manual_seed(0))
    net = DuoLLM(model, ids[:1], budgets=BUDGETS).eval()
    net.calibrate([ids])
    reference = net.extract({"policy": "big"})
    rows = []
    for kind, (batch, length) in INPUTS.items():
        x = ids.view(-1)[: batch * length].view(batch, length)
        full = count_flops(lambda x=x: reference(x), nonzero=False).total  # type: ignore[misc]
        for point in net.points():
            row = {"network": name, "input": kind, "setting": str(point)}
            for execution in ("compact", "masked"):
                if point["policy"] not in ("router", "random") and execution == "masked":
                    continue
                net.use(point)
                for layer in net.layers:
                    layer.execution = execution  # type: ignore[assignment]
                key = "" if execution == "compact" else " masked"
                row[f"flops{key}"] = round(count_flops(lambda x=x: net(x), nonzero=False).total / full, 3)  # type: ignore[misc]
                with torch.inference_mode():
                    ratio = time_ratio(_several(net, x), _several(reference, x), repeats=REPEATS)
                row[f"time{key}"] = _rounded(ratio)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    rows = [row for name, sizes in WIDTHS.items() for row in _rows(name, *sizes)]
    write(
        "duo_llm",
        "share of the dense network that is left: FLOPs dispatched and time (median and quartiles of ratios), whole "
        "network without a cache, one thread; 'masked' computes both siblings for every token",
        rows=rows,
        in_words=_summary(rows),
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Where routing saves time on this machine, and where not, in words."""
    found = {}
    for name in WIDTHS:
        for kind in INPUTS:
            mine = [r for r in rows if (r["network"], r["input"]) == (name, kind) and "router" in r["setting"]]
            parts = [f"{r['setting']}: FLOPs {r['flops']}, time {r['time'][0]}" for r in mine]
            saved = [r for r in mine if r["time"][2] < 0.95]
            word = "saves time" if len(saved) == len(mine) else "saves time at some budgets" if saved else "saves none"
            found[f"{name}, {kind}"] = f"{word}; " + "; ".join(parts)
    return found


if __name__ == "__main__":
    main()
