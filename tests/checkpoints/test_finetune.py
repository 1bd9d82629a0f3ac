from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tokenizers

from chameleon_jax.checkpoints import finetune as training
from chameleon_jax.checkpoints import peft
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from tests import reference_models as reference

CONFIG = training.FinetuneConfig(
    rank=4, alpha=8.0, targets=("q_proj", "down_proj"), steps=12, batch_size=2, sequence_len=16, learning_rate=2e-2
)
TEXT = "to be or not to be that is the question " * 40


@pytest.fixture(scope="module")
def checkpoint():
    words = {word: i for i, word in enumerate(sorted({*TEXT.split(), "?"}))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return dataclasses.replace(reference.checkpoint(reference.CONFIGS["tied"]), tokenizer=Tokenizer(backend, {}))


@pytest.fixture(scope="module")
def trained(checkpoint):
    """Train an adapter with CONFIG, and keep the loss of each step."""
    losses: list[float] = []
    return training.finetune(checkpoint, TEXT, CONFIG, lambda step, loss: losses.append(loss)), losses


def test_training_lowers_the_loss_and_writes_an_adapter_that_can_be_served(checkpoint, trained, tmp_path):
    adapter, losses = trained
    assert len(losses) == CONFIG.steps and losses[-1] < 0.5 * losses[0]
    training.save(adapter, tmp_path, CONFIG, "base", "float32")
    weights = peft.load(tmp_path, checkpoint.config)
    assert weights.ranks == {"q_proj": 4, "down_proj": 4}
    a, b = adapter[1]["q_proj"]
    np.testing.assert_allclose(weights.tensors[1, "q_proj"][1], np.asarray(b) * 2.0, rtol=1e-6)  # alpha / r
    np.testing.assert_allclose(weights.tensors[1, "q_proj"][0], a, rtol=1e-6)


def test_the_same_seed_trains_the_same_adapter(checkpoint, trained):
    again = training.finetune(checkpoint, TEXT, CONFIG)
    np.testing.assert_array_equal(trained[0][0]["q_proj"][1], again[0]["q_proj"][1])


@pytest.mark.parametrize("field,value", [("rank", 0), ("rank", 513), ("steps", 0), ("targets", ("embed",)), ("targets", ())])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        dataclasses.replace(CONFIG, **{field: value})


def test_a_text_that_is_too_short_is_refused(checkpoint):
    with pytest.raises(ValueError, match="the text has 2 tokens"):
        training.finetune(checkpoint, "to be", CONFIG)
