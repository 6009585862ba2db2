"""What a search did: callbacks that log it, pictures, and the report."""
