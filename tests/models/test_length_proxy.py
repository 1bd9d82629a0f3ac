from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.models import length_proxy
from chameleon_jax.models.length_proxy import LengthProxyConfig
from chameleon_jax.serving.telemetry.compilations import Compilations

CONFIG = LengthProxyConfig(
    window=32, vocab_buckets=256, hidden_size=32, num_heads=2, num_layers=1, epochs=12, learning_rate=3e-3
)


def task(count: int, marked: bool) -> tuple[list[list[int]], list[int]]:
    """Make prompts with output lengths. A token 1, 2 or 3 somewhere in a marked prompt gives the class of its length."""
    rng = np.random.default_rng(0)
    prompts, output_lens = [], []
    for _ in range(count):
        label = int(rng.integers(3))
        prompt = rng.integers(10, 200, int(rng.integers(4, 30))).tolist()
        if marked:
            prompt[int(rng.integers(len(prompt)))] = label + 1
        prompts.append(prompt)
        output_lens.append(int(rng.integers((1, 142, 504)[label], (142, 504, 900)[label])))
    return prompts, output_lens


@pytest.fixture(scope="module")
def proxy():
    return length_proxy.train(*task(400, marked=True), CONFIG)


def test_a_marker_token_is_learned(proxy):
    assert proxy.confusion.shape == (3, 3) and abs(proxy.confusion.sum() - 80) <= 2
    assert proxy.accuracy > 0.9


def test_labels_without_a_cause_are_not_learned():
    proxy = length_proxy.train(*task(400, marked=False), CONFIG)
    assert 0.33 - 0.16 < proxy.accuracy < 0.33 + 0.16  # three standard deviations of 80 guesses


def test_a_class_predicts_its_mean_length_or_the_length_in_the_config(proxy):
    prompts, output_lens = task(400, marked=True)
    for c, predicted in enumerate(proxy.class_lens):
        mean = np.mean([n for n in output_lens if CONFIG.classes_of([n]) == c])
        assert abs(predicted - mean) < 0.1 * mean
    classes = proxy.classify(prompts[:20])
    np.testing.assert_array_equal(proxy.predict_lens(prompts[:20]), proxy.class_lens[classes])
    config = dataclasses.replace(CONFIG, class_lens=(1, 2, 3), epochs=1)
    assert length_proxy.train(prompts[:60], output_lens[:60], config).class_lens.tolist() == [1, 2, 3]


def test_classes_end_with_their_cut():
    assert LengthProxyConfig().classes_of([1, 141, 142, 503, 504]).tolist() == [0, 0, 1, 1, 2]


def test_long_prompts_are_read_at_both_ends(proxy):
    start, end = ([marker, *[50] * 300] for marker in (1, 3)), ([*[50] * 300, marker] for marker in (1, 3))
    middle = [[*[50] * 150, marker, *[50] * 150] for marker in (1, 3)]
    logits = _logits(proxy, [*start, *end, *middle])
    assert np.abs(logits[0] - logits[1]).max() > 0.01 and np.abs(logits[2] - logits[3]).max() > 0.01
    np.testing.assert_array_equal(logits[4], logits[5])


def test_a_prompt_has_the_same_class_alone_and_in_a_batch(proxy):
    prompts, _ = task(40, marked=True)
    np.testing.assert_array_equal(proxy.classify(prompts), [proxy.classify([p])[0] for p in prompts])
    prompts = [p for p in prompts if len(p) <= 8]
    padded, tight = _logits(proxy, [*prompts, []], 32), _logits(proxy, prompts, 8)
    np.testing.assert_allclose(padded[:-1], tight, rtol=1e-4, atol=1e-4)
    assert len(prompts) > 3 and np.isfinite(padded).all()
    assert proxy.classify([]).shape == (0,)


def test_the_same_seed_trains_the_same_proxy():
    prompts, output_lens = task(60, marked=True)
    config = dataclasses.replace(CONFIG, epochs=1)
    first, second, other = (
        length_proxy.train(prompts[:60], output_lens[:60], dataclasses.replace(config, seed=s)) for s in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert not np.array_equal(first.params["head"]["kernel"], other.params["head"]["kernel"])


def test_nothing_is_compiled_after_warm_up(proxy):
    proxy.warm_up()
    compilations = Compilations()
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 8, 9, 33):
        proxy.predict_lens([rng.integers(0, 50_000, int(rng.integers(1, 90))).tolist() for _ in range(count)])
    assert compilations.at_start == 0
    jax.jit(lambda x: x + count)(np.zeros(3))
    assert compilations.at_start == 1  # the counter hears
    compilations.close()


@pytest.mark.parametrize(
    "field,value",
    [
        ("class_cuts", ()),
        ("class_cuts", (5, 5)),
        ("class_lens", (1, 2)),
        ("window", 9),
        ("hidden_size", 33),
        ("epochs", 0),
        ("token_dropout", 1.0),
        ("held_out", 0.0),
        ("learning_rate", 0),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    "prompts,output_lens,message",
    [
        ([[1]], [3, 4], "output_lens has 2 entries; needed: one for each of 1 prompts"),
        ([[1], []], [3, 4], "prompts\\[1\\] has 0 tokens"),
        ([[1], [2]], [3, 0], "output_lens\\[1\\] has 0 tokens"),
        ([[1]] * 5, [3, 3, 200, 200, 600], "output_lens has 1 in class 2"),
        ([], [], "output_lens has 0 in class 0"),
    ],
)
def test_bad_examples_are_named(prompts, output_lens, message):
    with pytest.raises(ValueError, match=message):
        length_proxy.train(prompts, output_lens, CONFIG)


def _logits(proxy, prompts, length=CONFIG.window) -> np.ndarray:
    inputs = length_proxy._encode(prompts, proxy.config, len(prompts), length)
    return np.asarray(jax.jit(lambda params, *inputs: nnx.merge(proxy._graph, params)(*inputs))(proxy.params, *inputs))
