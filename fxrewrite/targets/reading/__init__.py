"""Read a model's own code, every way that it may go: who calls which module on what."""
