from .decode import bench_decode as bench_decode
from .result import hand_over as hand_over
from .result import require_appendable as require_appendable
from .train import bench_train as bench_train
