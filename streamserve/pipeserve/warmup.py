"""Warm-up: compiles the programs of all lanes before the first request."""

import concurrent.futures
import contextlib
import pathlib
from collections.abc import Iterator, Sequence

import jax
import tqdm
from jax.experimental.compilation_cache import compilation_cache

from streamserve.pipeserve.pair import StreamPair

_THREADS = 2  # XLA compiles a program on one core for most of the time, without Python's lock


@contextlib.contextmanager
def persistent_cache(folder: str | None) -> Iterator[None]:
    """Keep what is compiled inside in a folder, and take from there what an earlier process has compiled."""
    if folder is None:
        yield
        return
    wanted = {
        "jax_compilation_cache_dir": str(pathlib.Path(folder).expanduser()),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX opens a cache once a process, whatever the setting becomes
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def warm_up(pairs: Sequence[StreamPair], *, use_tqdm: bool) -> int:
    """Compile every program of every lane, the slow ones first.

    Args:
      pairs: lanes, compiled or not.
      use_tqdm: show a progress bar.

    Returns:
      The number of programs.
    """
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
    return len(jobs)
