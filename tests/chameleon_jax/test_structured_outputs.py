"""Grammars and their masks: whatever is asked for, it is refused with a reason, or its masks can be filled."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.errors import InvalidGrammar
from chameleon_jax.sampling_params import StructuredOutputsParams
from chameleon_jax.structured_outputs import Grammars, Guide, Vocabulary, fill_masks
from tests.properties import examples
from tests.text_models import VARIANTS

VOCAB, EOS = 512, 2
TOKENIZER = VARIANTS["llama2"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
KEYWORDS = st.sampled_from(
    ["type", "properties", "items", "enum", "const", "anyOf", "allOf", "oneOf", "not", "$ref", "pattern", "minimum", "required"]
)
SCHEMAS = st.dictionaries(KEYWORDS | st.text(max_size=6), JSON | st.sampled_from(["object", "string", "integer"]), max_size=5)
NOTATION = st.text(alphabet="abc()[]{}|*+?.\\^$-,09 \n:/\"'%@&<>é", max_size=30)


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    tokens = [tokenizer.token_bytes.inside(i) for i in range(VOCAB)]
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return Vocabulary(tokens, sorted(tokenizer.token_bytes.special_ids), encode)


@functools.cache
def grammars() -> Grammars:
    return Grammars(vocabulary(TOKENIZER), [EOS])


def allowed(guide: Guide, vocab: int = VOCAB) -> list[int]:
    masks = np.full((3, -(-vocab // 32)), -1, np.int32)
    fill_masks([(1, guide)], masks)
    assert (masks[[0, 2]] == -1).all()
    return np.flatnonzero(np.unpackbits(masks[1].view(np.uint8), bitorder="little")).tolist()


def write(guide: Guide, draw) -> list[int] | None:
    """Follow a guide for a while; None where it could not go on."""
    tokens: list[int] = []
    while len(tokens) < 30 and not guide.complete:
        ids = allowed(guide)
        if guide.error:
            return None
        assert ids
        token = draw(ids)
        if token == EOS:
            break
        guide.accept(token)
        tokens.append(token)
        assert not guide.error
    return tokens


@examples(300)
@given(
    language=st.one_of(
        st.fixed_dictionaries({"json": SCHEMAS | JSON | NOTATION}),
        st.fixed_dictionaries({"json": SCHEMAS, "whitespace_pattern": NOTATION}),
        st.fixed_dictionaries({"regex": NOTATION}),
        st.fixed_dictionaries({"choice": st.lists(st.text(max_size=6) | NOTATION, max_size=4)}),
        st.fixed_dictionaries({"grammar": NOTATION.map(lambda text: f"start: {text}") | NOTATION}),
    ),
    data=st.data(),
)
def test_any_language_is_refused_with_a_reason_or_followed(language, data):
    try:
        guide = grammars().guide(StructuredOutputsParams(**language))
    except InvalidGrammar as error:
        assert error.reason and len(str(error)) < 1200
        return
    tokens = write(guide, lambda ids: data.draw(st.sampled_from(ids)))
    if tokens is not None and "choice" in language and EOS in allowed(guide):
        assert TOKENIZER.decode(tokens) in [text.removeprefix(" ") for text in language["choice"]]


@pytest.mark.parametrize("seed", range(20))
def test_json_that_ends_satisfies_its_schema(seed):
    rng = np.random.default_rng(seed)
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 5, None]}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
    closed = schema | {"additionalProperties": False}
    guide = grammars().guide(StructuredOutputsParams(json=closed, whitespace_pattern="[ ]?"))
    tokens = write(guide, lambda ids: int(rng.choice(ids)))
    assert tokens is not None
    value = json.loads(TOKENIZER.decode(tokens))
    assert value["a"] in ("x", 5, None) and isinstance(value["b"], bool) and len(value) == 2


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Draw a JSON schema of the usual keywords, nested up to three times."""
    nested = ["object", "array", "anyOf"] * 2 if depth < 3 else []
    kind = rng.choice(["string", "integer", "number", "boolean", "null", "enum", "const", *nested])
    if kind == "string":
        least = rng.randrange(4)
        lengths = {"minLength": least, "maxLength": least + rng.randrange(6)}
        pattern = {"pattern": rng.choice(["^[a-c]{2,5}$", "^\\d+-[xyz]$", "^(a|bc)*$"])}
        return {"type": kind} | rng.choice([{}, lengths, pattern, {"format": rng.choice(["date", "uuid", "ipv4"])}])
    if kind in ("integer", "number"):
        least = rng.randrange(-50, 50)
        bounds = [{}, {"minimum": least}, {"maximum": least}, {"minimum": least, "maximum": least + rng.randrange(100)}]
        return {"type": kind} | rng.choice([*bounds, {"type": "integer", "multipleOf": rng.choice([2, 5, 10])}])
    if kind == "enum":
        return {"enum": rng.sample(["a", "b", 1, 2.5, None, True, {"x": 1}, [1, 2]], rng.randrange(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["a", 7, None, [1], {"k": "v"}])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
    if kind == "array":
        least = rng.randrange(3)
        items = {"items": random_schema(rng, depth + 1), "minItems": least, "maxItems": least + rng.randrange(3)}
        pair = {"prefixItems": [random_schema(rng, depth + 1) for _ in range(2)], "items": False}
        return {"type": kind} | rng.choice([items, items, pair])
    if kind == "object":
        names = rng.sample(["a", "b", "name", "ü", "x y"], rng.randrange(4))
        required = rng.sample(names, rng.randrange(len(names) + 1))
        closed = rng.choice([{}, {"additionalProperties": False}])
        return {"type": kind, "properties": {n: random_schema(rng, depth + 1) for n in names}, "required": required} | closed
    return {"type": kind}


def test_answers_to_a_thousand_random_schemas_end_and_satisfy_them():
    closing = {i for i in range(VOCAB) if TOKENIZER.token_bytes.inside(i) in (b'"', b"}", b"]")}
    for seed in range(1000):
        rng = random.Random(seed)
        schema = random_schema(rng)
        guide, tokens = grammars().guide(StructuredOutputsParams(json=schema, whitespace_pattern="[ ]?")), []
        while not guide.complete and len(tokens) < 600:
            ids = allowed(guide)
            soon = [i for i in ids if i in closing or i == EOS]  # to end most texts early
            token = rng.choice(soon if soon and rng.random() < 0.35 else ids)
            if token == EOS:
                break
            guide.accept(token)
            tokens.append(token)
        value = json.loads(TOKENIZER.decode(tokens), parse_float=lambda text: max(-1e300, min(float(text), 1e300)))
        validator = jsonschema_rs.validator_for(schema, validate_formats=True)
        assert len(tokens) < 600 and not guide.error and validator.is_valid(value), (seed, schema, value)


def test_a_grammar_with_ever_more_readings_ends_soon():
    guide = grammars().guide(StructuredOutputsParams(grammar='start: a\na: "x" a | a "x" | a a | "x"'))
    tokens = 0
    while not guide.error and tokens < 300:
        ids = [i for i in allowed(guide) if i != EOS]
        if ids:
            guide.accept(ids[0])
            tokens += 1
    assert "max is 500" in guide.error and 10 < tokens < 200


def test_guides_of_one_grammar_do_not_share_their_place():
    params = StructuredOutputsParams(regex="ab")
    first, second = grammars().guide(params), grammars().guide(params)
    before = allowed(second)
    first.accept(before[0])
    assert allowed(second) == before != allowed(first)


def test_a_token_that_is_not_allowed_leaves_an_error():
    guide = grammars().guide(StructuredOutputsParams(regex="[0-9]+"))
    assert guide.error is None
    guide.accept(TOKENIZER.backend.token_to_id("a"))
    assert guide.error and "\n" not in guide.error and not guide.complete


@pytest.mark.parametrize("eos", [[], [VOCAB]])
def test_a_vocabulary_without_an_end_is_refused(eos):
    with pytest.raises(InvalidGrammar, match="structured_outputs: the model"):
        Grammars(vocabulary(TOKENIZER), eos)


def test_a_vocabulary_that_ends_inside_a_word_of_the_mask():
    tokens = vocabulary(TOKENIZER).tokens[:330]
    guide = Grammars(Vocabulary(tokens, [0, 1, EOS], list), [EOS]).guide(StructuredOutputsParams(regex="(.|\n)*"))
    assert max(allowed(guide, 330)) == 329


def test_special_tokens_are_never_allowed():
    guide = grammars().guide(StructuredOutputsParams(regex="(.|\n)*"))
    assert set(allowed(guide)) & TOKENIZER.token_bytes.special_ids == {EOS}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_kind_of_tokenizer_writes_the_same_bytes(variant):
    """A word's space is part of its first token in all of them."""
    tokenizer = VARIANTS[variant]
    guides = Grammars(vocabulary(tokenizer), [EOS])
    for text in ("Paris", "a city is", "é 日", "\n\t", '{"a": 5}'):
        guide = guides.guide(StructuredOutputsParams(choice=[text]))
        rng = np.random.default_rng(0)
        tokens = write(guide, lambda ids, rng=rng: int(rng.choice(ids)))
        assert tokens is not None
        stream = tokenizer.stream(True, tokenizer.encode("The"))
        assert "".join(map(stream.append, tokens)) + stream.flush() == text
