"""Build the static site: `python docs/build.py` makes `site/index.html`.

The notebooks go through nbdev's own processors (what `#| hide` hides stays hidden, exported code becomes its
documentation), result pages are run again on the tables of this machine's runs where there are any, executed
runs become pages of their own, and Sphinx renders the lot. Everything in between lies in `_proc/`; the tree's
notebooks are only read. `site/` is replaced as a whole, and only by a build without any warning.
"""

import ast
import base64
import functools
import gzip
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
from execnb.nbio import dict2nb
from filelock import FileLock
from nbdev import processors
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
WORK = ROOT / "_proc"  # everything made on the way; ignored by git
SOURCE, STATIC, DOCTREES, HTML = WORK / "source", WORK / "static", WORK / "doctrees", WORK / "html"
SITE = ROOT / "site"

# Sidebar: title, folder under nbs/, reading order of the names known to have one (others follow by name).
SECTIONS: list[tuple[str, str, str]] = [
    ("Results", "results", "advice train train_sweep counts horizon contest synthetic synthetic_sweep synthetic_features measure measure_features measure_own"),
    ("Try it", "try", "train synthetic measure"),
    ("Theory", "theory", "why decomposition bayes_risk recovery approximation optimal_context horizon assumptions planner"),
    ("Statistics", "stats", "fitting spectrum intrinsic_entropy sources hierarchy lagged"),
    ("Text", "text", "corpus prose tokens windows packing retrieval ruler xor_tasks xor_strings"),
    ("Models", "models", "gpt pretrained xor"),
    ("Experiments", "experiments", "train group counts synthetic synthetic_features measure conventions tasks needle languages horizon"),
    ("Reports", "reports", "train synthetic measure tasks"),
    ("Batch", "batch", "cluster grid privacy record code engine execute machine jobs launch slurm results pack live"),
    ("About", "about", "claims log cite contribute start"),
    ("Run templates", "runs", ""),
]
ROOT_PAGES = "about"  # notebooks beside index.ipynb stand in this section


class BuildError(Exception):
    """The site cannot be built; the message names the notebook or page and what is wrong with it."""


# --- what there is: notebooks, tables, runs, modules -------------------------------------------------------


def find_sections() -> dict[str, list[str]]:
    """Section title -> pages (paths below nbs/ without suffix) in reading order."""
    found: dict[str, list[str]] = {}
    for path in NBS.rglob("*.ipynb"):
        parts = path.relative_to(NBS).parts
        if not any(part.startswith((".", "_")) for part in parts) and parts != ("index.ipynb",):
            folder = parts[0] if len(parts) > 1 else ROOT_PAGES
            found.setdefault(folder, []).append("/".join(parts).removesuffix(".ipynb"))
    known = {folder for _, folder, _ in SECTIONS}
    extra = [(folder.capitalize(), folder, "") for folder in sorted(found.keys() - known)]
    sections = {}
    for title, folder, order in [*SECTIONS[:-2], *extra, *SECTIONS[-2:]]:
        rank = {f"{folder}/{name}": i for i, name in enumerate(order.split())}
        pages = sorted(found.get(folder, []), key=lambda page: (rank.get(page, len(rank)), page))
        if pages:
            sections[title] = pages
    return sections


def fresh_tables() -> dict[str, Path]:
    """Name -> results table that `ctxnb results` wrote from this machine's runs."""
    from ctxnb.paths import runs_dir

    return {path.stem: path for path in sorted((runs_dir() / "tables").glob("*.parquet"))}


def find_runs(tables: Iterable[Path]) -> dict[str, Path]:
    """Run id -> folder, for the runs that the tables name and that lie on this machine."""
    from ctxnb.paths import runs_dir

    runs = {}
    for table in tables:
        if "run" in pq.read_schema(table).names:
            for run in pq.read_table(table, columns=["run"])["run"].unique().to_pylist():
                if run and (runs_dir() / run / "notebook.ipynb").is_file():
                    runs[run] = runs_dir() / run
    return runs


def find_modules() -> dict[str, Path]:
    """Module name -> file, for the modules that notebooks export."""
    modules = {}
    for path in sorted((ROOT / "ctxnb").rglob("*.py")):
        if not path.name.startswith("_"):
            modules[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return modules


# --- notebooks ---------------------------------------------------------------------------------------------


class SitePages(processors.FilterDefaults):
    """nbdev's processors, without those that write for Quarto or run the notebook's exports again."""

    def base_procs(self):
        return [
            processors.populate_language,
            processors.add_show_docs,
            processors.strip_ansi,
            processors.hide_line,
            processors.filter_stream_,
            processors.rm_header_dash,
            processors.rm_export,
            processors.clean_magics,
            processors.hide_,
            processors.mv_exports,
            processors.strip_hidden_metadata,
        ]


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook that is whole: valid, and no cell ended in an error that it was not meant to show."""
    try:
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
    except (nbformat.ValidationError, nbformat.reader.NotJSONError, ValueError) as problem:
        raise BuildError(f"{shown(path)} is not a valid notebook: {problem}") from problem
    for i, cell in enumerate(nb.cells):
        if "raises-exception" not in cell.metadata.get("tags", []):
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    raise BuildError(f"{shown(path)}: cell {i} ends in {output.ename}: {output.evalue}")
    return nb


def process(path: Path) -> nbformat.NotebookNode:
    """A notebook as a reader should see it, by nbdev's processors."""
    module = module_of(path)
    if module not in {None, *find_modules()}:
        raise BuildError(f"{shown(path)} exports {module}, which is not there: run nbdev_export")
    nb = dict2nb(json.loads(nbformat.writes(read_notebook(path))))
    try:
        SitePages()(nb)
    except Exception as problem:
        raise BuildError(f"{shown(path)}: nbdev cannot process it: {problem!r}") from problem
    if not module and any(cell.source.startswith("show_doc(") for cell in nb.cells):
        raise BuildError(f"{shown(path)} exports or documents code but has no `#| default_exp`")
    nb = nbformat.reads(
        json.dumps({key: nb[key] for key in ("cells", "metadata", "nbformat", "nbformat_minor")}),
        as_version=4,
    )
    nb.metadata = nbformat.from_dict({"kernelspec": nb.metadata.get("kernelspec", {})})
    in_source_order(nb, module)
    for cell in nb.cells:
        for extra in cell.keys() - {"id", "cell_type", "metadata", "source", "outputs", "execution_count"}:
            del cell[extra]
        cell.metadata.pop("language", None)
        if cell.cell_type == "code":
            present_code(cell, module)
    nb.cells = [part for cell in nb.cells for part in words_apart(cell) if part.source.strip() or part.get("outputs")]
    return nb


def words_apart(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """MyST-NB makes a figure of every output of a cell with a caption; what is no picture gets a cell of its own."""
    if "figure" not in cell.metadata.get("mystnb", {}):
        return [cell]
    words = [output for output in cell.outputs if not _has_image(output)]
    cell.outputs = [output for output in cell.outputs if _has_image(output)]
    # MyST-NB passes over a cell without source
    return [cell, new_code_cell("# the words of the figure above", outputs=words, metadata={"tags": ["remove-input"]})] if words else [cell]


def in_source_order(nb: nbformat.NotebookNode, module: str | None) -> None:
    """nbdev documents the names of one cell last to first; neighbours among its entries are sorted."""
    rank = {f"show_doc({name})": i for i, name in enumerate(definitions(module))} if module else {}
    cells = []
    for is_entry, group in itertools.groupby(nb.cells, key=lambda cell: cell.source in rank):
        cells += sorted(group, key=lambda cell: rank[cell.source]) if is_entry else group
    nb.cells = cells


def present_code(cell: nbformat.NotebookNode, module: str | None) -> None:
    """Turn the cell's `#| key: value` lines into MyST-NB's terms, and `show_doc` into autodoc's."""
    options = dict(re.findall(r"^#\| *([\w-]+) *: *(.*)$", cell.source, flags=re.MULTILINE))
    options = {key: value.strip().strip("\"'") for key, value in options.items()}
    cell.source = re.sub(r"^#\| *[\w-]+ *:.*\n?", "", cell.source, flags=re.MULTILINE)
    if shown_name := re.fullmatch(r"show_doc\(([\w.]+).*\)", cell.source.strip()):
        entry = describe(module, shown_name[1], brief=True)
        cell.update(new_markdown_cell("```{rst}\n" + entry + "```"))
        del cell["outputs"], cell["execution_count"]
        return
    tags = set(cell.metadata.get("tags", []))
    tags |= {"remove-input"} if options.get("echo") == "false" else set()
    tags |= {"remove-output"} if options.get("output") == "false" else set()
    tags |= {"hide-input"} if options.get("code-fold") == "true" else set()
    figure = {"caption": options.get("fig-cap"), "name": options.get("label")}
    mystnb = {
        "figure": {key: value for key, value in figure.items() if value},
        "image": {"alt": options["fig-alt"]} if "fig-alt" in options else {},
    }
    if mystnb := {key: value for key, value in mystnb.items() if value}:
        cell.metadata["mystnb"] = mystnb
        # what a plotting call returns is for nobody
        cell.outputs = [o for o in cell.outputs if o.output_type != "execute_result" or o.data.keys() - {"text/plain"}]
    cell.metadata["tags"] = sorted(tags)
    # a widget needs a kernel and somebody's server; its other forms, if any, say nothing
    cell.outputs = [
        o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
    ]


def _has_image(output: nbformat.NotebookNode) -> bool:
    return any(kind.startswith("image/") for kind in output.get("data", {}))


def fold_code(nb: nbformat.NotebookNode) -> None:
    """Code that a reader of results opens with one click."""
    for cell in nb.cells:
        if cell.cell_type == "code" and not {"remove-input", "remove-cell"} & set(cell.metadata.tags):
            cell.metadata["tags"] = sorted({*cell.metadata.tags, "hide-input"})


def without_machine(value, key: str = ""):
    """A copy of a notebook's content in which this machine's folders are named relative to the project."""
    if isinstance(value, dict):
        return {k: without_machine(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [without_machine(v) for v in value]
    if isinstance(value, str) and not key.startswith("image/"):
        for folder, name in machine_folders().items():
            # only where a path begins: /srv/ctxnb is not part of https://example.org/srv/ctxnb
            path = rf"(?<![\w.:/~-]){re.escape(folder)}(?![\w.-])(/?)"
            value = re.sub(path, lambda match: name + match[1] * bool(name), value)
    return value


@functools.cache
def machine_folders() -> dict[str, str]:
    """Folder of this machine -> what a page calls it; the deepest first."""
    from ctxnb.paths import data_dir, runs_dir

    folders = {
        str(Path.home()): "~",
        sys.prefix: "python",
        str(data_dir()): "data",
        str(runs_dir()): "data/runs",
        str(ROOT): "",
    }
    return {k: folders[k] for k in sorted(folders, key=len, reverse=True) if len(Path(k).parts) > 1}


def tables_of(path: Path) -> dict[str, Path]:
    """Parameter -> committed results table, of those that the parameters cell of a result notebook names."""
    found = {}
    for cell in read_notebook(path).cells:
        if "parameters" in cell.metadata.get("tags", []):
            for line in ast.parse(cell.source).body:
                match line:
                    case (
                        ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(value)))
                        | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(value)))
                    ) if re.fullmatch(r"data/results/[^/]+\.parquet", value):
                        found[name] = ROOT / value
    return found


def note_provenance(nb: nbformat.NotebookNode, tables: Iterable[Path]) -> list[str]:
    """Say below a page's title what its tables were made from, with a banner where that no longer holds.

    Returns:
        What is wrong, a line for each table.
    """
    from freshness import provenance

    lines, wrong = [], []
    for table in tables:
        made_from, complaints = provenance(table, ROOT, "\n".join(cell.source for cell in nb.cells))
        if made_from:
            lines.append(f"`{shown(table)}`: {made_from}")
        if complaints:
            wrong.append(f"{shown(table)}: {'; '.join(complaints)}")
    notes = []
    if wrong:
        banner = "\n".join(f"- {line}" for line in wrong)
        notes.append(f":::{{warning}}\n**Stale or incomplete.** This page shows what was recorded, but:\n\n{banner}\n:::")
    if lines:
        listed = "\n".join(f"- {line}" for line in lines)
        notes.append(f":::{{admonition}} Made from\n:class: note provenance\n\n{listed}\n:::")
    if notes:
        nb.cells.insert(1, new_markdown_cell("\n\n".join(notes)))
    return wrong


def run_results(path: Path, tables: dict[str, Path], code: str) -> Path:
    """A notebook, executed on the fresh tables that it reads; itself where there is none.

    Args:
        path: notebook, with a cell tagged `parameters` if it reads tables.
        tables: name -> fresh table.
        code: hash of the package, so that a result is made again when the code changed.
    """
    import papermill

    fresh = {name: tables[table.stem] for name, table in tables_of(path).items() if table.stem in tables}
    if not fresh:
        return path
    inputs = [path, *fresh.values()]
    key = hashlib.sha256("".join([code, *(digest(file) for file in inputs)]).encode()).hexdigest()
    done = WORK / "results" / f"{path.stem}-{key[:16]}.ipynb"
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        for old in done.parent.glob(f"{path.stem}-*.ipynb"):
            old.unlink()
        print(
            f"site: running {shown(path)} on {', '.join(shown(table) for table in fresh.values())}",
            flush=True,
        )
        partial = done.with_name("partial.ipynb")
        try:
            papermill.execute_notebook(
                str(path),
                str(partial),
                parameters={name: shown(table) for name, table in fresh.items()},
                kernel_name="python3",
                cwd=str(path.parent),
                progress_bar=False,
            )
        except Exception as problem:
            raise BuildError(
                f"{shown(path)} fails on {', '.join(map(shown, fresh.values()))}:\n{problem}"
            ) from problem
        partial.rename(done)
    return done


def run_page(run: str, folder: Path) -> nbformat.NotebookNode:
    """Page of an executed run: its parameters and result above the notebook; found by links only."""
    nb = process(folder / "notebook.ipynb")
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            # the template's page carries the labels, and may have changed since; the one H1 here is the run's
            cell.source = re.sub(r"\$\$[ \t]*\([\w:-]+\)[ \t]*$", "$$", cell.source, flags=re.MULTILINE)
            cell.source = re.sub(r"^\([\w:-]+\)=\n", "", cell.source, flags=re.MULTILINE)
            cell.source = re.sub(r"\{(?:eq|numref|ref|doc)\}(?=`)", "", cell.source)
            cell.source = re.sub(r"\[([^]]*)\]\([^)]*\.ipynb[^)]*\)", r"\1", cell.source)
            cell.source = re.sub(r"^(?=#+ )", "#", cell.source, flags=re.MULTILINE)
        else:
            cell.metadata.get("mystnb", {}).get("figure", {}).pop("name", None)
    fold_code(nb)
    tables = []
    for title, name in [("Parameters", "parameters.json"), ("Result", "result.json")]:
        file = folder / name
        if file.is_file():
            rows = [
                f"| `{name}` | {cell_text(value)} |" for name, value in json.loads(file.read_text()).items()
            ]
            tables += [f"**{title}**\n\n| name | value |\n|---|---|\n" + "\n".join(rows)]
    nb.cells.insert(0, new_markdown_cell("\n\n".join([f"# Run {run[:12]}", *tables])))
    nb.metadata.update(orphan=True, nosearch=True)
    return nb


def cell_text(value) -> str:
    """A parameter or result as the text of one table cell; long lists by their ends."""
    if isinstance(value, list) and len(value) > 12:
        return f"`{json.dumps(value[:4])[:-1]}, ... {json.dumps(value[-2:])[1:]}` ({len(value)} values)"
    return "`" + json.dumps(value).replace("|", "\\|").replace("`", "'") + "`"


def offer_data(nb: nbformat.NotebookNode, page: str) -> dict[str, str]:
    """Move the numbers that figures carry as CSV into files, with a link below each figure.

    Returns:
        Name of the file below nbs/ -> its text.
    """
    files = {}
    for i, cell in reversed(list(enumerate(nb.cells))):
        texts = [o.data.pop("text/csv") for o in cell.get("outputs", []) if "text/csv" in o.get("data", {})]
        packed = [o.data.pop("application/gzip") for o in cell.get("outputs", []) if "application/gzip" in o.get("data", {})]
        texts += [gzip.decompress(base64.b64decode(data)).decode() for data in packed]
        for k, text in enumerate(texts):
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            name = figure.get("name", f"figure-{i}") + (f"-{k + 1}" if len(texts) > 1 else "")
            files[f"{page}-{name}.csv"] = text
            link = f"{{download}}`The numbers (CSV) <{Path(page).name}-{name}.csv>`"
            if "caption" in figure:
                figure["caption"] += f" {link}"
            else:
                nb.cells.insert(i + 1, new_markdown_cell(link))
    return files


def unlink_missing(nb: nbformat.NotebookNode, runs: Iterable[str]) -> None:
    """Links to the pages of runs that are not on this machine become plain text."""

    def keep(match: re.Match) -> str:
        return match[0] if match[1] in runs else match[2]

    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = re.sub(
                    r'<a [^>]*href="\.\./runs/([^"/]+)\.html"[^>]*>(.*?)</a>',
                    keep,
                    output.data["text/html"],
                    flags=re.DOTALL,
                )


def module_of(path: Path) -> str | None:
    """Module that a notebook exports, by its `#| default_exp` line."""
    for cell in read_notebook(path).cells:
        if cell.cell_type == "code" and (
            name := re.search(r"^#\| *default_exp +(\S+)", cell.source, re.MULTILINE)
        ):
            return f"ctxnb.{name[1]}"
    return None


# --- modules -----------------------------------------------------------------------------------------------


def describe(module: str, name: str, brief: bool) -> str:
    """reST that describes an exported name: by autodoc, or by its source line for a constant.

    Args:
        module: full name.
        name: function, class, `Class.method` or constant.
        brief: for a notebook's page, which names a class's members and is no target of the index.
    """
    kinds = definitions(module)
    owner, _, method = name.partition(".")
    lines = ["   :no-index:"] if brief else []
    if method:
        head = f".. automethod:: {module}.{name}"
    elif isinstance(kinds.get(owner), ast.ClassDef):
        head = f".. autoclass:: {module}.{name}"
        members = [
            f":py:obj:`{line.name} <{module}.{name}.{line.name}>`"
            for line in kinds[owner].body
            if isinstance(line, ast.FunctionDef) and line.name[0] != "_" and ast.get_docstring(line)
        ]
        if not brief:
            lines += ["   :members:"]
        elif members:
            lines += ["", "   Members: " + ", ".join(members)]
    elif isinstance(kinds.get(owner), (ast.FunctionDef, ast.AsyncFunctionDef)):
        head = f".. autofunction:: {module}.{name}"
    else:
        value = ast.unparse(kinds[owner]) if isinstance(kinds.get(owner), ast.expr) else ""
        head = f".. py:data:: {name}"
        lines += [f"   :value: {value}"] if 0 < len(value) <= 200 and "\n" not in value else []
    return "\n".join([head, *lines, "", ""])


@functools.cache
def definitions(module: str) -> dict[str, ast.AST]:
    """Name -> definition (or a constant's value) at the top of a module."""
    found: dict[str, ast.AST] = {}
    for line in ast.parse(find_modules()[module].read_text(encoding="utf-8")).body:
        match line:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found[line.name] = line
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)) if (
                line.value
            ):
                found[name] = line.value
    return found


def exports(module: str) -> list[str]:
    """Public names of a module: its `__all__`."""
    listed = definitions(module).get("__all__")
    return list(ast.literal_eval(listed)) if listed else []


def api_pages(modules: dict[str, Path]) -> dict[str, str]:
    """Page -> text: one for each module that exports something, and their index."""
    pages, rows = {}, []
    for module, path in modules.items():
        if not (names := exports(module)):
            continue
        notebook = notebook_of(path)
        about = subtitle(notebook) if notebook else ""
        shown_in = f"Shown and tested in [](/{notebook.relative_to(NBS).as_posix()}).\n\n" if notebook else ""
        names.sort(key=lambda name: isinstance(definitions(module).get(name), ast.expr))  # constants last
        entries = "\n".join(describe(module, name, brief=False) for name in names)
        pages[f"api/{module}"] = (
            f"# {module}\n\n{about}\n\n{shown_in}```{{rst}}\n.. py:module:: {module}\n\n{entries}```\n"
        )
        rows.append(f"| [{module}]({module}.md) | " + about.replace("\n", " ").replace("|", "\\|") + " |")
    toctree = "\n".join(page.removeprefix("api/") for page in pages)
    pages["api/index"] = (
        "# Modules\n\nWhat the notebooks export, by module. Losses are in nats.\n\n"
        "| module | what it holds |\n|---|---|\n"
        + "\n".join(rows)
        + f"\n\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n"
    )
    return pages


def notebook_of(module_file: Path) -> Path | None:
    """Notebook that a module was exported from, if it is there."""
    line = re.search(
        r"AUTOGENERATED! DO NOT EDIT! File to edit: (.+\.ipynb)", module_file.read_text(encoding="utf-8")
    )
    path = (module_file.parent / line[1]).resolve() if line else None
    return path if path and path.is_relative_to(NBS) and path.is_file() else None


def subtitle(notebook: Path) -> str:
    """The quotation below a notebook's title; a module's docstring has its first line only."""
    first = read_notebook(notebook).cells[0].source
    return "\n".join(line[1:].strip() for line in first.splitlines() if line.startswith(">"))


def import_all(modules: dict[str, Path], code: str) -> None:
    """Import the modules when their code changed: autodoc would complain about each name of a broken one."""
    stamp = WORK / "imported"
    if not (stamp.exists() and stamp.read_text() == code):
        for module, path in modules.items():
            try:
                importlib.import_module(module)
            except Exception as problem:
                raise BuildError(f"{shown(path)} cannot be imported: {problem!r}") from problem
        stamp.write_text(code)


def link_targets(modules: dict[str, Path]) -> dict[str, tuple[str, str]]:
    """Name, short where it is the only one and in full -> page and anchor of its description."""
    owners: dict[str, list[str]] = {}
    for module in modules:
        for name in exports(module):
            owners.setdefault(name, []).append(module)
    targets = {
        name: (f"api/{found[0]}", f"{found[0]}.{name}") for name, found in owners.items() if len(found) == 1
    }
    return targets | {
        f"{module}.{name}": (f"api/{module}", f"{module}.{name}")
        for name, found in owners.items()
        for module in found
    }


# --- the work folder ---------------------------------------------------------------------------------------


def shown(path: Path) -> str:
    """A path as messages and parameters name it: relative to the project where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_if_changed(path: Path, text: str) -> bool:
    """Write a source file unless it says that already: Sphinx goes by content and time."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def toctrees(sections: dict[str, list[str]], api: bool) -> str:
    """The sidebar, as hidden toctrees of the front page."""
    trees = {**sections, **({"API": ["api/index"]} if api else {})}
    return "\n\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```"
        for title, pages in trees.items()
    )


def prepare() -> dict[str, str]:
    """Write the Sphinx sources; only files whose content changed are touched.

    Returns:
        File -> text, for every page of the site and the numbers behind its figures.
    """
    if not (NBS / "index.ipynb").is_file():
        raise BuildError("nbs/index.ipynb is missing: it is the site's front page")
    sections, tables, modules = find_sections(), fresh_tables(), find_modules()
    runs = find_runs(tables.values())
    code = hashlib.sha256("".join(digest(path) for path in modules.values()).encode()).hexdigest()
    import_all(modules, code)

    texts = {}
    for page in ["index", *(page for pages in sections.values() for page in pages)]:
        path = NBS / f"{page}.ipynb"
        nb = process(run_results(path, tables, code))
        if tables_of(path):  # it reads recorded runs: a page of results
            fold_code(nb)
            for line in note_provenance(nb, [tables.get(t.stem, t) for t in tables_of(path).values()]):
                print(f"site: stale or incomplete: {shown(path)}: {line}", flush=True)
        unlink_missing(nb, runs)
        if page == "index":
            nb.cells.append(new_markdown_cell(toctrees(sections, bool(modules))))
        texts |= offer_data(nb, page)
        texts[f"{page}.ipynb"] = as_text(nb)
    for run, folder in runs.items():
        texts[f"runs/{run}.ipynb"] = as_text(run_page(run, folder))
    texts |= {f"{page}.md": text for page, text in api_pages(modules).items()}

    changed = [name for name, text in texts.items() if write_if_changed(SOURCE / name, text)]
    for old in [path for path in SOURCE.rglob("*") if path.is_file()]:
        if old.relative_to(SOURCE).as_posix() not in texts:
            old.unlink()
    pages = sum(not name.endswith(".csv") for name in texts)
    print(f"site: {pages} pages ({len(runs)} of runs), {len(changed)} sources changed", flush=True)
    return texts


def as_text(nb: nbformat.NotebookNode) -> str:
    """A notebook as a source file: no machine's folders, and cell ids that do not change by themselves."""
    for i, cell in enumerate(nb.cells):
        cell["id"] = f"cell-{i}"
    return nbformat.writes(nbformat.from_dict(without_machine(nb)), version=4)


def copy_mathjax() -> None:
    """MathJax for TeX input and CHTML output with its fonts: 2 of the 24 MB of the package."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    if package is None:
        raise BuildError("MathJax is missing: pip install sphinx-mathjax-offline")
    origin = Path(package.submodule_search_locations[0]) / "static" / "mathjax"
    for part in ["tex-chtml-full.js", "output/chtml/fonts/woff-v2"]:
        target = STATIC / "mathjax" / part
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (origin / part).is_dir() else shutil.copy2)(origin / part, target)


# --- Sphinx ------------------------------------------------------------------------------------------------


def state(texts: dict[str, str]) -> str:
    """Hash of all that a site is made from: sources, modules, settings, tools."""
    files = [
        *find_modules().values(),
        *sorted(path for path in (ROOT / "docs").rglob("*") if path.suffix != ".pyc" and path.is_file()),
        ROOT / "settings.ini",
    ]
    tools = [version(name) for name in ("sphinx", "sphinx-book-theme", "myst-nb", "pydata-sphinx-theme")]
    made_from = [texts, [digest(path) for path in files], tools]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def run_sphinx(texts: dict[str, str]) -> None:
    """Sources -> HTML, only what changed, every warning an error."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    names = link_targets(find_modules())
    # the sidebar stands on every page and Sphinx rewrites only pages whose own source changed
    titles = {
        name: re.findall(r'"# (.*?)(?:\\n|")', text)[:1]
        for name, text in texts.items()
        if "runs/" not in name
    }
    frame = hashlib.sha256(
        json.dumps([names, titles, digest(Path(__file__))], sort_keys=True).encode()
    ).hexdigest()
    # The stamp says that the cache is of a build without a warning. A warning of a page that did not change
    # is not given twice: after a build that warned, failed or was killed, everything is read anew.
    stamp = DOCTREES / "frame"
    last = stamp.read_text() if stamp.exists() else None
    if last is None:
        shutil.rmtree(DOCTREES, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    with docutils_namespace():
        app = Sphinx(
            SOURCE,
            ROOT / "docs",
            HTML,
            DOCTREES,
            "html",
            confoverrides={"exported_names": names},
            status=None,
            warningiserror=True,
        )
        app.build(force_all=last != frame)
    if app.statuscode:
        raise BuildError("Sphinx warned (above); the site is built only without a warning")
    wanted = {name.rpartition(".")[0] for name in texts} | {"genindex", "py-modindex", "search"}
    for page in list(HTML.rglob("*.html")):
        name = page.relative_to(HTML).with_suffix("").as_posix()
        if name not in wanted and not name.startswith("_modules/"):
            page.unlink()
    stamp.write_text(frame)


def check() -> None:
    """Refuse a page that would ask another server for something, or that names this machine's folders."""
    loads = re.compile(
        r"""<(?:script|link|img|iframe|source|video|audio|embed|object|image)\b[^>]*?
                           \s(?:src|href|data|xlink:href)\s*=\s*["']?\s*((?:https?:)?//[^"'\s>]+)""",
        re.X | re.I,
    )
    css_loads = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])\s*((?:https?:)?//[^"')\s]+)""", re.I)
    folders = [re.compile(rf"(?<![\w.:/~-]){re.escape(folder)}(?![\w.-])") for folder in machine_folders()]
    problems = []
    for path in sorted(HTML.rglob("*")):
        if path.suffix in {".html", ".css"}:
            text = path.read_text(encoding="utf-8", errors="replace")
            name = path.relative_to(HTML)
            problems += [f"{name} loads {url}" for url in {*loads.findall(text), *css_loads.findall(text)}]
            problems += [
                f"{name} names the folder {m[0]}" for folder in folders if (m := folder.search(text))
            ]
            problems += [f"{name} has a file:// address"] * ("file://" in text)
    if problems:
        raise BuildError("the site must stand alone:\n" + "\n".join(problems))


def publish(state: str) -> None:
    """Replace `site/` as a whole, with a note of what it was made from."""
    new, old = WORK / "site.new", WORK / "site.old"
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HTML, new, ignore=shutil.ignore_patterns(".buildinfo*", "_sources"))
    (new / "_static" / "state.txt").write_text(state)
    if SITE.exists():
        SITE.rename(old)
    new.rename(SITE)
    shutil.rmtree(old, ignore_errors=True)


def main() -> int:
    os.chdir(ROOT)  # nbdev reads settings.ini of the working folder
    sys.path.insert(0, str(ROOT))
    # for the kernels of result pages
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    WORK.mkdir(exist_ok=True)
    try:
        with FileLock(WORK / "lock"):
            texts = prepare()
            stamp, now = SITE / "_static" / "state.txt", state(texts)
            if stamp.exists() and stamp.read_text() == now:
                print("site: up to date")
            else:
                copy_mathjax()
                run_sphinx(texts)
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
