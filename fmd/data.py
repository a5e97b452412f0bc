"""Image sets that live as uint8 tensors on the device.

``python -m fmd.data download tiny-imagenet`` fetches the set that is not bundled.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.contrib.concurrent import thread_map

from fmd.augment import PhotoAugment, random_affine
from fmd.config import data_dir
from fmd.errors import FmdError, first_line, nearest, run_main


@dataclass
class Split:
    """Images ``(M, C, H, W)`` as uint8 and labels ``(M,)`` as int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


class Normalize(nn.Module):
    """uint8 (or float 0..255) images to float32 with mean 0 and standard deviation 1.

    Args:
        mean, std: of each channel, of pixels scaled to [0, 1].
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        # Made once: a tensor made from Python numbers at each step would make the host wait.
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


@dataclass
class ImageData:
    """A data set in three fixed splits; mean and std of each channel, pixels scaled to [0, 1]."""

    name: str
    train: Split
    val: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Callable[[Tensor], Tensor]
    fingerprint: str = field(init=False)  # of all images, whatever share is taken
    normalize: Normalize = field(init=False)
    is_sample: bool = field(init=False, default=False)
    corrupt: set[str] = field(init=False, default_factory=set)  # all in memory are decoded

    def __post_init__(self):
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            digest.update(np.ascontiguousarray(split.images))
            digest.update(np.ascontiguousarray(split.labels))
        self.fingerprint = digest.hexdigest()[:16]
        self.normalize = Normalize(self.mean, self.std)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return tuple(self.train.images.shape[1:])

    def describe(self) -> dict:
        sizes = {name: len(getattr(self, name)) for name in ("train", "val", "test")}
        return {"name": self.name, "fingerprint": self.fingerprint, **sizes}

    def take(self, fraction: float) -> ImageData:
        """The same data with a stratified, fixed share of the training images."""
        if fraction == 1.0:
            return self
        keep = _stratified(self.train.labels.numpy(), (fraction, 1 - fraction), seed=1)[0]
        train = Split(self.train.images[keep], self.train.labels[keep])
        part = copy.copy(self)  # with the fingerprint of the whole: it is the same data set
        part.train = train
        return part

    def to(self, device: torch.device) -> ImageData:
        for name in ("train", "val", "test"):
            setattr(self, name, getattr(self, name).to(device))
        # Not in place: samples of this data may be elsewhere.
        self.normalize = Normalize(self.mean, self.std).to(device)
        if isinstance(self.augment, nn.Module):
            self.augment.to(device)
        return self

    def sample(self, train: int, val: int) -> ImageData:
        """The same data with the first few images of each split, to try a run on."""
        part = copy.copy(self)
        part.is_sample = True
        for name, count in (("train", train), ("val", val), ("test", val)):
            split = getattr(self, name)
            setattr(part, name, Split(split.images[:count], split.labels[:count]))
        return part

    def size(self, split: str) -> int:
        return len(getattr(self, split))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Rows of the training images in the order of an epoch."""
        return np.random.default_rng([seed, epoch]).permutation(len(self.train))

    def chunks(self, plan: list[np.ndarray], seeds: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images and labels of each list of training rows; nothing in them is random."""
        # All rows at once: a copy at every step would make the host wait for the device.
        rows = torch.from_numpy(np.concatenate(plan)).to(self.train.labels.device)
        for part in rows.split([len(rows) for rows in plan]):
            yield self.train.images[part], self.train.labels[part]

    def training_images(self, images: Tensor) -> Tensor:
        """uint8 images augmented, with torch's generator, and normalised."""
        return self.normalize(self.augment(images))

    def compile(self) -> None:
        self.training_images = torch.compile(self.training_images)

    def batches(
        self, split: str, batch_size: int, rank: int = 0, world: int = 1, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels of a split, in order, the last batch as it comes.

        Of several processes, each gets its own share; ``limit`` is the number of images of all.
        """
        part = getattr(self, split)
        share = slice(rank, limit, world)
        images, labels = part.images[share], part.labels[share]
        for first in range(0, len(labels), batch_size):
            rows = slice(first, first + batch_size)
            yield self.normalize(images[rows]), labels[rows]


def _stratified(labels: np.ndarray, shares: tuple[float, ...], seed: int) -> list[Tensor]:
    """Fixed disjoint index sets with the given shares of every class, sorted."""
    rng = np.random.default_rng(seed)
    parts = [[] for _ in shares]
    cuts = np.cumsum(shares)[:-1]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for part, chunk in zip(parts, np.split(rows, np.round(cuts * len(rows)).astype(int))):
            part.append(chunk)
    return [torch.from_numpy(np.sort(np.concatenate(part))) for part in parts]


def load_digits() -> ImageData:
    """The 1,797 handwritten digits bundled with scikit-learn, 8×8, 60/15/25 % of each class."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError:
        raise FmdError("the digits come with scikit-learn: pip install -e '.[notebooks]'") from None
    digits = bundled()
    # Values from 0 to 16 become 0 to 240: most of the range of 8 bits, and whole numbers still.
    images = torch.from_numpy((digits.images * 15).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    splits = [
        Split(images[rows], labels[rows])
        for rows in _stratified(digits.target, (0.60, 0.15, 0.25), seed=0)
    ]
    pixels = splits[0].images.double() / 255
    return ImageData(
        "digits",
        *splits,
        num_classes=10,
        mean=(round(pixels.mean().item(), 4),),
        std=(round(pixels.std().item(), 4),),
        augment=partial(random_affine, shift=0.5, degrees=8, scale=0.1),
    )


TINY_IMAGENET = "zh-plus/tiny-imagenet"  # on the Hugging Face hub
TINY_SIZE = 64
TINY_MEAN, TINY_STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)


def load_tiny_imagenet() -> ImageData:
    """Tiny-ImageNet-200, 64×64, from the Parquet shards under ``$FMD_DATA/tiny-imagenet``.

    The validation images are halved, class by class: one half to select on, one to report. Rows are
    in the order of their files' hashes: that mixes the classes, and is the same however the shards
    are cut and ordered. Images are decoded once and kept as ``.npy`` files next to the shards, or
    under ``$XDG_CACHE_HOME/fmd`` where that folder takes no files. Raises :class:`FmdError` if the
    shards are missing or do not hold 64×64 images.
    """
    folder = data_dir("tiny-imagenet")
    shards = {part: sorted(folder.rglob(f"{part}*.parquet")) for part in ("train", "valid")}
    missing = [f"{part}*.parquet" for part, files in shards.items() if not files]
    if missing:
        raise FmdError(
            f"no {' or '.join(missing)} under {folder}: run python -m fmd.data download "
            "tiny-imagenet, or set FMD_DATA to the folder that holds tiny-imagenet/"
        )
    digest = hashlib.sha256()
    for file in (*shards["train"], *shards["valid"]):
        digest.update(file.read_bytes())
    name = f"by-hash-{digest.hexdigest()[:16]}"  # other shards, other files
    train, valid = (_cached(files, folder, name, part) for part, files in shards.items())
    val, test = (
        Split(valid.images[rows], valid.labels[rows])
        for rows in _stratified(valid.labels.numpy(), (0.5, 0.5), seed=0)
    )
    return ImageData(
        "tiny-imagenet",
        train,
        val,
        test,
        num_classes=int(train.labels.max()) + 1,
        mean=TINY_MEAN,
        std=TINY_STD,
        augment=PhotoAugment(padding=4, erase=0.25, fill=tuple(255 * m for m in TINY_MEAN)),
    )


def _cached(shards: list[Path], folder: Path, name: str, part: str) -> Split:
    """The decoded images of some shards, mapped from disk; decoded first where they are not yet."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmd"
    places = [place / name / part for place in (folder, fallback)]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        images, labels = _decode(shards)
        # Root may write anywhere, but a folder marked read-only is left as it is.
        writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222
        place = places[0 if writable else 1]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when whole: a killed process leaves nothing that looks decoded.
            with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
                np.save(f"{temporary}/images.npy", images)
                np.save(f"{temporary}/labels.npy", labels)
                os.chmod(temporary, 0o755)  # others may share the folder
                try:
                    os.rename(temporary, place)
                except OSError:
                    if not place.is_dir():  # else another process was faster
                        raise
        except OSError as error:
            raise FmdError(
                f"cannot keep the decoded images in {place.parent}: {error.strerror}; "
                "free the place or set XDG_CACHE_HOME to another folder"
            ) from error
    # Copy-on-write: torch takes no read-only arrays.
    images, labels = (np.load(place / f"{x}.npy", mmap_mode="c") for x in ("images", "labels"))
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _decode(shards: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(M, 3, 64, 64)`` as uint8 and labels ``(M,)``, in the order of the files' hashes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        tables = [pq.read_table(shard, columns=["image", "label"]) for shard in shards]
        table = pa.concat_tables(tables)
        blobs = [image["bytes"] for image in table["image"].to_pylist()]
        labels = table["label"].to_numpy().astype(np.int64)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise FmdError(
            f"cannot read the shards in {shards[0].parent}: {first_line(error)}"
        ) from error
    hashes = [hashlib.sha256(blob).digest() for blob in blobs]
    order = sorted(range(len(blobs)), key=lambda row: (hashes[row], labels[row]))
    images = np.empty((len(order), 3, TINY_SIZE, TINY_SIZE), dtype=np.uint8)

    def decode(place: int) -> None:
        row = order[place]
        try:
            # A few images are greyscale.
            image = Image.open(io.BytesIO(blobs[row])).convert("RGB")
        except OSError as error:
            raise FmdError(
                f"image {row} of {shards[0].parent} cannot be decoded: {error}"
            ) from error
        if image.size != (TINY_SIZE, TINY_SIZE):
            raise FmdError(f"image {row} of {shards[0].parent} is {image.size}, not 64×64")
        images[place] = np.asarray(image).transpose(2, 0, 1)

    # In threads: Pillow decodes outside Python's lock.
    thread_map(decode, range(len(images)), desc="decoding, once", unit="image", mininterval=1.0)
    return images, labels[order]


def download_tiny_imagenet() -> Path:
    """Fetch the Parquet shards from the Hugging Face hub into ``$FMD_DATA/tiny-imagenet``."""
    from huggingface_hub import snapshot_download

    folder = data_dir("tiny-imagenet")
    try:
        snapshot_download(
            TINY_IMAGENET, repo_type="dataset", allow_patterns="data/*.parquet", local_dir=folder
        )
    except Exception as error:  # the hub's client and its transport raise unrelated types
        raise FmdError(
            f"cannot download {TINY_IMAGENET} ({first_line(error)}): check the connection, or copy "
            f"its Parquet files into {folder} by hand"
        ) from error
    return folder


DATASETS: dict[str, Callable[[], ImageData]] = {
    "digits": load_digits,
    "tiny-imagenet": load_tiny_imagenet,
}
DOWNLOADS: dict[str, Callable[[], Path]] = {"tiny-imagenet": download_tiny_imagenet}


def load_data(name: str) -> ImageData:
    """A registered data set; raises :class:`FmdError` for an unknown one."""
    if name not in DATASETS:
        raise FmdError(f"no data set '{name}'{nearest(name, DATASETS)}")
    return DATASETS[name]()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmd.data", description="Fetch a data set.")
    parser.add_argument("action", choices=["download"])
    parser.add_argument("name", choices=sorted(DOWNLOADS))
    args = parser.parse_args()
    print(f"{args.name} is in {DOWNLOADS[args.name]()}")


if __name__ == "__main__":
    run_main(main)
