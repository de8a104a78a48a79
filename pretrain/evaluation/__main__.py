"""One rank of an evaluation: `python -m pretrain.evaluation FOLDER`, FOLDER holding a plan.json.

Ranks share the parts of the plan by its numbers alone and never talk to each other.
"""

import logging
import os
import sys
from pathlib import Path

from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUME_ME, EXIT_WRONG_INPUT, UserError
from pretrain.training.ranks import StopRequest, die_with_launcher, end_rank


def main(folder: Path) -> int:
    """Compute this rank's share of the parts that are missing; returns the exit code."""
    die_with_launcher()
    stop_request = StopRequest()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr, datefmt="%H:%M:%S"
    )
    log = logging.getLogger("pretrain.evaluation")
    import torch

    from pretrain.evaluation.context.plan import share_out
    from pretrain.evaluation.context.planning import load_plan
    from pretrain.evaluation.context.session import Session
    from pretrain.evaluation.context.work import is_missing, run_parts

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        plan = load_plan(folder)
        own = share_out(plan.parts(), world_size)[rank]
        missing = [part for part in own if is_missing(folder, plan, part)]
        if not missing:
            return EXIT_DONE
        on_gpu = torch.cuda.is_available()
        session = Session(plan, torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu"))
        finished = run_parts(
            session, missing, folder, lambda part: log.info("%s", part.name), lambda: stop_request.requested
        )
        return EXIT_DONE if finished else EXIT_RESUME_ME
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except Exception:
        log.exception("this rank failed")
        return EXIT_FAILED


if __name__ == "__main__":
    end_rank(main(Path(sys.argv[1])))
