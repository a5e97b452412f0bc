"""The fidelity table of the book: every row has its tests, and those that stand nowhere else."""

import ast
import csv
import json
import os
from functools import cache
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.layers import DropPath
from timm.models import get_pretrained_cfg
from tiny import TESTS, tiny_model, use_tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import CenterCrop, InterpolationMode, RandomHorizontalFlip, Resize

import fmd.train
from fmd.build import build_mixup, build_model, build_optimizer, build_schedule, build_task
from fmd.config import experiment_names, load_experiment
from fmd.data import load_data
from fmd.errors import FmdError
from fmd.evaluate import evaluate
from fmd.models import TokenModel, load_weights
from fmd.photos import PhotoFolder
from fmd.task import ManifoldDistillationTask
from fmd.train import train

BOOK = TESTS.parent / "book"
SETTINGS = load_experiment("imagenet").run("decoupled")  # the published recipe
IMAGENET = SimpleNamespace(
    name="ImageNet",
    num_classes=1000,
    image_shape=(3, 224, 224),
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
)


class Stopped(Exception):
    """Ends a run once a test has seen what it came for."""


# The table itself


def rows() -> list[dict[str, str]]:
    with (BOOK / "data" / "fidelity.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@cache
def functions_of(name: str) -> set[str]:
    """Test functions of a file of tests/, methods as ``Class::function``."""
    path = TESTS / name
    if not path.is_file():
        return set()
    found = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + f.name for f in inner if isinstance(f, ast.FunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def problems(row: dict[str, str]) -> list[str]:
    named = (row["test"] or "").split()
    wrong = [] if named else ["no test"]
    for test in named:
        file, _, function = test.partition("::")
        if function not in functions_of(file):
            wrong.append(f"no {test}")
    return wrong


def test_every_row_names_tests_that_exist():
    table = rows()
    assert len(table) > 50
    for row in table:
        assert None not in row and None not in row.values(), row  # a comma too many or too few
        assert row["section"] and row["topic"] and row["here"], row
        assert problems(row) == [], row["topic"]
    topics = [(row["section"], row["topic"]) for row in table]
    assert len(topics) == len(set(topics))


def test_a_row_without_its_test_would_be_found():
    assert problems({"test": ""}) == ["no test"]
    known = "test_fidelity.py::test_every_row_names_tests_that_exist"
    assert problems({"test": known}) == []
    assert problems({"test": f"{known} test_fidelity.py::test_nothing"}) == [
        "no test_fidelity.py::test_nothing"
    ]
    assert problems({"test": "test_nothing.py::test_a"}) == ["no test_nothing.py::test_a"]


# The method


def test_published_weights_and_layers():
    assert (SETTINGS.intra, SETTINGS.inter, SETTINGS.random) == (4.0, 0.1, 0.2)
    assert (SETTINGS.full, SETTINGS.num_patches) == (0.0, 192)
    assert SETTINGS.student_layers == (0, 1, 2, 3, 8, 9, 10, 11)
    assert SETTINGS.teacher_layers == (0, 1, 2, 3, 20, 21, 22, 23)
    assert (SETTINGS.logit, SETTINGS.alpha, SETTINGS.temperature) == ("soft", 1.0, 1.0)


@torch.no_grad()
def test_cait_gives_its_self_attention_blocks():
    small = dict(img_size=32, patch_size=8, embed_dim=16, num_heads=2, num_classes=5)
    cait = timm.create_model("cait_s24_224", **small).eval()
    assert (len(cait.blocks), len(cait.blocks_token_only)) == (24, 2)
    assert len(cait.feature_info) == 24
    outputs = []
    for block in cait.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    layers = SETTINGS.teacher_layers
    _, tokens = TokenModel(cait, layers)(torch.randn(1, 3, 32, 32))
    for layer, seen in zip(layers, tokens):
        assert torch.equal(seen, outputs[layer]), layer


def test_labels_do_not_matter_at_alpha_one():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses = {}
    for alpha in (0.9, SETTINGS.alpha):
        task = ManifoldDistillationTask(tiny_model("vit"), tiny_model("cait"), alpha=alpha).eval()
        losses[alpha] = {task(images, torch.full((4,), label))["loss"].item() for label in range(5)}
    assert (len(losses[0.9]), len(losses[1.0])) == (5, 1)


@pytest.mark.parametrize("name", sorted(set(experiment_names()) - {"finetune"}))
def test_every_comparison_has_its_baselines(name):
    experiment = load_experiment(name)
    soft, decoupled = experiment.run("soft-kd"), experiment.run("decoupled")
    assert soft.distils and not soft.has_manifold and decoupled.has_manifold
    changed = {"variant", "intra", "inter", "random"}
    assert soft.model_dump(exclude=changed) == decoupled.model_dump(exclude=changed)
    none = experiment.run("none")
    assert not none.distils
    assert none.model == soft.model


def test_teacher_sees_the_students_mixed_images(tiny, monkeypatch):
    seen = {}
    forward, teach = ManifoldDistillationTask.forward, ManifoldDistillationTask.teach

    def look(task, images, target):
        seen["target"] = target
        task.trainable_module.register_forward_pre_hook(
            lambda module, args: seen.update(student=args[0])
        )
        forward(task, images, target)
        raise Stopped

    def look_at_teacher(task, images):
        seen["teacher"] = images
        return teach(task, images)

    monkeypatch.setattr(ManifoldDistillationTask, "forward", look)
    monkeypatch.setattr(ManifoldDistillationTask, "teach", look_at_teacher)
    with pytest.raises(Stopped):
        train(tiny.run("soft-kd", mixup=0.8, cutmix=1.0, mix_prob=1.0), progress=False)
    assert seen["target"].shape == (128, 10)  # of two labels each, where the images are mixed
    assert (seen["target"].count_nonzero(dim=1) == 2).any()
    assert seen["teacher"] is seen["student"]


@pytest.mark.parametrize("micro_batch", [None, 64])
def test_full_loss_is_global_unless_the_forward_pass_is_fixed(micro_batch):
    config = SETTINGS.model_copy(
        update=dict(micro_batch=micro_batch, student_layers=(0,), teacher_layers=(0,))
    )
    task = build_task(config, tiny_model("vit"), tiny_model("cait"), torch.device("cpu"))
    assert task.manifold.across_processes == (micro_batch is None)


# What happens in every training


def test_weights_of_the_last_and_the_best_epoch_and_of_the_average_are_kept(tiny, monkeypatch):
    decays, setup_ema = [], ManifoldDistillationTask.setup_ema

    def look(task, decay):
        decays.append(decay)
        return setup_ema(task, decay=decay)

    def falling(model, data, split, *args):
        result, order = evaluate(model, data, split, *args), next(calls)
        return result.model_copy(update={"top1": 50.0 - order}) if split == "val" else result

    calls = count()
    monkeypatch.setattr(ManifoldDistillationTask, "setup_ema", look)
    monkeypatch.setattr(fmd.train, "evaluate", falling)
    config = tiny.run("none", epochs=2, batch_size=512, ema_decay=0.25)
    record = train(config, progress=False)
    assert decays == [0.25] and record.best_epoch == 0
    assert all(epoch.val_ema is not None for epoch in record.epochs)
    data = load_data("digits")
    for suffix, expected in {
        "": record.test.last,
        "-best": record.test.best,
        "-ema": record.test.ema,
    }.items():
        file = config.path("weights", f"{suffix}.safetensors")
        model = load_weights(build_model(config, data), file)
        assert evaluate(model, data, "test") == expected, suffix
    assert len({record.test.last.loss, record.test.best.loss, record.test.ema.loss}) == 3


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_cannot_run_code(tiny, tmp_path):
    config = tiny.run("none", epochs=1)
    place = config.path("checkpoints", ".pt")
    place.parent.mkdir(parents=True)
    torch.save({"key": config.key, "progress": Evil(tmp_path / "ran")}, place)
    with pytest.raises(FmdError, match="is not a whole checkpoint"):
        train(config, progress=False)
    assert not (tmp_path / "ran").exists()
    torch.load(place, weights_only=False)  # what the published code does
    assert (tmp_path / "ran").exists()


class HostReads(TorchDispatchMode):
    """Counts the values that the host waits for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_do_not_wait_for_the_device(tiny, precision):
    counts = []
    settings = dict(epochs=1, data_fraction=0.25, opt="momentum", mixup=0.8, full=1.0)
    for batch_size in (256, 32):  # one step and eight of everything that a step may do
        config = tiny.run("decoupled", batch_size=batch_size, precision=precision, **settings)
        with HostReads() as reads:
            train(config, progress=False)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_clipping_is_on_for_small_data_alone():
    for name in experiment_names():
        experiment = load_experiment(name)
        small = experiment.data in ("digits", "tiny-imagenet")
        for variant in experiment.variants:
            assert experiment.run(variant).clip_grad == (1.0 if small else None), name


def test_processes_share_an_evaluation():
    data = load_data("digits")
    labels = [
        torch.cat([y for _, y in data.batches("val", 10, rank, 4)]).tolist() for rank in range(4)
    ]
    for rank, own in enumerate(labels):
        assert own == data.val.labels[rank::4].tolist()


def one_step(tiny, monkeypatch, **overrides) -> tuple[float, list]:
    """The length of a run's only step, and the loss scalers it made."""
    scalers, make = [], torch.amp.GradScaler

    def look(*args, **kwargs):
        scalers.append(make(*args, **kwargs))
        return scalers[-1]

    monkeypatch.setattr(torch.amp, "GradScaler", look)
    # One step of plain gradient descent: its length is that of the gradient, times lr.
    settings = dict(epochs=1, batch_size=1024, opt="momentum", weight_decay=0.0, warmup_epochs=0)
    config = tiny.run("none", **settings, **overrides)
    train(config, progress=False)
    torch.manual_seed(config.seed)
    before = build_model(config, load_data("digits")).state_dict()
    after = load_file(config.path("weights", ".safetensors"))
    step = torch.cat([(after[name] - before[name]).flatten() for name in after])
    return (step.norm() / config.lr).item(), scalers


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_loss_is_scaled_in_float16_alone_and_clipped_unscaled(tiny, monkeypatch, precision):
    length, scalers = one_step(tiny, monkeypatch, precision=precision, clip_grad=0.01)
    assert [scaler.is_enabled() for scaler in scalers] == [precision == "float16"]
    assert length == pytest.approx(0.01, rel=1e-2)
    whole, _ = one_step(tiny, monkeypatch, precision=precision)
    assert whole > 0.1  # without clip_grad nothing is clipped


# The ImageNet recipe


def test_imagenet_batch_and_epochs():
    assert (SETTINGS.epochs, SETTINGS.batch_size, SETTINGS.micro_batch) == (300, 512, 64)
    assert [fmd.train._micro_batches_of_step(SETTINGS, world) for world in (1, 2, 4, 8)] == [8] * 4
    with pytest.raises(FmdError, match="3 processes cannot share batch_size 512"):
        fmd.train._micro_batches_of_step(SETTINGS, 3)


@pytest.mark.parametrize("name", ["imagenet", "imagenet-swin"])
def test_imagenet_learning_rate_is_proportional_to_the_batch(name):
    experiment = load_experiment(name)
    for variant in experiment.variants:
        config = experiment.run(variant)
        assert config.lr == pytest.approx(5e-4 * config.batch_size / 512), variant


def learning_rates(config, steps: int) -> np.ndarray:
    """Of every step, as the loop asks for them: ``(epochs, steps)``."""
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2))
    set_lr = build_schedule(config, optimizer, steps)
    rates = np.empty((config.epochs, steps))
    for epoch in range(config.epochs):
        for step in range(steps):
            set_lr(epoch, step)
            assert len({group["lr"] for group in optimizer.param_groups}) == 1
            rates[epoch, step] = optimizer.param_groups[0]["lr"]
    return rates


def test_published_learning_rates():
    golden = json.loads((TESTS / "golden" / "imagenet_lr_schedule.json").read_text())
    assert SETTINGS.schedule == "published"
    rates = learning_rates(SETTINGS, steps=3)
    assert (rates == rates[:, :1]).all()  # one a epoch
    np.testing.assert_allclose(rates[:, 0], golden["lr_per_epoch"], rtol=1e-15)
    assert rates[0, 0] == rates[1, 0] == 1e-6  # the off-by-one


def test_corrected_learning_rates():
    steps = 7
    rates = learning_rates(SETTINGS.model_copy(update={"schedule": "step"}), steps).flatten()
    warm = SETTINGS.warmup_epochs * steps
    assert rates[0] == SETTINGS.warmup_lr
    assert (np.diff(rates[: warm + 1]) > 0).all() and (np.diff(rates[warm:]) < 0).all()
    assert rates[warm] == rates.max() == pytest.approx(SETTINGS.lr, rel=1e-3)
    assert rates[-1] == pytest.approx(SETTINGS.min_lr, abs=1e-8)
    # As published, but for the epoch that comes one late there.
    published = learning_rates(SETTINGS, 1).flatten()
    np.testing.assert_allclose(rates[::steps][:-1], published[1:], rtol=1e-12)


@pytest.fixture(scope="module")
def deit() -> torch.nn.Module:
    """DeiT-Tiny as the recipe builds it."""
    torch.manual_seed(0)
    return build_model(SETTINGS, IMAGENET)


def test_imagenet_student_is_deit_tiny(deit):
    block = deit.blocks[0]
    shape = (len(deit.blocks), deit.embed_dim, block.attn.num_heads, block.mlp.fc1.out_features)
    assert shape == (12, 192, 3, 4 * 192)
    assert deit.pos_embed.shape == (1, 14 * 14 + 1, 192)
    assert sum(p.numel() for p in deit.parameters()) == 5_717_416


@pytest.mark.parametrize("distilled", [False, True], ids=["DeiT-Tiny", "two heads"])
def test_imagenet_optimizer_and_its_parameter_groups(deit, distilled):
    name = "deit_tiny_distilled_patch16_224"
    model = timm.create_model(name, depth=1) if distilled else deit
    optimizer = build_optimizer(SETTINGS, model)
    assert type(optimizer) is torch.optim.AdamW
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {}
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        decays |= {names[p]: group["weight_decay"] for p in group["params"]}
    tokens = {"pos_embed", "cls_token", *(["dist_token"] if distilled else [])}
    free = {name for p, name in names.items() if p.ndim == 1} | tokens
    assert {name for name in names.values() if name.endswith("bias")} < free
    assert decays == {name: 0.0 if name in free else 0.05 for name in names.values()}


def test_imagenet_clips_nothing_and_drops_no_path(deit):
    assert SETTINGS.clip_grad is None and SETTINGS.drop_path_rate == 0
    assert not any(isinstance(m, DropPath) for m in deit.modules())
    for experiment in map(load_experiment, ("imagenet", "imagenet-swin")):
        for variant in experiment.variants:  # DeiT's own recipe drops paths, and so does Swin's
            run = experiment.run(variant)
            model = build_model(run, IMAGENET)
            rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
            assert max(rates, default=0) == pytest.approx(run.drop_path_rate)


def test_initial_weights_of_deit_tiny(deit):
    for name, module in deit.named_modules():
        if isinstance(module, torch.nn.Linear):
            values = module.weight.flatten()
            assert values.std().item() == pytest.approx(0.02, rel=0.02), name
            assert abs(values.mean().item()) < 5 * 0.02 / len(values) ** 0.5, name
            # Normal, and not uniform of the same width.
            assert 0.95 < (values.abs() < 0.04).float().mean() < 0.96, name
            assert not module.bias.any(), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    assert deit.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert deit.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)
    # torch's own for the convolution: uniform up to 1 / sqrt(inputs).
    bound = (3 * 16 * 16) ** -0.5
    weight = deit.patch_embed.proj.weight
    assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_imagenet_teacher_takes_the_students_images():
    cfg = get_pretrained_cfg(SETTINGS.teacher.removeprefix("timm/"))
    assert cfg.architecture == "cait_s24_224" and cfg.num_classes == 1000
    assert (cfg.input_size, cfg.mean, cfg.std) == (
        (3, SETTINGS.image_size, SETTINGS.image_size),
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> PhotoFolder:
    """270 photographs under the recipe's settings, at their input."""
    root = tmp_path_factory.mktemp("data")
    for split, images in (("train", 90), ("val", 2)):
        for label in "abc":
            (root / "imagenet" / split / label).mkdir(parents=True)
            for number in range(images):
                image = Image.new("RGB", (20, 20), (number, ord(label), 0))
                image.save(root / "imagenet" / split / label / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMD_DATA", str(root))
        return PhotoFolder(SETTINGS, workers=0)


def test_imagenet_crops_flips_and_augments(photos):
    crop, flip, policy, *rest = photos.transforms["train"].transforms
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert crop.size == (224, 224) and crop.interpolation == InterpolationMode.BICUBIC
    assert (crop.scale, crop.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert isinstance(flip, RandomHorizontalFlip) and flip.p == 0.5
    assert len(rest) == 1  # to a tensor: colours are not jittered besides
    assert policy.num_layers == 2 and policy.choice_weights is None
    assert sorted(op.name for op in policy.ops) == [
        *("AutoContrast", "BrightnessIncreasing", "ColorIncreasing", "ContrastIncreasing"),
        *("Equalize", "Invert", "PosterizeIncreasing", "Rotate", "SharpnessIncreasing"),
        *("ShearX", "ShearY", "SolarizeAdd", "SolarizeIncreasing"),
        *("TranslateXRel", "TranslateYRel"),
    ]
    for op in policy.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
        assert op.kwargs["fillcolor"] == (124, 116, 104)  # ImageNet's mean
        assert op.kwargs["resample"] == Image.Resampling.BICUBIC


def test_imagenet_evaluation_resizes_to_256_and_crops_224(photos):
    for split in ("val", "test"):
        resize, crop, *rest = photos.transforms[split].transforms
        assert isinstance(resize, Resize) and resize.size == 256
        assert resize.interpolation == InterpolationMode.BICUBIC
        assert isinstance(crop, CenterCrop) and crop.size == (224, 224)
        assert len(rest) == 1


def test_imagenet_erases_a_quarter_of_the_images_with_noise(photos):
    fmd.train.random_seed(0)
    images = torch.full((1200, 3, 24, 24), 128, dtype=torch.uint8)
    changed = photos.training_images(images) != photos.normalize(images)
    erased = changed.any(1).flatten(1).float().mean(1)  # the share of each image's pixels
    hit = erased > 0
    assert hit.float().mean().item() == pytest.approx(0.25, abs=0.05)
    # Rectangles of 2 to 33 % of the image, up to rounding to pixels.
    assert 0.015 < erased[hit].min() and erased[hit].max() < 0.36
    noise = photos.training_images(images)
    noise = noise[noise != photos.normalize(images)]
    assert abs(noise.mean().item()) < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)


def test_imagenet_mixes_every_batch_one_way_or_the_other():
    fmd.train.random_seed(0)
    mixup = build_mixup(SETTINGS, 1000)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha) == (0.8, 1.0)
    assert (mixup.mix_prob, mixup.switch_prob, mixup.mode) == (1.0, 0.5, "batch")
    images = torch.cat([torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)])
    cut = 0
    for _ in range(400):
        mixed, target = mixup(images.clone(), torch.tensor([3, 7]))
        share = mixed[1].mean().item()
        cut += bool(((mixed == 0) | (mixed == 1)).all()) and 0 < share < 1
        # Smoothing 0.1 over 1000 classes, labels in the images' proportion.
        assert target[1, 0].item() == pytest.approx(1e-4, rel=1e-4)
        assert target[1, 7].item() == pytest.approx(0.9 * share + 1e-4, abs=1e-5)
        assert target[1, 3].item() == pytest.approx(0.9 * (1 - share) + 1e-4, abs=1e-5)
    assert 140 < cut < 260


@torch.no_grad()
def test_imagenet_keeps_an_average_of_the_weights():
    task = ManifoldDistillationTask(tiny_model("vit"), None, alpha=0.0)
    task.setup_ema(decay=SETTINGS.ema_decay)
    weight = task.get_eval_model().head.weight
    average = task.get_eval_model(ema=True).head.weight
    start = average.clone()
    for expected in (start * 0.99996 + 0.00004, start * 0.99996**2 + (1 - 0.99996**2)):
        weight.fill_(1)
        task.update_ema()
        torch.testing.assert_close(average, expected, atol=1e-7, rtol=0)


def test_repeated_images_reach_the_forward_passes_as_published(photos, monkeypatch, tmp_path):
    """Each of the 8 forward passes of a step sees what each of 8 processes sees in timm."""
    plan, size = [], 8
    length = len(photos.order(0, 0))
    use_tiny(monkeypatch, tmp_path)

    def look(self, parts, seeds):
        plan.extend(part.tolist() for part in parts)
        assert len(set(seeds)) == len(parts)
        raise Stopped

    monkeypatch.setattr(PhotoFolder, "chunks", look)
    model = dict(img_size=224, embed_dim=12, depth=1, num_heads=1)
    config = fmd.config.load_experiment("photos").run(
        "none", batch_size=8 * size, micro_batch=size, model_args=model
    )
    assert config.repeats == SETTINGS.repeats == 3
    with pytest.raises(Stopped):
        train(config, progress=False, data=photos)
    assert photos.size("train") == 270 and length == 256 and len(plan) == length // size

    # timm's sampler, for the same permutation
    permutation = np.random.default_rng([config.seed, 0]).permutation(270)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.from_numpy(permutation))
    for rank in range(8):
        sampler = RepeatAugSampler(range(270), num_replicas=8, rank=rank, num_repeats=3)
        seen = list(sampler)
        for step in range(length // (8 * size)):
            assert plan[8 * step + rank] == seen[step * size : (step + 1) * size]
    # So the copies of an image are in different forward passes.
    assert all(len(set(part)) == size for part in plan)


def test_an_imagenet_epoch_is_as_long_as_published():
    whole = SimpleNamespace(size=lambda split: 1_281_167, config=SETTINGS)
    order = PhotoFolder.order(whole, 0, 0)
    assert len(order) == 1_281_024 and len(order) // SETTINGS.batch_size == 2502
