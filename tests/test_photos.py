"""Photographs from folders, tars and shards to batches; real ones where they are at hand."""

import io
import json
import os
import random
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from timm.data.readers import create_reader

import fmd.photo_files
from fmd.errors import FmdError
from fmd.photos import PhotoFolder, check, main, speed

REAL = Path(__file__).parents[2] / "shared/data/imagenet-samples"
POLICY = "rand-m9-mstd0.5-inc1"


def config(data: str = "photos/set", **settings) -> SimpleNamespace:
    defaults = dict(
        data=data,
        data_fraction=1.0,
        augment=True,
        image_size=16,
        crop_pct=0.875,
        auto_augment=None,
        erasing=0.0,
        repeats=1,
        skip_corrupt=False,
        decoder="pillow",
    )
    return SimpleNamespace(photos=data.removeprefix("photos/"), **{**defaults, **settings})


def picture(number: int, size=(40, 30), mode: str = "RGB") -> bytes:
    """A JPEG (or PNG for RGBA) of smooth colours that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if mode == "RGBA" else "JPEG")
    return buffer.getvalue()


def write_folder(root: Path, counts: dict[str, int], classes: str = "abc") -> Path:
    for split, count in counts.items():
        for label in classes:
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                data = picture(1000 * ord(label) + 100 * len(split) + number)
                (folder / f"{number:02d}.jpg").write_bytes(data)
    return root


@pytest.fixture
def data(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("FMD_DATA", str(tmp_path))
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path / "results"))
    return tmp_path


@pytest.fixture
def folder(data) -> Path:
    return write_folder(data / "set", {"train": 8, "val": 4})


@pytest.fixture
def real(data) -> Path:
    if not REAL.is_dir():
        pytest.skip("needs the photographs in ../shared/data/imagenet-samples")
    for split in ("train", "val"):
        (data / "real" / split).mkdir(parents=True)
        for source in REAL.iterdir():
            (data / "real" / split / source.name).symlink_to(source)
    return data / "real"


def made(photos: PhotoFolder, plan, seeds) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(photos.chunks(plan, seeds))


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b) for x, y in zip(left, right)
    )


# What a run relies on


def test_pixels_depend_on_the_seed_alone(real):
    settings = config("photos/real", image_size=64, auto_augment=POLICY, repeats=3)
    photos = PhotoFolder(settings, workers=0)
    plan = list(photos.order(0, 0)[:40].reshape(5, 8))
    seeds = [11, 12, 13, 14, 15]
    whole = made(photos, plan, seeds)
    assert [len(labels) for _, labels in whole] == [8] * 5
    parallel = PhotoFolder(settings, workers=2)
    assert same(whole, made(parallel, plan, seeds))
    assert same(whole[2:], made(parallel, plan[2:], seeds[2:]))  # a run that goes on
    ranks = [made(photos, plan[rank::2], seeds[rank::2]) for rank in range(2)]  # two processes
    assert same(whole[::2], ranks[0]) and same(whole[1::2], ranks[1])
    # Three copies of an image differ, and so does the same chunk with another seed.
    assert plan[0][0] == plan[0][1] and not torch.equal(whole[0][0][0], whole[0][0][1])
    assert not same(whole[:1], made(photos, plan[:1], [16]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_process_without_images_has_no_batches(folder, workers):
    photos = PhotoFolder(config(), workers)
    assert list(photos.batches("val", 8, rank=1, world=2, limit=1)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loops_generators_are_left_alone(folder, workers):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    def seed():
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    made(PhotoFolder(config(auto_augment=POLICY), workers), [np.arange(4)], [5])
    assert draws() == expected


def test_repeats_come_in_a_row_and_an_epoch_keeps_its_length(data):
    write_folder(data / "set", {"train": 90, "val": 1})
    plain, repeated = (PhotoFolder(config(repeats=n), workers=0) for n in (1, 3))
    assert sorted(plain.order(0, 0)) == list(range(270))
    assert not np.array_equal(plain.order(0, 0), plain.order(0, 1))
    order = repeated.order(0, 0)
    assert len(order) == 256 and repeated.size("train") == 270
    assert np.array_equal(order, np.repeat(plain.order(0, 0), 3)[:256])
    assert len(repeated.sample(train=30, val=2).order(0, 0)) == 30


def test_every_validation_image_is_counted_once_in_any_number_of_processes(folder):
    photos = PhotoFolder(config(), workers=0)
    whole = torch.cat([images for images, _ in photos.batches("val", 4)])
    parts = [
        images
        for rank in range(4)
        for batch, _ in photos.batches("val", 1, rank=rank, world=4)
        for images in batch
    ]
    assert len(whole) == len(parts) == 6
    assert all(sum(torch.equal(x, y) for y in parts) == 1 for x in whole)
    some = torch.cat([images for images, _ in photos.batches("val", 4, limit=5)])
    assert torch.equal(some, whole[:5])
    shares = [len(list(photos.batches("val", 1, rank, 2, limit=5))) for rank in range(2)]
    assert shares == [3, 2]


def test_the_first_images_of_a_split_are_of_many_classes(real):
    labels = next(PhotoFolder(config("photos/real"), workers=0).batches("val", 24))[1]
    assert len(labels.unique()) == 24 and labels.max() - labels.min() > 48


# Formats


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def pack_tar(split: Path, out: Path) -> None:
    files = {str(p.relative_to(split.parent)): p.read_bytes() for p in sorted(split.rglob("*.jpg"))}
    write_tar(out / f"{split.name}.tar", files)


def pack_tars_in_a_tar(split: Path, out: Path) -> None:
    classes = {}
    for folder in split.iterdir():
        write_tar(out / "part.tar", {p.name: p.read_bytes() for p in folder.iterdir()})
        classes[f"{split.name}/{folder.name}.tar"] = (out / "part.tar").read_bytes()
        (out / "part.tar").unlink()
    write_tar(out / f"{split.name}.tar", classes)


def pack_webdataset(split: Path, out: Path) -> None:
    files = sorted(split.rglob("*.jpg"))
    for shard in range(2):
        members = {}
        for path in files[shard * len(files) // 2 : (shard + 1) * len(files) // 2]:
            key = f"{path.parent.name}_{path.stem}"
            members[f"{key}.cls"] = str("abc".index(path.parent.name)).encode()
            members[f"{key}.jpg"] = path.read_bytes()
        write_tar(out / f"few-{split.name}-{shard:04d}.tar", members)


def pack_parquet(split: Path, out: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Parquet needs pip install datasets")
    files = sorted(split.rglob("*.jpg"))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in files],
        "label": ["abc".index(path.parent.name) for path in files],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    (out / "data").mkdir(exist_ok=True)
    for shard in range(2):
        name = f"{split.name}-{shard:05d}-of-00002.parquet"
        table.shard(2, shard, contiguous=True).to_parquet(str(out / "data" / name))


FORMATS = {
    "tar": (pack_tar, "tar"),
    "tars in a tar": (pack_tars_in_a_tar, "tar"),
    "WebDataset": (pack_webdataset, "WebDataset"),
    "Parquet": (pack_parquet, "Parquet"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("workers", [0, 2])
def test_all_formats_give_the_same_run(folder, data, monkeypatch, name, workers):
    pack, kind = FORMATS[name]
    out = data / "packed"
    out.mkdir()
    for split in ("train", "val"):
        pack(folder / split, out)
    if name == "Parquet":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", data / "cache")
    unpacked = PhotoFolder(config(), workers=0)
    packed = PhotoFolder(config("photos/packed"), workers=workers)
    names = ["0", "1", "2"] if kind == "WebDataset" else ["a", "b", "c"]
    assert packed.describe()["class_names"] == names
    assert packed.describe()["format"] == kind and unpacked.describe()["format"] == "ImageFolder"
    assert packed.num_classes == 3 and packed.size("train") == 24
    plan = np.split(unpacked.order(0, 0), 4)
    assert same(made(unpacked, plan, [1, 2, 3, 4]), made(packed, plan, [1, 2, 3, 4]))
    assert same(list(unpacked.batches("test", 4)), list(packed.batches("test", 4)))


def test_tar_agrees_with_timms_reader(folder, data):
    pack_tar(folder / "train", data)
    ours = fmd.photo_files.find_splits(data)["train"]
    theirs = create_reader("", root=str(data / "train.tar"))
    assert len(ours) == len(theirs) and ours.classes == theirs.class_name_to_idx
    read = {os.path.basename(ours.name(i)) + str(ours.labels[i]): ours.read(i) for i in range(24)}
    for i in range(24):
        file, label = theirs[i]
        assert read[theirs.filename(i, basename=True) + str(label)] == file.read()


def test_parquet_without_its_library_says_what_to_install(data, monkeypatch):
    (data / "set").mkdir()
    (data / "set" / "train-00000.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(FmdError, match="pip install datasets"):
        PhotoFolder(config(), workers=0)


# Splits


def labels_of(photos: PhotoFolder, split: str) -> Counter:
    return Counter(photos.images[split].labels[photos.rows[split]].tolist())


def test_validation_is_halved_class_by_class(folder):
    photos = PhotoFolder(config(), workers=0)
    assert labels_of(photos, "val") == labels_of(photos, "test") == {0: 2, 1: 2, 2: 2}
    assert not set(photos.rows["val"]) & set(photos.rows["test"])
    assert photos.describe()["evaluation"] == "validation images halved"


def test_a_test_folder_is_the_test_split(data):
    write_folder(data / "set", {"train": 2, "validation": 4, "test": 3})
    photos = PhotoFolder(config(), workers=0)
    assert {k: photos.describe()[k] for k in ("train", "val", "test")} == dict(
        train=6, val=12, test=9
    )


def test_a_test_folder_without_labels_does_not_count(folder):
    (folder / "test").mkdir()
    (folder / "test" / "1.jpg").write_bytes(picture(1))
    assert PhotoFolder(config(), workers=0).describe()["test"] == 6


def test_without_validation_a_share_of_train_is_held_out(data):
    write_folder(data / "set", {"train": 20})
    (data / "set" / "train" / "d").mkdir()
    (data / "set" / "train" / "d" / "only.jpg").write_bytes(picture(1))
    photos = PhotoFolder(config(), workers=0)
    assert labels_of(photos, "train") == {0: 16, 1: 16, 2: 16, 3: 1}
    assert labels_of(photos, "val") == labels_of(photos, "test") == {0: 2, 1: 2, 2: 2}
    rows = np.concatenate(list(photos.rows.values()))
    assert sorted(rows) == list(range(61))
    assert "held out" in photos.describe()["evaluation"]


def test_one_image_a_class_is_enough_only_with_validation(real):
    photos = PhotoFolder(config("photos/real"), workers=0)
    assert photos.describe() | {"fingerprint": ""} == {
        "name": "photos/real",
        "fingerprint": "",
        "train": 96,
        "val": 48,
        "test": 48,
        "classes": 96,
        "class_names": sorted(path.name for path in (real / "train").iterdir()),
        "format": "ImageFolder",
        "evaluation": "validation images halved",
    }
    (real / "val").rename(real / "other")
    with pytest.raises(FmdError, match="add a val folder"):
        PhotoFolder(config("photos/real"), workers=0)


def test_a_share_of_the_training_images_is_stratified(folder):
    photos = PhotoFolder(config(data_fraction=0.5), workers=0)
    assert labels_of(photos, "train") == {0: 4, 1: 4, 2: 4}
    assert photos.fingerprint == PhotoFolder(config(), workers=0).fingerprint


def test_the_fingerprint_sees_names_sizes_and_labels_but_not_the_place(folder, data):
    def fingerprint(name="set"):
        return PhotoFolder(config(f"photos/{name}"), workers=0).fingerprint

    first = fingerprint()
    folder.rename(data / "moved")
    assert fingerprint("moved") == first
    image = data / "moved" / "train" / "a" / "00.jpg"
    with image.open("ab") as file:
        file.write(b"\0")
    second = fingerprint("moved")
    image.rename(image.with_name("08.jpg"))
    third = fingerprint("moved")
    image.with_name("08.jpg").rename(data / "moved" / "train" / "b" / "08.jpg")
    assert len({first, second, third, fingerprint("moved")}) == 4


# Pixels


def test_evaluation_resizes_the_short_side_and_crops_the_centre(folder):
    photos = PhotoFolder(config(image_size=14), workers=0)
    image = Image.open(folder / "val" / "a" / "00.jpg").resize((21, 16), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image.crop((4, 1, 18, 15)))).permute(2, 0, 1)
    both = [*photos.batches("val", 6), *photos.batches("test", 6)]
    images = torch.cat([images for images, _ in both])
    assert any(torch.equal(photos.normalize(pixels[None])[0], image) for image in images)


def test_without_augmentation_training_images_are_those_of_evaluation(folder):
    photos = PhotoFolder(config(augment=False, erasing=1.0, data_fraction=0.5), workers=0)
    photos.rows["val"], photos.images["val"] = photos.rows["train"], photos.images["train"]
    ((images, labels),) = made(photos, [np.arange(12)], [1])
    ((expected, expected_labels),) = photos.batches("val", 12)
    assert torch.equal(photos.training_images(images), expected)
    assert torch.equal(labels, expected_labels)


def test_grey_cmyk_and_transparent_images_become_rgb(data):
    write_folder(data / "set", {"train": 1, "val": 2})
    for mode in ("L", "CMYK", "RGBA"):
        name = f"{mode}.{'png' if mode == 'RGBA' else 'jpg'}"
        (data / "set" / "train" / "a" / name).write_bytes(picture(7, mode=mode))
    photos = PhotoFolder(config(augment=False), workers=0)
    ((images, _),) = made(photos, [np.arange(6)], [1])
    assert images.shape == (6, 3, 16, 16)
    names = [os.path.basename(photos.images["train"].name(row)) for row in photos.rows["train"]]
    looks = dict(zip(names, images.float()))
    assert torch.equal(looks["L.jpg"][0], looks["L.jpg"][2])
    assert (looks["CMYK.jpg"] - looks["RGBA.png"]).abs().mean() < 12  # both of one picture


def test_erasing_follows_the_global_generators(folder):
    photos = PhotoFolder(config(erasing=1.0), workers=0)
    images = torch.full((8, 3, 16, 16), 128, dtype=torch.uint8)

    def erased(seed):
        random.seed(seed)
        torch.manual_seed(seed)
        return photos.training_images(images)

    changed = (erased(1) != photos.normalize(images)).flatten(1).float().mean(1)
    assert (changed > 0.01).all() and (changed < 0.5).all()
    assert torch.equal(erased(1), erased(1)) and not torch.equal(erased(1), erased(2))


def test_draft_shows_the_same_crops_of_large_images(data):
    write_folder(data / "set", {"val": 1})
    for label in "abc":
        (data / "set" / "train" / label).mkdir(parents=True)
        (data / "set" / "train" / label / "1.jpg").write_bytes(picture(ord(label), (400, 300)))
    plain, draft = (
        PhotoFolder(config(auto_augment="rand-m0-n1", decoder=name), workers=0)
        for name in ("pillow", "draft")
    )
    plan, seeds = [np.tile(np.arange(3), 8)], [3]
    ((expected, labels),) = made(plain, plan, seeds)
    ((images, draft_labels),) = made(draft, plan, seeds)
    assert torch.equal(labels, draft_labels)
    assert 0 < (images.float() - expected.float()).abs().mean() < 3


def test_the_highest_level_of_posterize_is_black(folder):
    image = Image.open(folder / "val" / "a" / "00.jpg")
    assert NAME_TO_OP["PosterizeIncreasing"](image, 0).getextrema() == ((0, 0),) * 3
    photos = PhotoFolder(config(auto_augment="rand-m10-inc1-n4"), workers=0)
    assert len(made(photos, [np.arange(24)] * 4, [1, 2, 3, 4])) == 4


# Broken files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_in_one_line(folder, workers):
    truncate(folder / "train" / "b" / "03.jpg")
    photos = PhotoFolder(config(), workers)
    with pytest.raises(FmdError, match=r"train/b/03.jpg cannot be decoded .*skip_corrupt") as e:
        made(photos, [np.arange(12), np.arange(12, 24)], [1, 2])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_by_the_next_and_counted(folder, workers):
    whole = PhotoFolder(config(skip_corrupt=True), workers=0)
    rows = whole.rows["train"]
    broken = 23  # the last: the first one takes its place
    truncate(folder / whole.images["train"].name(rows[broken]))
    photos = PhotoFolder(config(skip_corrupt=True), workers)
    plan = [np.arange(12, 24), np.arange(12)]
    expected = made(whole, [np.array([*range(12, 23), 0]), np.arange(12)], [1, 2])
    assert same(made(photos, plan, [1, 2]), expected)
    assert len(photos.corrupt) == 1


def test_evaluation_leaves_skipped_images_out(folder):
    truncate(folder / "val" / "a" / "00.jpg")
    photos = PhotoFolder(config(skip_corrupt=True), workers=0)
    labels = [y for split in ("val", "test") for _, part in photos.batches(split, 1) for y in part]
    assert Counter(map(int, labels)) == {0: 3, 1: 4, 2: 4}
    assert len(photos.corrupt) == 1


def test_a_format_that_cannot_be_read_is_not_skipped_file_by_file(folder):
    for path in folder.rglob("train/*/*.jpg"):
        path.write_bytes(b"not an image")
    with pytest.raises(FmdError, match="corrupt images in a row"):
        made(PhotoFolder(config(skip_corrupt=True), workers=0), [np.arange(2)], [1])


def test_a_file_that_vanished_is_not_skipped(folder):
    photos = PhotoFolder(config(skip_corrupt=True), workers=0)
    (folder / "train" / "c" / "02.jpg").unlink()
    with pytest.raises(FmdError, match=r"cannot read train/c/02.jpg: No such file"):
        made(photos, [np.arange(24)], [1])


def test_a_worker_that_dies_gives_one_line(folder, monkeypatch):
    monkeypatch.setattr(fmd.photo_files.FolderImages, "read", lambda *_: os._exit(9))
    with pytest.raises(FmdError, match="fewer --workers"):
        made(PhotoFolder(config(), workers=1), [np.arange(4)], [1])


def flatten(split: Path) -> None:
    for path in split.glob("*/*.jpg"):
        path.rename(split / f"{path.parent.name}{path.name}")
    for folder in split.iterdir():
        if folder.is_dir():
            folder.rmdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: root.rename(root.with_name("elsewhere")), "no folder"),
        (lambda root: (root / "train").rename(root / "images"), "no training images"),
        (lambda root: (root / "val" / "b").rename(root / "val" / "d"), "classes of val.*b, d"),
        (lambda root: [p.unlink() for p in root.rglob("train/*/*.jpg")], "Found 0 images"),
        (lambda root: flatten(root / "val"), "val in .* have no labels"),
        (lambda root: [p.unlink() for p in (root / "val" / "c").iterdir()], "2 classes of val"),
    ],
)
def test_a_wrong_folder_is_said_in_one_line(folder, change, message):
    change(folder)
    with pytest.raises(FmdError, match=message) as error:
        PhotoFolder(config(), workers=0)
    assert "\n" not in str(error.value)


def test_a_damaged_tar_is_said_in_one_line(data):
    (data / "set").mkdir()
    (data / "set" / "train.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(FmdError, match=r"cannot read .*train.tar"):
        PhotoFolder(config(), workers=0)


def test_one_class_is_too_few(data):
    write_folder(data / "set", {"train": 2, "val": 2}, classes="a")
    with pytest.raises(FmdError, match="holds a single class"):
        PhotoFolder(config(), workers=0)


def test_wrong_settings_are_said_in_one_line(folder, monkeypatch):
    with pytest.raises(FmdError, match="no policy of timm's"):
        PhotoFolder(config(auto_augment="strong"), workers=0)
    with pytest.raises(FmdError, match="--workers -1: give 0 for none, or more"):
        PhotoFolder(config(), workers=-1)
    monkeypatch.delenv("FMD_DATA")
    with pytest.raises(FmdError, match="set FMD_DATA"):
        PhotoFolder(config(), workers=0)


# Commands


def test_check_counts_and_names(folder, monkeypatch, capsys):
    truncate(folder / "train" / "b" / "03.jpg")
    (folder / "train" / "a" / "grey.jpg").write_bytes(picture(1, (20, 9), mode="L"))
    (folder / "val" / "a" / "print.jpg").write_bytes(picture(2, mode="CMYK"))
    counts = dict(images=38, corrupt=1, greyscale=1, CMYK=1)
    smallest = {"smallest width": 20, "smallest height": 9}
    assert check("set") == counts | smallest
    assert "train/b/03.jpg" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["photos", "check", str(folder)])
    with pytest.raises(FmdError, match="1 corrupt"):
        main()


def test_speed_writes_a_record(folder, monkeypatch):
    path = speed("set", workers=1, images=8, rounds=2)
    record = json.loads(path.read_text())
    assert path.name == "input.json" and record["workers"] == 1 and record["commit"]
    assert [row["decoder"] for row in record["rows"]] == ["pillow", "draft"]
    for row in record["rows"]:
        assert 0 < row["per_core_low"] <= row["per_core"] <= row["per_core_high"]
