"""One rank of a run: `python -m pretrain.training RUN_FOLDER`, with RANK and WORLD_SIZE in the environment."""

import logging
import os
import sys
import warnings
from pathlib import Path

from pretrain.errors import EXIT_FAILED, EXIT_SUPERSEDED, EXIT_WRONG_INPUT, UserError
from pretrain.training.attempt import SupersededError
from pretrain.training.processes import StopRequest, die_with_launcher, hold_run, join_ranks


def main(run_folder: str) -> int:
    """Train the run in `run_folder`; returns the exit code."""
    die_with_launcher()
    stop_request = StopRequest()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr, datefmt="%H:%M:%S"
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    from pretrain.config import load_config
    from pretrain.training.trainer import Trainer

    try:
        config = load_config(str(Path(run_folder) / "config.yaml"))
        rank, world_size, device = join_ranks()
        with hold_run(config.run_folder, rank):
            return Trainer(config, rank, world_size, device, stop_request).train()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except SupersededError as end:
        logging.error("%s", end)
        return EXIT_SUPERSEDED
    except Exception:
        logging.exception("this rank failed")
        return EXIT_FAILED


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stderr.flush()
    # Without waiting for threads of libraries: a rank that has failed must not linger beside the others.
    os._exit(code)
