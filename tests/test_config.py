"""Experiments and the settings of a run: what is refused, and what changes a run's key."""

import re

import pytest
import yaml
from tiny import TESTS

import fmd.config
from fmd.batch import plan
from fmd.config import (
    RunConfig,
    experiment_names,
    load_experiment,
    own_teacher,
    parse_overrides,
    results_dir,
    split_variant,
)
from fmd.errors import FmdError

ROOT = TESTS.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project whose experiments/ holds copies of the tests' own ``tiny``."""
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(fmd.config, "ROOT", tmp_path)
    content = (TESTS / "experiments" / "tiny.yaml").read_text()
    (tmp_path / "experiments" / "tiny.yaml").write_text(content)
    return tmp_path / "experiments"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_resolves(name):
    experiment = load_experiment(name)
    if experiment.teacher is not None:
        assert experiment.teacher_run().teacher is None
    else:
        with pytest.raises(FmdError, match="trains no teacher: it takes a pretrained one"):
            experiment.run("teacher")
    for variant in experiment.variants:
        for seed in experiment.seeds:
            config = experiment.run(variant, seed)
            assert (config.experiment, config.variant, config.seed) == (name, variant, seed)
            assert config.path("runs", ".json") == (
                results_dir() / "runs" / name / variant / f"seed-{seed}.json"
            )


def test_digits_has_the_variants_and_seeds_of_the_comparison():
    digits = load_experiment("digits")
    assert list(digits.variants) == [
        *("none", "soft-kd", "intra", "inter", "random", "decoupled", "full")
    ]
    assert len(digits.seeds) == 5
    assert digits.run("none").alpha == 0
    decoupled = digits.run("decoupled")
    assert (decoupled.intra, decoupled.inter, decoupled.random) == (4.0, 0.1, 0.2)
    assert decoupled.num_patches == 192


def test_variant_settings_win_over_the_student_and_that_over_train(folder):
    values = yaml.safe_load((folder / "tiny.yaml").read_text())
    values["train"] |= {"lr": 1.0, "epochs": 1, "opt": "sgd"}
    values["student"] |= {"lr": 2.0, "epochs": 2}
    values["variants"]["none"] |= {"lr": 3.0}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    config = load_experiment("tiny").run("none")
    assert (config.lr, config.epochs, config.opt) == (3.0, 2, "sgd")
    assert load_experiment("tiny").run("none", lr=4.0).lr == 4.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: load_experiment("tyni"), r"no experiment 'tyni' \(did you mean 'tiny'"),
        (lambda e: e.run("sort-kd"), "no variant 'sort-kd' .*did you mean 'soft-kd'"),
        (lambda e: e.run("none", epoch=3), "unknown setting 'epoch' .*did you mean 'epochs'"),
        (lambda e: e.run("none", epochs=0), "epochs = 0: input should be greater than or equal"),
        (lambda e: e.run("none", epochs=2.5), "epochs = 2.5: input should be a valid integer"),
        (lambda e: e.run("none", lr="fast"), "lr = 'fast': input should be a valid number"),
        (lambda e: e.run("none", lr=float("nan")), "lr = nan: "),
        (lambda e: e.run("none", clip_grad=float("inf")), "clip_grad = inf: .* a finite number"),
        (lambda e: parse_overrides(["lr=2024-13-01"]), "'lr=2024-13-01': the value is not YAML"),
        (lambda e: e.run("none", alpha=1.5), "alpha = 1.5: input should be less than or equal"),
        (lambda e: e.run("none", intra=-1.0), "intra = -1.0: "),
        (lambda e: e.run("none", num_patches=0), "num_patches = 0: "),
        (lambda e: e.run("none", temperature=0), "temperature = 0: "),
        (lambda e: e.run("none", logit="sort"), "logit = 'sort': input should be 'soft' or 'hard'"),
        (lambda e: e.run("none", precision="fp16"), "precision = 'fp16': input should be 'auto'"),
        (lambda e: e.run("none", model_args=3), "model_args = 3: input should be a valid dict"),
        (lambda e: e.run("none", -1), "seed = -1: "),
        (lambda e: e.run("full", teacher_layers=[0]), "must be equally long"),
        (lambda e: e.run("soft-kd", student_layers=[0]), "must be equally long"),
        (
            lambda e: e.run("full", student_layers=[], teacher_layers=[]),
            "manifold weights above 0 need student_layers and teacher_layers",
        ),
        (
            lambda e: e.run("none", erasing=0.25, decoder="pillow"),
            r"tiny/none: decoder, erasing would change nothing: only for .*, not for digits",
        ),
        (lambda e: e.teacher_run(alpha=0.5), "needs a teacher"),
        (lambda e: e.run("none", experiment="x"), "experiment cannot be set"),
    ],
)
def test_wrong_settings_are_one_line(tiny, call, message):
    with pytest.raises(FmdError, match=message) as caught:
        call(tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1", "experiments/bad.yaml is not YAML"),
        ("a: 2024-13-01", "experiments/bad.yaml is not YAML"),
        (
            "extends: tiny\nvariants:\n  a: {lr: 1.0}\n  b: {}\n  a: {lr: 2.0}",
            "bad.yaml is not YAML: 'a' is given a second time in line 5",
        ),
        ("variants: !!map 3", "experiments/bad.yaml is not YAML"),
        ("- a list", "must hold a mapping of settings"),
        ("title: t", "experiments/bad.yaml: data: field required"),
        ("extends: tiny\nepochs: 3", "unknown setting 'epochs'"),
        ("extends: tyni", "no experiment 'tyni' .*did you mean 'tiny'"),
        ("extends: tiny\nseeds: 3", "seeds = 3: "),
        ("extends: tiny\nvariants: {none: 3}", "variants.none = 3: "),
        ("extends: tiny\nvariants:", "variants = None: input should be a valid dictionary"),
        ("extends: bad", r"bad.yaml extends itself \(bad -> bad\)"),
        ("extends: 3", "bad.yaml: extends = 3: give an experiment's name"),
        *(
            (
                f"extends: tiny\nvariants: {{'{name}': {{}}}}",
                "letters, digits and _ . - make a name",
            )
            for name in ("..", "a/b", "two words", "none+lr=3", "a|b", "{x}", "")
        ),
        ("extends: tiny\nvariants: {teacher: {}}", "that is what the teacher's run is called"),
        ("extends: tiny\nseeds: []", "at least one variant and one seed"),
        ("extends: tiny\nseeds: [0, 1, 0]", r"a seed is given twice: \[0, 1, 0\]"),
    ],
)
def test_wrong_files_are_one_line(folder, text, message):
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(FmdError, match=message) as caught:
        load_experiment("bad")
    assert "\n" not in str(caught.value)
    assert experiment_names() == ["bad", "tiny"]


def test_the_name_is_the_files(folder):
    (folder / "mine.yaml").write_text("extends: tiny\nname: other")
    assert load_experiment("mine").name == "mine"


def test_extends_merges_one_level_deep_and_shares_the_teacher(folder):
    (folder / "longer.yaml").write_text(
        "extends: tiny\nstudent: {epochs: 9}\nvariants: {hard: {logit: hard}}\n"
    )
    base, longer = load_experiment("tiny"), load_experiment("longer")
    assert longer.run("none").epochs == 9 and base.run("none").epochs != 9
    assert longer.run("none").lr == base.run("none").lr
    assert set(longer.variants) == {*base.variants, "hard"}
    assert longer.run("hard").teacher == base.run("soft-kd").teacher == "tiny/seed-0"
    assert longer.run("hard").experiment == "longer"


def test_extends_with_another_teacher_uses_that(folder):
    (folder / "other.yaml").write_text("extends: tiny\nteacher: {epochs: 99}\n")
    assert load_experiment("other").run("soft-kd").teacher == "other/seed-0"
    assert load_experiment("other").teacher_run().epochs == 99


def test_a_students_teacher_is_found(folder):
    (folder / "far.yaml").write_text(
        "extends: tiny\nvariants: {far: {teacher: tiny/seed-7}, odd: {teacher: tyni/seed-0}}\n"
    )
    far = load_experiment("far")
    assert own_teacher(far.run("none")) is None
    assert own_teacher(far.run("soft-kd")).name == "tiny/teacher/seed-0"
    assert own_teacher(far.run("far")).name == "tiny/teacher/seed-7"
    assert own_teacher(far.run("soft-kd", teacher="timm/resnet10t")) is None
    with pytest.raises(FmdError, match=r"no experiment 'tyni' .*did you mean 'tiny'"):
        plan(far)
    (folder / "far.yaml").write_text("extends: tiny\nvariants: {far: {teacher: tiny/seed-7}}\n")
    runs = plan(load_experiment("far"))
    assert [run.name for run in runs[:2]] == ["tiny/teacher/seed-0", "tiny/teacher/seed-7"]


def test_extends_reaches_through_files_that_extend(folder):
    (folder / "longer.yaml").write_text("extends: tiny\nstudent: {epochs: 9}\n")
    (folder / "longest.yaml").write_text("extends: longer\nstudent: {lr: 0.5}\nvariants: {full: }")
    run = load_experiment("longest").run("soft-kd")
    assert (run.epochs, run.lr, run.teacher) == (9, 0.5, "tiny/seed-0")
    assert "full" not in load_experiment("longest").variants
    (folder / "alone.yaml").write_text("extends: tiny\nteacher: null\n")
    (folder / "other.yaml").write_text("extends: alone\n")
    assert load_experiment("other").run("none").teacher is None
    (folder / "other.yaml").write_text("extends: longer\nteacher: {epochs: 99}\n")
    assert load_experiment("other").run("soft-kd").teacher == "other/seed-0"
    (folder / "longer.yaml").write_text("extends: longest\n")
    with pytest.raises(FmdError, match=r"itself \(longest -> longer -> longest\): one of"):
        load_experiment("longest")


def test_inherited_settings_of_photographs_are_idle_for_other_data():
    run = load_experiment("imagenet").run("none", data="digits")
    assert run.photos is None and run.image_size == 224


def test_overrides_are_part_of_the_name(tiny):
    config = tiny.run("decoupled", 3, lr=0.5, epochs=2)
    assert config.variant == "decoupled+epochs=2+lr=0.5"
    assert config.path("runs", ".json").parent.name == config.variant
    assert tiny.run("decoupled", lr=0.25).path("runs", ".json") != config.path("runs", ".json")
    assert tiny.teacher_run(lr=0.5).variant == "teacher+lr=0.5"
    same = [tiny.run("decoupled", **parse_overrides([word])) for word in ("lr=1e-3", "lr=0.001")]
    assert same[0] == same[1]
    assert tiny.run("teacher") == tiny.teacher_run()
    assert tiny.run("none", epochs=None) == tiny.run("none")  # None: as in the experiment
    nested = tiny.run("none", model_args={"depth": 1}, data="a/b")
    assert nested.path("runs", ".json").parent.parent.name == "tiny"  # no folder of its own


def test_a_value_that_cannot_be_in_a_name_is_shortened(tiny):
    start = "results/weights/imagenet/decoupled+epochs=20/seed-0.safetensors"
    label = tiny.run("decoupled", init=start, lr=0.5).variant
    assert re.fullmatch("decoupled\\+init=[0-9a-f]{12}\\+lr=0.5", label)
    assert tiny.run("decoupled", init=start + "x", lr=0.5).variant != label
    assert len(tiny.run("none", model_args={"x": "y" * 300}).variant) < 40
    many = dict.fromkeys(("mixup", "cutmix", "mix_prob", "label_smoothing", "alpha"), 1 / 3)
    many |= dict.fromkeys(("intra", "inter", "random", "full", "lr", "weight_decay"), 1 / 3)
    with pytest.raises(FmdError, match=r"11 overrides are too many .* extends tiny"):
        tiny.run("decoupled", **many)


def test_key_changes_with_any_setting(tiny):
    config = tiny.run("decoupled")
    changed = {
        **dict.fromkeys(("experiment", "variant", "data", "model", "opt"), "other"),
        **dict.fromkeys(("precision",), "bfloat16"),
        **{"model_args": {"depth": 1}, "teacher": "other/seed-0", "logit": "hard"},
        **{
            "augment": False,
            "half_weights": True,
            "student_layers": (1, 0),
            "teacher_layers": (1, 0),
        },
    }
    # Where a file lies is no setting: the record has its fingerprint.
    for name in RunConfig.model_fields.keys() - {"teacher_weights"}:
        old = getattr(config, name)
        new = changed[name] if name in changed else (old + 1 if type(old) is int else 0.625)
        assert old != new, name
        assert config.model_copy(update={name: new}).key != config.key, name
    assert RunConfig(**config.model_dump()).key == config.key
    assert len(config.key) == 12


def test_settings_cannot_be_changed(tiny):
    with pytest.raises(ValueError, match="frozen"):
        tiny.run("none").lr = 1.0


def test_results_folder_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path / "here"))
    assert results_dir() == tmp_path / "here"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FMD_RESULTS", "there")
    assert results_dir() == tmp_path / "there"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FMD_RESULTS", "~/x")  # as quoted in a file, where no shell expands it
    assert results_dir() == tmp_path / "x"
    monkeypatch.delenv("FMD_RESULTS")
    assert results_dir() == ROOT / "results"


def test_a_name_is_split_into_variant_and_overrides(tiny):
    label = tiny.run("decoupled", lr=1e30, epochs=2).variant
    assert label == "decoupled+epochs=2+lr=1e+30"
    assert split_variant(label) == ("decoupled", {"epochs": "2", "lr": "1e+30"})
    assert split_variant("soft-kd") == ("soft-kd", {})
