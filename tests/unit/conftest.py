"""hypothesis stops a test whose example takes 0.2 s; on a busy machine that says nothing of the code."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
