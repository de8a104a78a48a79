"""A corpus that is built in parts, each on a machine of its own, from its share of every source's files.

corpora/web.parts/0003-of-0016/ is the fourth part, a corpus like any other; all have the tokenizer of the first one.
joining.py makes one corpus of them.
"""

from pathlib import Path

from pretrain.config.data import CorpusConfig
from pretrain.data.build.corpus import build_corpus, silent
from pretrain.data.build.joining import merge_corpora
from pretrain.data.build.plan import BuildProgress
from pretrain.data.manifest import MANIFEST, TOKENIZER, Manifest
from pretrain.errors import UserError


def part_path(corpus: Path, number: int, count: int) -> Path:
    """Return the folder of part `number` of 0 to `count` - 1."""
    return corpus.with_name(f"{corpus.name}.parts") / f"{number:04d}-of-{count:04d}"


def build_part(config: CorpusConfig, number: int, count: int, report: BuildProgress = silent) -> Manifest:
    """Build part `number` of 0 to `count` - 1, or continue with it; see `build_corpus`.

    The first part trains the tokenizer, unless there is one, or the kind needs no training: then the others must wait
    for it.

    Raises:
        UserError: no such part, no tokenizer yet, duplicates are to be removed (a part knows only its own), or see
            `build_corpus`.
    """
    if not 0 <= number < count:
        raise UserError(f"there is no part {number} of {count}: parts are 0 to {count - 1}")
    if config.filters.deduplicate:
        raise UserError(
            "corpus.filters.deduplicate finds duplicates within a part only; build the corpus as a whole, or set it to "
            "false"
        )
    tokenizer, first = config.tokenizer, part_path(config.path, 0, count)
    if number and tokenizer.kind != "protein" and tokenizer.model is None:
        if not (first / MANIFEST).is_file():
            raise UserError(
                f"part 0 trains the tokenizer of all, and is not built ({first}); build it first, or name a "
                "tokenizer with corpus.tokenizer.model"
            )
        tokenizer = tokenizer.model_copy(update={"model": first / TOKENIZER})
    path, shards = part_path(config.path, number, count), -(-config.min_train_shards // count)
    update = {"path": path, "tokenizer": tokenizer, "min_train_shards": shards}
    return build_corpus(config.model_copy(update=update), report, share=(number, count))


def join_parts(config: CorpusConfig, count: int) -> Manifest:
    """Make the corpus of its `count` parts, which stay where they are.

    Raises:
        UserError: parts are missing, or the corpus is there already.
    """
    parts = [part_path(config.path, number, count) for number in range(count)]
    missing = [str(number) for number, part in enumerate(parts) if not (part / MANIFEST).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {count} parts of {config.path} are not built: {', '.join(missing)}; build them with "
            f"--parts {count} --part NUMBER"
        )
    return merge_corpora(config.path, parts, same_sources=True)
