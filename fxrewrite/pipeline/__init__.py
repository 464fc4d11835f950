"""One rewrite from end to end: trace, lift, drive, lower, write out, report."""
