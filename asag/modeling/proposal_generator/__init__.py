"""Proposal generators: sources of the queries."""

from .asag import AdaptiveSparseAnchors
from .dense import DenseProposals
from .dynamic import DynamicProposals
from .learned import LearnedProposals
from .object_queries import ObjectQueries

__all__ = [
    "AdaptiveSparseAnchors",
    "DenseProposals",
    "DynamicProposals",
    "LearnedProposals",
    "ObjectQueries",
]
