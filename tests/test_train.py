"""Runs from settings to record: repeated, killed and resumed, stopped, broken, shared by ranks."""

import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import fmd.train
from fmd import build
from fmd.build import build_model, load_teacher, load_trained
from fmd.config import load_experiment, results_dir
from fmd.cost import Gpu
from fmd.counting import count_step
from fmd.data import ImageData, load_data
from fmd.errors import FmdError
from fmd.evaluate import evaluate
from fmd.models import fingerprint, load_weights
from fmd.processes import device_name, join
from fmd.records import PARTS, STEP_PARTS, Accuracy, Record, finished, read_record, write_record
from fmd.task import ManifoldDistillationTask
from fmd.train import OutOfTime, train

# Everything that draws random numbers or keeps a state of its own.
EVERYTHING = dict(
    epochs=2,
    data_fraction=0.3,
    batch_size=64,
    mixup=0.2,
    cutmix=0.5,
    label_smoothing=0.1,
    drop_path_rate=0.2,
    ema_decay=0.5,
    clip_grad=1.0,
    alpha=0.5,
)


def numbers(record: Record) -> dict:
    return record.model_dump(exclude={"timing"})


def run_fresh(config, **kwargs) -> Record:
    config.path("runs", ".json").unlink(missing_ok=True)
    return train(config, progress=False, **kwargs)


def count_steps(monkeypatch) -> list:
    steps, forward = [], ManifoldDistillationTask.forward

    def counted(self, *args):
        steps.append(1)
        return forward(self, *args)

    monkeypatch.setattr(ManifoldDistillationTask, "forward", counted)
    return steps


def test_same_seed_same_record(tiny):
    config = tiny.run("decoupled", epochs=2)
    first, second = run_fresh(config), run_fresh(config)
    assert numbers(first) == numbers(second)
    assert run_fresh(tiny.run("decoupled", 1, epochs=2)).fingerprint != first.fingerprint


def test_record_says_what_was_done(tiny, monkeypatch):
    config = tiny.run("decoupled", epochs=2)
    seen = []
    record = train(config, progress=False, on_epoch=lambda epochs: seen.append(len(epochs)))
    assert seen == [1, 2]
    assert record == read_record(config.path("runs", ".json"))
    assert record.config == config and record.key == config.key
    assert (record.commit, record.dirty) == ("0" * 40, False)
    assert record.data == load_data("digits").describe()
    assert set(record.last.train) == {"loss", "base", "logit", "intra", "inter", "random"}
    assert record.last.train["base"] < record.epochs[0].train["base"]
    assert record.best_epoch == max(range(2), key=lambda i: record.epochs[i].val.top1)
    assert record.teacher.run == "tiny/seed-0" and record.teacher.val_top1 > 20
    teacher = read_record(tiny.teacher_run().path("runs", ".json"))
    assert record.teacher.fingerprint == teacher.fingerprint and teacher.teacher is None
    for values in (record.relations.before, record.relations.after):
        assert {k: len(v) for k, v in values.items()} == {"intra": 2, "inter": 2, "full": 2}
    assert record.timing.resumed == 0 and record.timing.images_per_second > 0
    assert not config.path("checkpoints", ".pt").exists()

    data = load_data("digits")
    student = load_trained(config, data)
    assert fingerprint(student) == record.fingerprint
    assert evaluate(student, data, "test") == record.test.last

    steps = count_steps(monkeypatch)
    assert train(config, progress=False) == record and not steps  # a finished run stays as it is


def test_test_images_are_read_once_after_training(tiny, monkeypatch):
    reads, batches = [], ImageData.batches

    def logged(self, split, *args, **kwargs):
        reads.append(split)
        return batches(self, split, *args, **kwargs)

    monkeypatch.setattr(ImageData, "batches", logged)
    train(tiny.run("soft-kd", epochs=2), progress=False)
    assert reads[-3:] == ["test"] * 3  # last, agreement with the teacher, best
    assert set(reads[:-3]) == {"val"}
    reads.clear()
    train(tiny.run("soft-kd", epochs=2), progress=False)
    assert not reads


def test_every_option_runs(tiny):
    record = train(tiny.run("decoupled", **EVERYTHING), progress=False)
    assert record.data["train"] == pytest.approx(0.3 * len(load_data("digits").train), abs=10)
    assert record.last.val_ema is not None and record.test.ema is not None
    assert record.test.ema != record.test.last
    plain = train(tiny.run("none", epochs=1, model="resnet10t", model_args={}), progress=False)
    assert plain.teacher is None and plain.relations is None and plain.test.agreement is None


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(tiny, precision):
    record = train(tiny.run("full", epochs=2, precision=precision), progress=False)
    assert record.precision == precision
    assert record.last.train["loss"] < record.epochs[0].train["loss"]
    weights = load_file(record.config.path("weights", ".safetensors"))
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_the_parts_of_a_run_add_up_to_its_time(tiny, monkeypatch):
    ends, write = [], fmd.train._write_weights

    def timed(*args):
        ends.append(time.monotonic())
        write(*args)

    monkeypatch.setattr(fmd.train, "_write_weights", timed)
    started = time.monotonic()
    timing = train(tiny.run("decoupled", epochs=2), progress=False).timing
    assert timing.seconds == pytest.approx(ends[-1] - started, abs=0.1)  # all but what is left
    assert list(timing.parts) == list(PARTS)
    assert min(timing.parts.values()) > 0
    assert sum(timing.parts.values()) == pytest.approx(timing.seconds, abs=0.01)
    steps = 2 * (len(load_data("digits").train) // 128)
    in_steps = sum(timing.parts[part] for part in STEP_PARTS)
    # All but the first step, which compiles where that is done.
    expected = (steps - 1) * 128 / in_steps
    assert timing.images_per_second == pytest.approx(expected, rel=0.05)
    assert timing.share_of_peak is None  # of a CPU


def test_long_runs_on_a_gpu_are_compiled(tiny, monkeypatch):
    config, compiled = tiny.run("full", epochs=10), []
    for device, steps, expected in (("cuda", 199, False), ("cuda", 200, True), ("cpu", 200, False)):
        assert fmd.train.worth_compiling(config, steps, torch.device(device)) is expected
    monkeypatch.setattr(fmd.train, "worth_compiling", lambda config, steps, device: steps == 8)
    monkeypatch.setattr(ManifoldDistillationTask, "compile", lambda task: compiled.append(task))
    monkeypatch.setattr(ImageData, "compile", lambda data: compiled.append(data))
    steps = len(load_data("digits").train) // 128
    assert steps == 8
    train(tiny.run("full", epochs=1), progress=False)
    assert [type(x) for x in compiled] == [ManifoldDistillationTask, ImageData]
    compiled.clear()
    run_fresh(tiny.run("full", epochs=1), compile=False)
    assert not compiled


def test_share_of_the_peak_is_operations_counted_over_those_possible(tiny, monkeypatch):
    gpu = Gpu("G", "a GPU", 0.5, 0.1, 4, 1000, "bfloat16", "made up")
    monkeypatch.setattr(fmd.train, "find_gpu", lambda name: gpu)
    config = tiny.run("full", epochs=1, precision="bfloat16")
    timing = train(config, progress=False).timing
    data = load_data("digits")
    teacher, _ = load_teacher(config, data, torch.device("cpu"))
    cost = count_step(config, build_model(config, data), teacher, data.image_shape)
    flops = cost.teacher_flops + 3 * cost.forward_flops
    expected = flops * timing.images_per_second / 0.5e12
    assert timing.share_of_peak == pytest.approx(expected, rel=0.01, abs=1e-4)
    assert timing.share_of_peak > 0
    # A head of its own for the teacher's answers: in training there are two outputs.
    heads = {"model": "deit_tiny_distilled_patch16_224", "student_layers": [], "teacher_layers": []}
    two = train(tiny.run("soft-kd", epochs=1, precision="bfloat16", alpha=0.5, **heads))
    assert two.timing.share_of_peak > 0
    # Its float32 products have another peak, which the table lacks.
    assert train(tiny.run("none", epochs=1), progress=False).timing.share_of_peak is None


def test_stronger_and_weaker_settings_reach_the_optimizer(tiny):
    losses = {
        name: train(tiny.run("none", epochs=1, **over), progress=False).last.train["loss"]
        for name, over in {
            "as is": {},
            "clip_grad": {"clip_grad": 1e-3, "opt": "sgd"},
            "opt": {"opt": "sgd"},
            "weight_decay": {"weight_decay": 5.0},
            "augment": {"augment": False},
            "label_smoothing": {"label_smoothing": 0.2},
        }.items()
    }
    assert len(set(losses.values())) == len(losses), losses


# Weights in half precision


def test_half_weights_are_those_that_are_measured_stored_and_distilled_from(tiny, monkeypatch):
    half = load_experiment("half")
    teacher, config = half.teacher_run(), half.run("decoupled")
    whole_teacher = tiny.teacher_run().path("weights", ".safetensors")
    trained = train(teacher, progress=False)
    small = teacher.path("weights", ".safetensors")
    assert {value.dtype for value in load_file(small).values()} == {torch.float16}
    assert small.stat().st_size < 0.6 * whole_teacher.stat().st_size
    for name, value in load_file(whole_teacher).items():  # the same training, then rounded
        assert torch.equal(load_file(small)[name], value.half())

    record = train(config, progress=False)
    assert record.teacher.fingerprint == trained.fingerprint  # as read back from its file
    data = load_data("digits")
    student = load_trained(config, data)
    assert fingerprint(student) == record.fingerprint
    assert evaluate(student, data, "test") == record.test.last
    for name, measured in (("best", record.test.best), ("ema", record.test.ema)):
        model = load_weights(student, config.path("weights", f"-{name}.safetensors"))
        assert {
            v.dtype for v in load_file(config.path("weights", f"-{name}.safetensors")).values()
        } == {torch.float16}
        assert evaluate(model, data, "test") == measured

    # Stopped after every step and gone on: the same.
    config.path("runs", ".json").unlink()
    monkeypatch.setattr(fmd.train, "CHECK_EVERY", 1)
    while True:
        try:
            again = train(config, progress=False, max_minutes=0)
            break
        except OutOfTime:
            pass
    assert again.timing.resumed > 3
    assert numbers(again) == numbers(record)


def test_weights_too_large_for_half_precision(tiny, monkeypatch):
    build = fmd.train.build_model

    def large(*args):
        model = build(*args)
        with torch.no_grad():
            model.patch_embed.proj.bias.fill_(1e5)
        return model

    monkeypatch.setattr(fmd.train, "build_model", large)
    words = r"patch_embed.proj.bias, of up to 1e\+05: keep float32"
    with pytest.raises(FmdError, match=words) as e:
        train(tiny.run("none", epochs=1, half_weights=True), progress=False)
    assert "\n" not in str(e.value)


# Stopped and resumed


def run_script(*arguments, launcher=(), results) -> subprocess.CompletedProcess:
    script = Path(__file__).with_name("tiny_run.py")
    return subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        env={**os.environ, "FMD_RESULTS": str(results), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def words(overrides: dict) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


@pytest.mark.slow
def test_killed_at_any_point_ends_with_the_same_record(tiny, tmp_path):
    overrides = {**EVERYTHING, "epochs": 3}
    config = tiny.run("decoupled", **overrides)
    steps = len(load_data("digits").take(0.3).train) // 64
    points = (
        "step:1",  # before anything is learnt
        f"step:{steps - 1}",  # within the first epoch
        f"step:{steps + 2}",  # the first epoch is done: its checkpoint is kept
        "replace:1",  # the second epoch's checkpoint is written but not in its place
        "evaluation:2",  # validation after the second epoch
        f"step:{steps + 1}",  # the third epoch
        "record:1",  # all is done but the record
        "unlink:1",
    )
    killed = run_script(
        *("kill", *points, "--", "tiny", "decoupled", *words(overrides)), results=results_dir()
    )
    assert killed.returncode == 0, killed.stderr[-2000:]
    record = read_record(config.path("runs", ".json"))
    assert record.timing.resumed >= 4

    whole = tmp_path / "whole"
    shutil.copytree(results_dir() / "runs" / "tiny" / "teacher", whole / "runs/tiny/teacher")
    shutil.copytree(results_dir() / "weights" / "tiny" / "teacher", whole / "weights/tiny/teacher")
    done = run_script("train", "tiny", "decoupled", *words(overrides), results=whole)
    assert done.returncode == 0, done.stderr[-2000:]
    path = config.path("runs", ".json").relative_to(results_dir())
    assert numbers(read_record(whole / path)) == numbers(record)


def test_time_budget_stops_between_steps_and_goes_on(tiny, monkeypatch):
    config = tiny.run("decoupled", **EVERYTHING)
    whole = run_fresh(config)
    config.path("runs", ".json").unlink()
    monkeypatch.setattr(fmd.train, "CHECK_EVERY", 1)
    stops = 0
    while True:
        try:
            record = train(config, progress=False, max_minutes=0)
            break
        except OutOfTime as stop:
            stops += 1
            assert "% of tiny/decoupled" in str(stop) and "\n" not in str(stop)
    steps = whole.data["train"] // config.batch_size
    assert stops == config.epochs * steps - 1
    assert record.timing.resumed == stops
    assert numbers(record) == numbers(whole)


def test_recorded_losses_do_not_depend_on_when_checkpoints_fall(tiny, monkeypatch):
    # What several processes do to the sums, made large enough to be seen.
    monkeypatch.setattr(fmd.train, "average", lambda sums: sums.mul_(0.9))
    monkeypatch.setattr(fmd.train, "CHECK_EVERY", 2)
    config, losses = tiny.run("none", epochs=1), []
    for seconds in (0, 300):
        monkeypatch.setattr(fmd.train, "CHECKPOINT_SECONDS_WITHIN", seconds)
        losses.append(run_fresh(config).last.train)
    assert losses[0] == losses[1]


def test_loss_that_is_not_finite(tiny, monkeypatch):
    monkeypatch.setattr(fmd.train, "CHECKPOINT_SECONDS", 0)
    config = tiny.run("soft-kd", epochs=2)
    steps = len(load_data("digits").train) // config.batch_size
    whole = run_fresh(config)
    config.path("runs", ".json").unlink()

    calls, loss = [], fmd.task.soft_distillation_loss

    def broken(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == steps + 4 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(fmd.task, "soft_distillation_loss", broken)
        with pytest.raises(FmdError) as caught:
            train(config, progress=False)
    assert "not finite: logit at epoch 1, step 3, learning rate 0.00" in str(caught.value)
    assert "\n" not in str(caught.value)
    record = train(config, progress=False)  # from the kept checkpoint of the first epoch
    assert record.timing.resumed == 1
    assert numbers(record) == numbers(whole)


@pytest.mark.parametrize("step_size", [1e35, float("inf")])
def test_last_step_that_breaks_the_weights_is_not_kept(tiny, monkeypatch, step_size):
    # The loss of each step is finite, but the only step of the second epoch ruins the weights.
    monkeypatch.setattr(fmd.train, "CHECKPOINT_SECONDS", 0)
    config = tiny.run("none", epochs=2, batch_size=1024)
    calls, step = [], torch.optim.AdamW.step

    def huge(self, *args, **kwargs):
        calls.append(1)
        step(self, *args, **kwargs)
        if len(calls) == 2:
            with torch.no_grad():
                [p.mul_(step_size) for group in self.param_groups for p in group["params"]]

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", huge)
        with pytest.raises(FmdError, match="not finite: validation loss at epoch 1"):
            train(config, progress=False)
    assert train(config, progress=False).timing.resumed == 1


def stopped(config, monkeypatch) -> Path:
    """The checkpoint of a run that stopped after its first step."""
    with monkeypatch.context() as patch:
        patch.setattr(fmd.train, "CHECK_EVERY", 1)
        with pytest.raises(OutOfTime):
            train(config, progress=False, max_minutes=0)
    return config.path("checkpoints", ".pt")


def assert_refused_and_kept(path, config, words, **options) -> None:
    """A checkpoint that does not fit the run."""
    content = path.read_bytes()
    with pytest.raises(FmdError, match=words):
        train(config, progress=False, **options)
    assert path.read_bytes() == content


def record_teacher_anew(tiny) -> None:
    """The teacher's record names the weights that are in its file now."""
    run = tiny.teacher_run()
    mark = fingerprint(load_trained(run, load_data("digits")))
    record = read_record(run.path("runs", ".json"))
    write_record(record.model_copy(update={"fingerprint": mark}))


def test_the_time_before_a_stop_counts(tiny, monkeypatch):
    config = tiny.run("none", epochs=2)
    started = time.monotonic()
    before = torch.load(stopped(config, monkeypatch), weights_only=True)["progress"]["parts"]
    elapsed = time.monotonic() - started
    assert 0 < before["preparation"] < elapsed and before["forward"] == 0  # of one step
    timing = train(config, progress=False).timing
    assert timing.parts["preparation"] > before["preparation"]
    assert sum(timing.parts.values()) == pytest.approx(timing.seconds, abs=0.01)
    assert timing.seconds < time.monotonic() - started


def test_checkpoint_of_another_run_is_refused_and_kept(tiny, monkeypatch):
    config, other = tiny.run("none", epochs=1), tiny.run("none", epochs=2)
    path = other.path("checkpoints", ".pt")
    path.parent.mkdir(parents=True)
    shutil.copy(stopped(config, monkeypatch), path)
    assert_refused_and_kept(path, other, "belongs to a run with other settings: move it away")


def test_checkpoint_of_another_precision_is_refused_and_kept(tiny, monkeypatch):
    config = tiny.run("none", epochs=1)
    path = stopped(config, monkeypatch)
    monkeypatch.setattr(fmd.train, "_precision", lambda *_: torch.bfloat16)
    words = r"precision: torch.float32, now torch.bfloat16\): go on under those"
    assert_refused_and_kept(path, config, words)


def test_checkpoint_of_other_images_or_of_another_teacher_is_refused(tiny, monkeypatch):
    config = tiny.run("soft-kd", epochs=1)
    path = stopped(config, monkeypatch)
    data = load_data("digits")
    data.train.images = 16 - data.train.images
    data.__post_init__()  # its fingerprint
    words = r"conditions \(%s: \w{16}, now \w{16}\): go on under"
    assert_refused_and_kept(path, config, words % "data", data=data)
    file = tiny.teacher_run().path("weights", ".safetensors")
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file)
    record_teacher_anew(tiny)
    assert_refused_and_kept(path, config, words % "teacher")


def test_checkpoint_of_another_version_is_refused_and_kept(tiny, monkeypatch):
    config = tiny.run("none", epochs=1)
    path = stopped(config, monkeypatch)
    saved = torch.load(path, weights_only=True)
    saved["progress"]["train_seconds"] = saved["progress"].pop("parts")
    torch.save(saved, path)
    assert_refused_and_kept(path, config, "written by another version of this code")


@pytest.mark.parametrize(("capable", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_precision_is_what_the_gpu_has_not_what_it_emulates(monkeypatch, capable, expected):
    def supported(including_emulation=True):
        return capable or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert fmd.train._precision("auto", torch.device("cuda")) == getattr(torch, expected)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "flipped"])
def test_damaged_checkpoint_is_refused(tiny, monkeypatch, damage):
    config = tiny.run("none", epochs=1)
    path = stopped(config, monkeypatch)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "half": content[:middle],
            "empty": b"",
            "text": b"not a checkpoint\n",
            "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
        }[damage]
    )
    with pytest.raises(FmdError, match="is not a whole checkpoint: delete it") as caught:
        train(config, progress=False)
    assert "\n" not in str(caught.value)


# Folders and teachers


def test_folder_that_takes_no_files_is_found_out_before_training(tiny, monkeypatch, tmp_path):
    steps = count_steps(monkeypatch)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path / "file" / "results"))
    with pytest.raises(FmdError, match=r"cannot write .*set FMD_RESULTS to another folder"):
        train(tiny.run("none", epochs=1), progress=False)
    assert not steps


def test_full_disk_at_the_end_loses_nothing(tiny, monkeypatch):
    config = tiny.run("soft-kd", epochs=1)
    replace = os.replace

    def full(source, target):
        if str(target).endswith(".json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(FmdError, match="No space left on device"):
            train(config, progress=False)
    assert not config.path("runs", ".json").exists()
    steps = count_steps(monkeypatch)
    record = train(config, progress=False)
    assert not steps and numbers(record) == numbers(run_fresh(config))


def test_missing_teacher(tiny):
    tiny.teacher_run().path("runs", ".json").unlink()
    with pytest.raises(FmdError, match=r"first run .*python -m fmd.train tiny teacher --seed 0"):
        train(tiny.run("soft-kd"), progress=False)


def test_teacher_weights_that_are_not_the_recorded_ones(tiny):
    path = tiny.teacher_run().path("weights", ".safetensors")
    weights = load_file(path)
    save_file({k: v * 1.01 if k == "head.weight" else v for k, v in weights.items()}, path)
    with pytest.raises(FmdError, match="weights are not those of its record tiny/seed-0"):
        train(tiny.run("soft-kd"), progress=False)
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, path)
    record_teacher_anew(tiny)
    with pytest.raises(FmdError, match=r"validation images, near chance \(10.0 %\)"):
        train(tiny.run("soft-kd"), progress=False)
    save_file({"head.weight": weights["head.weight"]}, path)
    with pytest.raises(FmdError, match="does not hold weights of this model"):
        train(tiny.run("soft-kd"), progress=False)
    path.unlink()
    with pytest.raises(FmdError, match="no weights at"):
        train(tiny.run("soft-kd"), progress=False)


@pytest.mark.parametrize(
    ("top1", "images", "classes", "refused"),
    [
        (62.5, 16, 4, False),
        (50.0, 16, 4, True),
        (100.0, 8, 2, False),
        (87.5, 8, 2, True),
        (0.35, 2000, 1000, False),
        (0.3, 2000, 1000, True),
    ],
)
def test_few_validation_images_refuse_no_good_teacher(
    tiny, monkeypatch, top1, images, classes, refused
):
    monkeypatch.setattr(
        build, "evaluate_teacher", lambda *_: Accuracy(top1=top1, top5=100.0, loss=1.0)
    )
    data = SimpleNamespace(name="few", num_classes=classes, size=lambda split: images)
    expected = pytest.raises(FmdError, match=f"near chance .{100 / classes:.1f} %.")
    with expected if refused else nullcontext():
        assert build.check_teacher(tiny.run("soft-kd"), None, data, None) == top1


def test_a_teacher_of_another_size_is_asked_what_it_will_see(tiny, tmp_path):
    shape = dict(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2)
    settings = dict(**shape, num_classes=10)
    ignorant = timm.create_model("vit_tiny_patch16_224", **settings)
    torch.nn.init.zeros_(ignorant.head.weight)
    save_file(ignorant.state_dict(), tmp_path / "teacher.safetensors")
    config = tiny.run(
        "soft-kd",
        teacher="timm/vit_tiny_patch16_224",
        teacher_args=settings,
        teacher_weights=str(tmp_path / "teacher.safetensors"),
    )
    with pytest.raises(FmdError, match="near chance"):  # of images of 8 × 8, made larger
        train(config, progress=False)


def test_teacher_of_other_settings(tiny):
    path = tiny.teacher_run().path("runs", ".json")
    trained = read_record(path)
    other = tiny.teacher_run(epochs=3).model_copy(update={"variant": "teacher"})
    path.write_text(
        trained.model_copy(update={"config": other, "key": other.key}).model_dump_json()
    )
    with pytest.raises(FmdError, match=r"other settings \(epochs: 3 -> 8\)"):
        train(tiny.run("soft-kd"), progress=False)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(batch_size=5000), "batch_size 5000 exceeds the 1078 training images"),
        (dict(batch_size=33, mixup=0.2), "33 in a forward pass must be even"),
        (dict(opt="adamww"), "adamww.*did you mean 'adamw"),
        (dict(opt="fusedadam"), "opt = 'fusedadam': CUDA required"),
        (dict(model="vit_tiny_patch16_22"), "did you mean 'vit_tiny_patch16_224'"),
        (dict(model_args={"img_size": 16}), "does not take the images of digits: Input height"),
        (dict(model_args={"depths": 2}), "cannot build .*depths"),
        (dict(student_layers=[0, 2]), r"layers 0 to 1, but \[2\] were asked for"),
        (dict(data="digist"), "no data set 'digist'.*did you mean 'digits'"),
        (dict(teacher="tiny"), "must read '<experiment>/seed-<n>'"),
        (dict(teacher="tinny/seed-0"), "no experiment 'tinny'.*did you mean 'tiny'"),
    ],
)
def test_settings_that_cannot_run(tiny, wrong, message):
    with pytest.raises(FmdError, match=message) as caught:
        train(tiny.run("full", **wrong), progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["student_layers", "teacher_layers"])
def test_layers_that_are_only_measured_must_exist(tiny, setting):
    with pytest.raises(FmdError, match=rf"soft-kd.*: {setting}: .* layers 0 to 1, but \[9\]"):
        train(tiny.run("soft-kd", **{setting: [0, 9]}), progress=False)


def test_unknown_device(tiny):
    with pytest.raises(FmdError, match="no device 'gpu9'") as caught:
        train(tiny.run("none"), device="gpu9", progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("there", "asked"), [(0, "cuda"), (1, "cuda:1")])
def test_a_gpu_that_is_not_there(monkeypatch, there, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the driver's, even if too old
    with pytest.raises(FmdError, match=f"no device '{asked}': torch can use {there} GPU"):
        join(asked)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("lscpu") is None,
    reason="no lscpu to ask for the processor",
)
def test_a_record_names_the_processor():
    told = subprocess.run(
        ["lscpu"], capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"}
    ).stdout
    (named,) = re.findall(r"^Model name:\s+(.+)$", told, re.MULTILINE)
    assert device_name(torch.device("cpu")) == f"CPU ({named})"


# Several processes


@pytest.mark.slow
def test_two_processes_train_like_one(tiny, tmp_path):
    # The losses of this run are means over images, or exact over the global batch: its shares add
    # up. Inter and random relate the images of one process only, so they do depend on the number.
    overrides = dict(epochs=2, augment=False)
    config = tiny.run("full", **overrides)
    shutil.copytree(results_dir(), tmp_path / "two")
    one = train(config, progress=False)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_script(
        *("train", "tiny", "full", *words(overrides)),
        launcher=torchrun,
        results=tmp_path / "two",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = read_record(tmp_path / "two" / config.path("runs", ".json").relative_to(results_dir()))
    assert (one.world_size, two.world_size) == (1, 2)
    for a, b in zip(one.epochs, two.epochs):
        assert b.train == pytest.approx(a.train, rel=1e-3)
        assert b.val.loss == pytest.approx(a.val.loss, rel=1e-3)
    assert two.test.last.loss == pytest.approx(one.test.last.loss, rel=1e-3)
    assert two.relations.before["full"] == pytest.approx(one.relations.before["full"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_record_the_batch_norm_that_they_store(tiny):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    overrides = dict(epochs=1, model="resnet10t", model_args={}, ema_decay=0.5)
    done = run_script(
        *("train", "tiny", "none", *words(overrides)), launcher=torchrun, results=results_dir()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config, data = tiny.run("none", **overrides), load_data("digits")
    record = finished(config)
    for suffix, recorded in {"": record.test.last, "-ema": record.test.ema}.items():
        weights = config.path("weights", f"{suffix}.safetensors")
        model = load_weights(build_model(config, data), weights)
        found = evaluate(model, data, "test")
        assert (found.top1, found.top5) == (recorded.top1, recorded.top5)
        assert found.loss == pytest.approx(recorded.loss, rel=1e-5)
