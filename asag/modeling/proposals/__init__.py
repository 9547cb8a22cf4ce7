"""Proposal generators: where queries come from."""

from .dynamic import DynamicProposals
from .learned import LearnedProposals

__all__ = ["DynamicProposals", "LearnedProposals"]
