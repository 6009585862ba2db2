"""The training loop where it begins: what a run that goes on has done."""

import types

import pytest
from absl import flags

from binaries import loop, settings


def test_a_run_that_has_done_more_than_is_asked_for_says_so(tmp_path, monkeypatch):
    if "epochs" not in flags.FLAGS:
        settings.define_training_flags()
    flags.FLAGS(["test"])
    monkeypatch.setattr(flags.FLAGS["epochs"], "value", 2)
    monkeypatch.setattr(loop.checkpoints, "restore_newest", lambda *_: 12)
    model = types.SimpleNamespace(distribute_strategy=None)
    monkeypatch.setattr(loop.replicas, "Workers", lambda _: None)
    with pytest.raises(SystemExit, match=r"--epochs=2 are 6 steps, and the run in .* has done 12\. Give"):
        loop._restored(model, None, tmp_path / "checkpoints", 6)
    assert loop._restored(model, None, tmp_path / "checkpoints", 12) == 12
