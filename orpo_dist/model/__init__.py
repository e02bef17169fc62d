"""Loading (quantisation, adapters), and what of a model's forward this project replaces."""
