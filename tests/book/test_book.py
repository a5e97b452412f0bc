"""The book: its sources, and every page of the built book in a real browser."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pandas as pd
import pytest
import yaml

from fmd.config import ROOT

PAGES = sorted((ROOT / "book").glob("*.md"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
ADDRESS = CONFIG["repository"]["url"]
TYPED = r"\b\d\d\.\d+\b|\d\s?%|[+−-]\d[\d.]* points"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def toc_files() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]


def prose(text: str) -> str:
    """A page without its code, equations and front matter."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^(```|~~~).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)


# ---- sources


def test_toc_lists_every_page_and_notebook():
    there = [p.relative_to(ROOT).with_suffix("").as_posix() for p in PAGES]
    there += [f"notebooks/{p.stem}" for p in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(toc_files()) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_no_result_is_typed_by_hand(page):
    """Accuracies and gains look like '76.5', '97 %' or '+0.7 points'; cells write those."""
    text = prose(page.read_text()).replace("95 % interval", "")
    assert re.findall(TYPED, text) == []


def test_a_typed_result_would_be_found():
    text = "---\ntitle: x\n---\nIt gives 76.5 or 97 %, +0.7 points.\n\n```python\nx = 12.5\n```\n"
    assert re.findall(TYPED, prose(text)) == ["76.5", "7 %", "+0.7 points"]


def test_each_reported_number_has_a_source():
    with (ROOT / "book/data/reported.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 30
    for row in rows:
        assert None not in row and None not in row.values(), row  # a comma too many or too few
        assert row["source"] and "remembered" not in row["source"], row
        assert row["kind"] and row["method"] and row["data"], row
        assert 0 < float(row["top1"]) < 100, row
        assert not row["url"] or urlparse(row["url"]).scheme == "https", row


def test_public_address_stands_in_one_place():
    """Whatever else names the repository agrees with _config.yml."""
    name = ADDRESS.rsplit("/", 1)[-1]
    files = [ROOT / f for f in ("README.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml")]
    files += [*PAGES, *(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / ".github").rglob("*.yml")]
    owner_and_name = ADDRESS.removeprefix("https://github.com/")
    for file in filter(Path.exists, files):
        owned = rf"github(?:\.com|\.io)?/([\w.-]+/{re.escape(name)})\b"
        for found in re.findall(owned, file.read_text()):
            assert found == owner_and_name, f"{file.name} names {found}"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == ADDRESS


@pytest.mark.parametrize("name", [f for f in toc_files() if f.startswith("notebooks/")])
def test_notebook_has_a_title(name):
    cells = json.loads((ROOT / f"{name}.ipynb").read_text())["cells"]
    assert "".join(cells[0]["source"]).lstrip().startswith("# ")


# ---- what the cells say


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    import pages

    return pages


def summary(**differences: tuple[float, float]) -> pd.DataFrame:
    rows = [
        {"variant": v, "difference": d, "difference_ci": ci, "pairs": 5}
        for v, (d, ci) in differences.items()
    ]
    return pd.DataFrame(rows)


def test_answer_sorts_the_variants_by_their_intervals(pages):
    said = pages.answer(summary(intra=(2.0, 1.0), inter=(-0.5, 0.6), full=(-3.0, 1.0), none=(9, 1)))
    better, unclear, worse = said.split(";")
    assert "1 of 3" in better and "`intra` (+2.0 ± 1.0 points)" in better
    assert "`inter` (−0.5 ± 0.6 points)" in unclear and "not distinguishable" in unclear
    assert "`full` (−3.0 ± 1.0 points)" in worse and "worse" in worse
    assert "none" not in said  # it has no manifold term
    assert "5 seeds" in said


def test_answer_says_when_there_are_too_few_runs(pages):
    assert "too few" in pages.answer(summary(intra=(2.0, float("nan"))))


def test_rerun_and_paper_are_read_from_the_data_file(pages):
    assert pages.reported_pair("paper") == (76.5, 75.8)
    assert pages.reported_pair("rerun") == (75.7, 75.7)


# ---- the built book


# One test uses these two, so that parallel workers do not build the book twice.


@pytest.fixture
def book(tmp_path_factory) -> Path:
    """The book as `make book` builds it, in a folder of its own; warnings are errors."""
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).parent / "jupyter-book", "build", ROOT, "--path-output", out]
    done = subprocess.run(
        [*command, "-W", "-n", "--keep-going"],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = (done.stdout + done.stderr).splitlines()
    wrong = [line for line in lines if re.search(r"WARNING: |Error|ERROR", line)]
    assert done.returncode == 0, "\n".join(wrong or lines[-40:])
    return out / "_build" / "html"


@pytest.fixture
def browser(book):
    if BROWSER is None:
        pytest.skip("no chromium or google-chrome on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


# What a reader would notice on a page, collected inside it.
LOOK = """() => ({
    width: document.documentElement.scrollWidth,
    images: [...document.images].map(i => [i.currentSrc.slice(0, 80), i.naturalWidth, i.alt]),
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    rawMath: [...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container'))
        .map(m => m.textContent.slice(0, 60)),
    mathErrors: document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
    math: document.querySelectorAll('mjx-container svg').length,
    title: document.querySelector('h1')?.textContent ?? '',
})"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_page_opens_clean_and_offline(browser, book):
    problems = []
    files = [book / f"{name}.html" for name in toc_files()]
    files += [book / "index.html", book / "genindex.html", book / "search.html"]
    ids = {}

    def anchors(path: Path) -> set[str]:
        if path not in ids:
            ids[path] = set(re.findall(r'\b(?:id|name)="([^"]+)"', path.read_text()))
        return ids[path]

    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.on("console", lambda m: m.type == "error" and problems.append(f"{page.url}: {m.text}"))
    page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
    page.on("requestfailed", lambda r: problems.append(f"{page.url}: {r.url} failed"))
    page.on(
        "request",
        lambda r: r.url.startswith("http") and problems.append(f"{page.url}: loads {r.url}"),
    )
    for file in files:
        page.goto(file.as_uri(), wait_until="networkidle")
        if page.locator(".math").count():
            page.wait_for_function("window.MathJax?.startup?.promise !== undefined")
            page.evaluate("() => window.MathJax.startup.promise.then(() => null)")
        seen = page.evaluate(LOOK)
        name = file.relative_to(book)
        if not seen["title"] and name.with_suffix("").as_posix() in toc_files():
            problems.append(f"{name}: no title")
        if seen["width"] > 390:
            problems.append(f"{name}: {seen['width']} pixels wide on a phone of 390")
        problems += [f"{name}: image {i[0]} is broken" for i in seen["images"] if not i[1]]
        problems += [f"{name}: image {i[0]} has no text" for i in seen["images"] if not i[2]]
        problems += [f"{name}: equation not set: {m}" for m in seen["rawMath"]]
        if seen["mathErrors"]:
            problems.append(f"{name}: {seen['mathErrors']} equations with errors")
        if file.stem == "method" and seen["math"] < 10:
            problems.append(f"{name}: only {seen['math']} equations")
        colab = [link for link in seen["links"] if "/colab.research.google.com/" in link]
        if name.parts[0] != "notebooks" and colab:
            problems.append(f"{name}: a Colab button, though Colab opens notebooks only")
        if name.parts[0] == "notebooks":
            opened = f"{ADDRESS}/blob/main/notebooks/{file.stem}.ipynb".removeprefix("https://")
            opened = opened.replace("github.com/", "github/")
            if not colab or not all(link.endswith(opened) for link in colab):
                problems.append(f"{name}: Colab would open {colab}")
        for link in seen["links"]:
            address, anchor = urldefrag(link)
            if not address.startswith("file:"):
                continue
            target = Path(unquote(urlparse(address).path))
            if not target.exists():
                problems.append(f"{name}: link to {target}, which is not there")
            elif anchor and target.suffix == ".html" and unquote(anchor) not in anchors(target):
                problems.append(f"{name}: link to {target.name}#{anchor}, which is not there")
    assert not problems, "\n".join(problems)
