"""`sparc_fast.interop.research_code`, under the shorter name that the documentation gives it."""

from sparc_fast.interop.research_code import *  # noqa: F403
from sparc_fast.interop.research_code import __all__ as __all__
