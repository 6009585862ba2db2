r"""Synthetic search landscapes with a known optimum: does the controller find good formats, not only cheap ones?

No network: decision d loses s_d * 4^-bits of quality in a format of that width, with log-normal sensitivities s_d
(sigma 1) scaled so that all decisions at 4 bits lose 0.10 (10 points). Cost is MACs * bits^2, the target half-way
between uniform INT4 and uniform INT8. A reading of quality has noise of standard deviation 0.02; 80 % of its variance
is shared by samples that are read on one batch. The critic is given the noise power of the formats on Gaussian data,
as in a real search, and not the landscape's 4^-bits.

Steps are training steps: the critic reads 4 samples on one batch as often as a search does by default, or a single
one at every step; plain REINFORCE reads one sample at every step.

The score is the share of the way from a random recipe of equal cost to the optimum of equal cost, in the landscape as
it is at the end:

    share = (random - lost) / (random - optimum)

random is the mean loss under the distribution of highest entropy with that expected cost; optimum is by dynamic
programming. Both at the cost of the recipe found, so that spending more than the target does not count as skill.

    python -m binaries.tools.landscapes --decisions=22 --options=3,14 --steps=500,2000,10000 --seeds=8
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import tensorflow as tf
from absl import app, flags

from fliqs_tf.numerics.formats import Format
from fliqs_tf.search import rewards, schedules
from fliqs_tf.search.controller import Controller

SPACES = {
    3: ("INT4", "INT8", "BF16"),
    14: tuple(f"E{x}M{bits - 1 - x}" for bits in range(4, 9) for x in range(2, 6) if bits - 1 - x >= 1),
}
CONTROLLERS = (
    "critic",
    "critic, single readings",
    "REINFORCE normalized",
    "REINFORCE reference",
    "REINFORCE TuNAS",
)
NOISE, SHARED = 0.02, 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """What to run.

    Attributes:
      decisions: 22 (ResNet-20) and 60 (MobileNetV2, extended).
      options: 3 and 14, see `SPACES`.
      steps: Lengths of the runs in training steps.
      controllers: Some of `CONTROLLERS`.
      seeds: Landscapes per row.
      scale: Quality, its noise included, is multiplied by this.
      trend: Quality rises by this times the square root of the share of the run that is done, as in training.
      drift: Standard deviation of the logarithm by which sensitivities have moved at the end.
      interaction: Share of the loss of two neighbours' geometric mean that comes on top (0 = additive).
      prior: Whether the critic is given the formats' noise power.
    """

    decisions: tuple[int, ...] = (22, 60)
    options: tuple[int, ...] = (3, 14)
    steps: tuple[int, ...] = (500, 2000, 10000)
    controllers: tuple[str, ...] = CONTROLLERS
    seeds: int = 8
    scale: float = 1.0
    trend: float = 0.0
    drift: float = 0.0
    interaction: float = 0.0
    prior: bool = True


def resnet20_macs() -> np.ndarray:
    """MACs of ResNet-20 on 32x32: 19 convolutions, 2 projection shortcuts (1x1), 1 dense layer. float64 [22]."""
    same = 9 * 16 * 16 * 32 * 32  # a 3x3 convolution of any stage: channels double as the area falls to a quarter
    down, shortcut = same // 2, same // 18
    return np.array(
        [27 * 16 * 32 * 32, *[same] * 6, down, same, shortcut, *[same] * 4, down, same, shortcut, *[same] * 4, 640],
        float,
    )


def mobilenet_v2_macs() -> np.ndarray:
    """MACs of MobileNetV2 on 224x224, extended from 53 to 60 layers: two bottlenecks more (6 layers) in the stage of
    160 channels, and a hidden dense layer of 1280. float64 [60]."""
    macs = [27 * 32 * 112**2, 9 * 32 * 112**2, 32 * 16 * 112**2]
    channels, size = 16, 112
    for filters, repeats, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 5, 2), (320, 1, 1)):
        for i in range(repeats):
            wide = 6 * channels
            macs.append(channels * wide * size**2)
            size //= stride if i == 0 else 1
            macs += [9 * wide * size**2, wide * filters * size**2]
            channels = filters
    return np.array([*macs, 320 * 1280 * size**2, 1280 * 1280, 1280 * 1000], float)


MACS = {22: resnet20_macs, 60: mobilenet_v2_macs}


class Landscape:
    """A landscape and what is known of it.

    Args:
      macs: [D].
      formats: Format names.
      seed: Of the sensitivities.
      drift: See `Params`.

    Attributes:
      start, loss: [D, N]; quality lost by each option when the run begins, and when it ends.
      ratio: [D, N]; cost over target.
    """

    # Recipes up to this cost ratio have an optimum; costs are counted in this many bins.
    _TOP, _BINS = 2.0, 20_000

    def __init__(self, macs: np.ndarray, formats: tuple[str, ...], seed: int, drift: float = 0.0):
        rng = np.random.default_rng(seed)
        bits = np.array([Format(name).bits for name in formats], float)
        sensitivity = np.exp(rng.normal(size=len(macs)))
        moved = sensitivity * np.exp(drift * rng.normal(size=len(macs)))
        self.start, self.loss = (0.10 * s[:, None] / s.sum() * 4.0 ** (4 - bits) for s in (sensitivity, moved))
        self.ratio = macs[:, None] * bits**2 / (macs.sum() * (4**2 + 8**2) / 2)

        bins = np.round(self.ratio / self._TOP * self._BINS).astype(int)
        best = np.zeros(self._BINS + 1)
        for d in range(len(macs)):
            options = [
                np.concatenate([np.full(min(b, len(best)), np.inf), best[: max(len(best) - b, 0)]]) + lost
                for b, lost in zip(bins[d], self.loss[d])
            ]
            best = np.min(options, axis=0)
        self._optimum = np.minimum.accumulate(best)

    def optimum(self, ratio: float) -> float:
        """Least loss of a recipe of this cost ratio or less."""
        return float(self._optimum[int(min(ratio / self._TOP, 1.0) * self._BINS)])

    def random(self, ratio: float) -> float:
        """Mean loss of a random recipe of this cost ratio."""
        low, high = -1e4, 1e4
        for _ in range(100):
            price = (low + high) / 2
            logits = -price * self.ratio
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            low, high = (price, high) if (p * self.ratio).sum() > ratio else (low, price)
        return float((p * self.loss).sum())

    def judge(self, sample: np.ndarray) -> dict[str, float]:
        """Share of the way to the optimum, loss, optimum, random (of loss) and cost ratio of a sample."""
        rows = np.arange(len(sample))
        lost, ratio = self.loss[rows, sample].sum(), self.ratio[rows, sample].sum()
        random, optimum = self.random(ratio), self.optimum(ratio)
        share = (random - lost) / (random - optimum) if random > optimum else np.nan
        return {"share": share, "lost": lost, "optimum": optimum, "random": random, "ratio": ratio}


def make_controller(kind: str, decisions: int, formats: tuple[str, ...], prior: bool = True):
    """(controller, reward, samples per reading, steps between readings or None for the default) of a row.

    Source of the settings: method.md section 4; "REINFORCE normalized" is our default of
    estimator="reinforce" with a reward that suits the noise. The warmup
    is a quarter of the run in all of them (reference code: 500 steps).
    """
    noise = [Format(name).noise() for name in formats]
    sizes = [len(formats)] * decisions
    plain = {"estimator": "reinforce", "frozen": 0.0}
    if kind.startswith("critic"):
        controller = Controller(sizes, prior=[[2 * n for n in noise]] * decisions if prior else None)
        return controller, rewards.OneSided(), *((1, 1) if "single" in kind else (4, None))
    if kind == "REINFORCE normalized":
        return Controller(sizes, **plain), rewards.Absolute(-0.1), 1, 1
    if kind == "REINFORCE reference":
        return Controller(sizes, **plain, learning_rate=0.05, normalize_advantage=False), rewards.Absolute(-1.0), 1, 1
    if kind == "REINFORCE TuNAS":
        settings = {"beta_1": 0.0, "beta_max": 0.0, "baseline_momentum": 0.95, "sum_over_decisions": True}
        controller = Controller(
            sizes,
            **plain,
            **settings,
            normalize_advantage=False,
            # Grows tenfold from the end of the warmup on; the length of the run is a variable of the controller.
            learning_rate=lambda step: schedules.Growing(
                4.8e-3, controller.total_steps, tf.cast(controller.total_steps, tf.float32) / 4.0
            )(step),
        )
        return controller, rewards.Absolute(-0.1), 1, 1
    raise ValueError(f"Unknown controller {kind!r}; known: {', '.join(CONTROLLERS)}.")


def run(params: Params = Params()):
    """Runs searches, row by row of the table.

    Args:
      params: See `Params`.

    Yields:
      dicts: controller, decisions, options, steps, then means over seeds of share, lost, optimum, random, ratio,
      entropy (at the end) and before (before the decision), and worst (the lowest share), worst_ratio (furthest from
      1) and seconds (per search, median).
    """
    for decisions in params.decisions:
        for options in params.options:
            for kind in params.controllers:
                search = _make_search(params, kind, decisions, options)
                for steps in params.steps:
                    results = [search(steps, seed) for seed in range(params.seeds)]
                    yield {
                        "controller": kind,
                        "decisions": decisions,
                        "options": options,
                        "steps": steps,
                        **{key: float(np.nanmean([r[key] for r in results])) for key in results[0]},
                        "worst": min(r["share"] for r in results),
                        "worst_ratio": max((r["ratio"] for r in results), key=lambda x: abs(x - 1)),
                        "seconds": float(np.median([r["seconds"] for r in results])),
                    }


def _make_search(params: Params, kind: str, decisions: int, options: int):
    """(steps, seed) -> what one search came to; compiled once for all of them."""
    formats = SPACES[options]
    controller, reward, k, every = make_controller(kind, decisions, formats, params.prior)
    losses = [tf.Variable(tf.zeros([decisions, options])) for _ in range(2)]
    ratio = tf.Variable(tf.ones([decisions, options]))
    rows = np.arange(decisions)
    controller.configure(
        expected_cost=lambda p: tf.reduce_sum(p * ratio),
        cost=lambda samples: ratio.numpy().astype(float)[rows, samples].sum(axis=1),
        target=1.0,
        reward=reward,
        total_steps=1,
        trains_with_samples=k == 1,
    )
    initial = controller.get_weights()

    def read(samples, t, seed):
        lost = losses[0] ** (1.0 - t) * losses[1] ** t
        each = tf.reduce_sum(tf.one_hot(samples, options) * lost, axis=2)
        mixed = params.interaction * tf.reduce_sum(tf.sqrt(each[:, 1:] * each[:, :-1]), axis=1)
        noise = tf.random.stateless_normal([k + 1], seed) * NOISE
        noise = SHARED**0.5 * noise[0] + (1.0 - SHARED) ** 0.5 * noise[1:]
        return params.scale * (params.trend * tf.sqrt(t) + noise - tf.reduce_sum(each, axis=1) - mixed)

    @tf.function(jit_compile=True)
    def learn(seed, updates, every):
        for i in tf.range(updates):
            samples = controller.sample(tf.stack([seed, 2 * i]), k)
            t = tf.cast(controller.step, tf.float32) / tf.cast(controller.total_steps, tf.float32)
            controller.update(samples, read(samples, t, tf.stack([seed, 2 * i + 1])))
            controller.advance(every)

    def search(steps, seed):
        land = Landscape(MACS[decisions](), formats, seed, params.drift)
        controller.set_weights(initial)
        controller.total_steps.assign(steps)
        for variable, value in zip((*losses, ratio), (land.start, land.loss, land.ratio)):
            variable.assign(value.astype(np.float32))
        start = time.perf_counter()
        interval = every or controller.reading_interval()
        learn(tf.constant(seed), tf.constant(controller.decided_at() // interval), tf.constant(interval))
        before = float(controller.entropy())
        result = land.judge(controller.decide())
        seconds = time.perf_counter() - start
        return {**result, "before": before, "entropy": float(controller.entropy()), "seconds": seconds}

    return search


HEADER = (
    f"{'controller':<24} {'decisions':>9} {'options':>7} {'steps':>6} {'share':>7} {'worst':>7} {'lost':>6} "
    f"{'optimum':>7} {'random':>6} {'cost':>6} {'worst':>6} {'entropy':>8} {'s':>6}"
)


def table_line(row: dict) -> str:
    """A row for the terminal: shares in %, losses in points, cost over target, entropy before > after deciding."""
    return (
        f"{row['controller']:<24} {row['decisions']:>9} {row['options']:>7} {row['steps']:>6} {row['share']:>7.1%} "
        f"{row['worst']:>7.1%} {100 * row['lost']:>6.2f} {100 * row['optimum']:>7.2f} {100 * row['random']:>6.2f} "
        f"{row['ratio']:>6.3f} {row['worst_ratio']:>6.3f} {row['before']:>4.0%}>{row['entropy']:<3.0%} "
        f"{row['seconds']:>6.1f}"
    )


def _define_flags():
    flags.DEFINE_list("decisions", ["22", "60"], "22 (ResNet-20), 60 (MobileNetV2, extended).")
    flags.DEFINE_list("options", ["3", "14"], "Options per decision: 3 or 14.")
    flags.DEFINE_list("steps", ["500", "2000", "10000"], "Training steps of a run.")
    flags.DEFINE_list("controllers", None, "Part of a name, or several; default: all.")
    flags.DEFINE_integer("seeds", 8, "Landscapes per row.")
    flags.DEFINE_float("scale", 1.0, "Multiplies quality and its noise.")
    flags.DEFINE_float("trend", 0.0, "Rise of quality over the run.")
    flags.DEFINE_float("drift", 0.0, "How far sensitivities move (deviation of their logarithm).")
    flags.DEFINE_float("interaction", 0.0, "Loss of neighbouring decisions that is not additive.")
    flags.DEFINE_bool("prior", True, "Give the critic the formats' noise power.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    f = flags.FLAGS
    chosen = [c for c in CONTROLLERS if f.controllers is None or any(part in c for part in f.controllers)]
    params = Params(
        decisions=tuple(map(int, f.decisions)),
        options=tuple(map(int, f.options)),
        steps=tuple(map(int, f.steps)),
        controllers=tuple(chosen),
        seeds=f.seeds,
        scale=f.scale,
        trend=f.trend,
        drift=f.drift,
        interaction=f.interaction,
        prior=f.prior,
    )
    print(HEADER)
    for row in run(params):
        print(table_line(row), flush=True)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
