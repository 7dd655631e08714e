"""The built site as a person meets it: every page in a real browser, on a desk and on a phone, without a network."""
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit
from xml.etree import ElementTree

import pytest
from browser import chromium
from bs4 import BeautifulSoup
from click.testing import CliRunner
from playwright.sync_api import Page, expect

from ctxnb.cli import advise, best

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
SINGLE_RUNS = 2  # pages of single runs differ in numbers only: so many of them are opened
GALLERY = "reference/gallery.html"  # all figures, small
pytestmark = pytest.mark.system("chromium")  # a minute or two: each page is loaded twice

LOOK = r"""async () => {
    await window.MathJax?.startup?.promise;
    const shown = element => element.checkVisibility() && !element.closest('mjx-container, [aria-hidden=true], .svg-inline--fa');
    const name = figure => figure.getAttribute('alt') || figure.getAttribute('aria-label') || figure.querySelector('title')?.textContent || '';
    const nameless = figure => !name(figure).trim() || /\.(png|svg|jpe?g|webp)$/.test(name(figure));  // its file: docutils' own makeshift
    const where = figure => (figure.closest('[id]')?.id || '') + ' ' + figure.outerHTML.slice(0, 80);
    const right = element => element.getBoundingClientRect().left + Math.max(element.scrollWidth, element.offsetWidth || 0);
    const boxed = element => element.tagName !== 'MAIN' && (getComputedStyle(element).overflowX !== 'visible'
        && element.getBoundingClientRect().right <= window.innerWidth + 1 || boxed(element.parentElement));  // scrolls by itself
    const spills = element => right(element) > window.innerWidth + 1 && !boxed(element) && !element.closest('.bd-sidebar-secondary')
        && !getComputedStyle(element).display.startsWith('inline');
    const scroller = element => element.closest('.pst-scrollable-table-container, div.cell_output');
    const figures = [...document.querySelectorAll('main img, main svg')].filter(shown);
    await Promise.all(figures.map(figure => figure.decode?.().catch(() => null)));
    const empty = figure => {
        const box = figure.getBoundingClientRect();
        return box.width < 2 || box.height < 2 || figure.naturalWidth === 0;
    };
    return {
        figures: figures.length,
        empty: figures.filter(empty).map(where),
        nameless: figures.filter(nameless).map(where),
        wide: document.documentElement.scrollWidth - window.innerWidth,
        widest: [...document.querySelectorAll('main *')]
            .filter(element => spills(element) && ![...element.children].some(spills))
            .map(element => `${element.tagName.toLowerCase()} "${element.textContent.trim().slice(0, 40)}"`),
        anchors: [...document.querySelectorAll('[id], a[name]')].map(element => element.id || element.name),
        links: [...document.querySelectorAll('a[href]')].map(link => link.href),
        title: document.title,
        drawn: [...document.querySelectorAll('main svg[viewBox] text')].filter(shown).map(text => [text.textContent, parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a || 99]),
        first: Math.min(...[...document.querySelectorAll('main figure, main div.two-theories')].filter(shown).map(figure => figure.getBoundingClientRect().top + window.scrollY)),
        cut: [...document.querySelectorAll('main div.highlight pre, main div.cell_output pre, main div.math, main div.math mjx-container, main table')]
            .filter(element => shown(element.closest('div.math') || element)).map(element => element.tagName === 'TABLE' ? scroller(element) : element)
            .filter(element => element && element.scrollWidth > element.clientWidth + 1)
            .map(element => `${element.tagName} of ${element.scrollWidth} px in ${element.clientWidth}: ${element.textContent.trim().slice(0, 40)}`),
        pictures: figures.filter(figure => figure.src).map(figure => [figure.src, figure.getBoundingClientRect().width / figure.naturalWidth]),
    };
}"""


@dataclass
class Visit:
    """What a browser found on one page at one width."""

    page: str
    width: str
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    found: dict = field(default_factory=dict)


def pages() -> list[str]:
    """Paths of the site's pages, with a few of those of single runs."""
    names = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    runs = [name for name in names if re.fullmatch(r"runs/[\w-]*-?[0-9a-f]{12,}\.html", name)]
    return [name for name in names if name not in runs[SINGLE_RUNS:]]


@pytest.fixture(scope="module")
def browser():
    if not (SITE / "index.html").is_file():
        subprocess.run([sys.executable, ROOT / "docs" / "build.py"], check=True)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def visits(browser) -> list[Visit]:
    """Every page at both widths, opened once for all tests of this file: a browser for each width, as a browser draws on one core."""
    with ThreadPoolExecutor(len(WIDTHS)) as pool:
        return list(chain.from_iterable(pool.map(tour, WIDTHS)))


def tour(width: str) -> list[Visit]:
    visits = []
    x, y = WIDTHS[width]
    with chromium() as browser, browser.new_context(viewport={"width": x, "height": y}, offline=True) as context:
        tab = context.new_page()
        tab.on("console", lambda message: visits[-1].errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: visits[-1].errors.append(str(error)))
        tab.on("requestfailed", lambda request: visits[-1].errors.append(f"not loaded: {request.url}"))
        tab.on("request", lambda request: visits[-1].outside.append(request.url) if is_outside(request.url) else None)
        for page in pages():
            visits.append(Visit(page, width))
            tab.goto((SITE / page).as_uri())
            visits[-1].found = tab.evaluate(LOOK)
    return visits


def parsed(page: str) -> BeautifulSoup:
    """A page of the site; takes .1 s."""
    return BeautifulSoup((SITE / page).read_text(encoding="utf-8"), "html.parser")


def is_outside(url: str) -> bool:
    """Whether a request leaves the site's folder."""
    return not url.startswith((SITE.as_uri() + "/", "data:", "blob:"))


def none(problems: list[str]) -> None:
    assert not problems, f"{len(problems)} found:\n" + "\n".join(problems)


def test_pages_load_without_errors(visits):
    assert len(visits) == len(WIDTHS) * len(pages()) > 0
    none([f"{visit.page} ({visit.width}): {error}" for visit in visits for error in visit.errors])


def test_no_page_asks_for_anything_outside_the_site(visits):
    none([f"{visit.page} ({visit.width}) asks for {url}" for visit in visits for url in visit.outside])


def test_figures_have_a_size_and_an_alternative_text(visits):
    assert any(visit.found["figures"] for visit in visits)
    none([f"{visit.page} ({visit.width}): no size: {figure}" for visit in visits for figure in visit.found["empty"]]
         + [f"{visit.page}: no alternative text: {figure}" for visit in visits if visit.width == "desk" for figure in visit.found["nameless"]])


def test_no_page_scrolls_sideways_on_a_phone(visits):
    none([f"{visit.page}: {visit.found['wide']} px too wide, because of {'; '.join(visit.found['widest'][:3])}"
          for visit in visits if visit.width == "phone" and visit.found["wide"] > 1])


def test_nothing_is_cut_off(visits):
    """Code, output and equations fit at both widths; tables at a desk, on a phone they scroll."""
    none([f"{visit.page} ({visit.width}): {what}" for visit in visits for what in visit.found["cut"] if visit.width == "desk" or "TABLE" not in what and "DIV" not in what[:3]])


def smallest_label(picture: Path) -> float:
    """Size of the smallest text of one of matplotlib's SVG files, in its own pixels; glyphs are drawn at 100 units."""
    sizes = [float(size) for size in re.findall(r'<g transform="translate\([^)]*\)[^"]*scale\((0\.\d+) -', picture.read_text(encoding="utf-8"))]
    return min(sizes, default=1.0) * 100 * 96 / 72


def test_labels_of_figures_can_be_read(visits):
    pictures = [(visit, Path(unquote(urlsplit(source).path)), scale) for visit in visits if visit.page != GALLERY for source, scale in visit.found["pictures"] if source.endswith(".svg")]
    assert pictures
    small = {(visit.page, visit.width, picture.name): size for visit, picture, scale in pictures if (size := scale * smallest_label(picture)) < 9}
    none([f"{page} ({width}): a label of {size:.1f} px in {name}" for (page, width, name), size in small.items()])
    assert any(visit.found["drawn"] for visit in visits if visit.width == "phone")
    none([f"{visit.page} ({visit.width}): {text!r} of {size:.1f} px" for visit in visits for text, size in visit.found["drawn"] if size < 9])


def tick_labels(picture: Path) -> list[tuple[str, float, float, float]]:
    """Labels of the x axes of one of matplotlib's SVG files: axes, y, left and right end, in its own units; glyphs are drawn at 100 units, of which a digit and a gap take 75."""
    group, found = "{http://www.w3.org/2000/svg}g", []
    for axes in ElementTree.parse(picture).iter(group):
        for tick in axes.iter(group) if axes.get("id", "").startswith("axes_") else ():
            for label in tick.iter(group) if tick.get("id", "").startswith("xtick_") else ():
                if at := re.fullmatch(r"translate\(([\d.-]+) ([\d.-]+)\) scale\((0\.\d+) -[\d.]+\)", label.get("transform", "")):
                    x, y, scale = map(float, at.groups())
                    glyphs = [float(place) for part in label.iter() for place in re.findall(r"translate\(([\d.]+)", part.get("transform", "")) if part is not label]
                    found.append((axes.get("id"), y, x, x + (max(glyphs, default=0.0) + 75) * scale))
    return found


def test_labels_of_an_axis_stand_apart(visits):
    pictures = {Path(unquote(urlsplit(source).path)): visit.page for visit in visits if visit.page != GALLERY for source, _ in visit.found["pictures"] if source.endswith(".svg")}
    labels = {picture: tick_labels(picture) for picture in pictures}
    assert sum(map(len, labels.values())) > 500
    none([f"{pictures[picture]}: labels at {one[2]:.0f} and {other[2]:.0f} of {one[0]} in {picture.name}" for picture, found in labels.items()
          for one, other in zip(found, found[1:]) if one[:2] == other[:2] and one[2] < other[2] < one[3]])


def test_figures_are_numbered_by_page_and_lead_to_their_file():
    """Each page begins with Fig. 1, and a click on a figure opens it alone."""
    numbered = 0
    for page in (page for page in pages() if page != GALLERY and "<figure" in (SITE / page).read_text(encoding="utf-8")):
        figures = parsed(page).select("main figure")
        found = [caption.get_text(strip=True) for figure in figures for caption in figure.select("span.caption-number")]
        assert found == [f"Fig. {i}" for i in range(1, len(found) + 1)], page
        numbered += len(found)
        for figure in figures:
            assert all((SITE / page).parent.joinpath(unquote(image.find_parent("a")["href"])).is_file() for image in figure.find_all("img")), page
    assert numbered > 50


def test_a_chapter_shows_its_figure_within_two_screens(visits):
    tops = {visit.page: visit.found["first"] for visit in visits if visit.width == "desk" and visit.page.startswith("theory/")}
    assert len(tops) > 5
    none([f"{page}: the first figure begins at {top} px" for page, top in tops.items() if not (top or 0) < 2 * WIDTHS["desk"][1]])


def test_words_come_before_code():
    """A page of the notebooks begins with a sentence and not with imports; templates are code from their parameters on."""
    for page in pages():
        if (ROOT / "nbs" / page).with_suffix(".ipynb").is_file() and not page.startswith("runs/"):
            article = parsed(page).select_one("article.bd-article")
            parts = article.select("div.cell_input, section p, section li, figure")
            first = next(part for part in parts if not part.find_parent(["blockquote", "details", "figcaption"]) and not part.find_parent("div", class_="origin"))
            assert first.name != "div", page


LOSSES = """button => {
  const before = button.previousElementSibling, table = before.matches("table") ? before : before.querySelector("table");
  const column = [...table.querySelectorAll("thead tr:last-child > *")].findIndex(cell => cell.textContent.trim() == "loss");
  return [...table.querySelectorAll("tbody > tr")].map(row => [parseFloat(row.cells[column].textContent), row.hidden]);
}"""


def test_a_folded_table_shows_its_best_rows(browser):
    with browser.new_context(viewport={"width": 1280, "height": 900}, offline=True) as context:
        tab = context.new_page()
        tab.goto((SITE / "results/train_sweep.html").as_uri())
        button = tab.locator("button.more", has_text="of lowest loss").last
        rows, folded = button.evaluate(LOSSES), tab.locator("main tr[hidden]").count()
        shown = sorted(loss for loss, hidden in rows if not hidden)
        assert len(shown) == 5 < len(rows) and shown == sorted(loss for loss, _ in rows)[:5]
        button.click()
        assert tab.locator("main tr[hidden]").count() == folded - len(rows) + 5


def test_no_description_is_an_empty_list():
    """`levels: L.` in a docstring says what L is; reST would begin a list with it."""
    empty = [page for page in pages() if page.startswith("api/") for item in parsed(page).select("main dd ol li") if not item.get_text(strip=True)]
    none(empty)


def test_the_gallery_shows_the_figures(visits):
    (gallery,) = [visit for visit in visits if visit.page == GALLERY and visit.width == "desk"]
    shown = {source.rpartition("/")[2] for source, _ in gallery.found["pictures"]}
    for page in ("theory/optimal_context.html", "results/train.html"):
        (visit,) = [visit for visit in visits if visit.page == page and visit.width == "desk"]
        assert visit.found["pictures"] and {source.rpartition("/")[2] for source, _ in visit.found["pictures"]} <= shown, page


def test_pages_are_light(visits):
    """A page with its figures: at most 1.5 MB, half of it words."""
    for visit in visits:
        files = {Path(unquote(urlsplit(source).path)) for source, _ in visit.found["pictures"] if source.startswith("file:")}
        words = (SITE / visit.page).stat().st_size
        if not visit.page.startswith(("genindex", "_modules", GALLERY)):
            assert words < 750_000 and words + sum(file.stat().st_size for file in files) < 1_500_000, visit.page


def test_titles_are_unique_and_found_first(visits, browser):
    titles = {visit.page: visit.found["title"].removesuffix(" — ctxnb") for visit in visits if visit.width == "desk"}
    twice = [title for title, number in Counter(titles.values()).items() if number > 1]
    none(twice)
    notebooks = {page: title for page, title in titles.items() if (ROOT / "nbs" / page).with_suffix(".ipynb").is_file() and page != "index.html"}
    with browser.new_context(offline=True) as context:
        tab = context.new_page()
        tab.goto((SITE / "search.html").as_uri() + "?q=context")
        tab.wait_for_function("Search.hasIndex()")
        first = tab.evaluate("titles => titles.map(title => Search._performSearch(...Search._parseQuery(title)).at(-1)?.[0])", list(notebooks.values()))
    none([f"{title!r} finds {found} first" for (page, title), found in zip(notebooks.items(), first) if f"{found}.html" != page])


def rows_of(page: str) -> list[list[str]]:
    """The cells of all rows of the tables of a page."""
    return [[cell.get_text(" ", strip=True) for cell in row.find_all("td")] for row in parsed(page).select("main tr") if row.find("td")]


def test_front_page_scorecard_planner_and_command_agree():
    scorecard = rows_of("about/claims.html")
    found = [row for row in rows_of("index.html") if len(row) == 5]
    assert len(found) > 5
    none([f"not on the scorecard: {row}" for row in found if row not in scorecard])
    for start, claim in (("Text: GPTs", "More data, longer best context: text, books and plays"), ("Text: small", "More data, longer best context: text, speeches")):
        (number,) = [row[2] for row in scorecard if row[0] == claim]
        ends = re.findall(r"(\d+) \((\d+) to (\d+)\)", number)
        table = ROOT / "data/results" / f"{next(name for title, name in PILOTS.items() if title.startswith(start))}.parquet"
        said = re.findall(r"best l = (\d+) \((\d+) to (\d+)\)", CliRunner().invoke(best, [str(table)]).output)
        assert [said[0], said[-1]] == ends, claim
        (planner,) = [row[1] for row in rows_of("results/advice.html") if row[0].startswith(start) and len(row) == 5]
        measured = re.findall(r": (\d+) \((\d+) to (\d+)\)", planner)
        assert [measured[0], measured[-1]] == ends, claim


def test_links_between_pages_lead_somewhere(visits):
    anchors = {(SITE / visit.page).as_uri(): set(visit.found["anchors"]) for visit in visits}
    broken = {}
    for visit in visits:
        for link in visit.found["links"]:
            url, anchor = urldefrag(link)
            url = url.partition("?")[0]
            if url.startswith("file:"):
                if not Path(unquote(urlsplit(url).path)).is_file():
                    broken[link] = visit.page
                elif anchor and url in anchors and not {anchor, unquote(anchor)} & anchors[url]:
                    broken[link] = visit.page
    none([f"{page} links to {link}" for link, page in broken.items()])


def search(tab: Page, words: str) -> list[str]:
    """Type words into the theme's search field, as a reader does, and return the titles found."""
    tab.goto((SITE / "index.html").as_uri())
    tab.get_by_role("button", name="Search").first.click()
    tab.locator("input[type=search]:visible").first.fill(words)
    tab.keyboard.press("Enter")
    expect(tab.locator("#search-results .search-summary")).to_contain_text("finished", timeout=20_000)
    return tab.locator("#search-results li").all_inner_texts()


@pytest.mark.parametrize("words, page", [("optimal context", "theory/optimal_context.html"), ("bayes_risk", "api/ctxnb.stats.sources.html")])
def test_search_finds(browser, words, page):
    with browser.new_context(viewport={"width": 1280, "height": 900}, offline=True) as context:
        tab = context.new_page()
        assert search(tab, words), f"nothing found for {words!r}"
        found = tab.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)")
    assert any(urlsplit(link).path.endswith("/" + page) for link in found), f"{page} is not among {found}"


PILOTS = {"Text: small": "train-quick", "Text: GPTs": "train_bytes-standard", "Synthetic": "synthetic-quick"}  # beginning of a title -> table


@pytest.fixture(scope="module")
def planner(browser):
    """The planner's page."""
    with browser.new_context(viewport={"width": 390, "height": 900}, offline=True) as context:
        tab = context.new_page()
        tab.goto((SITE / "results/advice.html").as_uri())
        tab.locator("div.planner pre").filter(has_text=re.compile("Measured|Refused")).wait_for()
        yield tab


@pytest.mark.parametrize("asked", ["30k", "128000", "2M"])
def test_planner_says_what_the_command_says(planner, asked):
    for title in planner.locator("div.planner select[name=fit] option").all_inner_texts():
        planner.locator("div.planner select[name=fit]").select_option(title)
        assert planner.locator("div.planner .badge").is_visible() == title.startswith("Simulated")
        if title.startswith("Simulated"):  # no table of ours
            continue
        planner.locator("div.planner input[name=exact]").fill(asked)
        shown = planner.locator("div.planner output").inner_text().rpartition("shown: ")[2].replace(",", "")
        table = ROOT / "data/results" / f"{next(name for start, name in PILOTS.items() if title.startswith(start))}.parquet"
        done = CliRunner().invoke(advise, [str(table), "--train-tokens", shown])
        assert done.exit_code in (0, 3), done.output
        assert planner.locator("div.planner pre").inner_text().strip() == done.output.strip(), title


def test_planner_takes_millions_and_refuses_words(planner):
    planner.locator("div.planner select[name=fit]").select_option(index=0)
    planner.locator("div.planner input[name=exact]").fill("50M")
    assert "No prediction" in planner.locator("div.planner p.headline").inner_text()
    target = planner.locator("div.planner p.headline a").get_attribute("href")
    assert planner.locator(target).count() == 1, "the refusal links to what to do"
    planner.locator("div.planner select[name=unit]").select_option(index=1)  # GPT-2 tokens of some five bytes
    taken = planner.locator("div.planner output").inner_text().removeprefix("= ").split()[0].replace(",", "")
    assert 2e8 < float(taken) < 3e8
    planner.locator("div.planner select[name=unit]").select_option(index=0)
    planner.locator("div.planner input[name=exact]").fill("many")
    assert "300k or 50M" in planner.locator("div.planner p.headline").inner_text()


@pytest.fixture
def front_page(browser):
    """The front page, as it opens on a desk."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, offline=True) as context:
        tab = context.new_page()
        tab.goto((SITE / "index.html").as_uri())
        yield tab


def test_from_the_front_page_to_an_answer_for_50_million_tokens(front_page):
    front_page.locator("section#ctxnb > ul").get_by_role("link", name="The planner").click()
    front_page.locator("div.planner input[name=exact]").fill("50M")
    front_page.locator("div.planner p.headline a").click()  # refused: what to do instead
    assert front_page.url.endswith("#what-to-do")
    expect(front_page.locator("#what-to-do")).to_be_in_viewport()
    expect(front_page.get_by_role("heading", name="You have 50 M tokens")).to_be_visible()


def test_from_the_front_page_to_a_run_on_ones_own_text(front_page):
    front_page.locator("section#ctxnb > ul").get_by_role("link", name="Five commands").click()
    commands = front_page.locator("#your-own-text-on-a-gpu pre").first
    expect(commands).to_be_in_viewport()
    assert len(commands.inner_text().strip().splitlines()) == 5 and "--set corpus=" in commands.inner_text()


def test_from_the_front_page_to_why_more_context_can_hurt(front_page):
    front_page.locator("section#ctxnb > ul").get_by_role("link", name="Why more context can hurt").click()
    expect(front_page.get_by_role("heading", name="Why more context can hurt, or not")).to_be_visible()
    words = front_page.locator("div.two-theories p").last
    before = words.inner_text()
    front_page.locator("div.two-theories input[type=range]").fill("5")
    expect(words).not_to_have_text(before)


CONTRAST = """() => {
  const rgb = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const clear = colour => rgb(colour).length == 4 && rgb(colour)[3] < 0.5;
  const light = colour => { const [r, g, b] = rgb(colour).slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = element => { for (let e = element; e; e = e.parentElement) if (!clear(getComputedStyle(e).backgroundColor)) return getComputedStyle(e).backgroundColor; return "rgb(0, 0, 0)"; };
  const faint = [];
  for (const element of document.querySelectorAll("main *:not(script, style)")) {
    if (element.closest("mjx-container, .headerlink, figure svg") || ![...element.childNodes].some(node => node.nodeType == 3 && node.data.trim())) continue;
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    if (!box.width || style.visibility == "hidden") continue;
    const pair = [light(element instanceof SVGElement ? style.fill : style.color), light(ground(element))];
    if ((Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05) < 3) faint.push(element.textContent.trim().slice(0, 40));
  }
  return faint;
}"""


@pytest.mark.parametrize("page", ["index", "about/claims", "about/command", "results/advice", "results/recipes", "results/measure_features", "theory/why", "theory/decomposition", "batch/grid", "api/ctxnb.stats.laws"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(browser, page, scheme):
    """Contrast of at least 3, what WCAG asks for large text; muted words are the faintest."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme, offline=True) as context:
        tab = context.new_page()
        tab.goto((SITE / f"{page}.html").as_uri())
        tab.wait_for_timeout(500)
        none(tab.evaluate(CONTRAST))
