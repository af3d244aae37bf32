"""What the benchmarks measure with: clocks, quantiles and intervals, bytes saved for the backward pass."""
