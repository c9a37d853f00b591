"""The compacted KV cache: scores, choices and evictions under one policy and one budget."""
