"""Every part of a backend in plain torch, on any torch device.  A vendor may keep any of them."""

from isthmus.reference.attention import PagedCache, ReferenceAttention
from isthmus.reference.backend import REFERENCE_CAPABILITIES, ReferenceBackend
from isthmus.reference.graphs import ReferenceCollectives, ReferenceGraphs
from isthmus.reference.inputs import ReferenceInputs
from isthmus.reference.memory import ReferenceMemory
from isthmus.reference.ops import DenseLinear, ReferenceOps
from isthmus.reference.sampling import ReferenceSampling

__all__ = [
    "REFERENCE_CAPABILITIES",
    "DenseLinear",
    "PagedCache",
    "ReferenceAttention",
    "ReferenceBackend",
    "ReferenceCollectives",
    "ReferenceGraphs",
    "ReferenceInputs",
    "ReferenceMemory",
    "ReferenceOps",
    "ReferenceSampling",
]
