import json
import subprocess
import sys

import pytest
import tensorflow as tf

from binaries.run_dir import RunDir, changed_flags


def opened(path, resume=False, overwrite=False):
    return RunDir(path, resume=resume, overwrite=overwrite)


def test_new_directory_is_made_and_held(tmp_path):
    first = opened(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(SystemExit, match="Another process is at work"):
        opened(tmp_path / "a" / "b")
    del first
    opened(tmp_path / "a" / "b")


def test_a_run_is_neither_mixed_with_nor_lost(tmp_path):
    (tmp_path / "flags.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"holds a run already\. Go on with it by --resume, replace it by --overwrite"):
        opened(tmp_path)
    opened(tmp_path, resume=True)
    assert (tmp_path / "flags.json").exists()
    opened(tmp_path, overwrite=True)
    assert not (tmp_path / "flags.json").exists()


def test_overwrite_spares_what_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="--overwrite will not remove them"):
        opened(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(SystemExit, match="exclude each other"):
        opened(tmp_path, resume=True, overwrite=True)


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run"])
def test_an_address_is_refused_and_no_folder_made(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"--run_dir: '{path}' is an address.*give a local path"):
        opened(path)
    assert not list(tmp_path.iterdir())


FLAGS = {"epochs": 4, "width": 0.5, "space": ["INT4", "INT8"], "data_dir": None, "warmup": 0.25, "rule": []}


@pytest.mark.parametrize(
    "now, listed",
    [
        ({}, []),
        ({"epochs": 6, "data_dir": "/there"}, []),
        ({"epochs": 3}, [("epochs", "4", "3")]),
        ({"width": 0.25, "space": ["INT8"]}, [("width", "0.5", "0.25"), ("space", '["INT4", "INT8"]', '["INT8"]')]),
        ({"warmup": None}, [("warmup", "0.25", "null")]),
        ({"new_one": 3}, []),
    ],
)
def test_flags_that_make_another_run(now, listed):
    assert changed_flags(FLAGS, {**FLAGS, **now}, ("data_dir",)) == listed


def test_a_run_goes_on_with_its_own_flags(tmp_path):
    run = opened(tmp_path)
    run.keep_flags(FLAGS, ())
    before = (tmp_path / "flags.json").read_text()
    with pytest.raises(SystemExit) as stop:
        run.keep_flags({**FLAGS, "width": 1.0}, ())
    assert "which has other flags:\n  --width: was 0.5, is 1.0\nGive them as they were, or start" in str(stop.value)
    assert (tmp_path / "flags.json").read_text() == before
    run.keep_flags({**FLAGS, "epochs": 5}, ())
    assert json.loads((tmp_path / "flags.json").read_text())["epochs"] == 5
    (tmp_path / "flags.json").write_text("{")
    with pytest.raises(SystemExit, match="is not a run's flags.*start anew by --overwrite"):
        run.keep_flags(FLAGS, ())


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"Cannot write to the run directory .*Give another --run_dir"):
        opened(tmp_path / "file")


def test_lock_ends_with_the_process(tmp_path):
    code = "import os, sys; from binaries.run_dir import RunDir; "
    code += f"run = RunDir({str(tmp_path)!r}, resume=False, overwrite=False); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    opened(tmp_path)


def test_metrics_after_a_step_are_dropped_and_so_is_a_torn_line(tmp_path):
    run = opened(tmp_path)
    lines = ['{"step": 10}', '{"step": 20}', '{"step": 30}', '{"step": 4']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    run.keep_metrics_until(20)
    assert (run / "metrics.jsonl").read_text() == '{"step": 10}\n{"step": 20}\n'


@pytest.mark.parametrize(
    "error, cause",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(30, "Read-only file system"), "Read-only file system"),
        (PermissionError(13, "Permission denied", "recipe.json"), "Permission denied"),
        (tf.errors.ResourceExhaustedError(None, None, "events.v2; No space left on device"), "No space left on device"),
        (RuntimeError("Can't write data (errno = 28, error message = 'No space left on device')"), "No space left"),
    ],
)
def test_a_disk_that_cannot_be_written_ends_the_program_with_one_message(tmp_path, error, cause):
    run = opened(tmp_path)
    with (
        pytest.raises(SystemExit, match=rf"^Cannot write to the run directory {tmp_path}: {cause}.*--resume"),
        run.explained(),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [ValueError("no"), FileNotFoundError(2, "x"), tf.errors.ResourceExhaustedError(None, None, "OOM")]
)
def test_other_errors_pass(tmp_path, error):
    run = opened(tmp_path)
    with pytest.raises(type(error)) as raised, run.explained():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("line", ["[1]", '"text"', "3", '{"step": "x"}', '{"step": null}', "\ufffd", "[" * 100_000])
def test_a_line_of_metrics_that_is_anything(tmp_path, line):
    run = opened(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 10}\n' + line)
    run.keep_metrics_until(20)
    assert (run / "metrics.jsonl").read_text() == '{"step": 10}\n'
