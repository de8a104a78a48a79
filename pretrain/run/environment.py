"""environment.json of a run folder: what the run ran on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from pretrain.files import write_json


def write_environment(folder: Path, world_size: int, precision: str, device: str) -> None:
    """What the run ran on; no variables of the environment, which may hold secrets."""
    packages = ("torch", "deepspeed", "webdataset", "sentencepiece", "safetensors", "numpy")
    write_json(
        folder / "environment.json",
        {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version(name) for name in packages},
            "world_size": world_size,
            "precision": precision,
            "device": device,
            "cores": os.cpu_count(),
        },
    )
