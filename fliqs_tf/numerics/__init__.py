"""Formats, and the numbers that they hold. Nothing of Keras."""
