"""token ids (P, C, R) -> bins of pairs, one per (rank, micro-step) -> tensors and their layout"""
