"""The Python door: `LLM(...)` builds every part and wires them; `generate` and `stream` run the scheduler.

The only module that knows all components. What it decides is which factory stands behind a name, and how a prompt
becomes requests and requests become an output; everything else is the components' own.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm

from streamserve import assembly, parts
from streamserve import mesh as meshes
from streamserve.config import BUNDLED_TARGET, Config, from_mapping
from streamserve.ending import Finished
from streamserve.engine_logs import EngineLogs
from streamserve.lane_costs import lane_costs
from streamserve.lifecycle import State
from streamserve.metrics import EngineStats
from streamserve.models import resolve_path
from streamserve.pipeserve import CompilationCounter, StreamPair, persistent_cache, warm_up
from streamserve.prompts import EngineLimits, OpenPrompts, PromptLike, PromptReader
from streamserve.sampling_params import SamplingParams
from streamserve.scheduler import StreamScheduler
from streamserve.sequence import RunningRequest
from streamserve.specustream import SpecuStream
from streamserve.tokenizer import TextStream, load_eos_ids, load_tokenizer
from streamserve.types import LaneStats, Prompt, Request, RequestOutput


class LLM:
    """A language model behind stream pairs."""

    def __init__(
        self,
        model: str = BUNDLED_TARGET,
        *,
        speculative_config: Mapping[str, Any] | None = None,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        dtype: str = "float32",
        seed: int = 0,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        load_format: str = "auto",
        tensor_parallel_size: int = 1,
        num_stream_pairs: int = 1,
        topology: str = "disaggregated",
        enable_prefix_caching: bool = True,
        compilation_cache_dir: str | None = None,
        use_tqdm: bool = True,
    ):
        """Load the model, compile every program, and be ready.

        Create it before any other JAX computation of the process: on CPU it asks JAX for one host device per mesh.

        Args:
          model: a Hugging Face folder, or "bundled:target" for the small model that comes with the package.
          speculative_config: `{"method": "draft_model", "model": folder, "num_speculative_tokens": K}`; None decodes
            plainly.
          max_num_seqs: requests that decode at once on each stream pair.
          max_model_len: most tokens of prompt and output together; None for what the model was made for.
          dtype: of weights and cache: "float32", "bfloat16" or "float16".
          seed: of requests that bring none of their own.
          tokenizer: folder of the tokenizer; None for the model's.
          skip_tokenizer_init: serve token ids alone.
          load_format: "auto", or "dummy" for random weights from the config alone.
          tensor_parallel_size: devices of each prefill and of each decode mesh.
          num_stream_pairs: lanes.
          topology: "disaggregated" prefills and decodes on meshes of their own; "colocated" on one mesh.
          enable_prefix_caching: reuse the keys and values of prompts that begin alike.
          compilation_cache_dir: folder in which compiled programs are kept for the next start.
          use_tqdm: show a progress bar while compiling.

        Raises:
          ValueError: an argument, a config or a checkpoint that cannot be served; the message names it.
          FileNotFoundError: the model's folder or one of its files is missing.
        """
        speculation = {"method": "draft_model", **speculative_config} if speculative_config else {}
        config = from_mapping(
            Config,
            {
                "model": {
                    "model": model,
                    "tokenizer": tokenizer,
                    "skip_tokenizer_init": skip_tokenizer_init,
                    "dtype": dtype,
                    "load_format": load_format,
                    "max_model_len": max_model_len,
                },
                "topology": {
                    "topology": topology,
                    "num_pairs": num_stream_pairs,
                    "prefill_devices": tensor_parallel_size,
                    "decode_devices": tensor_parallel_size,
                },
                "pipeserve": {"max_num_seqs": max_num_seqs, "enable_prefix_caching": enable_prefix_caching},
                "speculation": speculation,
                "seed": seed,
                "compilation_cache_dir": compilation_cache_dir,
            },
        )
        self._build(config, use_tqdm=use_tqdm)
        self._begin(EngineLogs(config))

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        use_tqdm: bool = False,
        trace: str | os.PathLike[str] | None = None,
        decisions: str | os.PathLike[str] | None = None,
        routes: str | os.PathLike[str] | None = None,
    ) -> "LLM":
        """Build from a whole configuration; raises as the constructor does.

        Args:
          config: everything.
          use_tqdm: show a progress bar while compiling.
          trace: file for a timeline of what the engine does, which Perfetto opens; None for none. `close` ends it.
          decisions: file for every decision about the depth of speculation, JSON lines; None for none. `close` ends it.
          routes: file for every decision about the stream pair of a request, likewise.
        """
        llm = cls.__new__(cls)
        llm._build(config, use_tqdm=use_tqdm)
        llm._begin(EngineLogs(config, trace=trace, decisions=decisions, routes=routes))
        return llm

    def _build(self, config: Config, *, use_tqdm: bool) -> None:
        """Load and compile."""
        parts.check_names(config)
        self.config = config
        path = resolve_path(config.model.model)
        tokenizer_path = path if config.model.tokenizer is None else resolve_path(config.model.tokenizer)
        self.tokenizer = None if config.model.skip_tokenizer_init else load_tokenizer(tokenizer_path)
        own_eos = () if self.tokenizer is None else self.tokenizer.eos_ids
        meshes.request_cpu_devices(config.topology)
        pairs = meshes.make_pairs(config.topology, jax.devices())
        target = assembly.load_target(config, pairs[0].prefill)
        draft = assembly.load_draft(config, target, self.tokenizer, pairs[0].prefill)
        self.max_model_len = assembly.max_model_len(config, target, draft)
        limits = EngineLimits(
            max_model_len=self.max_model_len,
            vocab_size=target.config.vocab_size,
            eos_ids=tuple(dict.fromkeys((*load_eos_ids(path), *own_eos))),
            seed=config.seed,
            pipeserve=config.pipeserve,
        )
        self._prompts = PromptReader(self.tokenizer, limits)
        self._pairs = assembly.make_pairs(config, pairs, target, draft, self.max_model_len)
        begin_s = time.monotonic()
        with persistent_cache(config.compilation_cache_dir):
            self._num_programs = warm_up(self._pairs, use_tqdm=use_tqdm)
        self._costs = lane_costs(config, self._pairs, target, draft, use_tqdm=use_tqdm)
        self._warmup_s = time.monotonic() - begin_s

    def _begin(self, logs: EngineLogs) -> None:
        """Wire the parts."""
        config, self._logs = self.config, logs
        self._specustreams = assembly.make_specustreams(config, self._pairs, self._costs, logs.decisions)
        self._flowguard = assembly.make_flowguard(config, logs.routes)
        self._scheduler = StreamScheduler(
            assembly.handicapped(config, self._pairs),
            self._flowguard,
            config.scheduler,
            specustreams=self._specustreams,
            max_prefills=config.pipeserve.max_prefills,
            keeps_pages=config.pipeserve.preemption == "keep",
            start=self._start_request,
            tracer=logs.tracer,
        )
        self._open = OpenPrompts(self._prompts)
        self._compilations = CompilationCounter(forbid=config.scheduler.forbid_compilation)

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate completions of all prompts.

        Args:
          prompts: one or many; each a string, a list of token ids, or `{"prompt": str}` / `{"prompt_token_ids": ids}`.
          sampling_params: one for all, or one for each; None for the defaults.
          use_tqdm: show a progress bar.

        Returns:
          Outputs in the order of the prompts.

        Raises:
          ValueError: a prompt or its parameters cannot be served; nothing has run then.
        """
        ready, done = self._prompts.read(prompts, sampling_params), {}
        with tqdm.tqdm(total=len(ready), desc="Generating", disable=not use_tqdm) as bar:
            for output in self.stream(ready):
                done[int(output.request_id)] = output
                bar.update()
        return [done[index] for index in range(len(ready))]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, through the tokenizer's chat template.

        Args:
          messages: `[{"role": ..., "content": ...}, ...]`, or a list of such.
          sampling_params: as for `generate`.
          use_tqdm: show a progress bar.

        Raises:
          ValueError: there is no tokenizer or it has no chat template, or as `generate` does.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer, but skip_tokenizer_init is set")
        many = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        prompts = [self.tokenizer.apply_chat_template(conversation) for conversation in many]  # pyright: ignore[reportArgumentType]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompts: Iterable[Prompt]) -> Iterator[RequestOutput]:
        """Serve prompts as they are pulled, and yield each output when its last completion is in.

        Args:
          prompts: pulled with a bounded look-ahead.

        Yields:
          One output a prompt, in the order of completion; a refused one has `error` set.

        Raises:
          RuntimeError: another stream of this engine has not ended.
        """
        yield from self._outputs(self._scheduler.run(self._open.requests(prompts)))

    def serve(self, arrivals: Iterable[tuple[float, Prompt]]) -> Iterator[RequestOutput]:
        """Serve prompts that come when they come, whether or not there is room: an open loop.

        Args:
          arrivals: seconds from now and the prompt, in the order of time. Times of a request are counted from its own
            arrival, however late the engine gets round to it.

        Yields:
          One output a prompt, in the order of completion; a refused one, as by a full queue, has `error` set.

        Raises:
          RuntimeError: another stream of this engine has not ended.
        """
        timed = ((at_s, request) for at_s, prompt in arrivals for request in self._open.requests([prompt]))
        yield from self._outputs(self._scheduler.serve(timed))

    def _outputs(self, run: Iterator[Finished]) -> Iterator[RequestOutput]:
        """Gather the completions of each prompt."""
        yield from self._open.outputs(self._counted(run))
        self._check_moved()

    def cancel(self, request_id: str) -> bool:
        """End a prompt of the stream that is running; its output comes with the error "cancelled".

        Returns:
          Whether any of its completions was still to come; not so before the stream has pulled the prompt.
        """
        cancelled = [self._scheduler.cancel(open_id) for open_id in self._open.request_ids(request_id)]
        return any(cancelled)

    def close(self) -> None:
        """Finish the trace and the logs of decisions, if there are any. The engine can go on without them."""
        for specustream in self._specustreams:
            specustream.stop_logging()
        self._flowguard.stop_logging()
        self._logs.close()

    def use_router(self, name: str) -> None:
        """Let another routing policy decide from now on.

        Prefix caches are emptied, what lanes have measured is forgotten, and their handicaps begin anew. What depth
        policies have learnt stays; `use_policy` lets them begin anew.

        Args:
          name: as `routing.policy`.

        Raises:
          ValueError: the name stands for nothing, or routes are logged: a log is about one policy.
          RuntimeError: requests are being served.
        """
        if self._logs.routes is not None:
            raise ValueError("the log of routes is about one policy; build an engine without one to change it")
        if not self._scheduler.idle:
            raise RuntimeError("requests are being served; the router changes between two runs")
        make = parts.make_router(self.config, name=name)
        self._flowguard.use(make)
        for pair in self._pairs:
            pair.forget_prefixes()
        self._scheduler.use_pairs(assembly.handicapped(self.config, self._pairs))

    def use_policy(self, name: str) -> None:
        """Let another depth policy decide from now on, without what it, the costs and the drafter have learnt so far.

        Args:
          name: as `speculation.policy`; "fixed" with a depth as in "fixed:2".

        Raises:
          ValueError: the name stands for nothing, the depth was not compiled, or decisions are logged: a log is about
            one policy.
        """
        if self._logs.decisions is not None:
            raise ValueError("the log of decisions is about one policy; build an engine without one to change it")
        for specustream, pair in zip(self._specustreams, self._pairs, strict=True):
            specustream.use(parts.make_policy(self.config.speculation, pair.num_slots, name=name))
            pair.forget_answers()

    def pin_depth(self, depth: int | None, *, tier: int | None = None) -> None:
        """Decode at one depth from now on, whatever the policy says; None lets it decide again.

        Args:
          depth: tokens that every row drafts a round.
          tier: depth of the program that runs; None for the same. A deeper one verifies as wide as it can.

        Raises:
          ValueError: no such program was compiled.
        """
        for specustream in self._specustreams:
            specustream.pin(depth, tier=tier)

    def _check_moved(self) -> None:
        """Prove that disaggregation took place.

        Raises:
          RuntimeError: requests were decoded on another mesh than they were prefilled on, and no pages had moved.
        """
        if self.config.topology.topology == "colocated" or self.config.topology.share_devices:
            return
        counters = self._scheduler.counters()
        if counters.arrivals and not (counters.kv_transfer_pages and counters.kv_transfer_bytes):
            raise RuntimeError(
                f"{counters.arrivals} requests went from prefill to decode meshes, but no page of their caches did"
            )

    def _counted(self, run: Iterator[Finished]) -> Iterator[Finished]:
        """Count compilations while the loop runs, and end it when the consumer does."""
        self._compilations.on = True
        try:
            yield from run
        finally:
            self._compilations.on = False

    @property
    def pairs(self) -> tuple[StreamPair, ...]:
        """The stream pairs, for measurements of their parts. While requests run, the scheduler owns them."""
        return tuple(self._pairs)

    @property
    def specustreams(self) -> tuple[SpecuStream, ...]:
        """What plans the ticks of each stream pair, for measurements."""
        return tuple(self._specustreams)

    def lane_stats(self) -> tuple[LaneStats, ...]:
        """Snapshots of the stream pairs as they are now, for whoever watches."""
        return self._scheduler.lane_stats()

    def stats(self) -> EngineStats:
        """Counters since the engine was built."""
        counters, ends = self._scheduler.counters(), self._scheduler.ends
        stores = [pair.prefill_store for pair in self._pairs]
        return EngineStats(
            warmup_s=self._warmup_s,
            programs=self._num_programs,
            compilations_after_warmup=self._compilations.count,
            ticks=counters.ticks,
            prefill_calls=counters.prefill_calls,
            kv_transfers=counters.kv_transfers,
            kv_transfer_pages=counters.kv_transfer_pages,
            kv_transfer_bytes=counters.kv_transfer_bytes,
            local_prefills=counters.local_prefills,
            preemptions=counters.preemptions,
            refused=ends.get(State.REFUSED, 0),
            cancelled=ends.get(State.CANCELLED, 0),
            timed_out=ends.get(State.TIMED_OUT, 0),
            failed=ends.get(State.FAILED, 0),
            prefix_queried_tokens=sum(store.queried_tokens for store in stores),
            prefix_hit_tokens=sum(store.hit_tokens for store in stores),
        )

    def _start_request(self, request: Request, *, arrival_s: float) -> RunningRequest:
        text = TextStream(self.tokenizer, request.params)
        name = self.tokenizer.token_text if self.tokenizer is not None else lambda token: None
        return RunningRequest(request, text, name, arrival_s=arrival_s)
