"""Training the small GPTs of `recipes.toml` and `limited.toml` on one core: tokens per CPU-second beside plain float32 eager, and what bounds it.

Run `python bench/bench_cpu.py`. CPU-seconds are those of the process, so other work on the machine changes them little. Ways alternate step by step in one
process on one thread: `plain` as in `bench_train.py`; `ours` is `ctxnb.experiments.train.update`; `ours bfloat16` the same in autocast, with attention in float32, which
`precision = "auto"` would choose where it gains a tenth. The bound is told in two ways: the share of the rate of one large product, and the time of each kind of
operation by PyTorch's profiler.

Measured on one thread of an AMD EPYC with AVX512-BF16, other work beside it, l = 16, (64,) 256, tokens per CPU-second: recipes plain 22,300 and 20,400, ours in float32 1.06 and
1.02 x, in bfloat16 1.27 and 1.26 x; limited plain 10,300, 9,900 and 8,200, ours 1.03, 1.03 and 1.01 x, in bfloat16 1.54, 1.50 and 1.36 x. One float32 product of 1,024 x 1,024 runs at
87 GFLOP a CPU-second; bfloat16 reaches 63 to 101 % of it. In bfloat16 limited spends 52, 44 and 34 % of its time on products, 8, 13 and 36 on attention, 24, 27 and 20 on elementwise
operations, 8 to 10 on copies; dropout, which is not timed here, takes 12 % more at l = 256. So the bound is no single thing. With attention in bfloat16 too, its backward pass takes 15.4 ms
for 1,024 tokens at l = 16 (in float32 0.9), and bfloat16 gains nothing there.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict

import torch
from bench_train import model_of, plain, windows_of
from torch.profiler import ProfilerActivity, profile

from ctxnb.experiments.schema import TrainSettings
from ctxnb.experiments.train import BlockLoss, adamw, update
from ctxnb.models.gpt import parameter_count, without_mask
from ctxnb.theory.costs import flops_per_token

SHAPES = {  # layers, heads, width, vocabulary, context lengths, tokens a step
    "recipes": (2, 4, 96, 1024, (16, 256), 1024),
    "limited": (4, 4, 128, 1024, (16, 64, 256), 1024),
}
KINDS = {"products": ("aten::mm", "aten::addmm", "aten::bmm"), "attention": ("flash_attention",), "optimizer": ("adamw", "aten::_foreach", "clip"),
         "softmax and loss": ("softmax", "nll_loss"), "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_")}


def ours(shape: tuple, length: int, bf16: bool):
    """The library's step."""
    model, ids = without_mask(model_of(shape, length, "cpu")), windows_of(shape, length, "cpu")
    settings = TrainSettings(context_length=length, max_context=length, segment_tokens=0, tokens_per_step=shape[5])
    optimizer, loss_of = adamw(model, 1e-4, 0.1, settings), BlockLoss(model, settings)
    return lambda: update(loss_of, optimizer, ids, bf16=bf16).item()


def cpu_seconds(step) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def product_rate() -> float:
    """FLOP per CPU-second of one large float32 product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / statistics.median(cpu_seconds(lambda: a @ b) for _ in range(9))


def time_by_kind(step, steps: int = 5) -> dict[str, float]:
    """Share of the time of some steps by kind of operation; the rest is elementwise operations and Python."""
    started = time.process_time()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
    total, by_kind = time.process_time() - started, defaultdict(float)
    for event in seen.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key.lower() for part in parts)), "other operations")
        by_kind[kind] += event.self_cpu_time_total / 1e6
    whole = max(total, sum(by_kind.values()))
    return {kind: spent / whole for kind, spent in sorted(by_kind.items(), key=lambda item: -item[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="steps timed of each way")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    peak = product_rate()
    print(json.dumps({"product_gflop_per_cpu_second": round(peak / 1e9, 1)}))
    for name, shape in SHAPES.items():
        layers, _, width, vocabulary, lengths, tokens = shape
        for length in lengths:
            ways = {"plain": plain(shape, length, "cpu", 16_384), "ours": ours(shape, length, False), "ours bfloat16": ours(shape, length, True)}
            for step in ways.values():
                step()
            times = {way: [] for way in ways}
            for _ in range(steps):
                for way, step in ways.items():
                    times[way].append(cpu_seconds(step))
            rate = {way: tokens / statistics.median(taken) for way, taken in times.items()}
            flops = flops_per_token(parameter_count(layers, width, vocabulary), layers, width, length)
            print(json.dumps({"shape": name, "l": length, "tokens_per_cpu_second": {way: round(value) for way, value in rate.items()},
                              "ratio_to_plain": {way: round(value / rate["plain"], 3) for way, value in rate.items()},
                              "share_of_product_rate": {way: round(value * flops / peak, 3) for way, value in rate.items()},
                              "time": {way: {kind: round(share, 3) for kind, share in time_by_kind(ways[way]).items()} for way in ways if way != "plain"}}))


if __name__ == "__main__":
    main()
