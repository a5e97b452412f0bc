"""The notebooks' helpers: parameters that are refused, the live curve, runs that are followed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fmd import notebook
from fmd.config import load_experiment
from fmd.errors import FmdError
from fmd.logs import log_folder, read_log
from fmd.records import Accuracy, Epoch, write_atomically

PARAMETERS = """\
name: str = "a"  # with a comment
epochs: int = None
lr: float = 0.1
"""


def check(*cells: str) -> dict:
    """Run cells as IPython would, then check the parameters; returns the names left."""
    namespace = {"In": ["", *cells, "notebook.check_parameters(globals())"]}
    for cell in cells:
        exec(cell, namespace)
    notebook.check_parameters(namespace)
    return namespace


@pytest.mark.parametrize(
    "injected", ["", "epochs = 3", "lr = 1", 'name = "b"\nlr = -0.5', "epochs = None"]
)
def test_declared_parameters_pass(injected):
    check("import os", PARAMETERS, injected)


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("epoch = 3", "unknown parameter 'epoch'.*mean 'epochs'"),
        ('epochs = "two"', "epochs = 'two'.*integer"),
        ('epochs = "2"', "epochs = '2'.*integer"),
        ("epochs = 2.5", "epochs = 2.5.*integer"),
        ("epochs = True", "epochs = True.*integer"),
        ('lr = "1e-3"', "lr = '1e-3'.*number"),
        ("lr = None", "lr = None.*number"),
        ("name = 1", "name = 1.*string"),
    ],
)
def test_other_parameters_are_refused_in_one_line(injected, message):
    with pytest.raises(FmdError, match=message) as caught:
        check("import os", PARAMETERS, injected)
    assert "\n" not in str(caught.value)


def test_an_injected_name_is_refused_once_and_then_gone():
    namespace = {"In": ["", PARAMETERS, "epoch = 3", "notebook.check_parameters(globals())"]}
    exec(f"{PARAMETERS}\nepoch = 3", namespace)
    with pytest.raises(FmdError, match="unknown parameter 'epoch'"):
        notebook.check_parameters(namespace)
    namespace["In"].append(namespace["In"][-1])  # the cell run again
    notebook.check_parameters(namespace)


def test_a_misspelt_name_in_the_cell_itself_is_refused_until_corrected():
    wrong = PARAMETERS.replace("epochs: int = None", "epoch = 3")
    with pytest.raises(FmdError, match="'epoch'"):
        check("import os", wrong)
    check("import os", wrong, PARAMETERS)


def test_names_of_later_cells_are_no_parameters_when_run_again():
    check("import os", PARAMETERS, "record = sorted('ab')", "count = len(record)")


def epochs(n: int) -> list[Epoch]:
    accuracy = Accuracy(top1=50, top5=90, loss=1.0)
    terms = {"loss": 2.0, "base": 2.0, "logit": 1.0, "intra": 0.5, "full": 0.5}
    return [Epoch(epoch=i, lr=0.1, train=terms, val=accuracy) for i in range(n)]


class Output:
    def __init__(self):
        self.drawn = []

    def __call__(self, figure, display_id):
        self.drawn.append(figure)
        return self

    def update(self, figure):
        self.drawn.append(figure)


def test_live_curve_is_drawn_seldom_and_always_at_the_end(monkeypatch):
    output = Output()
    monkeypatch.setattr(notebook, "display", output)
    curve = notebook.LiveCurve(500)
    for n in range(1, 501):
        curve(epochs(n))
    assert 2 <= len(output.drawn) <= 10
    assert "500 of 500" in output.drawn[-1].alt


class TestLaunchedRuns:
    @pytest.fixture
    def run(self, monkeypatch, tmp_path):
        """Configuration and words of a run of a few seconds."""
        monkeypatch.setenv("FMD_RESULTS", str(tmp_path))
        monkeypatch.setenv("FMD_COMMIT", "0" * 40)
        monkeypatch.setenv("FMD_DIRTY", "")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(notebook, "display", Output())
        config = load_experiment("digits").run("none", epochs=12, data_fraction=0.2)
        return config, ["digits", "none", "epochs=12", "data_fraction=0.2"]

    @pytest.mark.parametrize(
        "content", [str(os.getpid()), "1", "gone"], ids=["alive", "of root", "no number"]
    )
    def test_the_number_of_another_process_is_no_run(self, run, content):
        config, _ = run
        write_atomically(log_folder(config) / "process", content)
        assert not notebook.running(config)

    def test_nothing_launched_is_no_run_and_leaves_no_file(self, run, tmp_path):
        assert not notebook.running(run[0])
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_takes_no_files(self, run, tmp_path):
        (tmp_path / "logs").touch()
        with pytest.raises(FmdError, match=r"cannot launch from .*: Not a directory"):
            notebook.launch(*run)

    @pytest.mark.slow
    def test_followed_again_after_the_follower_was_killed(self, run):
        config, words = run
        folder = log_folder(config)
        # What an earlier launch left behind is neither shown nor lost.
        write_atomically(folder / "output.txt", "error: an old one\n")
        follower = subprocess.Popen(
            [
                *(sys.executable, "-m", "IPython", "-c"),
                "from fmd import notebook; from fmd.config import load_experiment; "
                "config = load_experiment('digits').run('none', epochs=12, data_fraction=0.2); "
                f"notebook.launch(config, {words}); notebook.follow(config, 0.1)",
            ],
            stdout=subprocess.DEVNULL,
        )
        while not read_log(config):
            assert follower.poll() is None
            time.sleep(0.05)
        process = int((folder / "process").read_text())
        os.kill(process, signal.SIGSTOP)  # halfway, however fast the machine is
        seen = len(read_log(config))
        assert seen < config.epochs
        follower.kill()
        follower.wait()
        assert notebook.running(config)
        assert notebook.launch(config, words) is None
        os.kill(process, signal.SIGCONT)
        record = notebook.follow(config, 0.1)
        assert len(record.epochs) == config.epochs > seen
        assert record.timing.resumed == 0
        lines = [shown for shown in notebook.display.drawn if isinstance(shown, str)]
        curves = [shown for shown in notebook.display.drawn if shown not in lines]
        assert f"{config.epochs} of {config.epochs}" in curves[-1].alt
        assert not any("error" in line for line in lines)
        assert (folder / "output.1.txt").read_text() == "error: an old one\n"
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        for _ in range(100):  # the record is written before the process ends
            if not notebook.running(config):
                break
            time.sleep(0.1)
        assert not notebook.running(config)

    @pytest.mark.slow
    def test_a_killed_run_is_named_and_goes_on_when_launched_again(self, run):
        config, words = run
        process = notebook.launch(config, words)
        while not read_log(config):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        with pytest.raises(FmdError, match="the run has ended without a record"):
            notebook.follow(config, 0.1)
        notebook.launch(config, words)
        assert notebook.follow(config, 0.1).timing.resumed == 1

    @pytest.mark.slow
    def test_two_processes_share_a_run(self, run):
        config, words = run
        notebook.launch(config, words, processes=2)
        assert notebook.running(config)
        assert notebook.follow(config, 0.1).world_size == 2

    def test_only_the_end_of_a_long_output_is_read(self, tmp_path):
        output = tmp_path / "output.txt"
        assert notebook._last_line(output) == "nothing said yet"
        output.write_text("error: long ago\n" + "\r".join(f"step {i}" for i in range(10_000)))
        assert notebook._last_line(output) == "step 9999"
        output.write_text("step 1\nerror: not finite\nstep 2\n")
        assert notebook._last_line(output) == "error: not finite"
