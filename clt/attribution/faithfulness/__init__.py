"""How faithful attribution graphs are: known circuits found again, predicted effects held against real ones."""
