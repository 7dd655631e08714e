"""Ways to keep a GPU busy with small models: how a step gets to it, several runs at once, seeds as one batched model, windows with document borders.

Run `python bench/bench_ways.py --device cuda` on a GPU; on a CPU (the default) the same code runs at tiny sizes, as a rehearsal. Three parts, each result
printed as it comes, as a JSON object with all so far:

1. Ways of a step, on the shape of `data/grids/standard/train.toml` (14 M): eager, recorded as a CUDA graph, compiled, both (`ctxnb.experiments.graph`), and `--seeds`
   models as one, stacked and mapped over by `torch.func`, with and without a graph. `first_s` is the time until the first step is done, with compilation or recording.
   `best` is the way with which a run of `--updates` steps is over first. A way that fails, or whose first loss differs from the eager one by more than 0.02, is named and left out.
2. Several runs at once in the best way, for 1 M, 4 M and 14 M parameters: tokens/s of all together, and the ratio to one alone, which is that of runs per hour (aim 4).
3. Windows of 1,024 tokens in which documents end: attention with an l x l mask (what a run does), FlexAttention, and variable-length attention.

Every measurement has a process of its own, forked from one that has imported the libraries, so that a way that breaks CUDA breaks nothing else.
"""
import argparse
import inspect
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AttentionInterface

from ctxnb.experiments.graph import STEP_WAYS, RecordedPass
from ctxnb.experiments.losses import autocast, next_token_losses
from ctxnb.experiments.schema import TrainSettings
from ctxnb.experiments.train import BlockLoss, adamw, compile_blocks, record, update
from ctxnb.models.gpt import gpt, gpt_config, without_mask
from ctxnb.text.packing import document_positions
from ctxnb.text.windows import micro_batches

SHAPES = {  # layers, heads, width, vocabulary, context length, tokens a step
    "1 M": (4, 4, 128, 1024, 256, 16_384), "4 M": (6, 8, 224, 2048, 256, 16_384), "14 M": (6, 6, 384, 8192, 256, 16_384),
    "tiny": (1, 2, 16, 257, 16, 128), "tiny, borders": (1, 2, 16, 257, 32, 128), "14 M, borders": (6, 6, 384, 8192, 1024, 16_384),
}
MICRO = 16_384  # tokens at once
TOLERANCE = 2e-2  # nats, in bfloat16


def parts_of(shape: tuple, device: str) -> tuple:
    """Model, settings and windows of one step; in the borders' shapes a document ends at one token in 300."""
    layers, heads, width, vocabulary, length, tokens = shape
    model = gpt(gpt_config(vocabulary, layers, heads, width, length), seed=0).to(device)
    settings = TrainSettings(context_length=length, max_context=length, segment_tokens=0, tokens_per_step=tokens)
    ids = torch.randint(1, vocabulary, (tokens // length, length + 1), generator=torch.Generator().manual_seed(0))
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 1 / 300] = 0
    return model, settings, ids.to(device)


def one(shape: tuple, device: str, way: str) -> Callable[[], float]:
    """A step of one model in one of `STEP_WAYS`, as a run makes it."""
    model, settings, ids = parts_of(shape, device)
    compile, graph = STEP_WAYS[way]
    loss_of, optimizer, parts = BlockLoss(without_mask(model), settings), adamw(model, 1e-4, 0.1, settings), micro_batches(len(ids), shape[4], MICRO)
    if compile:
        compile_blocks(model)
    recorded = record(loss_of, ids, parts, bf16=True) if graph else None
    return lambda: update(loss_of, optimizer, ids, parts, bf16=device == "cuda", recorded=recorded).item()


def batched(shape: tuple, device: str, seeds: int, graph: bool) -> Callable[[], float]:
    """A step of several models as one: stacked weights, windows of their own, gradients clipped for each; returns the first one's loss."""
    base, settings, ids = parts_of(shape, device)
    without_mask(base)
    models = [without_mask(gpt(base.config, seed).to(device)) for seed in range(seeds)]
    weights, buffers = torch.func.stack_module_state(models)
    several = torch.stack([ids.roll(seed, 0) for seed in range(seeds)])
    trained = [weight for weight in weights.values() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), fused=True)

    class Loss(torch.nn.Module):
        """What `functional_call` calls with one model's weights."""

        def __init__(self) -> None:
            super().__init__()
            self.model = base

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return next_token_losses(self.model, ids).mean()

    module = Loss()

    def losses(several: torch.Tensor) -> torch.Tensor:
        def loss(weights: dict, buffers: dict, ids: torch.Tensor) -> torch.Tensor:
            named = {f"model.{name}": value for name, value in (weights | buffers).items()}
            return torch.func.functional_call(module, named, (ids,))

        with autocast(several.device, device == "cuda"):
            return torch.func.vmap(loss, randomness="different")(weights, buffers, several)

    recorded = RecordedPass(lambda ids: losses(ids).sum(), several, trained) if graph else None

    def step() -> float:
        if recorded:
            recorded.begin()
            total = recorded(several) / seeds
        else:
            each = losses(several)
            each.sum().backward()
            total = each.detach()[0]
        norms = torch.stack([w.grad.flatten(1).norm(dim=1) for w in trained]).norm(dim=0)
        scale = (1.0 / (norms + 1e-6)).clamp(max=1.0)
        for weight in trained:
            weight.grad.mul_(scale.view(-1, *[1] * (weight.ndim - 1)))
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


BORDERS: dict = {}  # what variable-length attention has to know beside its tensors


def varlen(module, query, key, value, attention_mask, scaling=None, **more):
    """Attention of `transformers`' form over documents laid end to end."""
    from torch.nn.attention.varlen import varlen_attn

    causal = {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {"window_size": (-1, 0)}
    batch, _, length, _ = query.shape
    packed = [part.transpose(1, 2).flatten(0, 1).contiguous() for part in (query, key, value)]
    out = varlen_attn(*packed, BORDERS["ends"], BORDERS["ends"], length, length, scale=scaling, **causal)
    return out.unflatten(0, (batch, length)), None


AttentionInterface.register("varlen", varlen)


def bordered(shape: tuple, device: str, way: str) -> Callable[[], float]:
    """A step with windows in which documents end (id 0)."""
    model, settings, ids = parts_of(shape, device)
    optimizer, parts = adamw(model, 1e-4, 0.1, settings), micro_batches(len(ids), shape[4], MICRO)
    masked = BlockLoss(model, settings, eod=0)
    if way != "mask":
        model.set_attn_implementation({"flex": "flex_attention"}.get(way, way))

    class Loss(torch.nn.Module):
        """Notes the borders, then computes the loss of a run."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = masked

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if way == "varlen":
                flat = document_positions(ids[:, :-1], 0).flatten()
                starts = (flat == 0).nonzero().flatten().int()
                BORDERS["ends"] = torch.cat([starts, starts.new_tensor([len(flat)])])
            return self.inner(ids)

    loss_of = Loss()
    return lambda: update(loss_of, optimizer, ids, parts, bf16=device == "cuda").item()


MAKERS = {"one": one, "batched": batched, "bordered": bordered}


def measured(maker: str, arguments: tuple, steps: int, barrier, queue) -> None:
    """What a process of its own does: make a step, warm up, wait for the others, time; the answer goes into the queue."""
    try:
        torch.set_num_threads(max(1, torch.get_num_threads() // barrier.parties))
        began = time.perf_counter()
        step = MAKERS[maker](*arguments)
        loss = step()
        first = time.perf_counter() - began
        step()
        barrier.wait(timeout=180)
        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
        queue.put({"first_loss": loss, "first_s": first, "step_s": statistics.median(taken), "total_s": sum(taken)})
    except Exception as error:  # whatever a way may raise; the others go on
        barrier.abort()
        queue.put({"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"})


def together(context, runs: int, maker: str, arguments: tuple, steps: int) -> list[dict]:
    """The answers of several equal processes at once."""
    barrier, queue = context.Barrier(runs), context.Queue()
    processes = [context.Process(target=measured, args=(maker, arguments, steps, barrier, queue)) for _ in range(runs)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    return answers


def row_of(answers: list[dict], tokens: int, **about) -> dict:
    """One line of the report: rates of all processes together, or why there are none."""
    if failed := next((answer["failed"] for answer in answers if "failed" in answer and "BrokenBarrier" not in answer["failed"]), None):
        return about | {"failed": failed}
    rate = sum(tokens / answer["step_s"] for answer in answers)
    return about | {"tokens_per_s": rate, "first_s": max(a["first_s"] for a in answers), "step_s": answers[0]["step_s"], "first_loss": answers[0]["first_loss"]}


def ways_of_a_step(context, arguments, note) -> str:
    """Part 1; returns the best way."""
    name, device = ("14 M", "cuda") if arguments.device == "cuda" else ("tiny", "cpu")
    shape, usable = SHAPES[name], {}
    names = [*STEP_WAYS, "batched", "batched+graph"] if device == "cuda" else ["eager", "batched"]
    exact = None
    for way in names:
        seeds = arguments.seeds if "batched" in way else 1
        how = ("one", (shape, device, way)) if way in STEP_WAYS else ("batched", (shape, device, seeds, "graph" in way))
        row = row_of(together(context, 1, *how, arguments.steps), shape[5] * seeds, shape=name, way=way, seeds=seeds)
        if "failed" not in row and "batched+" not in way:  # that one's loss is the mean over its models
            exact = row["first_loss"] if exact is None else exact
            if abs(row["first_loss"] - exact) > TOLERANCE:
                row["failed"] = f"first loss {row['first_loss']:.4f}, eager {exact:.4f}"
        if "failed" not in row and way in STEP_WAYS:
            usable[way] = row["run_s"] = row["first_s"] + arguments.updates * row["step_s"]
        note(row)
    return min(usable, key=usable.get) if usable else "eager"


def runs_at_once(context, arguments, way: str, note) -> None:
    """Part 2."""
    for name in ("14 M", "4 M", "1 M") if arguments.device == "cuda" else ("tiny",):
        shape, alone = SHAPES[name], None
        for runs in (1, *arguments.share):
            row = row_of(together(context, runs, "one", (shape, arguments.device, way), arguments.steps), shape[5], shape=name, way=way, runs=runs)
            if "failed" not in row:
                alone = row["tokens_per_s"] if runs == 1 else alone
                row |= {"ratio_to_one": row["tokens_per_s"] / alone} if alone and runs > 1 else {}
            note(row)


def borders(context, arguments, note) -> None:
    """Part 3."""
    name = "14 M, borders" if arguments.device == "cuda" else "tiny, borders"
    for way in ("mask", "flex", "varlen") if arguments.device == "cuda" else ("mask",):
        note(row_of(together(context, 1, "bordered", (SHAPES[name], arguments.device, way), arguments.steps), SHAPES[name][5], shape=name, way=way))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="steps timed of each way")
    parser.add_argument("--updates", type=int, default=1400, help="steps of a run for which the best way is chosen; the grid's mean")
    parser.add_argument("--share", type=int, nargs="*", default=[2, 4, 8], help="runs at once")
    parser.add_argument("--seeds", type=int, default=4, help="models in one batch")
    parser.add_argument("--ways-only", action="store_true", help="part 1 alone")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ctxnb.experiments.train"])
    report = {"updates": arguments.updates, "results": []}

    def note(row: dict) -> None:
        report["results"].append(row)
        print(json.dumps(report), flush=True)

    report["best"] = ways_of_a_step(context, arguments, note)
    print(json.dumps(report), flush=True)
    if not arguments.ways_only:
        runs_at_once(context, arguments, report["best"], note)
        borders(context, arguments, note)
    if all("failed" in row for row in report["results"]):
        raise SystemExit("every way failed")


if __name__ == "__main__":
    main()
