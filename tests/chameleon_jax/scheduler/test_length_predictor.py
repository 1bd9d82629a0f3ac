"""Predictions against quantiles counted one by one, and the error rates of the experiments' predictor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.length_predictor import (
    CLASS_CUTS,
    ConfusionPredictor,
    HistoryPredictor,
    OraclePredictor,
)
from tests.properties import examples

DECAY = 0.97


def request(output: int = 0, adapter: str | None = None, max_tokens: int = 10**6) -> Request:
    made = Request("r", [1], SamplingParams(max_tokens=max_tokens), arrival_time=0.0, seed=0, adapter=adapter)
    made.output_token_ids = [0] * output
    return made


def observe(predictor: HistoryPredictor, outputs: list[int], adapter: str | None = None) -> None:
    for output in outputs:
        predictor.observe(request(output, adapter))


def weighted_quantile(outputs: list[int], share: float) -> int:
    """Least length so that `share` of the weight lies at or below it; the newest weighs 1."""
    weights = [DECAY**age for age in range(len(outputs))][::-1]
    below = 0.0
    for output, weight in sorted(zip(outputs, weights)):
        below += weight
        if below >= share * sum(weights) - 1e-9:
            return output
    raise AssertionError


@examples(150)
@given(
    outputs=st.lists(st.one_of(st.integers(1, 20), st.integers(1, 3000)), min_size=1, max_size=120),
    share=st.sampled_from([0.1, 0.5, 0.6, 0.9, 0.99]),
)
def test_history_is_a_decayed_quantile_within_a_bin(outputs, share):
    predictor = HistoryPredictor(prior=7, share=share)
    observe(predictor, outputs)
    predicted, truth = predictor.predict(request()), weighted_quantile(outputs, share)
    assert truth <= predicted <= truth * 1.25 + 1  # bins are a quarter of a doubling wide at most; it is their upper edge


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_prior_holds_until_something_was_seen(share):
    predictor = HistoryPredictor(prior=77, share=share)
    assert predictor.predict(request(adapter="a")) == 77
    predictor.observe(request(20))
    assert predictor.predict(request(adapter="a")) == pytest.approx(20, abs=4)


def test_adapters_with_few_observations_fall_back_to_all():
    predictor = HistoryPredictor(prior=7)
    observe(predictor, [400] * 60, "long")
    observe(predictor, [10] * 4, "short")
    assert predictor.predict(request(adapter="short")) >= 400  # 4 observations weigh 3.8 by now
    assert predictor.predict(request(adapter="new")) >= 400
    predictor.observe(request(10, "short"))
    assert predictor.predict(request(adapter="short")) in (10, 11, 12)
    assert predictor.predict(request(adapter="long")) >= 400


def test_the_base_model_has_a_history_of_its_own():
    predictor = HistoryPredictor(prior=7)
    observe(predictor, [10] * 20, None)
    observe(predictor, [900] * 200, "long")
    assert predictor.predict(request()) in (10, 11, 12)


def test_a_shift_is_followed():
    predictor = HistoryPredictor(prior=7, share=0.5)
    observe(predictor, [1000] * 500)
    assert predictor.predict(request()) >= 1000
    observe(predictor, [10] * 22)
    assert predictor.predict(request()) >= 1000  # 0.97 ** 22 = 0.51
    observe(predictor, [10])
    assert predictor.predict(request()) in (10, 11, 12)


@examples(60)
@given(outputs=st.lists(st.integers(0, 3000), max_size=30), max_tokens=st.integers(1, 3000))
def test_predictions_lie_between_1_and_max_tokens(outputs, max_tokens):
    history = HistoryPredictor(prior=500)
    observe(history, outputs)
    confused = ConfusionPredictor(lambda r: 700, 0.5)
    for predictor in (history, confused):
        assert 1 <= predictor.predict(request(max_tokens=max_tokens)) <= max_tokens
        assert predictor.updates() == []


def test_the_oracle_says_the_truth():
    predictor = OraclePredictor(lambda r: 100 + len(r.output_token_ids))
    predictor.observe(request(999))
    assert predictor.predict(request(23)) == 123
    assert predictor.updates() == []


CLASSES = {70: 0, 270: 1, 640: 2}


@pytest.mark.parametrize("accuracy", [0.0, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("truth,label", [(1, 0), (141, 0), (142, 1), (503, 1), (504, 2), (2000, 2)])
def test_the_confusion_predictor_is_as_accurate_as_asked_and_errs_to_classes_beside(accuracy, truth, label):
    assert CLASS_CUTS == (141, 503)
    predictor = ConfusionPredictor(lambda r: truth, accuracy, seed=3)
    labels = [CLASSES[predictor.predict(request())] for _ in range(2000)]
    assert labels.count(label) / 2000 == pytest.approx(accuracy, abs=0.04)
    assert all(abs(seen - label) <= 1 for seen in labels)
    if label == 1 and accuracy < 1:
        assert labels.count(0) / labels.count(2) == pytest.approx(1, abs=0.25)


def test_the_confusion_predictor_repeats_itself_and_takes_other_classes():
    def predictions(seed: int) -> list[int]:
        predictor = ConfusionPredictor(lambda r: 25, 0.5, cuts=(10, 20, 30), typical=(5, 15, 25, 35), seed=seed)
        return [predictor.predict(request()) for _ in range(50)]

    assert predictions(1) == predictions(1) != predictions(2)
    assert set(predictions(1)) == {15, 25, 35}


@pytest.mark.parametrize(
    "options,error",
    [
        ({"accuracy": 1.1}, r"accuracy is 1.1; allowed: 0 to 1"),
        ({"accuracy": -0.1}, r"accuracy is -0.1; allowed: 0 to 1"),
        ({"accuracy": 0.8, "typical": (1, 2)}, r"typical has 2 lengths; allowed: 3, one a class"),
    ],
)
def test_the_confusion_predictor_names_invalid_options(options, error):
    with pytest.raises(ValueError, match=error):
        ConfusionPredictor(lambda r: 1, **options)
