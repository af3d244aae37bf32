"""Types that carry a state from layer to layer."""
