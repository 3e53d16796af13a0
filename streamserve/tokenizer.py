"""Text to tokens and back: encoding, chat templates, and decoding token by token with stop strings.

It knows nothing of models, devices or schedules. Decoding is what the tokenizer file says, without the clean-up of
spaces that some older checkpoints ask for, so that decoding step by step and decoding at once give the same text.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from streamserve.sampling_params import SamplingParams

UNFINISHED = "\ufffd"  # what decoding puts where the bytes of a character are not complete (or not valid)
MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes, so at most four tokens share it
MAX_WINDOW = 16  # tokens decoded together before the window is cut; keeps the cost linear when bytes are never valid


class Tokenizer:
    """A tokenizer of one model.

    Attributes:
      vocab_size: ids are below it, added tokens included.
      eos_ids: ids that end a text, ascending.
      special_ids: ids that `skip_special_tokens` leaves out.
    """

    def __init__(self, fast: PreTrainedTokenizerFast, eos_ids: tuple[int, ...]):
        self._fast = fast
        self._backend: tokenizers.Tokenizer = fast.backend_tokenizer
        self.vocab_size: int = len(fast)
        self.eos_ids = eos_ids
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str) -> tuple[int, ...]:
        """Turn text into token ids, with the special tokens that the model expects around a text."""
        return tuple(self._backend.encode(text).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; ids that no token has are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str | None:
        """Return the text of a single token, special ones included; None when no token has this id."""
        if self._backend.id_to_token(token_id) is None:
            return None
        return self.decode((token_id,), skip_special_tokens=False)

    def vocabulary(self) -> Mapping[str, int]:
        """Return all tokens, added ones included, and their ids."""
        return self._backend.get_vocab(with_added_tokens=True)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Render a conversation as the model was trained to see it.

        Args:
          messages: each has a `role` and a `content`, which is a string or a list of `{"type": "text", "text": ...}`.
          add_generation_prompt: end with the header of the assistant's turn.

        Raises:
          ValueError: the tokenizer has no chat template, or the messages do not fit it.
        """
        if self._fast.chat_template is None:
            raise ValueError("the tokenizer has no chat template; give the prompt as text or token ids")
        plain = [{**message, "content": _plain_content(message)} for message in messages]
        try:
            text = self._fast.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program of the checkpoint's author: it may raise anything
            raise ValueError(f"the chat template refuses the messages: {error}") from None
        assert isinstance(text, str)
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)  # the template has placed them


class StopMatch(NamedTuple):
    """A stop string was found."""

    stop: str
    num_tokens: int  # of all tokens pushed so far, how many to keep: up to the one that completed the stop string


class TextStream:
    """Decodes one completion as its tokens come, and watches for stop strings.

    Tokens are taken one by one whatever the grouping of `push`, so text and token count do not depend on how many
    tokens speculation delivers at once. Of several stop strings the one that is complete first wins, read character by
    character; of those that end together, the longest. As with end-of-sequence ids, a stop string counts only when it
    ends after the first `min_tokens` tokens. A character is held back until its bytes are complete.

    Each token decodes a window of few tokens, the last finished piece and what came since, so the cost is linear.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams):
        """Start an empty text.

        Raises:
          ValueError: there are stop strings and no tokenizer to find them with.
        """
        if tokenizer is None and params.stop:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids with skip_tokenizer_init")
        self._tokenizer = tokenizer
        self._params = params
        self._num_tokens = 0
        self._match: StopMatch | None = None
        self._window: list[int] = []  # tokens that are decoded together
        self._context = 0  # leading tokens of the window whose text is out; they are there for what follows them
        self._sent = 0  # characters of the window's text that are out
        self._held = ""  # the signs of an open character at the end, not out yet
        self._before_last = (0, "")  # length of the text, and `_held`, before the last token
        self._pieces: list[str] = []
        self._length = 0  # characters in `_pieces`
        self._tail = ""  # the last characters, as many as a stop string may still reach back
        self._reach = max((len(stop) for stop in params.stop), default=1) - 1

    @property
    def text(self) -> str:
        """The text so far; final after `finish`, or once a stop string was found."""
        return "".join(self._pieces)

    def push(self, token_ids: Sequence[int]) -> StopMatch | None:
        """Add emitted tokens.

        Args:
          token_ids: in order of emission, a final stop token included; those after a stop string are ignored, now and
            in later calls.

        Returns:
          The stop string that ended the text, in this call or an earlier one; None while there is none.
        """
        for token_id in token_ids:
            if self._match is not None:
                break
            self._num_tokens += 1
            if self._tokenizer is not None:
                self._before_last = (self._length, self._held)
                self._append(self._decoded(self._tokenizer, token_id))
        return self._match

    def finish(self, *, stop_token: bool = False) -> str:
        """Put out what was held back, and return the final text; no token may be pushed afterwards.

        Args:
          stop_token: the last token is a stop token id or end-of-sequence, which ended the completion. Its text is
            taken back unless `include_stop_str_in_output`. A stop string that it completed goes before.
        """
        if self._match is not None:
            return self.text
        if stop_token and not self._params.include_stop_str_in_output:
            length, held = self._before_last
            self._pieces = [self.text[:length] + held]
        else:
            self._pieces.append(self._held)
        self._held, self._before_last = "", (sum(map(len, self._pieces)), "")
        return self.text

    def _decode_window(self, tokenizer: Tokenizer) -> str:
        return tokenizer.decode(self._window, self._params.skip_special_tokens)

    def _decoded(self, tokenizer: Tokenizer, token_id: int) -> str:
        """Take one token; return the characters that it completes."""
        if self._params.skip_special_tokens and token_id in tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode_window(tokenizer)
        stable = text.rstrip(UNFINISHED)
        piece = stable[self._sent :]
        self._sent = max(self._sent, len(stable))
        self._held = text[self._sent :]
        if len(stable) == len(text):  # no character is open: what follows needs this piece only as context
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._sent = len(self._decode_window(tokenizer))
        elif len(self._window) > MAX_WINDOW:
            piece += self._cut_window(tokenizer, len(text) - len(stable))
        return piece

    def _cut_window(self, tokenizer: Tokenizer, num_held: int) -> str:
        """Keep only tokens that may share the open character; return held-back signs that are now known to be final."""
        self._window = self._window[-MAX_CHARACTER_TOKENS:]
        self._context = 0
        text = self._decode_window(tokenizer)
        still_held = min(num_held, len(text) - len(text.rstrip(UNFINISHED)))
        self._sent = len(text) - still_held
        self._held = UNFINISHED * still_held
        return UNFINISHED * (num_held - still_held)

    def _append(self, piece: str) -> None:
        """Add characters to the text, and cut it at the first stop string."""
        if not piece:
            return
        text = self._tail + piece
        may_stop = self._num_tokens > self._params.min_tokens or self._params.min_tokens == 0
        found = _first_stop(text, len(self._tail), self._params.stop) if may_stop else None
        if found is not None:
            end = found.end if self._params.include_stop_str_in_output else found.start
            kept = self._length - len(self._tail) + end
            self._pieces = [(self.text + piece)[:kept]]
            self._match = StopMatch(found.stop, self._num_tokens)
            return
        self._pieces.append(piece)
        self._length += len(piece)
        self._tail = text[-self._reach :] if self._reach else ""


class _Found(NamedTuple):
    end: int
    start: int
    stop: str


def _first_stop(text: str, num_old: int, stops: Sequence[str]) -> _Found | None:
    """Find the stop string that ends first, the longest of those, and beyond the `num_old` characters seen before."""
    found = []
    for stop in stops:
        start = text.find(stop, max(0, num_old - len(stop) + 1))
        if start >= 0:
            found.append(_Found(start + len(stop), start, stop))
    return min(found, default=None)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from a Hugging Face folder.

    Args:
      path: folder with `tokenizer.json` or another form that transformers can convert.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no tokenizer that can be used.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"tokenizer folder {str(folder)!r} does not exist")
    try:
        fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises a dozen types here, depending on which file is odd
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load a tokenizer from {str(folder)!r}: {reason}") from error
    if not isinstance(fast, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer in {str(folder)!r} ({type(fast).__name__}) has no tokenizer.json form")
    eos_ids = set(load_eos_ids(folder))
    if isinstance(fast.eos_token_id, int):
        eos_ids.add(fast.eos_token_id)
    return Tokenizer(fast, tuple(sorted(eos_ids)))


def load_eos_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Read which token ids end a text from `generation_config.json` and `config.json` of a model folder.

    Raises:
      ValueError: one of the files is not JSON, or its `eos_token_id` is neither an id nor a list of ids.
    """
    eos_ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = pathlib.Path(path) / name
        if not file.is_file():
            continue
        try:
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{str(file)!r} does not hold a JSON object: {error}") from None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise ValueError(f"eos_token_id in {str(file)!r} must be an id or a list of ids, got {value!r}")
        eos_ids.update(ids)
    return tuple(sorted(eos_ids))


def _plain_content(message: Mapping[str, Any]) -> str:
    """Return a message's content as one string.

    Raises:
      ValueError: a part is not text.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"message content must be a string or a list of text parts, got {content!r}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"message content may hold text parts only, got {part!r}")
    return "".join(part["text"] for part in content)
