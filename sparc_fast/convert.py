"""`sparc_fast.interop.research_files`, under the shorter name that the documentation gives it."""

from sparc_fast.interop.research_files import *  # noqa: F403
from sparc_fast.interop.research_files import __all__ as __all__
