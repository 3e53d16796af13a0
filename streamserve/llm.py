"""The Python door: `LLM(...)` builds every part and wires them; `generate` and `stream` run the scheduler.

The only module that knows all components. What it decides is which factory stands behind a name, and how a prompt
becomes requests and requests become an output; everything else is the components' own.
"""

import dataclasses
import hashlib
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from streamserve import mesh as meshes
from streamserve.bandits import Policy
from streamserve.config import BUNDLED_TARGET, Config, from_mapping
from streamserve.flowguard import FlowGuard, round_robin
from streamserve.metrics import EngineStats
from streamserve.models import Model, load_model, place, resolve_path
from streamserve.pipeserve import CompilationCounter, PairModels, StreamPair, warm_up
from streamserve.sampling_params import SamplingParams
from streamserve.scheduler import Finished, Refused, StreamScheduler
from streamserve.sequence import RunningRequest
from streamserve.specustream import drafters, verify
from streamserve.tokenizer import TextStream, Tokenizer, load_eos_ids, load_tokenizer
from streamserve.types import Prompt, Request, RequestOutput

# Names in a config and the factories behind them: a new one is one more line.
ROUTERS: Mapping[str, Callable[[int], Policy]] = {"round_robin": round_robin}

PromptLike = str | Sequence[int] | Mapping[str, Any]


class _Open:
    """A prompt whose completions are not all in."""

    def __init__(self, prompt: Prompt, token_ids: tuple[int, ...], *, expected: int):
        self.prompt, self.token_ids, self.expected = prompt, token_ids, expected
        self.ends: dict[int, Finished] = {}


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
                    "num_pairs": num_stream_pairs,
                    "prefill_devices": tensor_parallel_size,
                    "decode_devices": tensor_parallel_size,
                },
                "pipeserve": {"max_num_seqs": max_num_seqs},
                "speculation": speculation,
                "seed": seed,
            },
        )
        self._build(config, use_tqdm=use_tqdm)

    @classmethod
    def from_config(cls, config: Config, *, use_tqdm: bool = False) -> "LLM":
        """Build from a whole configuration; raises as the constructor does."""
        llm = cls.__new__(cls)
        llm._build(config, use_tqdm=use_tqdm)
        return llm

    def _build(self, config: Config, *, use_tqdm: bool) -> None:
        """Load, wire and compile."""
        self.config = config
        path = resolve_path(config.model.model)
        tokenizer_path = path if config.model.tokenizer is None else resolve_path(config.model.tokenizer)
        self.tokenizer = None if config.model.skip_tokenizer_init else load_tokenizer(tokenizer_path)
        own_eos = () if self.tokenizer is None else self.tokenizer.eos_ids
        self._eos_ids = tuple(dict.fromkeys((*load_eos_ids(path), *own_eos)))
        meshes.request_cpu_devices(config.topology)
        pairs = meshes.make_pairs(config.topology, jax.devices())
        target = _load(config, str(path), pairs[0].prefill)
        draft = _load_draft(config, target, self.tokenizer, pairs[0].prefill)
        self.max_model_len = _max_model_len(config, target, draft)
        self._vocab_size = target.config.vocab_size
        drafter = _make_drafter(draft)
        depth = config.speculation.depth
        self._pairs = []
        for index, pair in enumerate(pairs):
            models = PairModels(
                target=target.fns,
                kv_shape=target.kv_shape,
                vocab_size=self._vocab_size,
                drafter=drafter,
                verify=verify.rejection,
                prefill_params=_params_on(pair.prefill, target, draft),
                decode_params=_params_on(pair.decode, target, draft),
            )
            self._pairs.append(
                StreamPair(index, pair, models, config.pipeserve, max_model_len=self.max_model_len, tiers=(depth,))
            )
        self._warmup_s = warm_up(self._pairs, use_tqdm=use_tqdm)
        flowguard = FlowGuard(
            ROUTERS[config.routing.policy],
            num_lanes=len(pairs),
            seed=config.seed,
            device=meshes.control_device(),
        )
        self._scheduler = StreamScheduler(
            self._pairs, flowguard, config.scheduler, tier=depth, start=self._start_request
        )
        self._num_prompts = 0
        self._compilations = CompilationCounter()

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
        items: list[Any] = [prompts] if _is_one_prompt(prompts) else list(prompts)
        several = isinstance(sampling_params, Sequence)
        params = list(sampling_params) if several else [sampling_params or SamplingParams()] * len(items)
        if len(params) != len(items):
            raise ValueError(f"{len(items)} prompts but {len(params)} sampling parameters")
        ready = []
        for index, (item, one) in enumerate(zip(items, params, strict=True)):
            try:
                prompt = _as_prompt(str(index), item, one)
                ready.append(dataclasses.replace(prompt, token_ids=self._tokens(prompt)))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        done = {}
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
        opened: dict[str, _Open] = {}
        for finished in self._counted(self._scheduler.run(self._requests(prompts, opened))):
            order, index = finished.request_id.split(".")
            entry = opened[order]
            entry.ends[int(index)] = finished
            if len(entry.ends) == entry.expected:
                del opened[order]
                yield _output(entry)

    def _counted(self, run: Iterator[Finished]) -> Iterator[Finished]:
        """Count compilations while the loop runs, and end it when the consumer does."""
        self._compilations.on = True
        try:
            yield from run
        finally:
            self._compilations.on = False

    def stats(self) -> EngineStats:
        """Counters since the engine was built."""
        counters = self._scheduler.counters
        return EngineStats(
            warmup_s=self._warmup_s,
            ticks=counters.ticks,
            kv_transfers=counters.kv_transfers,
            kv_transfer_bytes=counters.kv_transfer_bytes,
            compilations_after_warmup=self._compilations.count,
        )

    def _requests(self, prompts: Iterable[Prompt], opened: dict[str, _Open]) -> Iterator[Request | Refused]:
        """Turn prompts into requests, one a completion. Ids inside the engine are `order.index`."""
        for prompt in prompts:
            order = self._num_prompts
            self._num_prompts += 1
            try:
                tokens = self._tokens(prompt)
            except ValueError as error:
                opened[str(order)] = _Open(prompt, (), expected=1)
                yield Refused(f"{order}.0", str(error))
                continue
            opened[str(order)] = _Open(prompt, tokens, expected=prompt.params.n)
            room = self.max_model_len - len(tokens)
            params = dataclasses.replace(
                prompt.params,
                max_tokens=min(prompt.params.max_tokens, room),
                min_tokens=min(prompt.params.min_tokens, room),
            )
            for index in range(params.n):
                seed = _derived_seed(self.config.seed, order, index, params.seed)
                yield Request(
                    request_id=f"{order}.{index}",
                    prompt_token_ids=tokens,
                    params=params,
                    seed=seed,
                    stop_ids=self._stop_ids(params),
                )

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """Token ids that end a request."""
        return tuple(dict.fromkeys((*params.stop_token_ids, *(() if params.ignore_eos else self._eos_ids))))

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokenize a prompt and check that it can be served.

        Raises:
          ValueError: it cannot; the message says why.
        """
        tokens = prompt.token_ids
        if tokens is None:
            if self.tokenizer is None:
                raise ValueError("the engine has no tokenizer (skip_tokenizer_init); give prompt_token_ids")
            if prompt.text is None:
                raise ValueError("a prompt needs text or token ids")
            tokens = self.tokenizer.encode(prompt.text)
        if not tokens:
            raise ValueError("the prompt is empty")
        if len(tokens) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; with at least one token of output the model takes at most "
                f"{self.max_model_len - 1} (max_model_len is {self.max_model_len})"
            )
        params, limits = prompt.params, self.config.pipeserve
        named = {"prompt token": tokens, "stop_token_ids": params.stop_token_ids, "logit_bias": params.logit_bias or ()}
        for name, ids in named.items():
            wrong = next((token for token in ids if not 0 <= token < self._vocab_size), None)
            if wrong is not None:
                raise ValueError(f"{name} {wrong} is outside the vocabulary of {self._vocab_size}")
        for name, count, room in (
            ("stop_token_ids and end-of-sequence ids", len(self._stop_ids(params)), limits.max_stop_ids),
            ("entries of logit_bias", len(params.logit_bias or ()), limits.max_logit_bias),
        ):
            if count > room:
                raise ValueError(f"{count} {name}, but the engine is configured for at most {room}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > limits.max_logprobs:
                raise ValueError(
                    f"{name}={getattr(params, name)} exceeds the engine's max_logprobs={limits.max_logprobs}"
                )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer (skip_tokenizer_init is set); use stop_token_ids")
        return tuple(tokens)

    def _start_request(self, request: Request, *, lane: int, arrival_s: float, scheduled_s: float) -> RunningRequest:
        text = TextStream(self.tokenizer, request.params)
        name = self.tokenizer.token_text if self.tokenizer is not None else lambda token: None
        return RunningRequest(request, text, name, lane=lane, arrival_s=arrival_s, scheduled_s=scheduled_s)


def _derived_seed(engine_seed: int, order: int, index: int, own: int | None) -> int:
    """Give completion `index` of a prompt its own random stream; no two origins share one.

    A request with a seed of its own depends on that alone, others on the engine's seed and their place in the input.
    """
    name = f"engine {engine_seed} {order} {index}" if own is None else f"request {own} {index}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _load(config: Config, path: str, mesh: jax.sharding.Mesh) -> Model:
    dtype = np.dtype(jax.numpy.dtype(config.model.dtype))
    return load_model(path, mesh, dtype=dtype, load_format=config.model.load_format, seed=config.seed)


def _load_draft(config: Config, target: Model, tokenizer: Tokenizer | None, mesh: jax.sharding.Mesh) -> Model | None:
    """Load the draft model, if there is one, and check that it speaks the target's vocabulary."""
    if config.speculation.depth == 0 or config.speculation.model is None:
        return None
    path = resolve_path(config.speculation.model)
    draft = _load(config, str(path), mesh)
    if draft.config.vocab_size != target.config.vocab_size:
        raise ValueError(
            f"the draft's vocabulary has {draft.config.vocab_size} tokens and the target's {target.config.vocab_size}; "
            "a draft model must share the target's vocabulary"
        )
    if tokenizer is None or not (path / "tokenizer.json").exists():
        return draft
    if load_tokenizer(path).vocabulary() != tokenizer.vocabulary():
        raise ValueError("draft and target have vocabularies of one size but with different tokens")
    return draft


def _max_model_len(config: Config, target: Model, draft: Model | None) -> int:
    longest = target.config.max_position
    if draft is not None:
        longest = min(longest, draft.config.max_position)
    wanted = config.model.max_model_len
    if wanted is not None and wanted > longest:
        raise ValueError(f"max_model_len={wanted} exceeds the {longest} positions that the model was made for")
    return longest if wanted is None else wanted


def _params_on(mesh: jax.sharding.Mesh, target: Model, draft: Model | None) -> tuple[Any, Any]:
    """Parameters of both models on a mesh; nothing for a draft that does not exist."""
    return place(target, mesh).params, () if draft is None else place(draft, mesh).params


def _make_drafter(draft: Model | None) -> drafters.Drafter:
    return drafters.none() if draft is None else drafters.draft_model(draft.fns, draft.kv_shape)


def _is_one_prompt(prompts: Any) -> bool:
    if isinstance(prompts, (str, Mapping)):
        return True
    return len(prompts) > 0 and all(isinstance(item, numbers.Integral) for item in prompts)


def _as_prompt(request_id: str, item: PromptLike, params: SamplingParams) -> Prompt:
    """Accept the forms that users of other engines know."""
    if isinstance(item, str):
        return Prompt(request_id=request_id, params=params, text=item)
    if isinstance(item, Mapping):
        unknown = set(item) - {"prompt", "prompt_token_ids"}
        if unknown or not item:
            raise ValueError(f"a prompt mapping holds 'prompt' or 'prompt_token_ids', got {sorted(item)}")
        if not isinstance(item.get("prompt", ""), str):
            raise ValueError(f"'prompt' must be a string, got {item['prompt']!r}")
        tokens = item.get("prompt_token_ids")
        return Prompt(
            request_id=request_id,
            params=params,
            text=item.get("prompt"),
            token_ids=None if tokens is None else tuple(int(token) for token in tokens),
        )
    return Prompt(request_id=request_id, params=params, token_ids=tuple(int(token) for token in item))


def _output(entry: _Open) -> RequestOutput:
    """Put the completions of a prompt together."""
    ends = [entry.ends[index] for index in sorted(entry.ends)]
    error = next((end.error for end in ends if end.error is not None), None)
    done = [] if error is not None else ends
    return RequestOutput(
        request_id=entry.prompt.request_id,
        prompt=entry.prompt.text,
        prompt_token_ids=entry.token_ids,
        prompt_logprobs=done[0].prompt_logprobs if done else None,
        outputs=tuple(
            dataclasses.replace(end.completion, index=index)
            for index, end in enumerate(done)
            if end.completion is not None
        ),
        finished=True,
        metrics=tuple(end.metrics for end in done if end.metrics is not None),
        error=error,
    )
