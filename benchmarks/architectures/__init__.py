"""About a hundred and fifty small models with random weights, by name: what pruning has to get right.

Hand-written ones need torch alone; those whose names begin with `hf-` need the transformers library.
"""

from architectures.dense import DENSE
from architectures.language import LANGUAGE
from architectures.library_language import LIBRARY_LANGUAGE
from architectures.library_vision import LIBRARY_VISION
from architectures.mobile import MOBILE
from architectures.recommenders import RECOMMENDERS
from architectures.registry import Architecture
from architectures.residual import RESIDUAL
from architectures.sequences import SEQUENCES
from architectures.vision_transformers import VISION_TRANSFORMERS

__all__ = ["ARCHITECTURES", "Architecture"]

ARCHITECTURES: dict[str, Architecture] = {
    **RESIDUAL,
    **MOBILE,
    **DENSE,
    **VISION_TRANSFORMERS,
    **LIBRARY_VISION,
    **SEQUENCES,
    **LANGUAGE,
    **LIBRARY_LANGUAGE,
    **RECOMMENDERS,
}
"""Every architecture, in the order of the tables."""
