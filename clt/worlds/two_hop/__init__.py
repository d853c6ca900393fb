"""The two-hop world: cities in states, states with attributes, and a tiny Llama that must go through the middle."""
