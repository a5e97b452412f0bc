"""The manifold losses: stored values, properties, precision, errors, memory, compilation."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fmd.losses
from fmd.benchmark.tools import peak_memory
from fmd.losses import (
    ManifoldLoss,
    full_manifold_loss,
    inter_image_loss,
    intra_image_loss,
    random_patch_loss,
)

GOLDEN = json.loads((Path(__file__).parent / "golden/manifold_losses.json").read_text())
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LOSSES = {
    "intra": intra_image_loss,
    "inter": inter_image_loss,
    "random": lambda s, t: random_patch_loss(
        s, t, rows=torch.arange(0, s.shape[0] * s.shape[1], 2)
    ),
    "full": full_manifold_loss,
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def tokens(*shape, seed=0, dtype=torch.float64, grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.requires_grad_(grad)


def defined(student, teacher):
    """The full loss as it is defined, for any set of tokens ``(…, D)``."""
    s, t = (torch.nn.functional.normalize(x.flatten(0, -2), dim=-1) for x in (student, teacher))
    return (s @ s.T - t @ t.T).square().mean()


# Stored values


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GOLDEN["terms"], ids=lambda case: case["name"])
@every_loss
def test_values_and_gradients_equal_the_stored_ones(name, case, dtype):
    student = torch.tensor(case["student"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(case["teacher"], dtype=dtype)
    if name == "random":
        loss = random_patch_loss(student, teacher, rows=torch.tensor(case["random_rows"]))
    else:
        loss = LOSSES[name](student, teacher)
    loss.backward()
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(case[name], abs=TOLERANCE[dtype])
    if f"grad_{name}" in case:
        expected = torch.tensor(case[f"grad_{name}"], dtype=dtype)
        torch.testing.assert_close(student.grad, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", GOLDEN["layers"], ids=lambda case: case["name"])
def test_manifold_loss_over_layers_equals_the_stored_terms(case, dtype, monkeypatch):
    extra = case["extra_student_tokens"]
    student = [
        torch.tensor(case["student"][i], dtype=dtype)[:, extra:] for i in case["student_layers"]
    ]
    teacher = [torch.tensor(case["teacher"][i], dtype=dtype) for i in case["teacher_layers"]]
    draws = iter(case["random_rows_per_pair"])
    monkeypatch.setattr(torch, "randperm", lambda total, **_: torch.tensor(next(draws)))
    terms = ManifoldLoss(**case["weights"], num_patches=case["K"])(student, teacher)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(
        case["weighted"], abs=TOLERANCE[dtype]
    )
    assert next(draws, None) is None, "one draw for each pair of layers"


# Properties

shapes = st.tuples(*(st.integers(1, 9) for _ in range(4)))
seeds = st.integers(0, 2**31 - 1)
short = settings(max_examples=25, deadline=None)


def drawn(shape, seed):
    b, n, ds, dt = shape
    return tokens(b, n, ds, seed=seed), tokens(b, n, dt, seed=seed + 1)


def rotation(d, seed):
    return torch.linalg.qr(tokens(d, d, seed=seed))[0]


@every_loss
@given(shape=shapes, seed=seeds)
@short
def test_identical_tokens_have_no_loss(name, shape, seed):
    x, _ = drawn(shape, seed)
    assert 0 <= LOSSES[name](x, x).item() < 1e-12


@every_loss
@given(shape=shapes, seed=seeds)
@short
def test_rotating_channels_and_scaling_tokens_changes_nothing(name, shape, seed):
    s, t = drawn(shape, seed)
    scale = tokens(*shape[:2], 1, seed=seed).exp()
    changed = LOSSES[name](
        scale * s @ rotation(shape[2], seed), t @ rotation(shape[3], seed) / scale
    )
    torch.testing.assert_close(changed, LOSSES[name](s, t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["intra", "inter", "full"])
@pytest.mark.parametrize("dim", [0, 1], ids=["images", "patches"])
@given(shape=shapes, seed=seeds)
@short
def test_permuting_both_sides_changes_nothing(name, dim, shape, seed):
    s, t = drawn(shape, seed)
    order = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(seed))
    changed = LOSSES[name](s.index_select(dim, order), t.index_select(dim, order))
    torch.testing.assert_close(changed, LOSSES[name](s, t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "dim"), [("intra", 1), ("inter", 0), ("random", 0), ("full", 0), ("full", 1)]
)
@given(seed=seeds)
@short
def test_permuting_one_side_raises_the_loss(name, dim, seed):
    s = tokens(5, 6, 4, seed=seed)
    assert LOSSES[name](s, s.roll(1, dim)).item() > 1e-4


@given(shape=shapes, seed=seeds)
@short
def test_all_losses_follow_from_the_definition(shape, seed):
    s, t = drawn(shape, seed)
    full = defined(s, t)
    rows = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))
    expected = {
        full_manifold_loss(s, t): full,
        random_patch_loss(s, t, rows=rows): full,
        random_patch_loss(s, t, num_patches=1000): full,
        intra_image_loss(s, t): torch.stack([defined(*x) for x in zip(s, t)]).mean(),
        inter_image_loss(s, t): torch.stack(
            [defined(s[:, n], t[:, n]) for n in range(shape[1])]
        ).mean(),
    }
    for got, want in expected.items():
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("channels", [False, True], ids=["relations", "channels"])
@every_loss
def test_gradients_by_finite_differences(name, channels, monkeypatch):
    monkeypatch.setattr(fmd.losses, "_channels_are_cheaper", lambda *_: channels)
    teacher = tokens(3, 4, 7, seed=1)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), tokens(3, 4, 5, grad=True))


@every_loss
@given(shape=shapes, seed=seeds)
@example(shape=(6, 8, 1, 1), seed=13666)  # a short token, of length 7e-6
@short
def test_both_routes_lead_to_the_same_loss_and_gradient(name, shape, seed):
    s, t = drawn(shape, seed)
    s.requires_grad_()
    results = []
    for channels in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fmd.losses, "_channels_are_cheaper", lambda *_, c=channels: c)
            loss = LOSSES[name](s, t)
        # A token's gradient, and the rounding in it, goes with 1 / length.
        gradient = torch.autograd.grad(loss, s)[0] * s.detach().norm(dim=-1, keepdim=True)
        results.append((loss.detach(), gradient))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_terms_share_one_pass_but_keep_their_own_gradients():
    s, t = tokens(3, 4, 5, grad=True), tokens(3, 4, 6, seed=1)
    terms = ManifoldLoss(1.0, 2.0, 0.0, 3.0)([s], [t])
    together = torch.autograd.grad(2 * terms["intra"] - terms["full"], s)[0]
    apart = torch.autograd.grad(2 * intra_image_loss(s, t) - 3 * full_manifold_loss(s, t), s)[0]
    torch.testing.assert_close(together, apart)


def test_gradient_of_the_gradient_is_refused():
    s = tokens(2, 3, 4, grad=True)
    (grad,) = torch.autograd.grad(
        full_manifold_loss(s, tokens(2, 3, 4, seed=1)), s, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


# Precision


def test_same_loss_under_autocast():
    s, t = (tokens(4, 9, 8, seed=i, dtype=torch.float32, grad=i == 0) for i in range(2))
    manifold = ManifoldLoss(full=1.0, random=0.0)
    plain = sum(manifold([s], [t]).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sum(manifold([s], [t]).values())
        grads = [torch.autograd.grad(loss, s)[0] for loss in (cast, plain)]
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert torch.equal(*grads)


def test_half_precision_tokens_give_a_float32_loss_and_half_precision_gradients():
    s, t = tokens(4, 9, 8).bfloat16().requires_grad_(), tokens(4, 9, 8, seed=1).bfloat16()
    loss = intra_image_loss(s, t)
    loss.backward()
    assert loss.dtype == torch.float32
    assert s.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        loss.double(), intra_image_loss(s.double(), t.double()), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", ["intra", "full"])
def test_dominant_mean_direction_costs_little_precision(name):
    # Tokens 0.95 alike, as in deep layers, and a student close to its teacher.
    mean = 3 * tokens(64, seed=9)
    teacher = tokens(8, 625, 64) + mean
    student = (teacher + 0.1 * tokens(8, 625, 64, seed=1)).requires_grad_()
    exact = LOSSES[name](student, teacher)
    (exact_grad,) = torch.autograd.grad(exact, student)
    rounded = student.detach().float().requires_grad_()
    loss = LOSSES[name](rounded, teacher.float())
    (grad,) = torch.autograd.grad(loss, rounded)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert (grad - exact_grad).norm() < 1e-3 * exact_grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_loss_of_equal_relations_is_never_negative(dtype):
    s = tokens(8, 500, 16, dtype=dtype)
    assert fmd.losses._channels_are_cheaper(4000, 16, 16)
    losses = [full_manifold_loss(s, s @ rotation(16, seed).to(dtype)).item() for seed in range(20)]
    assert min(losses) >= 0
    assert max(losses) < 1e-6


@pytest.fixture
def switches():
    """The global switches of precision, as they were found once the test is over."""
    owners = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    yield owners
    for owner in owners:
        owner.fp32_precision = "none"
    torch.backends.fp32_precision = "none"
    owners[0].allow_fp16_accumulation = False
    owners[0].allow_fp16_reduced_precision_reduction = True


def state(switches):
    cublas, mkldnn = switches
    return (
        cublas.fp32_precision,
        mkldnn.fp32_precision,
        cublas.allow_fp16_accumulation,
        cublas.allow_fp16_reduced_precision_reduction,
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_products_ignore_the_precision_switches(compiled, switches, monkeypatch):
    seen = []
    bmm = torch.bmm

    def watched(a, b):
        seen.append(state(switches))
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", watched)
    manifold = ManifoldLoss(full=1.0)
    if compiled:
        torch.compiler.reset()
        manifold.compile(fullgraph=True)
    s = tokens(4, 9, 8).float().requires_grad_()
    for switch in switches:
        switch.fp32_precision = "tf32"
    switches[0].allow_fp16_accumulation = True
    before = state(switches)
    manifold([s], [tokens(4, 9, 12).float()])
    assert set(seen) == {("ieee", "ieee", False, False)}
    assert state(switches) == before == ("tf32", "tf32", True, True)


def test_an_inherited_precision_stays_inherited(switches):
    s = tokens(4, 9, 8).float()
    torch.backends.fp32_precision = "tf32"
    assert state(switches)[:2] == ("tf32", "tf32")
    intra_image_loss(s, s)
    assert state(switches)[:2] == ("tf32", "tf32")
    torch.backends.fp32_precision = "ieee"
    assert state(switches)[:2] == ("ieee", "ieee")


def test_reductions_that_must_not_be_split_stay_so(switches):
    cublas = switches[0]
    cublas.allow_fp16_reduced_precision_reduction = (False, False)
    s = tokens(4, 9, 8).float()
    intra_image_loss(s, s)
    assert not cublas.allow_fp16_reduced_precision_reduction_split_k


def distances(student, teacher, name, function=fmd.losses._distances, **options):
    """Loss and gradient by name, with options that the public functions do not have."""
    rows = torch.arange(0, student.shape[0] * student.shape[1], 3)
    student = student.detach().requires_grad_()
    (loss,) = function(student, teacher, (name,), rows=rows, **options)
    return loss, torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("mean", [0, 1, 3, 10])
@pytest.mark.parametrize("name", ["intra", "inter", "random"])
def test_relations_in_half_precision_err_by_less_than_a_thousandth(name, mean):
    s, t = tokens(8, 49, 64), tokens(8, 49, 96, seed=1)
    s[..., 0] += 8 * mean  # a channel that all tokens share: at ten, they are 0.99 alike
    t[..., 0] += 10 * mean
    exact, exact_grad = distances(s, t, name)
    loss, grad = distances(s.float(), t.float(), name, half=True)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    error = (grad - exact_grad).norm() / exact_grad.norm()
    whole = (distances(s.float(), t.float(), name)[1] - exact_grad).norm() / exact_grad.norm()
    assert whole < error < 1e-3


@pytest.mark.parametrize("batch", [1, 16, 40], ids="batch {}".format)
@pytest.mark.parametrize("channels", [22, 24], ids="{} channels".format)
def test_terms_in_half_precision_keep_their_own_gradients(batch, channels):
    mean = tokens(1, 1, channels, seed=2)  # that all tokens share, and groups of images another
    groups = tokens(-(-batch // 10), 1, channels, seed=3).repeat_interleave(10, 0)[:batch]
    s, t = (tokens(batch, 9, channels, seed=i) + mean + groups for i in range(2))
    rows = torch.tensor([0, 5, 5, 9 * batch - 1])  # drawn twice, it counts twice
    results = []
    for x, half in ((s, False), (s.float(), True)):
        x.requires_grad_()
        names = ("random", "intra", "inter")
        losses = fmd.losses._distances(x, t.to(x.dtype), names, rows=rows, half=half)
        loss = losses[0] - 3 * losses[1] + 0.25 * losses[2]
        results.append((torch.stack(losses).detach().double(), torch.autograd.grad(loss, x)[0]))
    (exact, exact_grad), (ours, grad) = results
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5)
    assert 0 < (grad - exact_grad).norm() < 1e-3 * exact_grad.norm()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_relations_in_half_precision_compiled_equal_eager(backend):
    torch.compiler.reset()
    s, t = tokens(4, 9, 8).float(), tokens(4, 9, 12, seed=1).float()
    compiled = torch.compile(fmd.losses._distances, fullgraph=True, backend=backend)
    for name in ("intra", "inter", "random"):
        ours = distances(s, t, name, compiled, half=True)
        torch.testing.assert_close(ours, distances(s, t, name, half=True))


@pytest.mark.parametrize("images", [2, 64], ids=["relations", "channels"])
def test_full_loss_stays_whole_in_a_half_precision_step(images):
    s, t = tokens(images, 49, 16).float(), tokens(images, 49, 24, seed=1).float()
    assert fmd.losses._channels_are_cheaper(images * 49, 16, 24) == (images == 64)
    assert torch.equal(distances(s, t, "full", half=True)[1], distances(s, t, "full")[1])


@pytest.mark.parametrize(
    ("device", "dtype", "half"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float32, False),
        ("cuda", torch.float64, False),
        ("cpu", torch.bfloat16, False),
    ],
    ids=str,
)
def test_relations_are_formed_in_half_precision_on_gpus_where_the_step_is(device, dtype, half):
    """On pretended tensors, which have shapes and devices but no values."""
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.fmd.product.default:
                seen.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        student = torch.empty(2, 40, 50, device=device, requires_grad=True)
        ManifoldLoss()([student], [student.detach().to(dtype)])
    assert seen == {torch.float16 if half else torch.promote_types(dtype, torch.float32)}


def test_the_cheaper_route_depends_on_the_shape_and_on_the_speed_of_half_precision():
    cheaper = fmd.losses._channels_are_cheaper
    assert not cheaper(196, 192, 384)  # the paper's
    assert cheaper(3136, 96, 192)  # Swin's first stage
    assert cheaper(3136, 96, 192, fmd.losses._HALF_SPEEDUP)
    assert cheaper(1024, 192, 384)  # the images of a large batch
    assert not cheaper(1024, 192, 384, fmd.losses._HALF_SPEEDUP)
    s, t = torch.empty(1024, 196, 192, device="meta"), torch.empty(1024, 196, 384, device="meta")
    names = ("intra", "inter", "random", "full")
    in_half = fmd.losses._relations_in_half(names, s, t, torch.empty(5000))
    assert in_half == ("intra", "inter")  # too many patches are drawn


@pytest.mark.parametrize("n", [1, 7, 8, 20], ids=lambda n: f"{n} rows")
def test_channel_products_are_the_same_by_blocks_and_at_once(n, monkeypatch):
    monkeypatch.setattr(fmd.losses, "_ROWS_PER_CHUNK", 8)
    both = tokens(3, n, 10)
    expected = both.mT @ both
    torch.testing.assert_close(fmd.losses._products_by_blocks(both), expected)
    torch.testing.assert_close(fmd.losses._products_at_once(both, 4), expected)


def test_operators_are_what_compilers_are_told():
    a = torch.randn(2, 5, 8)
    torch.library.opcheck(fmd.losses.product, (a, a.mT))
    torch.library.opcheck(fmd.losses.relation_difference, (a, 3))
    torch.library.opcheck(fmd.losses.channel_products, (a,))


@every_loss
def test_token_of_zeros_has_a_finite_gradient(name):
    s = tokens(3, 4, 5)
    s[0, 0] = 0
    s.requires_grad_()
    loss = LOSSES[name](s, tokens(3, 4, 5, seed=1))
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


# Errors


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((4, 5), (2, 4, 5), r"student tokens must be \(B, N, D\), got shape \(4, 5\)"),
        ((2, 4, 5), (2, 4, 5, 1), r"teacher tokens must be \(B, N, D\)"),
        ((2, 4, 5), (3, 4, 5), r"same images and patches: \(B, N\) = \(2, 4\) and \(3, 4\)"),
        ((2, 4, 5), (2, 3, 5), "same images and patches"),
        ((0, 4, 5), (0, 4, 5), "empty"),
        ((2, 4, 0), (2, 4, 5), "empty"),
    ],
)
@every_loss
def test_tokens_that_do_not_fit_are_refused(name, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name](torch.ones(student), torch.ones(teacher))


@pytest.mark.parametrize("num_patches", [0, -3])
def test_non_positive_number_of_patches_is_refused(num_patches):
    x = tokens(2, 3, 4)
    with pytest.raises(ValueError, match=f"num_patches must be positive, got {num_patches}"):
        random_patch_loss(x, x, num_patches)
    with pytest.raises(ValueError, match=f"num_patches must be positive, got {num_patches}"):
        ManifoldLoss(num_patches=num_patches)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
@pytest.mark.parametrize("name", ["intra", "inter", "random", "full"])
def test_negative_weight_is_refused(name, weight):
    with pytest.raises(ValueError, match=f"weight of {name} must not be negative, got {weight}"):
        ManifoldLoss(**{name: weight})


@pytest.mark.parametrize(("students", "teachers"), [(0, 0), (1, 0), (2, 3)])
def test_layer_lists_that_do_not_pair_are_refused(students, teachers):
    x = tokens(2, 3, 4)
    with pytest.raises(ValueError, match=f"in pairs: got {students} and {teachers}"):
        ManifoldLoss()([x] * students, [x] * teachers)


def test_only_terms_with_a_weight_are_returned():
    x = tokens(2, 3, 4)
    assert list(ManifoldLoss(inter=0.0, full=1.0)([x], [x])) == ["intra", "random", "full"]
    assert ManifoldLoss(0.0, 0.0, 0.0)([x], [x]) == {}


# Random rows


def test_random_rows_follow_the_generator_and_the_global_seed():
    s, t = tokens(4, 9, 5), tokens(4, 9, 6, seed=1)

    def by_generator(seed):
        return random_patch_loss(s, t, 7, generator=torch.Generator().manual_seed(seed)).item()

    def by_global_seed(seed):
        torch.manual_seed(seed)
        return ManifoldLoss(0.0, 0.0, 1.0, num_patches=7)([s, s], [t, t])["random"].item()

    for draw in (by_generator, by_global_seed):
        assert draw(3) == draw(3)
        assert draw(3) != draw(4)


# Memory


def test_full_loss_needs_a_few_copies_of_the_tokens():
    b, n = 100, 200
    s, t = tokens(b, n, 96, dtype=torch.float32, grad=True), tokens(b, n, 128, dtype=torch.float32)
    copy = (s.numel() + t.numel()) * 4
    peak = peak_memory(lambda: full_manifold_loss(s, t).backward(), torch.device("cpu"))
    assert copy / 2 < peak < 5 * copy
    assert peak < (b * n) ** 2 * 4 / 20  # one map of relations


def test_memory_kept_for_the_backward_pass_is_a_student_for_each_term():
    s, t = tokens(4, 9, 5, grad=True), tokens(4, 9, 20, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        ManifoldLoss(random=0.0, full=1.0)([s], [t])
    lengths = 4 * 9
    assert sum(kept) <= 4 * s.numel() + lengths + 10  # the student, three gradients, weights


# Compilation


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOSSES, "layers"])
def test_compiled_without_breaks_equals_eager(name):
    torch.compiler.reset()
    s = [tokens(3, 4, 5, seed=i, dtype=torch.float32, grad=True) for i in range(2)]
    t = [tokens(3, 4, 6, seed=i + 2, dtype=torch.float32) for i in range(2)]
    manifold = ManifoldLoss(full=1.0, num_patches=5)

    def loss(s, t):
        return sum(manifold(s, t).values()) if name == "layers" else LOSSES[name](s[0], t[0])

    results = []
    # Graphs of autograd's ahead-of-time tracer, without the C++ compiler's minutes.
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        value = function(s, t)
        results.append((value.detach(), torch.autograd.grad(value, s[0])[0]))
    torch.testing.assert_close(*results)
