"""Costs: what a network with given formats costs. Exact integers per layer, summed.

A `Cost` prices one layer from its MACs, its weights and its two formats; the cost of a network is the sum. Called
with a model and formats it gives the total in its unit:

    fliqs_tf.costs.bops(model, "INT4")         # a format for every quantized layer
    fliqs_tf.costs.bops(qmodel, recipe)        # a recipe
    fliqs_tf.costs.bops(qmodel.deploy())       # a model whose formats are fixed

Layers of known classes that stay in float count as FP32. What the log lists as not known (an LSTM, a class of one's
own) and tables that were not asked for are not counted, whatever the formats.
"""

from __future__ import annotations

import dataclasses
import fractions
from collections.abc import Callable

from fliqs_tf._keras import keras
from fliqs_tf.costs import counting
from fliqs_tf.costs.counting import Site
from fliqs_tf.numerics.formats import Format
from fliqs_tf.quantize.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Cost:
    """A price per layer and a unit.

    Attributes:
      name: What is counted.
      unit: Unit of the total.
      per_unit: Layer prices are divided by this for the total.
      layer: (site, weight format, activation format) -> price of the layer; a whole number or a `Fraction` if it is
        to be exact. ValueError where the layer cannot run so.
    """

    name: str
    unit: str
    per_unit: int
    layer: Callable[[Site, Format, Format], int | fractions.Fraction]

    def __call__(
        self, model: keras.Model | list[tuple[Site, Format, Format]], formats: Recipe | Format | str | None = None
    ) -> float:
        """Total cost of a model in `unit`.

        Args:
          model: A wrapped, deployed or plain Keras model, or what `site_formats` gave.
          formats: A recipe, or one format for every quantized layer. None: the formats of a deployed model, or the
            most likely ones of a wrapped model.

        Raises:
          ValueError: The recipe does not fit the model.
        """
        priced = counting.site_formats(model, formats)
        return float(sum(self.layer(site, w, a) for site, w, a in priced) / self.per_unit)


bops = Cost("BOPs", "GBOPs", 10**9, lambda site, w, a: site.macs * w.bits * a.bits)
"""Bit operations: sum of MACs * weight bits * activation bits, in GBOPs per example (arXiv 2308.03290)."""

memory = Cost("memory", "MiB", 8 * 2**20, lambda site, w, a: site.weights * w.bits)
"""Size of the kernels: sum of weights * weight bits, in MiB."""

NAMES = {"bops": bops, "memory": memory}
