"""The kernels of a decoding step on the device: the cases that the interpreter runs on a CPU, at full sizes too."""

from tests.kernels.interpreted.decode_cases import *  # noqa: F403
