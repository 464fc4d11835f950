"""Match, check, decide, edit, report: names no operation, no tracer and no target."""
