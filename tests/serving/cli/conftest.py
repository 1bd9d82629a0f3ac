from __future__ import annotations

import pytest

from tests import reference_models as reference


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("model"), "tied")
