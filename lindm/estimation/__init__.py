"""Models that are estimated from logged episodes."""
