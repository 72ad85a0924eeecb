"""Results of many runs: collect, group, compare and report them, and compare them with the papers' tables."""
