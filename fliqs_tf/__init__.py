"""FLIQS for Keras: one-shot mixed-precision floating-point and integer quantization search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fliqs_tf import costs, export
from fliqs_tf.costs.profile import Profile
from fliqs_tf.io import loading
from fliqs_tf.layers import ranges
from fliqs_tf.layers.quantized import Quantized
from fliqs_tf.numerics.formats import Format
from fliqs_tf.numerics.rounding import fake_quant
from fliqs_tf.numerics.space import PRESETS, Space
from fliqs_tf.post_training import post_training_search
from fliqs_tf.quantize.recipe import Recipe
from fliqs_tf.quantize.rules import Rule
from fliqs_tf.reporting.callbacks import Preempted, SearchCheckpoint, SearchLog
from fliqs_tf.search import rewards, schedules
from fliqs_tf.search.controller import Controller
from fliqs_tf.search.model import SearchModel
from fliqs_tf.wrapping import apply, wrap

if TYPE_CHECKING:
    from types import ModuleType

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Controller",
    "Format",
    "Preempted",
    "Profile",
    "Quantized",
    "Recipe",
    "Rule",
    "SearchCheckpoint",
    "SearchLog",
    "SearchModel",
    "Space",
    "apply",
    "costs",
    "export",
    "fake_quant",
    "loading",
    "post_training_search",
    "ranges",
    "rewards",
    "schedules",
    "wrap",
]


def __getattr__(name: str) -> ModuleType:
    """`fliqs_tf.tfmot` is loaded when it is first used: TensorFlow Model Optimization is optional and large."""
    if name == "tfmot":
        import fliqs_tf.tfmot

        return fliqs_tf.tfmot
    raise AttributeError(f"module 'fliqs_tf' has no attribute {name!r}")
