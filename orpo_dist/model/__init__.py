"""Loading models (quantisation, adapters), and the parts of a model's forward that this project replaces."""
