"""What corresponds to what: arguments of a run and config.json, names and shapes of the weights."""
