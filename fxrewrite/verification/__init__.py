"""Whether two models give the same, and which site is to blame if they do not."""
