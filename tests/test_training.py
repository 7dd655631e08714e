"""What the training notebooks can't show: kill -9, properties over many inputs, a corpus of one's own."""

import ast
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ctxnb.cli import main
from ctxnb.experiments.loop import TrainingDiverged
from ctxnb.experiments.losses import evaluate, next_token_losses
from ctxnb.experiments.schema import CountSettings, FeatureSettings, SyntheticSettings, TrainSettings, check_text
from ctxnb.experiments.train import CHECKPOINT, MODEL, train
from ctxnb.models.gpt import gpt, gpt_config
from ctxnb.paths import project_root
from ctxnb.text.tokens import token_store
from ctxnb.text.windows import Windows, draw_targets, micro_batches, subset, target_weights

CONTEXTS = [4, 8, 16, 32, 64, 128]
TINY = dict(
    train_tokens=20_000, seed=3, segment_tokens=1024, layers=1, heads=2, width=16, tokens_per_step=256, epochs=[0.4, 0.8],
    candidates=[[0.0, 0.1, 0.004], [0.2, 0.5, 0.004]], dev_targets=2, test_targets=4, train_targets=50, precision="float32", device="cpu",
)  # fmt: skip
ONE = TINY | dict(epochs=[0.8], candidates=[[0.0, 0.1, 0.004]])
CLOCK = {"train_seconds", "eval_seconds", "tokens_per_s", "peak_memory_mb"}


@pytest.fixture(scope="module")
def store():
    return token_store(corpus="sotu", tokenizer="bytes")


def timeless(result) -> dict:
    """All of a result but clocks and memory."""
    return {name: value for name, value in (result if isinstance(result, dict) else vars(result)).items() if name not in CLOCK}


# --- data ---------------------------------------------------------------------------------------------------


def positions(piece) -> np.ndarray:
    return np.concatenate([np.arange(s, s + n) for s, n in zip(piece.starts, piece.lengths)])


@given(
    d=st.integers(2, 200_000), more=st.integers(0, 200_000), seed=st.integers(0, 2**31), segment=st.sampled_from([0, 2, 700, 2048])
)
@settings(max_examples=40, deadline=None)
def test_subsets_are_exact_nested_and_of_the_training_split(store, d, more, seed, segment):
    small, large = (positions(subset(store, n, seed, segment)) for n in (d, d + more))
    assert len(set(small)) == len(small) == d
    assert (large[:d] == small).all()
    documents = np.searchsorted(store.offsets, large, side="right") - 1
    assert set(documents) <= set(store.documents("train"))
    assert not set(documents) & (set(store.documents("dev")) | set(store.documents("test")))


def test_the_whole_training_split_and_not_a_token_more(store):
    everything = store.n_tokens("train")
    assert subset(store, everything, seed=0, segment_tokens=2048).n_tokens == everything
    with pytest.raises(ValueError, match=f"{everything + 1:,}.*training split"):
        subset(store, everything + 1, seed=0)


@given(windows=st.integers(1, 500), l=st.integers(1, 300), micro=st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_micro_batches_are_equal_and_fit(windows, l, micro):
    parts = micro_batches(windows, l, micro)
    assert windows % parts == 0
    assert windows // parts * l <= micro or parts == windows


@given(tokens=st.integers(1, 10_000), l=st.integers(1, 600), objective=st.sampled_from(["all", "tail", "last"]), targets=st.booleans())
@settings(max_examples=200, deadline=None)
def test_equal_tokens_or_targets_per_step_or_a_clear_error(tokens, l, objective, targets):
    how = dict(context_length=l, max_context=600, objective=objective) | {"targets_per_step" if targets else "tokens_per_step": tokens}
    each = {"all": l, "tail": -(-l // 4), "last": 1}[objective] if targets else l
    if tokens % each == 0 and tokens >= each:
        assert TrainSettings(**how).step_windows(l) * each == tokens
    else:
        with pytest.raises(ValueError, match="is no multiple of"):
            TrainSettings(**how)


@pytest.mark.parametrize("l", CONTEXTS)
def test_windows_stay_inside_pieces_and_depend_on_seed_and_step_only(store, l):
    data = subset(store, 5_000, seed=1, segment_tokens=700)
    inside = {text for s, n in zip(data.starts, data.lengths) for text in crops(store.tokens[s : s + n], l + 1)}
    draw = Windows(data, l).draw(2000, seed=1, step=5)
    assert {row.tobytes() for row in draw.astype(np.uint16)} <= inside
    assert (draw == Windows(data, l).draw(2000, seed=1, step=5)).all()
    assert (draw != Windows(data, l).draw(2000, seed=1, step=6)).any()


def crops(tokens, n):
    return [np.asarray(tokens[i : i + n], dtype=np.uint16).tobytes() for i in range(len(tokens) - n + 1)]


def test_window_frequencies_are_the_stated_edge_effect(store):
    data = subset(store, 60, seed=0)
    windows = Windows(data, context_length=16)
    n = 40_000
    rng_rows = windows.draw(n, seed=0, step=0)
    starts = {crop: i for i, crop in enumerate(crops(store.tokens[data.starts[0] :][:60], 17))}
    assert len(starts) == len(windows)  # no crop occurs twice, so a row tells where it was cut
    count = np.zeros(60)
    for row in rng_rows.astype(np.uint16):
        count[starts[row.tobytes()] + 1 :][:16] += 1
    expected = target_weights(60, 16) * n / len(windows)
    # a token's count is binomial; 6 standard deviations for 60 of them
    assert (np.abs(count - expected) < 6 * np.sqrt(np.maximum(expected, 1))).all()


def test_targets_are_the_same_for_every_context_length(store):
    targets = draw_targets(store, "test", max_context=128, per_document=50)
    last = {l: targets.windows(store, l) for l in CONTEXTS}
    for l in CONTEXTS:
        assert (last[l] == last[128][:, 128 - l :]).all()
    assert targets.position.min() >= 128
    assert set(targets.document) == set(store.documents("test"))
    assert max(np.bincount(targets.document)) == 50
    again = draw_targets(store, "test", max_context=128, per_document=50)
    assert (again.position == targets.position).all()
    assert (draw_targets(store, "test", 128, 50, seed=1).position != targets.position).any()


# --- measuring ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l", [1, 4, 32, 128])
def test_exact_context_loss_equals_one_forward_per_target(store, l):
    targets = draw_targets(store, "dev", max_context=128, per_document=2)
    model = gpt(gpt_config(store.vocab_size, layers=2, heads=2, width=32, max_context=128), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)  # away from a uniform prediction
    direct = []
    for document, position in zip(targets.document, targets.position):
        text = torch.from_numpy(store.document(document)[position - l : position + 1].astype(np.int64))
        with torch.no_grad():
            direct.append(-model(text[None, :-1]).logits[0, -1].log_softmax(-1)[text[-1]].item())
    measured = [evaluate(model, store, targets, l, batch_tokens=b, positions=p) for b in (1, 1000) for p in (True, False)]
    for evaluation in measured:
        assert evaluation.loss == pytest.approx(np.mean(direct), abs=1e-5)


def test_shuffling_moves_the_far_tokens_and_no_others(store, monkeypatch):
    targets = draw_targets(store, "test", max_context=128, per_document=20)
    model = gpt(gpt_config(store.vocab_size, layers=1, heads=2, width=16, max_context=128), seed=0)
    seen = []

    def look(model, ids, last=None):
        seen.append(ids.numpy().copy())
        return torch.zeros(len(ids), 1)

    monkeypatch.setattr("ctxnb.experiments.losses.next_token_losses", look)
    for batch in (64, 10**6):  # the order does not depend on how targets are batched
        evaluate(model, store, targets, 32, batch_tokens=batch, shuffled=20)
    whole, plain = seen[-1], targets.windows(store, 32)
    assert (np.concatenate(seen[:-1]) == whole).all()
    assert (whole[:, 20:] == plain[:, 20:]).all()
    assert (np.sort(whole[:, :20]) == np.sort(plain[:, :20])).all()
    # 20 letters fall into the order they had with a chance of less than 1e-6 in any ordinary text
    assert (whole[:, :20] != plain[:, :20]).any(axis=1).all()


# --- training -----------------------------------------------------------------------------------------------


def test_schedule_and_tokens_do_not_depend_on_context_length(store, tmp_path):
    short = ONE | dict(epochs=[0.1])
    runs = [train(context_length=l, folder=tmp_path / str(l), store=store, **short) for l in (4, 32, 128)]
    for name in ("steps", "tokens_seen", "chosen_epochs", "parameters", "document", "document_targets"):
        assert getattr(runs[0], name) == getattr(runs[1], name) == getattr(runs[2], name), name
    for run, l in zip(runs, (4, 32, 128)):
        assert len(run.position_loss) == l
        assert run.bits_per_byte == pytest.approx(run.loss / np.log(2))
        json.dumps(vars(run), allow_nan=False)


def test_the_folder_is_the_model(store, tmp_path):
    result = train(context_length=16, folder=tmp_path, store=store, **TINY)
    assert [f.name for f in tmp_path.iterdir()] == [MODEL]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / MODEL)
    test = draw_targets(store, "test", 128, TINY["test_targets"])
    assert evaluate(model, store, test, 16).loss == pytest.approx(result.loss, abs=1e-4)
    dev = draw_targets(store, "dev", 128, TINY["dev_targets"])
    assert evaluate(model, store, dev, 16).loss == pytest.approx(result.dev_loss, abs=1e-4)  # the chosen one
    assert model.config.ctxnb["context_length"] == 16
    assert result.eval_context == [1, 2, 4, 8, 16]
    for visible, loss in zip(result.eval_context, result.context_loss):
        assert evaluate(model, store, test, visible).loss == pytest.approx(loss, abs=1e-4)
    assert evaluate(model, store, test, 16, shuffled=8).loss == pytest.approx(result.shuffled_loss, abs=1e-4)


RUN = """
import json, sys
from ctxnb.experiments.train import train
arguments = json.loads(sys.argv[1])
print(json.dumps(vars(train(checkpoint_seconds=0, **arguments))))
"""


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_kill_and_resume_is_bit_for_bit_the_uninterrupted_run(store, tmp_path, average):
    """Killed in different legs of the search; dropout masks, branches and averages are those of the run that was not."""
    long = TINY | dict(context_length=16, epochs=[4.0, 8.0], average=average)
    whole = train(folder=tmp_path / "whole", store=store, **long)

    def start(folder):
        command = [sys.executable, "-c", RUN, json.dumps(long | {"folder": str(folder)})]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"TQDM_DISABLE": "1"})

    folder, legs = tmp_path / "killed", []
    for trials in (0, 1):  # finished trials at which to kill
        process = start(folder)
        while process.poll() is None and (state(folder) is None or len(state(folder)["trials"]) < trials):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            legs.append(state(folder)["leg"].get("key"))
    assert len(legs) == 2, "the runs ended before they could be killed"
    output, _ = start(folder).communicate(timeout=120)
    assert timeless(json.loads(output)) == timeless(whole)
    a, b = (load_file(f / MODEL / "model.safetensors") for f in (folder, tmp_path / "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [f.name for f in folder.iterdir()] == [MODEL]


def state(folder: Path) -> dict | None:
    """What the checkpoint holds."""
    try:
        return torch.load(folder / CHECKPOINT, weights_only=True)["state"]
    except FileNotFoundError:
        return None


def test_a_candidate_that_has_turned_does_not_go_on(store, tmp_path):
    """600 bytes are overfitted within some epochs; the longest budgets are then not tried, and the best trial is the result."""
    tiny = ONE | dict(train_tokens=600, segment_tokens=0, width=32, epochs=[5.0, 10.0, 20.0, 40.0, 80.0, 160.0], candidates=[[0.0, 0.0, 0.02]])
    result = train(context_length=8, folder=tmp_path, store=store, **tiny)
    assert len(result.trial_epochs) < 6 and not result.schedule_bound
    assert result.trial_dev_loss[-1] > result.trial_dev_loss[-2]
    assert result.dev_loss == min(result.trial_dev_loss)
    assert result.chosen_epochs == result.trial_epochs[int(np.argmin(result.trial_dev_loss))]


def test_a_branch_is_the_run_of_its_budget_alone(store, tmp_path):
    """The first budget of several is trained as if it were the only one: same warm-up, same windows, same annealing."""
    alone, first = (train(context_length=16, folder=tmp_path / str(len(e)), store=store, **ONE | {"epochs": e}) for e in ([0.8], [0.8, 1.6]))
    assert first.trial_dev_loss[0] == alone.dev_loss
    assert first.steps_done < alone.steps + 2 * alone.steps  # the trunk is shared


def test_mixed_blocks_and_objectives_change_what_is_trained_on(store, tmp_path):
    runs = {
        name: train(context_length=32, folder=tmp_path / name, store=store, **ONE | how)
        for name, how in {"all": {}, "mixed": {"blocks": "mixed"}, "tail": {"objective": "tail"}, "last": {"objective": "last"}}.items()
    }
    assert len({run.loss for run in runs.values()}) == 4
    assert {name: run.targets_seen / run.tokens_seen for name, run in runs.items()} == {"all": 1, "mixed": 1, "tail": 1 / 4, "last": 1 / 32}
    assert runs["last"].exposure_share == [0, 0, 0, 0, 0, 1] and runs["tail"].exposure_share[:4] == [0, 0, 0, 0]
    assert runs["mixed"].exposure_share[0] > runs["all"].exposure_share[0]
    equal = train(context_length=32, folder=tmp_path / "equal", store=store, **ONE | {"objective": "tail", "targets_per_step": 256})
    assert (equal.targets_seen, equal.tokens_seen) == (runs["all"].targets_seen, 4 * runs["all"].tokens_seen)


@pytest.mark.parametrize("learning_rate", [50.0, 1e30])
def test_divergence_is_named(store, tmp_path, learning_rate):
    with pytest.raises(TrainingDiverged, match=r"loss .* step .*learning rate .*context_length = 16"):
        train(context_length=16, folder=tmp_path, store=store, **ONE | {"candidates": [[0.0, 0.1, learning_rate]]})
    assert not (tmp_path / MODEL).exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context_length": 0}, "context_length = 0"),
        ({"context_length": 256}, "exceeds max_context = 128"),
        ({"tokens_per_step": 300}, "no multiple of context_length = 16: expected for example 288 or 304"),
        ({"heads": 3}, "width = 16 with heads = 3"),
        ({"train_tokens": 10**9}, "the size of the training split"),
        ({"segment_tokens": 16}, "can't hold a window of context_length"),
        ({"max_context": 10**8, "test_targets": 1}, "no document of the dev split"),
        ({"candidates": [[0.0, 0.1, 0.0]]}, "learning rate above 0"),
        ({"candidates": [[0.0, 0.1, float("inf")]]}, "candidates = inf"),
        ({"epochs": []}, "epochs = ..: expected a list with at least one value"),
        ({"seed": True}, "seed = True"),
        ({"device": "gpu"}, "expected auto, cpu or cuda"),
        ({"windows": "sliding"}, "expected inside, packed or masked"),
        ({"windows": "packed", "train_tokens": 16, "context_length": 64, "segment_tokens": 8}, "exceeds the packed training subset"),
        ({"processes": 3}, "can't share equally the 16 windows of a step"),
        ({"processes": -1}, "processes = -1"),
        ({"corpus": "sotuu"}, "sotu"),
    ],
)
def test_bad_settings_are_refused_before_any_work(store, tmp_path, change, message):
    arguments = dict(context_length=16) | TINY | change
    with pytest.raises(ValueError, match=message):
        train(folder=tmp_path / "run", store=None if "corpus" in change else store, **arguments)
    assert not (tmp_path / "run").exists()


def test_unknown_settings_are_refused(tmp_path):
    with pytest.raises(TypeError, match="contxt_length"):
        train(folder=tmp_path, contxt_length=16, **ONE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(store, tmp_path):
    with pytest.raises(RuntimeError, match="sees no GPU"):
        train(context_length=16, folder=tmp_path / "run", store=store, **TINY | {"device": "cuda"})
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_run_is_refused(store, tmp_path, monkeypatch):
    draw = Windows.draw
    monkeypatch.setattr(Windows, "draw", lambda self, n, seed, step: draw(self, n, seed, step) if step < 55 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(context_length=16, folder=tmp_path, store=store, checkpoint_seconds=0, **ONE)
    with pytest.raises(ValueError, match="seed = 3 there, 4 here"):
        train(context_length=16, folder=tmp_path, store=store, **ONE | {"seed": 4})
    assert (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("template, record", [("train", TrainSettings), ("synthetic", SyntheticSettings),
                                              ("synthetic_features", FeatureSettings), ("counts", CountSettings)])
def test_a_templates_parameters_are_its_settings(template, record):
    """Names, defaults and comments of the parameters cell come from the dataclass."""
    cells = nbformat.read(Path(__file__).parents[1] / f"nbs/runs/{template}.ipynb", 4).cells
    (cell,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    defaults = record()
    for line, part in zip(cell.splitlines(), fields(record), strict=True):
        assignment, comment = line.split("  # ", 1)
        name, value = assignment.split(" = ", 1)
        assert (name, ast.literal_eval(value), comment) == (part.name, getattr(defaults, part.name), part.metadata["about"])


def test_warnings_about_a_text(store):
    """Too few targets are named with the number that would do; text that windows can't use with the share that they can."""
    few = check_text(TrainSettings(test_targets=2), store)
    assert len(few) == 1 and "52 test targets in 26 documents" in few[0]
    cut = check_text(TrainSettings(segment_tokens=20, train_tokens=30), store)  # a piece of 20 and one of 10, windows of 17
    assert any(line.startswith("context_length = 16 can use 67% of the 30") for line in cut)
    assert not any("can use" in line for line in check_text(TrainSettings(segment_tokens=20, train_tokens=30, windows="packed"), store))


def test_large_vocabulary_is_measured_in_chunks(store, monkeypatch):
    """The logits held at once stay below the limit, and the result does not depend on it."""
    targets = draw_targets(store, "dev", max_context=16, per_document=1)
    model = gpt(gpt_config(store.vocab_size, layers=1, heads=1, width=8, max_context=16), seed=0)
    whole = evaluate(model, store, targets, 16, positions=True)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, given, logits: sizes.append(logits.numel()))
    monkeypatch.setattr("ctxnb.experiments.losses._LOGITS", 10 * store.vocab_size)
    chunked = evaluate(model, store, targets, 16, positions=True)
    assert max(sizes) <= 10 * store.vocab_size
    assert chunked.loss == pytest.approx(whole.loss, abs=1e-6)
    assert chunked.position_loss == pytest.approx(whole.position_loss, abs=1e-6)


def test_large_vocabulary_is_trained_in_chunks(store, monkeypatch):
    """Gradients are those of all logits at once, while no more than the limit of them is held."""
    ids = torch.from_numpy(Windows(subset(store, 2_000, 0), 16).draw(8, seed=0, step=0))
    gradients, sizes = [], []
    for limit in (2**27, 10 * store.vocab_size):
        monkeypatch.setattr("ctxnb.experiments.losses._LOGITS", limit)
        model = gpt(gpt_config(store.vocab_size, layers=1, heads=1, width=8, max_context=16), seed=0)
        model.lm_head.register_forward_hook(lambda module, given, logits: sizes.append(logits.numel()))
        next_token_losses(model, ids).mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]))
    assert sizes[0] == 8 * 16 * store.vocab_size
    assert max(sizes[1:]) <= 10 * store.vocab_size
    assert len(sizes) == 1 + 2 * 13  # 128 tokens in tens, in the forward and again in the backward pass
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_windows_across_documents_are_another_run(store, tmp_path):
    """Packed windows train on other text than those inside; the mask then changes what is seen, not what is drawn."""
    short = ONE | dict(epochs=[0.25], segment_tokens=100, context_length=64, store=store)
    losses = {kind: train(folder=tmp_path / kind, windows=kind, **short).trial_train_loss for kind in ("inside", "packed", "masked")}
    assert len({loss for (loss,) in losses.values()}) == 3
    # each loss is near that of a model of frequencies, 3.0 nats; what attention adds in 20 steps is small
    assert losses["packed"] == pytest.approx(losses["masked"], abs=0.05)


# --- several processes --------------------------------------------------------------------------------------

GROUP = ONE | dict(context_length=16, epochs=[0.08, 0.16], micro_tokens=64)


def losses_of(run) -> list[float]:
    return [*run.trial_train_loss, *run.trial_dev_loss, run.loss]


def test_two_processes_are_one_run(tmp_path):
    """Losses of every evaluation agree: windows, micro-batches, gradient means and clipping are those of one process."""
    logger, handler = logging.getLogger("ctxnb"), logging.FileHandler(tmp_path / "log.txt")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        one, two = (train(folder=tmp_path / str(n), processes=n, **GROUP) for n in (1, 2))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert (one.group_size, two.group_size) == (1, 2)
    # sums in another order: 1e-7 of a loss at first, which a dozen updates do not carry beyond 1e-5
    assert losses_of(two) == pytest.approx(losses_of(one), abs=2e-5)
    assert [f.name for f in (tmp_path / "2").iterdir()] == [MODEL]
    assert (tmp_path / "log.txt").read_text().count("13 steps: train") == 2  # by one process of each run
    plain = {name for name, value in vars(one).items() if not isinstance(value, (float, list))} - {"group_size"}
    assert {name: getattr(two, name) for name in plain} == {name: getattr(one, name) for name in plain}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_group_leaves_no_process_and_a_checkpoint(tmp_path, how):
    long = ONE | dict(context_length=16, epochs=[250.0])
    command = [sys.executable, "-c", RUN, json.dumps(long | {"folder": str(tmp_path), "processes": 2})]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while state(tmp_path) is None:
            assert launcher.poll() is None and time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.05)
        members = psutil.Process(launcher.pid).children(recursive=True)
        if how == signal.SIGINT:
            os.killpg(launcher.pid, how)  # as a terminal and Jupyter do it
        else:
            launcher.send_signal(how)
        _, said = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert len(members) >= 2
    assert how == signal.SIGKILL or "KeyboardInterrupt" in said.splitlines()  # Python may speak of leaked semaphores after it
    _, alive = psutil.wait_procs(members, timeout=30)
    assert not alive, "members outlived their launcher"
    assert 0 < state(tmp_path)["leg"]["progress"]["step"] < 15_000
    with pytest.raises(ValueError, match="clip = 1.0 there, 2.0 here"):  # it would have been resumed otherwise
        train(folder=tmp_path, **long | {"clip": 2.0})


def test_what_fails_in_a_group_is_said(tmp_path):
    with pytest.raises(RuntimeError, match="process . of the group failed: .*TrainingDiverged: .*loss .* step .*learning rate"):
        train(folder=tmp_path, processes=2, **GROUP | {"candidates": [[0.0, 0.1, 1e30]], "epochs": [0.8]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_noted_by_plan_and_refused_by_run_before_any_work(tmp_path):
    arguments = [str(project_root() / "data/grids/quick/synthetic.toml"), "--only", "seed=0", "--only", "train_samples=2000", "--set", "device=cuda", "--runs-dir", str(tmp_path)]
    planned, started = (CliRunner().invoke(main, [command, *arguments]) for command in ("plan", "run"))
    assert planned.exit_code == 0 and "device = 'cuda': this machine shows no GPU" in planned.output
    assert started.exit_code == 2 and "7 runs can't be computed on this machine" in started.output and "context_length=32 seed=0: device = 'cuda'" in started.output
    assert not list(tmp_path.iterdir())
