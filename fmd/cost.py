"""What a run costs on GPUs that are not at hand, from operations and bytes that were counted.

``python -m fmd.cost`` counts the variants of the ImageNet experiments and writes
``results/benchmarks/cost.json``.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import asdict, dataclass
from pathlib import Path

from fmd.config import RunConfig, load_experiment
from fmd.errors import run_main
from fmd.records import provenance, read_benchmark, write_benchmark

SHARE = 0.3  # of the peak rate that is assumed to be reached
IMAGENET_TRAIN = 1_281_167  # training images of ImageNet-1k
EXPERIMENTS = ("imagenet", "imagenet-swin")
# Other teachers of the same student, set beside the experiment's own.
TEACHERS = (
    "cait_xxs24_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "regnety_160.deit_in1k",
)


@dataclass(frozen=True)
class StepCost:
    """One forward and backward pass. An operation is a multiplication or an addition."""

    images: int  # of the pass: a micro batch
    teacher_flops: float  # per image, as are the next four
    forward_flops: float
    backward_flops: float
    loss_flops: float  # forward and backward, as if all were in float32
    bytes_moved: float  # read and written by all operations but matrix products, unfused
    peak_bytes: int  # the most that the pass holds at once
    state_bytes: int  # weights of student and teacher, the optimizer's moments, average weights

    @property
    def flops(self) -> float:
        """Per image, in half precision."""
        return self.teacher_flops + self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class Gpu:
    """One row of ``fmd/gpus.csv``: peak rates as the vendor states them, without sparsity."""

    name: str
    device: str  # its name as the driver gives it
    tflops: float  # matrix products in bfloat16, float16 where there is no bfloat16
    float32_tflops: float  # outside the tensor cores
    memory_gb: float
    bandwidth_gb_s: float
    precision: str
    source: str


@dataclass(frozen=True)
class Estimate:
    """What a GPU is expected to do with a step."""

    seconds_per_image: float
    memory_gb: float

    @property
    def images_per_second(self) -> float:
        """Of one GPU, which is what the input pipeline has to deliver."""
        return 1 / self.seconds_per_image

    def hours(self, images: int) -> float:
        """GPU hours of so many training images."""
        return images * self.seconds_per_image / 3600


def gpus() -> list[Gpu]:
    """The GPUs of ``fmd/gpus.csv``."""
    with Path(__file__).with_name("gpus.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    words = ("name", "device", "precision", "source")
    return [Gpu(**{k: v if k in words else float(v) for k, v in row.items()}) for row in rows]


def find_gpu(device: str) -> Gpu | None:
    """The GPU that records call ``device``; None for one of another kind, or for a CPU."""
    return next((gpu for gpu in gpus() if gpu.device == device), None)


def estimate(cost: StepCost, gpu: Gpu) -> Estimate:
    """Time and memory of a step on a GPU, its operations done one after another.

    Args:
        cost: from :func:`fmd.counting.count_step`.
        gpu: one of :func:`gpus`.

    Returns:
        F / (s·P) + F₃₂ / (s·P₃₂) + Q / W seconds an image, with F and F₃₂ the operations of the
        networks' and the losses' matrix products, P and P₃₂ the GPU's peak rates, s the share of
        them that is assumed (``SHARE``), Q the bytes that everything else moves and W the memory's
        bandwidth; and the memory in 10⁹ bytes.
    """
    operations = cost.flops / gpu.tflops + cost.loss_flops / gpu.float32_tflops
    compute = operations / (SHARE * 1e12)
    traffic = cost.bytes_moved / (gpu.bandwidth_gb_s * 1e9)
    return Estimate(
        seconds_per_image=compute + traffic,
        memory_gb=(cost.state_bytes + cost.peak_bytes) / 1e9,
    )


def estimate_lines(
    config: RunConfig, cost: StepCost, seconds_per_image: float, train_images: int
) -> str:
    """What a run would cost, in words and a table.

    Args:
        config: the run.
        cost: of its step, from :func:`fmd.counting.count_step`.
        seconds_per_image: measured on this machine.
        train_images: images of an epoch.
    """
    giga = {
        "teacher": cost.teacher_flops,
        "student forward": cost.forward_flops,
        "backward": cost.backward_flops,
        "losses": cost.loss_flops,
    }
    parts = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in giga.items())
    total = config.epochs * train_images
    lines = [
        f"an image: {sum(giga.values()) / 1e9:.3g} G operations ({parts}), "
        f"{cost.bytes_moved / 1e6:.3g} MB read and written",
        f"the run: {config.epochs} epochs of {train_images:,} images, {total:,} in all",
    ]
    hours = seconds_per_image * total / 3600
    lines += [
        f"measured here: {1 / seconds_per_image:,.1f} images/s, {hours:,.1f} h",
        f"counted, not measured, at {SHARE:.0%} of the peak rate, {cost.images} images a pass:",
        f"{'GPU':<14}{'GPU hours':>12}{'images/s':>10}{'memory, GB':>16}",
    ]
    for gpu in gpus():
        guess = estimate(cost, gpu)
        memory = f"{guess.memory_gb:.1f} of {gpu.memory_gb:g}"
        if guess.memory_gb > gpu.memory_gb:
            memory += " (!)"
        lines.append(
            f"{gpu.name:<14}{guess.hours(total):>12,.3g}{guess.images_per_second:>10,.0f}{memory:>16}"
        )
    return "\n".join(lines)


def runs() -> list[RunConfig]:
    """What ``python -m fmd.cost`` counts: every variant, and soft distillation by each teacher."""
    configs = []
    for name in EXPERIMENTS:
        experiment = load_experiment(name)
        configs += [experiment.run(variant) for variant in experiment.variants]
    first = load_experiment(EXPERIMENTS[0])
    return configs + [first.run("soft-kd", teacher=f"timm/{name}") for name in TEACHERS]


def count_all(configs: list[RunConfig]) -> Path:
    """Count runs and write ``results/benchmarks/cost.json``; returns the file."""
    # Only here: the book, which reads what was counted, does without torch.
    from tqdm.auto import tqdm

    from fmd.counting import count_step, networks

    code = provenance()
    rows = [
        {
            "experiment": config.experiment,
            "variant": config.variant,
            "key": config.key,
            "student": config.model,
            "teacher": config.teacher if config.distils else None,
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            **asdict(count_step(config, *networks(config))),
        }
        for config in tqdm(configs, desc="counting", unit="run")
    ]
    return write_benchmark("cost", {"benchmark": "cost", **code, "rows": rows})


def read_costs() -> dict:
    """What was counted: provenance and ``rows``, each with its ``cost`` as :class:`StepCost`.

    Raises :class:`FmdError` if nothing was.
    """
    stored = read_benchmark("cost", "python -m fmd.cost")
    fields = StepCost.__dataclass_fields__
    for row in stored["rows"]:
        row["cost"] = StepCost(**{name: row.pop(name) for name in fields})
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmd.cost", description=__doc__)
    parser.parse_args()
    print(count_all(runs()))


if __name__ == "__main__":
    run_main(main)
