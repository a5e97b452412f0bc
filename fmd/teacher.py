"""A frozen teacher whose forward pass, most of a distillation step, costs as little as it can."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

from fmd.models import TokenModel

# Options of inductor that make one pass over the maps, on a GPU, of all between their products. It
# keeps rows of maps in registers only if it sees that they lie in one piece, which padding hides;
# by default it gives a thread so many entries that they spill, but a search finds a better spread.
ONE_PASS = {"comprehensive_padding": False, "max_autotune_pointwise": True}


class TalkingHeads(nn.Module):
    """CaiT's talking-heads attention (arXiv 2003.02436) of a frozen network, in few passes.

    The relation maps ``(B, H, N, N)`` are by far its largest tensors. timm mixes their heads by
    linear layers over the last axis, each between two copies into another order of the axes. Here:

    * the scale of the dot products is part of the weights of the queries;
    * the bias of the first mixing adds one number to all keys of a query, which the softmax does
      not see: it is left out;
    * compiled, each head is a matrix of its own, so that mixing, softmax and mixing become one
      kernel that reads every map once and writes it once, and q, k and v are read where they lie;
    * eager, a mixing is one batched product of H×H with the maps as they lie.

    Args:
        attention: timm's layer; its linear layers are taken over and changed.

    Shape:
        ``forward(x)`` maps ``(B, N, D)`` to ``(B, N, D)``.
    """

    def __init__(self, attention: TalkingHeadAttn):
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.before, self.after = attention.proj_l.weight, attention.proj_w.weight  # (out, in)
        self.bias = attention.proj_w.bias
        with torch.no_grad():
            for parameter in self.qkv.parameters():
                parameter[: len(parameter) // 3] *= attention.scale

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, D/H)
        attend = _attend_by_head if torch.compiler.is_compiling() else _attend
        return self.proj(attend(qkv, self.before, self.after, self.bias).flatten(2))


# All blocks are alike: without this the compiler would work through each of them again.
@torch.compiler.nested_compile_region
def _attend_by_head(qkv: Tensor, before: Tensor, after: Tensor, bias: Tensor) -> Tensor:
    """For the compiler, which keeps in registers what is written as many maps here."""
    q, k, v = (x.unbind(2) for x in qkv.unbind(2))
    before, after, bias = (weight.float().unbind() for weight in (before, after, bias))
    maps = [(a @ b.mT).float() for a, b in zip(q, k)]
    maps = [_weighted(row, maps).softmax(-1) for row in before]
    maps = [_weighted(row, maps) + shift for row, shift in zip(after, bias)]
    return torch.stack([weights.to(x.dtype) @ x for weights, x in zip(maps, v)], 2)


def _attend(qkv: Tensor, before: Tensor, after: Tensor, bias: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    maps = _mix(before, q @ k.mT).softmax(-1)
    # The bias weighs all values of a head alike: no pass over the maps.
    output = _mix(after, maps) @ v + bias[:, None, None] * v.sum(2, keepdim=True)
    return output.transpose(1, 2)


def _weighted(weights: Tensor, maps: list[Tensor]) -> Tensor:
    return sum(weight * x for weight, x in zip(weights.unbind(), maps))


def _mix(weight: Tensor, maps: Tensor) -> Tensor:
    batch, heads = maps.shape[:2]
    return torch.bmm(weight.expand(batch, heads, heads), maps.flatten(2)).view_as(maps)


class FrozenTeacher(TokenModel):
    """A :class:`~fmd.models.TokenModel` without gradients, in a precision of its own.

    Made by :func:`prepare_teacher`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], dtype: torch.dtype | None):
        super().__init__(model, layers)
        self.dtype = dtype

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs) -> None:
        """As ``nn.Module.compile``; :class:`TalkingHeads` gets its options unless mode is given."""
        if backend == "inductor" and mode is None:
            kwargs["options"] = ONE_PASS | (kwargs.get("options") or {})
        super().compile(backend=backend, mode=mode, **kwargs)

    # no_grad and not inference_mode: a compiled forward is the same in both, and a loss may save
    # what the teacher said for the student's backward pass, which inference mode forbids.
    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.dtype is None:
            return super().forward(x)
        # Autocast would cast weights that are cast already, and norms back to float32.
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.dtype))


def prepare_teacher(
    model: nn.Module,
    layers: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> FrozenTeacher:
    """A frozen copy of a timm model that says the same, within rounding, at less cost.

    CaiT's attention becomes :class:`TalkingHeads`; other attention is fused by timm already.

    Args:
        model: the teacher; it stays as it is.
        layers: as for :class:`~fmd.models.TokenModel`.
        dtype: half precision for weights and activations, cast once instead of at every step;
            None leaves both, and autocast, as they are.

    Raises:
        ValueError: as :class:`~fmd.models.TokenModel`.
    """
    model = copy.deepcopy(model)
    teacher = FrozenTeacher(model, layers, dtype)
    for block in list(model.modules()):
        for name, layer in block.named_children():
            if isinstance(layer, TalkingHeadAttn):
                setattr(block, name, TalkingHeads(layer))
    # Convolutions are faster with the channels last, and give patches that lie as tokens.
    teacher.to(dtype=dtype, memory_format=torch.channels_last)
    return teacher.requires_grad_(False).eval()
