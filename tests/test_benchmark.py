"""The benchmarks run, in tiny sizes, and their rows make tables and figures."""

import json
import math

import pytest
import torch

from fmd import benchmark, benchmark_plots
from fmd.errors import FmdError
from fmd.losses import full_manifold_loss, inter_image_loss, intra_image_loss

CPU = torch.device("cpu")
KEYS = {
    "losses": {"case", "batch", "function", "seconds", "peak_mb"},
    "precision": {"features", "tokens", "method", "loss_error", "gradient_error", "negative"},
    "variance": {"student", "pair", "k", "bias", "expected_bias", "spread", "gradient_noise"},
    "step": {"variant", "part", "seconds", "seconds_low", "seconds_high", "batch"},
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The content of each benchmark's file, run in tiny sizes."""
    records = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMD_RESULTS", str(tmp_path_factory.mktemp("results")))
        for name in benchmark.BENCHMARKS:
            path = benchmark.run(name, quick=True, device="cpu")
            assert path.name == f"{name}-quick.json", "tiny numbers never replace measured ones"
            assert benchmark.read(f"{name}-quick") == json.loads(path.read_text())
            records[name] = json.loads(path.read_text())
    return records


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_file_says_what_was_measured_where_and_with_what(name, quick):
    record = quick[name]
    assert record["benchmark"] == name
    assert record["quick"] is True
    assert {"commit", "dirty", "versions", "device", "threads", "seconds"} <= record.keys()
    assert record["rows"]
    for row in record["rows"]:
        assert KEYS[name] <= row.keys()
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))


def test_ratios_have_a_yardstick_and_a_range(quick):
    rows = [row for row in quick["losses"]["rows"] if "yardstick" in row]
    assert {row["function"] for row in rows} == set(benchmark.YARDSTICKS)
    assert all(row["speedup_low"] <= row["speedup"] <= row["speedup_high"] for row in rows)


def test_ways_of_multiplying_are_ordered_by_their_precision(quick):
    for features in {row["features"] for row in quick["precision"]["rows"]}:
        error = {
            row["method"]: row["gradient_error"]
            for row in quick["precision"]["rows"]
            if row["features"] == features
        }
        assert error["used"] < 1e-4
        assert error["used"] < error["TF32"] < error["bfloat16"]
        assert error["split bfloat16"] < error["TF32"]


def test_parts_of_a_step_add_up(quick):
    for variant in ("soft distillation", "decoupled", "full"):
        part = {r["part"]: r["seconds"] for r in quick["step"]["rows"] if r["variant"] == variant}
        assert sum(part.values()) == pytest.approx(2 * part["step"])


def test_plain_formulas_are_the_losses():
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    for plain, loss in (
        (benchmark.plain_intra, intra_image_loss),
        (benchmark.plain_inter, inter_image_loss),
        (benchmark.plain_full, full_manifold_loss),
        (benchmark.plain_random, full_manifold_loss),  # fewer patches than it draws
    ):
        torch.testing.assert_close(plain(student, teacher), loss(student, teacher))


@pytest.mark.parametrize("mean_apart", [False, True])
def test_simulation_without_rounding_is_the_full_loss(mean_apart):
    s, t = (torch.nn.functional.normalize(torch.randn(50, d) + 1, dim=-1) for d in (5, 6))
    loss, grad = benchmark.simulated_full(s, t, torch.matmul, mean_apart)
    expected, expected_grad = benchmark._loss_and_gradient(s, t)
    assert loss == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)


def test_rounding_keeps_the_bits_of_bfloat16():
    x = torch.randn(1000)
    assert torch.equal(benchmark._rounded(x, 7), x.bfloat16().float())


def test_peak_memory_counts_what_is_held_at_once():
    def function():
        a = torch.empty(1000)
        b = torch.empty(3000)
        del a
        return b, torch.empty(500)

    assert benchmark.peak_memory(function, CPU) == pytest.approx(4 * 4000, abs=500)


def test_tables_and_figure_hold_the_measurements(quick):
    figure = benchmark_plots.cost(quick["losses"])
    assert "full loss at 36" in figure.alt
    assert figure._repr_html_().startswith("<img alt=")
    speed = benchmark_plots.speed_table(quick["losses"]).set_index("function")
    assert speed.loc["three terms", "than"] == "plain three terms"
    precision = benchmark_plots.precision_table(quick["precision"])
    assert precision.notna().all(axis=None)
    assert precision.columns[0] == "used"
    assert len(benchmark_plots.variance_table(quick["variance"])) == 2
    step = benchmark_plots.step_table(quick["step"])
    assert step.loc["step", "share: full"] == 1


def test_missing_or_broken_measurements_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    with pytest.raises(FmdError, match=r"run python -m fmd\.benchmark losses"):
        benchmark.read("losses")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/losses.json").write_text('{"rows": [')
    with pytest.raises(FmdError, match="is not whole"):
        benchmark.read("losses")
