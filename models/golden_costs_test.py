"""Costs of the networks against testdata/model_costs.json, and that table against arithmetic from the papers' tables.

Three things must agree to the last digit: the MACs and kernel weights that the package counts in the built network,
those in the file, and those that the functions below add up layer by layer from the architecture tables of the papers.
Published figures agree within half a percent.
"""

import json
import math
import pathlib

import pytest

import models
from fliqs_tf import costs
from fliqs_tf.numerics.formats import Format

GOLDEN = json.loads((pathlib.Path(__file__).resolve().parents[1] / "testdata" / "model_costs.json").read_text())[
    "models"
]
BITS = {"E2M1": 4, "INT8": 8, "BF16": 16}
# Seconds each to build and to trace; `pytest -m slow` runs the others.
QUICK = {("resnet18", 224), ("resnet50", 224), ("mobilenet_v2", 224), ("efficientnet_b0", 224), ("deit_small", 224)}

# Trainable parameters, as torchvision publishes them (num_params; DeiT: timm). ResNet-18 has the projection of the
# first stage in addition.
PARAMETERS = {
    "resnet18": 11_689_512 + 64 * 64 + 2 * 64,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "inception_v3": 23_817_352,  # Keras: without the auxiliary classifier, 23.85 M with moving averages
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
}


class Sum:
    """MACs and weights of convolutions, one after the other."""

    def __init__(self, side, channels=3):
        self.side, self.channels, self.macs, self.weights = side, channels, 0, 0

    def conv(self, filters, kernel, stride=1, *, valid=False, depthwise=False):
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.side = (self.side - height) // stride + 1 if valid else math.ceil(self.side / stride)
        weights = height * width * self.channels * (1 if depthwise else filters)
        self.macs += self.side**2 * weights
        self.weights += weights
        self.channels = self.channels if depthwise else filters
        return self

    def dense(self, outputs, inputs=None, rows=1):
        weights = (inputs or self.channels) * outputs
        self.macs += rows * weights
        self.weights += weights
        self.channels = outputs
        return self

    def branch(self, *convs):
        """Convolutions on the side: counted, but what follows sees none of them."""
        other = Sum(self.side, self.channels)
        for conv in convs:
            arguments, options = (conv[:-1], conv[-1]) if isinstance(conv[-1], dict) else (conv, {})
            other.conv(*arguments, **options)
        self.macs += other.macs
        self.weights += other.weights
        return other

    def branches(self, *paths):
        """Paths from the same input whose outputs are put one after the other."""
        ends = [self.branch(*path) for path in paths]
        self.side, self.channels = ends[0].side, sum(end.channels for end in ends)
        return self


def resnet(side, blocks, expansion):
    net = Sum(side).conv(64, 7, 2)
    net.side = math.ceil(net.side / 2)
    for stage, (filters, count) in enumerate(zip((64, 128, 256, 512), blocks)):
        for block in range(count):
            stride = 2 if stage and not block else 1
            if not block:
                net.branch((filters * expansion, 1, stride))
            if expansion == 1:
                net.conv(filters, 3, stride).conv(filters, 3)
            else:
                net.conv(filters, 1).conv(filters, 3, stride).conv(4 * filters, 1)
    return net.dense(1000)


def mobilenet_v2(side):
    """Table 2 of arXiv 1801.04381: expansion, filters, repeats, stride."""
    net = Sum(side).conv(32, 3, 2)
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, filters, repeats, stride in table:
        for repeat in range(repeats):
            if expansion > 1:
                net.conv(net.channels * expansion, 1)
            net.conv(None, 3, 1 if repeat else stride, depthwise=True).conv(filters, 1)
    return net.conv(1280, 1).dense(1000)


def efficientnet(side, width, depth):
    """Table 1 of arXiv 1905.11946: kernel, repeats, filters, expansion, stride. Squeezed to a quarter of the input."""

    def filters(base):
        near = max(8, int(base * width + 4) // 8 * 8)
        return near + 8 if near < 0.9 * base * width else near

    net = Sum(side).conv(filters(32), 3, 2)
    table = [(3, 1, 16, 1, 1), (3, 2, 24, 6, 2), (5, 2, 40, 6, 2), (3, 3, 80, 6, 2), (5, 3, 112, 6, 1)]
    table += [(5, 4, 192, 6, 2), (3, 1, 320, 6, 1)]
    for kernel, repeats, base, expansion, stride in table:
        for repeat in range(math.ceil(repeats * depth)):
            squeezed = net.channels // 4
            if expansion > 1:
                net.conv(net.channels * expansion, 1)
            net.conv(None, kernel, 1 if repeat else stride, depthwise=True)
            inner = net.channels
            net.dense(squeezed).dense(inner)
            net.conv(filters(base), 1)
    return net.conv(filters(1280), 1).dense(1000)


def inception_v3(side):
    """Table 1 and figures 5 to 7 of arXiv 1512.00567, as released: 7x7 is 1x7 and 7x1."""
    valid = {"valid": True}
    net = Sum(side).conv(32, 3, 2, valid=True).conv(32, 3, valid=True).conv(64, 3)
    net.side = (net.side - 3) // 2 + 1
    net.conv(80, 1, valid=True).conv(192, 3, valid=True)
    net.side = (net.side - 3) // 2 + 1
    for pooled in (32, 64, 64):
        net.branches([(64, 1)], [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)], [(pooled, 1)])
    kept = net.channels
    net.branches([(384, 3, 2, valid)], [(64, 1), (96, 3), (96, 3, 2, valid)])
    net.channels += kept
    row, column = (1, 7), (7, 1)
    for c in (128, 160, 160, 192):
        net.branches(
            [(192, 1)],
            [(c, 1), (c, row), (192, column)],
            [(c, 1), (c, column), (c, row), (c, column), (192, row)],
            [(192, 1)],
        )
    kept = net.channels
    net.branches([(192, 1), (320, 3, 2, valid)], [(192, 1), (192, row), (192, column), (192, 3, 2, valid)])
    net.channels += kept
    for _ in range(2):
        # 384 filters of 1x3 beside 384 of 3x1 count like 768 of 1x3.
        fork = (768, (1, 3))
        net.branches([(320, 1)], [(384, 1), fork], [(448, 1), (384, 3), fork], [(192, 1)])
    return net.dense(1000)


def deit(side, width):
    """Patches of 16x16 and a class token; 12 blocks of query, key, value, output and two layers of 4 x width."""
    net = Sum(side // 16 * 16, 16 * 16 * 3).dense(width, rows=(side // 16) ** 2)
    for _ in range(12):
        tokens = (side // 16) ** 2 + 1
        for _ in range(4):
            net.dense(width, rows=tokens)
        net.dense(4 * width, rows=tokens).dense(width, rows=tokens)
    return net.dense(1000)


BY_HAND = {
    "resnet18": lambda side: resnet(side, (2, 2, 2, 2), 1),
    "resnet50": lambda side: resnet(side, (3, 4, 6, 3), 4),
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_b0": lambda side: efficientnet(side, 1.0, 1.0),
    "efficientnet_b1": lambda side: efficientnet(side, 1.0, 1.1),
    "efficientnet_b2": lambda side: efficientnet(side, 1.1, 1.2),
    "efficientnet_b3": lambda side: efficientnet(side, 1.2, 1.4),
    "efficientnet_b4": lambda side: efficientnet(side, 1.4, 1.8),
    "inception_v3": inception_v3,
    "deit_tiny": lambda side: deit(side, 192),
    "deit_small": lambda side: deit(side, 384),
    "deit_base": lambda side: deit(side, 768),
}


def name_of(row):
    return f"{row['model']}-{row['side']}"


@pytest.mark.parametrize("row", GOLDEN, ids=name_of)
def test_table_is_what_the_papers_architectures_add_up_to(row):
    net = BY_HAND[row["model"]](row["side"])
    assert (net.macs, net.weights) == (row["macs"], row["weights"])
    assert row["gbops"] == {name: row["macs"] * bits**2 / 10**9 for name, bits in BITS.items()}


@pytest.mark.parametrize("row", [r for r in GOLDEN if r["published"]], ids=name_of)
def test_table_agrees_with_published_figures(row):
    for published in row["published"]:
        if published["of"] == "GMACs":
            ours = (row["macs"] + published.get("counts_also", 0)) / 10**9
        else:
            ours = row["gbops"][published["of"]]
        # Half a percent, or half a unit of the last digit that is printed.
        last_digit = 10.0 ** -len(str(published["value"]).partition(".")[2])
        assert abs(ours - published["value"]) < max(0.005 * published["value"], last_digit / 2)


def test_every_model_for_224_is_in_the_table():
    at_224 = {row["model"] for row in GOLDEN if row["side"] == 224}
    assert at_224 == set(BY_HAND) and at_224 <= set(models.MODELS)


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=name_of(r), marks=[pytest.mark.slow] * ((r["model"], r["side"]) not in QUICK)) for r in GOLDEN],
)
def test_costs_and_parameters_of_the_built_network(row):
    model = models.get(row["model"], input_shape=(row["side"], row["side"], 3))
    sites = costs.sites(model)
    macs, weights = sum(site.macs for site in sites), sum(site.weights for site in sites)
    assert (macs, weights) == (row["macs"], row["weights"])
    assert isinstance(macs, int) and isinstance(weights, int)
    for name, gbops in row["gbops"].items():
        prices = [costs.bops.layer(site, Format(name), Format(name)) for site in sites]
        assert all(type(price) is int for price in prices) and sum(prices) / 10**9 == gbops
    assert sum(math.prod(v.shape) for v in model.trainable_variables) == PARAMETERS[row["model"]]
    if row["model"] == "resnet18":  # the whole way once; it counts the network anew
        assert costs.bops(model, "E2M1") == row["gbops"]["E2M1"]
