"""rows -> canonical pair -> audited pair -> token ids (P, C, R)"""
