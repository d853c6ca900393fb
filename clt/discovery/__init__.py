"""From a benchmark to features that steer: capture, classify, analyse, map, steer, explain."""
