"""Tiny-ImageNet from Parquet shards to records, on a few hundred of its real images."""

import errno
import hashlib
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from factories import make_record
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import load_file, save
from torch._subclasses.fake_tensor import FakeTensorMode

import fmd.batch
import fmd.config
import fmd.data
import fmd.train
from fmd.augment import OPERATIONS, PhotoAugment, recolor
from fmd.batch import plan, report, run_batch
from fmd.config import ROOT, experiment_names, load_experiment
from fmd.data import load_data
from fmd.errors import FmdError, OutOfTime
from fmd.models import create_model, narrow
from fmd.records import PARTS, finished

SHARDS = ROOT.parent / "shared" / "data" / "tiny-imagenet"
TRAIN, VALID = 30, 20  # images of each class
# Jellyfish, dugong, sulphur butterfly, bullet train, Christmas stocking, flagpole, school bus,
# potpie, alp, seashore: colours tell many of them apart, so a small teacher learns in seconds.
LABELS = [13, 23, 45, 81, 90, 101, 145, 192, 194, 198]
CLASSES = len(LABELS)
PART_SECONDS = dict.fromkeys(PARTS, 90.0)
VARIANTS = ["none", "soft-kd", "intra", "inter", "random", "decoupled", "full"]

# The shipped experiment with smaller models. The teacher learns without augmentation and mixing: it
# honestly passes the check that refuses one below twice chance.
SMALL = {
    "extends": "tiny-imagenet",
    "title": "A few photographs",
    "teacher_experiment": "photos",
    "train": {"batch_size": 50, "warmup_epochs": 0},
    "teacher": {
        "model_args": {
            **dict(img_size=64, patch_size=16, embed_dim=64, depth=4, num_heads=4),
            "init_values": 0.1,  # for few layers, few steps
        },
        "epochs": 12,
        "warmup_epochs": 0,
        "augment": False,
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_path_rate": 0.0,
    },
    "student": {
        "model_args": dict(img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2),
        "epochs": 2,
        "student_layers": [0, 1, 2],
        "teacher_layers": [0, 1, 3],
    },
    "seeds": [0],
    "order": [
        {"variants": ["teacher"], "seeds": [0]},
        {"variants": VARIANTS, "seeds": [0]},
    ],
}


@pytest.fixture(scope="module")
def table() -> pa.Table:
    if not SHARDS.is_dir():
        pytest.skip("needs Tiny-ImageNet's shards in ../shared/data/tiny-imagenet")
    table = pq.read_table(next(SHARDS.glob("valid*.parquet")))
    table = table.filter(pa.array(np.isin(table["label"].to_numpy(), LABELS)))
    labels = np.searchsorted(LABELS, table["label"].to_numpy())
    return table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels))


@pytest.fixture(scope="module")
def shards(table, tmp_path_factory) -> Path:
    """$FMD_DATA with two shards of real images in the hub's schema."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "tiny-imagenet" / "data"
    folder.mkdir(parents=True)
    labels = table["label"].to_numpy()
    rank = np.array([(labels[:row] == label).sum() for row, label in enumerate(labels)])
    for part, rows in (("train", rank < TRAIN), ("valid", rank >= TRAIN)):
        pq.write_table(table.filter(pa.array(rows)), folder / f"{part}-00000-of-00001.parquet")
    return root


@pytest.fixture
def data_folder(shards, monkeypatch, tmp_path):
    monkeypatch.setenv("FMD_DATA", str(shards))
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shards


@pytest.fixture
def photos(data_folder, monkeypatch, tmp_path):
    """The small experiment, found where experiments are looked for."""
    (tmp_path / "experiments").mkdir()
    shipped = (ROOT / "experiments" / "tiny-imagenet.yaml").read_text()
    (tmp_path / "experiments" / "tiny-imagenet.yaml").write_text(shipped)
    (tmp_path / "experiments" / "photos.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.setattr(fmd.config, "ROOT", tmp_path)
    return load_experiment("photos")


@pytest.fixture(scope="module")
def pictures(table) -> list[Image.Image]:
    blobs = [image["bytes"] for image in table["image"].to_pylist()[:60]]
    return [Image.open(io.BytesIO(blob)).convert("RGB") for blob in blobs]


def as_tensor(pictures) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)


def test_all_variants_train_and_a_budget_only_pauses_them(photos, tmp_path, capsys):
    runs = plan(photos)
    assert [run.variant for run in runs] == ["teacher", *VARIANTS]
    assert run_batch(runs, device="cpu") == []
    records = {run.variant: finished(run) for run in runs}
    assert all(records.values())
    teacher = records.pop("teacher")
    assert teacher.last.val.top1 >= 2 * 100 / CLASSES
    for name, record in records.items():
        assert len(record.epochs) == 2
        assert record.data["train"] == CLASSES * TRAIN
        assert record.data["val"] == record.data["test"] == CLASSES * VALID / 2
        assert set(record.last.train) - {"loss", "base", "logit"} == {
            term for term in ("intra", "inter", "random", "full") if getattr(record.config, term)
        }
        assert (record.teacher is None) == (name == "none")
        assert 0 < record.last.train["loss"] < 10
    assert len({record.fingerprint for record in records.values()}) == len(VARIANTS)
    assert f"{len(runs)} of {len(runs)} runs done" in report(runs)

    # The same run within a budget: paused after each pass, resumed, and the same to the last bit.
    decoupled = runs[1 + VARIANTS.index("decoupled")]
    decoupled.path("runs", ".json").rename(tmp_path / "uninterrupted.json")
    capsys.readouterr()
    assert run_batch(runs, max_minutes=0.001, device="cpu") == []
    assert "goes on from there" in capsys.readouterr().out
    assert finished(decoupled) is None
    assert "decoupled/seed-0" in report(runs) and "started" in report(runs)
    assert re.search(r"about \d+ min remain", report(runs))
    assert run_batch(runs, device="cpu") == []
    resumed = finished(decoupled)
    assert resumed.timing.resumed == 1
    assert resumed.fingerprint == records["decoupled"].fingerprint
    assert resumed.data == records["decoupled"].data
    assert resumed.epochs == records["decoupled"].epochs
    assert resumed.test == records["decoupled"].test


def test_calls_go_on_where_the_time_was_up_inside_the_teacher(photos, monkeypatch, capsys):
    monkeypatch.setenv("FMD_COMMIT", "abc")
    monkeypatch.setenv("FMD_DIRTY", "")
    monkeypatch.setenv("PATH", "")  # and no git
    teacher = photos.teacher_run()

    def call(minutes: float) -> str:
        words = ["fmd.batch", "photos", "--device", "cpu", "--max-minutes", str(minutes)]
        monkeypatch.setattr("sys.argv", words)
        fmd.batch.main()
        return capsys.readouterr().out

    said = call(1e-4)
    assert "time is up at 8% of photos/teacher/seed-0" in said  # one pass of twelve
    assert re.search("photos/teacher/seed-0 +started", said)
    monkeypatch.setattr(fmd.data, "_decode", None)  # done before, once
    said = call(1e-4)
    assert "time is up at 17% of photos/teacher/seed-0" in said
    while not finished(teacher):
        said = call(0.02)
    record = finished(teacher)
    assert (record.commit, record.dirty) == ("abc", False)
    assert record.timing.resumed >= 2
    weights = load_file(teacher.path("weights", ".safetensors"))
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert re.search("photos/teacher/seed-0 +done", said)
    following = next(run for run in plan(photos) if finished(run) is None)  # none, or a later one
    said = call(1e-4)
    assert f"photos/{following.variant}/0:" in said  # its progress
    assert finished(teacher) == record


def test_a_run_is_not_begun_for_its_preparation_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    begun = []

    def done(run, **_):
        begun.append(run.variant)
        return make_record(parts=PART_SECONDS)

    monkeypatch.setattr(fmd.train, "train", done)
    runs = plan(load_experiment("digits"))
    assert run_batch(runs, max_minutes=1) == []
    assert "time is up between two runs" in capsys.readouterr().out
    assert begun == ["teacher"]
    assert run_batch(runs, max_minutes=2) == []  # of which nothing has gone by
    assert len(begun) == 1 + len(runs)


def test_a_budget_below_zero_is_refused_before_the_first_run(monkeypatch):
    monkeypatch.setattr(fmd.train, "train", pytest.fail)
    with pytest.raises(FmdError, match="max_minutes = -1: give 0 or more minutes"):
        run_batch(plan(load_experiment("digits")), max_minutes=-1)


def test_a_device_that_is_not_there_ends_a_batch_before_its_first_run(monkeypatch):
    monkeypatch.setattr(fmd.train, "train", pytest.fail)
    with pytest.raises(FmdError, match="no device 'foo' here: cpu or cuda"):
        run_batch(plan(load_experiment("digits")), device="foo")


def test_the_shipped_teacher_fits_into_its_file():
    run = load_experiment("tiny-imagenet").teacher_run()
    model = create_model(run.model, 200, **run.model_args)
    assert run.half_weights and len(save(narrow(model.state_dict()))) <= 16e6


def test_one_diverging_run_does_not_stop_the_batch(photos):
    runs = [photos.run("none", lr=1e30), photos.run("none", epochs=1)]
    failures = run_batch(runs, device="cpu")
    assert len(failures) == 1 and "not finite" in failures[0]
    assert finished(runs[1]) is not None


def test_a_damaged_record_does_not_stop_the_batch_nor_its_report(monkeypatch, tmp_path):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    monkeypatch.setattr(fmd.train, "train", lambda run, **_: make_record(parts=PART_SECONDS))
    runs = [load_experiment("digits").run(variant) for variant in ("none", "full")]
    path = runs[0].path("runs", ".json")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    (failure,) = run_batch(runs)
    assert failure.startswith("digits/none/seed-0: ") and "delete it and run again" in failure
    damaged, missing, total = report(runs).splitlines()
    assert re.match("digits/none/seed-0 +failed .*delete it and run again", damaged)
    assert missing.endswith("to do") and total == "0 of 2 runs done"


def test_a_failure_is_told_also_where_the_time_is_up_later(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    ends = {
        "none": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        "soft-kd": OutOfTime("time is up at 10 %"),
    }

    def end(run, **_):
        raise ends[run.variant]

    monkeypatch.setattr(fmd.train, "train", end)
    runs = [load_experiment("digits").run(variant) for variant in (*ends, "full")]
    (failure,) = run_batch(runs)
    assert failure.startswith("digits/none/seed-0: OutOfMemoryError: CUDA out of memory.")
    said = capsys.readouterr()
    assert "time is up at 10 %" in said.out and "Traceback" in said.err


def test_a_failing_teacher_stops_the_batch(photos):
    diverging = photos.model_copy(update={"teacher": {**photos.teacher, "lr": 1e30}})
    with pytest.raises(FmdError, match="not finite"):
        run_batch([diverging.teacher_run(), photos.run("none", epochs=1)], device="cpu")


def test_shipped_orders_name_known_runs_once():
    for name in filter(lambda name: name.startswith("tiny-imagenet"), experiment_names()):
        runs = plan(load_experiment(name))
        assert len({(run.experiment, run.variant, run.seed) for run in runs}) == len(runs)
    runs = plan(load_experiment("tiny-imagenet"))
    assert [runs[0].variant, *(run.variant for run in runs[1:8])] == ["teacher", *VARIANTS]
    assert {run.seed for run in runs[8:22]} == {1, 2}
    assert {run.teacher for run in runs[1:26]} == {"tiny-imagenet/seed-0"}
    labels = [run.variant for run in runs[26:]]
    assert "decoupled+intra=16.0" in labels and "full+data_fraction=0.1" in labels


def test_data_are_decoded_once_and_as_pillow_does(data_folder, table, monkeypatch):
    data = load_data("tiny-imagenet")
    assert data.num_classes == CLASSES
    assert data.train.images.shape == (CLASSES * TRAIN, 3, 64, 64)
    shard = pq.read_table(next(data_folder.rglob("train*.parquet")))
    blobs = [image["bytes"] for image in shard["image"].to_pylist()]
    order = sorted(range(len(blobs)), key=lambda row: hashlib.sha256(blobs[row]).digest())
    for place in (0, 7, CLASSES * TRAIN - 1):
        picture = Image.open(io.BytesIO(blobs[order[place]])).convert("RGB")
        assert torch.equal(data.train.images[place], as_tensor([picture])[0])
        assert data.train.labels[place] == shard["label"][order[place]].as_py()

    def never(shards):
        raise AssertionError("decoded twice")

    monkeypatch.setattr(fmd.data, "_decode", never)
    assert load_data("tiny-imagenet").fingerprint == data.fingerprint


def test_a_full_disk_leaves_nothing_half_written(data_folder, monkeypatch, tmp_path):
    folder = tmp_path / "data" / "tiny-imagenet"
    folder.mkdir(parents=True)
    for shard in data_folder.rglob("*.parquet"):
        shutil.copy(shard, folder)
    monkeypatch.setenv("FMD_DATA", str(tmp_path / "data"))

    def full(path, array):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(FmdError, match=r"cannot keep the decoded images .*No space left"):
        load_data("tiny-imagenet")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 2 and all(path.suffix == ".parquet" for path in files)


def test_shards_in_another_order_are_the_same_data_set(data_folder, monkeypatch, tmp_path):
    data = load_data("tiny-imagenet")
    folder = tmp_path / "sorted" / "tiny-imagenet"
    folder.mkdir(parents=True)
    for part in ("train", "valid"):
        table = pq.read_table(next(data_folder.rglob(f"{part}*.parquet"))).sort_by("label")
        half = len(table) // 2
        for number, rows in enumerate((table.slice(half), table.slice(0, half))):
            pq.write_table(rows, folder / f"{part}-{number}.parquet")
    monkeypatch.setenv("FMD_DATA", str(tmp_path / "sorted"))
    assert load_data("tiny-imagenet").fingerprint == data.fingerprint
    # Those that relations are measured on are of many classes, however the shards are sorted.
    assert len(data.val.labels[:CLASSES].unique()) > CLASSES // 3


def test_a_share_of_the_images_is_the_same_data_set(data_folder):
    data = load_data("tiny-imagenet")
    part = data.take(0.1)
    assert part.train.labels.bincount().tolist() == [TRAIN // 10] * CLASSES
    assert len(part.val) == len(data.val) and part.fingerprint == data.fingerprint


def test_greyscale_images_get_three_equal_channels(data_folder, table, tmp_path):
    blob = io.BytesIO()
    Image.new("L", (64, 64), 77).save(blob, "PNG")
    write_shards(tmp_path / "grey", [blob.getvalue()] * 4)
    images, _ = fmd.data._decode([tmp_path / "grey" / "tiny-imagenet" / "train-0.parquet"])
    assert images.shape == (4, 3, 64, 64) and (images == 77).all()


def test_validation_images_are_halved_class_by_class(data_folder):
    data = load_data("tiny-imagenet")
    assert data.val.labels.bincount().tolist() == [VALID // 2] * CLASSES
    assert data.test.labels.bincount().tolist() == [VALID // 2] * CLASSES
    val, test = ({image.tobytes() for image in s.images.numpy()} for s in (data.val, data.test))
    assert not val & test


def test_a_read_only_folder_is_left_alone(data_folder, monkeypatch, tmp_path):
    source = data_folder / "tiny-imagenet" / "data"
    root = tmp_path / "read-only" / "tiny-imagenet"
    root.mkdir(parents=True)
    for file in source.glob("*.parquet"):
        (root / file.name).write_bytes(file.read_bytes())
    root.chmod(0o555)
    monkeypatch.setenv("FMD_DATA", str(root.parent))
    load_data("tiny-imagenet")
    assert all(path.suffix == ".parquet" for path in root.iterdir())
    assert list((tmp_path / "cache" / "fmd").rglob("images.npy"))


def write_shards(root: Path, blobs: list[bytes]) -> None:
    folder = root / "tiny-imagenet"
    folder.mkdir(parents=True)
    images = [{"bytes": blob, "path": None} for blob in blobs]
    for part in ("train", "valid"):
        table = pa.table({"image": images, "label": [row % 2 for row in range(len(blobs))]})
        pq.write_table(table, folder / f"{part}-0.parquet")


def test_wrong_data_say_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FMD_DATA", raising=False)
    with pytest.raises(FmdError, match="set FMD_DATA"):
        load_data("tiny-imagenet")
    monkeypatch.setenv("FMD_DATA", str(tmp_path))
    with pytest.raises(FmdError, match="download tiny-imagenet"):
        load_data("tiny-imagenet")
    blob = io.BytesIO()
    Image.new("RGB", (32, 64)).save(blob, "PNG")
    for name, content, message in (
        ("size", blob.getvalue(), "not 64×64"),
        ("broken", b"no image", "cannot be decoded"),
    ):
        write_shards(tmp_path / name, [content] * 4)
        monkeypatch.setenv("FMD_DATA", str(tmp_path / name))
        with pytest.raises(FmdError, match=message):
            load_data("tiny-imagenet")
        assert not list((tmp_path / name).rglob("*.npy"))


@pytest.mark.parametrize(
    ("name", "magnitude", "pillow"),
    [
        ("Color", 0.4, lambda p: ImageEnhance.Color(p).enhance(1.4)),
        ("Contrast", -0.6, lambda p: ImageEnhance.Contrast(p).enhance(0.4)),
        ("Sharpness", 0.7, lambda p: ImageEnhance.Sharpness(p).enhance(1.7)),
        ("Posterize", 8, lambda p: ImageOps.posterize(p, 5)),
        ("Solarize", 112, lambda p: ImageOps.solarize(p, 112)),
        ("Invert", 0, ImageOps.invert),
        ("AutoContrast", 0, ImageOps.autocontrast),
        ("Equalize", 0, ImageOps.equalize),
        ("Rotate", 20, lambda p: p),
    ],
)
def test_colour_operations_are_pillows(pictures, name, magnitude, pillow):
    n = len(pictures)
    operation = torch.full((n,), OPERATIONS.index(name))
    ours = recolor(as_tensor(pictures).float(), operation, torch.full((n,), float(magnitude)))
    difference = (ours - as_tensor([pillow(p) for p in pictures]).float()).abs()
    assert difference.max() <= 1  # rounding of single values
    assert difference.mean() < 0.01


def augmenter(erase: float = 0.25) -> PhotoAugment:
    return PhotoAugment(padding=4, erase=erase, fill=(120.0, 110.0, 100.0))


def test_augmentation_draws_for_each_image_and_follows_the_seed(pictures):
    images = as_tensor(pictures[:1] * 64)
    torch.manual_seed(3)
    first = augmenter()(images)
    torch.manual_seed(3)
    again = augmenter()(images)
    assert torch.equal(first, again)
    assert first.dtype == torch.float32 and first.shape == images.shape
    assert first.min() >= -1e-3 and first.max() <= 255 + 1e-3
    assert len(torch.unique(first.flatten(1), dim=0)) > 60


def test_erasing_replaces_a_rectangle_in_a_quarter_of_the_images():
    torch.manual_seed(0)
    x = torch.zeros(2000, 3, 64, 64)
    erased = (augmenter()._erase(x) != 0).all(1)
    share = erased.flatten(1).float().mean(1)
    hit = share > 0
    assert 0.2 < hit.float().mean() < 0.3
    assert share[hit].min() > 0.01 and share[hit].max() < 0.4
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(rows * columns, erased.sum((1, 2)))  # a full rectangle
    assert torch.equal(augmenter(erase=0.0)._erase(x), x)


def test_whole_pixel_moves_are_exact(pictures):
    x = as_tensor(pictures).float()
    n = len(x)
    still = torch.zeros(n)
    moves = torch.tensor([[3.0], [-2.0]]).expand(2, n)
    moved = fmd.augment._move(x, still, still, still > 0, moves)
    assert torch.allclose(moved[..., 2:, :-3], x[..., :-2, 3:], atol=1e-2)
    flipped = fmd.augment._move(x, still, still, still == 0, torch.zeros(2, n))
    assert torch.allclose(flipped, x.flip(3), atol=1e-2)


def test_augmentation_never_reads_values_on_the_host():
    """Tensors without values stand in: asking for one (a wait on a GPU) raises."""
    with FakeTensorMode():
        images = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
        assert augmenter()(images).shape == images.shape


@pytest.mark.skipif(not os.environ.get("FMD_DATA"), reason="needs the full set in FMD_DATA")
def test_full_set_has_its_published_size():
    data = load_data("tiny-imagenet")
    assert (len(data.train), len(data.val), len(data.test)) == (100_000, 5_000, 5_000)
    assert data.num_classes == 200
