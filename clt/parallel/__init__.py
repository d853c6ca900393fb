"""Everything that knows ranks: who there is, what they tell each other, and which part of the work is whose."""
