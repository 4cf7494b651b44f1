"""Looking at data: lint, mixtures, previews. Nothing imports from here but the tools."""
