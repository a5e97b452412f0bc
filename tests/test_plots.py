"""Figures hold what they should, twice the same, and say it in words too."""

import numpy as np
import pytest
import torch
from factories import make_record
from PIL import Image
from safetensors.torch import save_file

from fmd import plots
from fmd.build import load_trained
from fmd.config import load_experiment
from fmd.data import load_data
from fmd.errors import FmdError
from fmd.losses import intra_image_loss
from fmd.models import TokenModel, create_model, match_grids
from fmd.results import summarize, tidy


@pytest.fixture
def records():
    return [
        make_record("teacher", 0, 98.0, val=(90.0, 97.0, 98.0, 98.5)),
        *(make_record("soft-kd", s, 70.0 + s, val=(30.0, 50.0, 70.0 + s)) for s in range(3)),
        *(make_record("intra", s, 69.0, relations=0.2) for s in range(3)),
        *(
            make_record("full", s, 80.0 + 2 * s, val=(40.0, 60.0, 80.0 + s), relations=0.1)
            for s in range(3)
        ),
    ]


@pytest.fixture
def summary(records):
    return summarize(tidy(records))


def lines_by_label(axes):
    return {line.get_label(): line for line in axes.get_lines()}


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.044, "0.0"), (0.044, "0.0"), (0.06, "+0.1"), (-1.25, "−1.2"), (float("nan"), "–")],
)
def test_differences_have_a_true_sign_or_none(value, text):
    assert plots.number(value, "+") == text


def test_learning_curves_have_a_mean_line_and_band_per_variant(records):
    figure = plots.learning_curves(records)
    (axes,) = figure.axes
    lines = lines_by_label(axes)
    assert set(lines) == {"soft-kd", "intra", "full", "teacher, last epoch"}
    assert list(lines["full"].get_xdata()) == [1, 2, 3]
    assert list(lines["full"].get_ydata()) == [40.0, 60.0, 81.0]
    assert set(lines["teacher, last epoch"].get_ydata()) == {98.5}
    assert axes.get_xlabel() == "epoch" and "validation top-1" in axes.get_ylabel()
    assert len(axes.collections) == 3
    band = next(
        c
        for c in axes.collections
        if c.get_facecolor()[0][:3] == pytest.approx(np.array([0, 0x9E, 0x73]) / 255)
    )
    assert band.get_datalim(axes.transData).y1 == pytest.approx(82.0)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["teacher, last epoch", "full", "soft-kd", "intra"]
    assert "3 seeds" in axes.get_legend().get_title().get_text()
    assert figure.alt.index("full 81.0 %") < figure.alt.index("soft-kd 71.0 %")


def test_learning_curves_of_one_run_have_no_band():
    (axes,) = plots.learning_curves([make_record("teacher", 0)]).axes
    assert list(lines_by_label(axes)) == ["teacher"] and not axes.collections
    assert axes.get_legend().get_title().get_text() == "one seed"


def test_forest_shows_each_difference_around_zero(summary):
    figure = plots.forest(summary)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["full", "intra"]
    assert "soft-kd" in axes.get_xlabel()
    zero, *points = axes.get_lines()
    assert list(zero.get_xdata()) == [0, 0]
    centres = [line.get_xdata()[0] for line in points if line.get_linestyle() == "None"]
    assert 11.0 in centres and -2.0 in centres
    texts = [text.get_text() for text in axes.texts]
    assert texts[0].startswith("+11.0 ± 2.5") and texts[1].startswith("−2.0 ± 2.5")
    assert all("(3 pairs)" in text for text in texts)
    assert "largest first: full +11.0 ± 2.5 (3 pairs), intra −2.0 ± 2.5" in figure.alt


def test_forest_of_one_seed_has_no_bar():
    records = [make_record("soft-kd", 0, 70.0), make_record("full", 0, 75.0)]
    (axes,) = plots.forest(summarize(tidy(records))).axes
    assert axes.texts[0].get_text() == "+5.0 ± – (1 pair)"
    assert not axes.collections


def test_speed_has_one_point_a_variant(summary):
    figure = plots.speed(summary)
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["soft-kd", "intra", "full"]
    assert "full: 82.0 % at 1000 images per second" in figure.alt


def test_layer_similarity_shows_before_and_after_per_pair(records):
    other = make_record("full", 4, relations=9.0, student_layers=[0], teacher_layers=[0])
    figure = plots.layer_similarity([*records, other])
    config = load_experiment("digits").run("full")
    pairs = [f"{s}–{t}" for s, t in zip(config.student_layers, config.teacher_layers)]
    assert [axes.get_title().partition(":")[0] for axes in figure.axes] == [
        "intra",
        "inter",
        "full",
    ]
    lines = lines_by_label(figure.axes[0])
    assert set(lines) == {"before training", "intra", "full"}
    assert list(lines["before training"].get_ydata()) == [1.0] * len(pairs)
    assert list(lines["full"].get_ydata()) == pytest.approx([0.1] * len(pairs))
    figure.draw_without_rendering()
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == pairs
    left_out = f"(without {other.config.variant}: other layers)"
    assert figure.get_supxlabel() == f"student–teacher layers {left_out}"
    assert plots.layer_similarity(records).get_supxlabel() == "student–teacher layers"
    assert figure.alt.endswith("Most like the teacher within an image: full.")


def test_layer_similarity_needs_relations():
    with pytest.raises(ValueError, match="compare layers"):
        plots.layer_similarity([make_record("soft-kd")])


def test_relation_map_is_the_cosine_between_patches():
    tokens = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    norms = np.linalg.norm(tokens.numpy(), axis=1)
    expected = (tokens @ tokens.T).numpy() / np.outer(norms, norms)
    np.testing.assert_allclose(plots.relation_map(tokens), expected, atol=1e-5)


def test_relation_maps_share_a_scale_and_state_distances():
    teacher, student = np.eye(4), np.full((4, 4), 0.5)
    figure = plots.relation_maps({"teacher": teacher, "student": student}, image=np.zeros((8, 8)))
    image, first, second, bar = figure.axes
    assert [a.get_title() for a in (image, first, second)] == ["image", "teacher", "student"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0.0, 1.0)
    assert second.get_xlabel() == "distance 0.250"
    assert bar.get_ylabel() == "cosine"
    assert "student 0.250" in figure.alt


def test_relation_maps_do_not_feel_the_last_bits():
    maps = {"teacher": np.eye(4) - 0.3, "student": np.full((4, 4), 0.5)}
    nearly = {title: values * (1 + 1e-7) for title, values in maps.items()}
    first, second = (plots.relation_maps(m, image=np.zeros((8, 8))).svg() for m in (maps, nearly))
    assert first == second


def store_random_weights(runs):
    for seed, run in enumerate(runs):
        torch.manual_seed(seed)
        model = create_model(run.model, 10, 1, **run.model_args)
        path = run.path("weights", ".safetensors")
        path.parent.mkdir(parents=True)
        save_file(model.state_dict(), path)


def shown_maps(figure) -> dict[str, np.ndarray]:
    panels = [axes for axes in figure.axes if axes.images]
    return {axes.get_title(): axes.images[0].get_array() for axes in panels}


def test_trained_relation_maps_show_teacher_untrained_and_each_student(tmp_path, monkeypatch):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    experiment = load_experiment("digits")
    teacher = experiment.teacher_run()
    runs = {"logits": experiment.run("soft-kd"), "full": experiment.run("full")}
    store_random_weights([teacher, *runs.values()])
    data = load_data("digits")
    shown = shown_maps(plots.trained_relation_maps(runs, data))
    assert list(shown) == ["image", "teacher", "untrained", "logits", "full"]
    assert not np.allclose(shown["logits"], shown["full"])  # each has its own weights
    model = load_trained(teacher, data)
    with torch.no_grad():
        (tokens,) = TokenModel(model, [3])(data.normalize(data.test.images[:1]))[1]
    np.testing.assert_allclose(shown["teacher"], plots.relation_map(tokens[0]), atol=1e-6)


def test_trained_relation_maps_of_another_grid_are_as_the_losses_compare_them(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    experiment = load_experiment("digits")
    small = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    swin = experiment.run(
        "full",
        model="swin_tiny_patch4_window7_224",
        model_args=small | {"window_size": 2},
        student_layers=[0, 1],
        teacher_layers=[0, 3],
    )
    store_random_weights([experiment.teacher_run(), swin])
    data = load_data("digits")
    other = experiment.run("full")  # another network: left out
    figure = plots.trained_relation_maps({"swin": swin, "other": other}, data)
    shown = shown_maps(figure)
    assert list(shown) == ["image", "teacher", "untrained", "swin"]
    assert all(shown[title].shape == (4, 4) for title in list(shown)[1:])
    image = data.normalize(data.test.images[:1])
    with torch.no_grad():
        student = TokenModel(load_trained(swin, data), [1])(image)[1][0]
        teacher = TokenModel(load_trained(experiment.teacher_run(), data), [3])(image)[1][0]
        loss = intra_image_loss(*match_grids(student, teacher)).item()
    assert figure.axes[3].get_xlabel() == f"distance {loss:.3f}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_layers": [], "teacher_layers": []}, "compares no layers"),
        ({"model": "resnet10t", "model_args": {}, "student_layers": [4]}, "single patches"),
    ],
)
def test_relations_that_are_none_are_one_error(tmp_path, monkeypatch, settings, message):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    experiment = load_experiment("digits")
    run = experiment.run("soft-kd", **{"teacher_layers": [3]} | settings)
    store_random_weights([experiment.teacher_run(), run])
    with pytest.raises(FmdError, match=message):
        plots.trained_relation_maps({"run": run}, load_data("digits"))


def test_trained_relation_maps_without_weights_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
    students = {"full": load_experiment("digits").run("full")}
    with pytest.raises(FmdError, match="no weights at"):
        plots.trained_relation_maps(students, load_data("digits"))


def test_variants_differ_in_colour_and_overrides_look_like_their_variant():
    labels = [
        *load_experiment("digits").variants,
        "decoupled+intra=8",
        "mine",
        "other",
        "mine+lr=1",
    ]
    styles = plots._styles(labels)
    assert styles["decoupled+intra=8"] == styles["decoupled"]
    assert styles["mine+lr=1"] == styles["mine"]
    looks = [{style[part] for style in styles.values()} for part in ("color", "marker")]
    assert [len(look) for look in looks] == [9, 9]
    own = plots._styles([f"mine{i}" for i in range(30)]).values()
    assert len({tuple(style.values()) for style in own}) == 30


def renamed(config, variant: str):
    return config.model_copy(update={"variant": variant})


def test_a_variant_of_ones_own_looks_alike_in_figures_of_the_same_records(records):
    for name, relations in (("mine", None), ("other", 0.3)):
        record = make_record("full", 0, 75.0, relations=relations)
        records.append(record.model_copy(update={"config": renamed(record.config, name)}))
    curves = plots.learning_curves(records)
    layers = plots.layer_similarity(records)  # without "mine", which has no relations
    colors = [
        {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
        for figure in (curves, layers)
    ]
    assert colors[0]["other"] == colors[1]["other"] != colors[0]["mine"]


def test_save_writes_the_same_svg_twice_with_text_as_text(records, tmp_path):
    first = plots.save(plots.learning_curves(records), tmp_path / "a" / "curves")
    second = plots.save(plots.learning_curves(records), tmp_path / "b" / "curves")
    assert first == tmp_path / "a" / "curves.svg"
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "a/curves.png").read_bytes() == (tmp_path / "b/curves.png").read_bytes()
    svg = first.read_text()
    assert "<text" in svg and "soft-kd" in svg and "<dc:date>" not in svg


def test_save_writes_a_double_size_png_and_the_alternative_text(summary, tmp_path):
    figure = plots.forest(summary)
    plots.save(figure, tmp_path / "v1.2" / "forest")
    width, height = figure.get_size_inches()
    with Image.open(tmp_path / "v1.2/forest.png") as image:
        assert image.size == (int(width * 200), int(height * 200))
        assert image.convert("RGBA").getpixel((2, 2)) == (255, 255, 255, 255)
    assert (tmp_path / "v1.2/forest.txt").read_text() == figure.alt + "\n"


def test_a_notebook_shows_the_figure_with_its_alternative_text(summary):
    figure = plots.speed(summary)
    html = figure._repr_html_()
    assert html.startswith('<img alt="Test top-1 against training speed.')
    assert "data:image/svg+xml;base64," in html
