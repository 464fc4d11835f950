"""Proof that a rewritten model is the same model, and the search for the site that is to blame."""
