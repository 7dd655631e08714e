"""What a run does on a GPU. `make gpu-rehearsal` runs the same on the CPU, where a GPU's own faults cannot show, but the tests' can.

Sizes are small: on a GPU a case costs its compilation. Losses of two devices are compared in float32, whose sums differ in order only.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ctxnb.experiments import measure
from ctxnb.experiments.losses import next_token_losses
from ctxnb.experiments.schema import TrainSettings
from ctxnb.experiments.train import read_text, step_windows, train
from ctxnb.text.packing import Stream
from ctxnb.text.tokens import token_store

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = bool(os.environ.get("CTXNB_GPU_REHEARSAL"))
DEVICE = "cpu" if REHEARSAL else "cuda"
RUN = dict(
    train_tokens=6000, seed=3, context_length=16, max_context=16, segment_tokens=512, layers=2, heads=2, width=32, tokens_per_step=256,
    epochs=[0.5, 1.0], candidates=[[0.0, 0.1, 0.002]], dev_targets=2, test_targets=2, train_targets=4,
)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """120 documents of 1,200 random words, the frequent ones first."""
    words = ["".join(pair) for pair in zip(random.Random(0).choices("bdfgklmnprst", k=300), random.Random(1).choices(["an", "el", "ir", "os", "un"], k=300), strict=True)]
    chance, file = random.Random(2), tmp_path_factory.mktemp("text") / "words.jsonl"
    documents = (" ".join(chance.choices(words, [1 / (i + 1) for i in range(300)], k=1200)) for _ in range(120))
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


@pytest.fixture(scope="session")
def store(text, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTXNB_DATA", str(tmp_path_factory.mktemp("data")))
        yield token_store(str(text), "bytes")


def trained(store, folder, device: str, compile: bool = False, graph: bool = False, precision: str = "float32", **more) -> list[float]:
    """The losses of a run, see `losses`."""
    settings = RUN | dict(device=device, precision=precision) | more
    return losses(asdict(train(folder=folder, store=store, compile=compile, graph=graph, **settings)))


def losses(result: dict) -> list[float]:
    """Every loss of a run, in order."""
    return [*result["trial_train_loss"], *result["trial_dev_loss"], *result["context_loss"], result["block_loss"]]


def test_float32_gives_the_losses_of_the_cpu(store, tmp_path):
    ours, cpu = trained(store, tmp_path / "gpu", DEVICE), trained(store, tmp_path / "cpu", "cpu")
    assert ours == pytest.approx(cpu, abs=1e-4)


def test_bfloat16_is_within_its_error(store, tmp_path):
    """8 bits of mantissa are 0.4 % of a loss of 3 nats at one place, and less in a mean: 0.02 nats."""
    ours, exact = trained(store, tmp_path / "bf16", DEVICE, precision="bfloat16"), trained(store, tmp_path / "exact", DEVICE)
    assert ours == pytest.approx(exact, abs=2e-2) and ours != exact


@pytest.mark.skipif(REHEARSAL, reason="a compiler for the CPU may not be there")
def test_compiled_gives_the_losses_of_eager(store, tmp_path):
    compiled, eager = trained(store, tmp_path / "compiled", DEVICE, compile=True), trained(store, tmp_path / "eager", DEVICE)
    assert compiled == pytest.approx(eager, abs=1e-3)


@pytest.mark.skipif(REHEARSAL, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("windows", ["inside", "masked"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_graph_gives_the_losses_of_eager(store, tmp_path, windows, dropout):
    """Also with dropout, whose masks are drawn anew in each replay, from the seed of the step."""
    same = dict(windows=windows, candidates=[[dropout, 0.1, 0.002]])
    graph, eager = (trained(store, tmp_path / str(way), DEVICE, graph=way, **same) for way in (True, False))
    assert graph == pytest.approx(eager, abs=1e-3)


@pytest.mark.skipif(REHEARSAL, reason="CUDA graphs need a GPU")
def test_compiled_blocks_in_a_graph_give_the_losses_of_eager(store, tmp_path):
    both, eager = (trained(store, tmp_path / str(way), DEVICE, compile=way, graph=way) for way in (True, False))
    assert both == pytest.approx(eager, abs=1e-3)


@pytest.mark.parametrize("settings", [dict(), dict(windows="packed"), dict(windows="masked"), dict(blocks="mixed")])
def test_windows_gathered_on_the_device_are_those_of_the_store(store, settings):
    s = TrainSettings(**RUN | settings)
    text = read_text(s, store)
    stream = Stream(text.data, store.eod, DEVICE)
    for step in range(20):
        assert torch.equal(step_windows(s, text, step, stream).cpu(), torch.from_numpy(step_windows(s, text, step)))


def test_masked_training_never_takes_cudnn_attention(store, tmp_path, monkeypatch):
    """Its gradients are NaN with a mask where the length is 64 modulo 128 (PyTorch 2.11 to 2.13)."""
    allowed, plain = [], torch.nn.functional.scaled_dot_product_attention

    def noting(*arguments, **more):
        if torch.is_grad_enabled() and more.get("attn_mask") is not None:
            allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*arguments, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    usual = torch.backends.cuda.cudnn_sdp_enabled()
    trained(store, tmp_path, DEVICE, windows="masked", context_length=64, max_context=64, tokens_per_step=512, epochs=[1.0])
    assert allowed and not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled() == usual


@pytest.mark.parametrize("windows", ["inside", "packed", "masked"])
@pytest.mark.parametrize("length", [64, 128, 192, 256])
def test_windows_of_every_kind_give_the_losses_of_the_cpu(store, tmp_path, windows, length):
    """Also where cuDNN's attention gives NaN gradients with a mask: lengths of 64 modulo 128."""
    same = dict(windows=windows, context_length=length, max_context=256, tokens_per_step=768 if length == 192 else 512, epochs=[1.0])
    ours = trained(store, tmp_path / "gpu", DEVICE, precision="float32" if REHEARSAL else "bfloat16", **same)
    cpu = trained(store, tmp_path / "cpu", "cpu", **same)
    assert ours == pytest.approx(cpu, abs=3e-2)


SCRIPT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from ctxnb.experiments import measure
from ctxnb.experiments.losses import next_token_losses
from ctxnb.experiments.train import train
from ctxnb.text.tokens import open_store
store, folder, settings = sys.argv[1:]
print(json.dumps(asdict(train(folder=Path(folder), store=open_store(store, "bytes"), compile=False, graph=False, checkpoint_seconds=0.0, **json.loads(settings)))))
"""


def start(store, folder: Path, **more) -> subprocess.Popen:
    """A run in a process of its own."""
    settings = json.dumps(RUN | dict(device=DEVICE, precision="float32") | more)
    return subprocess.Popen([sys.executable, "-c", SCRIPT, store.folder, folder, settings], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def result_of(process: subprocess.Popen) -> dict:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def test_a_killed_run_resumes(store, tmp_path):
    longer = dict(epochs=[2.0, 20.0])
    killed = start(store, tmp_path / "killed", **longer)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("checkpoint*")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    resumed, whole = trained(store, tmp_path / "killed", DEVICE, **longer), trained(store, tmp_path / "whole", DEVICE, **longer)
    assert resumed == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("name, other", [("device", "cpu" if DEVICE == "cuda" else "cuda"), ("torch", "1.0")])
def test_a_checkpoint_of_another_device_or_torch_begins_anew_with_a_note(store, tmp_path, monkeypatch, caplog, name, other):
    monkeypatch.setattr("ctxnb.experiments.loop.Checkpoint.remove", lambda self: None)
    first = trained(store, tmp_path, DEVICE, checkpoint_seconds=0.0)
    (file,) = tmp_path.glob("checkpoint*")
    saved = torch.load(file, weights_only=True)
    torch.save(saved | {"identity": json.dumps(json.loads(saved["identity"]) | {name: other})}, file)
    with caplog.at_level("WARNING", logger="ctxnb"):
        again = trained(store, tmp_path, DEVICE)
    assert again == pytest.approx(first, abs=1e-4)
    assert "starting anew" in caplog.text and f"{name} = " in caplog.text


def test_two_runs_at_once_on_one_gpu(store, tmp_path):
    both = [start(store, tmp_path / name) for name in ("first", "second")]
    alone = trained(store, tmp_path / "alone", DEVICE)
    for process in both:
        assert losses(result_of(process)) == pytest.approx(alone, abs=1e-4)


FULL = pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("CUDA error: out of memory")])


@FULL
def test_full_memory_halves_the_micro_batch(store, tmp_path, monkeypatch, error):
    """Both wordings, in training and in its evaluation; the losses are those of a run with room."""
    plain, largest = next_token_losses, []

    def with_little_room(model, ids, **more):
        if ids[:, 1:].numel() > 100:
            raise error
        largest.append(ids[:, 1:].numel())
        return plain(model, ids, **more)

    room = trained(store, tmp_path / "room", DEVICE)
    monkeypatch.setattr("ctxnb.experiments.train.next_token_losses", with_little_room)
    monkeypatch.setattr("ctxnb.experiments.losses.next_token_losses", with_little_room)
    assert trained(store, tmp_path / "little", DEVICE) == pytest.approx(room, abs=1e-4)
    assert max(largest) == 64


@FULL
def test_measuring_on_a_gpu_gives_the_losses_of_the_cpu_also_where_memory_is_full(text, store, tmp_path, monkeypatch, error):
    plain, sizes = measure.measure_windows, []

    def with_little_room(*arguments, **more):
        sizes.append(arguments[4])
        if arguments[4] > 100:
            raise error
        return plain(*arguments, **more)

    trained(store, tmp_path, DEVICE)
    same = dict(model=str(tmp_path / "model"), corpus=str(text), context_length=16, max_context=16, split="test", targets_per_document=4, batch_tokens=256)
    cpu = measure.measure(tmp_path / "cpu", device="cpu", **same)
    monkeypatch.setattr(measure, "measure_windows", with_little_room)
    ours = measure.measure(tmp_path / "gpu", device=DEVICE, **same)
    assert sizes == [256, 128, 64]
    assert ours["target_loss"] == pytest.approx(cpu["target_loss"], abs=1e-4)
    assert ours["eigenvalues"] == pytest.approx(cpu["eigenvalues"], abs=1e-4 * cpu["eigenvalues"][0])


@pytest.mark.skipif(REHEARSAL, reason="the CPU's memory has no allocator that refuses")
def test_a_gpu_that_is_really_full(store, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        trained(store, tmp_path, DEVICE, tokens_per_step=2**18, micro_tokens=2**18, context_length=256, max_context=256, epochs=[100.0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_process_group_of_one(store):
    """Gradients averaged over a group of one are the gradients."""
    code = """
import torch, torch.distributed as group
backend, device = ("nccl", "cuda") if torch.cuda.is_available() else ("gloo", "cpu")
group.init_process_group(backend)
torch.manual_seed(0)
plain = torch.nn.Linear(8, 8).to(device)
wrapped = torch.nn.parallel.DistributedDataParallel(plain)
x = torch.ones(4, 8, device=device)
wrapped(x).square().mean().backward()
gradient = plain.weight.grad.clone()
plain.zero_grad()
plain(x).square().mean().backward()
torch.testing.assert_close(gradient, plain.weight.grad)
group.destroy_process_group()
print(backend)
"""
    environment = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("nccl" if torch.cuda.is_available() else "gloo")
