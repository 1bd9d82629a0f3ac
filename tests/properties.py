"""Numbers of examples for property tests: each test states its own, and the hypothesis profile scales all of them."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

CI_EXAMPLES = 100


def load_profiles() -> None:
    """Register the profiles and load `ci`, or the profile that the variable HYPOTHESIS_PROFILE names.

    `ci` runs the stated number of examples, the same in every run; `dev` a quarter of them; `nightly` ten times as many, with
    fresh seeds. The option `--hypothesis-profile NAME` of pytest overrides both.
    """
    settings.register_profile("ci", max_examples=CI_EXAMPLES, derandomize=True, deadline=None)
    settings.register_profile("dev", max_examples=CI_EXAMPLES // 4, derandomize=True, deadline=None)
    settings.register_profile("nightly", max_examples=10 * CI_EXAMPLES, derandomize=False, deadline=None, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def examples(count: int, **more: Any) -> settings:
    """Return settings of `count` examples, scaled by the profile.

    Args:
        count: Examples under the profile `ci`.
        more: Further settings of hypothesis, such as `stateful_step_count`.
    """
    return settings(max_examples=max(1, count * settings().max_examples // CI_EXAMPLES), **more)
