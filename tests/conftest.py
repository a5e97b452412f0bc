"""Shared by all tests: one thread a worker, and a tiny trained teacher."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import use_tiny

from fmd.config import Experiment
from fmd.train import train

torch.set_num_threads(1)  # pytest-xdist starts one worker a core


@pytest.fixture(scope="session", autouse=True)
def own_fonts(tmp_path_factory):
    """Notebooks list fonts anew: the user's list may name those of an environment that is gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


@pytest.fixture(scope="session")
def teacher_results(tmp_path_factory) -> Path:
    """A results folder that holds the finished teacher of the experiment ``tiny``."""
    results = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        train(use_tiny(patch, results).teacher_run(), progress=False)
    return results


@pytest.fixture
def tiny(monkeypatch, tmp_path, teacher_results) -> Experiment:
    """The experiment ``tiny`` with its teacher trained, in a results folder of the test's own."""
    results = tmp_path / "results"
    shutil.copytree(teacher_results, results)
    return use_tiny(monkeypatch, results)
