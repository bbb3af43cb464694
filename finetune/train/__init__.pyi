from .run import Prepared as Prepared
from .run import prepare as prepare
from .run import run_steps as run_steps
from .run import train as train
from .trainer import MoeTrainer as MoeTrainer
