"""What a router does: measures of recorded routing."""
