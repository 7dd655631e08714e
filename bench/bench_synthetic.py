"""Synthetic strings and training against plain code: a loop with a set, and a DataLoader over items.

Generation: `draw` makes 12 million samples of 100 bits; the loop, which draws each string bit by bit and keeps a set of those it has seen, is
timed and weighed on fewer, and its memory is scaled up linearly. Each side runs in a process of its own, so that peak memory belongs to it.
Training: an epoch over 50,000 training and 20,000 dev samples at the published shape (27 bits, 50 tasks, batch 10,000), ours and a DataLoader without
workers over a per-item dataset of one-hot inputs, in turns in one process; the best of several rounds counts. The rate of the model's products is compared
with what the machine's matmul does on the same shapes in the same process. Usage:

    python bench/bench_synthetic.py [--rounds 3] [--device cuda] [--json]
"""
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ctxnb.experiments.synthetic import train
from ctxnb.models.xor import flops_per_sample, make_model
from ctxnb.text.xor_strings import draw, split
from ctxnb.text.xor_tasks import TaskSet, task_set

L, TRAIN, DEV, BATCH = 27, 50_000, 20_000, 10_000


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

    def __init__(self, tasks: TaskSet, device: str):
        self.device = device
        torch.manual_seed(0)
        parts, n = split(tasks, TRAIN, DEV, 2, 0), len(tasks.pairs)
        self.train, self.dev = DataLoader(Items(parts.train, n), BATCH, shuffle=True), DataLoader(Items(parts.dev, n), BATCH)
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
            return sum(loss.item() for loss in losses) / DEV


EPOCHS = 4


def ours(micro: int, device: str) -> tuple[float, float, float]:
    """Seconds of a whole epoch, seconds of its training part, last dev loss; without data and model set-up."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(folder=folder, context_length=L, train_samples=TRAIN, dev_samples=DEV, test_samples=1000, seed=0, epochs=EPOCHS, micro_batch=micro, device=device)
    return (run["train_seconds"] + run["eval_seconds"]) / EPOCHS, run["train_seconds"] / EPOCHS, run["history_dev_loss"][-1]


def plain(tasks: TaskSet, device: str) -> tuple[float, float]:
    side = Plain(tasks, device)
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


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--samples", type=click.IntRange(min=1000), default=12_000_000, show_default=True, help="Samples that ours makes.")
@click.option("--loop-samples", type=click.IntRange(min=1000), default=300_000, show_default=True, help="Samples that the loop makes.")
@click.option("--micro-batch", type=click.IntRange(min=0), default=1000, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the models train.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(rounds: int, samples: int, loop_samples: int, micro_batch: int, device: str, as_json: bool) -> None:
    """Time and weigh both sides, print the ratios."""
    tasks = task_set("xor-first")
    (ours_s, ours_bytes), (loop_s, loop_bytes) = in_own_process("ours", samples), in_own_process("loop", loop_samples)
    plain(tasks, device)  # first calls
    epochs, trainings, plains = [], [], []
    for _ in range(rounds):
        epoch, training, ours_loss = ours(micro_batch, device)
        seconds, plain_loss = plain(tasks, device)
        epochs.append(epoch), trainings.append(training), plains.append(seconds)
    rate = TRAIN / min(trainings)
    flops = rate * flops_per_sample(make_model("mlp", L, 50, 0))
    peak = matmul_rate(micro_batch or BATCH, device)
    result = {
        "samples": samples, "generation_s": ours_s, "generation_mb": ours_bytes / 1e6, "samples_per_s": samples / ours_s,
        "loop_samples": loop_samples, "loop_samples_per_s": loop_samples / loop_s, "loop_bytes_per_sample": loop_bytes / loop_samples,
        "time_ratio": samples / ours_s / (loop_samples / loop_s), "memory_ratio_scaled": loop_bytes / loop_samples / (ours_bytes / samples),
        "epoch_s": min(epochs), "loader_epoch_s": min(plains), "epoch_ratio": min(plains) / min(epochs), "train_samples_per_s": rate,
        "gflops": flops / 1e9, "matmul_gflops": peak / 1e9, "matmul_share": flops / peak, "dev_loss": ours_loss, "loader_dev_loss": plain_loss,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return
    print(f"generation: {samples:,} samples in {ours_s:.1f} s ({result['samples_per_s'] / 1e6:.1f} M/s), {result['generation_mb']:.0f} MB; loop "
          f"{result['loop_samples_per_s'] / 1e6:.3f} M/s, {result['loop_bytes_per_sample']:.0f} bytes a sample on {loop_samples:,}\n"
          f"  ratio in time {result['time_ratio']:.0f} (aim 100), in memory {result['memory_ratio_scaled']:.0f} (aim 30; the loop's scaled up linearly)\n"
          f"training: {min(epochs):.3f} s an epoch, loader {min(plains):.3f} s, ratio {result['epoch_ratio']:.1f} (aim 5), on {result['threads']} threads\n"
          f"  {rate:,.0f} samples/s, {result['gflops']:.0f} GFLOP/s of {result['matmul_gflops']:.0f} of plain matmul: {result['matmul_share']:.0%} (aim 50 %)\n"
          f"  dev loss after {EPOCHS} epochs {ours_loss:.4f}, loader's {plain_loss:.4f} (other weights and order)")


if __name__ == "__main__":
    main()
