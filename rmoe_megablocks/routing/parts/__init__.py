"""What router types are made of: how weights are drawn, heads, what layers share, recurrences, null experts."""
