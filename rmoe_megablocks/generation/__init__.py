"""Text from a Hugging Face folder, and which experts its tokens took: ``rmoe generate``."""
