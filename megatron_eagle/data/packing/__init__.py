"""Which samples share a pack, and which packs share a step."""
