"""Laws: decoding token by token gives the text of decoding at once, however the tokens are grouped."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from streamserve.sampling_params import SamplingParams
from streamserve.tokenizer import TextStream, Tokenizer, load_eos_ids, load_tokenizer
from tests import fakes

STOPS = ("STOP", "OP h", "мир", "世界", "end.", " ", "😀", "e")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(fakes.save_tokenizer(folder, chat_template=fakes.CHAT_TEMPLATE, eos=[0, 7]))


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer in the manner of Llama 2: characters without a token of their own are spelt in byte tokens."""
    vocab = {"▁a": 0, "b": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), ())


def stream_text(tokenizer, tokens, groups=None, **params):
    """Push tokens in groups; return the stream, the match and the final text."""
    stream = TextStream(tokenizer, SamplingParams(**params))
    match, position = None, 0
    for size in groups or [len(tokens)]:
        match = stream.push(tokens[position : position + size])
        position += size
    return stream, match, stream.finish()


@st.composite
def tokens_and_groups(draw, vocab_size=330):
    """Tokens of real text with random ones between them, and a division into pushes."""
    kind = st.one_of(st.integers(0, vocab_size - 1), st.integers(2, 257))
    tokens = draw(st.lists(kind, max_size=40))
    groups = []
    while sum(groups) < len(tokens):
        groups.append(draw(st.integers(1, 9)))
    return tokens, groups


@st.composite
def texts(draw):
    return "".join(draw(st.lists(st.sampled_from([*" ".join(fakes.CORPUS[:5]), "STOP", "\ufffd"]), max_size=40)))


def test_decoding_token_by_token_gives_the_text_of_decoding_at_once(tokenizer):
    @settings(deadline=None, max_examples=300)
    @given(tokens_and_groups())
    def check(case):
        tokens, groups = case
        _, _, text = stream_text(tokenizer, tokens, groups)
        assert text == tokenizer.decode(tokens)

    check()


def test_text_survives_the_way_through_tokens(tokenizer):
    @settings(deadline=None, max_examples=200)
    @given(texts())
    def check(text):
        assert stream_text(tokenizer, tokenizer.encode(text))[2] == text

    check()


def test_text_and_token_count_do_not_depend_on_how_tokens_are_grouped(tokenizer):
    @settings(deadline=None, max_examples=300)
    @given(
        st.one_of(tokens_and_groups(), texts()),
        st.lists(st.sampled_from(STOPS), max_size=3),
        st.booleans(),
        st.integers(0, 10),
        st.lists(st.integers(1, 9), min_size=40, max_size=40),
    )
    def check(case, stops, include, min_tokens, sizes):
        tokens = list(tokenizer.encode(case)) if isinstance(case, str) else case[0]
        wanted = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": min_tokens, "max_tokens": 99}
        _, one_match, one_text = stream_text(tokenizer, tokens, [1] * len(tokens), **wanted)
        _, match, text = stream_text(tokenizer, tokens, sizes, **wanted)
        assert (match, text) == (one_match, one_text)
        if match is not None:
            assert (match.stop in text) if include else (match.stop not in text or min_tokens > 0)
            assert tokenizer.decode(tokens[: match.num_tokens]).startswith(text)
            assert match.stop not in tokenizer.decode(tokens[: match.num_tokens - 1]) or min_tokens > 0

    check()


def test_a_stop_string_across_token_borders_is_cut_out_of_the_text(tokenizer):
    tokens = tokenizer.encode("hello worl") + tokenizer.encode("d, th") + tokenizer.encode("e end")
    stream, match, text = stream_text(tokenizer, tokens, stop=["ld, the"])
    assert text == "hello wor"
    assert stream.text == text
    assert match.stop == "ld, the"
    assert tokenizer.decode(tokens[: match.num_tokens]).startswith("hello world, the")
    assert not tokenizer.decode(tokens[: match.num_tokens - 1]).startswith("hello world, the")


def test_tokens_after_a_stop_string_in_the_same_push_are_dropped(tokenizer):
    before = tokenizer.encode("hello STOP")
    _, match, text = stream_text(tokenizer, before + tokenizer.encode(" here and there"), stop=["STOP"])
    assert (text, match.num_tokens) == ("hello ", len(before))


def test_include_stop_str_in_output_keeps_the_stop_string_and_nothing_after_it(tokenizer):
    _, _, text = stream_text(
        tokenizer, tokenizer.encode("the end. STOP"), stop=["e e"], include_stop_str_in_output=True
    )
    assert text == "the e"


@pytest.mark.parametrize(
    ("stops", "text", "stop"),
    [
        (["world", "hello"], "", "hello"),
        (["lo w", "wor"], "hel", "lo w"),
        (["world", "orl"], "hello w", "orl"),
        (["o", "llo"], "he", "llo"),
    ],
)
def test_of_several_stop_strings_the_first_to_be_complete_wins(tokenizer, stops, text, stop):
    _, match, got = stream_text(tokenizer, tokenizer.encode("hello world"), stop=stops)
    assert (got, match.stop) == (text, stop)


def test_a_stop_string_within_min_tokens_does_not_count(tokenizer):
    tokens = [tokenizer.encode(character)[0] for character in "aXbXc"]
    _, match, text = stream_text(tokenizer, tokens, stop=["X", "aXbXc"], min_tokens=2)
    assert (match.num_tokens, text) == (4, "aXb")


def test_half_a_character_is_held_back_until_it_is_complete(tokenizer):
    stream = TextStream(tokenizer, SamplingParams())
    smile = "é😀".encode()
    byte_tokens = [tokenizer.vocabulary()[_byte_name(byte)] for byte in smile]
    seen = []
    for token in byte_tokens:
        stream.push([token])
        seen.append(stream.text)
    assert seen == ["", "é", "é", "é", "é", "é😀"]


def test_what_is_held_back_comes_out_at_the_end(tokenizer):
    byte_tokens = [tokenizer.vocabulary()[_byte_name(byte)] for byte in "a😀".encode()[:-1]]
    stream, _, text = stream_text(tokenizer, byte_tokens)
    assert (stream.text, text) == ("a\ufffd", "a\ufffd")


def test_characters_that_straddle_tokens_for_long_come_out_whole(tokenizer):
    """Each token ends in half a character, so no token border is ever clean, and the window must be cut."""
    names = tokenizer.vocabulary()
    text = "пр" * 100
    pieces = [names[_byte_name(byte)] for byte in text.encode()]
    stream = TextStream(_Paired(tokenizer, pieces), SamplingParams(stop=["\n"]))
    stream.push(range(len(pieces) // 2 + 1))
    assert stream.text == text


class _Paired(Tokenizer):
    """Token 0 is the first byte, token i the bytes 2i - 1 and 2i; counts what is decoded."""

    def __init__(self, tokenizer, pieces):
        self._backend, self.special_ids, self._pieces = tokenizer._backend, frozenset(), pieces
        self.most = 0

    def decode(self, ids, skip_special_tokens=True):
        self.most = max(self.most, len(ids))
        pieces = [self._pieces[max(0, 2 * i - 1) : 2 * i + 1] for i in ids]
        return self._backend.decode([piece for pair in pieces for piece in pair], skip_special_tokens=True)


def test_the_window_stays_short_when_no_byte_is_ever_valid(tokenizer):
    names = tokenizer.vocabulary()
    counting = _Paired(tokenizer, [names[_byte_name(0x80)]] * 401)
    stream = TextStream(counting, SamplingParams())
    stream.push(range(201))
    assert stream.finish() == "\ufffd" * 401
    assert counting.most <= 20


def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizer):
    names = tokenizer.vocabulary()
    counting = _Paired(tokenizer, [names[_byte_name(byte)] for byte in b"plain text " * 40])
    stream = TextStream(counting, SamplingParams(stop=["\n"]))
    stream.push(range(200))
    assert counting.most <= 3


def test_byte_fallback_tokens_come_out_as_characters(byte_fallback):
    tokens = [0, 1, *(byte + 2 for byte in "你好é".encode()), 1, 0]
    seen, stream = [], TextStream(byte_fallback, SamplingParams())
    for token in tokens:
        stream.push([token])
        seen.append(stream.text)
    assert stream.finish() == byte_fallback.decode(tokens) == "ab你好éb a"
    assert not any("\ufffd" in text for text in seen)


def test_special_tokens_are_left_out_unless_asked_for(tokenizer):
    tokens = (*tokenizer.encode("hello"), 1, *tokenizer.encode(" world"))
    assert stream_text(tokenizer, tokens)[2] == "hello world"
    assert stream_text(tokenizer, tokens, skip_special_tokens=False)[2] == "hello<pad> world"


def test_the_text_of_a_stop_token_is_taken_back(tokenizer):
    tokens = tokenizer.encode("hello world")
    comma = tokenizer.encode(",")
    for include, expected in ((False, "hello world"), (True, "hello world,")):
        stream = TextStream(tokenizer, SamplingParams(include_stop_str_in_output=include))
        stream.push(tokens + comma)
        assert stream.finish(stop_token=True) == expected
        assert stream.text == expected


def test_a_stop_token_does_not_take_back_what_came_before_it(tokenizer):
    half = [tokenizer.vocabulary()[_byte_name(byte)] for byte in "😀".encode()[:2]]
    stream = TextStream(tokenizer, SamplingParams())
    stream.push([*tokenizer.encode("hello"), *half, *tokenizer.encode(",")])
    assert stream.finish(stop_token=True) == "hello\ufffd"


def test_without_a_tokenizer_text_is_empty_and_stop_strings_are_refused():
    stream = TextStream(None, SamplingParams())
    assert stream.push([1, 2, 3]) is None
    assert (stream.finish(), stream.text) == ("", "")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        TextStream(None, SamplingParams(stop=["x"]))


def test_chat_messages_go_through_the_template(tokenizer):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": parts}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<user>hello<eos><assistant>"
    assert ids.count(0) == 1, "the template's special token must be one token"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<user>hello<eos>"


@pytest.mark.parametrize("content", [None, 3, [{"type": "image_url", "image_url": "x"}], ["hello"]])
def test_chat_content_that_is_not_text_is_refused(tokenizer, content):
    with pytest.raises(ValueError, match="message content"):
        tokenizer.apply_chat_template([{"role": "user", "content": content}])


def test_a_tokenizer_without_a_chat_template_says_so(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(fakes.save_tokenizer(tmp_path)).apply_chat_template([{"role": "user", "content": "x"}])


def test_a_template_that_refuses_messages_is_a_value_error(tmp_path):
    tokenizer = load_tokenizer(fakes.save_tokenizer(tmp_path, chat_template="{{ raise_exception('no system role') }}"))
    with pytest.raises(ValueError, match="no system role"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_the_vocabulary_holds_the_added_tokens(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.vocabulary()) == 330
    assert tokenizer.vocabulary()["<eos>"] == 0
    assert tokenizer.token_text(1) == "<pad>"
    assert tokenizer.token_text(10_000) is None


def test_eos_ids_come_from_the_tokenizer_and_both_configs(tmp_path):
    fakes.save_tokenizer(tmp_path, eos=[7, 9])
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 11}))
    assert load_tokenizer(tmp_path).eos_ids == (0, 7, 9, 11)
    assert load_eos_ids(tmp_path) == (7, 9, 11)


@pytest.mark.parametrize("content", ['{"eos_token_id": "x"}', "[]", "{"])
def test_an_odd_generation_config_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load_eos_ids(tmp_path)


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path)


def _byte_name(byte):
    """The character by which byte-level tokenizers write a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))
