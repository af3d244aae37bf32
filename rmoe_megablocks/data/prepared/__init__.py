"""A prepared dataset on disk: tokens in Megatron's indexed format, dataset.json, and the masks of prompts."""
