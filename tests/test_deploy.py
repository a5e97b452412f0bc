"""A trained student is evaluated on folders of images, exported, and read back unchanged."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from factories import make_record
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import SMALL_VIT, use_tiny

from fmd import deploy
from fmd.config import RunConfig
from fmd.data import load_data
from fmd.errors import FmdError
from fmd.models import create_model, fingerprint
from fmd.records import write_record
from fmd.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A results folder with a student of the digits that learnt for some epochs."""
    folder = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as patch:
        train(use_tiny(patch, folder).run("none"), progress=False)
    return folder


@pytest.fixture
def student(results, monkeypatch):
    return deploy.load_student(use_tiny(monkeypatch, results).run("none"))


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory) -> Path:
    """The test digits as files."""
    root = tmp_path_factory.mktemp("digits")
    test = load_data("digits").test
    for i, (image, label) in enumerate(zip(test.images, test.labels.tolist())):
        folder = root / str(label)
        folder.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture
def photo_student(tmp_path, monkeypatch):
    """An untrained student of a thousand classes of photographs, with a record."""
    record = make_record("none")
    use_tiny(monkeypatch, tmp_path / "results")
    config = RunConfig(
        experiment="photographs",
        variant="none",
        data="photos/imagenet",
        image_size=32,
        model="deit_tiny_distilled_patch16_224",
        model_args=SMALL_VIT,
        alpha=0.0,
        epochs=1,
        batch_size=8,
        lr=1e-3,
    )
    torch.manual_seed(0)
    model = create_model(config.model, 1000, **config.model_args)
    weights = config.path("weights", ".safetensors")
    weights.parent.mkdir(parents=True)
    save_file(model.state_dict(), weights)
    record = record.model_copy(
        update={
            "config": config,
            "key": config.key,
            "fingerprint": fingerprint(model),
            "data": {"name": config.data, "fingerprint": "f" * 16, "classes": 1000},
        }
    )
    write_record(record)
    return deploy.load_student(config)


def folder_of(root: Path, classes: list[str], size=(40, 30)) -> Path:
    """One noisy photograph a class."""
    generator = torch.Generator().manual_seed(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        pixels = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / name / "photo.JPEG")
    return root


def evaluate(student, folder, names=None, **options):
    names = names or deploy.class_names(student)
    return deploy.evaluate_folder(
        student, folder, names, device=CPU, progress=False, **{"workers": 1, **options}
    )


class TestEvaluate:
    def test_the_test_images_as_files_give_the_records_accuracy(self, student, digits_folder):
        result = evaluate(student, digits_folder, batch_size=100)
        test = student.record.test.last
        assert result["images"] == student.record.data["test"]
        assert result["top1"] == pytest.approx(test.top1, abs=1e-4)
        assert result["top5"] == pytest.approx(test.top5, abs=1e-4)
        assert result["top1_of_folder"] == result["top1"]  # all classes are there
        assert result["parameters"] == student.record.parameters
        assert result["images_per_second"] >= result["with_decoding"] > 0
        name = f"-{digits_folder.name}-{result['folder_fingerprint']}.json"
        stored = student.config.path("evaluations", name)
        assert json.loads(stored.read_text()) == result

    def test_operations_are_those_of_the_layers(self, student, digits_folder):
        depth, dim, tokens, mlp = 2, 16, 5, 4
        block = tokens * dim * dim * (4 + 2 * mlp) + 2 * tokens * tokens * dim
        expected = depth * block + 4 * 16 * dim + 10 * dim  # and patches of 4×4, head
        assert evaluate(student, digits_folder)["gmacs"] * 1e9 == pytest.approx(expected)

    def test_a_part_of_the_classes_is_also_judged_among_itself(
        self, student, digits_folder, tmp_path
    ):
        part = tmp_path / "part"
        part.mkdir()
        for name in "38":
            (part / name).symlink_to(digits_folder / name)
        result = evaluate(student, part)
        assert result["classes"] == 2
        assert result["top1_of_folder"] >= result["top1"]
        model, data = student.model, load_data("digits")
        rows = (data.test.labels == 3) | (data.test.labels == 8)
        with torch.no_grad():
            logits = model(data.normalize(data.test.images[rows]))
        right = (logits[:, 8] > logits[:, 3]) == (data.test.labels[rows] == 8)
        assert result["top1_of_folder"] == pytest.approx(100 * right.float().mean().item())

    def test_folders_of_the_same_name_do_not_take_each_others_place(self, student, tmp_path):
        sets = ("imagenet", "imagenetv2")
        for name, classes in zip(sets, (["0", "1"], ["0"])):
            evaluate(student, folder_of(tmp_path / name / "val", classes))
        evaluate(student, tmp_path / "imagenet" / "val")  # the same again is no other file
        files = student.config.path("evaluations", "").parent.glob("seed-0-val-*.json")
        stored = [json.loads(path.read_text()) for path in files]
        assert sorted(x["folder"] for x in stored) == [f"{name}/val" for name in sets]
        assert sorted(x["images"] for x in stored) == [1, 2]

    def test_photographs_by_wordnet_id_and_by_number(self, photo_student, tmp_path):
        names = deploy.class_names(photo_student)
        by_id = folder_of(tmp_path / "id", ["n01440764", "n15075141"])
        by_number = folder_of(tmp_path / "number", ["0", "999"])
        found = [deploy.find_images(folder, names) for folder in (by_id, by_number)]
        assert [labels.tolist() for _, labels in found] == [[0, 999], [0, 999]]
        results = [evaluate(photo_student, folder) for folder in (by_id, by_number)]
        assert results[0]["top1_of_folder"] == results[1]["top1_of_folder"]

    def test_numbers_are_not_sorted_as_words(self, tmp_path):
        folder = folder_of(tmp_path / "v2", ["0", "1", "10", "2"])
        _, labels = deploy.find_images(folder, [f"class-{i}" for i in range(11)])
        assert labels.tolist() == [0, 1, 10, 2]

    def test_names_that_are_numbers_are_names_first(self, tmp_path):
        folder = folder_of(tmp_path / "flowers", ["1", "2", "10"])
        _, labels = deploy.find_images(folder, ["1", "2", "10", "11"])
        assert labels.tolist() == [0, 2, 1]  # of 1, 10, 2

    def test_classes_from_a_file_or_the_training_folder(self, student, tmp_path):
        words = [f"the digit {i}" for i in range(10)]
        (tmp_path / "names.txt").write_text("\n".join(words))
        assert deploy.class_names(student, tmp_path / "names.txt") == words
        folder_of(tmp_path / "train", words)
        assert deploy.class_names(student, tmp_path / "train") == words

    def test_classes_of_photographs_are_those_of_the_run(self, photo_student):
        few = replace(photo_student.images, num_classes=2)
        data = {**photo_student.record.data, "classes": 2, "class_names": ["cat", "dog"]}
        record = photo_student.record.model_copy(update={"data": data})
        student = replace(photo_student, images=few, record=record)
        assert deploy.class_names(student) == ["cat", "dog"]
        with pytest.raises(FmdError, match="without names of its classes: give --classes"):
            deploy.class_names(replace(student, record=photo_student.record))

    def test_a_greyscale_photograph_is_taken_as_colour(self, photo_student, tmp_path):
        folder = tmp_path / "grey"
        (folder / "0").mkdir(parents=True)
        Image.new("L", (50, 40), 128).save(folder / "0" / "grey.png")
        assert evaluate(photo_student, folder)["images"] == 1

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda root: None, "cannot read"),
            (lambda root: root.mkdir(), "no subfolders"),
            (lambda root: folder_of(root, ["0", "dog"]), "no class of the student: dog"),
            (lambda root: (root / "0").mkdir(parents=True), "holds no images"),
        ],
    )
    def test_a_folder_that_does_not_fit_is_refused(self, student, tmp_path, make, words):
        make(tmp_path / "images")
        with pytest.raises(FmdError, match=words):
            evaluate(student, tmp_path / "images")

    def test_a_broken_image_is_named(self, student, tmp_path):
        folder = folder_of(tmp_path / "images", ["0"])
        photo = folder / "0" / "photo.JPEG"
        photo.write_bytes(photo.read_bytes()[:200])
        with pytest.raises(FmdError, match=r"0/photo\.JPEG cannot be decoded"):
            evaluate(student, folder)

    def test_too_few_classes_and_no_class_list(self, student, tmp_path):
        (tmp_path / "names.txt").write_text("cat\ndog\n")
        with pytest.raises(FmdError, match="names 2 classes, the student has 10"):
            deploy.class_names(student, tmp_path / "names.txt")
        with pytest.raises(FmdError, match="cannot read the class names"):
            deploy.class_names(student, tmp_path / "absent.txt")

    def test_a_run_without_a_record_and_weights_of_another(self, results, monkeypatch):
        tiny = use_tiny(monkeypatch, results)
        with pytest.raises(FmdError, match="tiny/none/seed-7 has no record: train it first"):
            deploy.load_student(tiny.run("none", 7))
        weights = tiny.run("none").path("weights", ".safetensors")
        whole = weights.read_bytes()
        tensors = load_file(weights)
        tensors["norm.weight"] = tensors["norm.weight"] + 1
        try:
            save_file(tensors, weights)
            with pytest.raises(FmdError, match="is not what the record"):
                deploy.load_student(tiny.run("none"))
        finally:
            weights.write_bytes(whole)


class TestExport:
    def test_timm_and_torch_export_are_read_back(self, student, tmp_path):
        note = deploy.export(student, tmp_path, formats=("timm", "pt2"))
        assert note["differences"].keys() == {"timm", "pt2"}
        assert max(note["differences"].values()) <= deploy.TOLERANCE
        assert json.loads((tmp_path / "export.json").read_text()) == note
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert fingerprint(loaded) == student.record.fingerprint
        assert tuple(loaded.pretrained_cfg["mean"]) == student.images.mean
        assert tuple(loaded.pretrained_cfg["input_size"]) == (1, 8, 8)
        told = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
        assert not {"tag", "license"} & told.keys()  # those of weights that these are not
        assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644

    def test_the_card_states_where_the_weights_come_from(self, student, tmp_path):
        deploy.export(student, tmp_path, formats=("timm",))
        card, record = (tmp_path / "README.md").read_text(), student.record
        for fact in (
            record.commit,
            record.fingerprint,
            record.data["fingerprint"],
            record.versions["torch"],
            record.device,
            f"{record.test.last.top1:.2f} %",
            f"variant `{record.config.variant}`",
            "| `epochs` | `3` |",
            "scikit-learn",
        ):
            assert fact in card
        code = card.split("```python\n")[1].split("```")[0]
        found = {}
        exec(code.replace("<this folder>", str(tmp_path)), found)
        images = torch.randn(2, *student.images.image_shape)
        with torch.no_grad():
            torch.testing.assert_close(found["model"](images), student.model(images))
        assert found["transform"] is not None
        assert "{" not in card.split("## Schedule")[0]

    def test_half_precision_halves_the_file(self, photo_student, tmp_path):
        whole = deploy.export(photo_student, tmp_path / "whole", formats=("timm",))
        half = deploy.export(photo_student, tmp_path / "half", formats=("timm",), half=True)
        weights = load_file(tmp_path / "half" / "model.safetensors")
        assert {x.dtype for x in weights.values()} == {torch.float16}
        sizes = [note["file_mb"]["model.safetensors"] for note in (half, whole)]
        assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.05)
        assert 0 < half["rounding"] < 0.05
        assert half["differences"]["timm"] <= deploy.TOLERANCE
        assert "float16" in (tmp_path / "half" / "README.md").read_text()

    def test_an_export_names_the_classes_of_photographs(self, photo_student, tmp_path):
        names = [f"kind {i}" for i in range(1000)]
        photo_student.record.data["class_names"] = names
        deploy.export(photo_student, tmp_path, formats=("timm",))
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert loaded.pretrained_cfg["label_names"] == names

    def test_onnx_takes_any_number_of_images(self, student, tmp_path):
        pytest.importorskip("onnxscript", reason="onnx is an extra")
        runtime = pytest.importorskip("onnxruntime", reason="onnx is an extra")
        note = deploy.export(student, tmp_path, formats=("onnx",))
        assert note["differences"]["onnx"] <= deploy.TOLERANCE
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        images = torch.randn(5, 1, 8, 8)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), student.model(images))

    def test_weights_too_large_for_half_precision_are_refused(self, student, tmp_path):
        large = copy.deepcopy(student)
        with torch.no_grad():
            large.model.head.bias[0] = 1e5
        with pytest.raises(FmdError, match=r"not hold the weights head\.bias.* --half"):
            deploy.export(large, tmp_path / "out", formats=("timm",), half=True)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("error", [2 * deploy.TOLERANCE, math.nan])
    def test_an_export_that_differs_is_refused(self, student, tmp_path, monkeypatch, error):
        def wrong(student, model, folder, batch, half):
            return deploy._logits(model, batch) + error

        monkeypatch.setattr(deploy, "_write_pt2", wrong)
        with pytest.raises(FmdError, match=r"differ by more than .* reading back pt2"):
            deploy.export(student, tmp_path, formats=("timm", "pt2"))

    def test_missing_onnx_is_said_before_anything_is_written(self, student, tmp_path, monkeypatch):
        monkeypatch.setattr(deploy.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(FmdError, match="pip install onnx onnxruntime onnxscript"):
            deploy.export(student, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_takes_no_files(self, student, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(FmdError, match="cannot write to"):
            deploy.export(student, tmp_path / "file" / "out", formats=("timm",))


def test_command_line(results, digits_folder, tmp_path, monkeypatch, capsys):
    use_tiny(monkeypatch, results)
    monkeypatch.setattr(sys, "argv", ["x", "evaluate", "tiny", "none", str(digits_folder)])
    deploy.main()
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"/{digits_folder.name}: top-1 " in line
    out = ["--output", str(tmp_path), "--formats", "timm", "--half"]
    monkeypatch.setattr(sys, "argv", ["x", "export", "tiny", "none", "--seed", "0", *out])
    deploy.main()
    assert "largest difference of a logit: timm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--device", "gpu", "no device 'gpu'"),
        ("--batch-size", "0", "--batch-size 0: give 1 or"),
        ("--workers", "-1", "--workers -1: give 1 or"),
    ],
)
def test_wrong_options_are_refused_in_words(
    results, digits_folder, monkeypatch, option, value, message
):
    use_tiny(monkeypatch, results)
    arguments = ["evaluate", "tiny", "none", str(digits_folder), option, value]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(FmdError, match=message):
        deploy.main()
