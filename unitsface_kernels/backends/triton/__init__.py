def unavailable(d, t): return "not built"
