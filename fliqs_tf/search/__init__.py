"""The search: the model that trains while its formats are chosen, and what chooses them."""
