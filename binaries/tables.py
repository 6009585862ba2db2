"""Tables and a progress bar for the terminal.

    tables.print_tables(tables.layers_table(layers), tables.results_table(rows))
    model.fit(..., callbacks=[tables.ProgressBar(total_steps)], verbose=0)

Everything fits into 80 columns and is plain text where the output is no terminal.
"""

from __future__ import annotations

import time
import weakref

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

from fliqs_tf._keras import keras
from fliqs_tf.reporting import report

_NONE = "-"


def print_tables(*items, console=None):
    """Prints tables and lines of text, an empty line between them.

    Args:
      *items: what `layers_table` and `results_table` give, or strings.
      console: a `rich.console.Console`; None for one on standard output.
    """
    console = console or rich.console.Console()
    for item in items:
        # Text and not a string: names may hold square brackets, which rich takes for markup.
        console.print(rich.text.Text(item) if isinstance(item, str) else item)


def layers_table(layers, cost_unit=""):
    """Layers in network order: name, formats, MACs, weights, share of the cost; totals at the foot.

    Args:
      layers: dicts with `name`, `macs`, `weights`, `cost`, `weight_format`, `activation_format` (None for float).
      cost_unit: such as "GBOPs".

    Returns:
      A `rich.table.Table`. If weights and activations differ in any layer, the formats are written "INT4/INT8".
    """
    total = sum(layer["cost"] for layer in layers)
    weights = [layer["weight_format"] or "float" for layer in layers]
    activations = [layer["activation_format"] or "float" for layer in layers]
    differ = weights != activations
    formats = [f"{w}/{a}" for w, a in zip(weights, activations, strict=True)] if differ else weights

    table = _table(show_footer=True)
    table.add_column("layer", footer="total", overflow="fold")
    table.add_column("weights/acts" if differ else "format", no_wrap=True)
    table.add_column("MACs", footer=f"{sum(layer['macs'] for layer in layers):,}", **_NUMBER)
    table.add_column("weights", footer=f"{sum(layer['weights'] for layer in layers):,}", **_NUMBER)
    table.add_column("cost share", footer=f"{_cost(total)} {cost_unit}".strip(), **_NUMBER)
    for layer, fmt in zip(layers, formats, strict=True):
        share = _percent(layer["cost"] / total) if total else _NONE
        _add_row(table, layer["name"], fmt, f"{layer['macs']:,}", f"{layer['weights']:,}", share)
    return table


def results_table(rows, cost_unit="", target=None):
    """Accuracy and cost of recipes side by side.

    Args:
      rows: dicts with `name`, `accuracy` (0..1), `cost` and, for text, `bits_per_character`; None where not known.
      cost_unit: such as "GBOPs".
      target: the cost that the search aimed at, shown under the table; None for none.

    Returns:
      A `rich.table.Table`. Costs are also given relative to uniform INT8, or else to the first row that has a cost,
      if there is more than one row.
    """
    base = report.comparison_base(rows) if len(rows) > 1 else None
    caption = None if target is None else f"target: {_cost(target)} {cost_unit}".strip()
    table = _table(caption=caption, caption_justify="left")
    table.add_column("", overflow="fold")
    table.add_column("accuracy", **_NUMBER)
    has_bits = any(row.get("bits_per_character") is not None for row in rows)
    if has_bits:
        table.add_column("bits/char", **_NUMBER)
    table.add_column(f"cost ({cost_unit})" if cost_unit else "cost", **_NUMBER)
    if base:
        table.add_column(rich.text.Text(f"cost / {base['name'].partition(',')[0]}"), justify="right")
    for row in rows:
        cost = row.get("cost")
        cells = [row["name"], _percent(row.get("accuracy"))]
        if has_bits:
            bits = row.get("bits_per_character")
            cells.append(_NONE if bits is None else f"{bits:.3f}")
        cells.append(_cost(cost))
        if base:
            cells.append(_NONE if cost is None else f"{cost / base['cost']:.3f}")
        _add_row(table, *cells)
    return table


def platforms_table(rows):
    """What networks cost on platforms.

    Args:
      rows: dicts with `name`, `platform`, `cost` (None if it cannot run), `unit`, `memory` (MiB of weights),
        `unsupported` and `layers` (how many layers cannot run, of how many).

    Returns:
      A `rich.table.Table`.
    """
    table = _table()
    table.add_column("", overflow="fold")
    table.add_column("platform", overflow="fold")
    table.add_column("cost", **_NUMBER)
    table.add_column("weights", **_NUMBER)
    table.add_column("runs")
    for row in rows:
        cost = _NONE if row["cost"] is None else f"{_cost(row['cost'])} {row['unit']}"
        runs = f"no: {row['unsupported']} of {row['layers']} layers do not" if row["unsupported"] else "yes"
        _add_row(table, row["name"], row["platform"], cost, f"{_cost(row['memory'])} MiB", runs)
    return table


def unsupported_table(name, platform, unsupported):
    """The layers of a network that a platform cannot run.

    Args:
      name: of the network.
      platform: its name.
      unsupported: list of `fliqs_tf.costs.profile.UnsupportedLayer`.

    Returns:
      A `rich.table.Table`.
    """
    table = _table(title=rich.text.Text(f"{name} on {platform}"), title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("weights/acts", no_wrap=True)
    table.add_column("why", overflow="fold")
    for layer in unsupported:
        _add_row(table, layer.path, f"{layer.weights}/{layer.activations}", layer.reason)
    return table


class ProgressBar(keras.callbacks.Callback):
    """How far a run is, what it reads, and the time left over all its epochs.

    On a terminal one line that changes; elsewhere a plain line per epoch, and per minute.

    Args:
      total_steps: of the whole run, over all calls of `fit`.
      start_step: steps that were done before, when a run is resumed.
      console: a `rich.console.Console`; None for one on standard output.
    """

    SHOWN = ("loss", "accuracy", "cost", "entropy")
    SECONDS_BETWEEN_UPDATES = 0.25
    SECONDS_BETWEEN_LINES = 60

    def __init__(self, total_steps, start_step=0, console=None):
        super().__init__()
        self.total_steps, self.step = total_steps, start_step
        self.console = console or rich.console.Console()
        self.bar = self.first = None
        self.shown_at = time.monotonic()

    def on_train_begin(self, logs=None):
        if not self.console.is_terminal:
            return
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.fields[epoch]}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.completed}/{task.total}"),
            rich.progress.TextColumn("{task.fields[left]}"),
            rich.progress.TextColumn("{task.fields[readings]}", markup=False),
            console=self.console,
            expand=True,
            auto_refresh=False,
        )
        self.task = self.bar.add_task("", total=self.total_steps, completed=self.step, epoch="", left="", readings="")
        self.bar.start()
        # An error in `fit` skips on_train_end; the terminal must get its cursor back all the same.
        self.stop = weakref.finalize(self, self.bar.stop)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.before_epoch = epoch + 1, self.step

    def on_train_batch_end(self, batch, logs=None):
        self.step = self.before_epoch + batch + 1
        now = time.monotonic()
        if self.first is None:
            # The first step compiles: it says nothing about the others.
            self.first = (self.step, now)
        # Reading the logs waits for the step to end, so not at every step.
        if now - self.shown_at >= (self.SECONDS_BETWEEN_UPDATES if self.bar else self.SECONDS_BETWEEN_LINES):
            self._show(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._show(logs)

    def on_train_end(self, logs=None):
        if self.bar:
            self.stop()
            self.bar = None

    def time_left(self):
        """Such as "4 min 10 s left", from the steps since the first; "" as long as there is only one."""
        if self.first is None or self.step <= self.first[0]:
            return ""
        per_step = (time.monotonic() - self.first[1]) / (self.step - self.first[0])
        return f"{duration(per_step * (self.total_steps - self.step))} left"

    def _epochs(self):
        return self.params.get("epochs", _NONE)

    def _show(self, logs):
        self.shown_at = time.monotonic()
        epoch, left, values = f"epoch {self.epoch}/{self._epochs()}", self.time_left(), readings(logs)
        if self.bar:
            self.bar.update(self.task, completed=self.step, epoch=epoch, left=left, readings=values, refresh=True)
        else:
            parts = [epoch, f"step {self.step}/{self.total_steps}", values, left]
            self.console.print(rich.text.Text("  ".join(part for part in parts if part)), soft_wrap=True)


def readings(logs):
    """The logs that a progress bar shows: "loss 0.312  accuracy 0.911  cost 0.651"."""
    return "  ".join(f"{name} {float(logs[name]):#.3g}" for name in ProgressBar.SHOWN if name in (logs or {}))


def duration(seconds):
    """Rounded to what matters.

    >>> duration(4.4), duration(250), duration(7500)
    ('4 s', '4 min 10 s', '2 h 5 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


_NUMBER = {"justify": "right", "no_wrap": True}


def _table(**arguments):
    return rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **arguments)


def _add_row(table, *cells):
    table.add_row(*(rich.text.Text(str(cell)) for cell in cells))


def _percent(share):
    return _NONE if share is None else f"{100 * share:.2f} %"


def _cost(cost):
    return _NONE if cost is None else f"{cost:.4g}"
