"""The notebooks' helpers: which parameters are refused, and how often the live curve is drawn."""

import pytest

from fmd import notebook
from fmd.errors import FmdError
from fmd.records import Accuracy, Epoch

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
