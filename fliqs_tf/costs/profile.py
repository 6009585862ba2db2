"""Hardware profiles: what a platform can multiply, and what a multiply-add costs there.

A profile is a JSON file. Its prices are those of a `Cost`, so a search can aim at a platform and one recipe can be
priced on several:

    profile = fliqs_tf.Profile.load("nvidia_h100_sxm")     # shipped: fliqs_tf.Profile.shipped(); or a path
    qmodel = fliqs_tf.wrap(model, profile=profile)          # the space is what the platform has
    profile.cost(qmodel, recipe)                            # in profile.unit, per example
    profile.unsupported_layers(qmodel, recipe)              # layers that the platform cannot run, and why

The file:

    {"name": "NVIDIA H100 SXM",
     "about": "Time at the peak rate of dense matrix products.",
     "unit": "us",                               the unit of a network's cost
     "per_unit": 1000000,                        figures of this file that make one of it: picoseconds, here
     "float": "BF16",                            optional: the format in which tensors that stay in float run; FP32
     "sources": {"datasheet": {"title": "...", "url": "https://...", "says": "the figure as it is printed"}},
     "cost_per_mac": [
       {"weights": ["BF16"], "activations": ["BF16"], "cost": "2/989.4", "sources": ["datasheet"]},
       {"weights": ["INT4", "INT8"], "activations": ["BF16"], "cost": "2/989.4", "sources": ["datasheet"]}],
     "bytes_per_weight": [                       optional: where it is not bits / 8
       {"formats": ["E2M1"], "bytes": "17/32", "sources": ["datasheet"]}]}

An entry holds for each of its weight formats with each of its activation formats. A pair of formats that no entry
names cannot run. Figures are positive: numbers, or texts such as "2/989.4", which keep what the source prints (two
operations per MAC at 989.4 of them per picosecond). They are exact fractions, and so is the price of a layer; totals
and tables of samples are float64.
"""

from __future__ import annotations

import dataclasses
import fractions
import functools
import os
import pathlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fliqs_tf._keras import keras
from fliqs_tf.costs import counting, pricing, profile_entries
from fliqs_tf.io.files import read_json
from fliqs_tf.numerics.formats import Format
from fliqs_tf.numerics.space import Space, SpaceLike
from fliqs_tf.quantize.recipe import Recipe

_SHIPPED = pathlib.Path(__file__).parent / "profiles"
_MOST_BYTES = 2**20
_MOST_SUBSETS = 4096
_KEYS = {"name", "about", "unit", "per_unit", "float", "sources", "cost_per_mac", "bytes_per_weight"}
_NEEDED = ("name", "unit", "per_unit", "sources", "cost_per_mac")


@dataclasses.dataclass(frozen=True)
class UnsupportedLayer:
    """A layer that a platform cannot run.

    Attributes:
      path: Of the layer.
      weights, activations: Its formats.
      reason: A sentence.
    """

    path: str
    weights: str
    activations: str
    reason: str


@keras.saving.register_keras_serializable("fliqs_tf")
class Profile:
    """What a platform can multiply, and what it costs.

    Args:
      data: JSON data as in the description of this module.

    Raises:
      ValueError: Says which entry is wrong and what is allowed.
    """

    def __init__(self, data: Mapping[str, Any]):
        profile_entries.check_keys(data, _KEYS, _NEEDED, "A hardware profile")
        self.data = dict(data)
        self.name = profile_entries.checked_text(data["name"], "name")
        self.unit = profile_entries.checked_text(data["unit"], "unit")
        self.about = profile_entries.checked_text(data.get("about", ""), "about", least=0)
        per_unit = data["per_unit"]
        if isinstance(per_unit, bool) or not isinstance(per_unit, int) or not 1 <= per_unit <= 10**18:
            raise ValueError(f'"per_unit" must be a whole number, 1 to 10^18, got {reprlib.repr(per_unit)}.')
        self.per_unit = per_unit
        self.sources = profile_entries.sources(data["sources"])
        self.float_format = profile_entries.formats([data.get("float", "FP32")], '"float"')[0]
        self.pairs = profile_entries.pairs(data["cost_per_mac"], self.sources)
        self._bytes = profile_entries.weight_sizes(data.get("bytes_per_weight", []), self.sources)
        if self.float_format != "FP32" and any("FP32" in pair for pair in self.pairs):
            raise ValueError(
                f'"float" is {self.float_format}: FP32 runs as that, so "cost_per_mac" must not price FP32 itself.'
            )

    @classmethod
    def load(cls, source: str | os.PathLike | Profile) -> Profile:
        """Reads a profile.

        Args:
          source: Path of a JSON file, the name of a shipped profile, or a profile, which is given back.

        Raises:
          ValueError: The file is not a profile, which the message names with what is wrong; or a name that is neither
            a file nor shipped.
          OSError: The file cannot be read.
        """
        if isinstance(source, Profile):
            return source
        if not isinstance(source, (str, os.PathLike)):
            raise ValueError(f"A profile is given by its path or name, got {reprlib.repr(source)}.")
        text = os.fspath(source)
        if not text or "\0" in text:
            raise ValueError(f"A profile is given by its path or name, got {reprlib.repr(source)}.")
        path = pathlib.Path(text)
        if path.name == text and text in cls.shipped():
            path = _SHIPPED / f"{text}.json"
        elif not path.suffix and not path.exists():
            raise ValueError(
                f"Unknown profile {reprlib.repr(text)}; shipped: {', '.join(cls.shipped())}. For one of your own give "
                f"the path of its JSON file."
            )
        data = read_json(path, "hardware profile", _MOST_BYTES)
        try:
            return cls(data)
        except ValueError as error:
            raise ValueError(f"{path} is not a hardware profile: {error}") from None

    @staticmethod
    def shipped() -> tuple[str, ...]:
        """Names of the profiles that come with the package."""
        return tuple(sorted(path.stem for path in _SHIPPED.glob("*.json")))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.data == other.data

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"Profile({self.name!r})"

    # ---- prices

    @functools.cached_property
    def cost(self) -> pricing.Cost:
        """What a network costs on the platform, in `unit` per example: sum over layers of MACs * cost per MAC."""
        return pricing.Cost(self.name, self.unit, self.per_unit, self._price)

    @functools.cached_property
    def memory(self) -> pricing.Cost:
        """Size of the kernels as the platform stores them, in MiB."""
        return pricing.Cost(f"memory on {self.name}", "MiB", 2**20, self._size)

    def _price(self, site: counting.Site, weights: Format, activations: Format) -> fractions.Fraction:
        if site.is_table:  # multiplies nothing
            return fractions.Fraction(0)
        reason = self.why_not(weights, activations)
        if reason:
            raise ValueError(
                f"{self.name} cannot run layer {site.path!r} with {self._as_run(weights)} weights and "
                f"{self._as_run(activations)} inputs: {reason} Wrap with profile=... for formats that it can run."
            )
        return site.macs * self.pairs[self._as_run(weights), self._as_run(activations)]

    def _size(self, site: counting.Site, weights: Format, activations: Format) -> fractions.Fraction:
        name = self._as_run(weights)
        return site.weights * self._bytes.get(name, fractions.Fraction(Format(name).bits, 8))

    def _as_run(self, fmt: Format | str) -> str:
        name = Format(fmt).name
        return self.float_format if name == "FP32" else name

    # ---- what can run

    def why_not(self, weights: Format | str, activations: Format | str) -> str:
        """Why a pair of formats cannot run; "" if it can."""
        weights, activations = self._as_run(weights), self._as_run(activations)
        if (weights, activations) in self.pairs:
            return ""
        partners = [a for w, a in self.pairs if w == weights]
        if partners:
            return f"It multiplies {weights} weights only by {profile_entries.listed(partners)} inputs."
        known = list(dict.fromkeys(w for w, _ in self.pairs))
        return f"It has no {weights} weights, only {profile_entries.listed(known)}."

    def unsupported_layers(
        self,
        model: keras.Model | list[tuple[counting.Site, Format, Format]],
        formats: Recipe | Format | str | None = None,
    ) -> list[UnsupportedLayer]:
        """The layers that the platform cannot run, in network order; [] if it runs the network.

        Args:
          model: A wrapped, deployed or plain Keras model.
          formats: A recipe, or one format for every quantized layer. None: as for `costs.Cost`.

        Raises:
          ValueError: The recipe does not fit the model.
        """
        found = []
        for site, weights, activations in counting.site_formats(model, formats):
            if site.is_table:  # nothing is multiplied
                continue
            if reason := self.why_not(weights, activations):
                if "FP32" in (weights.name, activations.name):
                    reason += f" What stays in float runs in {self.float_format} there."
                found.append(UnsupportedLayer(site.path, self._as_run(weights), self._as_run(activations), reason))
        return found

    def spaces(self, tensors: str = "together", space: SpaceLike | None = None) -> tuple[Space, Space]:
        """Spaces of weights and of inputs of which every choice can run.

        With "together" they are the formats that the platform multiplies by themselves, with "weights" the weight
        formats that it multiplies by inputs that stay in float. With "separate" weights and inputs are chosen each
        for themselves, so every combination must run: of all such pairs of spaces those with the widest range of cost,
        and among these with the most combinations.

        Args:
          tensors: "together", "weights" or "separate", as for `fliqs_tf.wrap`.
          space: What to take formats from, anything that `Space` takes. None: all that the platform has.

        Returns:
          (space of weights, space of inputs); that of inputs is of no use with "weights".

        Raises:
          ValueError: The space has a format that the platform cannot run so, or there is nothing to choose.
        """
        own = {
            "together": {w for w, a in self.pairs if w == a},
            "weights": {w for w, a in self.pairs if a == self.float_format},
            "separate": {fmt for pair in self.pairs for fmt in pair},
        }
        if tensors not in own:
            raise ValueError(f"tensors must be one of {', '.join(own)}, got {tensors!r}.")
        wanted = Space(space).names if space is not None else Space(own[tensors]).names if own[tensors] else ()
        if missing := [name for name in wanted if name not in own[tensors]]:
            how = {"together": " as weights and inputs of one layer", "separate": ""}
            has = f"it has {profile_entries.listed(list(Space(own[tensors]).names))}" if own[tensors] else "it has none"
            raise ValueError(
                f"The space has {profile_entries.listed(missing)}, which {self.name} does not have"
                f"{how.get(tensors, f' as weights with {self.float_format} inputs')}; {has}."
            )
        weights, activations = self._widest_block(wanted) if tensors == "separate" else (wanted, wanted)
        if space is None and len(weights) < 2 and len(activations) < 2:
            pairs = [f"{w} x {a}" for w, a in self.pairs]
            raise ValueError(
                f"With tensors={tensors!r} {self.name} leaves nothing to choose. It multiplies (weights x inputs) "
                f"{profile_entries.listed(pairs)}. Try another tensors=, or fliqs_tf.apply(model, format)."
            )
        return Space(weights), Space(activations)

    def _widest_block(self, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
        """Weight formats and input formats of which every combination is a pair; see `spaces`."""
        partners: dict[str, set[str]] = {}
        for w, a in self.pairs:
            if w in wanted and a in wanted:
                partners.setdefault(w, set()).add(a)
        # The inputs of a largest block are what some weight formats have in common.
        common: set[frozenset[str]] = set()
        for inputs in partners.values():
            common |= {frozenset(inputs)} | {c & inputs for c in common}
            if len(common) > _MOST_SUBSETS:
                raise ValueError(f"{self.name} has too many combinations for tensors='separate': give a smaller space.")
        blocks = [([w for w, its in partners.items() if inputs <= its], sorted(inputs)) for inputs in common if inputs]
        if not blocks:
            raise ValueError(f"{self.name} multiplies none of {profile_entries.listed(list(wanted))} by each other.")

        def worth(block: tuple[list[str], list[str]]) -> tuple[fractions.Fraction, int, tuple[list[str], list[str]]]:
            prices = [self.pairs[w, a] for w in block[0] for a in block[1]]
            # The names last, so that the choice does not depend on the order of a set.
            return max(prices) / min(prices), len(prices), block

        return max(blocks, key=worth)

    def check(self, sites: Sequence[counting.Site]) -> None:
        """Raises unless the platform can run every choice that a search of these layers may make.

        Raises:
          ValueError: Names the layer, its formats and what the platform has.
        """
        for site in sites:
            together = site.weight_decision is not None and site.weight_decision == site.activation_decision
            for w in site.weight_formats:
                for a in (w,) if together else site.activation_formats:
                    self._price(site, Format(w), Format(a))

    # ---- saving

    def get_config(self) -> dict[str, Any]:
        return {"data": self.data}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Profile:
        return cls(**config)
