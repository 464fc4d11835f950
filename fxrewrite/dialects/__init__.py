"""How calls are spelt, as modules, functions or ATen operators, and how one is read as another."""
