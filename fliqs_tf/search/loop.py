"""What happens between training steps: readings of quality, the decision, and a look whether all is finite."""

from __future__ import annotations

import logging

import numpy as np
import tensorflow as tf

from fliqs_tf._keras import keras
from fliqs_tf.search import deciding, reading

_LOG = logging.getLogger("fliqs_tf")
# Weights that are not finite are noticed within so many steps; looking more often would be felt.
_CHECK_EVERY = 16


class SearchLoop(keras.callbacks.Callback):
    """Between training steps: readings of quality, the decision, and a look whether all is finite.

    Args:
      search_model: A `SearchModel`.
      reader: What takes the readings, or None where training steps are readings themselves.
    """

    def __init__(self, search_model: keras.Model, reader: reading.Reader | None) -> None:
        super().__init__()
        self.search_model = search_model
        self.reader = reader
        self.begun = False
        self.step = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.last_batch = -1
        if not self.begun:  # now, and not before: a callback may have restored a run that was interrupted
            self.begun = True
            self.step = self._controller_step()
            self._note_decision()
            if self.step == 0 and self.reader is not None and not self.decided:
                self._decide_before_training(self.reader)
        self.keep_decision()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        before, self.step = self.step, self.step + batch - self.last_batch
        self.last_batch = batch
        if self.step // _CHECK_EVERY > before // _CHECK_EVERY:
            self._check_finite()
        if self.decided:
            return
        if self.step >= self.search_model.controller.decided_at():
            self.decide()
        elif self.reader is not None:
            # With steps_per_execution several may be due.
            every = self.search_model.reading_interval()
            for due in range(before // every + 1, self.step // every + 1):
                self.reader.read(due * every - 1)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._check_finite()

    def decide(self) -> None:
        """Takes the decision, once."""
        if self.decided:
            return
        every = self.search_model.reading_interval()
        if self.reader is not None and self.step < every:
            _LOG.warning(
                "The formats are decided after %d steps without one reading of quality, which happens every %d steps "
                "(quality_every): only their cost was known.",
                self.step,
                every,
            )
        deciding.decide(self.search_model)
        self._note_decision()

    def keep_decision(self) -> None:
        """Puts the decision back where a callback has restored weights from before it, the controller's among them."""
        controller = self.search_model.controller
        if not self.decided:
            return
        restored = self._controller_step()
        if not bool(tf.convert_to_tensor(controller.decided)):
            _LOG.warning(
                "A callback restored the weights of step %d, when the formats were still open. The decision stays, "
                "but these weights were trained with formats that changed. To restore weights of the decided formats "
                "compare only epochs after step %d: EarlyStopping(start_from_epoch=...).",
                restored,
                controller.decided_at(),
            )
            controller.logits.assign(self.logits)
            controller.decided.assign(True)
            # So do their moving averages.
            self.search_model.__dict__["_decided_step"] = max(restored, self.step)
            self.search_model.__dict__.pop("_averages_of", None)
        controller.step.assign(max(restored, self.step))

    def _controller_step(self) -> int:
        return int(tf.convert_to_tensor(self.search_model.controller.step))

    def _note_decision(self) -> None:
        controller = self.search_model.controller
        self.decided = bool(tf.convert_to_tensor(controller.decided))
        self.logits = np.array(tf.convert_to_tensor(controller.logits))

    def _decide_before_training(self, reader: reading.Reader) -> None:
        """Of weights that are trained already the formats are decided now, and training keeps them."""
        config = self.search_model._compiled_for
        # Only the critic knows when it is sure.
        is_critic = self.search_model.controller.estimator == "critic"
        if self.search_model.trains_with_samples or config.pretrained is False or not is_critic:
            return
        if config.pretrained or reader.is_trained():
            count = reader.decide_before_training(verbose=bool((self.params or {}).get("verbose")))
            _LOG.info(
                "The weights are trained: the formats were decided from %d readings, before the first training step. "
                "compile(pretrained=False) decides them while training.",
                count,
            )
            self._note_decision()

    def _check_finite(self) -> None:
        bad = int(tf.convert_to_tensor(self.search_model.bad_step))
        if bad >= 0:
            what = f"The loss was not finite at step {bad}"
        elif not _all_finite(self.search_model.network):
            # The loss can stay finite: on a CPU a ReLU gives 0 for NaN.
            what = f"Weights or moving averages are not finite at step {self.step}, or since a few steps before it"
        else:
            return
        raise FloatingPointError(
            f"{what}. Stopped: look for NaN or infinities in the data; go back to a checkpoint from before it, and "
            f"lower the learning rate or leave the narrowest formats out of the space."
        )


def _all_finite(network: keras.Model) -> bool:
    """Whether all variables are: in one pass, because a sum is not finite if one term is not."""
    # A vocabulary of tf_keras is among the variables, but is none.
    values = (tf.convert_to_tensor(v) for v in network.variables if hasattr(v, "assign"))
    sums = [tf.reduce_sum(tf.cast(v, tf.float32)) for v in values if v.dtype.is_floating]
    return bool(tf.math.is_finite(tf.add_n(sums)))
