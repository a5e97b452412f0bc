"""Tokens of any timm model, and the matching of token grids."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.cait import TalkingHeadAttn
from tiny import MODELS, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fmd.build import build_optimizer
from fmd.config import load_experiment
from fmd.errors import FmdError
from fmd.models import (
    FusedTalkingHeads,
    TokenModel,
    create_model,
    fingerprint,
    load_weights,
    match_grids,
)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_tokens_in_one_pass(name):
    model = tiny_model(name).eval()
    last = len(model.feature_info) - 1
    logits, tokens = TokenModel(model, [last, 0, last])(IMAGES)

    torch.testing.assert_close(logits, model(IMAGES), atol=1e-5, rtol=1e-5)
    grids = [side * side for side in _grid_sides(model, [last, 0, last])]
    channels = [model.feature_info[i]["num_chs"] for i in (last, 0, last)]
    assert [tuple(t.shape) for t in tokens] == [(2, n, d) for n, d in zip(grids, channels)]
    assert torch.equal(tokens[0], tokens[2])  # the order and repetitions of the caller


def _grid_sides(model, layers):
    return [32 // model.feature_info[i]["reduction"] for i in layers]


@pytest.mark.parametrize("name", ["vit", "deit"])
@torch.no_grad()
def test_tokens_are_the_patches_of_the_block_before_the_final_norm(name):
    model = tiny_model(name).eval()
    seen = []
    model.blocks[1].register_forward_hook(lambda block, args, output: seen.append(output))
    _, (tokens,) = TokenModel(model, [1])(IMAGES)
    assert torch.equal(tokens, seen[0][:, model.num_prefix_tokens :])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_are_those_of_the_maps(name, monkeypatch):
    model, asked = tiny_model(name).eval(), []
    intermediates = model.forward_intermediates
    _, maps = intermediates(IMAGES, indices=[0, 1], output_fmt="NCHW")

    def spy(*args, **kwargs):
        asked.append(kwargs["output_fmt"])
        return intermediates(*args, **kwargs)

    monkeypatch.setattr(model, "forward_intermediates", spy)
    _, tokens = TokenModel(model, [0, 1])(IMAGES)
    for m, t in zip(maps, tokens, strict=True):
        torch.testing.assert_close(t, m.flatten(2).transpose(1, 2))
    # What computes with tokens gives them without a copy to maps and back.
    assert asked == ["NLC" if name in ("vit", "deit", "cait") else "NCHW"]


@torch.no_grad()
def test_hierarchical_transformer_with_position_embedding():
    # Hiera has blocks and a position embedding like a ViT, but gives maps only.
    model = timm.create_model("hiera_tiny_224", num_classes=5, img_size=(64, 64)).eval()
    _, tokens = TokenModel(model, [0, 3])(torch.randn(1, 3, 64, 64))
    assert [tuple(t.shape) for t in tokens] == [(1, 256, 96), (1, 4, 768)]


@pytest.mark.parametrize("layers", [[3], [-1], [0, 1, 7]])
def test_layer_out_of_range(layers):
    with pytest.raises(ValueError, match=r"layers 0 to 2, but .* were asked for"):
        TokenModel(tiny_model("vit"), layers)


def test_model_without_intermediates():
    with pytest.raises(ValueError, match="Sequential has no forward_intermediates"):
        TokenModel(nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), [0])
    assert TokenModel(nn.Flatten())(IMAGES)[1] == []  # logits alone need none


def test_grids_are_averaged_to_the_coarser_one():
    fine = torch.arange(16.0).view(1, 16, 1)
    coarse = torch.zeros(1, 4, 3)
    expected = torch.tensor([[2.5], [4.5], [10.5], [12.5]])  # means of 2×2 blocks of 4×4
    student, teacher = match_grids(fine, coarse)
    assert torch.equal(student[0], expected) and teacher is coarse
    student, teacher = match_grids(coarse, fine)
    assert torch.equal(teacher[0], expected) and student is coarse


def test_grids_of_wide_images():
    fine = torch.arange(8.0).view(1, 8, 1)  # 2×4
    student, _ = match_grids(fine, torch.zeros(1, 2, 1), aspect=0.5)  # 1×2
    assert student.flatten().tolist() == [2.5, 4.5]


def test_equal_grids_stay_as_they_are_and_others_must_fit_the_images():
    tokens = torch.randn(1, 7, 2)  # no grid at all, but nothing to resample
    assert match_grids(tokens, tokens) == (tokens, tokens)
    with pytest.raises(ValueError, match="7 patches do not form a grid"):
        match_grids(tokens, torch.randn(1, 16, 2))


def test_unknown_model_and_argument():
    with pytest.raises(FmdError, match=r"no model 'resnet18x' \(did you mean 'resnet18'"):
        create_model("resnet18x", 10)
    with pytest.raises(FmdError, match=r"cannot build 'resnet10t' with .*img_sizes"):
        create_model("resnet10t", 10, img_sizes=8)
    with pytest.raises(FmdError, match=r"cannot build 'resnet10t.none' with .*tag"):
        create_model("resnet10t.none", 10)


def test_weights_of_another_model_missing_or_cut(tmp_path):
    model, path = tiny_model("vit"), tmp_path / "weights.safetensors"
    with pytest.raises(FmdError, match="no weights at"):
        load_weights(model, path)
    save_file(tiny_model("convnext").state_dict(), path)
    with pytest.raises(FmdError, match="does not hold weights of this model"):
        load_weights(model, path)
    save_file(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FmdError, match="does not hold weights of this model") as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value)


def test_weights_and_fingerprint(tmp_path):
    model, other, path = tiny_model("resnet"), tiny_model("resnet", seed=1), tmp_path / "w"
    assert fingerprint(model) == fingerprint(tiny_model("resnet")) != fingerprint(other)
    save_file(model.state_dict(), path)
    assert fingerprint(load_weights(other, path)) == fingerprint(model)
    with torch.no_grad():
        other.fc.bias[0] += 1e-6
    assert fingerprint(other) != fingerprint(model)


def test_half_precision_weights_are_widened(tmp_path):
    model = tiny_model("vit")
    save_file({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "w")
    loaded = load_weights(tiny_model("vit", seed=1), tmp_path / "w")
    assert loaded.head.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.head.weight, model.head.weight, atol=1e-3, rtol=1e-3)


def test_talking_heads_that_learn_are_timms_compiled_as_well(monkeypatch):
    torch.manual_seed(0)
    settings = {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 2, "init_values": 0.5}
    plain = timm.create_model("cait_xxs24_224", num_classes=5, **settings)
    with torch.no_grad():  # as they start, attention hardly depends on these
        for name, parameter in plain.named_parameters():
            if ".attn." in name:
                parameter.normal_(std=0.5)
    ours, compiled = (create_model("cait_xxs24_224", 5, **settings) for _ in range(2))
    assert any(isinstance(layer, FusedTalkingHeads) for layer in compiled.modules())
    compiled.compile(backend="aot_eager", fullgraph=True)
    for model in (ours, compiled):
        model.load_state_dict(plain.state_dict())
    answers = [plain(IMAGES), ours(IMAGES)]
    with monkeypatch.context() as patch:
        patch.setattr(TalkingHeadAttn, "forward", None)  # timm's is no way for the compiler
        answers.append(compiled(IMAGES))
    for answer in answers:
        answer.square().sum().backward()
    expected = [p.grad for p in plain.parameters()]
    assert torch.equal(answers[0], answers[1])
    assert all(torch.equal(p.grad, g) for p, g in zip(ours.parameters(), expected))
    torch.testing.assert_close(answers[2], answers[0])
    for parameter, gradient in zip(compiled.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_optimizer_of_a_gpu_is_one_kernel():
    config = load_experiment("tiny-imagenet").run("none")
    with FakeTensorMode():
        optimizers = [build_optimizer(config, nn.Linear(2, 2, device=d)) for d in ("cpu", "cuda")]
    assert [bool(optimizer.defaults["fused"]) for optimizer in optimizers] == [False, True]
