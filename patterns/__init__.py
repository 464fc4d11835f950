"""The rule sets that come with fxrewrite, one module each."""
