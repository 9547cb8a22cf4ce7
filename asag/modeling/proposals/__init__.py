"""Proposal generators: where queries come from."""

from .learned import LearnedProposals

__all__ = ["LearnedProposals"]
