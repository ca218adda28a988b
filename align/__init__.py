"""Stage one: teach a frozen vision encoder language with light heads on pre-encoded features."""
