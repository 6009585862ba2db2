"""Contracts of import-linter that look past tests, which stand beside the code and may import anything."""

from importlinter.contracts.acyclic_siblings import AcyclicSiblingsContract
from importlinter.contracts.layers import LayersContract


def _without_tests(graph):
    for module in set(graph.modules):
        if module.endswith("_test"):
            graph.remove_module(module)
    return graph


class Layers(LayersContract):
    """Layers, of all modules but tests."""

    def check(self, graph, verbose):
        return super().check(_without_tests(graph), verbose)


class NoCycles(AcyclicSiblingsContract):
    """No cycles among packages, nor among the modules of one, tests aside."""

    def check(self, graph, verbose):
        return super().check(_without_tests(graph), verbose)
