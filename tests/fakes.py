"""Stand-ins without devices: an engine that answers by reversing prompts, and a small byte-level tokenizer."""

import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from streamserve.metrics import EngineStats
from streamserve.tokenizer import Tokenizer
from streamserve.types import CompletionOutput, LaneStats, Prompt, RequestMetrics, RequestOutput

CORPUS = ("hello world, the end. STOP here", "привет мир", "你好世界", "smile 😀😀 and 👍🏽", "naïve café") * 4
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(folder: pathlib.Path, *, chat_template: str | None = None, eos: object = None) -> pathlib.Path:
    """Write a byte-level BPE tokenizer as Hugging Face folders hold it; `eos` goes into generation_config.json."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>", "<pad>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=chat_template)
    fast.save_pretrained(str(folder))
    if eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


def make_output(
    request_id: str = "0",
    *,
    prompt_tokens: int = 3,
    tokens: tuple[int, ...] = (5, 6, 7),
    times: tuple[float, float, float] = (0.0, 0.1, 0.3),
    drafted: tuple[int, ...] = (),
    accepted: tuple[int, ...] = (),
    measured: Mapping[str, object] = MappingProxyType({}),
    error: str | None = None,
    **completion,
) -> RequestOutput:
    """Build a finished request; `times` are arrival, first token and end.

    A quarter of the time to the first token each goes to queue, prefill, hand-off and the first tick; then tokens come
    one by one, evenly. `measured` are fields of its metrics that differ.
    """
    arrival_s, first_s, end_s = times
    quarter_s, num_gaps = (first_s - arrival_s) / 4, len(tokens) - 1
    fields = {
        "index": 0,
        "text": "ok",
        "token_ids": tokens,
        "cumulative_logprob": None,
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    stamps = {
        "arrival_s": arrival_s,
        "scheduled_s": arrival_s + quarter_s,
        "prefilled_s": arrival_s + 2 * quarter_s,
        "handed_off_s": arrival_s + 2 * quarter_s,
        "transferred_s": arrival_s + 3 * quarter_s,
        "first_token_s": first_s,
        "finished_s": end_s,
        "itls_s": ((end_s - first_s) / num_gaps,) * num_gaps if num_gaps > 0 else (),
    }
    counts = {
        "lane": 0,
        "cached_tokens": 0,
        "num_preemptions": 0,
        "drafted_per_step": drafted,
        "accepted_per_step": accepted,
        "transfer_pages": 1,
        "transfer_bytes": 10,
    }
    metrics = RequestMetrics(**(stamps | counts | dict(measured)))
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=tuple(range(prompt_tokens)),
        prompt_logprobs=None,
        outputs=() if error else (CompletionOutput(**(fields | completion)),),
        finished=True,
        metrics=() if error else (metrics,),
        error=error,
    )


class FakeEngine:
    """Answers prompts two at a time, the later one first; refuses text that says so.

    A text prompt is answered by itself backwards. Told to, it raises in the middle as a real engine might.
    """

    def __init__(
        self, *, tokenizer: Tokenizer | None = None, raise_after: int | None = None, exception=KeyboardInterrupt
    ):
        self.tokenizer = tokenizer
        self.seen: list[Prompt] = []
        self.pinned: list[tuple[int | None, int | None]] = []
        self._raise_after, self._exception = raise_after, exception

    def stream(self, prompts: Iterable[Prompt]) -> Iterator[RequestOutput]:
        answered = 0
        source = iter(prompts)
        while pair := list(itertools.islice(source, 2)):
            self.seen += pair
            for prompt in reversed(pair):
                if answered == self._raise_after:
                    raise self._exception
                answered += 1
                yield self._answer(prompt)

    def stats(self) -> EngineStats:
        return EngineStats(ticks=4, kv_transfers=len(self.seen), kv_transfer_bytes=10 * len(self.seen), warmup_s=1.5)

    def lane_stats(self) -> tuple[LaneStats, ...]:
        return (LaneStats(lane=0, num_slots=4, free_slots=3, num_pages=8, free_pages=5),)

    def pin_depth(self, depth: int | None, *, tier: int | None = None) -> None:
        self.pinned.append((depth, tier))

    def close(self) -> None:
        self.closed = True

    def _answer(self, prompt: Prompt) -> RequestOutput:
        if prompt.text is not None and "too long" in prompt.text:
            return make_output(prompt.request_id, error="the prompt has 9999 tokens; the model takes at most 63")
        text = "" if prompt.text is None else prompt.text[::-1]
        return make_output(prompt.request_id, text=text, drafted=(3, 3), accepted=(2, 0))
