"""Proposal generators: where queries come from."""

from .asag import AdaptiveSparseAnchors
from .dynamic import DynamicProposals
from .learned import LearnedProposals
from .object_queries import ObjectQueries

__all__ = ["AdaptiveSparseAnchors", "DynamicProposals", "LearnedProposals", "ObjectQueries"]
