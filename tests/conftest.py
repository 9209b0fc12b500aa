"""Settings of all tests."""

import os

from hypothesis import settings

# Where a change is judged, the same examples run every time; at a desk, new ones look further.
settings.register_profile("judging", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("judging")
