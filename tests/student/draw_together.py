"""One of the processes of test_parallel: the command line, told that there are as many devices as processes.

diffusers asks torch for its accelerators, and counts none on a CPU; everything else is as on GPUs, over gloo.
"""

from __future__ import annotations

import os
import sys

import torch

torch.set_num_threads(1)
torch.accelerator.device_count = lambda: int(os.environ["WORLD_SIZE"])

from diptych.cli import app  # noqa: E402

sys.exit(app.call(sys.argv[1:]))
