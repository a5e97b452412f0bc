"""The digits: fixed stratified splits, their fingerprint, batches and augmentation."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fmd.data import download_tiny_imagenet, load_data
from fmd.errors import FmdError

SPLITS = ("train", "val", "test")


@pytest.fixture
def digits():
    return load_data("digits")


def rows(split) -> set:
    return {image.numpy().tobytes() for image in split.images}


def test_splits_are_fixed(digits):
    # Every record names this fingerprint: if it changes, no stored run can be compared any more.
    assert digits.describe() == {
        "name": "digits",
        "fingerprint": "94de052601feb2c8",
        "train": 1078,
        "val": 269,
        "test": 450,
    }


def test_splits_hold_every_image_once(digits):
    bundled = (load_digits().images * 15).astype(np.uint8)[:, None]
    together = np.concatenate([getattr(digits, name).images.numpy() for name in SPLITS])
    assert sorted(x.tobytes() for x in together) == sorted(x.tobytes() for x in bundled)
    assert not rows(digits.train) & rows(digits.val)
    assert not rows(digits.train) & rows(digits.test)
    assert not rows(digits.val) & rows(digits.test)


def test_splits_are_stratified(digits):
    counts = torch.stack([getattr(digits, name).labels.bincount() for name in SPLITS])
    shares = counts / counts.sum(0)
    expected = torch.tensor([0.60, 0.15, 0.25])[:, None].expand(3, 10)
    torch.testing.assert_close(shares, expected, atol=0.005, rtol=0)


def test_labels_belong_to_their_images(digits):
    bundled = load_digits()
    images = (bundled.images * 15).astype(np.uint8)
    label = {x.tobytes(): y for x, y in zip(images, bundled.target)}
    for name in SPLITS:
        split = getattr(digits, name)
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (1, 8, 8)
        assert [label[x.numpy().tobytes()] for x in split.images] == split.labels.tolist()


def test_a_sample_elsewhere_leaves_the_data_where_they_are(digits):
    sample = digits.sample(8, 8).to(torch.device("meta"))
    assert sample.normalize(sample.val.images).device.type == "meta"
    assert digits.normalize(digits.val.images).device.type == "cpu"


def test_part_of_the_training_images(digits):
    part = digits.take(0.25)
    assert len(part.train) == pytest.approx(0.25 * len(digits.train), abs=5)
    assert rows(part.train) < rows(digits.train)
    shares = part.train.labels.bincount() / digits.train.labels.bincount()
    torch.testing.assert_close(shares, torch.full((10,), 0.25), atol=0.01, rtol=0)
    assert torch.equal(part.train.images, load_data("digits").take(0.25).train.images)
    assert torch.equal(part.test.images, digits.test.images)
    assert digits.take(1.0) is digits


def test_training_images_are_normalised(digits):
    images = digits.normalize(digits.train.images)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_batches_are_in_order_and_whole(digits):
    batches = list(digits.batches("val", 100))
    assert [len(labels) for _, labels in batches] == [100, 100, 69]
    assert torch.equal(torch.cat([labels for _, labels in batches]), digits.val.labels)
    expected = digits.normalize(digits.val.images)
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)


def test_augmentation(digits):
    images = digits.train.images[:256]
    original = images.clone()
    torch.manual_seed(0)
    first, second = digits.augment(images), digits.augment(images)
    torch.manual_seed(0)
    again = digits.augment(images)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert first.shape == images.shape and first.is_floating_point()
    assert 0 <= first.min() and first.max() <= 255
    assert torch.equal(images, original)  # the stored images stay as they are

    # Each image is moved by amounts of its own, and stays the digit it was.
    same = digits.augment(images[:1].expand(64, -1, -1, -1))
    assert len({x.numpy().tobytes() for x in same}) == 64
    drift = (first - images).flatten(1).norm(dim=1) / images.float().flatten(1).norm(dim=1)
    assert 0.05 < drift.mean() < 0.6


def test_unknown_data():
    with pytest.raises(FmdError, match=r"no data set 'digist' \(did you mean 'digits'"):
        load_data("digist")


def test_download_that_fails_without_a_word(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setenv("FMD_DATA", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FmdError, match=r"cannot download .* \(TimeoutError\): check"):
        download_tiny_imagenet()


def test_compiling_covers_normalisation_too(digits, monkeypatch):
    images, compile, made = digits.train.images[:8], torch.compile, []
    torch.manual_seed(0)
    expected = digits.training_images(images)

    def kept(graph, inputs):
        return lambda *inputs: made.append(graph(*inputs)) or made[-1]

    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend=kept, fullgraph=True))
    digits.compile()
    torch.manual_seed(0)
    torch.testing.assert_close(digits.training_images(images), expected)
    torch.testing.assert_close(made[0][0], expected)  # the graph gives them as they are learnt from
