"""From raw conversations to rows of the store."""
