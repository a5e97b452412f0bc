"""Records without training: real settings of the digits experiment, made-up measurements."""

from __future__ import annotations

from fmd.config import load_experiment
from fmd.records import Accuracy, Epoch, Evaluation, Record, Relations, Teacher, Timing


def accuracy(top1: float) -> Accuracy:
    return Accuracy(top1=top1, top5=min(top1 + 10, 100), loss=1 - top1 / 100)


def make_record(
    variant: str = "soft-kd",
    seed: int = 0,
    top1: float = 80.0,
    *,
    best: float | None = None,
    agreement: float | None = 90.0,
    val: tuple[float, ...] = (40.0, 60.0, 70.0),
    relations: float | None = None,
    parts: dict[str, float] | None = None,
    share_of_peak: float | None = None,
    commit: str = "0123456789abcdef",
    dirty: bool = False,
    fingerprint: str = "f" * 16,
    teacher_fingerprint: str = "t" * 16,
    **overrides,
) -> Record:
    """A whole record of a digits run.

    Args:
        top1: test accuracy of the last epoch; ``best`` that of the best, the same if not given.
        val: validation accuracy of each epoch.
        relations: every manifold loss after training; it is 1 before. None leaves them out.
        parts: seconds, which are then those of the run.
        overrides: settings, which become part of the variant's label.
    """
    config = load_experiment("digits").run(variant, seed, **overrides)
    epochs = [
        Epoch(epoch=i, lr=1e-3, train={"loss": 1.0}, val=accuracy(value))
        for i, value in enumerate(val)
    ]
    terms = ("intra", "inter", "full")
    layers = len(config.student_layers)
    return Record(
        config=config,
        key=config.key,
        commit=commit,
        dirty=dirty,
        versions={"torch": "2.8.0", "timm": "1.0.31"},
        device="CPU (x86_64)",
        precision="float32",
        world_size=1,
        data={"name": "digits", "fingerprint": "d" * 16, "train": 1078, "val": 270, "test": 449},
        parameters=53_000,
        teacher=Teacher(run=config.teacher, fingerprint=teacher_fingerprint, val_top1=98.0)
        if config.teacher and config.alpha
        else None,
        fingerprint=fingerprint,
        epochs=epochs,
        best_epoch=max(range(len(val)), key=val.__getitem__),
        test=Evaluation(
            last=accuracy(top1),
            best=accuracy(top1 if best is None else best),
            agreement=agreement if config.alpha else None,
        ),
        relations=Relations(
            student_layers=list(config.student_layers),
            teacher_layers=list(config.teacher_layers),
            before={term: [1.0] * layers for term in terms},
            after={term: [relations] * layers for term in terms},
        )
        if relations is not None
        else None,
        timing=Timing(
            seconds=sum(parts.values()) if parts else 20.0,
            parts=parts,
            share_of_peak=share_of_peak,
            images_per_second=1000.0,
            peak_memory_mb=300.0,
            resumed=0,
            finished="2024-01-01T00:00:00+00:00",
        ),
    )
