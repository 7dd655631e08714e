"""Training a GPT: ours beside the plain way, and several runs at once beside one, in tokens per second and model FLOPs.

Run `python bench/bench_train.py` on a CPU: the two shapes of the quick experiments with a vocabulary of bytes, and one with GPT-2's.
`--device cuda` takes the published shape (6 layers of width 768, vocabulary 50,304) in bfloat16 from l = 128 to 16,384 at 491,520
tokens a step. Aims: 0.7 M tokens/s and 40 % of the device's peak at l = 1,024, never below `compiled`. The first length is measured in all ways,
then the others in `plain` and `ours`, then, since it takes longest, in `compiled`. `--json` prints a JSON object after each
result, the last one with all of them, so that a cut loses one result. Small models on a GPU: `bench_ways.py`.

- plain: all logits at once, AdamW as it comes, micro-batches of the same size, one run with all threads; float32, on a GPU bfloat16 autocast.
- compiled (GPU): the same with `torch.compile` of the whole model.
- ours: `ctxnb.experiments.train.update`, what a run calls for each step: on a GPU compiled blocks and bfloat16 autocast, fused AdamW,
  logits of a large vocabulary in parts.
- shared: `--share` runs of ours at once, each a process with its share of the threads, as a grid's workers (and on a GPU its
  `runs_per_gpu`) do it; tokens/s of all of them together. This ratio is that of runs per hour.

Steps of the ways alternate in one process; a rate is tokens over the median time of a step. FLOPs are `flops_per_token` (6 for
each entry of a matrix, and causal attention), without those computed twice; utilisation is that rate over the device's dense bfloat16 peak (`PEAKS`),
and the share of the matmul rate is over one large product in the type computed in, measured in this run on the same threads. All ways must give the
same first loss (1e-3; 2e-2 in bfloat16).

Measured on 2 threads of an AMD EPYC at 2 GHz (AVX2, 68 GFLOP/s), 7 steps, nothing beside it, the last line with parts of half the size:
quick 21,541, 23,101 and shared 35,333 tokens/s at l = 16; 19,019, 20,549 and 29,620 at 128; 6 x 128 at l = 128, 512, 1,024 plain 5,085,
3,482, 2,944, ours 1.01 to 1.03 x that and 50 to 60 % of the matmul rate, shared 1.05 to 1.11 x; GPT-2 tokens 706, and 622 in two parts, whose
second pass costs that. So on a CPU one gains by running two small models side by side, 1.6 x, and nothing near 2 x by any other way tried:
`torch.compile` of the quick model is slower than eager, this processor has no bfloat16 instructions. Not measured on CUDA.
"""

import argparse
import json
import multiprocessing
import statistics
import time

import torch

from ctxnb.experiments.schema import TrainSettings
from ctxnb.experiments.train import BlockLoss, adamw, compile_blocks, update
from ctxnb.models.gpt import gpt, gpt_config, parameter_count, without_mask
from ctxnb.text.windows import micro_batches
from ctxnb.theory.costs import flops_per_token

CPU = {  # layers, heads, width, vocabulary, context lengths, tokens a step
    "quick": (2, 4, 64, 257, (16, 128), 512),
    "6 x 128": (6, 4, 128, 257, (128, 512, 1024), 4096),
    "6 x 128, GPT-2 tokens": (6, 4, 128, 50_304, (128,), 2048),
}
CUDA = {
    "published": (6, 12, 768, 50_304, (1024, 128, 5120, 16_384), 491_520),
}
TINY = {"tiny": (1, 2, 16, 257, (16,), 128)}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bfloat16 FLOP/s by the data sheets


def windows_of(shape: tuple, length: int, device: str) -> torch.Tensor:
    """Random windows of one step; what they say does not matter for the speed."""
    return torch.randint(shape[3], (shape[5] // length, length + 1), generator=torch.Generator().manual_seed(0)).to(device)


def model_of(shape: tuple, length: int, device: str):
    layers, heads, width, vocabulary = shape[:4]
    return gpt(gpt_config(vocabulary, layers, heads, width, length), seed=0).to(device)


def plain(shape: tuple, length: int, device: str, micro: int, compile: bool = False):
    """A step as one writes it first, as a function without arguments that returns the loss."""
    model, ids = model_of(shape, length, device), windows_of(shape, length, device)
    if compile:
        model.compile()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4, betas=(0.9, 0.95))
    parts = micro_batches(len(ids), length, micro)

    def step() -> float:
        total = 0.0
        for part in ids.chunk(parts):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = model(part[:, :-1]).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / parts
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def compiled(shape: tuple, length: int, device: str, micro: int):
    """The plain step with the whole model compiled."""
    return plain(shape, length, device, micro, compile=True)


def ours(shape: tuple, length: int, device: str, micro: int):
    """The same step by the library."""
    model, ids = model_of(shape, length, device), windows_of(shape, length, device)
    settings = TrainSettings(context_length=length, max_context=length, segment_tokens=0, tokens_per_step=shape[5])
    optimizer = adamw(model, 1e-4, 0.1, settings)
    parts = micro_batches(len(ids), length, micro)
    loss_of, cuda = BlockLoss(without_mask(model), settings), device == "cuda"
    if cuda:
        compile_blocks(model)
    return lambda: update(loss_of, optimizer, ids, parts, bf16=cuda).item()  # waits for the GPU, which a run does not


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def matmul_rate(device: str) -> float:
    """FLOP/s of one large product in the type that the device computes in."""
    n, kind = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = torch.randn(n, n, device=device, dtype=kind), torch.randn(n, n, device=device, dtype=kind)

    def product() -> None:
        for _ in range(4):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()

    product()
    return 4 * 2 * n**3 / statistics.median(seconds(product) for _ in range(9))


def one_of_several(shape, length, device, micro, steps, threads, barrier, queue) -> None:
    """A run beside others: from when all are warm, the time of its steps."""
    torch.set_num_threads(threads)
    step = ours(shape, length, device, micro)
    step()
    barrier.wait()
    queue.put(sum(seconds(step) for _ in range(steps)))


def shared_rate(shape, length, device, micro, steps, runs) -> float:
    """Tokens/s of several runs at once, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    barrier, queue, threads = spawn.Barrier(runs), spawn.Queue(), max(1, torch.get_num_threads() // runs)
    arguments = (shape, length, device, micro, steps, threads, barrier, queue)
    processes = [spawn.Process(target=one_of_several, args=arguments) for _ in range(runs)]
    for process in processes:
        process.start()
    rate = sum(steps * shape[5] / queue.get() for _ in processes)
    for process in processes:
        process.join()
    return rate


def measure(name: str, shape: tuple, length: int, arguments, peak: float, makers: tuple) -> dict:
    """Rates of one shape at one context length in the ways wanted, of which `ours` is one."""
    device, micro, cuda = arguments.device, arguments.micro_tokens, arguments.device == "cuda"
    ways = {way.__name__: way(shape, length, device, micro) for way in makers}
    first = {way: step() for way, step in ways.items()}  # also warms up
    if max(first.values()) - min(first.values()) > (2e-2 if cuda else 1e-3):
        raise SystemExit(f"{name}, l = {length}: the ways differ, {first}")
    times = {way: [] for way in ways}
    for _ in range(arguments.steps):
        for way, step in ways.items():
            times[way].append(seconds(step))
    rate = {way: shape[5] / statistics.median(taken) for way, taken in times.items()}
    layers, _, width, vocabulary = shape[:4]
    flops = flops_per_token(parameter_count(layers, width, vocabulary), layers, width, length)
    result = {"shape": name, "l": length, "parameters": parameter_count(layers, width, vocabulary), "tokens_per_step": shape[5], "flops_per_token": flops}
    result |= {f"{way}_tokens_per_s": per_s for way, per_s in rate.items()} | {f"ratio_to_{way}": rate["ours"] / rate[way] for way in ways if way != "ours"}
    result["share_of_matmul_rate"] = rate["ours"] * flops / peak
    if cuda:
        result |= on_gpu(ways, rate["ours"] * flops)
    for runs in arguments.share:
        if runs > 1:
            shared = shared_rate(shape, length, device, micro, arguments.steps, runs)
            result |= {f"shared_by_{runs}_tokens_per_s": shared, f"shared_by_{runs}_ratio": shared / rate["ours"]}
    return result


def on_gpu(ways: dict, flops_per_s: float) -> dict:
    """Utilisation of the peak, and peak memory of ours alone; frees all ways."""
    step = ways["ours"]
    ways.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    name = torch.cuda.get_device_name()
    known = [peak for part, peak in PEAKS.items() if part in name]
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} | ({"utilisation": flops_per_s / known[0]} if known else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=9, help="steps timed of each way")
    parser.add_argument("--share", type=int, nargs="*", default=[2], help="runs at once; 1 leaves them out")
    parser.add_argument("--micro-tokens", type=int, default=16_384, help="tokens that go through the model at once")
    parser.add_argument("--shape", choices=[*CPU, *CUDA, *TINY], nargs="*", help="only these shapes")
    parser.add_argument("--json", action="store_true", help="print JSON objects")
    arguments = parser.parse_args()
    shapes = CUDA if arguments.device == "cuda" else CPU
    if arguments.shape:
        shapes = {name: (CPU | CUDA | TINY)[name] for name in arguments.shape}
    peak = matmul_rate(arguments.device)
    place = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    results = []
    if not arguments.json:
        print(f"{place}, matmul {peak / 1e12:.3f} TFLOP/s")
    for name, shape in shapes.items():
        first, *others = shape[4]
        rounds = [((first,), (plain, compiled, ours)), (others, (plain, ours)), (others, (compiled, ours))] if arguments.device == "cuda" else [(shape[4], (plain, ours))]
        for length, makers in [(length, makers) for lengths, makers in rounds for length in lengths]:
            results.append(measure(name, shape, length, arguments, peak, makers))
            if arguments.json:
                print(json.dumps({"place": place, "matmul_flops_per_s": peak, "results": results}), flush=True)
            else:
                print(", ".join(f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in results[-1].items()), flush=True)


if __name__ == "__main__":
    main()
