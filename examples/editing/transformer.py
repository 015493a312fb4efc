"""A small transformer that learns a table of facts, and the keys and values of one of its layers.

A fact is a subject of two tokens, a relation, and an object. A prompt is a phrase, the subject and the relation; the
model answers with the object. Phrases are eight tokens that mean nothing, so that a fact can be asked for in words that
it was not edited with.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

PHRASES, NAMES, RELATIONS, OBJECTS = 8, 64, 4, 256
EDITED_WITH = 4  # phrases; the others ask for a fact in words that it was not edited with
WIDTH, HEADS, BLOCKS = 128, 4, 2


class Facts(NamedTuple):
    subjects: Tensor  # [N, 3], tokens of two names and a relation
    objects: Tensor  # [N]

    def prompts(self, phrase: int | Tensor) -> Tensor:
        """Tokens [N, 4] of the question for every fact."""
        return torch.cat([torch.as_tensor(phrase).expand(len(self.subjects)).unsqueeze(-1), self.subjects], -1)

    def __getitem__(self, which) -> "Facts":
        return Facts(self.subjects[which], self.objects[which])


def draw_facts(count: int, seed: int = 0) -> Facts:
    """Different questions with any objects."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randperm(NAMES * NAMES * RELATIONS, generator=generator)[:count]
    first, last, relation = which // (NAMES * RELATIONS), which // RELATIONS % NAMES, which % RELATIONS
    tokens = torch.stack([first, NAMES + last, 2 * NAMES + relation], -1) + PHRASES
    return Facts(tokens, torch.randint(OBJECTS, (count,), generator=generator))


class Block(nn.Module):
    """Attention and an MLP. Its second matrix, ``down [K, C]``, has the layout of a memory's mean (GPT-2's Conv1D)."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, K)
        self.down = nn.Parameter(torch.randn(K, WIDTH) / K**0.5)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))

    def keys(self, x: Tensor) -> Tensor:
        return gelu(self.up(self.mlp_norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return x + self.keys(x) @ self.down


class Transformer(nn.Module):
    def __init__(self, K: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(PHRASES + 2 * NAMES + RELATIONS, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(4, WIDTH))
        self.blocks = nn.ModuleList(Block(K if i == BLOCKS - 1 else 4 * WIDTH) for i in range(BLOCKS))
        self.head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, OBJECTS, bias=False))

    @property
    def edited(self) -> Block:
        return self.blocks[-1]

    def before(self, prompts: Tensor) -> Tensor:
        """What enters the edited MLP at the last token [N, C]."""
        x = self.tokens(prompts) + self.positions
        for block in self.blocks[:-1]:
            x = block(x)
        return self.edited.attend(x)[:, -1]

    def forward(self, prompts: Tensor) -> Tensor:
        """Logits of the object [N, OBJECTS]."""
        x = self.before(prompts)
        return self.head(x + self.edited.keys(x) @ self.edited.down)


def train(facts: Facts, K: int, steps: int, batch: int = 512) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(K)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        some = facts[torch.randint(len(facts.objects), (batch,))]
        loss = cross_entropy(model(some.prompts(torch.randint(PHRASES, (batch,)))), some.objects)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def share_right(model: Transformer, facts: Facts, phrases: range) -> float:
    """How often the model answers with the object of a fact."""
    answers = [model(facts.prompts(phrase)).argmax(-1) for phrase in phrases]
    return (torch.stack(answers) == facts.objects).float().mean().item()
