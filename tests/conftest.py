"""What all tests share: Hypothesis judges laws, not seconds, which a busy machine makes many of."""

from hypothesis import settings

settings.register_profile("laws", deadline=None)
settings.load_profile("laws")
