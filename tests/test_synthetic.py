"""What the synthetic notebooks can't show: properties over many task sets, kill -9, bad task files at the command line."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxnb.batch.grid import read_grid
from ctxnb.experiments.synthetic import CHECKPOINT, MODEL, evaluate, load_model, on_plateau, train
from ctxnb.experiments.synthetic_features import feature_report, held_out_error, line_r2
from ctxnb.models.xor import MODELS, make_model, mask_beyond
from ctxnb.text.xor_strings import Samples, draw, permuted_bits, split, string_count
from ctxnb.text.xor_tasks import TaskSet, power_tasks, read_tasks, task_set, write_tasks

PROJECT = Path(__file__).parents[1]
SMALL = dict(
    tasks="xor-small", train_samples=2000, seed=1, width=32, middle_width=16, head_width=16, batch=200, learning_rate=3e-3, eval_steps=10,
    patience=1000, plateau_patience=25, epochs=12, min_steps=0, dev_samples=300, test_samples=500, device="cpu",
)  # fmt: skip
CLOCK = {"train_seconds", "eval_seconds", "samples_per_s"}


@st.composite
def task_sets(draw_from):
    """Small sets with tasks inside and beyond their strings."""
    bits = draw_from(st.integers(2, 6))
    reach = bits + draw_from(st.integers(0, 2))
    possible = [(far, near) for far in range(2, reach + 1) for near in range(1, far)]
    pairs = draw_from(st.lists(st.sampled_from(possible), min_size=1, max_size=5, unique=True))
    weights = np.array(draw_from(st.lists(st.integers(1, 9), min_size=len(pairs), max_size=len(pairs))), float)
    return TaskSet(name="drawn", bits=bits, reach=reach, pairs=pairs, frequencies=(weights / weights.sum()).tolist())


def enumerated(tasks: TaskSet, l: int) -> tuple[float, float, int]:
    """Risk, accuracy and number of certain tasks from all strings of the full reach: nothing of XOR is used but the labels."""
    strings = list(itertools.product([0, 1], repeat=tasks.reach))
    risk = accuracy = 0.0
    certain = 0
    for (far, near), p in zip(tasks.pairs, tasks.frequencies):
        counts = Counter((s[:l], s[far - 1] ^ s[near - 1]) for s in strings)
        seen = Counter(s[:l] for s in strings)
        q = {key: n / seen[key[0]] for key, n in counts.items()}
        risk -= p * sum(n / len(strings) * math.log(q[key]) for key, n in counts.items())
        accuracy += p * sum(max(q.get((view, 0), 0), q.get((view, 1), 0)) * n for view, n in seen.items()) / len(strings)
        certain += all(share == 1 for share in q.values())
    return risk, accuracy, certain


@given(tasks=task_sets())
@settings(max_examples=40, deadline=None)
def test_exact_risk_is_that_of_an_enumeration(tasks):
    for l in range(tasks.bits + 1):
        risk, accuracy, certain = enumerated(tasks, l)
        assert tasks.bayes_risk(l) == pytest.approx(risk, abs=1e-12)
        assert tasks.accuracy(l) == pytest.approx(accuracy, abs=1e-12)
        assert tasks.solvable(l) == certain


@given(bits=st.integers(3, 60), gamma=st.floats(0.1, 4), floor=st.floats(0, 0.6), shift=st.floats(-0.9, 20), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_made_set_follows_the_wanted_law(bits, gamma, floor, shift, data):
    start = data.draw(st.integers(1, bits - 1))
    tasks = power_tasks("made", bits, gamma, start, floor, shift)
    l = np.arange(start, bits + 1)
    wanted = floor + (math.log(2) - floor) * ((l + shift) / (start + shift)) ** -gamma
    assert tasks.bayes_risk(l) == pytest.approx(wanted, abs=1e-9)
    assert tasks.solvable(start) == 0


@given(tasks=task_sets())
@settings(max_examples=20, deadline=None)
def test_a_set_survives_its_file(tasks, tmp_path_factory):
    file = write_tasks(tasks, tmp_path_factory.mktemp("tasks") / "drawn.json")
    assert read_tasks(file) == tasks and read_tasks(file).digest == tasks.digest


@given(bits=st.integers(2, 126), seed=st.integers(0, 2**40), first=st.integers(0, 2**60))
@settings(max_examples=60, deadline=None)
def test_strings_are_distinct_and_short(bits, seed, first):
    n = min(3000, 2**bits)
    first %= max(1, string_count(bits) - n)
    strings = permuted_bits(np.arange(first, first + n, dtype=np.uint64), bits, seed)
    assert len(np.unique(strings, axis=0)) == n
    assert (np.unpackbits(strings, axis=1, bitorder="little")[:, bits:] == 0).all()


@given(tasks=task_sets(), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=60, deadline=None)
def test_splits_are_disjoint_nested_and_labelled(tasks, seed, data):
    there = 2**tasks.bits
    dev, test = data.draw(st.integers(1, there // 4)), data.draw(st.integers(1, there // 4))
    small = data.draw(st.integers(1, there - dev - test))
    large = data.draw(st.integers(small, there - dev - test))
    one, two = split(tasks, small, dev, test, seed), split(tasks, large, dev, test, seed)
    for name in ("packed", "task", "label"):
        assert (getattr(two.train, name)[:small] == getattr(one.train, name)).all()
        assert (getattr(two.test, name) == getattr(one.test, name)).all()
    everything = np.concatenate([part.packed for part in vars(two).values()])
    assert len(np.unique(everything, axis=0)) == large + dev + test
    bits = two.train.visible(tasks.bits).numpy()
    for row, task, label in zip(bits, two.train.task, two.train.label):
        far, near = tasks.pairs[task]
        assert label in (0, 1) and (far > tasks.bits or label == row[far - 1] ^ row[near - 1])


def test_tasks_come_by_their_frequency_and_files_keep_samples(tmp_path):
    tasks = task_set("xor-second")
    samples = draw(tasks, 0, 200_000, seed=2)
    p = np.array(tasks.frequencies)
    deviation = (np.bincount(samples.task, minlength=len(p)) - 200_000 * p) / np.sqrt(200_000 * p * (1 - p))
    assert np.abs(deviation).max() < 5
    again = Samples.load(samples.save(tmp_path / "samples.npz"))
    assert all((a == b).all() if isinstance(a, np.ndarray) else a == b for a, b in zip(vars(again).values(), vars(samples).values()))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_reads_what_it_may_see_and_nothing_else(model):
    sizes = {"transformer": dict(width=16, layers=2, heads=2)}.get(model, dict(width=24, middle_width=12))
    net = make_model(model, 10, 12, seed=0, **sizes)
    samples = draw(task_set("xor-small"), 0, 64, seed=0)
    bits, task = samples.visible(10), torch.from_numpy(samples.task).long()
    with torch.no_grad():
        base = net(bits, task)
        assert base.shape == (64,) and net(bits[:7], task[:7]).allclose(base[:7], atol=1e-6)
        for place in range(10):
            other = bits.clone()
            other[:, place] ^= 1
            assert (net(other, task) - base).abs().max() > 1e-6
            if model == "transformer":
                assert net(mask_beyond(other, place), task).allclose(net(mask_beyond(bits, place), task), atol=1e-6)
        assert (net(bits, (task + 1) % 12) - base).abs().max() > 1e-6


RUN = """
import json, sys
from ctxnb.experiments.synthetic import train
print(json.dumps(train(checkpoint_seconds=0, **json.loads(sys.argv[1]))))
"""


def stamp(folder: Path):
    """When the checkpoint was written last."""
    try:
        return (folder / CHECKPOINT).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_kill_and_resume_is_bit_for_bit_the_uninterrupted_run(tmp_path):
    long = SMALL | dict(context_length=10, epochs=40, eval_steps=4)
    torch.manual_seed(5)  # a run must not depend on what happened before it
    whole = train(folder=tmp_path / "whole", **long)

    def start(folder):
        command = [sys.executable, "-c", RUN, json.dumps(long | {"folder": str(folder)})]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"TQDM_DISABLE": "1"})

    folder, kills = tmp_path / "killed", 0
    for _ in range(2):
        process, before = start(folder), stamp(folder)
        while process.poll() is None and stamp(folder) in (before, None):
            time.sleep(0.002)
        time.sleep(0.02)  # not exactly at a checkpoint
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL and (folder / CHECKPOINT).exists()
    assert kills == 2, "the runs ended before they could be killed"
    output, _ = start(folder).communicate(timeout=120)
    assert same(json.loads(output), whole)
    assert [f.name for f in folder.iterdir()] == [MODEL]
    a, b = (load_model(f)[0].state_dict() for f in (folder, tmp_path / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def same(a: dict, b: dict) -> bool:
    """Equal in everything but clocks."""
    return {k: v for k, v in a.items() if k not in CLOCK} == {k: v for k, v in b.items() if k not in CLOCK}


def test_masks_and_order_of_a_continued_transformer(tmp_path, monkeypatch):
    short = SMALL | dict(model="transformer", context_length=10, layers=2, heads=2, width=16, max_masked=5, epochs=3, eval_steps=4)
    whole = train(folder=tmp_path / "whole", **short)
    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: clip(*a) if next(calls) < 17 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(folder=tmp_path / "broken", checkpoint_seconds=0, **short)
    assert same(train(folder=tmp_path / "broken", **short), whole)


def test_loss_splits_into_risk_and_divergence_and_features_use_the_same_samples(tmp_path):
    run = train(folder=tmp_path, context_length=7, **SMALL | dict(model="two_input", test_samples=4000))
    json.dumps(run, allow_nan=False)
    tasks = task_set("xor-small")
    model, s = load_model(tmp_path)
    test = split(tasks, s.train_samples, s.dev_samples, s.test_samples, s.seed).test
    unsolvable = (tasks.farther > 7)[test.task].mean()
    # the two differ by the mean of the logits times the chance imbalance of random labels: zero on average
    assert run["loss"] == pytest.approx(math.log(2) * unsolvable + run["approximation_loss"], abs=4 * run["loss_se"])
    assert evaluate(model, test, tasks, 7).loss == pytest.approx(run["loss"], abs=1e-12)
    report = feature_report(tmp_path, [7], 10_000)
    assert report["visible_loss"] == pytest.approx([run["loss"]], abs=1e-12)
    assert len(report["feature_eigenvalues"]) == report["feature_width"] == 16


def test_patience_on_the_plateau_is_its_own(tmp_path):
    hopeless = SMALL | dict(train_samples=60, batch=60, eval_steps=1, epochs=500, patience=5)
    runs = {n: train(folder=tmp_path / str(n), context_length=30, **hopeless | dict(plateau_patience=n)) for n in (5, 60)}
    for n, run in runs.items():
        assert not run["learned"] and run["stopped_early"] and run["steps"] == run["best_step"] + n
    assert on_plateau(0.69, 0.3) and not on_plateau(0.6, 0.3) and not on_plateau(0.7, math.log(2))


@given(x=st.lists(st.floats(-5, 5), min_size=4, max_size=9, unique=True), slope=st.floats(-3, 3), level=st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_a_line_is_predicted_without_error(x, slope, level):
    x = np.round(x, 3)
    if len(set(x)) == len(x):
        y = level + slope * x
        assert held_out_error(x, y) == pytest.approx(0, abs=1e-6)
        assert np.ptp(y) < 1e-6 or line_r2(x, y) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context_length": 33}, "expected whole numbers from 0 to the 32 bits of 'xor-small'"),
        ({"train_samples": 0}, "train_samples = 0"),
        ({"tasks": "xor-smal"}, "no task set 'xor-smal'"),
        ({"tasks": "xor-small-decaying", "train_samples": 32_768}, "there are 32,768 of 15 bits"),
        ({"batch": 0}, "batch = 0"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"max_masked": 3}, "only the transformer"),
        ({"model": "transformer", "width": 30}, "multiple of 16"),
        ({"seed": True}, "seed = True"),
    ],
)
def test_bad_settings_are_refused(tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(folder=tmp_path / "run", **{"context_length": 10} | SMALL | change)
    assert not (tmp_path / "run" / MODEL).exists()


def test_published_settings_are_those_of_the_paper_grid():
    s = read_grid(PROJECT / "data/grids/paper/synthetic.toml").parameters
    assert [s[name] for name in ("tasks", "width", "middle_width", "batch", "epochs", "patience", "learning_rate", "weight_decay")] == [
        "xor-first", 400, 200, 10_000, 200, 25, 1e-3, 8e-4]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ('{"name": "x", "bits": 4}', "lacks tasks"),
        ('{"name": "x", "bits": 4, "tasks": [[2, 1]], "freq": [1]}', "unknown field 'freq'"),
        ('{"name": "x", "bits": 4, "tasks": [[9, 1]]}', "expected positions from 1 to 4"),
        ('{"name": "x", "bits": 4, "tasks": [[3, 0]]}', "expected positions from 1 to 4"),
        ('{"name": "x", "bits": 4, "tasks": [[2, 2]]}', "the two bits are the same"),
        ('{"name": "x", "bits": 4, "tasks": [[2, 1, 1]]}', "expected two whole numbers"),
        ('{"name": "x", "bits": 4, "tasks": [[2, 1], [3, 1]], "frequencies": [0.5, 0.6]}', "sum to 1.1: expected 1"),
        ('{"name": "x", "bits": 4, "tasks": [[2, 1], [3, 1]], "frequencies": [1.0, 0.0]}', "frequency 1 = 0.0"),
        ('{"name": "x", "bits": "4", "tasks": [[2, 1]]}', "bits = '4'"),
    ],
)
def test_bad_task_files_are_refused(tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        task_set(str(tmp_path / "bad.json"))


def test_a_bad_task_file_stops_a_grid_before_any_run(tmp_path):
    (tmp_path / "bad.json").write_text('{"name": "x", "bits": 4, "tasks": [[2, 1], [3, 1]], "frequencies": [0.5, 0.6]}')
    grid = (PROJECT / "data/grids/quick/synthetic.toml").read_text().replace('"xor-small"', json.dumps(str(tmp_path / "bad.json")))
    (tmp_path / "grid.toml").write_text(grid.replace('"nbs/runs/', f'"{PROJECT}/nbs/runs/'))
    command = [sys.executable, "-c", "from ctxnb.cli import main; main()", "run", str(tmp_path / "grid.toml"), "--runs-dir", str(tmp_path / "runs")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "sum to 1.1: expected 1" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "runs").exists()
