"""A Keras model as a graph: kinds of layers, paths, shapes and MACs, calls on values, and copies with layers put in."""
