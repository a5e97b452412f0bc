"""After training: evaluate a student on folders of images, and export it.

``python -m fmd.deploy evaluate EXPERIMENT VARIANT --seed N FOLDER...`` takes folders with one
subfolder a class, such as ImageNet's validation images, ImageNet-V2, -R and -A;
``python -m fmd.deploy export EXPERIMENT VARIANT --seed N`` writes a folder for timm and the
Hugging Face hub, ONNX and ``torch.export``, each read back and compared.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.models import save_for_hf
from timm.task import ClassificationEvaluator
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from fmd.build import load_trained
from fmd.cards import model_card
from fmd.config import ROOT, RunConfig, load_experiment, parse_overrides
from fmd.counting import PRODUCTS
from fmd.data import load_data
from fmd.errors import FmdError, run_main
from fmd.models import fingerprint, narrow
from fmd.photos import PhotoFolder
from fmd.processes import device_name, join
from fmd.records import Accuracy, Record, finished, provenance, write_atomically

FORMATS = ("timm", "pt2", "onnx")
TOLERANCE = 1e-4  # largest difference of a logit after reading an export back
ORIGIN = ("tag", "license", "paper_ids", "paper_name", "origin_url")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass
class _Images:
    """What a network has to know of its data: the data itself need not be at hand."""

    name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, int, int]


@dataclass
class Student:
    """A finished run: its network in eval mode, and how images are prepared for it."""

    config: RunConfig
    record: Record
    model: nn.Module
    images: _Images

    @property
    def preparation(self) -> dict:
        """Input size, crop, mean and std, in timm's words."""
        # Images of the sets that are held in memory are used whole.
        return {
            "input_size": self.images.image_shape,
            "interpolation": "bicubic",
            "crop_pct": self.config.crop_pct if self.config.photos is not None else 1.0,
            "mean": self.images.mean,
            "std": self.images.std,
        }


def load_student(config: RunConfig) -> Student:
    """The student of a finished run; photographs need not be at hand.

    Raises :class:`FmdError` if there is no record or no weights, or if they do not belong together.
    """
    record = finished(config)
    if record is None:
        raise FmdError(f"{config.name} has no record: train it first, with python -m fmd.train")
    if config.photos is not None:
        size = config.image_size
        classes, moments = record.data["classes"], (PhotoFolder.mean, PhotoFolder.std)
        images = _Images(config.data, classes, *moments, (3, size, size))
    else:
        data = load_data(config.data)
        images = _Images(data.name, data.num_classes, data.mean, data.std, data.image_shape)
    model = load_trained(config, images)
    if fingerprint(model) != record.fingerprint:
        raise FmdError(
            f"{config.path('weights', '.safetensors')} is not what the record "
            f"{config.path('runs', '.json')} was made with: train the run again"
        )
    return Student(config, record, model, images)


# Evaluation


def class_names(student: Student, source: Path | None = None) -> list[str]:
    """Names of the classes in the order of the logits.

    Args:
        student: its number of classes is checked.
        source: a file with a name a line, or the folder of training images with a subfolder a
            class. If not given: the WordNet ids of ImageNet-1k for a network of a thousand
            classes, those of the training images otherwise, and numbers for data that are no
            photographs.

    Raises:
        FmdError: no such file or folder, or another number of classes.
    """
    count = student.images.num_classes
    if source is None and student.config.photos is None:
        return [str(i) for i in range(count)]
    if source is None and count == 1000:
        return ImageNetInfo().label_names()  # its Parquet files name the classes otherwise
    if source is None:
        names = student.record.data.get("class_names")
        if names is None:
            raise FmdError(
                f"the record of {student.config.name} is of an older version, without names of "
                "its classes: give --classes a file with a name a line, or the training images' "
                "folder"
            )
        return names
    try:
        if source.is_dir():
            # In the order in which timm numbers the classes of training images.
            names = sorted((x.name for x in source.iterdir() if x.is_dir()), key=natural_key)
        else:
            names = [line.strip() for line in source.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise FmdError(
            f"cannot read the class names from {source} ({error.strerror}): give --classes a file "
            "with a name a line, or the folder of training images"
        ) from None
    if len(names) != count:
        raise FmdError(f"{source} names {len(names)} classes, the student has {count}")
    return names


def find_images(folder: Path, names: list[str]) -> tuple[list[Path], Tensor]:
    """Images below ``folder/<class>/`` and their labels, sorted.

    A class is found by its name, or by its number if all folders have numbers for names, as in
    ImageNet-V2. Raises :class:`FmdError` for a folder that is missing, empty or of other classes.
    """
    try:
        found = sorted(x.name for x in folder.iterdir() if x.is_dir())
    except OSError as error:
        raise FmdError(f"cannot read {folder}: {error.strerror}") from None
    index = {name: i for i, name in enumerate(names)}
    numbers = all(name.isdecimal() and int(name) < len(names) for name in found)
    if numbers and not index.keys() >= set(found):
        index = {name: int(name) for name in found}
    unknown = [name for name in found if name not in index]
    if unknown or not found:
        what = f"no class of the student: {', '.join(unknown[:3])}" if unknown else "no subfolders"
        raise FmdError(
            f"{folder} has {what}; its subfolders must be named as the classes, or be their numbers"
        )
    paths, labels = [], []
    for name in found:
        inside = sorted(x for x in (folder / name).rglob("*") if x.suffix.lower() in IMG_EXTENSIONS)
        paths += inside
        labels += [index[name]] * len(inside)
    if not paths:
        raise FmdError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return paths, torch.tensor(labels)


def _batches(student: Student, paths: list[Path], size: int, workers: int) -> Iterator[Tensor]:
    """Prepared images in order, the next batch decoded while one is used."""
    transform = create_transform(**student.preparation)
    mode = "L" if student.images.image_shape[0] == 1 else "RGB"

    def load(path: Path) -> Tensor:
        try:
            return transform(Image.open(path).convert(mode))
        except Exception as error:  # Pillow raises what it likes for a broken file
            raise FmdError(f"{path} cannot be decoded ({error}): repair or remove it") from None

    parts = [paths[i : i + size] for i in range(0, len(paths), size)]
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes outside Python's lock
        upcoming = pool.map(load, parts[0])
        for following in (*parts[1:], []):
            batch, upcoming = upcoming, pool.map(load, following)
            yield torch.stack(list(batch))


@torch.inference_mode()
def evaluate_folder(
    student: Student,
    folder: Path,
    names: list[str],
    *,
    device: torch.device,
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool = True,
) -> dict:
    """Accuracy of a student on a folder of images, its speed and its size.

    Args:
        student: from :func:`load_student`.
        folder: with a subfolder a class; a part of the classes will do.
        names: from :func:`class_names`.
        device: where the network runs: in the precision of its training on a GPU, else in float32.
        batch_size: images at a time.
        workers: threads that decode; one a core if not given.
        progress: show a bar.

    Returns:
        ``images``, ``classes``, ``top1`` and ``top5`` in percent; ``top1_of_folder`` among the
        folder's own classes, as results on ImageNet-R and -A are stated; ``images_per_second`` of
        the network alone and ``with_decoding``; ``parameters``, ``gmacs`` an image, ``file_mb``.
        Also written to ``results/evaluations/<experiment>/<variant>/``
        ``seed-<n>-<folder>-<its fingerprint>.json``: many sets have a folder ``val``.

    Raises:
        FmdError: as :func:`find_images`, an image that cannot be decoded, or no image or worker at
            a time.
    """
    if batch_size < 1:
        raise FmdError(f"--batch-size {batch_size}: give 1 or more")
    if workers is not None and workers < 1:
        raise FmdError(f"--workers {workers}: give 1 or more")
    code = provenance()
    folder = folder.absolute()
    paths, labels = find_images(folder, names)
    model = student.model.to(device)
    dtype = getattr(torch, student.record.precision)
    half = device.type == "cuda" and dtype != torch.float32
    autocast = torch.autocast(device.type, dtype=dtype, enabled=half)
    own = labels.unique()
    evaluator, among, busy, done = ClassificationEvaluator(torch.device("cpu")), 0, 0.0, 0
    with autocast:  # warm up
        model(torch.zeros(min(batch_size, len(paths)), *student.images.image_shape, device=device))
    start = time.perf_counter()
    bar = tqdm(
        total=len(paths), desc=folder.name, unit="image", disable=not progress, mininterval=1.0
    )
    with bar:
        for images in _batches(student, paths, batch_size, workers or os.cpu_count()):
            target = labels[done : done + len(images)]
            images = images.to(device)
            before = time.perf_counter()
            with autocast:
                logits = model(images).float().cpu()  # waits for the device
            busy += time.perf_counter() - before
            evaluator.update(logits, target)
            among += (own[logits[:, own].argmax(1)] == target).sum().item()
            done += len(images)
            bar.update(len(images))
    seconds = time.perf_counter() - start
    accuracy = Accuracy(**evaluator.compute(distributed=False))
    # Enough of the path to tell imagenet/val from imagenetv2/val.
    name = "/".join(folder.parts[-2:])
    listing = "\n".join(f"{x.relative_to(folder)} {x.stat().st_size}" for x in paths)
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    result = {
        "experiment": student.config.experiment,
        "variant": student.config.variant,
        "seed": student.config.seed,
        "key": student.config.key,
        "weights": student.record.fingerprint,
        "folder": name,
        "folder_fingerprint": digest,
        "images": done,
        "classes": len(own),
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "top1_of_folder": 100 * among / done,
        "images_per_second": done / busy,
        "with_decoding": done / seconds,
        "batch_size": batch_size,
        "device": device_name(device),
        "precision": student.record.precision if half else "float32",
        **_size(student),
        **code,
    }
    path = student.config.path("evaluations", f"-{folder.name}-{digest}.json")
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    return result


def _size(student: Student) -> dict:
    model = copy.deepcopy(student.model).cpu()
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter, torch.inference_mode():
        model(torch.zeros(1, *student.images.image_shape))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmacs": counter.get_total_flops() / 2e9,
        "file_mb": student.config.path("weights", ".safetensors").stat().st_size / 1e6,
    }


# Export


def export(
    student: Student, folder: Path, *, formats: tuple[str, ...] = FORMATS, half: bool = False
) -> dict:
    """Write a student in other formats, read each back, and compare its logits.

    Args:
        student: from :func:`load_student`.
        folder: for ``model.safetensors``, ``config.json`` (with the names of photographs' classes)
            and ``README.md`` (the model card), which
            ``timm.create_model("local-dir:<folder>", pretrained=True)`` reads; ``model.pt2``,
            ``model.onnx``, both in float32 with any number of images; ``export.json``.
        formats: which of ``timm``, ``pt2`` and ``onnx``.
        half: round the weights to float16 first, and store the safetensors so.

    Returns:
        The content of ``export.json``: provenance, and under ``differences`` the largest absolute
        difference of a logit in each format, on one random batch; under ``rounding`` that between
        the rounded and the trained weights, for ``half``.

    Raises:
        FmdError: a package for ONNX is missing, the folder takes no files, float16 does not hold
            the weights, or a difference is above ``TOLERANCE``.
    """
    if "onnx" in formats:
        missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise FmdError(
                f"ONNX needs {', '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}, or leave "
                "it out with --formats timm pt2"
            )
    code = provenance()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(3, *student.images.image_shape, generator=generator)
    model = copy.deepcopy(student.model).cpu().eval()
    trained = _logits(model, batch)
    if half:
        model.load_state_dict(narrow(model.state_dict()))  # which widens them again
    expected = _logits(model, batch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write = {"timm": _write_timm, "pt2": _write_pt2, "onnx": _write_onnx}
        differences = {
            name: (write[name](student, model, folder, batch, half) - expected).abs().max().item()
            for name in formats
        }
    except OSError as error:
        raise FmdError(f"cannot write to {folder}: {error.strerror or error}") from error
    config, record = student.config, student.record
    note = {
        "experiment": config.experiment,
        "variant": config.variant,
        "seed": config.seed,
        "key": config.key,
        "trained_with": {"commit": record.commit, "dirty": record.dirty},
        "exported_with": code,
        "weights": record.fingerprint,
        "half": half,
        "rounding": (expected - trained).abs().max().item() if half else None,
        "differences": differences,
        "file_mb": {
            path.name: path.stat().st_size / 1e6 for path in sorted(folder.glob("model.*"))
        },
    }
    write_atomically(folder / "export.json", json.dumps(note, indent=1) + "\n")
    load = (
        "import timm\n\n"
        'model = timm.create_model("local-dir:<this folder>", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))"
    )
    card = model_card(record, load, _differences(note), half=half)
    write_atomically(folder / "README.md", card)
    # Not "greater": a difference that is no number is no smaller either.
    wrong = [
        f"{name} ({value:.2g})" for name, value in differences.items() if not value <= TOLERANCE
    ]
    if wrong:
        raise FmdError(
            f"logits differ by more than {TOLERANCE:g} after reading back {', '.join(wrong)}: "
            f"do not use these files of {folder}"
        )
    return note


@torch.no_grad()
def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def _write_timm(student: Student, model: nn.Module, folder: Path, batch: Tensor, half: bool):
    stored = copy.deepcopy(model).half() if half else copy.copy(model)
    # What timm says of weights that these are not.
    stored.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in ORIGIN}
    save_for_hf(
        stored,
        folder,
        model_config={"label_names": student.record.data.get("class_names")},
        model_args=student.config.model_args,
        data_config=student.preparation,
        safe_serialization=True,
    )
    # As the other files: safetensors lets only its owner read it.
    (folder / "model.safetensors").chmod(0o644)
    return _logits(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), batch)


def _write_pt2(student: Student, model: nn.Module, folder: Path, batch: Tensor, half: bool):
    # Traced with another number of images than it is tried with.
    program = torch.export.export(
        model, (batch[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, folder / "model.pt2")
    return _logits(torch.export.load(folder / "model.pt2").module(), batch)


def _write_onnx(student: Student, model: nn.Module, folder: Path, batch: Tensor, half: bool):
    import onnxruntime

    torch.onnx.export(
        model,
        (batch[:2],),
        folder / "model.onnx",
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])


def _differences(note: dict) -> str:
    """What the model card says of the files of an export."""
    rows = "\n".join(f"| {name} | {value:.2g} |" for name, value in note["differences"].items())
    said = f"""Read back and compared with the trained network on random images:

| format | largest difference of a logit |
|---|---|
{rows}"""
    if note["half"]:
        said += (
            "\n\nRounding the weights to float16 changed a logit by at most "
            f"{note['rounding']:.2g}."
        )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmd.deploy", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("evaluate", "export"):
        sub = actions.add_parser(action)
        sub.add_argument("experiment")
        sub.add_argument("variant", help="a variant of the experiment, or 'teacher'")
        if action == "evaluate":
            sub.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
            sub.add_argument("--classes", type=Path, help="class names, or the training folder")
            sub.add_argument("--batch-size", type=int, default=64)
            sub.add_argument("--workers", type=int)
            sub.add_argument("--device")
        else:
            sub.add_argument("--output", type=Path, help="folder; one under build/ if not given")
            sub.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
            sub.add_argument("--half", action="store_true", help="safetensors in float16")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument(
            "--set",
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help="overrides the run was made with",
        )
    args = parser.parse_args()
    experiment = load_experiment(args.experiment)
    config = experiment.run(args.variant, args.seed, **parse_overrides(args.set))
    student = load_student(config)
    if args.action == "evaluate":
        names = class_names(student, args.classes)
        device = join(args.device).device
        for folder in args.folders:
            result = evaluate_folder(
                student,
                folder,
                names,
                device=device,
                batch_size=args.batch_size,
                workers=args.workers,
            )
            print(
                "{folder}: top-1 {top1:.2f} %, top-5 {top5:.2f} %, among its {classes} classes "
                "{top1_of_folder:.2f} %, {images:,} images; {images_per_second:,.0f} images/s on "
                "{device} ({with_decoding:,.0f} with decoding); {parameters:,} parameters, "
                "{gmacs:.3g} GMACs, {file_mb:.1f} MB".format(**result)
            )
        return
    folder = args.output or ROOT / "build" / "export" / config.name.replace("/", "-")
    note = export(student, folder, formats=tuple(args.formats), half=args.half)
    told = ", ".join(f"{name} {value:.2g}" for name, value in note["differences"].items())
    print(f"{folder}: largest difference of a logit: {told}")


if __name__ == "__main__":
    run_main(main)
