"""Types that route every layer by its hidden states alone."""
