"""Bad input on the command line is one line on stderr, never a traceback; what imports what."""

import pkgutil
import subprocess
import sys

import pytest

import fmd
import fmd.benchmark.__main__ as benchmark
from fmd.errors import FmdError, first_line, nearest, run_main
from fmd.train import main


def command_line(monkeypatch, capsys, *words) -> tuple[str | int, str]:
    """The exit status and the standard error of ``python -m fmd.train`` with these words."""
    monkeypatch.setattr(sys, "argv", ["fmd.train", *words])
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    code = caught.value.code
    # Python prints a text given to sys.exit on stderr and exits with status 1.
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words, message",
    [
        ("tyni none", "no experiment 'tyni' (did you mean 'tiny'?"),
        ("tiny non", "no variant 'non' (did you mean 'none'?"),
        ("tiny none epoch=2", "unknown setting 'epoch' (did you mean 'epochs'?"),
        ("tiny none epochs=many", "epochs = 'many': input should be a valid integer"),
        ("tiny none epochs=0", "epochs = 0: input should be greater than or equal to 1"),
        ("tiny none epochs", "'epochs' must read KEY=VALUE"),
        ("tiny none epochs=", "'epochs=' holds no value"),
        ("tiny none clip_grad=null", "'clip_grad=null' holds no value"),
        ("tiny none model_args={depth:2}", "holds no value, e.g. model_args='{depth: 2}'"),
        ("tiny none lr=[", "'lr=[': the value is not YAML"),
        ("tiny none seed=3", "'seed=3' is no override: the seed has an argument of its own"),
        ("tiny none seed=3", "has an argument of its own (--seed; in a notebook, a parameter)"),
        ("tiny full student_layers=0,1", "student_layers = '0,1': must be a list, in brackets"),
        ("tiny none variant=full", "'variant=full' is no override"),
        ("tiny none model=vit_tiny_patch16_22", "did you mean 'vit_tiny_patch16_224'?"),
        ("tiny none model_args={}", "does not take the images of digits"),
        ("tiny none opt=adamww", "did you mean 'adamw"),
        ("tiny none data=digist", "did you mean 'digits'?"),
        ("tiny none --device gpu9", "no device 'gpu9'"),
        ("tiny none --device mps", "no device 'mps' here: cpu or cuda"),
        ('tiny none model_args={"num_classes":3}', "model_args must not hold num_classes"),
        ("tiny soft-kd teacher=tyni/seed-0", "no experiment 'tyni'"),
        ("tiny none --seed -1", "seed = -1: input should be greater than or equal to 0"),
        ("tiny none --max-minutes -1", "max_minutes = -1: give 0 or more minutes"),
        ("tiny none --max-minutes nan", "max_minutes = nan: give 0 or more minutes"),
        ("tiny none --seed 0 epochs=0", "epochs = 0"),  # overrides may follow options
    ],
)
def test_bad_input_is_one_line(tiny, monkeypatch, capsys, words, message):
    status, line = command_line(monkeypatch, capsys, *words.split())
    assert status == 1
    assert line.startswith("error: ") and "\n" not in line
    assert message in line


def test_benchmark_on_an_unknown_device_is_one_line():
    with pytest.raises(FmdError, match="no device 'foo'"):
        benchmark.run("losses", quick=True, device="foo")


def test_dry_run_of_few_images_times_one_step_at_least(tiny, monkeypatch, capsys):
    words = "fmd.train tiny none --dry-run --device cpu data_fraction=0.01 batch_size=8".split()
    monkeypatch.setattr(sys, "argv", words)
    main()
    said = capsys.readouterr().out
    assert "3 steps of 8 images" in said and "images/s" in said and "will say" not in said
    monkeypatch.setattr(sys, "argv", words[:-1])
    main()
    assert "will say: batch_size 128 exceeds the 10 training" in capsys.readouterr().out


def test_wrong_arguments_show_the_usage(monkeypatch, capsys):
    status, text = command_line(monkeypatch, capsys, "tiny")
    assert status == 2 and "usage: python -m fmd.train" in text


def test_time_budget_on_the_command_line(tiny, monkeypatch, capsys):
    words = "tiny none --max-minutes 0 epochs=2".split()
    status, line = command_line(monkeypatch, capsys, *words)
    assert status == 1 and "time is up at 50% of tiny/none+epochs=2/seed-0" in line
    main()  # the same call goes on from there
    assert "test top-1" in capsys.readouterr().out


@pytest.mark.slow
def test_no_traceback_from_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fmd.train", "digts", "none"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no experiment 'digts'")
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.slow
def test_training_imports_nothing_of_the_notebooks():
    # A GPU machine with torch, timm, numpy and pydantic alone can train; every module loads.
    modules = [f"fmd.{module.name}" for module in pkgutil.iter_modules(fmd.__path__)]
    assert "fmd.train" in modules and "fmd.results" in modules
    code = (
        "import sys, importlib, fmd.train\n"
        "heavy = {'pandas', 'matplotlib', 'sklearn', 'jupyter', 'IPython', 'papermill'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


def test_error_in_several_lines_becomes_one():
    def fail():
        raise FmdError("first\n  second")

    with pytest.raises(SystemExit) as caught:
        run_main(fail)
    assert caught.value.code == "error: first second"


def test_interruption_says_how_to_go_on():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="a training run goes on from its last checkpoint"):
        run_main(interrupt)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_first_line_of_an_error_with_or_without_words():
    assert first_line(ValueError("\nfirst \nsecond")) == "first "
    assert first_line(TimeoutError()) == "TimeoutError"


def test_nearest_names():
    assert nearest("lrr", ["lr", "opt"]) == " (did you mean 'lr'?; known: lr, opt)"
    assert nearest("zzz", ["lr", "opt"]) == " (known: lr, opt)"
    many = [f"model_{i}" for i in range(100)]
    assert nearest("model_x", many).startswith(" (did you mean 'model_")
    assert nearest("zzz", many) == ""


def test_notebook_shows_one_line():
    assert FmdError("what to do")._render_traceback_() == ["FmdError: what to do"]
