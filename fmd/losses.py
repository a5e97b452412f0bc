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

They therefore share one kernel, :class:`_RelationDistances`; in half precision on GPUs, the first
three share :class:`_HalfRelationDistances`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
# Images, at most, whose mean token is taken off before tokens are rounded to float16.
_CENTRE_IMAGES = 16
# Of products in float16 on GPUs: a guess between the 2 and the 16 of fmd/gpus.csv.
_HALF_SPEEDUP = 4
# Multiplications done in the time of the float64 passes over one entry of D×D, on a CPU.
_PASSES = 700


@contextmanager
def _full_precision():
    """Products of matrices keep what their numbers hold, whatever the global switches say.

    The losses are differences of numbers that nearly cancel: TF32 would spoil the full loss's
    gradient by half a percent where a student is near its teacher, and by more where all tokens
    are alike (``python -m fmd.benchmark precision``).
    """
    cublas, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    lowered = []  # switch, name, the exact value, the one to put back
    for switch in (cublas, mkldnn):
        value = switch.fp32_precision
        if value not in ("ieee", "none"):
            inherited = value == torch.backends.fp32_precision  # and stays so
            lowered.append((switch, "fp32_precision", "ieee", "none" if inherited else value))
    for name in ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction"):
        if getattr(cublas, name):
            lowered.append((cublas, name, False, True))
    try:
        for switch, name, exact, _ in lowered:
            setattr(switch, name, exact)
        yield
    finally:
        for switch, name, _, value in lowered:
            setattr(switch, name, value)


# Operators of their own: torch.compile forgets switches that are set in what it compiles. They take
# tensors as they lie; else the compiler would copy what it makes for each of them.
_ANY_LAYOUT = (torch.Tag.flexible_layout,)


@torch.library.custom_op("fmd::product", mutates_args=(), tags=_ANY_LAYOUT)
def product(a: Tensor, b: Tensor) -> Tensor:
    """Products of the matrices ``(G, n, k)`` and ``(G, k, m)``, in whole precision."""
    with _full_precision():
        return torch.bmm(a, b)


@product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


@torch.library.custom_op("fmd::relation_difference", mutates_args=(), tags=_ANY_LAYOUT)
def relation_difference(both: Tensor, ds: int) -> Tensor:
    """S Sᵀ − T Tᵀ ``(G, n, n)`` of [S, T] ``(G, n, D_s + D_t)``, in whole precision."""
    s, t = both[..., :ds], both[..., ds:]
    with _full_precision():
        return torch.bmm(s, s.mT).baddbmm_(t, t.mT, alpha=-1)


@relation_difference.register_fake
def _(both: Tensor, ds: int) -> Tensor:
    return both.new_empty(both.shape[0], both.shape[1], both.shape[1])


@torch.library.custom_op("fmd::channel_products", mutates_args=(), tags=_ANY_LAYOUT)
def channel_products(both: Tensor) -> Tensor:
    """UᵀU of ``(G, n, D)``, in whole precision, summed in float64."""
    with _full_precision():
        return _products_at_once(both) if both.is_cuda else _products_by_blocks(both)


@channel_products.register_fake
def _(both: Tensor) -> Tensor:
    sets, _, channels = both.shape
    return both.new_empty(sets, channels, channels, dtype=torch.float64)


def _products_by_blocks(both: Tensor) -> Tensor:
    """Blocks of rows from the diagonal on, and their mirror: the fewest multiplications."""
    sets, _, channels = both.shape
    products = both.new_zeros(sets, channels, channels, dtype=torch.float64)
    for chunk in both.split(_ROWS_PER_CHUNK, 1):
        for first, last in _block_rows(channels):
            right = chunk[..., first:]
            products[:, first:last, first:] += torch.bmm(chunk[..., first:last].mT, right)
    for first, last in _block_rows(channels):
        products[:, last:, first:last] = products[:, first:last, last:].mT
    return products


def _products_at_once(both: Tensor, rows: int = _ROWS_PER_CHUNK // 4) -> Tensor:
    """All chunks in one product: single blocks have too few entries to keep a GPU busy."""
    sets, n, _ = both.shape
    whole = n - n % rows
    chunks = both[:, :whole].reshape(-1, rows, both.shape[-1])
    products = torch.bmm(chunks.mT, chunks).unflatten(0, (sets, -1)).sum(1, dtype=torch.float64)
    rest = both[:, whole:]
    return products + torch.bmm(rest.mT, rest)


def _block_rows(channels: int) -> list[tuple[int, int]]:
    """First and last row, exclusive, of the blocks in which a symmetric product is formed."""
    width = -(-channels // 6)
    return [(first, min(first + width, channels)) for first in range(0, channels, width)]


class _RelationDistances(torch.autograd.Function):
    """Losses of the named choices of sets between two layers' tokens, which are scaled here.

    With the unit tokens side by side, U = [S, T], a loss is the mean over G sets of n tokens of the
    n×n squared differences E = S Sᵀ − T Tᵀ. Two exact routes, chosen by operation count:

    * relations: E itself is formed, once; loss ∝ ‖E‖², gradient ∝ E S.
    * channels: ‖E‖² = ‖SᵀS‖² + ‖TᵀT‖² − 2‖TᵀS‖² and E S = S (SᵀS) − T (TᵀS) need only the D×D
      blocks of UᵀU, linear in n.

    The gradient in S costs one more product in either case, so it is computed in the forward pass
    and kept instead of what it is made of.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, names: tuple[str, ...], rows, group):
        needs_grad = ctx.needs_input_grad[0]
        ds, dt = student.shape[-1], teacher.shape[-1]
        dtype = torch.promote_types(
            torch.promote_types(student.dtype, teacher.dtype), torch.float32
        )
        both, scale_s = _unit_tokens(student.to(dtype), teacher.to(dtype))
        losses, grads, ctx.factors = [], [], []
        for name in names:
            tokens = _sets(name, both, rows)
            sets, n, _ = tokens.shape
            across = group if name == "full" else None
            world = dist.get_world_size(across) if across is not None else 1
            if across is not None or _channels_are_cheaper(n, ds, dt):
                loss, grad = _by_channels(tokens, ds, needs_grad, across)
            else:
                loss, grad = _by_relations(tokens, ds, needs_grad)
            scale = 1.0 / (sets * (n * world) ** 2)
            # A copy: older compilers lose the gradient of an output that is also an intermediate.
            losses.append((loss * scale).to(dtype, copy=True))
            grads.append(grad)
            # DDP averages gradients over ranks while this loss is one sum over all of them.
            ctx.factors.append(4 * scale * world)
        ctx.names = names
        if needs_grad:
            ctx.save_for_backward(student, scale_s, rows, *grads)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_losses: Tensor):
        student, scale, rows, *grads = ctx.saved_tensors
        total = torch.zeros(student.shape, dtype=scale.dtype, device=student.device)
        for name, grad, factor, grad_loss in zip(ctx.names, grads, ctx.factors, grad_losses):
            if name == "random":
                total.flatten(0, 1).index_add_(0, rows, grad[0] * (grad_loss * factor))
            else:
                _sets(name, total, rows).addcmul_(grad, grad_loss * factor)
        _through_scaling_(total, student, scale)
        return total.to(student.dtype), None, None, None, None


def _unit_tokens(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """[S, T] ``(B, N, D_s + D_t)`` at unit length, and the student's scale ``(B, N, 1)``."""
    layers = student, teacher
    scales = [_inverse_length(x) for x in layers]
    if torch.compiler.is_compiling():  # it makes one pass of this, and refuses the other form
        return torch.cat([x * scale for x, scale in zip(layers, scales)], -1), scales[0]
    widths = [x.shape[-1] for x in layers]
    both = student.new_empty(*student.shape[:-1], sum(widths))
    for x, scale, unit in zip(layers, scales, both.split(widths, -1)):
        torch.mul(x, scale, out=unit)
    return both, scales[0]


def _inverse_length(x: Tensor) -> Tensor:
    """1 / length; a token of zeros stays zero, with a finite gradient."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.masked_fill(length == 0, 1).reciprocal()


def _off_centre(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit tokens X' = X − 1 cᵀ, their X' c + c·c / 2, the scale to unit length, and c.

    c is the mean of a few images from all over the batch: near enough to the mean of all, without a
    pass over all tokens.
    """
    some = x[:: -(-len(x) // _CENTRE_IMAGES)]
    centre = (some * _inverse_length(some)).mean((0, 1))
    scale = _inverse_length(x)
    along = (x * centre).sum(-1, keepdim=True) * scale
    return x * scale - centre, along - centre.square().sum() / 2, scale, centre


def _sets(name: str, tokens: Tensor, rows: Tensor | None) -> Tensor:
    """The sets that a loss compares, ``(G, n, D)`` of ``(B, N, D)``; a view, but for ``random``."""
    if name == "intra":
        return tokens
    if name == "inter":
        return tokens.transpose(0, 1)
    if name == "random":
        return tokens.flatten(0, 1)[rows][None]
    return tokens.flatten(0, 1)[None]


def _channels_are_cheaper(n: int, ds: int, dt: int, speedup: int = 1) -> bool:
    """Multiplications per token, forward and backward, of the two routes.

    Args:
        n, ds, dt: tokens in a set, and their channels.
        speedup: of the relations' products over the channels', which are in float32.
    """
    both = ds + dt
    relations = (n * both + n * ds) / speedup
    channels = both**2 * 7 // 12 + both * ds + both**2 * _PASSES // n
    return channels < relations


def _by_relations(both: Tensor, ds: int, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    difference = relation_difference(both, ds)
    loss = torch.linalg.vector_norm(difference).square()
    return loss, product(difference, both[..., :ds]) if needs_grad else None


def _by_channels(both: Tensor, ds: int, needs_grad: bool, group) -> tuple[Tensor, Tensor | None]:
    products = channel_products(both)
    if group is not None:
        dist.all_reduce(products, group=group)
    squares = products.square()
    loss = squares[:, :ds, :ds].sum() + squares[:, ds:, ds:].sum() - 2 * squares[:, ds:, :ds].sum()
    loss = loss.clamp_min(0)  # rounding alone can take the difference of equal sums below zero
    if not needs_grad:
        return loss, None
    signed = torch.cat([products[:, :ds, :ds], -products[:, ds:, :ds]], 1)
    return loss, product(both, signed.to(both.dtype))


def _through_scaling_(grad: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """From unit tokens to tokens, in place: what points along a token has no effect."""
    along = (grad * x).sum(-1, keepdim=True) * scale.square()
    return grad.addcmul_(x.to(grad.dtype), along, value=-1).mul_(scale)


class _HalfRelationDistances(torch.autograd.Function):
    """The relations' route of :class:`_RelationDistances`, multiplied in float16.

    What all tokens share would drown in float16 what tells them apart. So a centre is taken off,
    S = S' + 1 cᵀ and T = T' + 1 dᵀ, which is exact for any c and d. It comes back as a shift h of
    each token, in channels of their own, which makes of E one product:

        E = S' S'ᵀ − T' T'ᵀ + 1 hᵀ + h 1ᵀ = [S', T', 1, h] [S', −T', h, 1]ᵀ
        h = S' c − T' d + (c·c − d·d) / 2,    E S = E S' + (E 1) cᵀ

    What the products take and give is float16; all else is float32. On a GPU the cost is what moves
    through memory.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, names: tuple[str, ...], rows):
        s, shift_s, scale, centre = _off_centre(student.float())
        t, shift_t, *_ = _off_centre(teacher.float())
        shift = shift_s - shift_t
        ones = torch.ones_like(shift)
        # GPUs are fast where rows have a multiple of eight entries.
        padding = shift.new_zeros(*shift.shape[:2], -(s.shape[-1] + t.shape[-1] + 2) % 8)
        left = torch.cat([s, t, ones, shift, padding], -1).half()
        right = torch.cat([s, -t, shift, ones, padding], -1).half()
        losses, products, sums, ctx.factors = [], [], [], []
        for name in names:
            a, b = (_sets(name, x, rows) for x in (left, right))
            difference = product(a, b.mT)
            sets, n, _ = difference.shape
            mean = 1.0 / (sets * n**2)
            # By rows first, as what follows: the compiler does both in one pass over E.
            losses.append(difference.float().square().sum(-1).sum() * mean)
            ctx.factors.append(4 * mean)
            if ctx.needs_input_grad[0]:
                products.append(product(difference, a[..., : s.shape[-1]]))
                sums.append(difference.float().sum(-1, keepdim=True))
        ctx.names = names
        if products:
            ctx.save_for_backward(student, scale, centre, rows, *products, *sums)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_losses: Tensor):
        student, scale, centre, rows, *saved = ctx.saved_tensors
        products, sums = saved[: len(ctx.names)], saved[len(ctx.names) :]
        total = torch.zeros(student.shape, dtype=torch.float32, device=student.device)
        few = None  # the gradient in the random rows
        for name, part, along, factor, grad in zip(
            ctx.names, products, sums, ctx.factors, grad_losses
        ):
            part = (part + along * centre) * (grad * factor)
            if name == "random":
                few = part[0]
            else:
                total += _sets(name, part, None)
        _through_scaling_(total, student, scale)
        if few is not None:  # last: all else is then one pass over the tokens
            x, lengths = (_sets("random", tensor, rows)[0] for tensor in (student, scale))
            total.flatten(0, 1).index_add_(0, rows, _through_scaling_(few, x, lengths))
        return total.to(student.dtype), None, None, None


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


def _distances(
    student: Tensor,
    teacher: Tensor,
    names: tuple[str, ...],
    *,
    num_patches: int = 0,
    rows: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
    half: bool | None = None,
) -> tuple[Tensor, ...]:
    """The named losses; ``half`` by default on GPUs, in steps that are in half precision anyway."""
    _check(student, teacher)
    device = student.device.type
    if half is None:
        sizes = student.element_size(), teacher.element_size()
        low = torch.is_autocast_enabled(device) or min(sizes) == 2
        half = device == "cuda" and low and max(sizes) <= 4
    if "random" in names and rows is None:
        if num_patches < 1:
            raise ValueError(f"num_patches must be positive, got {num_patches}")
        total = student.shape[0] * student.shape[1]
        rows = torch.randperm(total, generator=generator, device=student.device)[:num_patches]
    in_half = _relations_in_half(names, student, teacher, rows) if half else ()
    whole = tuple(name for name in names if name not in in_half)
    with torch.autocast(device, enabled=False):
        losses = {}
        if whole:
            losses |= zip(whole, _RelationDistances.apply(student, teacher, whole, rows, group))
        if in_half:
            losses |= zip(in_half, _HalfRelationDistances.apply(student, teacher, in_half, rows))
        return tuple(losses[name] for name in names)


def _relations_in_half(names, student: Tensor, teacher: Tensor, rows) -> tuple[str, ...]:
    """The losses whose sets are small enough to form their relations, in half precision."""
    n = {"intra": student.shape[1], "inter": len(student)}
    if rows is not None:
        n["random"] = len(rows)
    ds, dt = student.shape[-1], teacher.shape[-1]
    return tuple(
        name
        for name in names
        if name in n and not _channels_are_cheaper(n[name], ds, dt, _HALF_SPEEDUP)
    )


def intra_image_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relations of the patches within each image: mean over B, N, N of (M(T_b) − M(S_b))².

    The paper's intra-image ("cross-patch") term, scaled as a mean instead of a Frobenius sum.

    Args:
        student: tokens ``(B, N, D_s)``; the result is differentiable in these.
        teacher: tokens ``(B, N, D_t)``, taken as constants.

    Returns:
        A scalar in float32, or float64 if the tokens are. On a GPU under autocast, or of tokens in
        half precision, relations are multiplied in float16 (where the sets are not so large that
        channels are cheaper), which errs by less than a thousandth of the gradient on features of
        networks, or by two where the student is near its teacher; disable autocast to have all in
        float32.

    Raises:
        ValueError: the tokens are not ``(B, N, D)``, are empty, or differ in B or N.
    """
    return _distances(student, teacher, ("intra",))[0]


def inter_image_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relations of the images at each patch position: mean over N, B, B of (M(T_n) − M(S_n))².

    The paper's inter-image ("cross-images") term, over the images of the local batch. Arguments,
    result and errors as :func:`intra_image_loss`.
    """
    return _distances(student, teacher, ("inter",))[0]


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
    options = {"num_patches": num_patches, "rows": rows, "generator": generator}
    return _distances(student, teacher, ("random",), **options)[0]


def full_manifold_loss(
    student: Tensor, teacher: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Relations of all patches of the batch with all others: mean over (B·N)².

    The loss that the paper decouples because M has (B·N)² entries. Its value needs none of them:
    ‖S Sᵀ − T Tᵀ‖² = ‖SᵀS‖² + ‖TᵀT‖² − 2‖TᵀS‖² holds only D×D products, so time and memory are
    linear in B·N. Arguments, result and errors as :func:`intra_image_loss`, but never computed in
    less than float32.

    When ``torch.distributed`` is initialised the batch is the *global* one: the D×D sums are
    all-reduced over ``group`` (all ranks by default; every rank must call, with equal shapes). All
    ranks then return the loss of the global batch, and after DDP has averaged the gradients they
    are the gradients of that loss.
    """
    return _distances(student, teacher, ("full",), group=_global_group(group))[0]


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
        across_processes: compute ``full`` over the batches of all processes together.

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
        across_processes: bool = True,
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
        self.across_processes = across_processes

    def forward(
        self, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        if not student_layers or len(student_layers) != len(teacher_layers):
            raise ValueError(
                "student and teacher layers are compared in pairs: "
                f"got {len(student_layers)} and {len(teacher_layers)}"
            )
        names = tuple(self.weights)
        pairs = [
            _distances(
                student,
                teacher,
                names,
                num_patches=self.num_patches,
                group=_global_group(None) if self.across_processes else None,
            )
            for student, teacher in zip(student_layers, teacher_layers)
        ]
        return {
            name: weight * torch.stack(losses).mean()
            for (name, weight), losses in zip(self.weights.items(), zip(*pairs))
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in (*self.weights.items(), ("K", self.num_patches)))
