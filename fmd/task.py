"""Distillation as a ``timm.task.TrainingTask``: base loss, logit distillation, manifold losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmd.losses import ManifoldLoss
from fmd.models import TokenModel, input_size, match_layers, takes_grey
from fmd.teacher import prepare_teacher

LOGIT_LOSSES = ("soft", "hard")


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def soft_distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of softened logits ``(B, C)``: mean over B, × temperature² (Hinton 2015)."""
    log_p = F.log_softmax(_at_least_float32(student) / temperature, dim=-1)
    log_q = F.log_softmax(_at_least_float32(teacher) / temperature, dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def hard_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's most likely class (DeiT)."""
    return F.cross_entropy(_at_least_float32(student), teacher.argmax(dim=-1))


@contextmanager
def _named(argument: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def _per_channel(model: nn.Module, key: str) -> Tensor:
    values = torch.tensor(model.pretrained_cfg[key], dtype=torch.float32)
    if takes_grey(model):  # for which timm keeps the colours' three values
        values = values.mean(0, keepdim=True)
    return values.view(1, -1, 1, 1)


class ManifoldDistillationTask(TrainingTask):
    """Train a student on (1 − α)·base + α·logit + Σ manifold terms.

    The student's checkpoint (``get_checkpoint_state``) is that of the plain timm model; optimizer,
    DDP and EMA never see the teacher, which stays frozen, and answers in eval mode whatever is
    called.
    A student with a distillation head (DeiT) learns labels on its class head and the teacher on
    its distillation head; its output is their mean, which learns alone where α is 0 or 1, so that
    neither head stays untrained.

    Args:
        student: timm model to train.
        teacher: timm model with the same classes, or None to train on labels alone.
        student_layers, teacher_layers: layers compared in pairs, by position.
        manifold: weighted manifold losses, or None for none.
        alpha: weight α of the logit loss, 0 to 1.
        temperature: softening of both logits, for ``logit='soft'``.
        logit: ``'soft'`` (KL divergence) or ``'hard'`` (the teacher's class).
        criterion: base loss on ``(output, target)``; cross-entropy by default, which takes class
            indices as well as the mixed targets of mixup.
        teacher_dtype: half precision that the teacher's weights are cast to, once.

    Shape:
        ``forward(input, target)`` takes images normalised for the student (for a grey one, whose
        mean and std are three values in timm, by their averages) and returns a dict of ``loss``,
        ``output`` (logits), ``base``, and where used ``logit`` and the manifold terms.

    Raises:
        ValueError: unequal, empty or out-of-range layer lists, layers with ``manifold=None``,
            manifold losses or a positive alpha without a teacher, a teacher with other classes,
            alpha outside [0, 1], temperature ≤ 0.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        student_layers: Sequence[int] = (),
        teacher_layers: Sequence[int] = (),
        manifold: ManifoldLoss | None = None,
        alpha: float = 1.0,
        temperature: float = 1.0,
        logit: str = "soft",
        criterion: nn.Module | None = None,
        device: torch.device | None = None,
        teacher_dtype: torch.dtype | None = None,
    ):
        super().__init__(device=device, verbose=False)
        if manifold is None and (student_layers or teacher_layers):
            raise ValueError("layers are compared by manifold losses: give manifold=ManifoldLoss()")
        if manifold is not None and not manifold.weights:
            manifold = None
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if logit not in LOGIT_LOSSES:
            raise ValueError(f"logit must be one of {', '.join(LOGIT_LOSSES)}, got '{logit}'")
        if teacher is None and (alpha or manifold):
            raise ValueError("without a teacher, alpha must be 0 and manifold None")
        if teacher is not None and alpha and student.num_classes != teacher.num_classes:
            raise ValueError(
                f"the student has {student.num_classes} classes and the teacher "
                f"{teacher.num_classes}: distillation of logits needs the same ones"
            )
        if manifold is None:
            student_layers = teacher_layers = ()
        elif not student_layers or len(student_layers) != len(teacher_layers):
            raise ValueError(
                "student_layers and teacher_layers are compared in pairs: "
                f"got {list(student_layers)} and {list(teacher_layers)}"
            )
        with _named("student_layers"):
            self.trainable_module = TokenModel(student, student_layers)
        if hasattr(student, "set_distilled_training"):
            student.set_distilled_training(0 < alpha < 1)
        self.teacher = None
        if teacher is not None and (alpha or manifold):
            with _named("teacher_layers"):
                self.teacher = prepare_teacher(teacher, teacher_layers, teacher_dtype)
            self._register_normalization(student, teacher)
            self.teacher_size = input_size(teacher)
        self.manifold = manifold
        self.alpha = alpha
        self.temperature = temperature
        self.logit = logit
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.to(self.device)

    def _register_normalization(self, student: nn.Module, teacher: nn.Module) -> None:
        """Affine map from images normalised for the student to images for the teacher."""
        mean_s, std_s, mean_t, std_t = (
            _per_channel(model, key) for model in (student, teacher) for key in ("mean", "std")
        )
        # Compared once, here: in forward it would make the host wait for the device.
        self.same_normalization = torch.equal(mean_s, mean_t) and torch.equal(std_s, std_t)
        self.register_buffer("teacher_scale", std_s / std_t, persistent=False)
        self.register_buffer("teacher_shift", (mean_s - mean_t) / std_t, persistent=False)

    def requires_grad_(self, requires_grad: bool = True) -> ManifoldDistillationTask:
        super().requires_grad_(requires_grad)
        if self.teacher is not None:
            self.teacher.requires_grad_(False)
        return self

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs):
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs) -> nn.Module:
        """Compile the student, the teacher and the manifold losses in place."""
        for module in (self.trainable_module, self.teacher, self.manifold):
            if module is not None:
                module.compile(backend=backend, mode=mode, **kwargs)
        return self.get_eval_model()

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False):
        """The plain student (or its EMA)."""
        module = module or self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module).model

    @torch.no_grad()
    def teach(self, input: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The teacher's logits and tokens for images normalised for the student."""
        # train() of the task reaches the teacher as well: undone here.
        if self.teacher.model.training:
            self.teacher.eval()
        return self.teacher(self.teacher_view(input))

    def teacher_view(self, input: Tensor) -> Tensor:
        """Images normalised for the student as the teacher takes them: normalised, resampled."""
        if not self.same_normalization:
            input = input * self.teacher_scale + self.teacher_shift
        if self.teacher_size is not None and tuple(input.shape[-2:]) != self.teacher_size:
            input = F.interpolate(input, self.teacher_size, mode="bicubic", antialias=True)
        return input

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        output, tokens = self.trainable_module(input)
        base_output = logit_output = output
        if isinstance(output, tuple):  # class head, distillation head
            base_output, logit_output = output
            output = (base_output + logit_output) / 2
        base = self.criterion(_at_least_float32(base_output), target)
        terms = {"base": base}
        loss = (1 - self.alpha) * base if self.alpha < 1 else torch.zeros_like(base)
        if self.teacher is not None:
            teacher_logits, teacher_tokens = self.teach(input)
            if self.alpha:
                if self.logit == "soft":
                    distilled = soft_distillation_loss(
                        logit_output, teacher_logits, self.temperature
                    )
                else:
                    distilled = hard_distillation_loss(logit_output, teacher_logits)
                terms["logit"] = distilled
                loss = loss + self.alpha * distilled
            if self.manifold is not None:
                pairs = match_layers(tokens, teacher_tokens, input)
                manifold = self.manifold(*map(list, zip(*pairs)))
                terms |= manifold
                loss = loss + sum(manifold.values())
        return {"loss": loss, "output": output, **terms}
