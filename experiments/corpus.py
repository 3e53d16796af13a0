"""The bundled pair's text: documents from GSM8K and the Python standard library, and their tokens in rows.

It owns the document templates, the held-out split, the tokenizer and the packing. It knows no model. Everything is a
function of the files read and a seed: the same Python version and the same seed give the same rows in the same order.
"""

import ast
import collections
import dataclasses
import hashlib
import inspect
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (END, PAD, *(f"<|{role}|>" for role in ROLES))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SKIPPED_FOLDERS = frozenset(("test", "tests", "idlelib", "idle_test", "site-packages", "lib2to3", "__pycache__"))
SKIPPED_MODULES = re.compile(r"pydoc_data|_sysconfigdata|(^|\.)encodings\.|html\.entities|__phello__")
MAX_BODY_LINES = 40  # of a function whose completion is a document; longer ones do not fit a short answer
MIN_PROSE_CHARACTERS = 80  # shorter docstrings teach nothing that their function's own document does not
STORY_QUESTIONS = 5  # word problems that are told one after the other where a narrative is to be summarised
# Words with the sign or space before them, single digits, runs of signs, line breaks, spaces. A line break never
# shares a token with what follows: a prompt that ends in one is cut there, and must look as it did in training.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
BLOCK_CHARACTERS = 6000  # of source or prose a document: a little less than the longest training row


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One training text.

    Attributes:
      kind: which template made it; the mixture counts by kind.
      text: without the end-of-text token.
      held_out: never trained on. All documents of one module, or of one story's questions, are on one side.
    """

    kind: str
    text: str
    held_out: bool


def read_documents(gsm8k_path: pathlib.Path | None, stdlib_path: pathlib.Path, held_out_share: float) -> list[Document]:
    """Read the whole corpus.

    Args:
      gsm8k_path: JSON lines of `question` and `answer`; None leaves mathematics out.
      stdlib_path: folder of Python sources.
      held_out_share: share of questions and of modules that are kept from training.

    Returns:
      Documents without duplicates, in an order that depends on their origin alone.
    """
    documents: dict[tuple[str, str], Document] = {}
    math = () if gsm8k_path is None else math_texts(gsm8k_path)
    for origin, kind, text in (*math, *stdlib_texts(stdlib_path)):
        held_out = int(hashlib.sha256(origin.encode()).hexdigest(), 16) % 10_000 < 10_000 * held_out_share
        documents.setdefault((kind, text), Document(kind=kind, text=text, held_out=held_out))
    return list(documents.values())


def math_texts(path: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """Yield (origin, kind, text) of worked problems, plain and as conversations, and of stories made of questions."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for first in range(0, len(rows), STORY_QUESTIONS):
        told = [(row["question"].strip(), row["answer"].strip()) for row in rows[first : first + STORY_QUESTIONS]]
        origin = told[0][0]  # of all of them, so that no story for training tells a question that is held out
        for question, answer in told:
            yield origin, "math", f"{question}\n{answer}"
            yield origin, "math_chat", f"<|user|>\n{question}\n<|assistant|>\n{answer}"
        yield from ((origin, kind, text) for kind, text in _summary(" ".join(question for question, _ in told)))


def stdlib_texts(root: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """Yield (origin, kind, text) of every module below `root` that parses."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # a few files are broken on purpose
            continue
        if module == "pydoc_data.topics":
            yield from ((module, "prose", block) for block in _topic_blocks(tree))
        elif not SKIPPED_MODULES.search(module):
            yield from ((module, kind, text) for kind, text in module_texts(module, source, tree))


def module_texts(module: str, source: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of the documents that one module gives."""
    yield from (("source", block) for block in _blocks(source))
    prose = inspect.cleandoc(ast.get_docstring(tree) or "")
    if len(prose) >= MIN_PROSE_CHARACTERS:
        yield from (("prose", block) for block in _blocks(prose))
        yield from _summary(prose)
    lines = source.splitlines(keepends=True)
    for name, node in _definitions(tree, module):
        doc = inspect.cleandoc(ast.get_docstring(node) or "")
        if not doc:
            continue
        yield "instruction", f"What does {name} do?\n{_first_sentence(doc)}"
        yield "instruction", f"Explain {name} in one sentence.\n{_first_sentence(doc)}"
        if len(doc) >= MIN_PROSE_CHARACTERS:
            yield "prose", doc
            yield from _summary(doc)
        if not isinstance(node, ast.ClassDef):
            yield from _completion(node, lines)
        else:
            yield from _method_list(name, node)


def _method_list(name: str, node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Ask for a list."""
    methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef) and item.name[0] != "_"]
    if len(methods) >= 2:
        listed = "\n".join(f"{index}. {method}" for index, method in enumerate(methods[:9], 1))
        yield "instruction", f"List {len(methods[:9])} methods of {name}.\n{listed}"


def _summary(prose: str) -> Iterator[tuple[str, str]]:
    """Ask for the first sentence of what it is taken from."""
    sentence = _first_sentence(prose)
    if 20 <= len(sentence) < len(prose) - 40:
        flat = " ".join(prose.split())[:BLOCK_CHARACTERS]
        yield "summary", f"Summarize: {flat}\n{sentence}"
        yield "summary", f"<|user|>\nSummarize: {flat}\n<|assistant|>\n{sentence}"


def _completion(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Ask for the body of a function, given its head and docstring as they stand in the source."""
    if len(node.body) < 2 or (node.end_lineno or 0) - node.lineno > MAX_BODY_LINES:
        return
    stub = "".join(lines[node.lineno - 1 : node.body[0].end_lineno])
    body = "".join(lines[node.body[0].end_lineno or 0 : node.end_lineno])
    indent = " " * node.col_offset
    stub, body = (re.sub(f"(?m)^{indent}", "", part).rstrip() for part in (stub, body))
    yield "completion", f"Complete the code I provided.\n\n{stub}\n{body.strip(chr(10))}"


def _definitions(
    tree: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Yield every function and class with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}.{node.name}"
            yield name, node
            yield from _definitions(node, name)


def _topic_blocks(tree: ast.Module) -> Iterator[str]:
    """Yield the language reference, which the standard library keeps as strings of one dictionary."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                yield from _blocks(str(ast.literal_eval(value)))


def _blocks(text: str) -> Iterator[str]:
    """Cut a long text at blank lines."""
    block = ""
    for paragraph in re.split(r"(?<=\n)\n(?=\S)", text.strip()):
        if block and len(block) + len(paragraph) > BLOCK_CHARACTERS:
            yield block.rstrip()
            block = ""
        block += ("\n" if block else "") + paragraph
    if block.strip():
        yield block.rstrip()


def _first_sentence(prose: str) -> str:
    """Return the first sentence, on one line."""
    paragraph = " ".join(prose.split("\n\n", 1)[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: every byte has a token, digits stand alone, nothing is added around a text.

    Args:
      texts: what to learn from.
      vocab_size: tokens in all, special ones included; fewer when the texts give fewer.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue] a setter in Rust
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue] a setter in Rust
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


class Encoded:
    """Documents as tokens, by kind, each ending in end-of-text."""

    def __init__(self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast):
        end = tokenizer.convert_tokens_to_ids(END)
        encodings = tokenizer.backend_tokenizer.encode_batch_fast([document.text for document in documents])
        self.tokens = [np.asarray([*encoding.ids, end], np.uint16) for encoding in encodings]
        self.kinds = np.asarray([document.kind for document in documents])

    def num_tokens(self) -> dict[str, int]:
        """Count tokens a kind."""
        counts: collections.Counter[str] = collections.Counter()
        for kind, tokens in zip(self.kinds, self.tokens, strict=True):
            counts[str(kind)] += len(tokens)
        return dict(sorted(counts.items()))


def pack_rows(
    encoded: Encoded, *, count: int, length: int, seed: tuple[int, ...], shares: Mapping[str, float] | None = None
) -> np.ndarray:
    """Fill rows with whole documents, as many epochs as it takes.

    A row begins where a document (or a piece of one that is longer than a row) begins, since prompts begin there too;
    the document that does not fit at its end is cut, and other epochs, shuffled anew, cut others.

    Args:
      encoded: what to draw from.
      count: rows.
      length: tokens a row.
      seed: of the order.
      shares: probability that a document of a kind is used in an epoch, 1 where absent.

    Returns:
      uint16 [count, length].
    """
    rows = np.empty((count, length), np.uint16)
    pieces = _pieces(encoded, length, seed, shares or {})
    for row in rows:
        filled = 0
        while filled < length:
            piece = next(pieces)[: length - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
    return rows


def _pieces(encoded: Encoded, length: int, seed: tuple[int, ...], shares: Mapping[str, float]) -> Iterator[np.ndarray]:
    """Yield pieces of at most `length` tokens, epoch after epoch, each in its own order."""
    share = np.asarray([shares.get(str(kind), 1.0) for kind in encoded.kinds])
    if not share.any():
        raise ValueError(f"no document is used: kinds {sorted(set(encoded.kinds))}, {shares=}")
    epoch = 0
    while True:
        rng = np.random.default_rng((*seed, epoch))
        chosen = np.flatnonzero(rng.random(len(share)) < share)
        for index in rng.permutation(chosen):
            tokens = encoded.tokens[index]
            yield from (tokens[start : start + length] for start in range(0, len(tokens), length))
        epoch += 1
