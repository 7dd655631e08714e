"""A notebook as a reader of the site should see it: its cells, its tables, its figures and their numbers."""
import ast
import base64
import gzip
import math
import re
from collections.abc import Iterable
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup, Tag
from nbformat.v4 import new_code_cell, new_markdown_cell

# --- cells --------------------------------------------------------------------------------------------------


def for_readers(nb: nbformat.NotebookNode, chapter: bool = False) -> nbformat.NotebookNode:
    """A notebook as a reader should see it.

    Args:
        nb: as it was read; changed.
        chapter: whether it is read for what it says, as theory and results are: code is opened by a click, code that shows nothing (set-up, tests) is left out, and what is exported is
            described in a block at the end, with the sentences that introduce it.
    """
    module = next((f"ctxnb.{found[1]}" for cell in nb.cells if (found := re.search(r"^#\| *default_exp +(\S+)", cell.source, re.MULTILINE))), "")
    cells, entries = [], []
    for cell in nb.cells:
        exported = cell.cell_type == "code" and bool(re.search(r"^#\| *export\b", cell.source, re.MULTILINE))
        parts = code_cells(cell, module, chapter) if cell.cell_type == "code" else [cell]
        if chapter and cell.cell_type == "code":
            described = [part.source for part in parts if part.cell_type == "markdown"]
            if exported and cells and is_introduction(cells[-1]):
                introduction = cells.pop().source
                described[:0] = [introduction] * bool(described)
            entries += described
            parts = [part for part in parts if part.get("outputs")]
        cells += parts
    if chapter:
        cells = [cell for cell, following in zip(cells, [*cells[1:], None]) if not is_empty_section(cell, following)]
    if entries:
        cells.append(new_markdown_cell("::::{admonition} Functions and classes of this chapter\n:collapsible: closed\n:class: api\n\n" + "\n\n".join(entries) + "\n::::"))
    nb.cells = words_first([cell for cell in cells if cell.source.strip() or cell.get("outputs")])
    nb.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})  # for the highlighting of code
    return nb


def words_first(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Cells with the set-up that follows a bare title (imports, say) behind the first words."""
    first = next((i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and i and not cell.source.startswith("```{rst}")), 0)
    if first > 1 and not re.search(r"^(?!#|>)\S", cells[0].source, re.MULTILINE) and all(cell.cell_type == "code" and not cell.outputs for cell in cells[1:first]):
        return [*cells[:1], *cells[first:first + 1], *cells[1:first], *cells[first + 1:]]
    return cells


def is_introduction(cell: nbformat.NotebookNode) -> bool:
    """Whether words are but a sentence or two about the code below them: one short paragraph, no heading, list, table or equation."""
    words = cell.source.strip()
    return cell.cell_type == "markdown" and len(words) < 240 and "\n\n" not in words and not re.search(r"^(#|[-*|:>(]|\d\.)|\$\$|^```", words, re.MULTILINE)


def is_empty_section(cell: nbformat.NotebookNode, following: nbformat.NotebookNode | None) -> bool:
    """Whether a cell is a heading whose code is not shown: the next cell begins a section of the same rank or a higher one, or there is none."""
    title = re.fullmatch(r"(#+) [^\n]*", cell.source.strip()) if cell.cell_type == "markdown" else None
    below = re.match(r"(#+) ", following.source) if following is not None and following.cell_type == "markdown" else None
    return bool(title) and (following is None or bool(below) and len(below[1]) <= len(title[1]))


def code_cells(cell: nbformat.NotebookNode, module: str, folded: bool) -> list[nbformat.NotebookNode]:
    """What becomes of a code cell: nothing if it is hidden, its documentation if it is exported, else itself in MyST-NB's terms."""
    words = set(re.findall(r"^#\| *([\w-]+)(?= *$| +\S)", cell.source, flags=re.MULTILINE))
    options = {key: value.strip().strip("\"'") for key, value in re.findall(r"^#\| *([\w-]+) *: *(.*)$", cell.source, flags=re.MULTILINE)}
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    if words & {"hide", "default_exp", "exporti"}:
        return []
    if "export" in words:
        return [new_markdown_cell("```{rst}\n" + entry + "```") for entry in documentation(cell.source, module)]
    tags = set(cell.metadata.get("tags", [])) | ({"hide-input"} if folded else set())
    tags |= {tag for key, value, tag in (("echo", "false", "remove-input"), ("output", "false", "remove-output"), ("code-fold", "true", "hide-input"))
             if options.get(key) == value}
    cell.metadata["tags"] = sorted(tags - {"hide-input"} if "remove-input" in tags else tags)
    # a widget needs a kernel and somebody's server; its other forms, if any, say nothing
    cell.outputs = [output for output in cell.outputs if "application/vnd.jupyter.widget-view+json" not in output.get("data", {})]
    figure = {key: options[name] for key, name in (("caption", "fig-cap"), ("name", "label")) if name in options}
    mystnb = ({"figure": figure} if figure else {}) | ({"image": {"alt": options["fig-alt"]}} if "fig-alt" in options else {})
    if not mystnb:
        return [cell]
    cell.metadata["mystnb"] = mystnb
    # what a plotting call returns is for nobody; MyST-NB makes a figure of every other output, so words get a cell of their own
    cell.outputs = [output for output in cell.outputs if output.output_type != "execute_result" or output.data.keys() - {"text/plain"}]
    words = [output for output in cell.outputs if figure and not any(kind.startswith("image/") for kind in output.get("data", {}))]
    cell.outputs = [output for output in cell.outputs if output not in words]
    return [cell, new_code_cell("# the words of the figure above", outputs=words, metadata={"tags": ["remove-input"]})] if words else [cell]


def documentation(source: str, module: str) -> list[str]:
    """reST for the public functions and classes of an exported cell, in its order; described in full on the module's own page."""
    entries = []
    for line in ast.parse(source).body:
        if isinstance(line, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not line.name.startswith("_"):
            kind, methods = "class" if isinstance(line, ast.ClassDef) else "function", []
            if kind == "class":
                methods = [part.name for part in line.body if isinstance(part, ast.FunctionDef) and part.name[0] != "_" and ast.get_docstring(part)]
            members = ", ".join(f":py:obj:`{name} <{module}.{line.name}.{name}>`" for name in methods)
            entries.append(f".. auto{kind}:: {module}.{line.name}\n   :no-index:\n" + (f"\n   Members: {members}\n" if members else "") + "\n")
    return entries


# --- tables -------------------------------------------------------------------------------------------------


def tidy_tables(nb: nbformat.NotebookNode, runs: Iterable[str]) -> None:
    """One style for the tables of pandas and its Styler; links to the pages of runs that are not on this machine become plain text."""
    link = re.compile(r'<a [^>]*href="\.\./runs/([^"/]+)\.html"[^>]*>(.*?)</a>', re.DOTALL)
    for data in [output.data for cell in nb.cells for output in cell.get("outputs", []) if "text/html" in output.get("data", {})]:
        html = link.sub(lambda match: match[0] if match[1] in runs else match[2], data["text/html"])
        if "<thead" in html:
            soup = BeautifulSoup(html, "html.parser")
            for style in soup.find_all("style", scoped=True):  # pandas' own, which no browser scopes: it would align other tables too
                style.decompose()
            for table in soup.find_all("table"):
                table["class"] = [*(name for name in table.get("class", []) if name != "dataframe"), "numbers"]  # the theme has stripes for the one
                tidy_head(soup, table)
                tidy_cells(table)
            html = str(soup)
        data["text/html"] = html


def tidy_head(soup: BeautifulSoup, table: Tag) -> None:
    """One row less where pandas puts the names of the index below those of the columns; no index that only counts rows."""
    rows, body = table.thead.find_all("tr"), table.tbody.find_all("tr") if table.tbody else []
    levels = len(body[0].find_all("th")) if body else 0
    if len(rows) > 1:
        above, last = (row.find_all("th") for row in rows[-2:])
        if len(above) == len(last) > levels and any(map(words, last[:levels])) and not any(map(words, last[levels:])):
            for cell, name in zip(above, map(words, last[:levels])):
                cell.extend(([soup.new_tag("br")] if words(cell) and name else []) + [name] * bool(name))
            rows.pop().decompose()
    corner = rows[-1].find("th")
    if levels == 1 and corner and not words(corner) and [words(row.th) for row in body] == [str(i) for i in range(len(body))]:
        for cell in [row.find("th") for row in (*rows, *body)]:
            cell.decompose()
    for name in [text for cell in table.thead.find_all("th") for text in cell.find_all(string=re.compile("_"))]:
        for i, part in enumerate(name.split("_")):  # a name may break behind its underscores
            name.insert_before(*[soup.new_tag("wbr")] * bool(i), part + "_" * (i < name.count("_")))
        name.extract()


def tidy_cells(table: Tag) -> None:
    """Numbers as people read them; cells with many words wrap."""
    for cell in table.tbody.find_all(["td", "th"]) if table.tbody else []:
        if cell.string is not None:
            cell.string.replace_with(plain(cell.string.strip()))
        if len(words(cell)) > 32:
            cell["class"] = [*cell.get("class", []), "words"]


def words(cell: Tag) -> str:
    return cell.get_text(" ", strip=True)


def plain(text: str) -> str:
    """The text of a table's cell: four digits of a measured number, thousands set apart, yes for True, nothing for NaN."""
    if text in (spoken := {"True": "yes", "False": "no", "NaN": "", "nan": "", "None": "", "inf": "∞", "-inf": "−∞"}):
        return spoken[text]
    if re.fullmatch(r"-?\d{4,}", text):
        return f"{int(text):,}"
    if re.fullmatch(r"-?\d+\.\d{4,}(e[-+]\d+)?", text):
        return four_digits(text)
    return re.sub(r"[][]", "", text) if re.fullmatch(r"\[[\d., ]+\]", text) else text


def four_digits(text: str) -> str:
    """A number with four significant digits, and zeros at its end where it had them: a column keeps its decimals."""
    value, decimals = float(text), len(text.partition(".")[2])
    if "e" in text:
        return f"{value:.3e}"
    if abs(value) < 10.0 ** -decimals:
        return f"{value:.4g}"
    return f"{value:,.{max(0, min(decimals, 3 - math.floor(math.log10(abs(value)))))}f}"


def round_words(nb: nbformat.NotebookNode) -> None:
    """Numbers that a chapter prints with all their digits keep four."""
    for output in [output for cell in nb.cells for output in cell.get("outputs", [])]:
        holder, key = (output, "text") if output.output_type == "stream" else (output.get("data", {}), "text/plain")
        if key in holder:
            holder[key] = re.sub(r"(?<![\w.])-?\d+\.\d{6,}(e[-+]\d+)?", lambda match: f"{float(match[0]):.4g}", holder[key])


# --- figures ------------------------------------------------------------------------------------------------


def unpacked(packed: str) -> str:
    """Text that a notebook keeps compressed."""
    return gzip.decompress(base64.b64decode(packed)).decode()


def offer_numbers(nb: nbformat.NotebookNode, page: str) -> dict[str, str]:
    """Show figures as SVG, and move the numbers that they carry as CSV into files (name below nbs/ -> text), with a link below each."""
    files = {}
    for i, cell in reversed(list(enumerate(nb.cells))):
        data = [output.get("data", {}) for output in cell.get("outputs", [])]
        for d in data:
            if vector := d.pop("application/vnd.ctxnb.svg+gzip", None):
                d["image/svg+xml"] = unpacked(vector)
                d.pop("image/png", None)
        texts = [d.pop("text/csv") for d in data if "text/csv" in d]
        texts += [unpacked(d.pop("application/gzip")) for d in data if "application/gzip" in d]
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        for k, text in enumerate(texts):
            name = figure.get("name", f"figure-{i}") + (f"-{k + 1}" if len(texts) > 1 else "")
            files[f"{page}-{name}.csv"] = text
            link = f"{{download}}`The numbers (CSV) <{Path(page).name}-{name}.csv>`"
            if "caption" in figure:
                figure["caption"] += f" {link}"
            elif len(texts) == len(data) and "text/markdown" in data[k]:  # beside the words that came with them
                data[k]["text/markdown"] += f" {link}"
            else:
                nb.cells.insert(i + 1, new_markdown_cell(link))
    return files
