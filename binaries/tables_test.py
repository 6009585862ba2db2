"""What the terminal shows: read back as text."""

import io

import numpy as np
import pytest
import rich.console
import tensorflow as tf

from binaries import tables
from fliqs_tf._keras import keras
from fliqs_tf.costs.profile import UnsupportedLayer

LAYERS = [
    {"name": "conv1", "macs": 442_368, "weights": 432, "cost": 0.75, "weight_format": "INT8"},
    {"name": "stage2_block1_shortcut", "macs": 131_072, "weights": 512, "cost": 0.25, "weight_format": "INT4"},
    {"name": "predictions", "macs": 640, "weights": 650, "cost": 0.0, "weight_format": None},
]
TOGETHER = [{**layer, "activation_format": layer["weight_format"]} for layer in LAYERS]
SEPARATE = [{**layer, "activation_format": "BF16"} for layer in LAYERS]
ROWS = [
    {"name": "searched", "accuracy": 0.91234, "cost": 1.0},
    {"name": "float", "accuracy": 0.95, "cost": None},
    {"name": "uniform INT8, shared weights", "accuracy": None, "cost": 1.6},
]


def printed(*items, width=80):
    console = rich.console.Console(file=io.StringIO(), width=width)
    tables.print_tables(*items, console=console)
    return console.file.getvalue()


def cells(text):
    """The words of every line, split where two or more blanks stand."""
    return [[part.strip() for part in line.split("  ") if part.strip()] for line in text.splitlines() if line.strip()]


def test_layers_with_one_format_each():
    lines = cells(printed(tables.layers_table(TOGETHER, "GBOPs")))
    assert lines[0] == ["layer", "format", "MACs", "weights", "cost share"]
    assert lines[2] == ["conv1", "INT8", "442,368", "432", "75.00 %"]
    assert lines[3] == ["stage2_block1_shortcut", "INT4", "131,072", "512", "25.00 %"]
    assert lines[4] == ["predictions", "float", "640", "650", "0.00 %"]
    assert lines[5] == ["total", "574,080", "1,594", "1 GBOPs"]


def test_layers_with_two_formats_each():
    lines = cells(printed(tables.layers_table(SEPARATE)))
    assert lines[0] == ["layer", "weights/acts", "MACs", "weights", "cost share"]
    assert lines[2][:2] == ["conv1", "INT8/BF16"]
    assert lines[4][:2] == ["predictions", "float/BF16"]


@pytest.mark.parametrize("layers", [TOGETHER, SEPARATE])
def test_resnet_layers_fit_into_80_columns_unbroken(layers):
    large = [{**layer, "macs": 23_592_960, "weights": 136_864, "cost": 0.1785} for layer in layers]
    text = printed(tables.layers_table(large, "GBOPs"))
    assert max(map(len, text.splitlines())) <= 80
    assert "stage2_block1_shortcut" in text


def test_long_names_are_folded_and_lose_nothing():
    name = "transformer_layer_0/self_attention_layer/attention_output/kernel_" + "x" * 40
    text = printed(tables.layers_table([{**TOGETHER[0], "name": name}]))
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split("  ")[0].strip() for line in text.splitlines()]
    assert name in "".join(lines)
    assert "442,368" in text


def test_layers_without_cost():
    free = [{**layer, "cost": 0.0} for layer in TOGETHER]
    assert cells(printed(tables.layers_table(free)))[2][-1] == "-"


def test_results_are_relative_to_uniform_int8():
    text = printed(tables.results_table(ROWS, "GBOPs", target=0.98761))
    lines = cells(text)
    assert lines[0] == ["accuracy", "cost (GBOPs)", "cost / uniform INT8"]
    assert lines[2] == ["searched", "91.23 %", "1", "0.625"]
    assert lines[3] == ["float", "95.00 %", "-", "-"]
    assert lines[4] == ["uniform INT8, shared weights", "-", "1.6", "1.000"]
    assert lines[5] == ["target: 0.9876 GBOPs"]
    assert max(map(len, text.splitlines())) <= 80


def test_results_of_text_have_bits_per_character():
    rows = [{**row, "bits_per_character": bits} for row, bits in zip(ROWS, (2.34567, None, 2.5), strict=True)]
    lines = cells(printed(tables.results_table(rows, "GBOPs")))
    assert lines[0] == ["accuracy", "bits/char", "cost (GBOPs)", "cost / uniform INT8"]
    assert lines[2] == ["searched", "91.23 %", "2.346", "1", "0.625"]
    assert lines[3] == ["float", "95.00 %", "-", "-", "-"]
    assert lines[4] == ["uniform INT8, shared", "-", "2.500", "1.6", "1.000"]


def test_results_without_uniform_int8_are_relative_to_the_first_cost():
    lines = cells(printed(tables.results_table([ROWS[1], {**ROWS[0], "cost": 4.0}, {"name": "b", "cost": 2.0}])))
    assert lines[0] == ["accuracy", "cost", "cost / searched"]
    assert lines[4] == ["b", "-", "2", "0.500"]


def test_one_result_is_not_compared_with_itself():
    lines = cells(printed(tables.results_table(ROWS[:1])))
    assert lines[0] == ["accuracy", "cost"]
    assert lines[2] == ["searched", "91.23 %", "1"]


def test_square_brackets_are_no_markup():
    text = printed(tables.results_table([{"name": "run[bold]1", "accuracy": 0.5, "cost": 1.0}]), "a [red]line[/x]")
    assert "run[bold]1" in text
    assert "a [red]line[/x]" in text


# Progress.


def fit(bar, epochs=2, initial_epoch=0, steps=5):
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    batches = tf.data.Dataset.from_tensor_slices((np.ones((8, 2), "float32"), np.zeros(8, int))).batch(4).repeat()
    model.fit(batches, steps_per_epoch=steps, epochs=epochs, initial_epoch=initial_epoch, callbacks=[bar], verbose=0)


def console(terminal):
    return rich.console.Console(file=io.StringIO(), width=100, force_terminal=terminal)


def test_a_plain_line_per_epoch_where_there_is_no_terminal():
    bar = tables.ProgressBar(10, console=console(False))
    fit(bar)
    first, second = bar.console.file.getvalue().splitlines()
    assert first.startswith("epoch 1/2  step 5/10  loss ")
    assert second.startswith("epoch 2/2  step 10/10  loss ")
    assert "accuracy" in first
    assert first.endswith(" left")
    assert second.endswith("0 s left")
    assert "\x1b" not in first + second


def test_a_plain_line_per_minute_of_a_long_epoch(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tables.time, "monotonic", lambda: now[0])
    bar = tables.ProgressBar(1000, console=console(False))
    bar.set_params({"epochs": 1})
    bar.on_train_begin()
    bar.on_epoch_begin(0)
    for batch in range(80):
        bar.on_train_batch_end(batch, {"loss": 1.0})
        now[0] += 2
    assert bar.console.file.getvalue().splitlines() == [
        "epoch 1/1  step 31/1000  loss 1.00  32 min 18 s left",
        "epoch 1/1  step 61/1000  loss 1.00  31 min 18 s left",
    ]


def test_a_bar_on_a_terminal():
    bar = tables.ProgressBar(10, console=console(True))
    fit(bar)
    text = bar.console.file.getvalue()
    last = text.split("\r")[-2]
    for part in ("epoch 2/2", "10/10", "loss", "accuracy", "0 s left"):
        assert part in last
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_cursor_comes_back_after_an_error():
    bar = tables.ProgressBar(10, console=console(True))
    file = bar.console.file

    class Fail(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(KeyboardInterrupt):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), callbacks=[bar, Fail()], verbose=0)
    assert not file.getvalue().rstrip().endswith("\x1b[?25h")
    bar.stop()  # what the end of the process calls
    assert file.getvalue().rstrip().endswith("\x1b[?25h")


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_go_on_over_calls_of_fit_and_from_a_resumed_step(terminal):
    bar = tables.ProgressBar(14, start_step=2, console=console(terminal))
    fit(bar, epochs=1, steps=3)
    assert bar.step == 5
    fit(bar, epochs=3, initial_epoch=2, steps=9)
    assert bar.step == 14
    text = bar.console.file.getvalue()
    assert "epoch 1/1" in text and "epoch 3/3" in text
    assert "14/14" in text


def test_time_left_is_that_of_the_whole_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tables.time, "monotonic", lambda: now[0])
    bar = tables.ProgressBar(1000, start_step=400, console=console(False))
    bar.set_params({"epochs": 10})
    bar.on_epoch_begin(4)
    now[0] += 60  # the first step compiles
    bar.on_train_batch_end(0, {})
    assert bar.time_left() == ""
    for batch in range(1, 100):
        now[0] += 0.5
        bar.on_train_batch_end(batch, {})
    assert bar.step == 500
    # 500 steps at half a second.
    assert bar.time_left() == "4 min 10 s left"


def test_readings_are_the_known_ones_in_order():
    logs = {"reward": 1.0, "entropy": 0.5, "loss": tf.constant(0.1234), "cost": 0.65}
    assert tables.readings(logs) == "loss 0.123  cost 0.650  entropy 0.500"
    assert tables.readings(None) == ""


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "0 s"), (59.7, "1 min 0 s"), (250, "4 min 10 s"), (3599.9, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_duration(seconds, text):
    assert tables.duration(seconds) == text


def test_platforms_and_what_they_cannot_run():
    rows = [
        {"name": "a", "platform": "GPU", "cost": 1.23456, "unit": "us", "memory": 2.5, "unsupported": 0, "layers": 9},
        {"name": "a", "platform": "[NPU]", "cost": None, "unit": "us", "memory": 1.25, "unsupported": 2, "layers": 9},
    ]
    lines = cells(printed(tables.platforms_table(rows)))
    assert lines[0] == ["platform", "cost", "weights", "runs"]
    assert lines[2] == ["a", "GPU", "1.235 us", "2.5 MiB", "yes"]
    assert lines[3] == ["a", "[NPU]", "-", "1.25 MiB", "no: 2 of 9 layers do not"]
    layer = UnsupportedLayer("conv1", "INT4", "INT4", "It multiplies INT4 weights only by INT8 inputs.")
    lines = cells(printed(tables.unsupported_table("a", "[NPU]", [layer])))
    assert lines[0] == ["a on [NPU]"]
    assert lines[3] == ["conv1", "INT4/INT4", "It multiplies INT4 weights only by INT8 inputs."]
