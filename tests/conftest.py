"""What all tests have in common."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadlines: how long an example takes says more of the machine than of the code. In CI the examples are the same
# every time, so that what fails there fails again.
settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("project")
