"""``rmoe finetune``: supervised fine-tuning of Hugging Face folders, with TRL."""
