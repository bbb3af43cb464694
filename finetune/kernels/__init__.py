"""Computation with 4-bit experts: the NF4 codec and the frozen mixture-of-experts operation."""
