"""Programs: search, train, evaluate, benchmark."""
