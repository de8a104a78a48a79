"""One rank of a run: `python -m pretrain.training RUN_FOLDER`, with RANK and WORLD_SIZE in the environment.

What takes long to import is imported after the signal handlers are there: a signal in a rank's first second is kept.
"""

import faulthandler
import logging
import signal
import sys
import warnings
from pathlib import Path

from pretrain.errors import EXIT_FAILED, EXIT_RESUME_ME, EXIT_SUPERSEDED, EXIT_WRONG_INPUT, UserError
from pretrain.redaction import RedactingFormatter, redact
from pretrain.training.ranks import StopRequest, die_with_launcher, end_rank, hold_run, join_ranks


def main(run_folder: str) -> int:
    """Train the run in `run_folder`; returns the exit code."""
    die_with_launcher()
    stop_request = StopRequest()
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT)  # `kill -QUIT` shows what a rank is doing, and lets it go on
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger().handlers[0].setFormatter(RedactingFormatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return train_rank(Path(run_folder), stop_request)


def train_rank(run_folder: Path, stop_request: StopRequest) -> int:
    """Meet the other ranks and train with them; returns the exit code."""
    from pretrain.run.attempt import Attempt, SupersededError
    from pretrain.run.folder import RunFolder
    from pretrain.training.monitor.heartbeats import end_of

    attempt: Attempt | None = None
    try:
        from pretrain.training.monitor.monitor import Monitor
        from pretrain.training.trainer import Trainer

        run = RunFolder(run_folder)
        ranks = join_ranks(run.next_config().supervision.collective_s)
        with hold_run(run, ranks.rank) as attempt:
            config = attempt.config()
            return Trainer(config, ranks, Monitor(config, attempt, ranks, stop_request)).fit()
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except SupersededError as end:
        logging.error("%s", end)
        return EXIT_SUPERSEDED
    except Exception:
        logging.exception("this rank failed")
        # Where a watchdog has ended another rank, this is only the echo.
        return EXIT_RESUME_ME if attempt and end_of(attempt) else EXIT_FAILED


if __name__ == "__main__":
    end_rank(main(sys.argv[1]))
