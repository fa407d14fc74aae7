"""All knowledge of model families: one row each, with its tensors and the space of each of their axes.

To add a family, write its row; scoring, cutting, counting and training read this table and nothing else
(docs/families.md).
"""

from secateur.model.families.dense import LLAMA
from secateur.model.families.family import SPACE_OF, Axis, Family, Granularity, Site, Tensors, switched_on
from secateur.model.families.table import FAMILIES, family_of, plugin_families

__all__ = [
    "FAMILIES",
    "LLAMA",
    "SPACE_OF",
    "Axis",
    "Family",
    "Granularity",
    "Site",
    "Tensors",
    "family_of",
    "plugin_families",
    "switched_on",
]
