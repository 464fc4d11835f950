"""Where a result lands: a graph module, a module tree or an exported program."""
