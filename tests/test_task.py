"""The distillation task: its terms, its frozen teacher, its checkpoints, and timm's contract."""

import json
from inspect import signature
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationEvaluator, TrainingTask
from tiny import MODELS, SMALL_VIT, tiny_model
from torch import nn

from fmd import ManifoldDistillationTask, ManifoldLoss
from fmd.models import TokenModel, match_grids
from fmd.task import hard_distillation_loss, soft_distillation_loss

GOLDEN = Path(__file__).parent / "golden"
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3])
ALL_TERMS = ManifoldLoss(4.0, 0.1, 0.2, 1.0, num_patches=8)


def make_task(student="vit", teacher="cait", **kwargs):
    if kwargs.setdefault("manifold", ALL_TERMS) is not None:
        kwargs = {"student_layers": [0, 1], "teacher_layers": [0, 1], **kwargs}
    return ManifoldDistillationTask(tiny_model(student), tiny_model(teacher, seed=1), **kwargs)


# Terms


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_logit_losses_agree_with_the_golden_values(dtype, tolerance):
    golden = json.loads((GOLDEN / "logit_distillation.json").read_text())
    student = torch.tensor(golden["student_logits"], dtype=dtype)
    teacher = torch.tensor(golden["teacher_logits"], dtype=dtype)
    for case in golden["soft"]:
        loss = soft_distillation_loss(student, teacher, case["tau"])
        assert loss.item() == pytest.approx(case["soft"], abs=tolerance)
    hard = hard_distillation_loss(student, teacher)
    assert hard.item() == pytest.approx(golden["hard"], abs=tolerance)


class Replay(nn.Module):
    """A model of two classes whose tokens are given, the first ``prefix`` ones not of patches."""

    def __init__(self, layers, prefix):
        super().__init__()
        self.layers, self.prefix, self.num_classes = layers, prefix, 2
        self.feature_info = [{}] * len(layers)
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward_intermediates(self, x, indices, norm, output_fmt):
        assert output_fmt == "NCHW" and not norm
        maps = [self.layers[i][:, self.prefix :].mT.unsqueeze(2) for i in indices]
        return x, maps

    def forward_head(self, x):
        return x.mean((2, 3))[:, :2]


def test_task_agrees_with_the_golden_layers(monkeypatch):
    (case,) = json.loads((GOLDEN / "manifold_losses.json").read_text())["layers"]
    models = [
        Replay(
            torch.tensor(case[name], dtype=torch.float64),
            case["extra_student_tokens"] if name == "student" else 0,
        )
        for name in ("student", "teacher")
    ]
    rows = iter(torch.tensor(case["random_rows_per_pair"]))
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: next(rows))
    task = ManifoldDistillationTask(
        *models,
        case["student_layers"],
        case["teacher_layers"],
        ManifoldLoss(**case["weights"], num_patches=case["K"]),
    )
    batch = len(case["student"][0])
    result = task(torch.randn(batch, 3, 1, 1), torch.zeros(batch, dtype=torch.long))
    for name, value in case["weighted"].items():
        assert result[name].item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("logit, temperature", [("soft", 1.0), ("soft", 3.0), ("hard", 1.0)])
def test_loss_is_the_weighted_sum_of_its_terms(alpha, logit, temperature):
    task = make_task(alpha=alpha, logit=logit, temperature=temperature).eval()
    result = task(IMAGES, TARGET)
    output = task.get_eval_model()(IMAGES)
    teacher, _ = task.teach(IMAGES)
    base = F.cross_entropy(output, TARGET)
    if logit == "soft":
        p, q = ((x / temperature).softmax(-1) for x in (output, teacher))
        distilled = (q * (q / p).log()).sum(-1).mean() * temperature**2
    else:
        distilled = F.cross_entropy(output, teacher.argmax(-1))
    torch.testing.assert_close(result["output"], output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result["base"], base)
    manifold = sum(result[name] for name in ("intra", "inter", "random", "full"))
    expected = (1 - alpha) * base + manifold
    if alpha:
        torch.testing.assert_close(result["logit"], distilled, atol=1e-5, rtol=1e-4)
        expected = expected + alpha * distilled
    else:
        assert "logit" not in result
    torch.testing.assert_close(result["loss"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("student", MODELS)
@pytest.mark.parametrize("teacher", MODELS)
def test_any_student_learns_from_any_teacher(student, teacher):
    task = make_task(student, teacher, student_layers=[0, 1], teacher_layers=[1, 0], alpha=0.5)
    task.train()
    result = task(IMAGES, TARGET)
    assert list(result)[3:] == ["logit", "intra", "inter", "random", "full"]
    assert result["output"].shape == (4, 5)
    result["loss"].backward()
    for name, parameter in task.get_eval_model().named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(p.grad is None for p in task.teacher.parameters())


def test_manifold_terms_are_of_the_paired_patch_tokens():
    task = make_task("deit", "swin", student_layers=[2, 0], teacher_layers=[0, 1]).eval()
    result = task(IMAGES, TARGET)
    _, student = TokenModel(task.get_eval_model(), [2, 0])(IMAGES)
    _, teacher = task.teach(IMAGES)
    pairs = [match_grids(s, t) for s, t in zip(student, teacher)]
    expected = ManifoldLoss(1.0, 0.0, 0.0)(*map(list, zip(*pairs)))["intra"]
    torch.testing.assert_close(result["intra"], 4 * expected)


def test_two_heads_learn_labels_and_teacher_apart():
    task = make_task("deit", "vit", manifold=None, alpha=0.5).train()
    result = task(IMAGES, TARGET)
    classes, distilled = task.get_eval_model()(IMAGES)
    teacher, _ = task.teach(IMAGES)
    torch.testing.assert_close(result["base"], F.cross_entropy(classes, TARGET))
    torch.testing.assert_close(result["logit"], soft_distillation_loss(distilled, teacher))
    torch.testing.assert_close(result["output"], (classes + distilled) / 2)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_two_heads_learn_together_where_only_one_would_learn(alpha):
    task = make_task("deit", "vit", manifold=None, alpha=alpha).train()
    result = task(IMAGES, TARGET)
    result["loss"].backward()
    student = task.get_eval_model()
    assert student.head.weight.grad.any() and student.head_dist.weight.grad.any()


def test_base_loss_takes_mixed_targets_and_another_criterion():
    mixed = torch.eye(5)[:4] * 0.7 + 0.3 / 5
    result = make_task(alpha=0.0, manifold=None)(IMAGES, mixed)
    torch.testing.assert_close(result["loss"], F.cross_entropy(result["output"], mixed))
    result = make_task(criterion=nn.MultiMarginLoss())(IMAGES, TARGET)
    torch.testing.assert_close(result["base"], F.multi_margin_loss(result["output"], TARGET))


def test_terms_are_full_precision_under_autocast():
    task = make_task(alpha=0.5).eval()
    exact = task(IMAGES, TARGET)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = task(IMAGES, TARGET)
    for name in ("loss", "base", "logit", "intra", "full"):
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(result[name], exact[name], atol=0.05, rtol=0.05)


# The teacher


@pytest.mark.parametrize(
    "disturb",
    [
        lambda task: task.train(),
        lambda task: task.train(True),
        lambda task: task.eval().train(),
        lambda task: task.requires_grad_(True),
        lambda task: task.teacher.train(),
        lambda task: [module.train() for module in task.modules()],
        lambda task: nn.ModuleList([task]).train(),
    ],
)
def test_teacher_stays_frozen_and_in_eval(disturb):
    # Batch norm and dropped paths would both show in a teacher that trains.
    task = make_task("vit", "resnet", manifold=None)
    before = {k: v.clone() for k, v in task.teacher.state_dict().items()}
    expected = task.teach(IMAGES)[0]
    disturb(task)
    task(IMAGES, TARGET)["loss"].backward()
    assert not any(module.training for module in task.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in task.teacher.parameters())
    assert torch.equal(task.teach(IMAGES)[0], expected)
    assert all(torch.equal(v, before[k]) for k, v in task.teacher.state_dict().items())


@pytest.mark.parametrize("teacher_channels", [1, 3])
@pytest.mark.parametrize("names", [("vit", "resnet"), ("resnet", "vit"), ("vit", "vit")])
def test_a_teacher_sees_grey_images_normalised_for_itself(names, teacher_channels):
    models = {
        "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
        "resnet": ("resnet10t", {}),
    }
    (student_name, options), (teacher_name, teacher_options) = (models[name] for name in names)
    student = timm.create_model(student_name, in_chans=1, **options)
    teacher = timm.create_model(teacher_name, in_chans=teacher_channels, **teacher_options).eval()
    pixels = torch.rand(2, 1, 32, 32)

    def normalize(model, channels):
        values = (torch.tensor(model.pretrained_cfg[k]) for k in ("mean", "std"))
        mean, std = (x.mean(0, keepdim=True) if channels == 1 else x for x in values)
        return (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    logits, _ = ManifoldDistillationTask(student, teacher).teach(normalize(student, 1))
    expected = teacher(normalize(teacher, teacher_channels))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_a_model_whose_first_convolution_timm_does_not_name():
    student = tiny_model("vit")
    student.pretrained_cfg = {**student.pretrained_cfg, "first_conv": []}  # as csatv2's
    assert torch.isfinite(
        ManifoldDistillationTask(student, tiny_model("vit", seed=1)).teach(IMAGES)[0]
    ).all()


def test_teacher_sees_images_normalised_for_itself():
    student, teacher = tiny_model("vit"), tiny_model("resnet", seed=1).eval()  # 0.5 and ImageNet's
    pixels = torch.rand(2, 3, 32, 32)

    def normalize(model):
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
        return (pixels - mean) / std

    assert student.pretrained_cfg["mean"] != teacher.pretrained_cfg["mean"]
    task = ManifoldDistillationTask(student, teacher)
    logits, _ = task.teach(normalize(student))
    torch.testing.assert_close(logits, teacher(normalize(teacher)), atol=1e-5, rtol=1e-4)
    assert (
        task.state_dict().keys() == ManifoldDistillationTask(student, teacher).state_dict().keys()
    )


def test_an_unused_teacher_is_not_kept():
    assert make_task(alpha=0.0, manifold=None).teacher is None
    assert make_task(alpha=0.0, manifold=ManifoldLoss(0, 0, 0)).teacher is None


# Errors


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(student_layers=[0], teacher_layers=[0, 1]), r"in pairs: got \[0\] and \[0, 1\]"),
        (dict(student_layers=[], teacher_layers=[]), r"in pairs: got \[\] and \[\]"),
        (dict(student_layers=[0, 3]), r"student_layers: .* layers 0 to 2, but \[3\]"),
        (dict(teacher_layers=[-1, 0]), r"teacher_layers: .* layers 0 to 2, but \[-1\]"),
        (dict(manifold=None, student_layers=[0], teacher_layers=[0]), "give manifold=ManifoldLoss"),
        (dict(alpha=1.5), "alpha must be between 0 and 1"),
        (dict(alpha=float("nan")), "alpha must be between 0 and 1"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(logit="sort"), "logit must be one of soft, hard"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_task(**wrong)


def test_wrong_teachers():
    student = tiny_model("vit")
    with pytest.raises(ValueError, match="without a teacher"):
        ManifoldDistillationTask(student, None)
    with pytest.raises(ValueError, match="5 classes and the teacher 7"):
        ManifoldDistillationTask(student, tiny_model("vit", num_classes=7))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    with pytest.raises(ValueError, match="Sequential has no forward_intermediates"):
        ManifoldDistillationTask(student, plain, [0], [0], ALL_TERMS, alpha=0.0)


def test_tokens_of_other_classes_can_be_taught():
    teacher = tiny_model("vit", num_classes=7)
    task = ManifoldDistillationTask(tiny_model("vit"), teacher, [0], [0], ALL_TERMS, alpha=0.0)
    assert task(IMAGES, TARGET)["loss"].isfinite()


# Checkpoints, EMA and compilation through timm's API


def sgd_step(task):
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    task(IMAGES, TARGET)["loss"].backward()
    optimizer.step()
    task.zero_grad()


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_is_a_plain_timm_model(name):
    task = make_task(name, "vit", alpha=0.5).train()
    sgd_step(task)
    state = task.get_checkpoint_state()
    assert list(state) == ["state_dict"]
    plain = tiny_model(name, seed=2)
    plain.load_state_dict(state["state_dict"])
    student = task.get_eval_model().eval()
    assert torch.equal(plain.eval()(IMAGES), student(IMAGES))

    other = make_task(name, "vit")
    other.load_checkpoint_state(state["state_dict"])
    assert torch.equal(other.get_eval_model().eval()(IMAGES), student(IMAGES))


def test_ema_follows_the_student():
    task = make_task().train()
    assert not task.has_ema() and task.get_checkpoint_state(ema=True) == {}
    task.setup_ema(decay=0.75)
    before = task.get_eval_model().head.weight.detach().clone()
    sgd_step(task)
    task.update_ema(step=2)  # timm copies the student before that
    after = task.get_eval_model().head.weight
    expected = 0.75 * before + 0.25 * after
    assert not torch.equal(before, after)
    torch.testing.assert_close(task.get_eval_model(ema=True).head.weight, expected)
    plain = tiny_model("vit")
    plain.load_state_dict(task.get_checkpoint_state(ema=True)["state_dict_ema"])
    torch.testing.assert_close(plain.head.weight, expected)


@pytest.mark.slow
def test_compiled_task_gives_the_same_numbers_and_keys():
    torch.manual_seed(0)
    small = {**SMALL_VIT, "depth": 2}
    eager, compiled = (
        ManifoldDistillationTask(
            timm.create_model("vit_tiny_patch16_224", num_classes=5, **small),
            tiny_model("resnet"),
            [0, 1],
            [3, 4],
            ManifoldLoss(4.0, 0.1, 0.0, 1.0),
            alpha=0.5,
        ).train()
        for _ in range(2)
    )
    compiled.load_checkpoint_state(eager.get_checkpoint_state()["state_dict"])
    student = compiled.compile(backend="aot_eager")  # all of inductor but C++
    assert student is compiled.get_eval_model()
    for task in (eager, compiled):
        task.setup_ema(decay=0.5)
        for step in (1, 2):
            sgd_step(task)
            task.update_ema(step)
    for ema in (False, True):
        key = "state_dict_ema" if ema else "state_dict"
        ours, theirs = (t.get_checkpoint_state(ema=ema)[key] for t in (compiled, eager))
        assert list(ours) == list(theirs)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)
        outputs = [t.get_eval_model(ema=ema).eval()(IMAGES) for t in (compiled, eager)]
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)


def test_timm_task_contract():
    """What is used of ``timm.task``, whose API still moves: if this fails, read its changes."""
    arguments = {
        name: list(signature(getattr(TrainingTask, name)).parameters)[1:]
        for name in (
            "__init__",
            "setup_ema",
            "update_ema",
            "has_ema",
            "get_trainable_module",
            "get_eval_model",
            "get_checkpoint_state",
            "load_checkpoint_state",
            "prepare_distributed",
            "compile",
        )
    }
    assert arguments == {
        "__init__": ["device", "dtype", "verbose"],
        "setup_ema": ["decay", "use_warmup", "device", "kwargs"],
        "update_ema": ["step"],
        "has_ema": [],
        "get_trainable_module": ["ema"],
        "get_eval_model": ["module", "ema"],
        "get_checkpoint_state": ["ema", "unwrap_fn"],
        "load_checkpoint_state": ["state_dict", "task_state", "ema", "strict"],
        "prepare_distributed": ["device_ids", "ddp_kwargs"],
        "compile": ["backend", "mode", "compile_kwargs"],
    }
    evaluator = ClassificationEvaluator(torch.device("cpu"))
    evaluator.update(torch.eye(10)[:4] * 9, torch.tensor([0, 1, 2, 9]))
    assert evaluator.compute().keys() == {"top1", "top5", "loss"}
    assert evaluator.compute()["top1"] == 75
