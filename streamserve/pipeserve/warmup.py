"""Warm-up: compiles the programs of all lanes before the first request."""

import concurrent.futures
import time
from collections.abc import Sequence

import tqdm

from streamserve.pipeserve.pair import StreamPair

_THREADS = 2  # XLA compiles a program on one core for most of the time, without Python's lock


def warm_up(pairs: Sequence[StreamPair], *, use_tqdm: bool) -> float:
    """Compile every program of every lane, the slow ones first.

    Args:
      pairs: lanes, compiled or not.
      use_tqdm: show a progress bar.

    Returns:
      Seconds that it took.
    """
    begin = time.monotonic()
    jobs = [(f"lane {pair.index}, {name}", compile_) for pair in pairs for name, compile_ in pair.compilations()]
    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        tqdm.tqdm(total=len(jobs), desc="Compiling", unit="program", disable=not use_tqdm) as bar,
    ):
        running = {pool.submit(compile_): name for name, compile_ in jobs}
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
                bar.set_postfix_str(running[future])
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C: what has not begun never does
    return time.monotonic() - begin
