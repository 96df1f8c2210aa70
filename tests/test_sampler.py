"""The sampler chooses as llama.cpp's own chain does, under a constraint too, and nothing that a
request asks for ends the process or another request.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import TinyFile

from moe_gguf.runtime.candidates import Candidates
from moe_gguf.runtime.engine import constraint as constraints
from moe_gguf.runtime.engine.constraint import Constraints
from moe_gguf.runtime.engine.request import GBNF, Request, Sampling, Schema
from moe_gguf.runtime.engine.sampler import Sampler, logprob
from moe_gguf.runtime.errors import RequestError
from moe_gguf.runtime.vocab import Vocabulary

# llguidance asks llama_cpp for a token's kind by a name that is going out.
pytestmark = pytest.mark.filterwarnings("ignore:llama_token_get_attr:DeprecationWarning")

N = 12
PROMPT = b"Hello world, the expert of memory is the expert of the token"


class Model:
    """A tiny model in stock llama.cpp, and a context to ask it for logits."""

    def __init__(self, path: str) -> None:
        self.llama = llama_cpp.Llama(path, n_ctx=512, n_threads=1, verbose=False, logits_all=True)
        self.model, self.ctx = self.llama._model.model, self.llama._ctx.ctx
        self.constraints = Constraints(Vocabulary(self.llama._model.vocab))
        self.vocabulary = self.constraints.vocabulary
        self.prompt = self.llama.tokenize(PROMPT)

    def sampler(self, request: Request) -> Sampler:
        return Sampler(self.model, request, self.constraints)

    def generate(self, choose: Callable[[], int], n: int = N) -> list[int]:
        """Decode the prompt, and then what ``choose`` says."""
        self.llama.reset()
        self.llama.eval(self.prompt)
        tokens: list[int] = []
        while len(tokens) < n:
            tokens.append(choose())
            if self.vocabulary.ends(tokens[-1]):
                break
            self.llama.eval(tokens[-1:])
        return tokens

    def ours(self, n: int = N, **asked: Any) -> list[int]:
        sampler = self.sampler(Request(tokens=self.prompt, **asked))
        try:
            return self.generate(lambda: sampler.sample(self.ctx, -1).token, n)
        finally:
            sampler.close()

    def text(self, n: int = N, **asked: Any) -> str:
        tokens = self.ours(n, **asked)
        return self.vocabulary.text(tokens).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def model(tiny_file: TinyFile) -> Iterator[Model]:
    model = Model(str(tiny_file("qwen3moe")))
    yield model
    model.llama.close()


# --- the chain ------------------------------------------------------------------------------------


def by_hand(model: Model, s: Sampling) -> list[Any]:
    """llama.cpp's tools' order, written down once more."""
    lc, vocab, n = llama_cpp, model.llama._model.vocab, model.vocabulary.n_tokens
    chain = []
    if s.logit_bias:
        bias = (lc.llama_logit_bias * len(s.logit_bias))(*s.logit_bias.items())
        chain.append(lc.llama_sampler_init_logit_bias(n, len(bias), bias))
    if s.mirostat:
        chain.append(lc.llama_sampler_init_temp(s.temp))
        if s.mirostat == 1:
            chain.append(
                lc.llama_sampler_init_mirostat(n, s.seed, s.mirostat_tau, s.mirostat_eta, 100)
            )
        else:
            chain.append(lc.llama_sampler_init_mirostat_v2(s.seed, s.mirostat_tau, s.mirostat_eta))
        return chain
    breakers = (ctypes.c_char_p * len(s.dry_breakers))(*(b.encode() for b in s.dry_breakers))
    return [
        *chain,
        lc.llama_sampler_init_penalties(
            n, s.penalty_last_n, s.repeat_penalty, s.frequency_penalty, s.presence_penalty
        ),
        lc.llama_sampler_init_dry(
            vocab,
            s.dry_multiplier,
            s.dry_base,
            s.dry_allowed_length,
            s.dry_penalty_last_n,
            breakers,
            len(breakers),
        ),
        lc.llama_sampler_init_top_n_sigma(s.top_n_sigma),
        lc.llama_sampler_init_top_k(s.top_k),
        lc.llama_sampler_init_typical(s.typical_p, 0),
        lc.llama_sampler_init_top_p(s.top_p, 0),
        lc.llama_sampler_init_min_p(s.min_p, 0),
        lc.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, 0, s.seed),
        lc.llama_sampler_init_temp(s.temp),
        lc.llama_sampler_init_dist(s.seed),
    ]


HOT = {"temp": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SETTINGS = {
    "the defaults": {},
    "greedy": {"temp": 0.0},
    "greedy, repeating costs": {"temp": 0.0, "repeat_penalty": 1.5, "penalty_last_n": 8},
    "everything open": HOT,
    "top k": HOT | {"top_k": 5},
    "top p": HOT | {"top_p": 0.5},
    "min p": HOT | {"min_p": 0.2},
    "typical": HOT | {"typical_p": 0.6},
    "top n sigma": HOT | {"top_n_sigma": 1.0},
    "XTC": HOT | {"xtc_probability": 0.8, "xtc_threshold": 0.02},
    "penalties": HOT | {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repeat_penalty": 1.2},
    "DRY": HOT | {"dry_multiplier": 2.0, "dry_base": 1.2, "dry_allowed_length": 1},
    "a bias": HOT | {"logit_bias": {65: 8.0, 66: 7.5, 67: -math.inf}},
    "mirostat": {"mirostat": 1, "mirostat_tau": 3.0, "temp": 1.1},
    "mirostat 2": {"mirostat": 2, "mirostat_tau": 3.0, "temp": 1.1},
}


@pytest.mark.parametrize("what", SETTINGS)
def test_tokens_are_those_of_a_chain_by_hand(what: str, model: Model) -> None:
    sampling = Sampling(seed=7, **SETTINGS[what])
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for sampler in by_hand(model, sampling):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    for token in model.prompt:
        llama_cpp.llama_sampler_accept(chain, token)
    expected = model.generate(lambda: llama_cpp.llama_sampler_sample(chain, model.ctx, -1))
    llama_cpp.llama_sampler_free(chain)
    assert model.ours(sampling=sampling) == expected


def test_tokens_are_llama_cpp_python_s(model: Model) -> None:
    """Its chain has no penalty for the prompt's tokens, and fewer samplers."""
    model.llama.set_seed(5)
    model.llama.reset()  # or the same prompt would not be computed in the same batches
    stock = model.llama.generate(model.prompt, temp=0.9, top_k=30, top_p=0.9, min_p=0.01)
    expected = [next(stock) for _ in range(N)]
    sampling = Sampling(temp=0.9, top_k=30, top_p=0.9, min_p=0.01, seed=5)
    assert model.ours(sampling=sampling) == expected


def test_the_prompt_counts_for_penalties(model: Model) -> None:
    first = model.ours(1, sampling=Sampling(temp=0.0))
    penalty = Sampling(temp=0.0, presence_penalty=1000.0, penalty_last_n=-1)
    sampler = model.sampler(Request(tokens=[*model.prompt, *first], sampling=penalty))
    assert model.generate(lambda: sampler.sample(model.ctx, -1).token, 1) != first
    sampler.close()


def test_without_a_seed_answers_differ(model: Model) -> None:
    assert model.ours(sampling=Sampling(**HOT)) != model.ours(sampling=Sampling(**HOT))


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"temp": math.nan}, "temp must be a finite number"),
        ({"repeat_penalty": 0.0}, "repeat_penalty must be greater"),
        ({"mirostat": 3}, "mirostat must be"),
        ({"logit_bias": {10**6: 1.0}}, "token 1000000 is not in"),
        ({"logit_bias": {1: math.inf}}, "cannot be inf"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    sampling: dict[str, Any], says: str, model: Model
) -> None:
    with pytest.raises(RequestError, match=says):
        model.sampler(Request(tokens=model.prompt, sampling=Sampling(**sampling)))


def test_a_bias_that_bans_every_token_is_refused(model: Model) -> None:
    """llama.cpp chooses one of them."""
    bias = dict.fromkeys(range(model.vocabulary.n_tokens), -math.inf)
    with pytest.raises(RequestError, match="logit_bias leaves no token"):
        model.ours(sampling=Sampling(logit_bias=bias))


def test_samplers_share_a_context_from_many_threads(model: Model) -> None:
    """Each gets its own tokens, whoever else samples from the same logits."""
    kinds = [
        {"sampling": Sampling(seed=i, **HOT), "top_logprobs": i % 3, "constraint": constraint}
        for constraint in (None, GBNF(text="root ::= [0-9]+"), Schema(schema={"type": "string"}))
        for i in range(3)
    ]
    model.llama.reset()
    model.llama.eval(model.prompt)

    def answers(share: Callable[..., Any]) -> list[Any]:
        samplers = [model.sampler(Request(tokens=model.prompt, **kind)) for kind in kinds]
        llama_cpp.llama_get_logits(model.ctx)
        out = list(share(lambda s: [s.sample(model.ctx, -1) for _ in range(20)], samplers))
        for sampler in samplers:
            sampler.close()
        return out

    with ThreadPoolExecutor(4) as pool:
        assert answers(pool.map) == answers(map)


# --- logprobs -------------------------------------------------------------------------------------


def test_logprobs_are_the_model_s_own(model: Model) -> None:
    """Before any sampler: what a bias does to the choice changes nothing."""
    sampling = Sampling(temp=0.0, logit_bias={65: 1000.0})
    model.llama.reset()
    model.llama.eval(model.prompt)
    sampler = model.sampler(Request(tokens=model.prompt, sampling=sampling, top_logprobs=3))
    token, given = sampler.sample(model.ctx, -1)
    sampler.close()
    row = model.llama.scores[len(model.prompt) - 1].astype(np.float64)
    expected = row - np.log(np.exp(row - row.max()).sum()) - row.max()
    best = np.argsort(-expected)[:3]
    assert given is not None and given.token == token == 65
    assert given.logprob == pytest.approx(expected[65], abs=1e-5)
    assert [t for t, _ in given.top] == list(best)
    assert [p for _, p in given.top] == pytest.approx(expected[best], abs=1e-5)


def test_logprobs_of_any_number(model: Model) -> None:
    row = np.array([0.0, 2.0, 2.0, -np.inf], np.float32)
    given = logprob(row, 3, 9)
    assert given.logprob == -math.inf
    assert [t for t, _ in given.top] == [1, 2, 0, 3]  # equals in the order of their numbers
    assert [t for t, _ in logprob(row, 3, 1).top] == [1]
    assert logprob(row, 1, 0).top == []
    assert sum(math.exp(p) for _, p in given.top) == pytest.approx(1)


# --- constraints ----------------------------------------------------------------------------------


def masked_first(model: Model, text: str, n: int = N) -> list[int]:
    """Greedy under a grammar that masks every token, as llama.cpp's chain alone would."""
    lc = llama_cpp
    chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
    grammar = lc.llama_sampler_init_grammar(model.llama._model.vocab, text.encode(), b"root")
    lc.llama_sampler_chain_add(chain, grammar)
    lc.llama_sampler_chain_add(chain, lc.llama_sampler_init_greedy())
    tokens = model.generate(lambda: lc.llama_sampler_sample(chain, model.ctx, -1), n)
    lc.llama_sampler_free(chain)
    return tokens


@pytest.mark.parametrize(
    "text",
    [
        "root ::= [0-9]+",
        'root ::= "yes" | "no"',
        "root ::= .*",
        llama_cpp.llama_grammar.JSON_GBNF,
        'root ::= "é" [à-ü]+ "漢字"',
    ],
)
def test_checking_one_token_chooses_what_masking_all_does(text: str, model: Model) -> None:
    greedy = Sampling(temp=0.0)
    assert model.ours(sampling=greedy, constraint=GBNF(text=text)) == masked_first(model, text)


def test_a_refusal_draws_once_more(model: Model) -> None:
    """As in llama.cpp's tools: the chain chooses, one token is checked, the chain chooses again."""
    lc, n = llama_cpp, model.vocabulary.n_tokens
    sampling = Sampling(seed=3, repeat_penalty=1.2, **HOT)
    chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
    for sampler in by_hand(model, sampling):
        lc.llama_sampler_chain_add(chain, sampler)
    grammar = lc.llama_sampler_init_grammar(model.llama._model.vocab, b"root ::= [A-Z]+", b"root")
    for token in model.prompt:
        lc.llama_sampler_accept(chain, token)

    def array(tokens: Sequence[int], logits: Sequence[float]) -> Any:
        data = (lc.llama_token_data * len(tokens))(
            *(lc.llama_token_data(t, x, 0.0) for t, x in zip(tokens, logits, strict=True))
        )
        return lc.llama_token_data_array(data, len(data), -1, False)

    def choose() -> int:
        logits = lc.llama_get_logits_ith(model.ctx, -1)[:n]
        every = array(range(n), logits)
        lc.llama_sampler_apply(chain, every)
        token = every.data[every.selected].id
        one = array([token], [1.0])
        lc.llama_sampler_apply(grammar, one)
        if one.data[0].logit == -math.inf:
            every = array(range(n), logits)
            lc.llama_sampler_apply(grammar, every)
            lc.llama_sampler_apply(chain, every)
            token = every.data[every.selected].id
        lc.llama_sampler_accept(grammar, token)
        lc.llama_sampler_accept(chain, token)
        return int(token)

    expected = model.generate(choose)
    lc.llama_sampler_free(chain)
    lc.llama_sampler_free(grammar)
    asked = {"sampling": sampling, "constraint": GBNF(text="root ::= [A-Z]+")}
    assert model.ours(**asked) == expected


def test_a_grammar_masks_only_on_refusal(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    original = constraints.Grammar.mask
    monkeypatch.setattr(
        constraints.Grammar, "mask", lambda self, every: (masks.append(1), original(self, every))
    )
    tokens = model.ours(sampling=Sampling(temp=0.0), constraint=GBNF(text="root ::= .*"))
    assert len(tokens) == N and not masks
    model.ours(sampling=Sampling(temp=0.0), constraint=GBNF(text='root ::= "zq"'))
    assert masks


def test_a_grammar_that_is_complete_ends_the_answer(model: Model) -> None:
    for ignored in (False, True):  # nothing but the end is allowed
        tokens = model.ours(constraint=GBNF(text='root ::= "ab"'), ignore_eos=ignored)
        assert model.vocabulary.ends(tokens[-1])
        assert model.vocabulary.text(tokens[:-1]) == b"ab"


def test_an_ignored_end_does_not_come_while_there_is_more(model: Model) -> None:
    bias = dict.fromkeys(model.vocabulary.ending_tokens, 1000.0)
    asked = {"constraint": GBNF(text="root ::= [a-z]*"), "sampling": Sampling(logit_bias=bias)}
    assert len(model.ours(**asked)) == 1
    assert len(model.ours(**asked, ignore_eos=True)) == N


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("root ::= (", "expected|ends"),
        ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested"),
        ("root ::= " + '"a"? ' * 3000, "too many ways"),
        ('root ::= "a" [^\\U00000000-\\UFFFFFFFF]', "allows no token"),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_grammar_that_would_not_end_well_is_refused(
    text: str, says: str, lazy: bool, model: Model
) -> None:
    grammar = GBNF(text=text, lazy=lazy, trigger_patterns=[r"[\s\S]"])
    with pytest.raises(RequestError, match=f"the grammar cannot be used: .*({says})"):
        model.ours(constraint=grammar, sampling=Sampling(logit_bias={ord("a"): 1000.0}))


# --- lazy grammars --------------------------------------------------------------------------------


def forced(model: Model, texts: Sequence[bytes | int], grammar: GBNF) -> constraints.Constraint:
    """A constraint behind these tokens, each of which it must allow."""
    held = model.constraints.make(grammar)
    for text in texts:
        tokens = [text] if isinstance(text, int) else model.llama.tokenize(text, add_bos=False)
        for token in tokens:
            assert held.allows(token)
            held.accept(token)
    return held


def allowed(model: Model, held: constraints.Constraint) -> set[int]:
    return {t for t in range(model.vocabulary.n_tokens) if held.allows(t)}


CALL = 'root ::= "{" [0-9]+ "}"'


def test_a_lazy_grammar_waits_for_its_pattern(model: Model) -> None:
    grammar = GBNF(text=CALL, lazy=True, trigger_patterns=[r"call: (\{)"])
    held = forced(model, [b"so I ca"], grammar)
    assert len(allowed(model, held)) == model.vocabulary.n_tokens
    held = forced(model, [b"so I call: {"], grammar)
    assert {chr(t) for t in allowed(model, held)} == set("0123456789")
    held = forced(model, [b"so I call: {12}"], grammar)
    assert allowed(model, held) == set(model.vocabulary.ending_tokens)


def test_a_lazy_grammar_begins_inside_a_token(model: Model) -> None:
    """The token's other half is not held against it."""
    the = model.llama.tokenize(b" the", add_bos=False)
    assert len(the) == 1
    grammar = GBNF(text='root ::= "he" [0-9]', lazy=True, trigger_patterns=["he"])
    held = forced(model, [*the], grammar)
    assert {chr(t) for t in allowed(model, held)} == set("0123456789")


@pytest.mark.parametrize(
    ("text", "pattern", "grammar"),
    [
        (b"so I call: {12}", r"call: (\{)", CALL),
        (b"so I call: {12", r"(x)?call: (y)?(\{)", CALL),
        (b"so {1", r"^[\s\S]*(\{)$", CALL),
        (b"all of the", "he", 'root ::= "he" [0-9]'),
        (b"all of the expert", "(?=he)", "root ::= [a-z ]+"),
        ("aé".encode(), "\u00e9", "root ::= [à-ü]+"),
    ],
)
def test_a_lazy_grammar_is_llama_cpp_s(
    text: bytes, pattern: str, grammar: str, model: Model
) -> None:
    """After every token the same may come next."""
    patterns = (ctypes.c_char_p * 1)(pattern.encode())
    stock = llama_cpp.llama_sampler_init_grammar_lazy_patterns(
        model.llama._model.vocab, grammar.encode(), b"root", patterns, 1, None, 0
    )
    ours = model.constraints.make(GBNF(text=grammar, lazy=True, trigger_patterns=[pattern]))
    every = Candidates(model.vocabulary.n_tokens)
    held = 0
    for token in model.llama.tokenize(text, add_bos=False):
        llama_cpp.llama_sampler_accept(stock, token)
        ours.accept(token)
        every.fill(np.zeros(model.vocabulary.n_tokens, np.float32))
        every.apply(stock)
        expected = set(np.flatnonzero(np.isfinite(every.logits)))
        assert allowed(model, ours) == expected
        held += len(expected) < model.vocabulary.n_tokens
    assert held
    ours.close()
    llama_cpp.llama_sampler_free(stock)


def test_a_lazy_grammar_begins_at_a_token(model: Model) -> None:
    end = model.llama.tokenize(b"<|im_start|>", special=True, add_bos=False)[0]
    text = 'root ::= "<|im_start|>" [a-c]'
    held = forced(model, [b"x", end], GBNF(text=text, lazy=True, trigger_tokens=[end]))
    assert {chr(t) for t in allowed(model, held)} == set("abc")


def test_a_trigger_that_its_grammar_does_not_take_is_an_error(model: Model) -> None:
    """It ended the process."""
    with pytest.raises(RequestError, match="does not take the text that triggers it"):
        forced(model, [b"xyz"], GBNF(text=CALL, lazy=True, trigger_patterns=["y"]))


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "\ud800", "(" * 5000 + ")" * 5000])
def test_a_trigger_that_is_no_pattern_is_refused(pattern: str, model: Model) -> None:
    """It ended the process."""
    with pytest.raises(RequestError, match="no regular expression"):
        model.constraints.make(GBNF(text=CALL, lazy=True, trigger_patterns=[pattern]))


# --- schemas --------------------------------------------------------------------------------------

OBJECT = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "maximum": 99, "minimum": 0},
        "s": {"enum": ["a", "b"]},
    },
    "required": ["n", "s"],
    "additionalProperties": False,
}


@pytest.fixture(params=["llguidance", "a grammar"])
def judge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of those who judge schemas."""
    if request.param == "a grammar":
        monkeypatch.setattr(constraints, "llguidance", None)
    assert request.param.split()[-1] in constraints.judge_of_schemas()
    return str(request.param)


def test_an_answer_satisfies_its_schema(judge: str, model: Model) -> None:
    for seed in range(2):
        sampling = Sampling(seed=seed, **HOT)
        tokens = model.ours(100, sampling=sampling, constraint=Schema(schema=OBJECT))
        assert model.vocabulary.ends(tokens[-1])
        answer = json.loads(model.vocabulary.text(tokens[:-1]))
        assert isinstance(answer["n"], int) and answer["s"] in ("a", "b") and len(answer) == 2


def test_a_true_schema_is_any_object(judge: str, model: Model) -> None:
    closing = {ord("}"): 5.0, ord('"'): 4.0, ord(":"): 4.0}
    asked = {"sampling": Sampling(logit_bias=closing, seed=1), "constraint": Schema(schema=True)}
    tokens = model.ours(200, **asked)
    assert isinstance(json.loads(model.vocabulary.text(tokens[:-1])), dict)


def test_a_schema_counts_further_than_a_grammar(model: Model, monkeypatch: Any) -> None:
    schema = {"type": "string", "minLength": 2, "maxLength": 16_000}
    asked = {"sampling": Sampling(temp=0.0), "constraint": Schema(schema=schema)}
    assert model.text(**asked).startswith('"')
    monkeypatch.setattr(constraints, "llguidance", None)
    with pytest.raises(RequestError, match="maxLength 16000 of the schema is further than"):
        model.text(**asked)


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_schema_that_cannot_be_used_is_refused(judge: str, model: Model) -> None:
    """Within seconds, and without the process."""
    bad: list[Any] = [
        {"type": "sting"},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.com/schema.json"},
        nested(5000),
        {"$ref": "#"},
        {"enum": ["v" * 100 + str(i) for i in range(3000)], "type": "\ud800"},
        {"x": object()},
    ]
    for schema in bad:
        with pytest.raises(RequestError):
            model.ours(3, constraint=Schema(schema=schema))
    assert model.ours(3, constraint=Schema(schema=OBJECT))
