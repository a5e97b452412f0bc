"""Operations and bytes of a training step, counted on tensors that hold no numbers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fmd.config import PRETRAINED, RunConfig, teacher_config
from fmd.cost import StepCost
from fmd.data import load_data
from fmd.losses import ManifoldLoss
from fmd.models import (
    TokenModel,
    create_model,
    input_size,
    match_layers,
    pretrained_model,
    takes_grey,
)
from fmd.task import soft_distillation_loss

PHOTO_CLASSES = 1000  # the classifier of a net for photographs costs next to nothing


# By the shapes of what they take: the losses' own operators, as a GPU does them, and attention on a
# CPU, which the counter of torch 2.11 does not know.
PRODUCTS = {
    torch.ops.fmd.product: lambda a, b, **_: 2 * math.prod(a) * b[2],
    torch.ops.fmd.relation_difference: lambda both, *_, **__: 2 * math.prod(both) * both[1],
    torch.ops.fmd.channel_products: lambda both, **_: 2 * math.prod(both) * both[2],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}
COUNTED = flop_registry.keys() | PRODUCTS.keys()


class _Ledger(TorchDispatchMode):
    """Bytes that operations move, and the most that their results take at once.

    What matrix products move is left out: they are busy with their operations meanwhile.
    """

    def __init__(self):
        super().__init__()
        self.traffic = self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        old = {x.untyped_storage()._cdata for x in inputs}
        new = {s._cdata: s for s in (x.untyped_storage() for x in outputs) if s._cdata not in old}
        view = not new and not func._schema.is_mutable
        if not view and func._overloadpacket not in COUNTED:
            # What is broadcast is read once.
            self.traffic += sum(
                min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                for x in (*inputs, *outputs)
            )
        for storage in new.values():
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def networks(config: RunConfig) -> tuple[nn.Module, nn.Module | None, tuple[int, int, int]]:
    """Student, teacher and image shape (C, H, W) of a run, without memory for the weights.

    Raises :class:`FmdError` for a model that timm lacks, or a teacher's run that is not known.
    """
    if config.photos is not None:
        shape = (3, config.image_size, config.image_size)
        classes = config.teacher_args.get("num_classes") or PHOTO_CLASSES
    else:
        data = load_data(config.data)
        shape, classes = data.image_shape, data.num_classes

    def build(run: RunConfig) -> nn.Module:
        return create_model(run.model, classes, in_chans=shape[0], **run.model_args)

    teacher = None
    with torch.device("meta"):
        student = build(config)
        if config.teacher and config.distils:
            if config.teacher.startswith(PRETRAINED):
                name = config.teacher.removeprefix(PRETRAINED)
                teacher = pretrained_model(name, "random", **config.teacher_args)
            else:
                teacher = build(teacher_config(config))
    return student, teacher, shape


def count_step(
    config: RunConfig,
    student: nn.Module,
    teacher: nn.Module | None,
    image_shape: tuple[int, int, int],
) -> StepCost:
    """What one forward and backward pass of a micro batch takes, in bfloat16 autocast.

    The models' own weights are not touched, wherever they are. Augmentation, optimizer and the
    exchange between processes are left out. torch overcounts the backward pass of grouped
    convolutions, which the ViT and Swin students have none of.
    """
    batch = config.micro_batch or config.batch_size
    layers = (config.student_layers, config.teacher_layers) if config.has_manifold else ((), ())
    ledger, flops = _Ledger(), {}

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
            yield
        flops[name] = counter.get_total_flops() / batch

    with FakeTensorMode():
        weights = _weights(student)
        frozen = _weights(teacher, trained=False) if teacher is not None else None
        with ledger, torch.autocast("cpu", dtype=torch.bfloat16):
            images = torch.empty(batch, *image_shape)
            target = torch.empty(batch, dtype=torch.long)
            if teacher is not None:
                channels = 3 if image_shape[0] == 1 and not takes_grey(teacher) else image_shape[0]
                shape = (channels, *(input_size(teacher) or image_shape[1:]))
                seen = images if shape == tuple(image_shape) else torch.empty(batch, *shape)
                with counted("teacher"):
                    teacher_logits, teacher_tokens = _run(teacher, layers[1], frozen, seen)
            with counted("forward"):
                logits, tokens = _run(student, layers[0], weights, images)
            with counted("losses"):
                loss = nn.functional.cross_entropy(logits.float(), target)
                if teacher is not None and config.alpha:
                    loss = loss + soft_distillation_loss(logits, teacher_logits)
                if config.has_manifold:
                    terms = config.intra, config.inter, config.random, config.full
                    manifold = ManifoldLoss(*terms, config.num_patches, across_processes=False)
                    pairs = match_layers(tokens, teacher_tokens, images)
                    loss = loss + sum(manifold(*zip(*pairs)).values())
            trained = [weights[name] for name, _ in student.named_parameters()]
            with counted("backward"):
                torch.autograd.grad(loss, trained, allow_unused=True)
    # float32 weights and AdamW's two moments; gradients are among what the step itself holds
    copies = 3 + (config.ema_decay is not None)
    state = 4 * copies * _size(student) + (4 * _size(teacher) if teacher is not None else 0)
    return StepCost(
        images=batch,
        teacher_flops=flops.get("teacher", 0.0),
        forward_flops=flops["forward"],
        backward_flops=flops["backward"],
        loss_flops=flops["losses"],
        bytes_moved=ledger.traffic / batch,
        peak_bytes=ledger.peak,
        state_bytes=state,
    )


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _weights(model: nn.Module, trained: bool = True) -> dict[str, Tensor]:
    weights = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in model.named_buffers()}
    for name, x in model.named_parameters():
        weights[name] = torch.empty(x.shape, dtype=x.dtype, requires_grad=trained)
    return weights


def _run(model: nn.Module, layers, weights: dict[str, Tensor], images: Tensor):
    weights = {f"model.{name}": x for name, x in weights.items()}
    return functional_call(TokenModel(model, layers), weights, (images,))
