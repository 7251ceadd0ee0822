"""For all tests: Hypothesis measures no time, for the machine may be busy with other things."""

from hypothesis import settings

settings.register_profile("headwater", deadline=None)
settings.load_profile("headwater")
