"""Measuring: the training path, what others would do instead, single kernels; a table, then one JSON line."""
