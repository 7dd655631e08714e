"""The site builder on a tiny project: what a reader must find, and what must not be in it."""

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ctxnb.figures import CSV_TYPE

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow  # about 45 s: each build starts Python, nbdev and Sphinx anew
RUN, GONE = "0123456789abcdef", "fedcba9876543210"

TABLE = pd.DataFrame({"loss": [1.23456, None], "inside": [True, False]}, index=pd.Index([16000, 50000], name="size")).to_html()
THEORY = [
    new_markdown_cell(
        "# Total loss\n> One law, one figure.\n\n$$\nR(l) = C_0 + C l^{-\\gamma}\n$$ (eq-law)\n\n"
        "By {eq}`eq-law`."
    ),
    new_code_cell("#| default_exp theory.law"),
    new_code_cell("#| hide\nhidden_name = 1"),
    new_code_cell("set_up = 1"),
    new_code_cell(
        '#| export\nclass LawResult:\n    """A fitted law.\n\n    Args:\n        offset: C0, nats.\n    """\n'
        "\n"
        "    def __init__(self, offset: float):\n        self.offset = offset\n\n"
        "def total_law_loss(context_length: int) -> float:\n"
        '    """Loss with Q_l || P_l and l* in `nat`s.\n\n    Args:\n        context_length: tokens.\n\n'
        '    Returns:\n        Lower bound X_-l:-1, nats.\n    """\n    return 1 / context_length'
    ),
    new_markdown_cell("`total_law_loss` falls, see {numref}`fig-law`."),
    new_code_cell("table", outputs=[new_output("execute_result", {"text/html": TABLE, "text/plain": "a table"}, execution_count=1)]),
    new_code_cell(
        "#| label: fig-law\n#| fig-cap: The law.\n#| fig-alt: A falling line.\nplot()",
        outputs=[
            new_output("execute_result", {"text/plain": "<Axes>"}, execution_count=1),
            new_output(
                "display_data",
                {
                    "image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
                    CSV_TYPE: base64.b64encode(gzip.compress(b"x,y\n1,2\n")).decode(),
                },
            ),
            new_output("execute_result", {"text/markdown": "In **words**.", "text/plain": "<Markdown>"}, execution_count=1),
        ],
    ),
]
RESULT = [
    new_markdown_cell("# Quick grid\n> What the runs say."),
    new_code_cell('table = "data/results/quick.parquet"', metadata={"tags": ["parameters"]}),
    new_code_cell(
        "import pandas as pd\nfrom IPython.display import HTML\n"
        "from ctxnb.paths import project_root, runs_dir\n"
        "data = pd.read_parquet(project_root() / table)\n"
        "print('read', project_root() / table, 'with', len(data), 'rows')\n"
        "HTML(''.join(f'<a href=\"../runs/{run}.html\">{run}</a> ' for run in data['run']))"
    ),
]


def write(path: Path, cells: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.from_dict({**cell, "id": f"c{i}"}) for i, cell in enumerate(cells)]
    nbformat.write(
        new_notebook(
            cells=cells,
            metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
        ),
        path,
    )


def build(project: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("CTXNB_RUNS", "CTXNB_DATA", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, project / "docs" / "build.py"], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A built project: a theory page, a result page with a fresh table, one run here and one elsewhere."""
    project = tmp_path_factory.mktemp("tiny") / "project"
    shutil.copytree(ROOT / "docs", project / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", project)
    write(
        project / "nbs/index.ipynb",
        [new_markdown_cell("# Tiny\n> A front page.\n\nSee [law](theory/law.ipynb).")],
    )
    write(project / "nbs/theory/law.ipynb", THEORY)
    write(project / "nbs/results/quick.ipynb", RESULT)
    write(
        project / "nbs/runs/train.ipynb",
        [
            new_markdown_cell("# Train\n\n$$ a = b $$ (eq-run)\n\nBy {eq}`eq-run`."),
            new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        ],
    )
    (project / "nbs/batch").mkdir()
    for needed in ("paths.ipynb", "batch/engine.ipynb"):  # by the builder itself
        shutil.copy(ROOT / "nbs" / needed, project / "nbs" / needed)
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=project, check=True)

    run = project / "data/runs" / RUN
    run.mkdir(parents=True)
    executed = nbformat.read(project / "nbs/runs/train.ipynb", as_version=4)
    executed.cells[1].update(
        execution_count=1,
        outputs=[
            new_output("stream", name="stdout", text=f"tokens in {project}/data/tokens\n"),
            new_output("stream", name="stderr", text="a progress bar\n"),
        ],
    )
    nbformat.write(executed, run / "notebook.ipynb")
    (run / "parameters.json").write_text(json.dumps({"seed": 7}))
    (run / "result.json").write_text(json.dumps({"loss": 2.25, "curve": [0.5] * 50}))
    for folder, runs in [("results", [GONE]), ("runs/tables", [RUN, GONE])]:
        (project / "data" / folder).mkdir(exist_ok=True)
        pd.DataFrame({"run": runs, "loss": 2.25}).to_parquet(project / "data" / folder / "quick.parquet")

    done = build(project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "site/index.html"
    return project


def test_pages_of_results_and_runs(project):
    result = (project / "site/results/quick.html").read_text()
    assert "read data/runs/tables/quick.parquet with 2 rows" in result  # executed on the fresh table
    assert f'href="../runs/{RUN}.html"' in result and GONE in result
    assert f"{GONE}.html" not in result  # that run lies elsewhere: its name, no link
    run = (project / f"site/runs/{RUN}.html").read_text()
    assert "2.25" in run and "(50 values)" in run and "tokens in data/tokens" in run
    assert "a progress bar" not in run
    assert f"Run {RUN}" in run and 'href="../results/quick.html"' in run  # a way back
    assert not (project / f"site/runs/{GONE}.html").exists()
    assert RUN not in (project / "site/index.html").read_text()  # not in the sidebar


def test_notebook_pages_are_for_readers(project):
    page = (project / "site/theory/law.html").read_text()
    assert "hidden_name" not in page and "default_exp" not in page and "show_doc" not in page
    assert page.index("LawResult") < page.index('class="sig-name descname"><span class="pre">total_law_loss')
    assert "Lower bound X_-l:-1, nats." in page  # a colon does not make a type of what stands before it
    assert 'href="../api/ctxnb.theory.law.html#ctxnb.theory.law.total_law_loss"' in page
    assert re.search(r'href="#equation-eq-law">\s*Eq. 1', page) and 'href="#fig-law"' in page
    assert 'alt="A falling line."' in page
    assert "nbs/theory/law.ipynb" in page and re.search(r'href="\.\./_downloads/[^"]+/law\.ipynb"', page)
    block = page.index('<details class="api admonition')  # a chapter's functions come last, folded
    assert page.index("<figure") < block < page.index('class="sig-name descname"') and "set_up" not in page
    api = (project / "site/api/ctxnb.theory.law.html").read_text()
    assert 'id="ctxnb.theory.law.LawResult"' in api and "One law, one figure." in api


def test_numbers_and_words_of_a_figure(project):
    page = (project / "site/theory/law.html").read_text()
    (link,) = re.findall(r'href="(\.\./_downloads/[^"]+/law-fig-law\.csv)"', page)
    assert (project / "site/theory" / link).read_text() == "x,y\n1,2\n"
    assert page.index("<figcaption") < page.index(link) < page.index("</figcaption>")
    assert page.count("<figure") == 1 and "In <strong>words</strong>." in page  # beside the figure, not in it
    (full,) = re.findall(r'<a [^>]*href="(\.\./_images/[^"]+)"[^>]*>\s*<img', page)
    assert (project / "site/theory" / full).is_file() and "Fig. 1" in page


def test_tables_are_tidied(project):
    page = (project / "site/theory/law.html").read_text()
    (table,) = re.findall(r'<table[^>]*class="[^"]*numbers.*?</table>', page, re.DOTALL)
    head, body = table.split("<tbody>")
    assert head.count("<tr") == 1 and re.findall(r"<th>([^<]*)", head) == ["size", "loss", "inside"]  # the index's name beside the columns'
    assert re.findall(r"<t[dh]>([^<]*)", body) == ["16,000", "1.235", "yes", "50,000", "", "no"]


def test_search_knows_functions_but_not_runs(project):
    index = (project / "site/searchindex.js").read_text()
    assert "total_law_loss" in index and '"Train":' in index
    assert f"Run {RUN[:12]}" not in index  # listed as a document, found by no word


def test_stands_alone(project):
    loads = re.compile(
        r"<(?:script|link|img|iframe)\b[^>]*\s(?:src|href)=[\"'](?:https?:)?//|url\([\"']?(?:https?:)?//"
    )
    for path in (project / "site").rglob("*"):
        if path.suffix in {".html", ".css"}:
            text = path.read_text()
            assert not loads.search(text), path
            assert str(project) not in text and "file://" not in text, path
    page = (project / "site/theory/law.html").read_text()
    scripts = re.findall(r'<script[^>]*\ssrc="([^"?]+)', page)
    assert any("mathjax" in script for script in scripts)
    assert all((project / "site/theory" / script).is_file() for script in scripts)


def test_second_build_changes_nothing_and_reads_only(project):
    before = {
        path: path.stat().st_mtime_ns
        for top in ("site", "nbs", "data")
        for path in (project / top).rglob("*")
    }
    done = build(project)
    assert done.returncode == 0 and "up to date" in done.stdout
    after = {
        path: path.stat().st_mtime_ns
        for top in ("site", "nbs", "data")
        for path in (project / top).rglob("*")
    }
    assert before == after


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "nbs/theory/broken.ipynb is not a valid notebook"),
        (
            [
                new_markdown_cell("# Broken"),
                new_code_cell(
                    "1 / 0",
                    outputs=[
                        new_output(
                            "error", ename="ZeroDivisionError", evalue="division by zero", traceback=[]
                        )
                    ],
                ),
            ],
            "nbs/theory/broken.ipynb: cell 1 ends in ZeroDivisionError",
        ),
        ([new_markdown_cell("# Broken\n\nSee {eq}`eq-nowhere`.")], "theory/broken.ipynb"),
        (
            [
                new_markdown_cell("# Broken"),
                new_code_cell(
                    "x",
                    outputs=[
                        new_output(
                            "display_data",
                            {"text/html": "<script src='https://cdn.example.org/plot.js'></script>"},
                        )
                    ],
                ),
            ],
            "theory/broken.html loads https://cdn.example.org/plot.js",
        ),
    ],
    ids=["json", "error-output", "reference", "outside-request"],
)
def test_broken_notebook_is_named_and_the_old_site_stays(project, content, complaint):
    broken = project / "nbs/theory/broken.ipynb"
    page = project / "site/index.html"
    before = page.stat().st_mtime_ns
    try:
        broken.write_text(content) if isinstance(content, str) else write(broken, content)
        done = build(project)
    finally:
        broken.unlink()
    assert done.returncode != 0
    assert complaint in done.stderr and "last good build" in done.stderr
    assert page.stat().st_mtime_ns == before and not (project / "site/theory/broken.html").exists()


def test_result_notebook_that_fails_on_the_fresh_table_is_named(project):
    table = project / "data/runs/tables/quick.parquet"
    good = table.read_bytes()
    try:
        pd.DataFrame({"loss": [1.0]}).to_parquet(table)
        done = build(project)
    finally:
        table.write_bytes(good)
    assert done.returncode != 0
    assert (
        "nbs/results/quick.ipynb fails on data/runs/tables/quick.parquet" in done.stderr
        and "KeyError" in done.stderr
    )


def test_notebooks_name_their_kernel_and_nothing_else():
    """Without a kernel JupyterLab asks for one; what an editor leaves is no part of a notebook. The state of widgets belongs to outputs."""
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    found = {page.name: nbformat.read(page, 4).metadata for page in (Path(__file__).parents[1] / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in page.parts}
    assert {name: dict(metadata) for name, metadata in found.items() if metadata.get("kernelspec") != kernel or set(metadata) - {"kernelspec", "widgets"}} == {}
