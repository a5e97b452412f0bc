"""Experiments: one YAML each, resolved into the complete, validated settings of a run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fmd.errors import FmdError, nearest

ROOT = Path(__file__).resolve().parents[1]
LONGEST_NAME = 200  # of a variant with its overrides, which names a folder
LONGEST_VALUE = 40  # of an override in it
PRETRAINED = "timm/"  # a teacher that timm has weights of
PHOTOS = "photos/"  # data that are files of photographs
# Of experiments and variants: names of files, parts of commands and of patterns.
PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
PHOTO_SETTINGS = frozenset(
    ["image_size", "crop_pct", "auto_augment", "erasing", "repeats", "decoder", "skip_corrupt"]
)


def results_dir() -> Path:
    """Where runs are read and written: ``$FMD_RESULTS``, or ``results/`` of the project."""
    return Path(os.path.expanduser(os.environ.get("FMD_RESULTS") or ROOT / "results")).absolute()


def data_dir(folder: str) -> Path:
    """Where a folder of images lies, below ``$FMD_DATA``; :class:`FmdError` if that is not set."""
    root = os.environ.get("FMD_DATA")
    if not root and not os.path.isabs(folder):
        raise FmdError(f"set FMD_DATA to the folder that holds (or shall hold) {folder}/")
    return Path(os.path.expanduser(root or "/")).absolute() / folder


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunConfig(Strict):
    """Everything that decides the numbers of one run. Each field is a setting of an experiment's
    file, and KEY=VALUE changes it for a trial."""

    experiment: str = Field(description="a file of experiments/")
    variant: str = Field(description="one of the experiment's, or 'teacher'")
    seed: int = Field(0, ge=0, description="of initial weights, batches and augmentation")
    # data
    data: str = Field(description="a registered set, or 'photos/<folder>' under $FMD_DATA")
    data_fraction: float = Field(1.0, gt=0, le=1, description="share of the training images used")
    augment: bool = Field(True, description="change training images at random")
    # photographs in files: PHOTO_SETTINGS
    image_size: int = Field(224, ge=8, description="of photographs in files: side in pixels")
    crop_pct: float = Field(
        0.875, gt=0, le=1, description="of photographs in files: share of the side in evaluation"
    )
    auto_augment: str | None = Field(None, description="of photographs in files: timm's policy")
    erasing: float = Field(
        0.0, ge=0, le=1, description="of photographs in files: chance that a rectangle is erased"
    )
    repeats: int = Field(1, ge=1, description="of photographs in files: copies in a pass")
    decoder: Literal["pillow", "draft"] = Field(
        "pillow",
        description="of photographs in files: 'draft' reads large JPEGs at a part of their size",
    )
    skip_corrupt: bool = Field(
        False, description="of photographs in files: replace those that cannot be decoded"
    )
    # model
    model: str = Field(description="timm name of the network that is trained")
    model_args: dict[str, Any] = Field({}, description="more arguments of timm.create_model")
    init: str | None = Field(None, description="weights to start from, a safetensors file")
    # optimization
    epochs: int = Field(ge=1, description="passes over the training images")
    batch_size: int = Field(ge=1, description="images per optimizer step, over all processes")
    micro_batch: int | None = Field(
        None, ge=1, description="images per forward pass; the losses and mixup see no others"
    )
    lr: float = Field(gt=0, description="learning rate that the warm-up leads to")
    weight_decay: float = Field(0.05, ge=0, description="not of biases, norms and tokens")
    opt: str = Field("adamw", description="timm's name of the optimizer")
    warmup_epochs: int = Field(0, ge=0, description="in which the learning rate rises to lr")
    warmup_lr: float = Field(1e-6, ge=0, description="learning rate at the start of the warm-up")
    min_lr: float = Field(1e-5, ge=0, description="where the cosine over all epochs ends")
    schedule: Literal["step", "published"] = Field(
        "step",
        description="'step': lr set before every step; 'published': once an epoch and one epoch "
        "late, so the first two share theirs",
    )
    clip_grad: float | None = Field(None, gt=0, description="largest gradient norm")
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="highest chance to skip a layer")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a label given to all")
    mixup: float = Field(0.0, ge=0, description="Beta parameter of mixing images, 0 for none")
    cutmix: float = Field(0.0, ge=0, description="the same for rectangles of other images")
    mix_prob: float = Field(1.0, ge=0, le=1, description="share of forward passes that are mixed")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the moving average of the weights; none if not given",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="'auto': half precision on a GPU, float32 on a CPU"
    )
    half_weights: bool = Field(
        False, description="round the trained weights to float16 before they are tested and stored"
    )
    # distillation
    teacher: str | None = Field(
        None, description="a run, '<experiment>/seed-<n>', or pretrained, 'timm/<model>'"
    )
    teacher_args: dict[str, Any] = Field(
        {}, description="more arguments of timm.create_model, for a pretrained teacher"
    )
    teacher_weights: str | None = Field(
        None, description="a safetensors file instead of the hub; 'random' for a dry run"
    )
    alpha: float = Field(
        1.0, ge=0, le=1, description="weight of the teacher's logits against labels"
    )
    temperature: float = Field(1.0, gt=0, description="softens both logits, if logit is 'soft'")
    logit: Literal["soft", "hard"] = Field(
        "soft", description="learn the teacher's distribution, or its most likely class"
    )
    intra: float = Field(0.0, ge=0, description="weight of the loss on relations within an image")
    inter: float = Field(
        0.0,
        ge=0,
        description="weight of the loss on relations between images at one patch position",
    )
    random: float = Field(
        0.0, ge=0, description="weight of the loss on relations of random patches of the batch"
    )
    full: float = Field(
        0.0, ge=0, description="weight of the loss on relations of all patches of the batch"
    )
    num_patches: int = Field(192, ge=1, description="K of the random term")
    student_layers: tuple[int, ...] = Field((), description="compared by position, 0 the first")
    teacher_layers: tuple[int, ...] = Field((), description="with these of the teacher")

    @model_validator(mode="after")
    def _consistent(self):
        if self.teacher is None and self.distils:
            raise ValueError("a run with alpha or manifold weights above 0 needs a teacher")
        # Without a manifold weight their relations are measured all the same.
        if len(self.student_layers) != len(self.teacher_layers):
            raise ValueError("student_layers and teacher_layers must be equally long")
        if self.has_manifold and not self.student_layers:
            raise ValueError("manifold weights above 0 need student_layers and teacher_layers")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch {self.micro_batch}"
            )
        taken = {"num_classes", "in_chans", "drop_path_rate"} & self.model_args.keys()
        if taken:
            raise ValueError(
                f"model_args must not hold {', '.join(sorted(taken))}: the data give the classes "
                "and channels, and drop_path_rate is a setting of its own"
            )
        pretrained = (self.teacher or "").startswith(PRETRAINED)
        if (self.teacher_args or self.teacher_weights) and not pretrained:
            raise ValueError("teacher_args and teacher_weights go with a teacher 'timm/<model>'")
        return self

    @property
    def distils(self) -> bool:
        return self.alpha > 0 or self.has_manifold

    @property
    def has_manifold(self) -> bool:
        return any((self.intra, self.inter, self.random, self.full))

    @property
    def photos(self) -> str | None:
        """The folder of photographs, below ``$FMD_DATA``; None for a registered set."""
        return self.data.removeprefix(PHOTOS) if self.data.startswith(PHOTOS) else None

    @property
    def name(self) -> str:
        """'<experiment>/<variant>/seed-<n>', as in the paths of a run's files."""
        return f"{self.experiment}/{self.variant}/seed-{self.seed}"

    @property
    def key(self) -> str:
        """Twelve hex digits that change with any setting.

        Where the teacher's weights lie is none: the record names them by their fingerprint.
        """
        # Defaults left out: a new field does not make the records of old runs look edited.
        settings = self.model_dump(mode="json", exclude_defaults=True, exclude={"teacher_weights"})
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def path(self, kind: str, suffix: str) -> Path:
        """Where a file of this run lives, e.g. ``results/runs/digits/full/seed-0.json``."""
        return results_dir() / kind / f"{self.name}{suffix}"


class Stage(Strict):
    """Runs of equal importance: all variants of the first seed, then of the next."""

    experiment: str | None = Field(None, description="this one if not given")
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    overrides: dict[str, Any] = {}


class Experiment(Strict):
    """One file of ``experiments/``; :meth:`run` and :meth:`teacher_run` resolve it."""

    name: str
    title: str
    extends: str | None = None
    data: str
    train: dict[str, Any]
    teacher: dict[str, Any] | None = Field(None, description="none if it is pretrained")
    student: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    added_seeds: tuple[int, ...] = Field(
        (), description="those of the seeds that were added when the others had been seen"
    )
    order: tuple[Stage, ...] = Field((), description="what fmd.batch runs, most important first")
    teacher_experiment: str | None = Field(
        None, description="whose teacher; this one's if not given"
    )

    @model_validator(mode="after")
    def _consistent(self):
        for what, name in (("experiment", self.name), *(("variant", v) for v in self.variants)):
            if not re.fullmatch(PLAIN_NAME, name):
                raise ValueError(f"the {what} '{name}': letters, digits and _ . - make a name")
        if "teacher" in self.variants:
            raise ValueError("the variant 'teacher': that is what the teacher's run is called")
        if not self.variants or not self.seeds:
            raise ValueError("at least one variant and one seed are needed")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed is given twice: {list(self.seeds)}")
        return self

    def teacher_run(self, seed: int = 0, **overrides: Any) -> RunConfig:
        if self.teacher is None:
            raise FmdError(f"experiment '{self.name}' trains no teacher: it takes a pretrained one")
        return self._resolve(
            "teacher", seed, {**self.train, "alpha": 0.0, **self.teacher}, overrides
        )

    def run(self, variant: str, seed: int = 0, **overrides: Any) -> RunConfig:
        """Settings of a student's run. Overrides become part of the variant's name.

        Raises :class:`FmdError` for an unknown variant or setting, or a value out of range.
        """
        if variant == "teacher":
            return self.teacher_run(seed, **overrides)
        if variant not in self.variants:
            raise FmdError(
                f"experiment '{self.name}' has no variant '{variant}'"
                f"{nearest(variant, self.variants)}"
            )
        settings = {**self.train, **self.student, **self.variants[variant]}
        if self.teacher is not None or self.teacher_experiment is not None:
            settings.setdefault("teacher", f"{self.teacher_experiment or self.name}/seed-0")
        return self._resolve(variant, seed, settings, overrides)

    def _resolve(self, variant: str, seed: int, settings: dict, overrides: dict) -> RunConfig:
        overrides = {k: v for k, v in overrides.items() if v is not None}
        reserved = {"experiment", "variant", "seed"} & {*settings, *overrides}
        if reserved:
            raise FmdError(f"{', '.join(sorted(reserved))} cannot be set in {self.name}'s settings")
        values = {"data": self.data, **settings, **overrides}
        config = _validate(
            RunConfig,
            {"experiment": self.name, "variant": variant, "seed": seed, **values},
            f"run {self.name}/{variant}",
        )
        # Else the run would pass for one of other settings.
        idle = PHOTO_SETTINGS & overrides.keys() if config.photos is None else ()
        if idle:
            raise FmdError(
                f"run {self.name}/{variant}: {', '.join(sorted(idle))} would change nothing: "
                f"only for photographs in files (data=photos/<folder>), not for {config.data}"
            )
        # A run with other settings must never pass for the stored one: it gets a name of its own,
        # and just one, however the values were written.
        checked = config.model_dump(mode="json", include=overrides.keys() - {"teacher_weights"})
        label = "+".join([variant, *(f"{k}={_plain(v)}" for k, v in sorted(checked.items()))])
        if len(label) > LONGEST_NAME:
            raise FmdError(
                f"{len(checked)} overrides are too many for a run's name: give them in a file of "
                f"experiments/ that extends {self.name}"
            )
        return config.model_copy(update={"variant": label})


def split_variant(label: str) -> tuple[str, dict[str, str]]:
    """'decoupled+epochs=2+lr=0.1' to ('decoupled', {'epochs': '2', 'lr': '0.1'})."""
    variant, *overrides = re.split(r"\+(?=[a-z_]+=)", label)  # 1e+30 is a value
    return variant, dict(override.split("=", 1) for override in overrides)


def is_teacher(label: str) -> bool:
    """Whether a run of this name, overrides included, is a teacher's."""
    return split_variant(label)[0] == "teacher"


def _plain(value: Any) -> str:
    text = json.dumps(value).replace('"', "").replace(" ", "").replace("/", "-")
    # What is too long for a name, or looks like another override in it, such as another run's file.
    if len(text) > LONGEST_VALUE or "=" in text:
        return hashlib.sha256(text.encode()).hexdigest()[:12]
    return text


def parse_overrides(words: list[str]) -> dict:
    """['lr=1e-3', …] to settings, with YAML's types; pydantic checks them later."""
    overrides = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise FmdError(f"'{word}' must read KEY=VALUE, e.g. lr=0.001")
        try:
            overrides[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # of a date that is none
            raise FmdError(f"'{word}': the value is not YAML") from None
        if key in ("variant", "seed"):
            raise FmdError(
                f"'{word}' is no override: the {key} has an argument of its own"
                + (" (--seed; in a notebook, a parameter)" if key == "seed" else "")
            )
        value = overrides[key]
        # YAML reads {a:1}, without a space, as a key 'a:1' of no value.
        if value is None or (isinstance(value, dict) and None in value.values()):
            raise FmdError(f"'{word}' holds no value, e.g. model_args='{{depth: 2}}'")
    return overrides


def _validate(cls: type[BaseModel], values: dict, what: str):
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise FmdError(
                f"{what}: unknown setting '{name}'{nearest(name, cls.model_fields)}"
            ) from None
        # What is missing has no value: there the input is all that was given.
        value = "" if first["type"] == "missing" else f" = {first['input']!r}"
        where = f"{name}{value}: " if name else ""
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type":
            message = "must be a list, in brackets"
        raise FmdError(f"{what}: {where}{message[0].lower()}{message[1:]}") from None


def own_teacher(config: RunConfig) -> RunConfig | None:
    """The run that a student's needs first; None if its teacher is pretrained, or if it has none.

    Raises :class:`FmdError` where the settings name no teacher's run.
    """
    if not config.distils or config.teacher.startswith(PRETRAINED):
        return None
    return teacher_config(config)


def teacher_config(config: RunConfig) -> RunConfig:
    """Settings of the teacher's run that a student's settings name."""
    experiment, _, seed = config.teacher.rpartition("/seed-")
    if not experiment or not seed.isdigit():
        raise FmdError(f"teacher '{config.teacher}' must read '<experiment>/seed-<n>'")
    return load_experiment(experiment).teacher_run(int(seed))


def experiment_names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """Read ``experiments/<name>.yaml``; with ``extends`` it is merged over that experiment."""
    return _validate(Experiment, {**_extended(name), "name": name}, f"experiments/{name}.yaml")


def _extended(name: str, children: tuple[str, ...] = ()) -> dict:
    """The values of a file over those of all that it extends."""
    values = _read(name)
    parent = values.get("extends")
    if not parent:
        return values
    if not isinstance(parent, str):
        raise FmdError(f"experiments/{name}.yaml: extends = {parent!r}: give an experiment's name")
    chain = (*children, name)
    if parent in chain:
        raise FmdError(
            f"experiments/{name}.yaml extends itself ({' -> '.join((*chain, parent))}): "
            "one of these must extend none of the others"
        )
    base = _extended(parent, chain)
    if "teacher" in values:
        base.pop("teacher_experiment", None)
    elif base.get("teacher") is not None:
        base.setdefault("teacher_experiment", parent)
    values = _merge(base, values)
    if isinstance(values.get("variants"), dict):  # else validation says what is wrong
        # A variant of the parent that makes no sense here is set to nothing.
        values["variants"] = {k: v for k, v in values["variants"].items() if v is not None}
    return values


class _OneOfEachKey(yaml.SafeLoader):
    """YAML itself keeps the last of two equal keys, and so would lose a variant without a word."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"'{key.value}' is given a second time in line {line}")
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _read(name: str) -> dict:
    path = ROOT / "experiments" / f"{name}.yaml"
    if not path.parent.is_dir():
        raise FmdError(
            "experiments/ is not part of the installed package: clone the repository and "
            "pip install -e '.[all]' there"
        )
    if not path.is_file():
        raise FmdError(f"no experiment '{name}'{nearest(name, experiment_names())}")
    try:
        values = yaml.load(path.read_text(), _OneOfEachKey)
    except (yaml.YAMLError, ValueError) as error:
        raise FmdError(f"experiments/{name}.yaml is not YAML: {error}".replace("\n", " ")) from None
    if not isinstance(values, dict):
        raise FmdError(f"experiments/{name}.yaml must hold a mapping of settings")
    return values


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = {**base[key], **value} if both else value
    return merged
