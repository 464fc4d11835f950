"""Why something was or was not rewritten, what no rule saw, and where each tensor went."""
