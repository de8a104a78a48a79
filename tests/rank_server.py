"""What every rank of the tests imports, imported once: ranks are forked from a process that has read this.

Nothing here may start a thread or a group of processes: a fork would take a half of it along.
"""

import gc
import os

os.environ |= {"DS_ACCELERATOR": "cpu", "OPENBLAS_NUM_THREADS": "1"}

import deepspeed  # noqa: F401
import hypothesis  # noqa: F401
import pytest  # noqa: F401

import pretrain.training.trainer  # noqa: F401

gc.collect()
gc.freeze()  # no rank looks again through what was imported, each time that it looks for garbage
