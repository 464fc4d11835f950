"""What a rule author writes: patterns, values, actions, rules and rule sets. Data, no graph."""
