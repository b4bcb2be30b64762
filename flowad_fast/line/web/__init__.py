"""The page, and the addresses for probes: `app` answers, `server` runs it, `client` is what commands ask with."""
