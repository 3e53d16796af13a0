"""What the engine costs and what its parts bring, measured on this machine and written as JSON.

COMMAND   python -m experiments.bench_engine --output=FILE.json
          (options: --sections=paged_step,price,... --repeats=7 --readme=README.md)
DURATION  about fifteen minutes on two cores, a third of it compilation.

Each section compares what it compares in one process, interleaved, and gives the median and the quartiles of every
figure. On CPU noise is tens of percent: quote ratios.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from experiments import bench_parts, bench_serving, common

Section = Callable[[int], dict[str, Any]]
SECTIONS: Mapping[str, Section] = {
    "paged_step": bench_parts.paged_step,
    "price": bench_parts.price,
    "draft_kv": bench_parts.draft_kv,
    "host_gap": bench_serving.host_gap,
    "topology": bench_serving.topology,
    "long_prompt": bench_serving.long_prompt,
    "second_start": bench_serving.second_start,
    "memory": bench_serving.memory,
}

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

_OUTPUT = flags.DEFINE_string("output", "bench_engine.json", "JSON file; sections that are there already are kept.")
_SECTIONS = flags.DEFINE_list("sections", list(SECTIONS), "What to measure.")
_README = flags.DEFINE_string("readme", None, "Markdown file whose bench block is replaced by a table of the results.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Measurements of each figure.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Run the sections one after the other, and write after each."""
    del argv
    logging.set_verbosity(logging.WARNING)
    unknown = sorted(set(_SECTIONS.value) - set(SECTIONS))
    if unknown:
        common.stop(f"unknown section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    jax.config.update("jax_num_cpu_devices", 2)  # of one pair; more would start more threads than there may be cores
    path = pathlib.Path(_OUTPUT.value)
    results = common.read_json(path) if path.exists() else {}
    command = ("python", "-m", "experiments.bench_engine", *sys.argv[1:])
    for name in _SECTIONS.value:
        begin_s = time.monotonic()
        measured = SECTIONS[name](_REPEATS.value)
        record = {"environment": common.environment(share_devices=False, command=command), "seed": 0}
        results[name] = record | {"repeats": _REPEATS.value, "seconds": time.monotonic() - begin_s} | measured
        common.write_json(path, results)
        print(f"{name}: {measured['summary']}")
    if _README.value is not None:
        readme = pathlib.Path(_README.value)
        text = readme.read_text(encoding="utf-8")
        head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        readme.write_text(f"{head}\n{table(results)}\n{tail}", encoding="utf-8")


def table(results: Mapping[str, Any]) -> str:
    """Lay the sections' summaries out as a Markdown table."""
    rows = [f"| `{name}` | {results[name]['summary']} |" for name in SECTIONS if name in results]
    return "\n".join(["| section | median |", "|---|---|", *rows])


if __name__ == "__main__":
    app.run(main)
