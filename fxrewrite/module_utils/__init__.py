"""Modules of torch without graphs: names, copies, hooks, state, runs that leave nothing behind."""
