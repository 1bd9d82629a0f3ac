"""What callers get of a request."""

from __future__ import annotations

import json

from chameleon_jax.outputs import LEAST_LOGPROB, Logprob
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.updates import logprobs_of


def test_log_probabilities_are_numbers():
    """Also those of tokens that cannot come, and of a model whose numbers overflow: JSON has no others."""
    request = Request("r", [1], SamplingParams(logprobs=2), 0.0, 0)
    request.logprobs = [{1: -0.5, 2: float("-inf"), 3: float("nan")}]
    (position,) = logprobs_of(request, 0, 1, None)
    assert position == {1: Logprob(-0.5), 2: Logprob(LEAST_LOGPROB), 3: Logprob(LEAST_LOGPROB)}
    json.dumps([p.logprob for p in position.values()], allow_nan=False)
