"""What every rank of the tests imports, imported once: ranks are forked from a process that has read this.

Nothing here may start a thread or a group of processes: a fork would take a half of it along.
"""

import gc
import os
import warnings

os.environ |= {"DS_ACCELERATOR": "cpu", "OPENBLAS_NUM_THREADS": "1"}

import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch

import pretrain.training.trainer  # noqa: F401
from pretrain.training.zero.construction import load_deepspeed

load_deepspeed(torch.device("cpu"))
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # as a rank of a run does
gc.collect()
gc.freeze()  # no rank looks again through what was imported, each time that it looks for garbage
