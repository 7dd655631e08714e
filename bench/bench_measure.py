"""Measuring a causal language model: ours beside the plain way, in one run on one small random Llama.

Run `python bench/bench_measure.py` (add --device cuda on a GPU, --json for one line of JSON). The plain way is what one writes first:
logits of all positions in float32 for the loss, a second pass with all hidden states for the features, and the features kept until
their covariance is computed. Ours is `ctxnb.experiments.measure.measure_windows`: one pass, one position's logits, a hook for the features and a streaming
covariance. Both give the same losses and eigenvalues, which is checked (1e-4 and 1e-4 of the largest).

Time is measured in this process, the two ways in alternation, as the ratio of the medians. Peak memory is that of child processes, one for each
way and length, above what they held with the model loaded and warm. The fraction of the matmul rate divides 2 x (parameters without the
embedding) x tokens/s by the rate of one large float32 (or bfloat16) product on the same threads. Exits with 1 below 6 x in time at l = 512 or 4 x in
memory at l = 2,048, unless the sizes are others or the device is a GPU.

Measured on 2 threads of a Xeon with AVX-512 but no bfloat16 instructions, other jobs beside it: 12.4 s and 1.8 s, 6.9 x (7.8 x in another run, of 16 windows);
1,729 MB and 68 MB, 25 x; 2,291 tokens/s, 10 % of a matmul rate of 75 GFLOP/s (the model is narrow; SmolLM2 reaches far more of it). bfloat16 is slower on this
processor, 783 tokens/s, as its matmul rate of 18 GFLOP/s says. Not measured on CUDA.

`--smollm2` measures the real model on one thread, in CPU time, since other jobs share the machine. On an EPYC with AVX512-BF16 beside some twenty other processes: 263 tokens for a second of one core in
float32 (67 % of a matmul rate of 84 GFLOP/s) and 435 in bfloat16 (49 % of 189), 1.65 x. Five questions on one context of 256 tokens: 1.3 s where it is read once and 4.6 s where every prompt is read whole in
float32, 2.0 and 3.3 s in bfloat16, whose short continuations gain less.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

VOCABULARY = 49_152


def small_llama(dtype: str, device: str):
    """A random Llama with the vocabulary of SmolLM2, its embedding tied: 4 blocks of width 192, on a GPU SmolLM2's 30 of width 576."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2)
    if device == "cuda":
        shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.1, **shape)
    return LlamaForCausalLM(config).eval().to(device, getattr(torch, dtype))


def windows_of(count: int, length: int) -> np.ndarray:
    """Random windows; what they say does not matter for the speed."""
    return np.random.default_rng(length).integers(0, VOCABULARY, (count, length + 1))


def plain(model, windows: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss of the last token from all logits in float32, features from a second pass, covariance at the end."""
    ids, losses, features = torch.from_numpy(windows).to(model.device), [], []
    with torch.no_grad():
        for part in ids.split(batch):
            logits = model(part[:, :-1]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            losses.append(loss.view(len(part), -1)[:, -1].cpu())
        for part in ids.split(batch):
            features.append(model(part[:, :-1], output_hidden_states=True).hidden_states[-1][:, -1].float().cpu())
    covariance = torch.cov(torch.cat(features).double().T)
    return torch.cat(losses).numpy(), torch.linalg.eigvalsh(covariance).flip(0).numpy()


def ours(model, windows: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The same numbers by the library."""
    from ctxnb.experiments.measure_pass import measure_windows

    measured = measure_windows(model, windows, batch_tokens=batch * (windows.shape[1] - 1), keep_features=False)
    return measured.loss, measured.eigenvalues[0]


WAYS = {"plain": plain, "ours": ours}


def timed(way, model, windows: np.ndarray, batch: int) -> float:
    start = time.perf_counter()
    way(model, windows, batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(model, windows: np.ndarray, batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of each way, the ways in turns."""
    seconds = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, way in WAYS.items():
            seconds[name].append(timed(way, model, windows, batch))
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_of(name: str, length: int, count: int, batch: int, device: str, pipe) -> None:
    """Peak memory of one way in this (fresh) process, above the loaded and warm model; sent through the pipe."""
    model = small_llama("float32", device)
    WAYS[name](model, windows_of(2, 16), 2)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[name](model, windows_of(count, length), batch)
        pipe.send(torch.cuda.max_memory_allocated() - before)
        return
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    WAYS[name](model, windows_of(count, length), batch)
    # not ru_maxrss: Linux hands a child its parent's high-water mark
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    pipe.send(int(line.split()[1]) * 1024 - resident)


def peak(name: str, *arguments) -> int:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=peak_of, args=(name, *arguments, send))
    process.start()
    send.close()
    value = receive.recv()
    process.join()
    return value


def matmul_rate(dtype: str, device: str, size: int = 2048, repeats: int = 5) -> float:
    """Best rate of a square product, FLOP/s."""
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def cpu_rate(work, amount: float, repeats: int = 3) -> float:
    """Best amount of work for a second of CPU time, which other jobs on the machine do not change much."""
    best = 0.0
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = max(best, amount / (time.process_time() - start))
    return best


def smollm2(length: int = 256, count: int = 2) -> dict[str, dict[str, float]]:
    """SmolLM2 on one thread, by number format: tokens for a second of CPU time, share of the matmul rate, and what four questions on one context cost."""
    from ctxnb.experiments.measure import measured_text
    from ctxnb.experiments.measure_pass import measure_windows
    from ctxnb.experiments.tasks import answer_losses, continue_from, make_tasks, read_once
    from ctxnb.models.pretrained import load_model
    from ctxnb.text.tokenizers import load_tokenizer

    torch.set_num_threads(1)
    text, windows, found = measured_text(), windows_of(count, length), {}
    (task,) = make_tasks("multi", text.store, load_tokenizer(text.tokenizer), length, 1)
    prefix, most = task.prefix(length), max(len(q.tokens) for q in task.questions)
    asked = [np.pad(q.tokens, (0, most - len(q.tokens))) for q in task.questions]  # all of one length: what they say does not matter for the speed
    prompts = torch.tensor(np.stack([np.concatenate([prefix, question]) for question in asked]))
    answers = [np.concatenate(q.items) for q in task.questions]
    rows = torch.zeros(len(asked), dtype=torch.long)
    for dtype in ("float32", "bfloat16"):
        model = load_model(text.source, dtype, "cpu")
        weights = sum(w.numel() for w in model.parameters()) - model.get_input_embeddings().weight.numel()
        matrix = torch.randn(2048, 2048).to(getattr(torch, dtype))
        with torch.inference_mode():
            flops = cpu_rate(partial(torch.matmul, matrix, matrix), 2 * 2048**3)
            tokens = cpu_rate(partial(measure_windows, model, windows, (), batch_tokens=length), count * length)
            whole = 1 / cpu_rate(partial(answer_losses, model, prompts, answers), 1, 2)
            once = 1 / cpu_rate(lambda model=model: answer_losses(model, prompts, answers, continue_from(read_once(model, prompts[:1, : len(prefix)]), rows)), 1, 2)
        found[dtype] = {"tokens_per_cpu_s": tokens, "matmul_flops": flops, "matmul_share": 2 * weights * tokens / flops, "questions": len(asked),
                        "seconds_once": once, "seconds_whole": whole}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--windows", type=int, default=8, help="windows of --length tokens")
    parser.add_argument("--length", type=int, default=512, help="visible tokens of each window")
    parser.add_argument("--memory-length", type=int, default=2048, help="visible tokens of the windows whose peak memory is measured; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--smollm2", action="store_true", help="measure SmolLM2 on one thread of the CPU instead: number formats, and contexts read once")
    arguments = parser.parse_args()
    if arguments.smollm2:
        found = smollm2()
        for dtype, row in found.items():
            print(json.dumps({dtype: row}) if arguments.json else
                  f"{dtype}: {row['tokens_per_cpu_s']:,.0f} tokens for a second of one core, {row['matmul_share']:.0%} of its matmul rate {row['matmul_flops'] / 1e9:,.0f} GFLOP/s; "
                  f"{row['questions']} questions on a context of 256 tokens: {row['seconds_once']:.1f} s with the context read once, {row['seconds_whole']:.1f} s with every prompt read whole")
        return 0
    device, batch = arguments.device, 4
    model, windows = small_llama("float32", device), windows_of(arguments.windows, arguments.length)
    (loss, values), (our_loss, our_values) = plain(model, windows, batch), ours(model, windows, batch)
    np.testing.assert_allclose(our_loss, loss, atol=1e-4)
    np.testing.assert_allclose(our_values, values, atol=1e-4 * values[0])
    median = medians(model, windows, batch, arguments.repeats)
    tokens = arguments.windows * arguments.length
    weights = sum(w.numel() for w in model.parameters()) - model.get_input_embeddings().weight.numel()
    half = small_llama("bfloat16", device)
    ours(half, windows, batch)
    half_median = medians(half, windows, batch, arguments.repeats)
    memory = {name: peak(name, arguments.memory_length, 4, 2, device) for name in WAYS if arguments.memory_length}
    rates = {dtype: matmul_rate(dtype, device) for dtype in ("float32", "bfloat16")}
    figures = {
        "seconds": median, "time_ratio": median["plain"] / median["ours"],
        "peak_bytes": memory, "memory_ratio": memory["plain"] / memory["ours"] if memory else None,
        "tokens_per_s": tokens / median["ours"], "matmul_flops": rates["float32"],
        "matmul_share": 2 * weights * tokens / median["ours"] / rates["float32"],
        "bfloat16_tokens_per_s": tokens / half_median["ours"], "bfloat16_time_ratio": half_median["plain"] / half_median["ours"],
        "bfloat16_matmul_flops": rates["bfloat16"], "threads": torch.get_num_threads(),
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(f"l = {arguments.length:,}, {arguments.windows} windows, {device}: plain {median['plain']:.2f} s, ours {median['ours']:.2f} s: {figures['time_ratio']:.1f} x")
        if memory:
            print(f"l = {arguments.memory_length:,}, peak above the model: plain {memory['plain'] / 1e6:,.0f} MB, ours {memory['ours'] / 1e6:,.0f} MB: {figures['memory_ratio']:.1f} x")
        print(f"ours: {figures['tokens_per_s']:,.0f} tokens/s in float32, {figures['matmul_share']:.0%} of the matmul rate {rates['float32'] / 1e9:,.0f} GFLOP/s "
              f"({figures['threads']} threads); {figures['bfloat16_tokens_per_s']:,.0f} tokens/s in bfloat16 (matmul {rates['bfloat16'] / 1e9:,.0f} GFLOP/s)")
    usual = (device, arguments.length, arguments.memory_length) == ("cpu", 512, 2048)
    return int(usual and (figures["time_ratio"] < 6 or figures["memory_ratio"] < 4))


if __name__ == "__main__":
    sys.exit(main())
