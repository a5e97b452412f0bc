"""The book: its sources, and every page of the built book in a real browser."""

import argparse
import csv
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urldefrag, urlparse

import kernels
import pandas as pd
import pytest
import yaml
from factories import make_record
from papermill import inspect_notebook
from safetensors.torch import save_file

from fmd.batch import plan
from fmd.config import ROOT, load_experiment, parse_overrides
from fmd.models import create_model
from fmd.records import PARTS, write_record

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


# ---- commands


def commands() -> list[tuple[str, str]]:
    """Page and command, of all shell blocks and of the programs named within a line of text."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.stem, part) for line in lines for part in line.split(" && ") if part]
        programs = "python -m |torchrun |snakemake |papermill |make "
        found += [(page.stem, line) for line in re.findall(rf"`((?:{programs})[^`{{]+)`", text)]
    return found


class Parsed(Exception):
    """Ends a program of ours once its arguments are accepted."""


def parse_module(module: str, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """What ``python -m module arguments`` makes of its arguments, and nothing more of it."""

    def stop(name):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self, *args, **kwargs):
            raise Parsed(original(self, *args, **kwargs))

        return parse

    monkeypatch.setattr(sys, "argv", [module, *arguments])
    program = importlib.import_module(module)
    if hasattr(program, "__path__"):  # a package
        program = importlib.import_module(f"{module}.__main__")
    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        for name in ("parse_intermixed_args", "parse_args"):
            patch.setattr(argparse.ArgumentParser, name, stop(name))
        program.main()
    return parsed.value.args[0]


def check_command(command: str, monkeypatch) -> None:
    """Fails if a command names a program, module, flag, run or parameter that is not there."""
    words = shlex.split(command, comments=True)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        at = words.index("-m")
        get_args_parser().parse_args([*words[1:at], "script"])
        words = ["python", *words[at:]]
    while re.fullmatch("[A-Z_]+=.*", words[0]):  # set for this command alone
        del words[0]
    program, *rest = words
    if program == "python" and rest[0] == "-m":
        seen = parse_module(rest[1], rest[2:], monkeypatch)
        if rest[1] == "fmd.train":
            overrides = parse_overrides(seen.overrides)
            load_experiment(seen.experiment).run(seen.variant, seen.seed, **overrides)
        elif rest[1] in ("fmd.batch", "fmd.results"):
            load_experiment(seen.experiment)
    elif program == "papermill":
        known = inspect_notebook(ROOT / rest[0])
        names = [rest[i + 1] for i, word in enumerate(rest) if word == "-p"]
        assert names and set(names) <= set(known), command
    elif program == "snakemake":
        from snakemake.cli import get_argument_parser

        # The executor's plugin is not installed here; everything else is parsed by Snakemake.
        if "--executor" in rest:
            del rest[(at := rest.index("--executor")) : at + 2]
        seen = get_argument_parser().parse_args(rest)
        for name, value in (item.split("=") for item in seen.config or ()):
            assert name in ("experiment", "cores", "max_minutes"), command
            if name == "experiment":
                load_experiment(value)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program == "jupyter-book":
        from jupyter_book.cli.main import build

        build.make_context("build", rest[1:])
    elif program == "pip" and "-e" in rest:
        project = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        assert rest[-1] == ".[all]" and {"pip": ["-e .[all]"]} in project
    else:
        assert program in ("export", "git", "cd", "cp", "rm", "python3", ".", "pip"), command


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_of_the_pages_exist(page, command, monkeypatch):
    check_command(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python -m fmd.batch digits --max-minute-s 25",
        "python -m fmd.nothing",
        "python -m fmd.train digits decoupled epoch=5",
        "python -m fmd.batch digit",
        "python -m fmd.data download digits",
        "papermill notebooks/distill.ipynb out.ipynb -p varian full",
        "snakemake --core 2 --no-such-flag",
        "make reproducible",
        "jupyter-book build . --no-such-flag",
        "torchrun --processes 4 -m fmd.train digits decoupled",
        "fmd digits",
    ],
)
def test_a_wrong_command_would_be_found(command, monkeypatch):
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)):
        check_command(command, monkeypatch)


def test_reproduce_page_has_the_batch_and_the_download():
    lines = [command for page, command in commands() if page == "reproduce"]
    assert "python -m fmd.data download tiny-imagenet" in lines
    assert any(re.fullmatch(r"python -m fmd.batch \S+ --max-minutes \d+", line) for line in lines)


# ---- what the cells say


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    import pages

    return pages


@pytest.fixture
def stored(pages):
    import stored

    return stored


def summary(**differences: tuple[float, float]) -> pd.DataFrame:
    rows = [
        {"variant": v, "difference": d, "difference_ci": ci, "pairs": 5}
        for v, (d, ci) in differences.items()
    ]
    return pd.DataFrame(rows)


def test_verdicts_sort_the_variants_by_their_intervals(stored):
    said = stored.verdicts(
        summary(intra=(2.0, 1.0), inter=(-0.5, 0.6), full=(-3.0, 1.0), none=(9, 1))
    )
    better, unclear, worse = said.split(";")
    assert "1 of 3" in better and "`intra` (+2.0 ± 1.0 points)" in better
    assert "`inter` (−0.5 ± 0.6 points)" in unclear and "not distinguishable" in unclear
    assert "`full` (−3.0 ± 1.0 points)" in worse and "worse" in worse
    assert "none" not in said  # it has no manifold term
    assert "5 seeds" in said


def test_verdicts_say_when_there_are_too_few_runs(stored):
    assert "too few" in stored.verdicts(summary(intra=(2.0, float("nan"))))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({}, "not run yet"),
        ({"none": (-5, 1)}, "too few runs yet"),
        ({"decoupled": (1.25, 0.5)}, "yes, +1.2 ± 0.5 points over 5 seeds"),
        ({"decoupled": (-1.0, 0.4)}, "no, it harms, −1.0 ± 0.4 points over 5 seeds"),
        ({"decoupled": (0.3, 0.9)}, "not distinguishable from zero, +0.3 ± 0.9 points over 5"),
    ],
)
def test_headline_answers_with_its_interval(stored, rows, expected):
    assert stored.headline(summary(**rows)).startswith(expected)


def test_headline_of_one_pair_has_no_interval(stored):
    rows = summary(decoupled=(-0.5, float("nan"))).assign(pairs=1)
    assert stored.headline(rows) == "−0.5 points in one pair of runs, no interval yet"


def test_bounds_are_rounded_up(pages):
    assert [pages.at_most(x) for x in (5.41e-4, 0.0999, 12.0)] == ["5.5e-04", "1.0e-01", "1.2e+01"]


def test_rerun_and_paper_are_read_from_the_data_file(pages):
    assert pages.reported_pair("paper") == (76.5, 75.8)
    assert pages.reported_pair("rerun") == (75.7, 75.7)


@pytest.fixture
def shown(stored, pages, monkeypatch, tmp_path) -> list[str]:
    """What the parts of a page display, over a results folder of the test's own."""
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    texts = []
    monkeypatch.setattr(pages, "display", lambda shows: texts.append(shows.data))
    return texts


def test_runs_made_anew_elsewhere_stand_beside_the_stored(stored, shown, monkeypatch, tmp_path):
    anew = tmp_path / "reproductions" / "other"
    for folder, intra in ((anew, (60, 64, 61)), (tmp_path, (63.0, 64.1, 65.2))):
        monkeypatch.setenv("FMD_RESULTS", str(folder))
        for seed, top1 in enumerate(intra):
            name = f"{len(folder.parts)}" * 7
            own = {"fingerprint": f"{name}{seed}", "commit": name, "teacher_fingerprint": name}
            write_record(make_record("soft-kd", seed, 60.0 + seed, **own))
            write_record(make_record("intra", seed, top1, **own))
    stored.made_anew("digits")
    said, table = shown
    assert said.startswith("Made anew on another device, CPU (x86_64), the teacher as well. ")
    assert "same top-1 for 1 variants" in said and "within the seeds' spread for 1 variants" in said
    assert "1 of 1 in the results that this book is built from, 0 of 1 anew" in said
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")]
    (intra,) = (row for row in rows if row[:1] == ["intra"])
    numbers = [cell.split(" ±")[0] for cell in intra]
    assert numbers == ["intra", "64.1", "+3.1", "61.7", "+0.7"]
    head = re.findall(r"<th[^>]*>(.*?)</th>", table)
    assert [", anew" in name for name in head] == [False, False, False, True, True]
    note = table.split("; anew: ")
    commits = [f"{len(folder.parts)}" * 7 for folder in (tmp_path, anew)]
    assert all(commit in part for commit, part in zip(commits, note))


def test_only_seeds_added_later_are_no_second_look(stored, shown):
    for seed in load_experiment("digits-long").added_seeds:
        config = load_experiment("digits-long").run("soft-kd", seed)
        record = make_record(seed=seed)
        write_record(record.model_copy(update={"config": config, "key": config.key}))
    stored.Results("digits-long").second_look()
    assert not shown


def test_notebooks_of_runs_that_are_not_stored_would_train(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "book/_ext")
    import mends

    config = SimpleNamespace(nb_execution_excludepatterns=[])
    monkeypatch.setenv("FMD_RESULTS", str(ROOT / "results"))
    mends.run_what_is_stored(None, config)
    assert config.nb_execution_excludepatterns == []
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    write_record(make_record("teacher"))
    broken = load_experiment("digits").run("decoupled").path("runs", ".json")
    broken.parent.mkdir()
    broken.write_text("{")
    mends.run_what_is_stored(None, config)
    assert config.nb_execution_excludepatterns == ["notebooks/distill.ipynb"]
    shutil.rmtree(tmp_path / "runs")
    mends.run_what_is_stored(None, config)
    assert config.nb_execution_excludepatterns[1:] == list(mends.SHOWS)


def test_a_teacher_alone_is_not_compared(stored, shown, monkeypatch, tmp_path):
    write_record(make_record("soft-kd"))
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path / "reproductions" / "other"))
    write_record(make_record("teacher"))
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    stored.made_anew("digits")
    assert not shown


def test_the_stored_run_of_a_notebook_is_shown_without_bars(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "book/_ext")
    import mends

    monkeypatch.setenv("FMD_RESULTS", str(ROOT / "results"))
    source = ["as it is"]
    mends.show_stored_run(None, "notebooks/distill", source)
    assert source == ["as it is"]
    mends.show_stored_run(None, "notebooks/quickstart", source)
    shown = json.loads(source[0])
    code = json.loads((ROOT / "notebooks/quickstart.ipynb").read_text())
    assert [c["source"] for c in shown["cells"]] == [c["source"] for c in code["cells"]], (
        "run it again: papermill notebooks/quickstart.ipynb results/notebooks/quickstart.ipynb"
    )
    assert "full: " in source[0] and "widget" not in source[0]


# ---- the page of Tiny-ImageNet at three stages of the experiment


@pytest.fixture
def tiny_page(stored, pages, monkeypatch, tmp_path):
    """Runs the page's cells over a results folder of the test's own; returns its title and text."""
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))

    def run() -> tuple[str, str]:
        shown, glued = [], {}
        monkeypatch.setattr(pages, "display", lambda shows: shown.append(shows.data))
        monkeypatch.setattr("myst_nb.glue", lambda name, value: glued.update({name: value}))
        text = (ROOT / "book/tiny-imagenet.md").read_text()
        names = {}
        for cell in re.findall(r"```{code-cell}.*?\n(?::[^\n]*\n)*(.*?)```", text, re.DOTALL):
            exec(cell, names)
        (title,) = re.findall(r"^# .*$", text, re.MULTILINE)
        return re.sub(r"{glue:text}`(\w+)`", lambda m: glued[m[1]], title), "\n".join(shown)

    return run


def write_tiny(
    variant: str, seed: int = 0, top1: float = 50.0, measured: dict | None = None, **overrides
) -> None:
    """A record of the Tiny-ImageNet experiment with made-up measurements."""
    config = load_experiment("tiny-imagenet").run(variant, seed, **overrides)
    record = make_record(seed=seed, top1=top1, **(measured or {}))
    write_record(record.model_copy(update={"config": config, "key": config.key}))


def test_tiny_imagenet_page_before_any_run(tiny_page):
    title, text = tiny_page()
    assert title.endswith("on Tiny-ImageNet? Not run yet")
    total = len(plan(load_experiment("tiny-imagenet")))
    assert f"{total} of {total} runs are missing" in text
    assert "<figure" not in text and "no stored weights" in text


def test_tiny_imagenet_page_with_one_seed(tiny_page):
    for variant, top1 in (("teacher", 60), ("soft-kd", 50), ("decoupled", 50.7)):
        write_tiny(variant, top1=top1)
    title, text = tiny_page()
    assert title.endswith("? +0.7 points in one pair of runs, no interval yet")
    assert "too few runs to say" in text
    missing = re.search(r"runs are missing.*", text, re.DOTALL)[0]
    assert '<td class="text">teacher</td>' not in missing.split("tiny-imagenet-weaker")[0]


def test_tiny_imagenet_page_with_seeds_ablation_and_weights(tiny_page, tmp_path):
    for seed, (soft, decoupled) in enumerate([(50, 52), (51, 53.2), (49, 50.9)]):
        write_tiny("soft-kd", seed, soft)
        write_tiny("decoupled", seed, decoupled)
    write_tiny("decoupled", top1=10.0, intra=16.0)
    experiment = load_experiment("tiny-imagenet")
    for run in (experiment.teacher_run(), experiment.run("soft-kd"), experiment.run("decoupled")):
        model = create_model(run.model, 200, **run.model_args)
        path = run.path("weights", ".safetensors")
        path.parent.mkdir(parents=True)
        save_file(model.state_dict(), path)
    title, text = tiny_page()
    assert re.search(r"\? Yes, \+2\.0 ± 0\.\d points over 3 seeds$", title)
    answer, rest = text.split("</td>", 1)
    assert "decoupled+intra=16" not in answer and "decoupled+intra=16" in rest
    assert 'alt="Cosines between the patches of one image' in text
    assert "python -m fmd.batch tiny-imagenet" in (ROOT / "book/tiny-imagenet.md").read_text()
    assert "Where the time" not in text  # which these records do not say


def test_tiny_imagenet_page_says_where_the_time_went_and_what_is_stored(tiny_page):
    for seed, scale in ((0, 1), (1, 3)):
        parts = {part: scale * (i + 1) * 60 / 28 for i, part in enumerate(PARTS)}
        measured = {"parts": parts, "share_of_peak": 0.1 * scale, "val": (90.0, 20.0 * scale)}
        write_tiny("intra", seed, measured=measured)
    write_tiny("none", measured={"parts": parts, "val": (10.0, 5.0)})
    for variant in ("intra", "none"):
        weights = load_experiment("tiny-imagenet").run(variant).path("weights", ".safetensors")
        weights.parent.mkdir(parents=True)
        weights.write_bytes(bytes(5_560_000))
    _, text = tiny_page()
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in text.split("<tr>")]
    shares = ["4", "7", "11", "14", "18", "21", "25"]
    assert ["intra", "2.0", "1,000", *shares, "20.0"] in rows
    assert ["none", "3.0", "1,000", *shares, "–"] in rows
    assert (
        "on validation images is `intra` with seed 1; of those whose weights are stored, " in text
    )
    assert "stored, `intra` with seed 0." in text
    assert ["intra", "0.05", "5.6", "20.0", "50.0"] in rows


# ---- the built book


# One test uses these two, so that parallel workers do not build the book twice.


@pytest.fixture
def book(tmp_path_factory) -> Path:
    """The book as `make book` builds it, in a folder of its own; warnings are errors."""
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).parent / "jupyter-book", "build", ROOT, "--path-output", out]
    command += ["-W", "-n", "--keep-going"]
    done = kernels.run(command, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
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
    silent: [...document.querySelectorAll('.scroll, .pst-scrollable-table-container')]
        .filter(box => !box.classList.contains('wide'))
        .filter(box => box.scrollWidth > box.clientWidth + 1).length,
    title: document.querySelector('h1')?.textContent ?? '',
    text: document.body.innerText,
})"""
# The notebooks that show a run, and the figures of each.
RUNS = {"quickstart": 6, "train_teacher": 1, "distill": 2}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_page_opens_clean_and_offline(browser, book, stored):
    problems = []
    digits = stored.Results("digits")
    answer = stored.headline(stored.Results("tiny-imagenet").main).capitalize()
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
        if seen["silent"]:
            problems.append(f"{name}: {seen['silent']} wide boxes do not say that they scroll")
        problems += [f"{name}: image {i[0]} is broken" for i in seen["images"] if not i[1]]
        problems += [f"{name}: image {i[0]} has no text" for i in seen["images"] if not i[2]]
        problems += [f"{name}: equation not set: {m}" for m in seen["rawMath"]]
        if seen["mathErrors"]:
            problems.append(f"{name}: {seen['mathErrors']} equations with errors")
        if file.stem in RUNS and (len(seen["images"]) < RUNS[file.stem] or "%|" in seen["text"]):
            problems.append(f"{name}: {len(seen['images'])} figures, or bars of progress")
        if file.stem == "digits" and len(digits.summary) and len(seen["images"]) < 4:
            problems.append(f"{name}: only {len(seen['images'])} figures")
        if file.stem == "tiny-imagenet" and answer not in seen["title"].replace("\xa0", " "):
            problems.append(f"{name}: titled {seen['title']!r}, though the answer is {answer}")
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
