"""Build the static site: `python docs/build.py` makes `site/index.html`.

Result pages run again on the tables of this machine's runs, where there are any; notebooks become pages for readers (what `#| hide` hides is left out,
exported code becomes its documentation); executed runs become pages of their own; Sphinx renders the lot. Everything in between is in `_proc/`. `site/` is
replaced as a whole, and only by a build without any warning. What a name is and where it is described, Sphinx knows: see `conf.py`.
"""
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
from filelock import FileLock
from nbformat.v4 import new_markdown_cell
from reading import for_readers, offer_numbers, round_words, tidy_tables

ROOT = Path(__file__).resolve().parents[1]
NBS, SITE, WORK = ROOT / "nbs", ROOT / "site", ROOT / "_proc"
SOURCE, STATIC, HTML = WORK / "source", WORK / "static", WORK / "html"


class BuildError(Exception):
    """The site cannot be built; the message names the notebook or page and what is wrong with it."""


# --- what there is ------------------------------------------------------------------------------------------


def find_runs(tables: Iterable[Path]) -> dict[str, Path]:
    """Run id -> folder, for the runs that the tables name and this machine has."""
    from ctxnb.paths import runs_dir

    named = {run for table in tables if "run" in pq.read_schema(table).names for run in pq.read_table(table, columns=["run"])["run"].unique().to_pylist()}
    return {run: runs_dir() / run for run in sorted(filter(None, named)) if (runs_dir() / run / "notebook.ipynb").is_file()}


def find_modules() -> dict[str, Path]:
    """Module name -> file, for the modules that notebooks export and that have public names."""
    files = [path for path in sorted((ROOT / "ctxnb").rglob("*.py")) if path.name == "__main__.py" or not path.name.startswith("_")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files if "__all__" in path.read_text(encoding="utf-8")}


def shown(path: Path) -> str:
    """A path as messages and parameters name it: relative to the project where it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


# --- notebooks ----------------------------------------------------------------------------------------------


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook that is whole: valid, and no cell ended in an error that it was not meant to show."""
    try:
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
    except (nbformat.ValidationError, nbformat.reader.NotJSONError, ValueError) as problem:
        raise BuildError(f"{shown(path)} is not a valid notebook: {problem}") from problem
    for i, cell in enumerate(nb.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                raise BuildError(f"{shown(path)}: cell {i} ends in {output.ename}: {output.evalue}")
    return nb


def tables_of(path: Path) -> dict[str, Path]:
    """Parameter -> committed results table, of those that the parameters cell of a result notebook names."""
    cells = [cell.source for cell in read_notebook(path).cells if "parameters" in cell.metadata.get("tags", [])]
    found = re.findall(r"^(\w+)[^=\n]*= *[\"'](data/results/[^/\"']+\.parquet)[\"']", "\n".join(cells), flags=re.MULTILINE)
    return {name: ROOT / table for name, table in found}


def on_fresh_tables(path: Path, fresh: dict[str, Path], code: str) -> Path:
    """A result notebook, executed on this machine's tables; kept until notebook, tables or code change.

    Args:
        path: the notebook.
        fresh: parameter -> table.
        code: hash of the package.
    """
    import papermill

    from ctxnb.batch.engine import own_sockets

    key = hashlib.sha256((code + digest(path, *fresh.values())).encode()).hexdigest()
    done = WORK / "results" / f"{path.stem}-{key[:16]}.ipynb"
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        for old in done.parent.glob(f"{path.stem}-*.ipynb"):
            old.unlink()
        print(f"site: running {shown(path)} on {', '.join(map(shown, fresh.values()))}", flush=True)
        partial = done.with_name("partial.ipynb")
        try:
            with own_sockets() as own:
                papermill.execute_notebook(str(path), str(partial), parameters={name: shown(table) for name, table in fresh.items()}, kernel_name="python3",
                                           cwd=str(path.parent), progress_bar=False, config=own, execution_timeout=600)  # seconds, of a cell
        except Exception as problem:
            raise BuildError(f"{shown(path)} fails on {', '.join(map(shown, fresh.values()))}:\n{problem}") from problem
        partial.rename(done)
    return done


def note_provenance(nb: nbformat.NotebookNode, tables: Iterable[Path]) -> list[str]:
    """Say below a page's title what its tables were made from, with a banner where that no longer holds; returns what is wrong."""
    from freshness import provenance

    page = "\n".join(cell.source for cell in nb.cells)
    said = {shown(table): provenance(table, ROOT, page) for table in tables}
    wrong = [f"{table}: {'; '.join(complaints)}" for table, (_, complaints) in said.items() if complaints]
    made = [f"- `{table}`: {made_from}" for table, (made_from, _) in said.items() if made_from]
    notes = [":::{warning}\n**Stale or incomplete.** This page shows what was recorded, but:\n\n" + "\n".join(f"- {line}" for line in wrong) + "\n:::"] * bool(wrong)
    notes += [":::{admonition} Made from\n:class: note provenance\n:collapsible: closed\n\n" + "\n".join(made) + "\n:::"] * bool(made)
    nb.cells[1:1] = [new_markdown_cell("\n\n".join(notes))] * bool(notes)
    return wrong


def run_page(run: str, folder: Path, back: str) -> nbformat.NotebookNode:
    """Page of an executed run: its figures, parameters and result above the notebook; found by links only.

    Args:
        run: its id.
        folder: its folder.
        back: page that shows its table, empty if there is none.
    """
    nb = for_readers(read_notebook(folder / "notebook.ipynb"), chapter=True)
    for cell in nb.cells:
        cell.metadata.get("mystnb", {}).get("figure", {}).pop("name", None)
        if cell.cell_type == "markdown":  # the template's page carries the labels, and may have changed since; the one H1 here is the run's
            for pattern, text in ((r"\$\$[ \t]*\([\w:-]+\)[ \t]*$", "$$"), (r"^\([\w:-]+\)=\n", ""), (r"\{(?:eq|numref|ref|doc)\}(?=`)", ""),
                                  (r"\[([^]]*)\]\([^)]*\.ipynb[^)]*\)", r"\1"), (r"^(?=#+ )", "#")):
                cell.source = re.sub(pattern, text, cell.source, flags=re.MULTILINE)
    way_back, tables = [f"[The results that it is part of](../{back}.ipynb)"] * bool(back), []
    for title, name in (("Parameters", "parameters.json"), ("Result", "result.json")):
        if (folder / name).is_file():
            rows = [f"| `{key}` | {cell_text(value)} |" for key, value in json.loads((folder / name).read_text()).items()]
            tables.append(f"**{title}**\n\n| name | value |\n|---|---|\n" + "\n".join(rows))
    figures = [cell for cell in nb.cells if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))]
    nb.cells = [new_markdown_cell("\n\n".join([f"# Run {run}", *way_back])), *figures[:1], new_markdown_cell("\n\n".join(tables)),
                *(cell for cell in nb.cells if cell not in figures[:1])]
    nb.metadata.update(orphan=True, nosearch=True)
    return nb


def cell_text(value) -> str:
    """A parameter or result as the text of one table cell; measured numbers with four digits, long lists by their ends."""
    value = json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    if isinstance(value, list) and len(value) > 12:
        return f"`{json.dumps(value[:4])[:-1]}, ... {json.dumps(value[-2:])[1:]}` ({len(value)} values)"
    return "`" + (f"{value:g}" if isinstance(value, float) else json.dumps(value)).replace("|", "\\|").replace("`", "'") + "`"


def origin(page: str) -> nbformat.NotebookNode:
    """The line below a page's title that says which notebook it is, and offers it."""
    up = os.path.relpath(NBS, SOURCE)
    return new_markdown_cell(f":::{{container}} origin\n`nbs/{page}.ipynb` {{download}}`Download this notebook </{up}/{page}.ipynb>`\n:::")


def as_text(nb: nbformat.NotebookNode) -> str:
    """A notebook as a source file: this machine's folders named relative to the project, and cell ids that do not change by themselves."""
    from ctxnb.paths import data_dir, runs_dir

    for i, cell in enumerate(nb.cells):
        cell["id"] = f"cell-{i}"
        for extra in cell.keys() - {"id", "cell_type", "metadata", "source", "outputs", "execution_count"}:
            del cell[extra]
    text = nbformat.writes(nb, version=4)
    for folder, name in ((runs_dir(), "data/runs"), (data_dir(), "data"), (ROOT, ""), (Path(sys.prefix), "python"), (Path.home(), "~")):
        if len(folder.parts) > 1:  # only where a path begins: /srv/ctxnb is no part of https://example.org/srv/ctxnb
            text = re.sub(rf"(?<![\w.:/~-]){re.escape(str(folder))}(?![\w.-])(/?)", lambda match, name=name: name + match[1] * bool(name), text)
    return text


# --- the sources --------------------------------------------------------------------------------------------


def prepare() -> dict[str, str]:
    """Write the Sphinx sources; returns file -> text, for every page and the numbers behind its figures."""
    from sidebar import front_matter, read_sidebar, target

    from ctxnb.paths import runs_dir

    if not (NBS / "index.ipynb").is_file():
        raise BuildError("nbs/index.ipynb is missing: it is the site's front page")
    tables = {path.stem: path for path in sorted((runs_dir() / "tables").glob("*.parquet"))}
    groups, modules, runs = read_sidebar(NBS), find_modules(), find_runs(tables.values())
    code, (sidebar, texts) = digest(*modules.values()), front_matter(groups, modules)
    chapters = {target(entry) for group in groups if group.get("chapters") for entry in group["pages"]}
    pages = ["index", *(target(entry) for part in (*groups, *groups[-1]["section"]) for entry in part["pages"])]
    shows, subtitles = {}, {}
    for page in pages:
        path = NBS / f"{page}.ipynb"
        committed = tables_of(path)
        fresh = {name: tables[table.stem] for name, table in committed.items() if table.stem in tables}
        nb = for_readers(read_notebook(on_fresh_tables(path, fresh, code) if fresh else path), chapter=bool(committed) or page in chapters)
        shows |= {run: page for table in fresh.values() for run in find_runs([table]) if run not in shows}
        quoted = " ".join(re.findall(r"^> *(.*)", nb.cells[0].source, re.MULTILINE)) if nb.cells else ""
        subtitles[page] = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", r"\1", quoted)
        for line in note_provenance(nb, filter(Path.is_file, (committed | fresh).values())):  # a page may name a table that nobody has made yet
            print(f"site: stale or incomplete: {shown(path)}: {line}", flush=True)
        tidy_tables(nb, runs)
        if page in chapters:
            round_words(nb)
        nb.cells[1:1] = [origin(page)] * (page != "index")
        nb.cells += [new_markdown_cell(sidebar)] * (page == "index")
        texts |= offer_numbers(nb, page)
        texts[f"{page}.ipynb"] = as_text(nb)
    texts |= {f"runs/{run}.ipynb": as_text(run_page(run, folder, shows.get(run, ""))) for run, folder in runs.items()}
    shutil.rmtree(SOURCE, ignore_errors=True)
    for name, text in texts.items():
        (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
        (SOURCE / name).write_text(text, encoding="utf-8")
    STATIC.mkdir(parents=True, exist_ok=True)
    (STATIC / "subtitles.js").write_text(f"const SUBTITLES = {json.dumps(subtitles)};\n")
    print(f"site: {sum(not name.endswith('.csv') for name in texts)} pages ({len(runs)} of runs)", flush=True)
    return texts


def copy_mathjax() -> None:
    """MathJax for TeX input and CHTML output with its fonts: 2 of the 24 MB of the package."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    if package is None:
        raise BuildError("MathJax is missing: pip install sphinx-mathjax-offline")
    origin = Path(package.submodule_search_locations[0]) / "static" / "mathjax"
    for part in ("tex-chtml-full.js", "output/chtml/fonts/woff-v2"):
        if not (target := STATIC / "mathjax" / part).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (origin / part).is_dir() else shutil.copy2)(origin / part, target)


# --- the site -----------------------------------------------------------------------------------------------


def state(texts: dict[str, str]) -> str:
    """Hash of all that a site is made from: sources, modules, settings, tools."""
    files = [*find_modules().values(), ROOT / "settings.ini", *sorted(NBS.rglob("[!.]*.ipynb")),
             *sorted(path for path in (ROOT / "docs").rglob("*") if path.suffix != ".pyc" and path.is_file())]
    tools = [version(name) for name in ("sphinx", "sphinx-book-theme", "sphinx-click", "sphinx-copybutton", "myst-nb", "pydata-sphinx-theme")]
    return hashlib.sha256(json.dumps([texts, digest(*files), tools], sort_keys=True).encode()).hexdigest()


def run_sphinx() -> None:
    """Sources -> HTML, all of it anew, every warning an error."""
    shutil.rmtree(HTML, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-j", "2", "-b", "html", "-c", ROOT / "docs",
                           "-d", WORK / "doctrees", SOURCE, HTML], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise BuildError(f"Sphinx warned; the site is built only without a warning\n{done.stderr.strip()}".replace(f"{SOURCE}/", ""))


def check() -> None:
    """Refuse a page that would ask another server for something, or that names this machine's folders."""
    loads = re.compile(r"""<(?:script|link|img|iframe|source|video|audio|embed|object|image)\b[^>]*?
                           \s(?:src|href|data|xlink:href)\s*=\s*["']?\s*((?:https?:)?//[^"'\s>]+)""", re.X | re.I)
    css_loads = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])\s*((?:https?:)?//[^"')\s]+)""", re.I)
    problems = []
    for path in sorted(path for path in HTML.rglob("*") if path.suffix in {".html", ".css"}):
        text, name = path.read_text(encoding="utf-8", errors="replace"), path.relative_to(HTML)
        problems += [f"{name} loads {url}" for url in {*loads.findall(text), *css_loads.findall(text)}]
        problems += [f"{name} names the folder {folder}" for folder in (ROOT, Path.home(), sys.prefix) if re.search(rf"(?<![\w.:/~-]){re.escape(str(folder))}(?![\w.-])", text)]
        problems += [f"{name} links to {url}" for url in re.findall(r"""(?:href|src)\s*=\s*["']?(file://[^"'\s>]*)""", text)]
    if problems:
        raise BuildError("the site must stand alone:\n" + "\n".join(problems))


def publish(made_from: str) -> None:
    """Replace `site/` as a whole, with a note of what it was made from."""
    new, old = WORK / "site.new", WORK / "site.old"
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HTML, new, ignore=shutil.ignore_patterns(".buildinfo*", "_sources", "*webpack-macros.html"))  # the last are templates of the theme, not pages
    (new / "_static" / "state.txt").write_text(made_from)
    if SITE.exists():
        SITE.rename(old)
    new.rename(SITE)
    shutil.rmtree(old, ignore_errors=True)


def main() -> int:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    # for Sphinx and the kernels of result pages
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start, stamp = time.perf_counter(), SITE / "_static" / "state.txt"
    WORK.mkdir(exist_ok=True)
    try:
        with FileLock(WORK / "lock"):
            now = state(prepare())
            if stamp.exists() and stamp.read_text() == now:
                print("site: up to date")
            else:
                copy_mathjax()
                run_sphinx()
                check()
                publish(now)
    except BuildError as problem:
        left = "site/ is still that of the last good build" if SITE.exists() else "there is no site/"
        print(f"site: not built. {problem}\n({left})", file=sys.stderr)
        return 1
    print(f"site: built in {time.perf_counter() - start:.0f} s\nsite/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
