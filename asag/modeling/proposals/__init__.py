"""Proposal generators: where queries come from."""

from .dynamic import DynamicProposals
from .learned import LearnedProposals
from .object_queries import ObjectQueries

__all__ = ["DynamicProposals", "LearnedProposals", "ObjectQueries"]
