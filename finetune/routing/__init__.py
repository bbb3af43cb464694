"""The router, watched: counts on the device, formulas over them, and a trainer callback that logs both.

Figures live in `finetune.routing.plots`, which alone imports matplotlib and is therefore not imported here.
"""

from finetune.routing.callback import RouterCallback
from finetune.routing.capture import RouterCapture
from finetune.routing.metrics import LayerMetrics, RouterSums, layer_metrics, summary

__all__ = ["LayerMetrics", "RouterCallback", "RouterCapture", "RouterSums", "layer_metrics", "summary"]
