"""Rows of JSONL to tokens, and tokens to padded batches."""
