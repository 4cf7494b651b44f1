"""Chat template and tokenizer."""
