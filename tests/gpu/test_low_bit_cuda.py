"""The kernels of 2 and 3 bits on the device: the cases that the interpreter runs on a CPU, at full sizes too."""

from tests.kernels.interpreted.low_bit_cases import *  # noqa: F403
