"""Operations and bytes are counted right, and become time and memory by the formula."""

import dataclasses

import pytest
import torch
from tiny import tiny_model

import fmd.cost
from fmd.benchmark.tools import peak_memory
from fmd.config import RunConfig, load_experiment
from fmd.cost import (
    SHARE,
    Gpu,
    StepCost,
    count_all,
    estimate,
    estimate_lines,
    find_gpu,
    gpus,
    read_costs,
)
from fmd.counting import count_step, networks
from fmd.errors import FmdError
from fmd.losses import ManifoldLoss
from fmd.models import TokenModel, match_grids
from fmd.task import soft_distillation_loss

PAIR = {"student_layers": (2,), "teacher_layers": (2,)}


def config(**settings) -> RunConfig:
    base = {
        "experiment": "x",
        "variant": "y",
        "data": "photos/x",
        "image_size": 32,
        "model": "vit_tiny_patch16_224",
        "teacher": "timm/cait_xxs24_224",
        "epochs": 2,
        "batch_size": 8,
        "lr": 1e-3,
    }
    return RunConfig(**{**base, **settings})


def count(student="vit", teacher="cait", **settings) -> StepCost:
    models = tiny_model(student), tiny_model(teacher) if teacher else None
    return count_step(config(**settings), *models, (3, 32, 32))


class TestCounting:
    N, DS, DT = 16, 16, 24  # patches, channels

    def test_losses_take_the_operations_of_their_formulas(self):
        n, both, k, images = self.N, 2 * self.DS + self.DT, 12, 4
        expected = {
            "intra": 2 * n * n * both,
            "inter": 2 * n * images * both,
            "random": 2 * k * k * both / images,
        }
        for name, operations in expected.items():
            cost = count(**{name: 1.0}, num_patches=k, micro_batch=images, **PAIR)
            assert cost.loss_flops == pytest.approx(operations), name

    def test_the_full_loss_is_linear_in_the_number_of_images(self):
        # Each image meets all others by way of matrices of channels alone.
        few, many = (count(full=1.0, batch_size=images, **PAIR).loss_flops for images in (256, 512))
        both = self.DS + self.DT
        expected = 2 * self.N * both * (both + self.DS)  # as a GPU does it: all of both × both
        assert few == many == pytest.approx(expected)

    def test_a_vit_takes_the_operations_of_its_layers(self):
        cost = count(teacher=None, alpha=0.0)
        depth, dim, tokens = 3, 16, 17
        block = tokens * dim * dim * (4 + 2 * 4) + 2 * tokens * tokens * dim
        expected = 2 * (depth * block + 16 * 192 * dim + 5 * dim)
        assert cost.forward_flops == pytest.approx(expected)
        # Twice as much backward, but nothing for the gradient in the images; attention is
        # computed again.
        assert 1.8 < cost.backward_flops / cost.forward_flops < 2.5
        assert cost.teacher_flops == cost.loss_flops == 0

    @pytest.mark.parametrize("student", ["vit", "swin"])
    def test_peak_is_that_of_a_real_step(self, student):
        settings = dict(intra=1.0, full=1.0, student_layers=(0, 1), teacher_layers=(0, 1))
        models = tiny_model(student), tiny_model("cait")
        run = config(batch_size=64, **settings)
        counted = count_step(run, *models, (3, 32, 32)).peak_bytes
        manifold = ManifoldLoss(1.0, 0.0, 0.0, 1.0)
        both = [TokenModel(model, (0, 1)) for model in models]
        models[1].requires_grad_(False)

        def step():
            images, target = torch.randn(64, 3, 32, 32), torch.zeros(64, dtype=torch.long)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                taught, teacher = both[1](images)
                logits, tokens = both[0](images)
                loss = torch.nn.functional.cross_entropy(logits.float(), target)
                loss = loss + soft_distillation_loss(logits, taught)
                pairs = [match_grids(*pair) for pair in zip(tokens, teacher)]
                loss = loss + sum(manifold(*zip(*pairs)).values())
                loss.backward()

        measured = peak_memory(step, torch.device("cpu"))
        assert counted == pytest.approx(measured, rel=0.05)

    def test_models_are_left_as_they_are(self):
        student = tiny_model("vit")
        before = {k: v.clone() for k, v in student.state_dict().items()}
        count_step(config(), student, tiny_model("cait"), (3, 32, 32))
        assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
        assert all(p.grad is None for p in student.parameters())

    def test_a_teacher_of_colour_sees_grey_images(self):
        grey = tiny_model("vit", in_chans=1)
        settings = config(alpha=0.0, intra=1.0, **PAIR)
        seen = [
            count_step(settings, grey, tiny_model("cait", in_chans=n), (1, 32, 32)) for n in (1, 3)
        ]
        assert seen[1].teacher_flops > seen[0].teacher_flops > 0

    def test_images_of_any_number_of_channels(self):
        models = [tiny_model(name, in_chans=4) for name in ("vit", "cait")]
        assert count_step(config(), *models, (4, 32, 32)).teacher_flops > 0

    def test_average_weights_take_as_much_as_the_weights(self):
        weights = 4 * sum(p.numel() for p in tiny_model("vit").parameters())
        plain, averaged = (count(ema_decay=decay).state_bytes for decay in (None, 0.99))
        assert averaged - plain == weights

    def test_published_sizes_of_the_headline_models(self):
        """9.4 G multiply-adds of CaiT-S24 and 1.3 of DeiT-Tiny, in their papers."""
        run = config(
            image_size=224, model="deit_tiny_patch16_224", teacher="timm/cait_s24_224", alpha=1.0
        )
        cost = count_step(run, *networks(run))
        assert cost.teacher_flops / 2e9 == pytest.approx(9.4, abs=0.1)
        assert cost.forward_flops / 2e9 == pytest.approx(1.3, abs=0.1)


class TestEstimate:
    COST = StepCost(8, 4e9, 2e9, 3e9, 1e9, 5e6, 3_000_000_000, 1_000_000_000)
    GPU = Gpu("G", "a GPU", 90, 10, 4, 1000, "bfloat16", "made up")

    def test_follows_the_formula(self):
        guess = estimate(self.COST, self.GPU)
        expected = 9e9 / (SHARE * 90e12) + 1e9 / (SHARE * 10e12) + 5e6 / 1e12
        assert guess.seconds_per_image == pytest.approx(expected)
        assert guess.images_per_second == pytest.approx(1 / expected)
        assert guess.hours(3_600_000) == pytest.approx(1000 * expected)
        assert guess.memory_gb == 4

    def test_every_gpu_has_rates_and_a_source(self):
        for gpu in gpus():
            assert gpu.tflops > gpu.float32_tflops > 0, gpu
            assert min(gpu.memory_gb, gpu.bandwidth_gb_s) > 0, gpu
            assert gpu.precision in ("float16", "bfloat16"), gpu
            assert gpu.source, gpu

    @pytest.mark.parametrize(
        ("device", "name"),
        [
            ("Tesla T4", "T4"),
            ("NVIDIA H100 80GB HBM3", "H100 SXM"),
            ("NVIDIA H200", "H200"),
            ("NVIDIA H100 PCIe", None),  # slower than the one above
            ("NVIDIA A10G", None),
            ("CPU (x86_64)", None),
        ],
    )
    def test_a_device_is_found_by_the_name_that_records_hold(self, device, name):
        gpu = find_gpu(device)
        assert (gpu.name if gpu else None) == name

    def test_device_names_are_distinct(self):
        assert len({gpu.device for gpu in gpus()}) == len(gpus())


class TestLines:
    def test_a_run_is_estimated_from_its_settings(self, tiny):
        run = tiny.run("decoupled")
        cost = count_step(run, *networks(run))
        text = estimate_lines(run, cost, 0.01, train_images=720_000)
        assert "3 epochs of 720,000 images, 2,160,000 in all" in text
        assert "measured here: 100.0 images/s, 6.0 h" in text
        assert "counted, not measured" in text
        for gpu in gpus():
            hours = estimate(cost, gpu).hours(2_160_000)
            (line,) = [line for line in text.splitlines() if line.startswith(f"{gpu.name} ")]
            assert f"{hours:,.1f}" in line

    def test_too_little_memory_is_marked(self, tiny, monkeypatch):
        small = dataclasses.replace(TestEstimate.GPU, memory_gb=1e-6)
        monkeypatch.setattr(fmd.cost, "gpus", lambda: [small])
        assert "(!)" in estimate_lines(tiny.run("none"), TestEstimate.COST, 0.01, 1000)


class TestFile:
    def test_what_is_written_is_read_back(self, tiny):
        runs = [tiny.run("none"), tiny.run("full")]
        path = count_all(runs)
        assert path.name == "cost.json"
        stored = read_costs()
        assert [row["variant"] for row in stored["rows"]] == ["none", "full"]
        assert stored["rows"][1]["cost"] == count_step(runs[1], *networks(runs[1]))
        assert stored["rows"][0]["teacher"] is None
        assert stored["commit"] == "0" * 40

    def test_missing_and_damaged(self, tiny, tmp_path):
        with pytest.raises(FmdError, match=r"run python -m fmd\.cost"):
            read_costs()
        path = tmp_path / "results" / "benchmarks" / "cost.json"
        path.parent.mkdir()
        path.write_text("{")
        with pytest.raises(FmdError, match="not whole"):
            read_costs()

    def test_every_run_of_the_list_exists(self):
        for run in fmd.cost.runs():
            assert load_experiment(run.experiment)
