"""The ImageNet path on real photographs at 224 pixels: many processes, killed, resumed, refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import TESTS, use_tiny

import fmd.photos
from fmd.build import open_data
from fmd.config import Experiment
from fmd.errors import FmdError
from fmd.models import pretrained_model
from fmd.records import Record, read_record
from fmd.task import ManifoldDistillationTask
from fmd.train import train

PHOTOGRAPHS = TESTS.parents[1] / "shared" / "data" / "imagenet-samples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"no photographs in {PHOTOGRAPHS}")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """$FMD_DATA with the 96 photographs as training and as validation images."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        (root / "imagenet").mkdir(exist_ok=True)
        (root / "imagenet" / split).symlink_to(PHOTOGRAPHS)
    return root


@pytest.fixture
def photos(monkeypatch, tmp_path, images) -> Experiment:
    monkeypatch.setenv("FMD_DATA", str(images))
    use_tiny(monkeypatch, tmp_path / "results")
    return fmd.config.load_experiment("photos")


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory) -> Path:
    """A file of weights of a teacher that knows the 96 photographs, in timm's format.

    Its body is random; its head is fitted to its features of them.
    """
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMD_DATA", str(images))
        use_tiny(patch, file.parent)
        config = fmd.config.load_experiment("photos").run("decoupled")
        data = open_data(config, workers=0)
        torch.manual_seed(0)
        model = timm.create_model("cait_xxs24_224", **config.teacher_args).eval()
        with torch.no_grad():
            batches = [
                (model.forward_head(model.forward_features(x), pre_logits=True), y)
                for split in ("val", "test")
                for x, y in data.batches(split, 48)
            ]
            features, labels = (torch.cat(parts) for parts in zip(*batches))
            features = torch.cat([features, torch.ones(len(features), 1)], 1)
            answers = 10 * torch.nn.functional.one_hot(labels, 96).float()
            solution = torch.linalg.lstsq(features, answers, driver="gelsd").solution
            model.head.weight.copy_(solution[:-1].T)
            model.head.bias.copy_(solution[-1])
        save_file(model.state_dict(), file)
    return file


@pytest.fixture(scope="module", autouse=True)
def startup(tmp_path_factory) -> None:
    """Every process started here reads tests/experiments instead of experiments/."""
    folder = tmp_path_factory.mktemp("startup")
    lines = ("import pathlib, fmd.config", f"fmd.config.ROOT = pathlib.Path({str(TESTS)!r})")
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("FMD_COMMIT", "0" * 40)
        patch.setenv("FMD_DIRTY", "")
        yield


def launch(
    *arguments, images: Path, results: Path, launcher=TORCHRUN, timeout=170
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        env={
            **os.environ,
            "FMD_DATA": str(images),
            "FMD_RESULTS": str(results),
            "OMP_NUM_THREADS": "1",
        },
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def said(done: subprocess.CompletedProcess) -> list[str]:
    """What the processes said themselves, without the launcher's report."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def assert_alike(one: Record, two: Record) -> None:
    for a, b in zip(one.epochs, two.epochs, strict=True):
        assert b.lr == a.lr
        assert b.train == pytest.approx(a.train, rel=1e-4)
        assert b.val.model_dump() == pytest.approx(a.val.model_dump(), rel=1e-4)
        assert b.val_ema.loss == pytest.approx(a.val_ema.loss, rel=1e-4)
    assert two.test.last.loss == pytest.approx(one.test.last.loss, rel=1e-4)
    assert two.test.agreement == pytest.approx(one.test.agreement)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_are_one(photos, teacher, images, tmp_path):
    config = photos.run("decoupled", teacher_weights=str(teacher))
    one = train(config, progress=False, workers=1)
    assert one.data["train"] == 96 and one.teacher.val_top1 > 90
    assert [epoch.lr for epoch in one.epochs] == [config.lr] * 2  # the published off-by-one

    script, results = TESTS / "tiny_run.py", tmp_path / "two"
    words = ("photos", "decoupled", f"teacher_weights={teacher}", "--workers", "1")
    # The second process is killed in the second epoch, after a checkpoint in the middle of it: an
    # epoch has 2 steps of 2 forward passes.
    killed = launch(script, "die", 1, "step:7", "--", *words, images=images, results=results)
    assert_one_line(killed, "another process of this run has ended", "from the last checkpoint")
    (kept,) = (results / "checkpoints").rglob("seed-0.pt")
    progress = torch.load(kept, weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 1)
    done = launch("-m", "fmd.train", *words, images=images, results=results)
    assert done.returncode == 0, done.stderr[-2000:]
    two = read_record(results / config.path("runs", ".json").relative_to(tmp_path / "results"))
    assert (one.world_size, two.world_size, two.timing.resumed) == (1, 2, 1)
    assert_alike(one, two)
    weights = [
        load_file(root / config.path("weights", ".safetensors").relative_to(tmp_path / "results"))
        for root in (tmp_path / "results", results)
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)


# What goes wrong ends all processes, with one line


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode != 0
    lines = said(done)
    assert len(lines) == 1, done.stderr[-3000:]
    for part in parts:
        assert part in lines[0]
    # Of the launcher's report, nothing quotes a traceback of ours.
    assert 'fmd/train.py"' not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, parts",
    [
        (["data=photos/imagenot"], ["imagenot", "FMD_DATA"]),
        (
            [
                "teacher_args={embed_dim: 96, depth: 2, num_heads: 2, init_values: 1.0, "
                "num_classes: 7}",
                "teacher_weights=seven",
            ],
            ["the teacher timm/cait_xxs24_224 has 7 classes and photos/imagenet 96"],
        ),
        (
            ["teacher_args={embed_dim: 96, depth: 3, num_heads: 2, num_classes: 96}"],
            ["cannot load 'cait_xxs24_224' from", "teacher_weights="],
        ),
        (["lr=1e9", "opt=sgd"], ["not finite:", "learning rate 1e+09", "lower lr"]),
    ],
    ids=["no such folder", "other classes", "other weights", "not finite"],
)
def test_bad_settings_end_all_processes(photos, teacher, images, tmp_path, words, parts):
    seven = tmp_path / "seven.safetensors"
    heads = {
        k: v[:7].clone() if k.startswith("head.") else v for k, v in load_file(teacher).items()
    }
    save_file(heads, seven)
    words = [word.replace("=seven", f"={seven}") for word in words]
    common = ("photos", "decoupled", f"teacher_weights={teacher}", "--workers", "0")
    done = launch(*("-m", "fmd.train", *common, *words), images=images, results=tmp_path / "two")
    assert_one_line(done, *parts)


def damaged(images: Path, root: Path) -> Path:
    """The photographs again, one of them cut in half."""
    shutil.copytree(PHOTOGRAPHS, root / "imagenet" / "train")
    (root / "imagenet" / "val").symlink_to(PHOTOGRAPHS)
    file = sorted((root / "imagenet" / "train").rglob("*.JPEG"))[5]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


@pytest.mark.slow
def test_truncated_photograph_ends_all_processes_or_is_replaced(photos, images, tmp_path):
    file = damaged(images, tmp_path / "data")
    words = (
        *("-m", "fmd.train", "photos", "none", "--workers", "1"),
        "epochs=2",
        "repeats=1",
    )
    places = dict(images=tmp_path / "data", results=tmp_path / "two")
    assert_one_line(launch(*words, **places), file.name, "skip_corrupt")
    done = launch(*words, "skip_corrupt=true", **places)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "two" / "runs").rglob("seed-0.json")
    assert read_record(path).data["corrupt"] == 1


@pytest.mark.slow
def test_full_disk_ends_all_processes_and_keeps_the_last_checkpoint(photos, images, tmp_path):
    words = ("photos", "none", "--workers", "0")
    results = tmp_path / "two"
    # The first checkpoint is written at the start, the second after the first epoch.
    done = launch(
        *(TESTS / "tiny_run.py", "full", "2", "--", *words), images=images, results=results
    )
    assert_one_line(done, "cannot write", "No space left on device", "untouched")
    (kept,) = (results / "checkpoints").rglob("seed-0.pt")
    assert torch.load(kept, weights_only=True)["progress"]["step"] == 0
    assert list(kept.parent.iterdir()) == [kept]
    done = launch("-m", "fmd.train", *words, images=images, results=results)
    assert done.returncode == 0, done.stderr[-2000:]


def test_teacher_that_knows_nothing_is_refused(photos, teacher, tmp_path):
    weights = {name: torch.zeros_like(value) for name, value in load_file(teacher).items()}
    save_file(weights, tmp_path / "empty.safetensors")
    config = photos.run("decoupled", teacher_weights=str(tmp_path / "empty.safetensors"))
    with pytest.raises(FmdError, match=r"near chance \(1.0 %\): its weights or its classes"):
        train(config, progress=False, workers=0)
    with pytest.raises(FmdError, match="teacher_weights=random is for --dry-run"):
        train(photos.run("decoupled", teacher_weights="random"), progress=False, workers=0)


# Before and after


@pytest.mark.slow
def test_dry_run_of_the_headline_recipe_needs_no_network(images, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")  # the published recipe, not the tests'
    words = ("imagenet", "decoupled", "--dry-run", "teacher_weights=random", "--workers", "1")
    done = launch(
        *("-m", "fmd.train", *words, "teacher_args={num_classes: 96}"),
        images=images,
        results=tmp_path / "results",
        launcher=(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("evaluation, checkpoint, resume and record work", "H100", "GPU hours"):
        assert part in done.stdout
    left = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert not left


@pytest.mark.slow
def test_full_disk_in_a_dry_run_of_two_processes_ends_both(photos, images, tmp_path):
    words = ("photos", "none", "--dry-run", "--workers", "0")
    done = launch(
        *(TESTS / "tiny_run.py", "full", "1", "--", *words), images=images, results=tmp_path / "two"
    )
    assert_one_line(done, "cannot write", "No space left on device")


def test_hub_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FmdError, match="cannot load 'cait_xxs24_224' from the hub") as caught:
        pretrained_model("cait_xxs24_224")
    assert "teacher_weights=<file.safetensors>" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_features_of_a_teacher_without_classes(photos):
    config = photos.run(
        "decoupled",
        teacher="timm/vit_small_patch14_dinov2",
        teacher_args={"img_size": 224, "embed_dim": 48, "depth": 2, "num_heads": 2},
        teacher_weights="random",
        alpha=0.0,
        epochs=1,
    )
    data = open_data(config, workers=0).sample(48, 4)
    record = train(config, progress=False, data=data)
    assert record.teacher.val_top1 is None and record.test.agreement is None
    assert set(record.last.train) == {"loss", "base", "intra", "inter", "random", "full"}


def test_file_of_something_else_is_no_teacher_of_features(tmp_path):
    save_file({"nonsense": torch.zeros(1)}, tmp_path / "other.safetensors")
    settings = dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=1, num_classes=0)
    with pytest.raises(FmdError, match="the file lacks"):
        pretrained_model(
            "vit_tiny_patch16_224", weights=str(tmp_path / "other.safetensors"), **settings
        )


def test_teacher_of_another_size_sees_resampled_photographs(photos):
    config = photos.run("decoupled")
    student = timm.create_model("vit_tiny_patch16_224", img_size=64, **config.model_args)
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=96, **config.model_args)
    task = ManifoldDistillationTask(student, teacher, alpha=1.0)
    x = torch.randn(2, 3, 64, 64)
    logits, _ = task.teach(x)
    larger = torch.nn.functional.interpolate(x, (96, 96), mode="bicubic", antialias=True)
    torch.testing.assert_close(logits, teacher(larger))


def test_fine_tuning_starts_from_the_student(photos, tmp_path):
    first = train(photos.run("none", epochs=1), progress=False, workers=1)
    start = first.config.path("weights", ".safetensors")
    weights = load_file(start)
    other = {**weights, "head.weight": weights["head.weight"][:7], "head.bias": torch.zeros(7)}
    save_file(other, tmp_path / "seven.safetensors")  # of seven other classes
    record = train(
        photos.run("none", epochs=1, lr=1e-9, init=str(tmp_path / "seven.safetensors")),
        progress=False,
        workers=1,
    )
    tuned = load_file(record.config.path("weights", ".safetensors"))
    torch.testing.assert_close(tuned["pos_embed"], weights["pos_embed"], atol=1e-6, rtol=0)
    assert tuned["head.weight"].shape == (96, 24)
    with pytest.raises(FmdError, match="is not of this model"):
        train(photos.run("none", init=str(start), model="resnet10t", model_args={}), workers=0)
    with pytest.raises(FmdError, match="cannot start from"):
        train(photos.run("none", init=str(tmp_path / "none.safetensors")), workers=0)


def test_paths_name_no_run(photos):
    # A copy of the teacher's weights in another place is the same teacher.
    one, two = (photos.run("decoupled", teacher_weights=name) for name in ("a", "b"))
    assert one.key == two.key and one.variant == two.variant == "decoupled"
    long = photos.run("none", init="/long" * 80 + "/a.safetensors")
    other = photos.run("none", init="/long" * 80 + "/b.safetensors")
    assert len(long.variant.encode()) < 255 and long.variant != other.variant


def test_parts_of_a_step_must_divide_it(photos):
    with pytest.raises(FmdError, match="batch_size 48 is no multiple of micro_batch 7"):
        photos.run("none", micro_batch=7)
