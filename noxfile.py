"""Checks that take too long for every change: `pip install nox`, then `nox -s mutation`."""

import nox

nox.options.sessions = []


@nox.session
def mutation(session: nox.Session) -> None:
    """Put faults into the code and count those that the tests catch: `-- --help` says how."""
    session.install("-e", ".[dev,mutation]")
    session.run("python", "tests/tools/mutation.py", *session.posargs)
