"""A prepared teacher says what the plain one says, whatever its architecture."""

from unittest import mock

import pytest
import torch
from timm.models.cait import TalkingHeadAttn
from tiny import MODELS, tiny_model
from torch._inductor.compile_fx import compile_fx

from fmd import teacher
from fmd.models import TokenModel
from fmd.teacher import ONE_PASS, TalkingHeads, prepare_teacher

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained_like(name, **kwargs):
    """A tiny model whose every weight matters: no zero biases, no LayerScale near zero."""
    model = tiny_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def error(ours, theirs):
    """Largest relative error of the logits and of each layer's tokens."""
    pairs = [(ours[0], theirs[0]), *zip(ours[1], theirs[1], strict=True)]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_and_tokens(name):
    model = trained_like(name)
    last = len(model.feature_info) - 1
    expected = TokenModel(model, [last, 0])(IMAGES)
    assert error(prepare_teacher(model, [last, 0])(IMAGES), expected) < 1e-5
    assert error(prepare_teacher(model)(IMAGES), (expected[0], [])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_as_near_as_autocast(name, dtype):
    model = trained_like(name)
    layers = range(len(model.feature_info))
    expected = TokenModel(model, layers)(IMAGES)
    with torch.autocast("cpu", dtype=dtype):
        theirs = error(TokenModel(model, layers)(IMAGES), expected)
        ours = prepare_teacher(model, layers, dtype)(IMAGES)
    assert ours[0].dtype == dtype  # autocast around it changes nothing
    # Autocast keeps the sums of the blocks in float32, which are rounded here.
    assert error(ours, expected) < 4 * theirs


def test_the_teacher_stays_as_it_is():
    model = trained_like("cait").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = prepare_teacher(model, [0], torch.bfloat16)
    assert model.training and not any(m.training for m in teacher.modules())
    assert any(isinstance(m, TalkingHeads) for m in teacher.modules())
    assert not any(isinstance(m, TalkingHeadAttn) for m in teacher.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("qkv_bias", [True, False])
@torch.no_grad()
def test_talking_heads_both_ways(qkv_bias, monkeypatch):
    torch.manual_seed(0)
    plain = TalkingHeadAttn(24, num_heads=3, qkv_bias=qkv_bias).eval()
    for parameter in plain.parameters():
        parameter.normal_(std=0.5)
    x = torch.randn(2, 5, 24)
    expected = plain(x)
    heads = TalkingHeads(plain)
    torch.testing.assert_close(heads(x), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(teacher, "_attend", teacher._attend_by_head)
    torch.testing.assert_close(heads(x), expected, rtol=1e-5, atol=1e-5)


def test_compiled_in_one_graph():
    model = trained_like("cait", depth=2)
    teacher = prepare_teacher(model, [1, 0])
    teacher.compile(backend="aot_eager", fullgraph=True)
    assert error(teacher(IMAGES), TokenModel(model, [1, 0])(IMAGES)) < 1e-5


@pytest.mark.slow
def test_inductor_takes_the_options_and_says_the_same():
    model = trained_like("cait", depth=1)
    teacher = prepare_teacher(model, [0])
    with mock.patch("torch._inductor.compile_fx.compile_fx", wraps=compile_fx) as compiler:
        teacher.compile(fullgraph=True)
        assert error(teacher(IMAGES), TokenModel(model, [0])(IMAGES)) < 1e-5
    assert compiler.call_args_list[0].kwargs["config_patches"].items() >= ONE_PASS.items()


def test_what_the_teacher_says_can_be_saved_for_the_students_backward_pass():
    logits, _ = prepare_teacher(trained_like("vit"))(IMAGES)
    student = torch.ones_like(logits, requires_grad=True)
    (student * logits).sum().backward()
    assert torch.equal(student.grad, logits)


def test_layers_out_of_range():
    with pytest.raises(ValueError, match=r"layers 0 to 2, but \[3\] were asked for"):
        prepare_teacher(tiny_model("vit"), [3])
