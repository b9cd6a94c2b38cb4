"""The command line: every command once on a tiny run, help, refusals and exit statuses."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastattn import cli, info, trainer
from fastattn.gpt import GPT
from fastattn.presets import PRESETS
from fastattn.report import read_log

pytest.importorskip("tyro")

TINY = ["--batch-size=2", "--backend=reference", "--steps=3", "--eval-tokens=64", "--no-plot"]
TINY += [f"--model.{size}" for size in ("n-layer=1", "n-head=2", "n-embd=16", "block-size=16")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "sonnet.txt"
    text.write_text("Shall I compare thee to a summer's day?\nThou art more lovely\n" * 40)
    assert cli.main(["prepare", str(text), "--out", str(folder / "tokens")]) == 0
    return folder / "tokens"


@pytest.fixture
def run(data, tmp_path):
    """A finished run of GPT-2's architecture."""
    flags = ["--preset", "nanogpt-cpu", "--data", str(data), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *flags, *TINY, "--model.bias"]) == 0
    return tmp_path / "run"


# ---- commands ----------------------------------------------------------------------------------


def test_no_command_prints_them_all(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert {"info", "prepare", "train", "eval", "generate", "bench", "export"} <= set(cli.COMMANDS)


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.strip() == info.report().strip()
    assert cli.main(["info", "--verbose"]) == 1


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastattn 0.")


def test_prepare_names_the_folder_after_the_source(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("one two three four five six\n" * 9)
    assert cli.main(["prepare", "notes.txt", "--tokenizer", "byte"]) == 0
    assert "256 in the byte vocabulary" in capsys.readouterr().out
    assert (tmp_path / "data/cache/notes-byte/train.bin").exists()


def test_train_writes_a_run(run, capsys):
    assert [line["step"] for line in read_log(run) if line["event"] == "step"] == [1, 2, 3]
    assert trainer.read_config(run).lr == PRESETS["nanogpt-cpu"].lr


def test_resume_goes_on_and_says_what_changed(run, capsys):
    assert cli.main(["train", "--resume", str(run), "--steps", "5"]) == 0
    assert "not as before: steps: 3 → 5" in capsys.readouterr().out
    assert [line["step"] for line in read_log(run) if line["event"] == "step"] == [1, 2, 3, 4, 5]


def test_eval_is_exact(run, capsys):
    assert cli.main(["eval", str(run), "--backend", "reference"]) == 0
    printed = float(capsys.readouterr().out.split("loss ")[1].split()[0])
    t = trainer.Trainer(trainer.read_config(run))
    t.load(run / trainer.CHECKPOINTS)
    assert printed == pytest.approx(t.evaluate(None), abs=6e-5)


def test_generate_is_repeatable(run, capsys):
    flags = ["--prompt", "Thou", "--max-new-tokens", "30", "--seed", "3", "--backend", "reference"]
    texts = []
    for _ in range(2):
        assert cli.main(["generate", str(run), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("Thou") and len(texts[0]) == len("Thou") + 30 + 1


def test_generate_several(run, capsys):
    flags = ["--num-samples", "2", "--max-new-tokens", "5", "--seed", "1", "--prompt", "S"]
    assert cli.main(["generate", str(run), *flags, "--backend", "reference"]) == 0
    first, second = capsys.readouterr().out.split("-" * 80)
    assert first.strip() != second.strip()


def test_export_is_read_back(run, tmp_path, capsys):
    out = tmp_path / "exported"
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    ours, _ = trainer.load_model(run)
    theirs = GPT.from_pretrained(str(out))
    idx = torch.arange(8)[None]
    assert torch.equal(ours(idx, backend="reference"), theirs(idx, backend="reference"))
    assert cli.main(["generate", str(out), "--max-new-tokens", "3", "--backend", "reference"]) == 0


def test_exported_gpt2_gives_transformers_the_same_logits(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert cli.main(["export", str(run), "--out", str(tmp_path / "hf")]) == 0
    theirs = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path / "hf")).eval()
    ours, _ = trainer.load_model(run)
    idx = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx, backend="reference"))


def test_bench_hands_over_or_says_where_it_is(monkeypatch, capsys, tmp_path):
    called = []
    status = SimpleNamespace(returncode=3)
    monkeypatch.setattr(cli.subprocess, "run", lambda c, env: called.append(c) or status)
    assert cli.main(["bench", "--quick"]) == 3
    assert called == [[sys.executable, "-m", "benchmarks", "--quick"]]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastattn" / "cli.py"))
    assert cli.main(["bench"]) == 1
    assert "checkout" in capsys.readouterr().err


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prepare", "train", "eval", "generate", "export", "demo"])
def test_help_of_each_command(name, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main([name, "--help"])
    assert status.value.code == 0
    assert f"fastattn {name}" in capsys.readouterr().out


def test_train_help_shows_the_presets_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--preset", "nanogpt-cpu", "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", "").split())
    for flag in ("--tokens-per-step", "--max-minutes", "--resume", "--model.n-layer", "--backend"):
        assert flag in out
    assert "(default: 0.99)" in out  # nanoGPT's beta2
    assert "nanoGPT's recipe" in out


def test_flags_go_before_the_file_and_the_file_before_the_preset(data, tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(f'data = "{data}"\nlr = 5e-4\nsteps = 9\n[model]\nn_layer = 1\nn_embd = 16\n')
    out = tmp_path / "run"
    command = ["train", "--preset", "nanogpt-cpu", "--config", str(toml), "--out", str(out)]
    assert cli.main([*command, "--steps", "2", "--backend", "reference", "--no-plot"]) == 0
    config = trainer.read_config(out)
    assert (config.steps, config.lr, config.beta2) == (2, 5e-4, 0.99)
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head) == (1, 16, 4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "did you mean train"),
        (["train", "--preset", "demmo"], "did you mean demo"),
        (["train", "--data", "nowhere"], "no dataset in nowhere"),
        (["train", "--resume", "nowhere"], "no run in nowhere"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml"),
        (["eval", "nowhere"], "nowhere"),
        (["prepare"], "shakespeare"),
    ],
)
def test_errors_are_one_line_on_stderr(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_unknown_key_in_a_file_is_refused_with_a_suggestion(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("stpes = 3\n")
    assert cli.main(["train", "--config", str(tmp_path / "run.toml")]) == 1
    assert "unknown key stpes; did you mean steps?" in capsys.readouterr().err


def test_unknown_flag_is_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["train", "--stpes", "3"])
    assert status.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_indivisible_batch_names_the_nearest(data, capsys):
    assert cli.main(["train", "--data", str(data), *TINY, "--tokens-per-step", "100"]) == 1
    assert "the nearest is 96" in capsys.readouterr().err


def test_second_run_in_a_folder_is_refused(run, data, capsys):
    flags = ["--preset", "nanogpt-cpu", "--data", str(data), "--out", str(run), *TINY]
    assert cli.main(["train", *flags]) == 1
    assert "--resume" in capsys.readouterr().err


def test_without_tyro_the_install_command_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["train"]) == 1
    assert "pip install 'fastattn[train]'" in capsys.readouterr().err
    assert cli.main(["info"]) == 0


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("FASTATTN_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "--resume", "nowhere"])


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fastattn 0.")


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fastattn", "info"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
