"""One pack over several ranks: who holds which tokens and encodes which tiles, and attention over them."""
