"""From packs to batches of tensors."""
