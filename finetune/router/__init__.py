"""The router, watched: counts on the device, formulas over them, and a trainer callback that logs both.

Figures live in `finetune.router.plots`, which alone imports matplotlib and is therefore not imported here.
"""

from finetune.router.alarms import Alarm, AlarmRules, RouterAlarms
from finetune.router.callback import RouterCallback
from finetune.router.capture import RouterCapture
from finetune.router.metrics import LayerMetrics, RouterSums, layer_metrics
from finetune.router.reference import RouterReference, probe_rows
from finetune.router.watch import RouterWatch

__all__ = [
    "Alarm",
    "AlarmRules",
    "LayerMetrics",
    "RouterAlarms",
    "RouterCallback",
    "RouterCapture",
    "RouterReference",
    "RouterSums",
    "RouterWatch",
    "layer_metrics",
    "probe_rows",
]
