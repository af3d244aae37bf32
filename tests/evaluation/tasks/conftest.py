"""Skipped, with the reason, where one of the extra's packages is not installed."""

from tests.extras import skipped_without

pytest_pycollect_makemodule = skipped_without("eval", "transformers", "lm_eval", "accelerate", "datasets")
