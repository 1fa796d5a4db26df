import subprocess
import sys

import pytest

import householder
from householder.cli import main
from householder.train.comparison import stored_settings

TINY = """
task = "z3"
length = 4
d-model = 8
num-heads = 2
mlp-width = 8
num-householder = [1, 2]
steps = 4
batch-size = 4
eval-samples = 4
device = "cpu"
threads = 1
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; give its exit code, output and errors."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


def assert_one_clear_line(error):
    assert error.startswith(("error: ", "stopped: "))
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


def test_train_writes_where_it_says(run, config, tmp_path):
    code, out, err = run("train", "--config", config)
    assert (code, err) == (0, "")
    folder = tmp_path / "here" / "householder-run"
    for name in ("config.toml", "results.json", "accuracy.csv", "accuracy.png"):
        assert (folder / name).stat().st_size > 0, name
    assert "householder-run/accuracy.png" in out
    for word in ("N = 1", "N = 2", "whole-prefix accuracy", "at 4", "at 16", "tokens/s", "left"):
        assert word in out, word


def test_help_says_both_defaults_of_what_tasks_and_texts_share(run):
    _, out, _ = run("train", "--help")
    (line,) = (line for line in out.splitlines() if "--warmup " in line)
    assert "Default: 20; with --text: 50." in line


def test_help_is_as_wide_as_the_terminal(run):
    """Lines of a docstring are no lines of the help."""
    code, out, err = run("reproduce", "recall", "--help")
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if "Settings given here override" in line)
    assert len(line.strip()) > 150
    assert "householder-recall-<size>" in out


def test_flags_override_the_file(run, config, tmp_path):
    words = ["--steps", 3, "--num-householder", "2", "--num-householder", "3", "--use-short-conv"]
    code, _, err = run("train", "--config", config, "--out", tmp_path / "out", *words)
    assert (code, err) == (0, "")
    settings = stored_settings(tmp_path / "out")
    assert settings["steps"] == 3
    assert settings["num_householder"] == [2, 3]
    assert settings["use_short_conv"] is True
    assert settings["task"] == "z3"


def test_the_file_can_name_the_folder(run, config, tmp_path):
    config.write_text(f'{TINY}\nout = "named"\n')
    assert run("train", "--config", config)[0] == 0
    assert (tmp_path / "here" / "named" / "accuracy.png").exists()
    assert run("train", "--config", config, "--out", "flag")[0] == 0
    assert (tmp_path / "here" / "flag" / "accuracy.png").exists()


def test_the_written_config_repeats_the_run(run, config, tmp_path):
    run("train", "--config", config, "--out", "one")
    code, _, err = run("train", "--config", "one/config.toml", "--out", "two")
    assert (code, err) == (0, "")
    one, two = (tmp_path / "here" / name / "accuracy.csv" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--stps", "3"], "--stps"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--steps", "0"], "`steps` must be at least 1, got 0"),
        (["train", "--num-householder", "1,x"], "`num_householder` must be numbers"),
        (["train", "--num-householder", "2,2"], "different numbers"),
        (["train", "--task", "s33x"], "must be one of"),
        (["train", "--mixer", "mamba"], "delta_product"),
        (["train", "--device", "cuda:77"], "PyTorch sees"),
        (["train", "--config", "absent.toml"], "absent.toml"),
        (["train", "--resume", "--overwrite"], "give one"),
        (["trian"], "train"),
        (["reproduce", "state-tracking", "--task", "z7"], "one of s3, s4, a5, s5"),
        (["reproduce", "state-tracking", "--size", "huge"], "one of cpu, gpu"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, words, message):
    code, _, err = run(*words)
    assert code == 2
    assert message in err
    assert_one_clear_line(err)


def test_unknown_key_in_the_file_names_the_near_match(run, config):
    config.write_text("stepps = 4\n")
    code, _, err = run("train", "--config", config)
    assert code == 2
    assert "did you mean `steps`?" in err
    assert_one_clear_line(err)


def test_failures_are_one_line_and_exit_code_1(run, config, tmp_path):
    assert run("train", "--config", config)[0] == 0
    code, _, err = run("train", "--config", config)
    assert code == 1
    assert "--resume" in err
    assert "--overwrite" in err
    assert_one_clear_line(err)

    (tmp_path / "file").write_text("")
    code, _, err = run("train", "--config", config, "--out", tmp_path / "file" / "out")
    assert code == 1
    assert "cannot write the output folder" in err
    assert_one_clear_line(err)

    code, _, err = run("train", "--resume", "--length", 5)
    assert code == 1
    assert "length=4 there, 5 requested" in err
    assert_one_clear_line(err)

    code, _, err = run("train", "--resume", "--out", "nowhere")
    assert code == 1
    assert "nothing to resume" in err

    checkpoint = next((tmp_path / "here" / "householder-run" / "z3-N2" / "checkpoints").iterdir())
    (checkpoint / "model.safetensors").write_bytes(b"")
    code, _, err = run("train", "--resume")
    assert code == 1
    assert "model.safetensors is damaged" in err
    assert_one_clear_line(err)


def test_resume_needs_no_other_flag(run, config, tmp_path):
    run("train", "--config", config)
    before = (tmp_path / "here" / "householder-run" / "accuracy.csv").read_bytes()
    code, _, err = run("train", "--resume")
    assert (code, err) == (0, "")
    assert (tmp_path / "here" / "householder-run" / "accuracy.csv").read_bytes() == before


def test_overwrite_starts_anew(run, config):
    run("train", "--config", config)
    code, _, err = run("train", "--config", config, "--overwrite", "--steps", 2)
    assert (code, err) == (0, "")


def test_loss_that_is_not_finite_exits_1_and_names_the_step(run, config):
    code, _, err = run("train", "--config", config, "--lr", 1e38, "--warmup", 0, "--steps", 20)
    assert code == 1
    assert "not finite at step" in err
    assert_one_clear_line(err)


def test_help_says_what_there_is(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "train" in out
    assert "reproduce" in out
    assert run()[1] == out
    code, out, _ = run("train", "--help")
    assert code == 0
    for flag in ("--num-householder", "--resume", "--overwrite", "--config", "--out", "--seed"):
        assert flag in out, flag
    assert "Default: 0.9" in out
    # The same setting may have another default with --text.
    words = " ".join(out.replace("│", " ").split())
    for default in (
        "Default: 0.002; with --text: 0.001.",
        "Default: 1,2; with --text: 2.",
        "Width of the residual stream. Default: 64; with --text: the preset's.",
        "or what epochs come to. With --text: 1000.",
        "One layer with N = 2 learns to multiply them and goes on to four times",
    ):
        assert default in words, default


@pytest.mark.parametrize(
    "experiment", ["state-tracking", "flip-flop", "a5-attention", "recall", "length-extrapolation"]
)
def test_experiments_that_train_take_the_settings(run, experiment):
    code, _, error = run("reproduce", experiment, "--mixer", "mamba", "--steps", "1")
    assert code == 2
    assert "`mixer` must be one of" in error


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert householder.__version__ in out


def test_reproduce_lists_the_experiments(run):
    code, out, _ = run("reproduce")
    assert code == 0
    for word in ("state-tracking", "constructions", "arxiv.org/abs/2502.10297"):
        assert word in out


def test_reproduce_prints_published_beside_measured(run, tmp_path):
    small = ["--length", 4, "--eval-length", 8, "--d-model", 8, "--num-heads", 2]
    small += ["--steps", 3, "--batch-size", 4, "--eval-samples", 4, "--device", "cpu"]
    code, out, err = run("reproduce", "state-tracking", "--num-householder", "1,2", *small)
    assert (code, err) == (0, "")
    for word in ("published", "measured", "solved", "fails", "agree"):
        assert word in out, word
    assert (tmp_path / "here" / "householder-s3-cpu" / "accuracy.png").exists()


def test_the_module_is_the_command():
    words = [sys.executable, "-m", "householder", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(f"householder {householder.__version__}")


def test_importing_the_command_is_light():
    code = (
        "import sys, householder.cli; "
        "print([m for m in ('matplotlib', 'transformers', 'triton', 'pandas') if m in sys.modules])"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
