"""A transformer trained on several ranks, as a user would write it: prints loss, bytes and tokens per second.

On four emulated hosts, over a network of 100 Mbit/s (as root), by torchrun or by mpirun::

    launch/netlab up --name lm --hosts 4 --rate 100mbit
    launch/netlab run --name lm -- launch/torchrun.sh --hosts /run/netlab/lm/hosts --interface eth0 --threads 1 \
        -- python -m benchmarks.language_model_example --data-dir DATA
    launch/netlab down --name lm

On one machine: ``launch/mpirun.sh -n 4 -- python -m benchmarks.language_model_example --data-dir DATA``.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

import hvd_sketch
from benchmarks.accuracy_per_byte.data import wikitext
from benchmarks.accuracy_per_byte.models import Transformer
from hvd_sketch.transport import resolve_transport

SIZES = {"0.3m": (96, 2, 4), "1m": (192, 2, 4), "10m": (384, 6, 6), "124m": (896, 13, 14)}  # width, blocks, heads


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_model_example",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder with text/wikitext2_valid.txt and _test.txt"
    )
    parser.add_argument("--size", choices=SIZES, default="10m", help="parameters (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=60.0, help="times fewer bytes; 1: dense (default: %(default)s)")
    told = "exchange parameters every so many steps, not gradients in each (default: %(default)s)"
    parser.add_argument("--every", type=int, default=1, help=told)
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank and step (default: %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="bytes of a sequence (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its peak (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    transport = resolve_transport("auto")
    data = wikitext(arguments.data_dir, arguments.context)
    width, blocks, heads = SIZES[arguments.size]
    model = Transformer(data.classes, width, blocks, heads, arguments.context)

    optimizer = torch.optim.AdamW(model.parameters(), arguments.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor_of(step, arguments.steps))
    compression = None
    if arguments.ratio > 1:
        compression = hvd_sketch.recommended(model.parameters(), arguments.ratio, transport.size, optimizer="adamw")
    if arguments.every > 1:
        optimizer = hvd_sketch.LocalSteps(
            optimizer, model.named_parameters(), compression, transport, every=arguments.every
        )
    else:
        optimizer = hvd_sketch.DistributedOptimizer(
            optimizer, model.named_parameters(), compression=compression, transport=transport
        )
    hvd_sketch.broadcast_parameters(model.state_dict(), root_rank=0, transport=transport)

    batches = data.batches(1, arguments.batch, transport.rank, skewed=False)
    tokens = transport.size * arguments.batch * arguments.context
    start_s = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        optimizer.zero_grad()
        loss = data.loss(model, next(batches)[0])
        loss.backward()
        optimizer.step()
        schedule.step()
        if transport.rank == 0 and (step % 10 == 0 or step == arguments.steps):
            sent = optimizer.ledger.totals().wire_bytes / step / 1000
            speed = tokens * step / (time.perf_counter() - start_s)
            print(f"step {step}: loss {float(loss):.3f}, {sent:,.1f} kB per step, {speed:,.0f} tokens/s", flush=True)
    if arguments.every > 1:
        optimizer.sync()
    if transport.rank == 0:
        ratio = optimizer.ledger.compression_ratio()
        print(f"test loss {data.evaluate(model)[1]:.4f}, {ratio:.1f} times fewer bytes than dense")
    transport.barrier()


def factor_of(step: int, steps: int) -> float:
    """Of the learning rate: up over the first tenth, then down to a tenth along a cosine."""
    return min(1.0, (step + 1) / max(steps // 10, 1)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


if __name__ == "__main__":
    main()
