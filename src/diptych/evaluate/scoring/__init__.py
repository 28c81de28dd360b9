"""From pictures to numbers: scorers, metrics with intervals, and how far the judges can be trusted."""
