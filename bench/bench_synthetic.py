"""Synthetic strings and training against plain code: a loop with a set, and a DataLoader over items.

Generation: `draw` makes 12 million samples of 100 bits; the loop, which draws each string bit by bit and keeps a set of those it has seen, is
timed and weighed on fewer, and its memory is scaled up linearly. Each side runs in a process of its own, so that peak memory belongs to it.
Training: an epoch over 50,000 training and 20,000 dev samples at the published shape (27 bits, 50 tasks, batch 10,000), ours and a DataLoader without
workers over a per-item dataset of one-hot inputs, in turns in one process; the best of several rounds counts. The rate of the model's products is compared
with what the machine's matmul does on the same shapes in the same process.
Replicas: models of several seeds as one, stacked and mapped over by `torch.func`, each with its own batch and clip; samples/s of all together over those of one.
Transformer: the published one (width 208, 60 bits, batch 1,024), by `updater`, what a run calls for each step; eager, and on a GPU also compiled. Usage:

    python bench/bench_synthetic.py [--rounds 3] [--device cuda] [--replicas 8 --transformer] [--json]

`--samples 0` leaves the generation out. With `--json` a JSON object is printed after each part, the last one with all of them, so that a cut loses one part.
"""
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ctxnb.experiments.schema import SyntheticSettings
from ctxnb.experiments.synthetic import BitData, model_of, train, updater
from ctxnb.models.xor import flops_per_sample, make_model
from ctxnb.text.xor_strings import draw, split
from ctxnb.text.xor_tasks import TaskSet, task_set

L = 27


class Size(NamedTuple):
    """Samples for training and development and in a batch, and batch and width of the transformer."""

    train: int
    dev: int
    batch: int
    transformer_batch: int
    transformer_width: int


SIZES = {"published": Size(50_000, 20_000, 10_000, 1024, 208), "tiny": Size(2000, 500, 500, 32, 32)}


# --- generation ---------------------------------------------------------------------------------------------


def loop(tasks: TaskSet, n: int) -> list:
    """n samples, distinct by a set, as one would write it at first."""
    rng, seen, samples = random.Random(0), set(), []
    while len(samples) < n:
        bits = tuple(rng.getrandbits(1) for _ in range(tasks.bits))
        if bits in seen:
            continue
        seen.add(bits)
        task = rng.randrange(len(tasks.pairs))
        far, near = tasks.pairs[task]
        samples.append((bits, task, bits[far - 1] ^ bits[near - 1] if far <= tasks.bits else rng.getrandbits(1)))
    return samples


def weigh(side: str, n: int, pipe) -> None:
    """Seconds and peak bytes above the start of this (fresh) process."""
    tasks = task_set("xor-first")
    draw(tasks, 0, 1000, 0), loop(tasks, 1000)
    before = resident()
    began = time.perf_counter()
    made = draw(tasks, 0, n, seed=0) if side == "ours" else loop(tasks, n)
    pipe.send((time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))
    del made


def resident() -> int:
    """Resident bytes of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_own_process(side: str, n: int) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=weigh, args=(side, n, send))
    process.start()
    send.close()
    figures = receive.recv()
    process.join()
    return figures


# --- training -----------------------------------------------------------------------------------------------


class Items(Dataset):
    """One sample at a time: bits and one-hot task as floats, and the label."""

    def __init__(self, samples, n_tasks: int):
        bits, task = samples.visible(L).float(), F.one_hot(torch.from_numpy(samples.task).long(), n_tasks).float()
        self.x, self.y = torch.cat([bits, task], 1), torch.from_numpy(samples.label).float()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i], self.y[i]


class Plain:
    """The published network in nn.Sequential, trained from a DataLoader."""

    def __init__(self, tasks: TaskSet, device: str, size: Size):
        self.device = device
        torch.manual_seed(0)
        parts, n = split(tasks, size.train, size.dev, 2, 0), len(tasks.pairs)
        self.train, self.dev = DataLoader(Items(parts.train, n), size.batch, shuffle=True), DataLoader(Items(parts.dev, n), size.batch)
        self.model = nn.Sequential(nn.Linear(L + n, 400), nn.LeakyReLU(0.0015), nn.Linear(400, 200), nn.Linear(200, 400), nn.LeakyReLU(0.0015), nn.Linear(400, 1)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=8e-4)

    def epoch(self) -> float:
        """Dev loss after one more epoch."""
        for x, y in self.train:
            loss = F.binary_cross_entropy_with_logits(self.model(x.to(self.device)).squeeze(1), y.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        with torch.no_grad():
            losses = (F.binary_cross_entropy_with_logits(self.model(x.to(self.device)).squeeze(1), y.to(self.device)) * len(y) for x, y in self.dev)
            return sum(loss.item() for loss in losses) / len(self.dev.dataset)


EPOCHS = 4


def ours(micro: int, device: str, size: Size) -> tuple[float, float, float]:
    """Seconds of a whole epoch, seconds of its training part, last dev loss; without data and model set-up."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(folder=folder, tasks="xor-first", context_length=L, width=400, middle_width=200, train_samples=size.train, dev_samples=size.dev, test_samples=1000,
                    batch=size.batch, micro_batch=micro, epochs=EPOCHS, min_steps=0, eval_steps=0, learning_rate=1e-3, weight_decay=8e-4, device=device)
    return (run["train_seconds"] + run["eval_seconds"]) / EPOCHS, run["train_seconds"] / EPOCHS, run["history_dev_loss"][-1]


def plain(tasks: TaskSet, device: str, size: Size) -> tuple[float, float]:
    side = Plain(tasks, device, size)
    began = time.perf_counter()
    for _ in range(EPOCHS):
        loss = side.epoch()
    return (time.perf_counter() - began) / EPOCHS, loss


def matmul_rate(rows: int, device: str) -> float:
    """FLOP/s of the model's middle products, as plain matmuls of the rows that go through at once."""
    a, b, c = (torch.randn(*shape, device=device) for shape in ((rows, 400), (400, 200), (200, 400)))
    return 4 * rows * 400 * 200 / best_time(lambda: ((a @ b) @ c)[0, 0].item(), 30)  # .item() waits for a GPU


def best_time(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


# --- several models at once, and the transformer --------------------------------------------------------------


def seconds_a_step(step: Callable[[int], torch.Tensor], steps: int = 20) -> float:
    """Mean time of a step, after two to warm up; waits for the device at the end."""
    step(0), step(1).item()
    began = time.perf_counter()
    for i in range(steps):
        loss = step(2 + i)
    loss.item()
    return (time.perf_counter() - began) / steps


def replica_step(tasks: TaskSet, device: str, size: Size, count: int) -> Callable[[int], torch.Tensor]:
    """A step of several MLPs as one; gives the mean loss over them."""
    models = [make_model("mlp", L, len(tasks.pairs), seed, width=400, middle_width=200).to(device) for seed in range(count)]
    weights, _ = torch.func.stack_module_state(models)
    samples = draw(tasks, 0, count * size.batch, 0)
    bits = samples.visible(L, device).view(count, size.batch, L)
    task, label = (torch.from_numpy(values).to(device, kind).view(count, size.batch) for values, kind in ((samples.task, torch.int64), (samples.label, torch.float32)))
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, weight_decay=8e-4, fused=True)

    def loss(weights: dict, bits: torch.Tensor, task: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(torch.func.functional_call(models[0], weights, (bits, task)), label)

    def step(_: int) -> torch.Tensor:
        losses = torch.func.vmap(loss)(weights, bits, task, label)
        losses.sum().backward()
        norms = torch.stack([weight.grad.flatten(1).norm(dim=1) for weight in weights.values()]).norm(dim=0)
        for weight in weights.values():
            weight.grad.mul_((1 / (norms + 1e-6)).clamp(max=1).view(-1, *[1] * (weight.ndim - 1)))
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach().mean()

    return step


def transformer_step(device: str, size: Size, compile: bool) -> Callable[[int], torch.Tensor]:
    """A step of the published transformer, as `data/grids/standard/synthetic_transformer.toml` trains it."""
    s = SyntheticSettings(tasks="xor-second", model="transformer", context_length=60, width=size.transformer_width, layers=3, heads=8, max_masked=50,
                          batch=size.transformer_batch, train_samples=32 * size.transformer_batch, learning_rate=0.0005)
    tasks = task_set(s.tasks)
    model = model_of(s, tasks).to(device)
    if compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.learning_rate, fused=True)
    return updater(s, BitData(split(tasks, s.train_samples, 2, 2, 0).train, s, torch.device(device)), model, optimizer)


# --- report -------------------------------------------------------------------------------------------------


def generation(samples: int, loop_samples: int) -> dict:
    """Making strings, ours and the loop."""
    (ours_s, ours_bytes), (loop_s, loop_bytes) = in_own_process("ours", samples), in_own_process("loop", loop_samples)
    return {
        "samples": samples, "generation_s": ours_s, "generation_mb": ours_bytes / 1e6, "samples_per_s": samples / ours_s,
        "loop_samples": loop_samples, "loop_samples_per_s": loop_samples / loop_s, "loop_bytes_per_sample": loop_bytes / loop_samples,
        "time_ratio": samples / ours_s / (loop_samples / loop_s), "memory_ratio_scaled": loop_bytes / loop_samples / (ours_bytes / samples),
    }  # fmt: skip


def training(tasks: TaskSet, rounds: int, micro_batch: int, device: str, size: Size) -> dict:
    """Epochs of the MLP, ours and the DataLoader."""
    plain(tasks, device, size)  # first calls
    epochs, trainings, plains = [], [], []
    for _ in range(rounds):
        epoch, part, ours_loss = ours(micro_batch, device, size)
        seconds, plain_loss = plain(tasks, device, size)
        epochs.append(epoch), trainings.append(part), plains.append(seconds)
    rate = size.train / min(trainings)
    flops, peak = rate * flops_per_sample(make_model("mlp", L, 50, 0)), matmul_rate(micro_batch or size.batch, device)
    return {
        "epoch_s": min(epochs), "loader_epoch_s": min(plains), "epoch_ratio": min(plains) / min(epochs), "train_samples_per_s": rate,
        "gflops": flops / 1e9, "matmul_gflops": peak / 1e9, "matmul_share": flops / peak, "dev_loss": ours_loss, "loader_dev_loss": plain_loss,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def several(tasks: TaskSet, counts: tuple[int, ...], device: str, size: Size) -> dict:
    """Samples/s of one MLP and of several as one."""
    rates = {count: count * size.batch / seconds_a_step(replica_step(tasks, device, size, count)) for count in (1, *counts)}
    return {f"replicas_{count}_samples_per_s": rate for count, rate in rates.items()} | {f"replicas_{count}_ratio": rates[count] / rates[1] for count in counts}


def transformers(device: str, size: Size) -> dict:
    """Samples/s of the transformer."""
    ways = {"transformer": False} | ({"transformer_compiled": True} if device == "cuda" else {})
    return {f"{name}_samples_per_s": size.transformer_batch / seconds_a_step(transformer_step(device, size, compile)) for name, compile in ways.items()}


def in_words(r: dict) -> str:
    """The result for a reader."""
    lines = [f"{name} {value:,.4g}" for name, value in r.items() if name.startswith(("replicas", "transformer"))]
    if "generation_s" in r:
        lines += [f"generation: {r['samples']:,} samples in {r['generation_s']:.1f} s ({r['samples_per_s'] / 1e6:.1f} M/s), {r['generation_mb']:.0f} MB; loop "
                  f"{r['loop_samples_per_s'] / 1e6:.3f} M/s, {r['loop_bytes_per_sample']:.0f} bytes a sample on {r['loop_samples']:,}",
                  f"  ratio in time {r['time_ratio']:.0f} (aim 100), in memory {r['memory_ratio_scaled']:.0f} (aim 30; the loop's scaled up linearly)"]
    lines += [f"training: {r['epoch_s']:.3f} s an epoch, loader {r['loader_epoch_s']:.3f} s, ratio {r['epoch_ratio']:.1f} (aim 5), on {r['threads']} threads",
              f"  {r['train_samples_per_s']:,.0f} samples/s, {r['gflops']:.0f} GFLOP/s of {r['matmul_gflops']:.0f} of plain matmul: {r['matmul_share']:.0%} (aim 50 %)",
              f"  dev loss after {EPOCHS} epochs {r['dev_loss']:.4f}, loader's {r['loader_dev_loss']:.4f} (other weights and order)"]
    return "\n".join(lines)


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--samples", type=click.IntRange(min=0), default=12_000_000, show_default=True, help="Samples that ours makes; 0 leaves the generation out.")
@click.option("--loop-samples", type=click.IntRange(min=1000), default=300_000, show_default=True, help="Samples that the loop makes.")
@click.option("--micro-batch", type=click.IntRange(min=0), default=1000, show_default=True)
@click.option("--replicas", type=click.IntRange(min=2), multiple=True, help="Models as one; may be given several times.")
@click.option("--transformer", is_flag=True, help="Also the published transformer.")
@click.option("--size", type=click.Choice([*SIZES]), default="published", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the models train.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON objects.")
def main(rounds: int, samples: int, loop_samples: int, micro_batch: int, replicas: tuple[int, ...], transformer: bool, size: str, device: str, as_json: bool) -> None:
    """Time and weigh both sides, print the ratios."""
    tasks, sizes = task_set("xor-first"), SIZES[size]
    parts = [lambda: training(tasks, rounds, micro_batch, device, sizes)]
    if replicas:
        parts.append(lambda: several(tasks, replicas, device, sizes))
    if transformer:
        parts.append(lambda: transformers(device, sizes))
    if samples:
        parts.append(lambda: generation(samples, loop_samples))
    result: dict = {}
    for part in parts:
        result |= part()
        if as_json:
            print(json.dumps(result), flush=True)
    if not as_json:
        print(in_words(result))


if __name__ == "__main__":
    main()
