"""Where a step's device time goes, by family of kernels.

Each kernel belongs to the first family whose pattern its name matches. A matrix product says more by its shapes: those
of the operation that launched it hold the experts' intermediate size (gemm experts) or the vocabulary (head and loss).
Kernel times come from the profiler and are exact; the time of a step comes from outside it, since profiling slows the
host down, and what is left of it is idle.

Leaves out: overlap of streams (a step here uses one).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

EXPERT_GEMM, GEMM, HEAD = "gemm, experts", "gemm, other", "head and loss"
COPIES, OTHER = "copies and elementwise", "other"
# First match wins, whatever the case: flash attention's names hold `cutlass`, a loss's hold `softmax`.
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("dequantization", r"dequantize"),
    ("swiglu", r"swiglu|silu"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("norm and rope", r"rms_?norm|layer_?norm|_rope|rope_|rotary"),
    (HEAD, r"cross_entropy|nll_loss|log_?softmax|logprob|^_forward_kernel|^_backward_kernel"),
    ("optimizer", r"adam|multi_tensor|\blion"),
    ("router", r"softmax|topk|sort|searchsorted|bincount|histogram|DeviceScan"),
    ("gather and combine", r"gather|scatter|combine_rows|index_elementwise|indexSelect|index_put"),
    (GEMM, r"nvjet|gemm|xmma|cutlass|grouped_mm|splitK|gemv|cublas|dot_kernel"),
    (COPIES, r"elementwise|memcpy|memset|copy|cast|fill|CatArray|reduce|arange"),
)
_FAMILIES = tuple((family, re.compile(pattern, re.IGNORECASE)) for family, pattern in _PATTERNS)
FAMILIES = (EXPERT_GEMM, *(family for family, _ in _PATTERNS), OTHER)


@dataclass(frozen=True)
class Kernel:
    """One launch: name, microseconds, and the sizes in the shapes of the operation it came from."""

    name: str
    microseconds: float
    sizes: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Share:
    """A family's part of one step."""

    family: str
    milliseconds: float
    share: float
    launches: float


@dataclass(frozen=True)
class TimeSplit:
    """One step, split; `largest_other` names the kernels that belong to copies, elementwise work or no family."""

    shares: list[Share]
    idle_milliseconds: float
    idle_share: float
    largest_other: list[Share]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(family, ms per step, share, launches) for a table, idle time last."""
        rows = [
            (part.family, f"{part.milliseconds:,.2f}", f"{part.share:.1%}", f"{part.launches:,.0f}")
            for part in self.shares
        ]
        return [*rows, ("idle", f"{self.idle_milliseconds:,.2f}", f"{self.idle_share:.1%}", "")]


def classify(kernel: Kernel, *, intermediate: int, vocab: int) -> str:
    """The family of a kernel.

    Args:
        intermediate: the experts' F; a matrix product with F or 2F in its shapes is theirs.
        vocab: a matrix product with this in its shapes is the head's.
    """
    family = next((family for family, pattern in _FAMILIES if pattern.search(kernel.name)), OTHER)
    if family == GEMM:
        if kernel.sizes & {intermediate, 2 * intermediate}:
            return EXPERT_GEMM
        if vocab in kernel.sizes:
            return HEAD
    return family


def split_time(
    kernels: Iterable[Kernel], *, steps: int, seconds_per_step: float, intermediate: int, vocab: int
) -> TimeSplit:
    """Adds up the kernels of `steps` steps that take `seconds_per_step` each when nobody profiles them."""
    time: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    other_time: defaultdict[str, float] = defaultdict(float)
    other_launches: Counter[str] = Counter()
    for kernel in kernels:
        family = classify(kernel, intermediate=intermediate, vocab=vocab)
        time[family] += kernel.microseconds
        launches[family] += 1
        if family in (OTHER, COPIES):
            other_time[kernel.name] += kernel.microseconds
            other_launches[kernel.name] += 1
    wall = seconds_per_step * 1000

    def share(name: str, microseconds: float, count: int) -> Share:
        milliseconds = microseconds / 1000 / steps
        return Share(name, milliseconds, milliseconds / wall, count / steps)

    shares = [share(name, time[name], launches[name]) for name in FAMILIES if launches[name]]
    idle = max(0.0, wall - sum(part.milliseconds for part in shares))
    largest = sorted(other_time, key=lambda name: -other_time[name])[:12]
    return TimeSplit(
        shares,
        idle,
        idle / wall,
        [share(name[:160], other_time[name], other_launches[name]) for name in largest],
    )


def profile_kernels(work: Callable[[], object]) -> list[Kernel]:
    """Every kernel that `work` launches on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        work()
        torch.cuda.synchronize()
    return kernels_of(profiler.events())


def kernels_of(events: Sequence[Any]) -> list[Kernel]:
    """The launches among a profile's events, with the shapes of the innermost operation around each.

    Kernels are joined to operations by name and duration, because the profiler's public list has no common number.
    """
    sizes: defaultdict[tuple[str, float], list[frozenset[int]]] = defaultdict(list)
    launches = []
    for event in events:
        if event.device_type == DeviceType.CPU:
            for kernel in event.kernels:
                sizes[kernel.name, kernel.duration].append(_sizes(event.input_shapes))
        elif not event.is_user_annotation:
            launches.append((event.name, event.time_range.elapsed_us()))
    made = []
    for name, microseconds in launches:
        known = sizes[name, microseconds]
        made.append(Kernel(name, microseconds, known.pop() if known else frozenset()))
    return made


def _sizes(shapes: Any) -> frozenset[int]:
    """Every dimension in nested lists of shapes."""
    if isinstance(shapes, int):
        return frozenset((shapes,))
    if isinstance(shapes, (list, tuple)):
        return frozenset().union(*(_sizes(shape) for shape in shapes))
    return frozenset()
