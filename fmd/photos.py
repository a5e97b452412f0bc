"""Photographs decoded by worker processes as the training loop needs them.

``python -m fmd.photos check FOLDER`` decodes every image once and names the broken ones;
``python -m fmd.photos speed FOLDER`` measures the input pipeline by itself. FOLDER lies under
``$FMD_DATA``, or is a whole path.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from fmd.config import PHOTOS, RunConfig, data_dir, load_experiment
from fmd.data import Normalize, _stratified
from fmd.errors import FmdError, first_line, run_main
from fmd.photo_files import Chunks, Images, find_splits
from fmd.processes import device_name
from fmd.records import provenance, spread, write_benchmark

DECODERS = ("pillow", "draft")
EVAL_CHUNK = 64  # images of a batch in evaluation
MOST_WORKERS = 32  # each keeps two chunks of images ready


class PhotoFolder:
    """Photographs under ``$FMD_DATA/<folder>``, the same for the training loop as ``ImageData``.

    A test split is used as it is and validation images select; without one the validation images
    are halved, class by class. Without any, 10 % of each class are held out for either purpose.
    All choices are fixed. Every random number of an image follows from its chunk's seed and its
    place in it: the pixels do not depend on workers, processes or where a resumed run begins.

    Training images are cropped, flipped and augmented as timm does: with a policy in
    ``auto_augment`` colours are not jittered besides, without one they are, by 0.4.

    Args:
        config: ``data`` reads ``photos/<folder>``.
        workers: processes that decode; 0 for none, by default one a core of this process's share.

    Attributes:
        normalize: the :class:`fmd.data.Normalize` of ImageNet, on the data's device.
        fingerprint: 16 hex digits that change with the names, sizes in bytes and labels of the
            files of all splits (of the shards for Parquet). Their bytes are not read.
        corrupt: names of images replaced in training or left out of an evaluation so far, in this
            process.

    Raises:
        FmdError: no such folder, no training images, or other classes in another split; later,
            when images are read, a file that is missing or corrupt.
    """

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def __init__(self, config: RunConfig, workers: int | None = None):
        self.name = config.data
        self.config = config
        self.workers = _cores() if workers is None else workers
        if self.workers < 0:
            raise FmdError(f"--workers {workers}: give 0 for none, or more")
        self.images = find_splits(data_dir(config.photos))
        self.format = "+".join(sorted({images.format for images in self.images.values()}))
        self.num_classes = max(self.images["train"].classes.values()) + 1
        if self.num_classes < 2:
            raise FmdError(
                f"{self.name} holds a single class: train/ and val/ need a subfolder for each class"
            )
        self.image_shape = (3, config.image_size, config.image_size)
        self.fingerprint = _fingerprint(self.images)
        self.corrupt: set[str] = set()
        self.is_sample = False
        self.rows = self._split()
        options = dict(
            input_size=self.image_shape,
            interpolation="bicubic",
            mean=self.mean,
            std=self.std,
            crop_pct=config.crop_pct,
            use_prefetcher=True,  # uint8: normalised and erased on the device
        )
        policy = dict(is_training=True, auto_augment=config.auto_augment) if config.augment else {}
        try:
            self.transforms = {"train": create_transform(**options, **policy)}
        except (AssertionError, ValueError, KeyError) as error:
            raise FmdError(
                f"auto_augment '{config.auto_augment}' is no policy of timm's"
            ) from error
        self.transforms["val"] = self.transforms["test"] = create_transform(**options)
        self.to(torch.device("cpu"))

    def _split(self) -> dict[str, np.ndarray]:
        """Rows of each split, in a fixed random order: the first few are of many classes."""
        train = self.images["train"].labels
        rows = {split: np.arange(len(images)) for split, images in self.images.items()}
        rng = np.random.default_rng(0)
        tested = "test" in self.images
        if "val" in self.images and not tested:
            self.source = "validation images halved"
            labels = self.images["val"].labels
            order = np.lexsort((rng.permutation(len(labels)), labels))
            rows["val"], rows["test"] = order[::2], order[1::2]
            self.images["test"] = self.images["val"]
        elif "val" not in self.images:
            self.source = "held out of the training images, 10 % each"
            shares = (0.9, 0.1) if tested else (0.8, 0.1, 0.1)
            parts = _stratified(train, shares, seed=0)
            for split, part in zip(("train", "val", "test"), parts):
                rows[split] = part.numpy()
                self.images.setdefault(split, self.images["train"])
        else:
            self.source = "folders"
        if not all(len(part) for part in rows.values()):
            raise FmdError(
                f"{self.name} has too few images of each class to hold any out: add a val folder"
            )
        if self.config.data_fraction < 1:
            share = (self.config.data_fraction, 1 - self.config.data_fraction)
            kept = _stratified(train[rows["train"]], share, seed=1)[0]
            rows["train"] = rows["train"][kept.numpy()]
        return {split: rng.permutation(part) for split, part in rows.items()}

    def to(self, device: torch.device) -> PhotoFolder:
        self.device = torch.device(device)
        self.normalize = Normalize(self.mean, self.std).to(self.device)
        chance = self.config.erasing if self.config.augment else 0.0
        self._erase = RandomErasing(chance, mode="pixel", device=self.device)
        return self

    def compile(self) -> None:
        """Nothing here gains by it."""

    def describe(self) -> dict:
        names = {label: name for name, label in self.images["train"].classes.items()}
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            **{split: len(rows) for split, rows in self.rows.items()},
            "classes": self.num_classes,
            # By label. Files that number their classes may leave numbers out.
            "class_names": [names.get(label, str(label)) for label in range(self.num_classes)],
            "format": self.format,
            "evaluation": self.source,
        }

    def sample(self, train: int, val: int) -> PhotoFolder:
        """The same data with a few images of each split, to try a run on."""
        part = copy.copy(self)
        part.is_sample = True
        counts = {"train": train, "val": val, "test": val}
        part.rows = {split: rows[: counts[split]] for split, rows in self.rows.items()}
        return part

    def size(self, split: str) -> int:
        return len(self.rows[split])

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Training images in the order of an epoch, as numbers below ``size("train")``.

        With ``repeats`` each comes that often in a row, but an epoch stays as long as without, cut
        to a multiple of 256 as in DeiT: it sees only a part of the images.
        """
        order = np.random.default_rng([seed, epoch]).permutation(self.size("train"))
        if self.config.repeats == 1:
            return order
        length = len(order) // 256 * 256 or len(order)
        return np.repeat(order, self.config.repeats)[:length]

    def chunks(self, plan: list[np.ndarray], seeds: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Cropped and augmented uint8 images ``(m, 3, S, S)`` and labels of parts of an order."""
        return self._load("train", list(zip(plan, seeds, strict=True)))

    def training_images(self, images: Tensor) -> Tensor:
        """uint8 images normalised and, at random, erased, by Python's and torch's generators."""
        return self._erase(self.normalize(images))

    def batches(
        self, split: str, batch_size: int, rank: int = 0, world: int = 1, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels of ``val`` or ``test``, the last batch as it comes.

        Of several processes, each gets its own share; ``limit`` is the number of images of all.
        """
        # A worker hands its chunk over in shared memory, of which containers have little.
        batch_size = min(batch_size, EVAL_CHUNK)
        share = np.arange(len(self.rows[split]))[rank:limit:world]
        plan = [(share[i : i + batch_size], 0) for i in range(0, len(share), batch_size)]
        for images, labels in self._load(split, plan):
            if len(labels):  # none if all were corrupt
                yield self.normalize(images), labels

    def _load(
        self, split: str, plan: list[tuple[np.ndarray, int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        train = split == "train"
        chunks = Chunks(
            self.images[split],
            self.rows[split],
            self.transforms[split],
            skip=self.config.skip_corrupt,
            replace=train,
            draft=train and self.config.augment and self.config.decoder == "draft",
        )
        # Workers live for one plan: forking takes milliseconds, an idle pool holds memory.
        workers = min(self.workers, len(plan))
        loader = DataLoader(
            chunks,
            batch_size=None,
            sampler=plan,
            num_workers=workers,
            # What starts a worker in milliseconds; others would load torch anew at every epoch.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        if workers and dist.is_initialized() and sys.version_info < (3, 12):
            # A thread of gloo's that ends an exchange registers with Python; a worker that is
            # forked in that moment hangs: two in 3000 times did on a busy machine.
            time.sleep(0.02)
        try:
            for item in loader:
                if isinstance(item, FmdError):
                    raise item
                images, labels, corrupt = item
                self.corrupt.update(corrupt)
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise FmdError(
                f"{first_line(error)}: it may lack memory, or room in /dev/shm; try fewer --workers"
            ) from None


def _cores() -> int:
    """Cores for each process of this machine's share of a run, at most ``MOST_WORKERS``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), MOST_WORKERS)


def _fingerprint(images: dict[str, Images]) -> str:
    digest = hashlib.sha256()
    for split, part in sorted(images.items()):
        digest.update(split.encode() + b"\n" + b"\n".join(part.names.tolist()))
        digest.update(part.sizes.tobytes() + part.labels.tobytes())
    return digest.hexdigest()[:16]


def check(folder: str) -> dict[str, int]:
    """Decode every image of a folder; counts by kind, after the names of corrupt ones."""
    counts, smallest = Counter(images=0, corrupt=0, greyscale=0, CMYK=0), (0, 0)
    for split, images in find_splits(data_dir(folder)).items():

        def look(row: int, images: Images = images) -> tuple[int, str, tuple[int, int]]:
            try:
                image = Image.open(io.BytesIO(images.read(row)))
                image.load()
            except Exception as error:
                return row, f"corrupt: {images.name(row)} ({error})", (0, 0)
            return row, image.mode, image.size

        with ThreadPool(_cores()) as pool:  # Pillow decodes outside Python's lock
            looks = pool.imap_unordered(look, range(len(images)), chunksize=16)
            for _, kind, size in tqdm(looks, total=len(images), desc=split, mininterval=1.0):
                counts["images"] += 1
                counts["greyscale"] += kind in ("L", "LA", "1", "I;16")
                counts["CMYK"] += kind == "CMYK"
                if kind.startswith("corrupt"):
                    counts["corrupt"] += 1
                    tqdm.write(kind)
                elif smallest == (0, 0) or min(size) < min(smallest):
                    smallest = size
    return {**counts, "smallest width": smallest[0], "smallest height": smallest[1]}


def speed(folder: str, workers: int | None = None, images: int = 1024, rounds: int = 5) -> Path:
    """Measure the training pipeline of the published recipe, decoder by decoder in turns.

    Writes ``results/benchmarks/input.json``: images per second of the clock with their spread;
    ``per_core``, per second of processor time, which a busy machine does not lower; and the ratio
    of that to Pillow's in the same round.
    """
    code = provenance()
    recipe = load_experiment("imagenet")
    data = {
        decoder: PhotoFolder(
            recipe.run("decoupled", data=f"{PHOTOS}{folder}", decoder=decoder), workers
        )
        for decoder in DECODERS
    }
    config = data["pillow"].config
    rates = {decoder: [] for decoder in DECODERS}
    core_rates = {decoder: [] for decoder in DECODERS}
    for turn in tqdm(range(rounds), desc="measuring"):
        for decoder, photos in data.items():
            rows = np.resize(photos.order(0, turn), images)
            plan = np.array_split(rows, -(-images // config.micro_batch))
            start, busy = time.perf_counter(), _processor_seconds()
            for _ in photos.chunks(plan, list(range(len(plan)))):
                pass
            rates[decoder].append(images / (time.perf_counter() - start))
            core_rates[decoder].append(images / (_processor_seconds() - busy))
    rows = []
    for decoder in DECODERS:
        ratios = [a / b for a, b in zip(core_rates[decoder], core_rates["pillow"])]
        measured = spread("images_per_second", rates[decoder])
        measured |= spread("per_core", core_rates[decoder]) | spread("speedup", ratios)
        rows.append({"decoder": decoder} | measured)
    record = {
        "benchmark": "input",
        **code,
        "device": device_name(torch.device("cpu")),
        "workers": data["pillow"].workers,
        "cores": os.cpu_count(),
        "data": data["pillow"].describe(),
        "mean_bytes": float(data["pillow"].images["train"].sizes.mean()),
        "image_size": config.image_size,
        "auto_augment": config.auto_augment,
        "images": images,
        "rows": rows,
    }
    return write_benchmark("input", record)


def _processor_seconds() -> float:
    """Of this process and of the workers that have ended."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmd.photos", description=__doc__)
    parser.add_argument("action", choices=["check", "speed"])
    parser.add_argument("folder", help="below $FMD_DATA, or a whole path")
    parser.add_argument("--workers", type=int, help="processes that decode, for speed")
    args = parser.parse_args()
    if args.action == "speed":
        path = speed(args.folder, args.workers)
        for row in json.loads(path.read_text())["rows"]:
            print("{decoder}: {images_per_second:.0f}/s, {per_core:.0f} per core".format(**row))
        print(path)
        return
    counts = check(args.folder)
    print(", ".join(f"{key}: {value}" for key, value in counts.items()))
    if counts["corrupt"]:
        raise FmdError(f"{counts['corrupt']} corrupt: repair them, or set skip_corrupt=true")


if __name__ == "__main__":
    run_main(main)
