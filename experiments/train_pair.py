"""Train the bundled pair: a target on text, then a draft that imitates it; export both with what was measured.

    python -m experiments.train_pair --config=configs/train_pair.py --workdir=DIR --data_dir=DATA --output_dir=OUT

A killed run goes on from its last checkpoint when the same command is given again. Text is `experiments.corpus`'s
business, training `experiments.pair_training`'s, measuring and files `experiments.pair_report`'s.
"""

import os
import pathlib
import platform
import shlex
import sys
import sysconfig
from collections.abc import Sequence

import jax
import tokenizers
from absl import flags, logging

from experiments import common, corpus, pair_report
from experiments.pair_config import PairConfig
from experiments.pair_training import train_pair
from streamserve.config import from_mapping

DEFAULT_CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "train_pair.py"
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and loss curves; a killed run resumes from it.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that holds corpus/gsm8k_train.jsonl.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where target/, draft/ and MODEL_CARD.md go.")


def main(argv: Sequence[str]) -> int:
    """Train, export, print."""
    if _WORKDIR.value is None or _OUTPUT_DIR.value is None:
        common.stop("--workdir and --output_dir are needed")
    logging.set_verbosity(logging.WARNING)  # orbax tells of each file that it writes
    try:
        config = from_mapping(PairConfig, flags.FLAGS.config.to_dict())
    except ValueError as error:
        common.stop(str(error))
    data = None if _DATA_DIR.value is None else pathlib.Path(_DATA_DIR.value) / "corpus" / "gsm8k_train.jsonl"
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    documents = corpus.read_documents(data, stdlib, config.corpus.held_out_share)
    pair = train_pair(documents, config, pathlib.Path(_WORKDIR.value))
    output_dir = pathlib.Path(_OUTPUT_DIR.value)
    scores = pair_report.report(pair, documents, config, output_dir, _card_facts(config, data is not None, sys.argv))
    for kind, score in scores.items():
        print(kind, score)
    return common.EXIT_OK


def _card_facts(config: PairConfig, with_math: bool, argv: Sequence[str]) -> dict[str, str]:
    """Say how the pair was made: the command without this machine's folders, and what the corpus depends on."""
    overrides = [argument for argument in argv[1:] if argument.startswith("--config.")]
    folders = ["--workdir=DIR", *(["--data_dir=DATA"] if with_math else []), "--output_dir=streamserve/assets"]
    command = ["python", "-m", "experiments.train_pair", "--config=configs/train_pair.py", *folders, *overrides]
    origin = (
        f"Seed {config.seed}. Text: {'the training split of GSM8K and ' if with_math else ''}the standard library of "
        f"Python {platform.python_version()}. Versions: jax {jax.__version__}, tokenizers {tokenizers.__version__}. "
        f"Device: {jax.devices()[0].platform}, {os.cpu_count()} cores."
    )
    return {"command": shlex.join(command), "origin": origin}


if __name__ == "__main__":
    common.run_main(main, default_config=DEFAULT_CONFIG)
