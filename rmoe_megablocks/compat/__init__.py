"""Everything that reaches into an upstream's insides, one file or folder an upstream."""
