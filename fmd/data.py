"""Image sets that live as uint8 tensors on the device, and their augmentation in batches there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmd.errors import FmdError, nearest


@dataclass
class Split:
    """Images ``(M, C, H, W)`` as uint8 and labels ``(M,)`` as int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass
class ImageData:
    """A data set in three fixed splits; mean and std are of pixels scaled to [0, 1], per channel."""

    name: str
    train: Split
    val: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Callable[[Tensor], Tensor]
    fingerprint: str = field(init=False)

    def __post_init__(self):
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            digest.update(split.images.numpy().tobytes())
            digest.update(split.labels.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def describe(self) -> dict:
        sizes = {name: len(getattr(self, name)) for name in ("train", "val", "test")}
        return {"name": self.name, "fingerprint": self.fingerprint, **sizes}

    def take(self, fraction: float) -> ImageData:
        """The same data with a stratified, fixed share of the training images."""
        if fraction == 1.0:
            return self
        keep = _stratified(self.train.labels.numpy(), (fraction, 1 - fraction), seed=1)[0]
        train = Split(self.train.images[keep], self.train.labels[keep])
        return ImageData(
            self.name, train, self.val, self.test, self.num_classes, self.mean, self.std, self.augment
        )

    def to(self, device: torch.device) -> ImageData:
        for name in ("train", "val", "test"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (or float 0..255) images to float32 with mean 0 and standard deviation 1."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() / 255 - mean) / std

    def batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels of a split, in order, the last batch as it comes."""
        part = getattr(self, split)
        for first in range(0, len(part), batch_size):
            rows = slice(first, first + batch_size)
            yield self.normalize(part.images[rows]), part.labels[rows]


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


def random_affine(images: Tensor, shift: float, degrees: float, scale: float) -> Tensor:
    """Move, turn and resize each image ``(B, C, H, W)`` by amounts of its own, in one sampling.

    Args:
        shift: largest move along either axis, in pixels.
        degrees: largest rotation.
        scale: largest relative change of size.
    """
    n, _, height, width = images.shape
    draw = torch.rand(4, n, device=images.device) * 2 - 1
    angle = draw[0] * (degrees * torch.pi / 180)
    size = 1 + draw[1] * scale
    cos, sin = angle.cos() / size, angle.sin() / size
    # affine_grid works in coordinates from -1 to 1.
    dx, dy = draw[2] * (2 * shift / width), draw[3] * (2 * shift / height)
    matrix = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


def _augment_digits(images: Tensor) -> Tensor:
    return random_affine(images, shift=1.0, degrees=12, scale=0.12)


def load_digits() -> ImageData:
    """The 1,797 handwritten digits bundled with scikit-learn, 8×8, 60/15/25 % of each class."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError:
        raise FmdError(
            "the digits come with scikit-learn: pip install -e '.[notebooks]'"
        ) from None
    digits = bundled()
    # 16 grey levels to the range of 8 bits
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
        augment=_augment_digits,
    )


DATASETS: dict[str, Callable[[], ImageData]] = {"digits": load_digits}


def load_data(name: str) -> ImageData:
    """A registered data set; raises :class:`FmdError` for an unknown one."""
    if name not in DATASETS:
        raise FmdError(f"no data set '{name}'{nearest(name, DATASETS)}")
    return DATASETS[name]()
