"""environment.json of a run folder: what the run ran on."""

import os
import platform
from importlib.metadata import version

from pretrain.files import write_json
from pretrain.run.folder import RunFolder


def write_environment(run: RunFolder, world_size: int, precision: str, device: str) -> None:
    """Write down what the run runs on; no variables of the environment, which may hold secrets."""
    packages = ("torch", "deepspeed", "webdataset", "sentencepiece", "safetensors", "numpy")
    write_json(
        run.environment_file,
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
