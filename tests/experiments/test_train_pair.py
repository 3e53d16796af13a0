"""The making of the bundled pair, in miniature: it learns, it survives being killed, and others can read the result."""

import collections
import dataclasses
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs import train_pair as bundled_config
from experiments import corpus, pair_report, pair_training
from experiments.pair_config import PairConfig, StageConfig
from experiments.pair_model import logits_of
from experiments.pair_training import make_loss, make_step  # as they are before a fixture replaces them
from streamserve.config import from_mapping
from streamserve.tokenizer import load_tokenizer

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "intermediate_size": 48,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
PHASE = {
    "short": {"steps": 24, "rows": 4, "micro_rows": 2, "length": 32, "chunk": 32},
    "long": {"steps": 6, "rows": 1, "micro_rows": 1, "length": 64, "chunk": 32},
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "decay_steps": 10,
    "weight_decay": 0.01,
    "clip": 1.0,
    "kl_weight": 0.0,
    "save_every": 8,
}
CONFIG = from_mapping(
    PairConfig,
    {
        "seed": 3,
        "export_dtype": "float32",
        "corpus": {
            "held_out_share": 0.2,
            "shares": {"prose": 0.5},
            "tokenizer_source_share": 1.0,
            "eval_rows": 2,
            "eval_length": 32,
        },
        "target": {**LLAMA, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "draft": {**LLAMA, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
        "target_phase": PHASE,
        "draft_phase": {**PHASE, "kl_weight": 0.9},
    },
)
LIBRARY = textwrap.dedent('''
    """Boats and their cargo. This module counts what is carried, where to, and how many days the journey takes."""

    class Boat:
        """A boat."""

        def load(self, crates, weight=1):
            """Put crates on board, unless they are too heavy. Every crate weighs the same, and none is left behind.

            >>> Boat().load(3)
            3
            """
            if weight > 10:
                return 0
            return crates

        def sink(self):
            pass
''')


def _documents():
    animals, places = ("fox", "owl", "carp", "hare"), ("hill", "pond", "barn")
    texts = [
        f"The {a} sees {n} stones near the {p}.\nIt takes {n + 1}." for a in animals for p in places for n in range(9)
    ]
    return [
        corpus.Document(kind=("math", "prose")[i % 2], text=text, held_out=i % 5 == 0) for i, text in enumerate(texts)
    ]


DOCUMENTS = _documents()


@pytest.fixture(scope="module", autouse=True)
def loose_promotion():
    """Optax's bias correction raises a float to an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Every run of the same model and stage takes the same compiled step."""
    steps = {}

    def cached(arguments, optimizer, stage):
        model, teacher, kl_weight, chunk = arguments
        key = (model.config, teacher is None, stage)
        if key not in steps:
            steps[key] = make_step(make_loss(model, teacher, kl_weight, chunk), optimizer, stage)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_training, "make_loss", lambda *arguments: arguments)
        patch.setattr(pair_training, "make_step", cached)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def pair(workdir):
    return pair_training.train_pair(DOCUMENTS, CONFIG, workdir)


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    facts = {"command": "python -m make", "origin": "Made of sand."}
    return folder, pair_report.report(pair, DOCUMENTS, CONFIG, folder, facts)


def test_both_losses_fall(pair):
    for name, curve in pair.curves.items():
        losses = [row["loss"] for row in curve]
        assert np.mean(losses[-5:]) < 0.6 * losses[0], name


def test_the_draft_learns_the_targets_distribution(pair):
    rows = corpus.pack_rows(pair.encoded, count=4, length=33, seed=(9,))
    (target, target_params), (draft, draft_params) = pair.models["target"], pair.models["draft"]
    measure = pair_report.make_measure(target, draft, 32)
    trained = pair_report.score_rows(measure, target_params, draft_params, rows)
    fresh = pair_report.score_rows(measure, target_params, draft.init(jax.random.key(0)), rows)
    assert trained.acceptance > fresh.acceptance + 0.2


def test_scores_are_what_their_names_say(pair):
    row = corpus.pack_rows(pair.encoded, count=1, length=33, seed=(9,))
    probs, losses = [], []
    for model, params in pair.models.values():
        logp = jax.nn.log_softmax(logits_of(model, params, jnp.asarray(row[:, :-1], jnp.int32), 32)[0])
        losses.append(-np.mean([logp[s, row[0, s + 1]] for s in range(32)]))
        probs.append(np.exp(logp))
    (target, target_params), (draft, draft_params) = pair.models["target"], pair.models["draft"]
    score = pair_report.score_rows(pair_report.make_measure(target, draft, 32), target_params, draft_params, row)
    assert score.tokens == 32
    np.testing.assert_allclose([score.target_loss, score.draft_loss], losses, rtol=1e-4)
    np.testing.assert_allclose(score.acceptance, np.minimum(*probs).sum() / 32, rtol=1e-4)
    assert score.agreement == np.mean(probs[0].argmax(-1) == probs[1].argmax(-1))


def test_the_loss_is_the_divergence_from_the_teacher_and_the_datas(pair):
    rows = jnp.asarray(corpus.pack_rows(pair.encoded, count=1, length=33, seed=(9,)), jnp.int32)
    (target, target_params), (draft, draft_params) = pair.models["target"], pair.models["draft"]
    logp, logq = (
        jax.nn.log_softmax(logits_of(model, params, rows[:, :-1], 32))[0] for model, params in pair.models.values()
    )
    divergence = np.sum(np.exp(logp) * (logp - logq)) / 32
    surprise = -np.mean([logq[s, rows[0, s + 1]] for s in range(32)])
    loss = make_loss(draft, target, 0.75, 32)(draft_params, target_params, rows)
    np.testing.assert_allclose(loss, 0.75 * divergence + 0.25 * surprise, rtol=1e-4)


class Killed(BaseException):
    """Stands for a signal."""


# Checkpoints are at 8, 16, 24 and 30, the long stage begins at 24: kills before any checkpoint and in both stages.
@pytest.mark.parametrize("at", [3, 11, 27])
def test_a_killed_run_ends_as_if_it_had_not_been(pair, tmp_path, monkeypatch, at):
    model, params = pair.models["target"]
    feed = pair_training.Feed(encoded=pair.encoded, shares=CONFIG.corpus.shares, seed=CONFIG.seed)
    add = pair_training.LossLog.add

    def add_or_die(self, loss, **facts):
        if facts["step"] == at:
            self._file.write('{"step": 1')  # a line that the kill cut
            raise Killed
        add(self, loss, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(pair_training.LossLog, "add", add_or_die)
        with pytest.raises(Killed):
            pair_training.run_phase(tmp_path, feed, CONFIG.target_phase, model)
    resumed = pair_training.run_phase(tmp_path, feed, CONFIG.target_phase, model)
    jax.tree.map(np.testing.assert_array_equal, resumed, params)
    curve = [json.loads(line) for line in (tmp_path / pair_training.CURVE).read_text().splitlines()]
    assert [row["step"] for row in curve] == list(range(30))
    assert [row["loss"] for row in curve] == [row["loss"] for row in pair.curves["target"]]


def test_a_finished_run_trains_no_further(pair, workdir, monkeypatch):
    monkeypatch.setattr(pair_training, "make_step", lambda *_: pytest.fail)
    again = pair_training.train_pair(DOCUMENTS, CONFIG, workdir)
    jax.tree.map(np.testing.assert_array_equal, pair.models["draft"][1], again.models["draft"][1])


def test_gradients_of_micro_rows_add_up_to_the_batchs(pair):
    model, params = pair.models["draft"]
    rows = jnp.asarray(corpus.pack_rows(pair.encoded, count=4, length=33, seed=(0,)))

    def after(micro_rows):
        stage = dataclasses.replace(CONFIG.target_phase.short, micro_rows=micro_rows)
        optimizer = optax.sgd(1.0)
        step = make_step(make_loss(model, None, 0.0, stage.chunk), optimizer, stage)
        copy = jax.tree.map(jnp.copy, params)
        begin = pair_training.TrainState(step=jnp.ones((), jnp.int32), params=copy, opt_state=optimizer.init(copy))
        state, loss = step(begin, (), rows)
        return loss, state.params

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after(2), after(4))


def test_scores_do_not_depend_on_the_chunk(pair):
    model, params = pair.models["target"]
    tokens = jnp.asarray(corpus.pack_rows(pair.encoded, count=2, length=32, seed=(1,)), jnp.int32)
    whole, parts = (logits_of(model, params, tokens, chunk) for chunk in (32, 16))
    np.testing.assert_allclose(whole, parts, atol=1e-4)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_transformers_gives_the_same_logits(pair, exported, name):
    folder, _ = exported
    tokens = corpus.pack_rows(pair.encoded, count=2, length=64, seed=(1,)).astype(np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    model, params = pair.models[name]
    ours = jax.jit(lambda params: logits_of(model, params, jnp.asarray(tokens), 64))(params)
    np.testing.assert_allclose(logits, ours, atol=1e-4)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_transformers_reads_the_tokenizer(exported, name):
    folder, _ = exported
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    every_byte = "".join(map(chr, range(256))) + "\n\n\tdéjà vu ⛵ 12345 don't  x"
    ids = tokenizer(every_byte)["input_ids"]
    assert tokenizer.decode(ids) == every_byte
    assert tokenizer.eos_token_id not in ids
    assert len(tokenizer.encode("12345")) == 5
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hm"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nHi\n<|assistant|>\nHo<|endoftext|><|user|>\nHm\n<|assistant|>\n"
    ours = load_tokenizer(folder / name)
    assert ours.eos_ids == (tokenizer.eos_token_id,)
    assert ours.encode(every_byte) == tuple(ids)
    assert max(ours.encode(text)[:1]) < len(corpus.SPECIAL_TOKENS)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ('def f():\n    """Return one.\n    """\n', "    return 1\n"),
        ("How many stones?", "\nIt takes 5 - 2."),
        ("Summarize: A fox. An owl.", "\nA fox."),
        ("for x in y:\n    if x:\n", "        return (x)"),
    ],
)
def test_a_prompt_has_the_tokens_that_it_has_before_its_answer(pair, prompt, answer):
    whole = pair.tokenizer.encode(prompt + answer)
    assert whole == pair.tokenizer.encode(prompt) + pair.tokenizer.encode(answer)


def test_the_report_holds_what_was_measured(pair, exported):
    folder, scores = exported
    card = (folder / "MODEL_CARD.md").read_text()
    assert f"| all | {scores['all'].tokens} | {scores['all'].target_loss:.3f} |" in card
    assert f"| target | {sum(x.size for x in jax.tree.leaves(pair.models['target'][1]))} | 30 | " in card
    rows = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert collections.Counter(row["model"] for row in rows) == {"target": 30, "draft": 30}
    assert scores["all"].tokens == scores["math"].tokens + scores["prose"].tokens


def test_bfloat16_scores_are_of_the_stored_values(pair):
    _, params = pair.models["target"]
    stored = pair_training.rounded(params, "bfloat16")
    kernel, rounded = params["embedding"], stored["embedding"]
    assert rounded.dtype == jnp.float32
    assert jnp.array_equal(rounded, kernel.astype(jnp.bfloat16).astype(jnp.float32))
    assert not jnp.array_equal(rounded, kernel)


def test_rows_begin_with_documents_and_epochs_differ(pair):
    encoded = pair.encoded
    rows = corpus.pack_rows(encoded, count=60, length=20, seed=(0,))
    starts = {tuple(tokens[:5]) for tokens in encoded.tokens}
    assert all(tuple(row[:5]) in starts for row in rows)
    assert len({tuple(row) for row in rows}) > 50
    np.testing.assert_array_equal(rows, corpus.pack_rows(encoded, count=60, length=20, seed=(0,)))
    np.testing.assert_array_equal(rows[:7], corpus.pack_rows(encoded, count=7, length=20, seed=(0,)))
    assert not np.array_equal(rows, corpus.pack_rows(encoded, count=60, length=20, seed=(1,)))


def test_shares_leave_kinds_out(pair):
    prose = {
        tuple(tokens[:12])
        for kind, tokens in zip(pair.encoded.kinds, pair.encoded.tokens, strict=True)
        if kind == "prose"
    }
    rows = corpus.pack_rows(pair.encoded, count=40, length=12, seed=(0,), shares={"prose": 0.0})
    assert not prose & {tuple(row) for row in rows}
    with pytest.raises(ValueError, match="no document is used"):
        corpus.pack_rows(pair.encoded, count=1, length=8, seed=(0,), shares={"prose": 0.0, "math": 0.0})


def test_the_library_becomes_documents(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(LIBRARY)
    (tmp_path / "broken.py").write_text("def :")
    (tmp_path / "boats.py").write_text(LIBRARY)
    questions = tmp_path / "gsm8k.jsonl"
    questions.write_text(json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"}) + "\n")
    texts = collections.defaultdict(list)
    for document in corpus.read_documents(questions, tmp_path, 0.0):
        assert not document.held_out
        texts[document.kind].append(document.text)
    assert texts["math"] == ["1 + 1?\n2\n#### 2"]
    assert texts["math_chat"] == ["<|user|>\n1 + 1?\n<|assistant|>\n2\n#### 2"]
    assert texts["source"] == [LIBRARY.strip()]
    assert "What does boats.Boat do?\nA boat." in texts["instruction"]
    assert "List 2 methods of boats.Boat.\n1. load\n2. sink" in texts["instruction"]
    (completion,) = texts["completion"]
    assert completion.startswith(
        'Complete the code I provided.\n\ndef load(self, crates, weight=1):\n    """Put crates'
    )
    assert completion.endswith('    """\n    if weight > 10:\n        return 0\n    return crates')
    summary = texts["summary"][0]
    assert summary.startswith("Summarize: Boats and their cargo. This module")
    assert summary.endswith("journey takes.\nBoats and their cargo.")


def test_a_modules_documents_are_on_one_side(tmp_path):
    for index in range(40):
        (tmp_path / f"boats{index}.py").write_text(
            LIBRARY.replace("boat", f"boat{index}").replace("Boat", f"Boat{index}")
        )
    sides = collections.defaultdict(set)
    for document in corpus.read_documents(None, tmp_path, 0.5):
        for index in range(40):
            if f"Boat{index} " in document.text or f"Boat{index}:" in document.text:
                sides[index].add(document.held_out)
    assert all(len(side) == 1 for side in sides.values())
    assert 5 < sum(True in side for side in sides.values()) < 35


def test_no_training_text_tells_a_held_out_question(tmp_path):
    questions = [f"Ann has {n} pears and finds {n} more in a basket. How many has she?" for n in range(100, 200)]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps({"question": text, "answer": "None."}) + "\n" for text in questions))
    documents = corpus.read_documents(path, tmp_path, 0.3)
    held_out = [text for text in questions if any(text in x.text for x in documents if x.held_out)]
    assert 5 < len(held_out) < 60
    assert any(document.kind == "summary" for document in documents if document.held_out)
    assert not [text for text in held_out if any(text in x.text for x in documents if not x.held_out)]


def test_configs_are_checked():
    config = from_mapping(PairConfig, bundled_config.get_config().to_dict())
    assert config.target["vocab_size"] == config.draft["vocab_size"] == 4096
    with pytest.raises(ValueError, match="micro_rows must divide rows"):
        StageConfig(steps=1, rows=3, micro_rows=2, length=8, chunk=8)
