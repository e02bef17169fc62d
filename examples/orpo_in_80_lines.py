"""ORPO in about 80 lines of plain torch: packed collator, head on the scored rows, and loss, on a tiny model.

    python examples/orpo_in_80_lines.py

A pair is a prompt P with a chosen completion C and a rejected one R. The usual layout runs two padded sequences, [P C]
and [P R], and computes the prompt twice. Here all pairs lie in one row, [P C R][P C R]..., without padding. The same
steps in the package: packing/collate.py, model/head/, loss.py. Shapes: B pairs, T tokens, H width, V vocabulary, N
scored rows, L longest sequence. Paper: Hong, Lee, Thorne 2024, https://arxiv.org/abs/2403.07691
"""

import torch
import torch.nn.functional as F
from torch import nn

BETA, V, H, HEADS = 0.1, 20, 32, 4
PAIRS = [([5, 6, 7], [8, 9, 2], [10, 2]), ([5, 11], [12, 2], [13, 14, 15, 2]), ([16], [17, 18, 2], [19, 2])]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(H), nn.Linear(H, 3 * H), nn.Linear(H, H)
        self.mlp = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, 4 * H), nn.GELU(), nn.Linear(4 * H, H))

    def forward(self, x, mask):  # x (..., T, H), mask (T, T)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-2, -3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-2, -3).flatten(-2))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, H), nn.Embedding(16, H)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(H, V)

    def forward(self, ids, positions, mask):  # hidden states (..., T, H): the caller decides which rows the head sees
        x = self.tokens(ids) + self.places(positions)
        for block in self.blocks:
            x = block(x, mask)
        return x


def pack(pairs):
    """One row for all pairs. Positions of R continue from P, as if C were not there."""
    ids, positions, pair, branch, rows, targets, part = [], [], [], [], [], [], []
    for i, (p, c, r) in enumerate(pairs):
        start, last = len(ids), len(ids) + len(p) - 1  # the prompt's last token predicts the first of C and of R
        rows += [*range(start, last + len(c)), last, *range(last + 1 + len(c), last + len(c) + len(r))]
        targets += p[1:] + c + r
        part += [3 * i] * (len(p) - 1) + [3 * i + 1] * len(c) + [3 * i + 2] * len(r)
        ids += p + c + r
        positions += [*range(len(p) + len(c)), *range(len(p), len(p) + len(r))]
        pair += [i] * len(p + c + r)
        branch += [0] * len(p) + [1] * len(c) + [2] * len(r)
    pair, branch, place = torch.tensor(pair), torch.tensor(branch), torch.arange(len(ids))
    # A token sees earlier tokens of its own pair: the prompt's, and those of its own completion. R does not see C.
    sees = (pair[:, None] == pair) & (place[:, None] >= place) & ((branch == 0) | (branch[:, None] == branch))
    return [torch.tensor(x) for x in (ids, positions)] + [sees], [torch.tensor(x) for x in (rows, targets, part)]


def packed_logps(model, pairs):
    """(B, 3) sums of log-probabilities over the tokens of P (after its first), C and R, and (B, 3) their counts."""
    inputs, (rows, targets, part) = pack(pairs)
    logits = model.head(model(*inputs)[rows])  # (N, V): only rows that predict something go through the head
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    sums = torch.zeros(3 * len(pairs)).index_add(0, part, logps)
    return sums.view(-1, 3), part.bincount(minlength=3 * len(pairs)).view(-1, 3)


def padded_logps(model, pairs):
    """The same numbers from 2B padded sequences. Padding comes last, so a causal mask hides it."""
    sequences = [torch.tensor(p + completion) for p, c, r in pairs for completion in (c, r)]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # (2B, L)
    length = ids.shape[1]
    logits = model.head(model(ids, torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()))
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # column t predicts token t + 1
    ends = [(len(p) - 1, len(p) - 1 + len(c), len(p) - 1 + len(r)) for p, c, r in pairs]
    sums = [
        torch.stack([logps[2 * i, :p].sum(), logps[2 * i, p:c].sum(), logps[2 * i + 1, p:r].sum()])
        for i, (p, c, r) in enumerate(ends)
    ]
    return torch.stack(sums), torch.tensor([[p, c - p, r - p] for p, c, r in ends])


def log1mexp(x):
    """log(1 - exp(x)) for x < 0. Near 0 expm1 keeps the digits, far from it log1p does. loss.py: gradients at 0 too."""
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def orpo(sums, counts):
    """() loss = NLL of [P C] - beta * mean logsigmoid(log odds ratio), and () mean margin of the log-probabilities."""
    chosen, rejected = (sums / counts.clamp(min=1))[:, 1:].unbind(1)  # mean log-probability per token
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    nll = -sums[:, :2].sum() / counts[:, :2].sum()
    return nll - BETA * F.logsigmoid(log_odds).mean(), (chosen - rejected).mean()


def main():
    torch.manual_seed(0)
    model = Model()
    assert torch.allclose(packed_logps(model, PAIRS)[0], padded_logps(model, PAIRS)[0], atol=1e-5)
    longest = max(len(p) + max(len(c), len(r)) for p, c, r in PAIRS)
    print(f"packed = padded, with {len(pack(PAIRS)[0][0])} tokens instead of {2 * len(PAIRS) * longest}")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(31):
        loss, margin = orpo(*packed_logps(model, PAIRS))
        if step % 10 == 0:
            print(f"step {step:2}: loss {loss:.4f}, margin {margin:+.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
