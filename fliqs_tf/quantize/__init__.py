"""A float model to its quantized copy: rules, decisions, recipes."""
