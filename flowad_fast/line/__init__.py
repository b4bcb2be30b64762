"""From camera to reject gate: parts in, exactly one outcome per part, in time or openly not.

`policy` decides and knows neither threads, clocks nor cameras; `runner` gives it threads; `sources` bring parts,
`sinks` take outcomes.
"""
