"""Conversations as others write them, and mixtures of them."""
