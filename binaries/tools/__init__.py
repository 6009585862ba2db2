"""Programs that measure: speed, decisions, faults."""
