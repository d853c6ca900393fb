"""The shapes world: drawn scenes, biased annotators and a tiny LLaVA that hallucinates because of them."""
