"""What the programs share."""

import numpy as np
import pytest
from absl import flags

import fliqs_tf
import models
from binaries import settings
from fliqs_tf.io import loading


def test_runs_of_networks_with_layers_of_ours_load(tmp_path):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    final = fliqs_tf.apply(models.get("gpt", input_shape=(8,), classes=5, width=0.25, depth=1), "INT8")
    final.save(tmp_path / "model.keras")
    (tmp_path / "flags.json").write_text("{}")
    x = np.ones((1, 8), "int32")
    np.testing.assert_array_equal(settings.load_run(tmp_path)(x), final(x))
    with pytest.raises(ValueError, match="asks for 'Positions' of the module 'models.tokens'"):
        loading.load_model(tmp_path / "model.keras")  # to the package they are somebody's
