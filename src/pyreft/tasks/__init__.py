"""The four suites of the ReFT paper: commonsense and arithmetic reasoning, instruction following, and GLUE."""
