"""What is refused, tried and told before the first iteration, in the launcher's one process and on every rank."""
