"""What the benchmarks time: the work, our side of it and the other, and how both alternate."""
