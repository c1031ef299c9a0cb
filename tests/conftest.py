"""Shapes in the signatures of the mathematics are enforced, and nothing is remembered outside the tests."""

import pytest
from jaxtyping import install_import_hook

install_import_hook("nearkin.functional", "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """Downloads and what is known of image files; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEARKIN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
