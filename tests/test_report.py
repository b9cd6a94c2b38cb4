"""Progress, log.jsonl, TensorBoard and the plot of a run."""

import json

import pytest

from fastattn.flops import Peak
from fastattn.report import Meter, Progress, RunLog, clock, plot_losses, read_log, si


def write_steps(log, first, last):
    for step in range(first, last + 1):
        log.write("step", step=step, loss=1 / step)
        if step % 2 == 0:
            log.write("eval", step=step, val_loss=2 / step)


def test_log_is_one_json_object_a_line(tmp_path):
    with RunLog(tmp_path) as log:
        log.write("config", steps=3)
        write_steps(log, 1, 3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0] == {"event": "config", "steps": 3}
    assert [line["event"] for line in lines[1:]] == ["step", "step", "eval", "step"]
    assert lines == read_log(tmp_path)


def test_resumed_log_forgets_what_comes_again(tmp_path):
    with RunLog(tmp_path) as log:
        log.write("config", steps=6)
        write_steps(log, 1, 6)
    straight = (tmp_path / "log.jsonl").read_text()
    with RunLog(tmp_path, step=4) as log:
        write_steps(log, 5, 6)
    assert (tmp_path / "log.jsonl").read_text() == straight


def test_fresh_log_replaces_an_old_one(tmp_path):
    with RunLog(tmp_path) as log:
        write_steps(log, 1, 3)
    with RunLog(tmp_path) as log:
        log.write("config")
    assert read_log(tmp_path) == [{"event": "config"}]


def test_line_torn_by_a_crash_is_dropped(tmp_path):
    with RunLog(tmp_path) as log:
        write_steps(log, 1, 3)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    assert [line["step"] for line in read_log(tmp_path) if line["event"] == "step"] == [1, 2, 3]
    with RunLog(tmp_path, step=3) as log:
        write_steps(log, 4, 4)
    assert [line["step"] for line in read_log(tmp_path) if line["event"] == "step"] == [1, 2, 3, 4]


def test_floats_keep_their_bits(tmp_path):
    value = 0.1 + 0.2
    with RunLog(tmp_path) as log:
        log.write("step", step=1, loss=value)
    assert read_log(tmp_path)[0]["loss"] == value


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, tensorboard=True) as log:
        log.write("config", steps=3)
        write_steps(log, 1, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("step/loss")] == [1, 2, 3]
    assert events.Scalars("eval/val_loss")[0].value == 1.0


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    with RunLog(tmp_path) as log:
        log.write("config")
        write_steps(log, 1, 50)
    path = plot_losses(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plain_progress_has_rates_and_time_left(capsys):
    peak = Peak(1e9, "made up")
    with Progress(10, tokens_per_step=1000, flops_per_step=10**8, peak=peak) as bar:
        bar.update(1, loss=2.0, seconds=0.5)
        bar.update(2, loss=2.0, seconds=0.5)  # within ten seconds of the last line: none
        bar.update(10, loss=2.0, seconds=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/10  loss 2.0000  2k tokens/s  MFU 20.0%  0:04 left",
        "step 10/10  loss 2.0000  2k tokens/s  MFU 20.0%  0:00 left",
    ]


def test_unknown_peak_gives_no_mfu(capsys):
    with Progress(1, tokens_per_step=10, flops_per_step=10, peak=None) as bar:
        bar.update(1, loss=1.0, seconds=1.0)
    assert "MFU n/a" in capsys.readouterr().out


def test_terminal_gets_a_bar(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with Progress(4, tokens_per_step=10, flops_per_step=10, peak=None, step=2) as bar:
        bar.update(3, loss=1.25, seconds=1.0)
        bar.print("[a line] above")
    out = capsys.readouterr().out
    assert "[a line] above" in out
    assert "1.2500" in out and "3/4" in out


def test_meter_weighs_recent_values_more():
    meter = Meter()
    meter.add(3.0)
    assert meter.mean == 3.0
    for _ in range(300):
        meter.add(1.0)
    assert meter.mean == pytest.approx(1.0, abs=1e-3)


def test_numbers_for_people():
    assert [clock(s) for s in (0.4, 75, 3600, 3725)] == ["0:00", "1:15", "1:00:00", "1:02:05"]
    assert [si(v) for v in (0.5, 999.4, 999.6, 12_345, 1.5e6, 2e12, 3e16)] == [
        "0.5", "999", "1k", "12.3k", "1.5M", "2T", "3e+04T",
    ]  # fmt: skip
