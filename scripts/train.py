"""`finetune train` for `accelerate launch`:

accelerate launch --config_file accelerate_configs/multi_gpu.yaml scripts/train.py RECIPE [--set KEY=VALUE] [--resume]
"""

from __future__ import annotations

import sys

from finetune.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
