"""Photographs in folders, tars or shards: found, read by their number, decoded in chunks."""

from __future__ import annotations

import io
import os
import random
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.readers import create_reader
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import Dataset

from fmd.errors import FmdError, first_line

SPLITS = {"train": {"train"}, "val": {"val", "valid", "validation"}, "test": {"test"}}
RETRIES = 10  # corrupt images in a row: then it is not the odd file
SUFFIXES = (".jpg", ".jpeg", ".png")


class Images:
    """The undecoded images of one split, sorted by name; a subclass knows how to read them.

    Args:
        names: paths within the set, one an image.
        sizes: of each file, in bytes.
        labels: of each image.
        classes: label of each class name.
    """

    format: str

    def __init__(self, names: list[str], sizes, labels, classes: dict[str, int]):
        # Arrays, not lists: workers share their memory as long as nobody counts references in it.
        encoded = np.array([os.fsencode(name) for name in names])
        self.original = np.argsort(encoded, kind="stable")  # the same rows in whatever format
        self.names = encoded[self.original]
        self.sizes = np.asarray(sizes, dtype=np.int64)[self.original]
        self.labels = np.asarray(labels, dtype=np.int64)[self.original]
        self.classes = classes

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return os.fsdecode(self.names[row])

    def read(self, row: int) -> bytes:
        raise NotImplementedError


class FolderImages(Images):
    """``<class>/*.jpg`` below a folder, as timm reads it."""

    format = "ImageFolder"

    def __init__(self, folder: Path):
        self.parent = folder.parent
        try:
            reader = create_reader("", root=str(folder))
            sizes = [os.path.getsize(path) for path, _ in reader.samples]
        except (RuntimeError, OSError) as error:
            raise FmdError(f"cannot read the images in {folder}: {error}") from None
        names = [path.removeprefix(f"{self.parent}/") for path, _ in reader.samples]
        labels = [label for _, label in reader.samples]
        super().__init__(names, sizes, labels, reader.class_to_idx)

    def read(self, row: int) -> bytes:
        return (self.parent / self.name(row)).read_bytes()


class TarImages(Images):
    """Images in tar files: ``<class>/*.jpg``, one tar a class in a tar, or WebDataset's shards.

    Only the headers are read, and images by their place: any row at any time in any process, which
    exact resume needs and timm's readers do not give (WebDataset's is a stream; that of tars reads
    the whole file first and shares a file position between workers).
    """

    def __init__(self, files: list[Path], root: Path):
        self.files = files
        found: list[tuple[str, str, int, int, int]] = []  # name, class, file, offset, size
        written: dict[str, int] = {}  # WebDataset: label of each key

        def scan(stream, number: int, base: int, within: str, label: str = "") -> None:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()  # else a million headers stay in memory
                    name = os.path.normpath(member.name)
                    stem, suffix = os.path.splitext(name)
                    path = f"{within}/{name}"
                    place = (number, base + member.offset_data, member.size)
                    if suffix == ".tar":
                        inside = os.path.basename(stem)
                        scan(tar.extractfile(member), number, place[1], path, inside)
                    elif suffix == ".cls":
                        written[_key(path)] = int(tar.extractfile(member).read())
                    elif suffix.lower() in SUFFIXES:
                        folder = os.path.basename(os.path.dirname(name))
                        found.append((path, folder or label, *place))

        for number, file in enumerate(files):
            try:
                with file.open("rb") as stream:
                    scan(stream, number, 0, str(file.relative_to(root)))
            except (OSError, ValueError, tarfile.TarError) as error:
                raise FmdError(f"cannot read {file}: {error}") from None
        if not found:
            raise FmdError(f"no images in {files[0]}")
        if written:
            self.format = "WebDataset"
            missing = [path for path, *_ in found if _key(path) not in written]
            if missing:
                raise FmdError(f"{missing[0]} has no label: each .jpg needs a .cls of its name")
            labels = [written[_key(path)] for path, *_ in found]
            classes = {str(label): label for label in sorted(set(labels))}
        else:
            self.format = "tar"
            labels = [label for _, label, *_ in found]
            classes = {c: i for i, c in enumerate(sorted(set(labels), key=natural_key))}
            labels = [classes[label] for label in labels]
        super().__init__([path for path, *_ in found], [row[-1] for row in found], labels, classes)
        self.places = np.array([row[2:] for row in found], dtype=np.int64)[self.original]

    def read(self, row: int) -> bytes:
        number, offset, size = self.places[row].tolist()
        with self.files[number].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _key(path: str) -> str:
    """What the files of one WebDataset sample have in common: all before the first dot."""
    folder, name = os.path.split(path)
    return f"{folder}/{name.partition('.')[0]}"


class ParquetImages(Images):
    """The hub's Parquet shards, columns ``image`` and ``label``.

    Parquet has no access to single rows: the library ``datasets`` writes an Arrow copy first, as
    large as the images, under ``$HF_HOME``.
    """

    format = "Parquet"

    def __init__(self, files: list[Path], root: Path):
        try:
            import datasets
        except ImportError:
            raise FmdError(f"{files[0].name} needs a library: pip install datasets") from None
        import pyarrow.parquet as pq

        names, sizes = [], []
        try:
            for file in files:
                count = pq.ParquetFile(file).metadata.num_rows
                names += [f"{file.relative_to(root)} row {row:08d}" for row in range(count)]
                sizes += [file.stat().st_size] * count
            # Not timm's reader: it would convert all splits of the folder, the unlabelled too.
            self.table = datasets.load_dataset(
                "parquet", data_files=[str(file) for file in files], split="train"
            ).cast_column("image", datasets.Image(decode=False))
            labels = self.table.data["label"].to_numpy()
        except Exception as error:  # datasets and pyarrow raise unrelated types
            raise FmdError(f"cannot read the shards of {files[0]}: {first_line(error)}") from error
        known = getattr(self.table.features["label"], "names", None)
        classes = known or map(str, range(labels.max() + 1))
        super().__init__(names, sizes, labels, {name: i for i, name in enumerate(classes)})

    def read(self, row: int) -> bytes:
        return self.table[int(self.original[row])]["image"]["bytes"]


def find_splits(folder: Path) -> dict[str, Images]:
    """The splits that lie in a folder, in whatever format.

    Raises :class:`FmdError` where there is no training split, one cannot be read, or the classes
    of two differ. A test split without labels, as ImageNet's, does not count.
    """
    if not folder.is_dir():
        raise FmdError(f"no folder {folder}: check data=photos/<folder> and FMD_DATA")
    splits = {}
    for split, words in SPLITS.items():
        images = _find_split(folder, words)
        unlabelled = images is not None and (set(images.classes) == {""} or images.labels.min() < 0)
        if unlabelled and split != "test":
            raise FmdError(
                f"the images of {split} in {folder} have no labels: sort them into class folders"
            )
        if images is not None and not unlabelled:
            splits[split] = images
    if "train" not in splits:
        raise FmdError(
            f"{folder} holds no training images: it needs train/<class>/*.jpg, train.tar, "
            "or train-*.tar or .parquet shards, and the same for val"
        )
    classes = splits["train"].classes
    for split, images in splits.items():
        if images.classes != classes:
            odd = sorted(images.classes.keys() ^ classes.keys(), key=natural_key)[:3]
            raise FmdError(
                f"the {len(images.classes)} classes of {split} in {folder} are not the "
                f"{len(classes)} of train: {', '.join(odd) or 'another order'} in only one of them"
            )
    return splits


def _find_split(folder: Path, words: set[str]) -> Images | None:
    names = [folder / word for word in sorted(words) if (folder / word).is_dir()]
    if names and any(entry.is_dir() for entry in os.scandir(names[0])):
        return FolderImages(names[0])
    for suffix, kind in ((".tar", TarImages), (".parquet", ParquetImages)):
        files = [
            file
            for pattern in ("*", "*/*")  # at most in data/ or train/: a glob of all takes minutes
            for file in sorted(folder.glob(pattern + suffix))
            if words & set(re.split("[^a-z]+", str(file.relative_to(folder)).lower()))
        ]
        if files:
            return kind(files, folder)
    return FolderImages(names[0]) if names else None


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's, which at the highest level keeps 0 bits: black before, an error since Pillow 13."""
    return posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


NAME_TO_OP.update({name: _posterize for name in NAME_TO_OP if NAME_TO_OP[name] is posterize})


class Chunks(Dataset):
    """Chunks of decoded images, each made as a whole by one worker.

    An item is asked for by ``(rows, seed)`` and is uint8 images ``(m, 3, S, S)``, labels ``(m,)``
    and the names of corrupt images met; or the :class:`FmdError` that the caller is to raise: one
    raised in a worker would come with its traceback.
    """

    def __init__(
        self, images: Images, rows: np.ndarray, transform, *, skip: bool, replace: bool, draft: bool
    ):
        self.images = images
        self.rows = rows
        self.transform = transform
        self.skip = skip  # corrupt images, and ...
        self.replace = replace  # ... take the next in their place, or leave them out
        self.draft = draft

    def __getitem__(
        self, chunk: tuple[np.ndarray, int]
    ) -> tuple[Tensor, Tensor, list[str]] | FmdError:
        try:
            with _generators_kept():
                return self._make(*chunk)
        except FmdError as error:
            return error

    def _make(self, rows: np.ndarray, seed: int) -> tuple[Tensor, Tensor, list[str]]:
        pictures, labels, corrupt = [], [], []
        for j, row in enumerate(rows):
            seeds = np.random.SeedSequence((seed, j)).generate_state(3).tolist()
            for attempt in range(RETRIES):
                index = self.rows[(row + attempt) % len(self.rows)]
                random.seed(seeds[0])  # timm and torchvision draw from three generators
                np.random.seed(seeds[1])  # noqa: NPY002
                torch.default_generator.manual_seed(seeds[2])
                try:
                    picture = self._load(index)
                except CorruptImage as error:
                    if not self.skip:
                        raise FmdError(f"{error}: repair it, or set skip_corrupt=true") from None
                    corrupt.append(self.images.name(index))
                    if not self.replace:
                        break
                    continue
                pictures.append(picture)
                labels.append(self.images.labels[index])
                break
            else:
                name = self.images.name(index)
                raise FmdError(f"{RETRIES} corrupt images in a row, the last is {name}")
        images = torch.stack(pictures) if pictures else torch.empty(0, dtype=torch.uint8)
        return images, torch.tensor(labels, dtype=torch.int64), corrupt

    def _load(self, index: int) -> Tensor:
        try:
            data = self.images.read(index)
        except OSError as error:  # the disk's fault, which skipping would hide
            name = self.images.name(index)
            raise FmdError(f"cannot read {name}: {error.strerror or error}") from None
        crop, *others = self.transform.transforms
        try:
            image = Image.open(io.BytesIO(data))
            full = image.size
            if self.draft:
                # The crop is drawn before decoding: a JPEG can be decoded at 1/2, 1/4 or 1/8 of
                # its size, as long as the crop keeps as many pixels as are asked for.
                top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
                image.draft(
                    None,
                    [-(-f * s // c) for f, s, c in zip(full, crop.size[::-1], (width, height))],
                )
            image = image.convert("RGB")
        except Exception as error:  # Pillow raises what it likes, from SyntaxError to struct.error
            raise CorruptImage(f"{self.images.name(index)} cannot be decoded ({error})") from None
        if not self.draft:
            return self.transform(image)
        box = np.array([left, top, left + width, top + height])
        box = box * np.tile(np.divide(image.size, full), 2)
        image = image.resize(crop.size[::-1], Image.Resampling.BICUBIC, box=tuple(box))
        for transform in others:
            image = transform(image)
        return image


class CorruptImage(Exception):
    """A file was read but is no whole image."""


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Without workers the images are made in the process whose generators the loop has seeded."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
