"""`sparc_fast.interop.research_files`, under the shorter name that the documentation gives it."""

from sparc_fast.interop.research_files import UpstreamConfig, from_upstream, read_config, to_upstream

__all__ = ["UpstreamConfig", "from_upstream", "read_config", "to_upstream"]
