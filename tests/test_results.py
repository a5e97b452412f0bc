"""Rolling records up: what counts, what is left out, and the numbers against closed forms."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from factories import make_record
from scipy import stats

from fmd import results
from fmd.config import ROOT
from fmd.errors import FmdError
from fmd.records import write_record
from fmd.results import (
    compare,
    format_run,
    format_table,
    load_records,
    provenance_note,
    summarize,
    tidy,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    return tmp_path


def row(summary, variant):
    return summary.set_index("variant").loc[variant]


def run_cli(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["fmd.results", *words])
    results.main()


# --- reading


def test_order_is_the_experiments_with_overrides_after_their_variant():
    labels = [
        ("full", {}),
        ("none", {}),
        ("decoupled", {"intra": 8.0}),
        ("soft-kd", {}),
        ("decoupled", {}),
    ]
    for variant, overrides in labels:
        write_record(make_record(variant, 1, **overrides))
    write_record(make_record("none", 0))
    write_record(make_record("teacher"))
    records, problems = load_records("digits")
    assert problems == []
    assert [(r.config.variant, r.config.seed) for r in records] == [
        ("teacher", 0),
        ("none", 0),
        ("none", 1),
        ("soft-kd", 1),
        ("decoupled", 1),
        ("decoupled+intra=8.0", 1),
        ("full", 1),
    ]


def test_half_a_record_is_named_and_left_out(capsys):
    write_record(make_record("soft-kd", 0, 80.0))
    path = write_record(make_record("soft-kd", 1, 99.0))
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    records, problems = load_records("digits")
    assert [r.config.seed for r in records] == [0]
    assert len(problems) == 1 and str(path) in problems[0]
    assert f"warning: {problems[0]}" in capsys.readouterr().err
    assert row(summarize(tidy(records)), "soft-kd").top1 == 80.0


def test_a_record_missing_a_field_is_named_with_the_field():
    path = write_record(make_record("soft-kd"))
    content = json.loads(path.read_text())
    del content["test"]
    path.write_text(json.dumps(content))
    records, (problem,) = load_records("digits")
    assert records == [] and str(path) in problem and "test" in problem


def test_a_record_of_former_settings_is_left_out_with_what_changed():
    stale = make_record("soft-kd", 0)
    config = stale.config.model_copy(update={"epochs": stale.config.epochs + 1})
    path = write_record(stale.model_copy(update={"config": config, "key": config.key}))
    records, (problem,) = load_records("digits")
    assert records == []
    assert str(path) in problem and f"epochs: {config.epochs} -> {stale.config.epochs}" in problem


def test_an_override_typed_as_an_integer_is_not_stale():
    record = make_record("soft-kd", 0, epochs=2, temperature=2)
    assert record.config.variant == "soft-kd+epochs=2+temperature=2.0"
    write_record(record)
    records, problems = load_records("digits")
    assert len(records) == 1 and problems == []


def test_a_variant_that_no_longer_exists_is_left_out():
    record = make_record("soft-kd", 0)
    config = record.config.model_copy(update={"variant": "soft-dk"})
    write_record(record.model_copy(update={"config": config, "key": config.key}))
    records, (problem,) = load_records("digits")
    assert records == [] and "did you mean 'soft-kd'" in problem


def test_a_copied_record_is_not_counted_twice():
    path = write_record(make_record("soft-kd", 0))
    copy = path.with_name("seed-1.json")
    copy.write_text(path.read_text())
    records, (problem,) = load_records("digits")
    assert len(records) == 1 and str(copy) in problem


def test_two_teachers_under_one_name_are_reported():
    write_record(make_record("soft-kd", 0))
    write_record(make_record("soft-kd", 1, teacher_fingerprint="other"))
    records, (problem,) = load_records("digits")
    assert len(records) == 2
    assert "2 different versions of teacher digits/seed-0" in problem


# --- numbers


def test_means_and_intervals_are_those_of_the_t_distribution():
    values = [80.0, 82.5, 81.0, 86.0]
    frame = tidy([make_record("soft-kd", s, v, best=v + s) for s, v in enumerate(values)])
    got = row(summarize(frame), "soft-kd")
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert got.n == 4
    assert got.top1 == pytest.approx(82.375)
    assert got.top1 - got.top1_ci == pytest.approx(low)
    assert got.top1 + got.top1_ci == pytest.approx(high)
    assert got.top1_best == pytest.approx(82.375 + 1.5)
    assert got.agreement == 90.0


def test_interval_of_two_values_has_its_closed_form():
    # t at 97.5 % and one degree of freedom is tan(0.475 pi); the standard error is half of 5 - 3.
    assert results.interval(np.array([3.0, 5.0])) == pytest.approx(math.tan(0.475 * math.pi))


def test_differences_pair_only_common_seeds():
    base = [make_record("soft-kd", s, v) for s, v in {0: 70.0, 1: 72.0, 2: 90.0}.items()]
    other = [make_record("full", s, v) for s, v in {0: 75.0, 1: 79.0, 3: 10.0}.items()]
    got = row(summarize(tidy(base + other)), "full")
    assert got.pairs == 2
    assert got.difference == pytest.approx(6.0)  # of 5 and 7
    assert got.difference_ci == pytest.approx(stats.t.ppf(0.975, 1))
    assert got.n == 3


def test_one_seed_has_no_interval_and_shows_a_dash():
    summary = summarize(tidy([make_record("soft-kd", 0, 70.0), make_record("full", 0, 75.0)]))
    full = row(summary, "full")
    assert math.isnan(full.top1_ci) and math.isnan(full.difference_ci)
    cells = format_table(summary).set_index("variant").loc["full"].tolist()
    assert "75.0 ± –" in cells and "+5.0 ± –" in cells and "nan" not in str(cells)


def test_the_baseline_is_not_compared_with_itself():
    summary = summarize(tidy([make_record("soft-kd", s, 70.0 + s) for s in range(3)]))
    got = row(summary, "soft-kd")
    assert math.isnan(got.difference) and got.pairs == 0


def test_without_the_baseline_there_is_no_difference():
    got = row(summarize(tidy([make_record("full", s) for s in range(2)])), "full")
    assert math.isnan(got.difference) and got.pairs == 0


def test_overrides_are_compared_at_the_same_recipe():
    frame = tidy(
        [
            make_record("soft-kd", 0, 70.0),
            make_record("soft-kd", 0, 60.0, epochs=2),
            make_record("full", 0, 65.0, epochs=2, full=8.0),
            make_record("full", 0, 75.0, full=8.0),
            make_record("full", 0, 99.0, lr=0.1),
        ]
    )
    summary = summarize(frame)
    short = row(summary, "full+epochs=2+full=8.0")
    assert (short.baseline, short.difference) == ("soft-kd+epochs=2", 5.0)
    assert row(summary, "full+full=8.0").difference == 5.0
    assert math.isnan(row(summary, "full+lr=0.1").difference)


def test_teachers_stay_out_of_the_summary():
    frame = tidy([make_record("teacher", 0, 98.0), make_record("soft-kd")])
    assert list(summarize(frame).variant) == ["soft-kd"]


def test_labels_only_has_no_agreement():
    summary = summarize(tidy([make_record("none", 0)]))
    assert math.isnan(row(summary, "none").agreement)


def test_dirty_runs_are_kept_and_counted():
    records = [
        make_record("soft-kd", 0),
        make_record("soft-kd", 1, dirty=True, commit="fedcba9876"),
    ]
    summary = summarize(tidy(records))
    got = row(summary, "soft-kd")
    assert (got.n, got.dirty, got.commits) == (2, 1, "0123456 fedcba9")
    assert format_table(summary)["seeds"].tolist() == ["2 (1 uncommitted)"]
    assert "1 of 2 records from uncommitted code" in provenance_note(records)


def test_a_run_in_words_is_its_record():
    record = make_record("full", 0, 91.26, best=90.0, agreement=88.0)
    table = format_run(record)
    assert list(table) == ["full"]
    assert table["full"].to_dict() == {
        "test top-1, last epoch (%)": "91.3",
        "test top-1, best epoch on validation (%)": "90.0",
        "test top-5, last epoch (%)": "100.0",
        "validation top-1, last epoch (%)": "70.0",
        "agrees with teacher (%)": "88.0",
        "parameters": "53,000",
        "epochs": "3",
        "time (s)": "20",
        "training images per second": "1,000",
        "peak memory (MB)": "300",
    }
    assert format_run(make_record("none")).loc["agrees with teacher (%)", "none"] == "–"


def test_provenance_is_one_line_of_what_made_the_records():
    note = provenance_note([make_record("soft-kd", 0), make_record("full", 0)])
    assert note == "digits: 2 records, commit 0123456, CPU (x86_64), torch 2.8.0, timm 1.0.31"
    assert provenance_note([]) == "no records"


def test_a_run_with_a_shortened_name_is_among_the_trials():
    start = {"init": "results/weights/digits/full+epochs=2/seed-0.safetensors"}
    write_record(make_record("full", 0, 75.0, **start))
    write_record(make_record("soft-kd", 0, 70.0, **start))
    records, problems = load_records("digits")
    assert len(records) == 2 and problems == []
    (full,) = (row for row in summarize(tidy(records)).itertuples() if row.variant[:4] == "full")
    assert full.difference == 5.0


# --- two folders


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    def write(name, runs):
        monkeypatch.setenv("FMD_RESULTS", str(tmp_path / name))
        for variant, seed, top1, fingerprint in runs:
            write_record(make_record(variant, seed, top1, fingerprint=fingerprint))
        return tmp_path / name

    there = write(
        "there",
        [("none", s, 50.0, f"n{s}") for s in range(3)]
        + [("soft-kd", s, 60.0, f"s{s}") for s in range(3)]
        + [("intra", s, 70.0, f"i{s}") for s in range(3)]
        + [("full", s, 80.0, f"f{s}") for s in range(3)]
        + [("random", 0, 75.0, "r0")],
    )
    here = write(
        "here",
        [("none", s, 50.0, f"n{s}") for s in range(2)]
        + [("soft-kd", s, 60.0, f"other{s}") for s in range(3)]
        + [("intra", s, 70.0 + d, f"other{s}") for s, d in enumerate((-1.0, 0.5, 1.0))]
        + [("full", s, 85.0 + s / 10, f"other{s}") for s in range(3)],
    )
    return here, there


def test_compare_says_how_far_two_folders_agree(two_folders):
    got = compare("digits", *two_folders).set_index("variant")
    assert got.verdict.to_dict() == {
        "none": "same weights",
        "soft-kd": "same top-1",
        "intra": "within the seeds' spread",
        "full": "different",
        "random": "missing",
    }
    assert tuple(got.loc["full", ["top1_here", "top1_there"]]) == pytest.approx((85.1, 80.0))
    assert tuple(got.loc["none", ["n_here", "n_there"]]) == (2, 3)


def test_against_prints_each_variant(two_folders, monkeypatch, capsys):
    here, there = two_folders
    run_cli(monkeypatch, "digits", "--against", str(there))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5
    assert "85.1 (n = 3)" in lines[-2] and "different" in lines[-2] and "– (n = 0)" in lines[-1]
    assert not (here / "tables").exists()


def test_folders_of_one_name_keep_their_columns(two_folders, monkeypatch, capsys):
    here, there = two_folders
    twin = there.parent / "elsewhere" / here.name
    shutil.copytree(there, twin)
    run_cli(monkeypatch, "digits", "--against", str(twin))
    full = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| full"))
    assert "85.1" in full and "80.0" in full


def test_a_folder_is_not_compared_with_itself(two_folders):
    with pytest.raises(FmdError, match="with itself: set FMD_RESULTS"):
        compare("digits", two_folders[0], two_folders[0])


def test_against_an_empty_folder_is_one_error(tmp_path):
    write_record(make_record("soft-kd"))
    with pytest.raises(FmdError, match=r"no records of 'digits' in .*elsewhere"):
        compare("digits", tmp_path, tmp_path / "elsewhere")


# --- the command


def test_the_command_writes_tables_and_figures(folder, monkeypatch, capsys):
    for seed in range(2):
        write_record(make_record("soft-kd", seed, 70.0 + seed))
        write_record(make_record("full", seed, 80.0 + seed, relations=0.1))
    write_record(make_record("teacher", 0, 98.0))
    run_cli(monkeypatch, "digits")
    table = pd.read_csv(folder / "tables/digits.csv").set_index("variant")
    assert list(table.index) == ["soft-kd", "full"]
    assert table.loc["full", "difference"] == 10.0 and table.loc["full", "n"] == 2
    assert len(pd.read_csv(folder / "tables/digits-runs.csv")) == 4
    assert pd.read_csv(folder / "tables/digits-teacher.csv").top1.tolist() == [98.0]
    for name in ("learning_curves", "forest", "layer_similarity", "speed"):
        for suffix in ("svg", "png", "txt"):
            assert (folder / f"figures/digits/{name}.{suffix}").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "+10.0 ± 0.0" in printed and "digits: 5 records" in printed
    assert str(folder / "tables/digits.csv") in printed


def test_relation_maps_that_cannot_be_drawn_do_not_stop_the_rest(folder, monkeypatch, capsys):
    record = make_record("full", 0, relations=0.1)
    write_record(record)
    weights = record.config.path("weights", ".safetensors")
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")  # the student's are there, the teacher's are not
    run_cli(monkeypatch, "digits")
    assert "warning: no relation maps: no weights at" in capsys.readouterr().err
    assert (folder / "figures/digits/layer_similarity.svg").exists()
    assert not (folder / "figures/digits/relation_maps.svg").exists()


def test_runs_that_compare_no_layers_have_no_relation_maps(folder):
    drawn, without = make_record("full", 0), make_record("soft-kd", 0)
    config = without.config.model_copy(update={"student_layers": (), "teacher_layers": ()})
    without = without.model_copy(update={"config": config})
    for record in (drawn, without):
        weights = record.config.path("weights", ".safetensors")
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"")
    assert results.with_maps([drawn, without]) == [drawn]


def test_only_a_teacher_rolls_up_too(folder, monkeypatch):
    write_record(make_record("teacher", 0, 98.0))
    run_cli(monkeypatch, "digits")
    assert not (folder / "tables/digits.csv").exists()
    assert (folder / "tables/digits-teacher.csv").exists()
    assert (folder / "figures/digits/learning_curves.svg").exists()


def test_no_records_says_which_command_makes_them(monkeypatch):
    with pytest.raises(FmdError, match="snakemake --cores 2 --config experiment=digits") as caught:
        run_cli(monkeypatch, "digits")
    assert "\n" not in str(caught.value)


def test_an_unknown_experiment_is_one_error(monkeypatch):
    with pytest.raises(FmdError, match="did you mean 'digits'"):
        run_cli(monkeypatch, "digit")


def test_tables_that_cannot_be_written_are_one_error(folder, monkeypatch):
    write_record(make_record("soft-kd"))
    (folder / "tables").write_text("a file where the folder should be")
    with pytest.raises(FmdError, match="cannot write"):
        run_cli(monkeypatch, "digits")


# --- cards


def test_stored_weights_get_a_card_that_says_where_they_come_from(folder, monkeypatch, capsys):
    with_weights = [
        make_record("teacher", top1=91.25),
        make_record("full"),
        make_record("full", 1),  # another seed
        make_record("full", full=8.0),  # an ablation
    ]
    for record in with_weights:
        path = record.config.path("weights", ".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(300_000))
    for record in (*with_weights, make_record("none")):
        write_record(record)
    monkeypatch.setattr(results, "write_figures", lambda *_: [])
    run_cli(monkeypatch, "digits")
    cards = {path.parent.name: path for path in folder.rglob("README.md")}
    assert cards.keys() == {"teacher", "full"}
    assert str(cards["teacher"]) in capsys.readouterr().out
    card = cards["teacher"].read_text()
    for fact in (
        "A teacher in experiments",
        'load_experiment("digits").run("teacher")',
        "Test top-1 | 91.25 %",
        "f" * 16,
        "0123456789abcdef",
        "`seed-0.safetensors`, 0.3 MB",
        "python -m fmd.train digits decoupled",
        "bundled with scikit-learn",
    ):
        assert fact in card
    assert "float16" not in card
    assert "A student in" in cards["full"].read_text()


@pytest.mark.parametrize("variant", ["teacher", "full"])
def test_code_of_the_stored_cards_gives_the_stated_accuracy(variant, monkeypatch):
    monkeypatch.delenv("FMD_RESULTS", raising=False)
    card = (ROOT / "results" / "weights" / "digits" / variant / "README.md").read_text()
    found = {}
    exec(card.split("```python\n")[1].split("```")[0], found)
    assert f"Test top-1 | {found['top1']:.2f} %" in card


def test_card_of_weights_that_the_run_rounded(folder):
    record = make_record("none")
    config = record.config.model_copy(update={"half_weights": True})
    path = config.path("weights", ".safetensors")
    path.parent.mkdir(parents=True)
    path.touch()
    (card,) = results.write_cards([record.model_copy(update={"config": config})])
    assert "rounded to float16" in card.read_text()
