"""The benchmarks run, in tiny sizes, and their rows make tables and figures."""

import copy
import json
import math

import pytest
import torch
from tiny import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from fmd.benchmark import losses, plots, precision, step, tools
from fmd.benchmark.__main__ import BENCHMARKS, run
from fmd.cost import find_gpu
from fmd.errors import FmdError
from fmd.losses import full_manifold_loss, inter_image_loss, intra_image_loss
from fmd.records import read_benchmark

CPU = torch.device("cpu")
KEYS = {
    "losses": {"case", "batch", "function", "seconds", "peak_mb"},
    "precision": {"features", "term", "method", "loss_error", "gradient_error", "negative"},
    "variance": {"student", "pair", "k", "bias", "expected_bias", "spread", "gradient_noise"},
    "step": {
        "variant",
        "part",
        "seconds",
        "seconds_low",
        "seconds_high",
        "batch",
        "operations",
        "bytes",
    },
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The content of each benchmark's file, run in tiny sizes."""
    records = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMD_RESULTS", str(tmp_path_factory.mktemp("results")))
        for name in BENCHMARKS:
            path = run(name, quick=True, device="cpu")
            assert path.name == f"{name}-quick.json", "tiny numbers never replace measured ones"
            assert read_benchmark(f"{name}-quick") == json.loads(path.read_text())
            records[name] = json.loads(path.read_text())
    return records


@pytest.mark.parametrize("name", BENCHMARKS)
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
    assert {row["function"] for row in rows} == set(losses.YARDSTICKS)
    assert all(row["speedup_low"] <= row["speedup"] <= row["speedup_high"] for row in rows)


def test_ways_of_multiplying_are_ordered_by_their_precision(quick):
    for features in {row["features"] for row in quick["precision"]["rows"]}:
        error = {
            row["method"]: row["gradient_error"]
            for row in quick["precision"]["rows"]
            if row["features"] == features and row["term"] == "full"
        }
        assert error["used"] < 1e-4
        assert error["used"] < error["TF32"] < error["bfloat16"]
        assert error["split bfloat16"] < error["TF32"]


def test_decoupled_terms_are_tried_in_both_precisions(quick):
    rows = [row for row in quick["precision"]["rows"] if row["term"] != "full"]
    errors = {(row["features"], row["term"], row["method"]): row["gradient_error"] for row in rows}
    for (features, term, method), error in errors.items():
        if method == "float16":
            assert error > errors[features, term, "float32"]
    table = plots.half_precision_table(quick["precision"])
    assert len(table) == 3
    assert table.notna().all(axis=None)
    assert list(table.columns)[:2] == ["intra, float32", "intra, float16"]


def test_every_variant_has_its_parts_and_its_speed(quick):
    rows = quick["step"]["rows"]
    whole = {row["variant"]: row for row in rows if row["part"] == "step"}
    assert list(whole) == ["published style", "soft distillation", "decoupled", "full"]
    for variant in whole:
        parts = [row["part"] for row in rows if row["variant"] == variant]
        assert parts == [*plots.PARTS, "step"]
    for variant, row in whole.items():
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert ("speedup" in row) == (variant != "published style")
        assert ("overhead_percent" in row) == (variant in ("decoupled", "full"))
        for name in {"speedup", "overhead_percent"} & row.keys():
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


def test_operations_and_bytes_of_a_step(quick):
    parts = {
        (row["variant"], row["part"]): row for row in quick["step"]["rows"] if row["operations"]
    }
    # two blocks for two images of 4 patches and a class token: 24·D² operations a token
    forward = parts["decoupled", "student forward"]
    assert forward["operations"] == pytest.approx(2 * 24 * 192**2 * 2 * 5, rel=0.3)
    assert forward["bytes"] > 4 * 2 * 12 * 192**2  # the weights are read, at least
    backward = parts["decoupled", "backward"]
    assert backward["operations"] == pytest.approx(2 * forward["operations"], rel=0.2)
    assert backward["bytes"] > forward["bytes"]
    ours, theirs = (parts[name, "teacher forward"] for name in ("full", "published style"))
    assert ours["operations"] == pytest.approx(theirs["operations"], rel=0.01)
    assert ours["bytes"] <= theirs["bytes"]
    assert ("soft distillation", "losses") not in parts  # which are no products


def test_counts_of_a_product():
    def parts():
        left, right = torch.ones(32, 16), torch.ones(16, 64)
        product = left @ right
        yield "product"
        product.mul(2)
        yield "no product"

    operations, moved = 2 * 32 * 16 * 64, 4 * (32 * 16 + 16 * 64 + 32 * 64)
    assert step.count(parts()) == {
        "product": (operations, moved),
        "no product": (0, 0),
        "step": (operations, moved),
    }


def test_both_styles_learn_the_same():
    student, teacher = tiny_model("vit"), tiny_model("cait")
    teacher.pretrained_cfg = student.pretrained_cfg  # the same normalisation
    images, target = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    weights = (4.0, 0.1, 0.2, 0.0)

    def gradients(style, *weights, whole=False):
        network = copy.deepcopy(student)
        trained = style(network, copy.deepcopy(teacher), [0, 2], [1, 2], *weights)
        trained.whole(images, target) if whole else list(trained.parts(images, target))
        return [p.grad for p in network.parameters()]

    # 48 patches are fewer than the random term draws, so nothing is left to chance.
    expected = gradients(step.PublishedStyle)
    for whole in (False, True):
        ours = gradients(step.OurStyle, weights, whole=whole)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_shares_of_the_peak_rates_of_a_known_gpu():
    gpu = find_gpu("Tesla T4")
    half = step._limits(gpu.tflops * 1e12, gpu.bandwidth_gb_s * 1e9, 2.0, gpu)
    assert half["matmul_share"] == half["memory_share"] == 0.5
    table = plots.limits_table({"rows": [{"variant": "full", "part": "step", **half}]})
    assert table.iloc[0]["of the peak"] == "50%"


def test_plain_formulas_are_the_losses():
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    for plain, loss in (
        (tools.plain_intra, intra_image_loss),
        (tools.plain_inter, inter_image_loss),
        (tools.plain_full, full_manifold_loss),
        (tools.plain_random, full_manifold_loss),  # fewer patches than it draws
    ):
        torch.testing.assert_close(plain(student, teacher), loss(student, teacher))


@pytest.mark.parametrize("mean_apart", [False, True])
def test_simulation_without_rounding_is_the_full_loss(mean_apart):
    s, t = (torch.nn.functional.normalize(torch.randn(50, d) + 1, dim=-1) for d in (5, 6))
    loss, grad = precision.simulated_full(s, t, torch.matmul, mean_apart)
    expected, expected_grad = precision._loss_and_gradient("full", s[None], t[None])
    assert loss == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(grad, expected_grad[0], rtol=1e-4, atol=1e-7)


def test_rounding_keeps_the_bits_of_bfloat16():
    x = torch.randn(1000)
    assert torch.equal(precision._rounded(x, 7), x.bfloat16().float())


def test_peak_memory_counts_what_is_held_at_once():
    def function():
        a = torch.empty(1000)
        b = torch.empty(3000)
        del a
        return b, torch.empty(500)

    assert tools.peak_memory(function, CPU) == pytest.approx(4 * 4000, abs=500)


def test_memory_of_the_losses_is_that_of_the_call_whatever_came_before():
    functions = losses._layer_losses(4, 9, 8, 12, 2, CPU)
    names = ["three terms", "full", "plain intra"]

    def peaks(order):
        rows = losses.compare({name: functions[name] for name in order}, {}, CPU, 1)
        return {row["function"]: row["peak_mb"] for row in rows}

    assert peaks(names) == peaks(names[::-1])
    gradients = 4 * 9 * 8 * 2 * 4 / 2**20  # B·N·D of two pairs, four bytes each
    assert min(peaks(names).values()) > gradients


def test_bytes_of_attention_on_a_gpu_leave_out_its_seeds():
    with FakeTensorMode(), step._BytesOfProducts() as moved:
        q = torch.empty(2, 3, 65, 32, device="cuda", dtype=torch.float16)
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)
    tokens = q.numel() * 2
    assert moved.bytes >= 4 * tokens  # q, k, v and the result, and 4 bytes a row for the sums
    assert moved.bytes <= 4 * tokens + 4 * 2 * 3 * 65


def test_tables_and_figure_hold_the_measurements(quick):
    figure = plots.cost(quick["losses"])
    assert "full loss at 36" in figure.alt
    assert figure._repr_html_().startswith("<img alt=")
    speed = plots.speed_table(quick["losses"]).set_index("function")
    assert speed.loc["three terms", "than"] == "plain three terms"
    errors = plots.precision_table(quick["precision"])
    assert errors.notna().all(axis=None)
    assert list(errors.columns) == list(plots.WAYS)
    worst = errors["bfloat16"].max()
    assert f"bfloat16 {worst:.1e}" in plots.precision(quick["precision"]).alt
    variance = plots.variance_table(quick["variance"])
    assert len(variance) == 2
    noise = plots.noise(quick["variance"]).alt
    assert f"to {variance['gradient_noise'].iloc[-1]:.1f} times its length" in noise
    table = plots.step_table(quick["step"])
    assert list(table["step"]) == ["published style", "soft distillation", "decoupled", "full"]
    compared = table["over soft distillation, %"].str.contains(" to ")
    assert compared.tolist() == [False, False, True, True]
    assert plots.limits_table(quick["step"]) is None
    assert "decoupled: teacher forward" in plots.step_parts(quick["step"]).alt


def test_missing_or_broken_measurements_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    with pytest.raises(FmdError, match=r"run python -m fmd\.benchmark losses"):
        read_benchmark("losses")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/losses.json").write_text('{"rows": [')
    with pytest.raises(FmdError, match="is not whole"):
        read_benchmark("losses")
