"""The router, watched: counts on the device, formulas over them, and a trainer callback that logs both.

Figures live in `finetune.routing.plots`, which alone imports matplotlib and is therefore not imported here.
"""

from finetune.routing.alarms import Alarm, AlarmRules, RouterAlarms
from finetune.routing.callback import RouterCallback
from finetune.routing.capture import RouterCapture
from finetune.routing.metrics import LayerMetrics, RouterSums, layer_metrics
from finetune.routing.reference import RouterReference, probe_rows
from finetune.routing.watch import RouterWatch

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
