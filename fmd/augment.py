"""Augmentation of whole batches on their device: every image draws its own parameters.

Nothing here makes the host wait for the device: choices are masks and tables, never branches or
boolean indexing. Random numbers come from torch's default generators.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2.functional import equalize

GREY = 128.0  # what the policy's authors put where a moved image leaves nothing
LEVELS = 10  # magnitudes of an operation in AutoAugment
OPERATIONS = (
    "ShearX",
    "Rotate",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "Invert",
    "AutoContrast",
    "Equalize",
)
SIGNED = 5  # the first operations go either way, with equal chance


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


class PhotoAugment(nn.Module):
    """AutoAugment (ImageNet policy), flip, padded crop and random erasing of square photographs.

    The policy's colour operations follow Pillow. All that moves pixels (shear, rotation, flip,
    crop) is one bilinear sampling at the end; whole-pixel moves stay exact. Libraries draw the
    policy's operation once for a whole batch; here each image draws its own, as in the paper.

    Args:
        padding: the crop moves an image by up to this many pixels along either axis.
        erase: probability that a rectangle of 2 % to 33 % of the image is replaced.
        fill: the colour it is replaced with, from 0 to 255, one value a channel.

    Shape:
        ``forward(images)`` takes uint8 ``(B, 3, S, S)`` and returns float32, still 0 to 255.

    Reference:
        Cubuk et al. 2019, arXiv 1805.09501; Zhong et al. 2020, arXiv 1708.04896.
    """

    def __init__(self, padding: int, erase: float, fill: tuple[float, ...]):
        super().__init__()
        self.padding = padding
        self.erase = erase
        policies = AutoAugment(AutoAugmentPolicy.IMAGENET).policies
        table = [
            [(OPERATIONS.index(name), chance, level or 0) for name, chance, level in pair]
            for pair in policies
        ]
        operation, chance, level = torch.tensor(table).unbind(-1)
        for name, tensor in {
            "operation": operation.long(),
            "chance": chance,
            "level": level.long(),
            "magnitudes": _magnitudes(),
            "fill": torch.tensor(fill).view(1, -1, 1, 1),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        n, device = len(images), images.device
        x = images.float()
        chosen = torch.randint(len(self.operation), (n,), device=device)
        shear = torch.zeros(n, device=device)
        angle = torch.zeros(n, device=device)
        for turn in range(2):
            operation = self.operation[chosen, turn]
            applied = torch.rand(n, device=device) < self.chance[chosen, turn]
            operation = torch.where(applied, operation, -1)
            magnitude = self.magnitudes[operation.clamp(min=0), self.level[chosen, turn]]
            negative = (torch.rand(n, device=device) < 0.5) & (operation < SIGNED)
            magnitude = torch.where(negative, -magnitude, magnitude)
            shear = shear + magnitude * (operation == OPERATIONS.index("ShearX"))
            angle = angle + magnitude * (operation == OPERATIONS.index("Rotate"))
            x = recolor(x, operation, magnitude)
        flip = torch.rand(n, device=device) < 0.5
        moves = torch.randint(-self.padding, self.padding + 1, (2, n), device=device)
        x = _move(x, shear, angle, flip, moves)
        return self._erase(x)

    def _erase(self, x: Tensor) -> Tensor:
        n, size, device = len(x), x.shape[-1], x.device
        draw = torch.rand(5, n, device=device)
        area = 0.02 + draw[0] * (1 / 3 - 0.02)
        stretch = ((2 * draw[1] - 1) * math.log(3.3) / 2).exp()  # root of height / width
        line = torch.arange(size, device=device)
        inside = []
        for side, place in ((area.sqrt() * stretch, draw[2]), (area.sqrt() / stretch, draw[3])):
            length = (side * size).round().clamp(1, size)
            first = (place * (size - length + 1)).floor()
            inside.append((line >= first[:, None]) & (line < (first + length)[:, None]))
        box = inside[0][:, :, None] & inside[1][:, None, :] & (draw[4] < self.erase)[:, None, None]
        return torch.where(box[:, None], self.fill, x)


def _magnitudes() -> Tensor:
    """``(operation, level)``: shear as a slope, degrees, change of an enhancement factor, number of
    grey levels that become one, smallest inverted value."""
    rise = torch.linspace(0, 1, LEVELS)
    table = {
        "ShearX": 0.3 * rise,
        "Rotate": 30 * rise,
        "Color": 0.9 * rise,
        "Contrast": 0.9 * rise,
        "Sharpness": 0.9 * rise,
        "Posterize": 2 ** (4 * rise).round(),
        "Solarize": 255 * (1 - rise),
    }
    return torch.stack([table.get(name, 0 * rise) for name in OPERATIONS])


def recolor(x: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Apply one of ``OPERATIONS`` to each image; those that move pixels change nothing here.

    Args:
        x: whole values 0 to 255 as float32, ``(B, 3, H, W)``.
        operation: ``(B,)``, index into ``OPERATIONS``, or -1 for none.
        magnitude: ``(B,)``, in the operation's own unit.
    """
    m = magnitude.view(-1, 1, 1, 1)
    grey = (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).round()
    results = {
        "Color": _blend(grey, x, m),
        "Contrast": _blend(grey.mean((2, 3), keepdim=True).round(), x, m),
        "Sharpness": _blend(_smooth(x), x, m),
        "Posterize": (x / m).floor() * m,
        "Solarize": torch.where(x < m, x, 255 - x),
        "Invert": 255 - x,
        "AutoContrast": _autocontrast(x),
        "Equalize": equalize(x.to(torch.uint8)).float(),  # exactly Pillow's, and without a wait
    }
    operation = operation.view(-1, 1, 1, 1)
    for name, result in results.items():
        x = torch.where(operation == OPERATIONS.index(name), result, x)
    return x


def _blend(end: Tensor, x: Tensor, change: Tensor) -> Tensor:
    """Pillow's enhancement: 1 + change times the distance from ``end``, cut to whole values."""
    return (x + change * (x - end)).clamp(0, 255).floor()


def _smooth(x: Tensor) -> Tensor:
    """Pillow's SMOOTH filter (3×3, centre 5/13); the border keeps its pixels."""
    inner = x[..., 1:-1, 1:-1]
    smooth = ((9 * F.avg_pool2d(x, 3, stride=1) + 4 * inner) / 13).round()
    return torch.cat(
        [
            x[..., :1, :],
            torch.cat([x[..., 1:-1, :1], smooth, x[..., 1:-1, -1:]], dim=-1),
            x[..., -1:, :],
        ],
        dim=-2,
    )


def _autocontrast(x: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = ((x - low) * 255 / (high - low).clamp(min=1)).clamp(0, 255).floor()
    return torch.where(high > low, stretched, x)


def _move(x: Tensor, shear: Tensor, degrees: Tensor, flip: Tensor, moves: Tensor) -> Tensor:
    """Shear, rotate, flip and shift (by ``moves`` ``(2, B)``, whole pixels) in one sampling."""
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    side = torch.where(flip, -1.0, 1.0)
    dx, dy = moves * (2 / x.shape[-1])  # affine_grid works in coordinates from -1 to 1
    matrix = torch.stack(
        [side * cos, shear * cos - sin, dx, side * sin, shear * sin + cos, dy], dim=1
    )
    grid = F.affine_grid(matrix.view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x - GREY, grid, align_corners=False) + GREY
