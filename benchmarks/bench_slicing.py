"""Sliced execution against the extracted network and against masked execution at full size, in one run.

Ratios of time, batch of 64 and of 1. Written to ``benchmarks/results/slicing.json``.
"""

from __future__ import annotations

import torch

from pliant.core.cost import time_ratio
from pliant.core.slicing import Slicing
from pliant.tasks.images import SmallResNet
from tables import write


def main() -> None:
    """Measure at three widths and write the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SmallResNet(widths=(32, 64, 128)).eval()
    slicing = Slicing(model, torch.randn(2, 1, 28, 28))
    rows = []
    for width in (0.25, 0.5, 0.75):
        network = slicing.subnetwork(width)
        network.skeleton.eval()
        plain = network.extract(model)
        for batch in (1, 64):
            x = torch.randn(batch, 1, 28, 28)
            with torch.no_grad():
                sliced = time_ratio(lambda: network.infer(model, x), lambda: plain(x), repeats=31)  # noqa: B023
                # A masked network runs all channels, whatever their value: its time is the full network's.
                masked = time_ratio(lambda: model(x), lambda: plain(x), repeats=31)  # noqa: B023
            rows.append(
                {
                    "width": width,
                    "batch": batch,
                    "sliced / extracted": round(sliced.median, 3),
                    "quartiles": [round(sliced.low, 3), round(sliced.high, 3)],
                    "masked / extracted": round(masked.median, 3),
                    "extracted, ms": round(1e3 * sliced.seconds / sliced.median, 3),
                }
            )
            print(rows[-1])
    write(
        "slicing",
        "time ratios, SmallResNet (32, 64, 128), one thread, the two timed in turn",
        rows=rows,
    )


if __name__ == "__main__":
    main()
