"""The engine of a script that serves input lines: what such a script needs of it, and how a run of it begins."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from experiments import common
from streamserve import metrics, workload
from streamserve.config import Config
from streamserve.tokenizer import Tokenizer
from streamserve.types import LaneStats, Prompt, RequestOutput


class Engine(Protocol):
    """What a run needs of `streamserve.LLM`."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Renders chat messages."""
        ...

    def stream(self, prompts: Iterator[Prompt], /) -> Iterator[RequestOutput]:
        """Serve prompts as they are pulled, outputs in order of completion."""
        ...

    def stats(self) -> metrics.EngineStats:
        """Counters."""
        ...

    def lane_stats(self) -> Sequence[LaneStats]:
        """Snapshots of the stream pairs."""
        ...

    def close(self) -> None:
        """Finish the trace and the logs."""
        ...


EngineT = TypeVar("EngineT", covariant=True)


class MakeEngine(Protocol[EngineT]):
    """What a run needs of `streamserve.LLM.from_config`."""

    def __call__(
        self,
        config: Config,
        /,
        *,
        use_tqdm: bool,
        trace: pathlib.Path,
        decisions: pathlib.Path | None,
        routes: pathlib.Path | None,
    ) -> EngineT:
        """Build the engine and compile everything."""
        ...


def start_engine(
    make_engine: MakeEngine[EngineT],
    config: Config,
    *,
    values: Mapping[str, Any],
    workdir: pathlib.Path,
    command: Sequence[str],
    logs_routes: bool,
) -> EngineT:
    """Build the engine of a run, and record in the workdir what it is built from.

    Args:
      make_engine: builds it.
      config: of the engine.
      values: the whole configuration, for config.json.
      workdir: exists; the record of an earlier run there is removed. decisions.jsonl is written if a policy chooses
        depths.
      command: the command line.
      logs_routes: write routes.jsonl.

    Raises:
      RunError: the model or the config cannot be served, or the workdir cannot be written.
    """
    with common.writing(workdir):
        for name in common.RECORD_FILES:
            (workdir / name).unlink(missing_ok=True)
    common.write_json(workdir / "config.json", values)
    try:
        engine = make_engine(
            config,
            use_tqdm=True,
            trace=workdir / "trace.json",
            decisions=None if config.speculation.policy == "fixed" else workdir / "decisions.jsonl",
            routes=workdir / "routes.jsonl" if logs_routes else None,
        )
    except (ValueError, OSError) as error:
        raise common.RunError(str(error)) from None
    common.write_json(
        workdir / "env.json", common.environment(share_devices=config.topology.share_devices, command=command)
    )
    return engine


def line_reader(defaults: Mapping[str, Any], tokenizer: Tokenizer | None) -> workload.LineReader:
    """Prepare to read input lines.

    Args:
      defaults: sampling parameters of requests that do not give them.
      tokenizer: of the engine; None to check the defaults alone.

    Raises:
      RunError: the defaults are wrong.
    """
    render_chat = None if tokenizer is None else tokenizer.apply_chat_template
    try:
        return workload.LineReader(defaults=defaults, render_chat=render_chat)
    except ValueError as error:
        raise common.RunError(f"config field 'sampling': {error}") from None
