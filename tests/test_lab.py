"""JupyterLab as a person uses it: `make lab`, a notebook opened in a real browser, Run All Cells, and what is then on the screen.

The notebooks are a copy, so that nothing is saved into the project, and their runs go into a folder of their own.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from browser import chromium
from playwright.sync_api import Locator, Page, expect

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "for-this-test-only"
MINUTE = 60_000  # Playwright's milliseconds
pytestmark = pytest.mark.system("chromium")  # about a minute: a server, two kernels, a training run

WATCH_PICTURES = """() => {
    window.pictures = new Set();
    const look = () => document.querySelectorAll('.jp-OutputArea img').forEach(image => window.pictures.add(image.src));
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']});
}"""


@dataclass
class Lab:
    """A running JupyterLab.

    Args:
        url: its address.
        project: the copy of the project that it works on.
    """

    url: str
    project: Path

    def open(self, browser, notebook: str) -> Page:
        """A tab that shows one notebook, with its kernel idle."""
        tab = browser.new_page(viewport={"width": 1400, "height": 1000})
        tab.goto(f"{self.url}/lab/tree/nbs/{notebook}?token={TOKEN}&reset")
        expect(tab.get_by_text("| Idle").first).to_be_visible(timeout=MINUTE)
        return tab

    def run_all(self, tab: Page) -> None:
        """Start all cells, as one does by the menu."""
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        expect(last_prompt(tab)).to_have_text("[*]:")

    def ended(self, tab: Page, notebook: str) -> nbformat.NotebookNode:
        """Wait until all cells have run, save, and read what was saved."""
        expect(last_prompt(tab)).not_to_have_text("[*]:", timeout=2 * MINUTE)
        with tab.expect_request(lambda request: request.method == "PUT" and "/api/contents/" in request.url) as save:
            tab.keyboard.press("Control+s")
        answer = save.value.response()  # the file may be empty while the server still writes it
        assert answer.ok, f"{notebook} was not saved: {answer.status} {answer.status_text}"
        return nbformat.read(self.project / "nbs" / notebook, as_version=4)


def last_prompt(tab: Page) -> Locator:
    return tab.locator(".jp-CodeCell .jp-InputArea-prompt").last


def wait(true, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`make lab` in a copy of the project: the notebooks are copied, data are the project's, runs are new."""
    project = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", project / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("Makefile", "settings.ini", "jupyter_lab_config.py"):
        shutil.copy(ROOT / name, project)
    (project / "data").symlink_to(ROOT / "data")
    (project / ".venv").symlink_to(sys.prefix)
    settings = project / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))  # cells that are not in view, too
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "CTXNB_RUNS": str(project / "runs"), "JUPYTER_PORT": str(port), "JUPYTER_TOKEN": TOKEN, "BROWSER": "true",
        "JUPYTERLAB_SETTINGS_DIR": str(project / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(project / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(project / "config"), "JUPYTER_DATA_DIR": str(project / "jupyter"), "JUPYTER_RUNTIME_DIR": str(project / "runtime"),
    }
    with open(project / "lab.log", "w") as log:
        server = subprocess.Popen(["make", "--old-file=.venv/.ready", "lab"], cwd=project, env=environment, stdout=log, stderr=log,
                                  start_new_session=True)
    lab = Lab(f"http://127.0.0.1:{port}", project)
    try:
        wait(lambda: server.poll() is not None or answers(f"{lab.url}/api/status?token={TOKEN}"), "JupyterLab", 60)
        assert server.poll() is None, (project / "lab.log").read_text()
        yield lab
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # it ends its kernels
        server.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def ran_well(notebook: nbformat.NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert code and all(cell.execution_count for cell in code), "a cell was not run"
    errors = [f"{output.ename}: {output.evalue}" for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not errors, errors


def shown_pictures(tab: Page) -> int:
    """Figures in the outputs that have a size on the screen."""
    return tab.locator(".jp-OutputArea img, .jp-RenderedSVG svg").evaluate_all(
        "all => all.filter(one => one.getBoundingClientRect().width > 100 && one.getBoundingClientRect().height > 100).length")


def test_opens_at_the_start_page(browser, lab):
    tab = browser.new_page()
    tab.goto(f"{lab.url}/?token={TOKEN}")
    expect(tab.get_by_role("heading", name="Start here")).to_be_visible(timeout=MINUTE)
    tab.locator(".jp-BreadCrumbs-home").click()
    expect(tab.locator(".jp-DirListing-itemText", has_text=re.compile("^data$"))).to_be_visible(timeout=MINUTE)  # the grids are within reach
    assert tab.get_by_text("official Jupyter news").count() == 0
    tab.get_by_role("link", name="the optimal context").click()  # a link to a notebook opens it in JupyterLab
    expect(tab.get_by_role("tab", name="optimal_context.ipynb")).to_be_visible(timeout=MINUTE)
    tab.close()


def test_a_theory_chapter_opens_unchanged_and_runs_top_to_bottom(browser, lab):
    tab = lab.open(browser, "theory/bayes_risk.ipynb")
    shown = tab.locator(".jp-Notebook").inner_text()
    assert "{eq}" not in shown and "(eq-" not in shown and tab.locator(".jp-Notebook .katex").count()  # equations and references to them
    assert tab.locator(".lm-TabBar-tab.jp-mod-dirty").count() == 0
    lab.run_all(tab)
    ran_well(lab.ended(tab, "theory/bayes_risk.ipynb"))
    assert shown_pictures(tab)
    tab.close()


def test_the_planner_shows_its_answer_and_plot(browser, lab):
    tab = lab.open(browser, "results/advice.ipynb")
    lab.run_all(tab)
    ran_well(lab.ended(tab, "results/advice.ipynb"))
    assert tab.locator(".jp-OutputArea .widget-dropdown").count() and shown_pictures(tab)
    tab.close()


def test_training_is_watched_interrupted_and_goes_on(browser, lab):
    tab = lab.open(browser, "try/train.ipynb")
    tab.evaluate(WATCH_PICTURES)
    lab.run_all(tab)
    tab.wait_for_function("window.pictures.size > 1", timeout=2 * MINUTE)  # none before the first point
    assert tab.locator(".jp-OutputArea .widget-hslider").count() == 2
    tab.get_by_role("button", name="Interrupt the kernel").click()
    expect(tab.get_by_text("stopped; run the cell again")).to_be_visible(timeout=MINUTE)
    notebook = lab.ended(tab, "try/train.ipynb")
    ran_well(notebook)
    assert "no result yet" in str(notebook.cells[-2].outputs)

    before = tab.evaluate("window.pictures.size")
    lab.run_all(tab)
    notebook = lab.ended(tab, "try/train.ipynb")
    ran_well(notebook)
    assert shown_pictures(tab) >= 2  # the live curve, and the run among the recorded ones
    changes = tab.evaluate("window.pictures.size") - before
    assert changes > 4, f"the curve was drawn {changes - 1} times while the run worked"
    (result,) = (lab.project / "runs").glob("train-*/result.json")
    assert f"Yours: {json.loads(result.read_text())['loss']:.3f}" in str(notebook.cells[-2].outputs)
    tab.close()
