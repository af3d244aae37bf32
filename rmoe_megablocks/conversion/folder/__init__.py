"""A Hugging Face folder: its weights in shards, its tokenizer, its model card, its checksums."""
