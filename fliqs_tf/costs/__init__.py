"""Costs: what a network with given formats costs, in bit operations, in memory, or on a platform."""

from fliqs_tf.costs.cost_table import CostTable, parse_target_cost
from fliqs_tf.costs.counting import FLOAT, Site, recipe_of, site_formats, sites
from fliqs_tf.costs.pricing import NAMES, Cost, bops, memory

__all__ = [
    "FLOAT",
    "NAMES",
    "Cost",
    "CostTable",
    "Site",
    "bops",
    "memory",
    "parse_target_cost",
    "recipe_of",
    "site_formats",
    "sites",
]
