"""The shapes in the signatures of the mathematics are enforced while tests run."""

from jaxtyping import install_import_hook

install_import_hook("nearkin.functional", "beartype.beartype")
