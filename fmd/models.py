"""timm models by name, and their patch tokens, whatever the architecture."""

from __future__ import annotations

import hashlib
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.cait import Cait, TalkingHeadAttn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fmd.errors import FmdError, first_line, nearest


class FusedTalkingHeads(TalkingHeadAttn):
    """timm's talking-heads attention, which mixes its heads' maps as the compiler can fuse it.

    timm mixes them by linear layers over the last axis, each between two copies into another order
    of the axes, and a GPU's matrix products are no match for four columns. Weights, and what an
    eager network does, are timm's. What need not learn is cheaper still as
    :class:`fmd.teacher.TalkingHeads`.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Not is_compiling, which exporting is as well: what is exported is run by others.
        if not torch.compiler.is_dynamo_compiling():
            return super().forward(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        maps = _mix_heads(self.proj_l, ((q * self.scale) @ k.mT).float()).softmax(-1)
        maps = self.attn_drop(_mix_heads(self.proj_w, maps)).to(v.dtype)
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).flatten(2)))


def _mix_heads(mixing: nn.Linear, maps: Tensor) -> Tensor:
    # A sum of fewer than eight terms is written out by the compiler: nothing this large is stored.
    weight = mixing.weight[:, :, None, None]
    return (weight * maps[:, None]).sum(2) + mixing.bias[:, None, None]


def create_model(name: str, num_classes: int, in_chans: int = 3, **kwargs) -> nn.Module:
    """A timm model with random weights; :class:`FmdError` for a name or argument timm lacks."""
    if not timm.is_model(name):
        raise FmdError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    try:
        model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs)
    except Exception as error:  # timm raises unrelated types, RuntimeError for an unknown tag
        raise FmdError(f"timm cannot build '{name}' with {kwargs}: {error}") from error
    for layer in model.modules():
        if type(layer) is TalkingHeadAttn:
            layer.__class__ = FusedTalkingHeads
    return model


def pretrained_model(name: str, weights: str | None = None, **kwargs) -> nn.Module:
    """A timm model with its own classes and its pretrained weights, in eval mode.

    Args:
        name: timm name; with ``num_classes=0`` in ``kwargs`` a model that gives features alone.
        weights: a safetensors file in timm's format instead of the hub; ``'random'`` for none.

    Raises:
        FmdError: no such model, a file that is missing or of another model, a hub out of reach.
    """
    if not timm.is_model(name.split(".")[0]):
        raise FmdError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    if weights not in (None, "random"):
        if not Path(weights).is_file():
            raise FmdError(f"no weights of '{name}' at {weights}")
        overlay = {"file": str(weights)}
        if kwargs.get("num_classes"):
            # timm drops a head of other classes than it thinks the file has, without a word.
            overlay["num_classes"] = kwargs["num_classes"]
        kwargs["pretrained_cfg_overlay"] = overlay
    try:
        model = timm.create_model(name, pretrained=weights != "random", **kwargs).eval()
        if "pretrained_cfg_overlay" in kwargs and not model.num_classes:
            # Without a head, timm takes any file, and what it lacks stays random.
            with safe_open(weights, "pt") as file:
                lost = model.state_dict().keys() - set(file.keys())
            if lost:
                raise ValueError(f"the file lacks {', '.join(sorted(lost)[:3])}")
        return model
    except Exception as error:  # timm, the hub's client and its transport raise unrelated types
        line = textwrap.shorten(str(error) or type(error).__name__, 200)
        where = weights if weights else "the hub"
        raise FmdError(
            f"cannot load '{name}' from {where} ({line}): check the file or the connection; "
            "teacher_weights=<file.safetensors> takes a local copy"
        ) from error


def input_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that a model is bound to; None if it takes any."""
    embedding = getattr(model, "patch_embed", None)
    size = getattr(embedding, "img_size", None)
    return tuple(size) if size and getattr(embedding, "strict_img_size", True) else None


def takes_grey(model: nn.Module) -> bool:
    """Whether a model's images have one channel, as far as timm names its first convolution."""
    first = model.pretrained_cfg.get("first_conv") or ()
    names = [first] if isinstance(first, str) else first
    modules = dict(model.named_modules())
    return any(getattr(modules.get(name), "in_channels", None) == 1 for name in names)


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a safetensors file into ``model``, widening half precision; raises :class:`FmdError`."""
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise FmdError(
            f"no weights at {path}: train them first (if the run has a record, delete it before)"
        ) from None
    except Exception as error:  # safetensors and torch raise unrelated types for a bad file
        raise FmdError(
            f"{path} does not hold weights of this model: {first_line(error)}"
        ) from error
    return model


def narrow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights rounded to float16, whole numbers as they are; :func:`load_weights` widens them.

    Raises :class:`FmdError` if one is too large for that.
    """
    narrowed = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    for name, value in narrowed.items():
        if not value.isfinite().all():
            largest = weights[name].abs().max().item()
            raise FmdError(
                f"float16 does not hold the weights {name}, of up to {largest:.3g}: "
                "keep float32 (half_weights=false, or no --half)"
            )
    return narrowed


class TokenModel(nn.Module):
    """A timm model that returns its logits and the patch tokens of chosen layers in one pass.

    Args:
        model: any timm model with ``forward_intermediates``.
        layers: 0-based blocks (ViT, CaiT) or stages (Swin, convolutional nets), in any order.

    Shape:
        ``forward(x)`` returns ``(logits, [tokens, …])`` in the order of ``layers``; tokens are
        ``(B, N, D)``, before the final norm, without class and distillation tokens.

    Raises:
        ValueError: the model has no ``forward_intermediates``, or a layer is out of range.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] = ()):
        super().__init__()
        name = type(model).__name__
        if layers and not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{name} has no forward_intermediates, so its layers cannot be read")
        depth = len(getattr(model, "feature_info", ()))
        wrong = [i for i in layers if not 0 <= i < depth]
        if wrong:
            raise ValueError(f"{name} has layers 0 to {depth - 1}, but {wrong} were asked for")
        self.model = model
        self.layers = list(layers)
        # timm returns features in block order with duplicates collapsed; ask for just that and
        # put them back in the caller's order.
        self._indices = sorted(set(self.layers))
        self._order = [self._indices.index(i) for i in self.layers]
        # Every timm model gives maps; of tokens, which these compute with, that is a copy a layer.
        # Prefix tokens are in neither.
        self._format = "NLC" if isinstance(model, (VisionTransformer, Cait)) else "NCHW"

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self.layers:
            return self.model(x), []
        features, tokens = self.model.forward_intermediates(
            x, indices=self._indices, norm=False, output_fmt=self._format
        )
        if self._format == "NCHW":
            tokens = [m.flatten(2).transpose(1, 2) for m in tokens]
        return self.model.forward_head(features), [tokens[i] for i in self._order]


def match_grids(student: Tensor, teacher: Tensor, aspect: float = 1.0) -> tuple[Tensor, Tensor]:
    """Resample the finer of two token grids to the coarser one by area averaging.

    Args:
        student, teacher: tokens ``(B, N_s, D_s)`` and ``(B, N_t, D_t)`` of the same images.
        aspect: height / width of the images, which fixes the grids' shapes.

    Returns:
        Tokens with equal N; unchanged where N was equal already.
    """
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    n = min(student.shape[1], teacher.shape[1])
    grid = _grid(n, aspect)
    return tuple(x if x.shape[1] == n else _resample(x, grid, aspect) for x in (student, teacher))


def match_layers(
    students: Sequence[Tensor], teachers: Sequence[Tensor], images: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """:func:`match_grids` of each pair of layers, for their tokens of these images."""
    aspect = images.shape[-2] / images.shape[-1]
    return [match_grids(s, t, aspect) for s, t in zip(students, teachers)]


def _grid(n: int, aspect: float) -> tuple[int, int]:
    height = round(math.sqrt(n * aspect))
    if height * (n // max(height, 1)) != n:
        raise ValueError(f"{n} patches do not form a grid of images with height/width {aspect:g}")
    return height, n // height


def _resample(x: Tensor, grid: tuple[int, int], aspect: float) -> Tensor:
    maps = x.transpose(1, 2).unflatten(2, _grid(x.shape[1], aspect))
    return F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, the same whatever device they are on (16 hex digits)."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
