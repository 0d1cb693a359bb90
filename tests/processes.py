"""The place where some tests still look for `start`."""

from helpers.processes import start  # noqa: F401
