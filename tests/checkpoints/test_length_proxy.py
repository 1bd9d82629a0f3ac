from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from flax import nnx

from chameleon_jax.checkpoints.length_proxy import load, save
from chameleon_jax.models.length_proxy import LengthClassifier, LengthProxy, LengthProxyConfig

CONFIG = LengthProxyConfig(window=32, vocab_buckets=256, hidden_size=32, num_heads=2, num_layers=1, epochs=2)
PROMPTS = [np.random.default_rng(i).integers(0, 256, 4 + i % 20).tolist() for i in range(90)]


@pytest.fixture(scope="module")
def proxy():
    """Proxy with drawn weights, since saving needs no trained ones; its prompts fall in several classes all the same."""
    params = nnx.split(nnx.jit(lambda: LengthClassifier(CONFIG, nnx.Rngs(0)))())[1]
    made = LengthProxy(CONFIG, params, np.array([50, 300, 700]), np.arange(9).reshape(3, 3))
    assert len(set(made.classify(PROMPTS))) > 1
    return made


@pytest.fixture(scope="module")
def saved(proxy, tmp_path_factory):
    directory = tmp_path_factory.mktemp("proxy")
    save(proxy, directory)
    return directory


def test_a_loaded_proxy_is_the_one_that_was_saved(proxy, saved):
    loaded = load(saved)
    np.testing.assert_array_equal(loaded.classify(PROMPTS), proxy.classify(PROMPTS))
    np.testing.assert_array_equal(loaded.predict_lens(PROMPTS), proxy.predict_lens(PROMPTS))
    np.testing.assert_array_equal(loaded.confusion, proxy.confusion)
    assert loaded.config == proxy.config
    save(loaded, saved)  # over an earlier one


@pytest.mark.parametrize(
    "change,message",
    [
        ({"config": {"hidden_size": 48}}, "blocks.0.attention_norm.bias is \\[32\\]; the config says \\[48\\]"),
        ({"config": {"num_layers": 2}}, "has no tensor blocks.1"),
        ({"config": {"window": 7}}, "window is 7; allowed"),
        ({"config": {"depth": 7}}, "depth"),
        ({"class_lens": [1, 2]}, "class_lens or confusion is not of the 3 classes"),
    ],
)
def test_parts_that_do_not_fit_are_named(saved, tmp_path, change, message):
    directory = tmp_path / "proxy"
    shutil.copytree(saved, directory)
    settings = json.loads((directory / "length_proxy.json").read_text())
    settings |= change | {"config": settings["config"] | change.get("config", {})}
    (directory / "length_proxy.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_a_directory_without_a_proxy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a length proxy"):
        load(tmp_path)
