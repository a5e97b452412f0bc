"""The manifold losses of *Fine-Grained Manifold Distillation* (arXiv 2107.01378), exact and cheap.

Tokens are ``(B, N, D)``: B images, N patches, D channels. Student and teacher may differ in D.
Every token is scaled to unit length, and M(X) = X Xᵀ holds the cosine similarities ("relations")
of a set of tokens. Each loss is the mean squared difference between the student's and the
teacher's M over some choice of sets:

===========  =======================================  ==================
loss         sets of tokens compared                  number × size
===========  =======================================  ==================
``intra``    the patches of an image                  B sets of N
``inter``    the images at a patch position           N sets of B
``random``   K random patches of the batch            1 set of K
``full``     all patches of the batch                 1 set of B·N
===========  =======================================  ==================

They therefore share one kernel, :class:`_RelationDistance`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "ManifoldLoss",
    "full_manifold_loss",
    "inter_image_loss",
    "intra_image_loss",
    "random_patch_loss",
]

# Rows summed in float32 before their D×D products are added up in float64: the full loss is a
# small difference of large sums, so its accumulation error must not grow with B·N.
_ROWS_PER_CHUNK = 4096


class _RelationDistance(torch.autograd.Function):
    """Mean over G sets of n tokens of the n×n squared differences (S Sᵀ − T Tᵀ)².

    Two exact routes, chosen by operation count. With A = [S, T] and J = diag(+1, −1):

    * ``relations``: E = A J Aᵀ = S Sᵀ − T Tᵀ, n×n, is formed once; loss ∝ ‖E‖², gradient ∝ E S.
    * ``channels``: ‖E‖² = ‖SᵀS‖² + ‖TᵀT‖² − 2‖TᵀS‖² and E S = S (SᵀS) − T (TᵀS) need products
      of D×D only, linear in n.

    The gradient costs one more product in either case, so it is computed in the forward pass and is
    all that is kept for the backward pass: one tensor of the student's size.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, group) -> Tensor:
        sets, n, ds = student.shape
        dt = teacher.shape[-1]
        needs_grad = ctx.needs_input_grad[0]
        world = dist.get_world_size(group) if group is not None else 1
        scale = 1.0 / (sets * (n * world) ** 2)
        if group is not None or _channels_are_cheaper(n, ds, dt):
            loss, grad = _by_channels(student, teacher, needs_grad, group)
        else:
            loss, grad = _by_relations(student, teacher, needs_grad)
        if needs_grad:
            # DDP averages gradients over ranks while this loss is one sum over all of them.
            grad.mul_(4 * scale * world)
            ctx.save_for_backward(grad)
        return (loss * scale).to(student.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None


def _channels_are_cheaper(n: int, ds: int, dt: int) -> bool:
    """Multiplications per token, forward and backward, of the two routes."""
    relations = n * (ds + dt) + n * ds
    channels = ds * ds + dt * dt + ds * dt + ds * (ds + dt)
    return channels < relations


def _by_relations(s: Tensor, t: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    difference = torch.bmm(s, s.mT)
    difference = torch.baddbmm(difference, t, t.mT, alpha=-1)
    loss = torch.linalg.vector_norm(difference).square()
    return loss, torch.bmm(difference, s) if needs_grad else None


def _by_channels(s: Tensor, t: Tensor, needs_grad: bool, group) -> tuple[Tensor, Tensor | None]:
    ss, tt, ts = _channel_products(s, t)
    if group is not None:
        for product in (ss, tt, ts):
            dist.all_reduce(product, group=group)
    loss = ss.square().sum() + tt.square().sum() - 2 * ts.square().sum()
    loss = loss.clamp_min(0)  # rounding alone can take the difference of equal sums below zero
    if not needs_grad:
        return loss, None
    return loss, torch.baddbmm(torch.bmm(s, ss.to(s.dtype)), t, ts.to(s.dtype), alpha=-1)


def _channel_products(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SᵀS, TᵀT and TᵀS of ``(G, n, D)`` tokens, in float64."""
    products = None
    for first in range(0, s.shape[1], _ROWS_PER_CHUNK):
        a, b = s[:, first : first + _ROWS_PER_CHUNK], t[:, first : first + _ROWS_PER_CHUNK]
        chunk = [x.double() for x in (a.mT @ a, b.mT @ b, b.mT @ a)]
        products = chunk if products is None else [p + c for p, c in zip(products, chunk)]
    return tuple(products)


def _check(student: Tensor, teacher: Tensor) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        if x.ndim != 3:
            raise ValueError(f"{name} tokens must be (B, N, D), got shape {tuple(x.shape)}")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "student and teacher must have the same images and patches: "
            f"(B, N) = {tuple(student.shape[:2])} and {tuple(teacher.shape[:2])}"
        )
    if 0 in student.shape or 0 in teacher.shape:
        raise ValueError(f"tokens are empty: {tuple(student.shape)} and {tuple(teacher.shape)}")


def _unit(x: Tensor) -> Tensor:
    """Tokens of length one, in float32 at least; a token of zeros stays zero with finite gradient."""
    x = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


def _prepare(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    _check(student, teacher)
    s, t = _unit(student), _unit(teacher.detach())
    dtype = torch.promote_types(s.dtype, t.dtype)
    return s.to(dtype), t.to(dtype)


def _full_precision(x: Tensor) -> torch.autocast:
    # Under autocast a product of float32 tensors would still run in half precision.
    return torch.autocast(device_type=x.device.type, enabled=False)


def _intra(s: Tensor, t: Tensor) -> Tensor:
    return _RelationDistance.apply(s, t, None)


def _inter(s: Tensor, t: Tensor) -> Tensor:
    return _RelationDistance.apply(s.transpose(0, 1), t.transpose(0, 1), None)


def _full(s: Tensor, t: Tensor, group) -> Tensor:
    return _RelationDistance.apply(s.flatten(0, 1)[None], t.flatten(0, 1)[None], group)


def _random(s: Tensor, t: Tensor, num_patches: int, rows, generator) -> Tensor:
    if rows is None:
        total = s.shape[0] * s.shape[1]
        if num_patches < 1:
            raise ValueError(f"num_patches must be positive, got {num_patches}")
        rows = torch.randperm(total, generator=generator, device=s.device)[:num_patches]
    s, t = s.flatten(0, 1)[rows], t.flatten(0, 1)[rows]
    return _RelationDistance.apply(s[None], t[None], None)


def intra_image_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relations of the patches within each image: mean over B, N, N of (M(T_b) − M(S_b))².

    The paper's intra-image ("cross-patch") term, scaled as a mean instead of a Frobenius sum.

    Args:
        student: tokens ``(B, N, D_s)``; the result is differentiable in these.
        teacher: tokens ``(B, N, D_t)``, taken as constants.

    Returns:
        A scalar in float32, or float64 if the tokens are; never lower, whatever autocast says.

    Raises:
        ValueError: the tokens are not ``(B, N, D)``, are empty, or differ in B or N.
    """
    with _full_precision(student):
        return _intra(*_prepare(student, teacher))


def inter_image_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relations of the images at each patch position: mean over N, B, B of (M(T_n) − M(S_n))².

    The paper's inter-image ("cross-images") term, over the images of the local batch. Arguments,
    result and errors as :func:`intra_image_loss`.
    """
    with _full_precision(student):
        return _inter(*_prepare(student, teacher))


def random_patch_loss(
    student: Tensor,
    teacher: Tensor,
    num_patches: int = 192,
    *,
    rows: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Relations of K patches drawn from the whole batch: mean over K, K.

    The paper's random-selected term. Arguments, result and errors as :func:`intra_image_loss`, and:

    Args:
        num_patches: K, drawn without replacement; all B·N patches if there are fewer.
        rows: ``LongTensor`` of indices into the flattened B·N patches, instead of a draw.
        generator: source of the draw, on the tokens' device; torch's default one if not given.

    Raises:
        ValueError: ``num_patches`` is not positive.
    """
    with _full_precision(student):
        return _random(*_prepare(student, teacher), num_patches, rows, generator)


def full_manifold_loss(
    student: Tensor, teacher: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Relations of all patches of the batch with all others: mean over (B·N)².

    The loss that the paper decouples because M has (B·N)² entries. Its value needs none of them:
    ‖S Sᵀ − T Tᵀ‖² = ‖SᵀS‖² + ‖TᵀT‖² − 2‖TᵀS‖² holds only D×D products, so time and memory are
    linear in B·N. Arguments, result and errors as :func:`intra_image_loss`.

    When ``torch.distributed`` is initialised the batch is the *global* one: the D×D sums are
    all-reduced over ``group`` (all ranks by default; every rank must call, with equal shapes). Every
    rank then returns the loss of the global batch, and after DDP has averaged the gradients they
    are the gradients of that loss.
    """
    with _full_precision(student):
        return _full(*_prepare(student, teacher), _global_group(group))


def _global_group(group):
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    return group


class ManifoldLoss(nn.Module):
    """Weighted manifold losses, averaged over pairs of layers (paper: 4 / 0.1 / 0.2, K = 192).

    Args:
        intra, inter, random, full: weight of each loss; one of weight zero is not computed.
        num_patches: K of the random term, which draws anew for every pair of layers.

    Shape:
        ``forward(student_layers, teacher_layers)`` takes two equally long lists of tokens
        ``(B, N, D)``, paired by position, and returns ``{name: weighted scalar}``.

    Raises:
        ValueError: a weight is negative, K is not positive, a list is empty or the lists differ in
            length; and as the losses do.
    """

    def __init__(
        self,
        intra: float = 4.0,
        inter: float = 0.1,
        random: float = 0.2,
        full: float = 0.0,
        num_patches: int = 192,
    ):
        super().__init__()
        weights = {"intra": intra, "inter": inter, "random": random, "full": full}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"the weight of {name} must not be negative, got {weight}")
        if num_patches < 1:
            raise ValueError(f"num_patches must be positive, got {num_patches}")
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.num_patches = num_patches

    def forward(
        self, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        if not student_layers or len(student_layers) != len(teacher_layers):
            raise ValueError(
                "student and teacher layers are compared in pairs: "
                f"got {len(student_layers)} and {len(teacher_layers)}"
            )
        terms = dict.fromkeys(self.weights, 0.0)
        for student, teacher in zip(student_layers, teacher_layers):
            with _full_precision(student):
                s, t = _prepare(student, teacher)  # once for all terms
                for name, weight in self.weights.items():
                    terms[name] = terms[name] + weight * self._term(name, s, t)
        return {name: total / len(student_layers) for name, total in terms.items()}

    def _term(self, name: str, s: Tensor, t: Tensor) -> Tensor:
        if name == "intra":
            return _intra(s, t)
        if name == "inter":
            return _inter(s, t)
        if name == "random":
            return _random(s, t, self.num_patches, None, None)
        return _full(s, t, _global_group(None))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in (*self.weights.items(), ("K", self.num_patches)))
