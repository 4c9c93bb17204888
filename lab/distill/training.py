"""Train a head on a target's answers.

At position p the head is given what the target's layers held at p - 1 and the token at p, and is
to foresee the target's distribution of the token at p + 1. When it drafts on from its own drafts it
has only its own state instead: so the same is asked again, with the states of the round before
moved on by one position, for as many rounds as a chain is to be long ("training-time test" of
EAGLE-3, Li et al. 2025; Zhang et al. 2024, "HASS"). In round r a position sees the keys of round 0
up to p - r, and of each later round j the one at p - r + j: what the cache holds when it drafts.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference.feature_head import FeatureHead, HeadConfig
from smartspec.lab.distill.answers import Answer

Loss: TypeAlias = Literal["kl", "reverse-kl", "tv"]
MAX_PROMPT_TOKENS = 256  #: the last of a prompt, that training shows the head
FIRST_ROUND_SHARE = 0.4  #: of the training, that is for the first draft alone
WARM_UP_SHARE = 0.05  #: of the training, in which the rate rises
PROMPT_LOSS = 0.5  #: weight of a token in a prompt over one in an answer
ROUND_WEIGHT = 0.9  #: of each round over the one before
POOL_ANSWERS = 512  #: of which those of like lengths are trained on together
CHUNK_TOKENS = 256  #: see `_chunk`
CHUNK_TOKENS_ACCELERATOR = 4096
FIRST_LOOK = 64  #: answers, of all, that tell how large the target's states are
PROMPT_WEIGHT = 0.3  #: of a token in a prompt over one in an answer, when the frequent are chosen


class Batch(NamedTuple):
    """Answers side by side; prompts end, and answers begin, at the same place P."""

    tokens: Tensor  #: [B, P + A], what is read at each position; 0 where there is nothing
    features: Tensor  #: [B, P + A, layers * hidden], the target's one position before
    num_prompt: int  #: P
    present: Tensor  #: [B, P + A] bool
    final: Tensor  #: [B, P + A, hidden], the target's own, from which its distribution follows
    log_mass: Tensor  #: [B, P + A], log of the sum of exp of all its logits; infinite: no token
    said: Tensor  #: [B, A], the token that the answer goes on with; -1: none


@torch.no_grad()
def batch_of(target: PreTrainedModel, answers: Sequence[Answer], layers: Sequence[int]) -> Batch:
    """Answers of three tokens at least, with what the target's layers hold while it reads them.

    The first token is the target's own, the last only foreseen.
    """
    device = target.device
    text = nn.utils.rnn.pad_sequence([a.tokens for a in answers], batch_first=True).to(device)
    num_prompt = torch.tensor([[a.num_prompt] for a in answers], device=device)
    length = torch.tensor([[len(a.tokens) - 1] for a in answers], device=device) - num_prompt
    P = min(int(num_prompt.max()), MAX_PROMPT_TOKENS)
    A = int(length.max())
    # What fills texts up comes after them, and so is seen by none of their tokens.
    held = target(
        input_ids=text[:, :-1], output_hidden_states=True, use_cache=False, logits_to_keep=1
    ).hidden_states
    places = torch.arange(P + A, device=device) - P + num_prompt  # of the columns, in the texts
    present = (places >= 0) & (places < num_prompt + length)
    here = places.clamp(0, text.shape[1] - 2)
    row = torch.arange(len(answers), device=device)[:, None]
    before = torch.cat([held[layer] for layer in layers], -1)[row, (here - 1).clamp(min=0)]
    final = held[-1][row, here]
    log_mass = torch.full(present.shape, torch.inf, device=device)
    log_mass[present] = _log_mass(target, final[present])
    after = text[row, (here + 1)[:, P:]]
    return Batch(
        text[row, here] * present,
        (before * (present & (places > 0))[..., None]).float(),
        P,
        present,
        final,
        log_mass,
        torch.where(present[:, P:], after, -1),
    )


def _log_mass(target: PreTrainedModel, final: Tensor) -> Tensor:
    """Of states [N, hidden], some at a time."""
    matrix: Any = target.get_output_embeddings()  # type: ignore[no-untyped-call]
    parts = torch.split(final, _chunk(final.device))
    return torch.cat([matrix(part).float().logsumexp(-1) for part in parts])


def _chunk(device: torch.device) -> int:
    """Tokens whose distributions are looked at together: few stay in a processor's cache."""
    return CHUNK_TOKENS if device.type == "cpu" else CHUNK_TOKENS_ACCELERATOR


def rounds(head: FeatureHead, batch: Batch, num_rounds: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each round: states after the tokens, and which of them count.

    [B, P + A, hidden] in the first round, [B, A, hidden] in those after, of answers alone.
    """
    P = batch.num_prompt
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
    causal = positions[0][:, None] >= positions[0]
    sees = (causal & batch.present[:, None]) | (positions[0][:, None] == positions[0])
    kept: list[tuple[Tensor, Tensor]] = []

    def attend_first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept.append((key, value))
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=sees[:, None], enable_gqa=True
        )

    states = head.advance(head.state(batch.features), batch.tokens, positions, attend_first)
    counts = batch.log_mass.isfinite()
    yield states, counts
    states, counts = states[:, P:], counts[:, P:]
    for number in range(1, num_rounds):

        def attend_later(query: Tensor, key: Tensor, value: Tensor, number: int = number) -> Tensor:
            kept.append((key, value))
            folded = query.shape[1] // key.shape[1]
            scale = query.shape[-1] ** -0.5
            first_key, first_value = (k.repeat_interleave(folded, 1) for k in kept[0])
            scores = (query @ first_key.transpose(2, 3)) * scale
            # Up to p - number, and so one position less in each round.
            late = torch.tril(sees[:, P:], P - number)[:, None]
            scores = scores.masked_fill(~late, -torch.inf)
            own, values = [], []
            for j, (later_key, later_value) in enumerate(kept[1:], 1):
                near_key = _moved(later_key.repeat_interleave(folded, 1), number - j)
                own.append((query * near_key).sum(-1, keepdim=True) * scale)
                values.append(_moved(later_value.repeat_interleave(folded, 1), number - j))
            chances = torch.cat((scores, *own), -1).softmax(-1)
            seen = chances[..., : scores.shape[-1]] @ first_value
            for j, near_value in enumerate(values):
                at = scores.shape[-1] + j
                seen = seen + chances[..., at : at + 1] * near_value
            return seen

        states = head.advance(
            functional.pad(states, (0, 0, 1, 0))[:, :-1],
            batch.tokens[:, P:],
            positions[:, P:],
            attend_later,
        )
        counts = functional.pad(counts[:, :-1], (1, 0)) & counts
        yield states, counts


def _moved(values: Tensor, by: int) -> Tensor:
    """[B, heads, A, d], position a taking what was at a - ``by``."""
    return functional.pad(values, (0, 0, by, 0))[:, :, : values.shape[2]] if by else values


class Divergence(torch.autograd.Function):
    """Sum over tokens of the divergence of a head's distribution from the target's.

    With p the target's distribution over the draft's tokens and q the draft's: kl is
    sum p log(p / q), reverse-kl sum q log(q / p), tv sum |p - q| / 2; times the probability that
    the target says one of these tokens at all, since nothing can be drafted where it does not.

    Gradients are made on the way, some tokens at a time: what is as large as tokens by vocabulary
    is never kept, and stays in a processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        read: Tensor,
        final: Tensor,
        log_mass: Tensor,
        weight: Tensor,
        matrix: Tensor,
        kind: Loss,
    ) -> Tensor:
        """The sum, of ``read``'s gradient too.

        Parameters
        ----------
        read, final : [N, hidden], what the output matrix reads of the head and of the target
        log_mass, weight : [N], of the target's tokens; of each token in the sum
        matrix : [num_draft_tokens, hidden]
        """
        total = torch.zeros((), device=read.device)
        gradient = torch.empty_like(read)
        size = _chunk(read.device)
        for begin in range(0, len(read), size):
            here = slice(begin, begin + size)
            aim = functional.linear(final[here], matrix).float() - log_mass[here, None]
            logits = functional.linear(read[here], matrix).float()
            loss, slope = divergence(kind, aim, logits)
            total += (loss * weight[here]).sum()
            gradient[here] = slope.mul_(weight[here, None]).to(matrix.dtype) @ matrix
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * above.to(gradient.dtype), None, None, None, None, None


def divergence(kind: Loss, aim: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of `Divergence`, [N], and its slopes by the logits, [N, num_draft_tokens].

    ``aim`` : the target's log-probabilities of the draft's tokens; overwritten, as the logits are
    """
    mass = aim.logsumexp(-1)
    log_p = aim.sub_(mass[:, None])
    log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
    if kind == "kl":
        p = log_p.exp()
        distance = torch.linalg.vecdot(p, log_p.sub_(log_q))
        slope = log_q.exp_().sub_(p)
    elif kind == "reverse-kl":
        ratio = log_q - log_p
        q = log_q.exp_()
        distance = torch.linalg.vecdot(q, ratio)
        slope = ratio.sub_(distance[:, None]).mul_(q)
    else:
        q = log_q.exp_()
        apart = q - log_p.exp_()
        distance = apart.abs().sum(-1) / 2
        sign = apart.sign_()
        slope = sign.sub_(torch.linalg.vecdot(q, sign)[:, None]).mul_(q).div_(2)
    told = mass.exp()
    return distance * told, slope.mul_(told[:, None])


class Score(NamedTuple):
    """How well a head foresees answers."""

    right: list[float]  #: by depth: share of drafts, all before them right, that are right too
    accepted: float  #: drafts accepted per step, with chains of as many as there are depths


def score(head: FeatureHead, batches: Sequence[Batch], depth: int) -> Score:
    """Of greedy answers: what decoding with chains of ``depth`` would have accepted, exactly."""
    tried, right = [0] * depth, [0] * depth
    accepted = steps = 0
    for batch in batches:
        lengths = (batch.said >= 0).sum(-1).tolist()
        for run, length in zip(runs(head, batch, depth).tolist(), lengths, strict=True):
            place = 0
            while place < length:
                accepted += run[place]
                steps += 1
                place += run[place] + 1
            for begin, size in enumerate(run[:length]):
                for at in range(min(size + 1, depth, length - begin)):
                    tried[at] += 1
                    right[at] += at < size
    shares = [a / max(b, 1) for a, b in zip(right, tried, strict=True)]
    return Score(shares, accepted / max(steps, 1))


@torch.inference_mode()
def runs(head: FeatureHead, batch: Batch, depth: int) -> Tensor:
    """How many drafts of a chain that begins at each place would be right, [B, A]."""
    found = torch.zeros_like(batch.said)
    alive = torch.ones_like(batch.said, dtype=torch.bool)
    A = batch.said.shape[1]
    for number, (states, counts) in enumerate(rounds(head, batch, depth)):
        states, counts = states[:, -A:], counts[:, -A:]
        drafts = head.token_ids[head.logits(states).argmax(-1)]
        agrees = (drafts == batch.said) & counts
        # Place a of this round is the draft of a chain that began ``number`` places before.
        ahead = torch.zeros_like(alive)
        ahead[:, : ahead.shape[1] - number] = agrees[:, number:]
        alive &= ahead
        found += alive
    return found


def mean_loss(head: FeatureHead, batch: Batch, num_rounds: int, loss: Loss) -> Tensor:
    """Mean loss per token of the rounds, those of prompts and of later rounds weighing less."""
    matrix = head.unembedding.to(torch.bfloat16)
    found: list[Tensor] = []
    weights: list[float] = []
    for number, (states, counts) in enumerate(rounds(head, batch, num_rounds)):
        width = counts.shape[1]
        weight = torch.ones_like(batch.log_mass[:, -width:])
        weight[:, : width - batch.said.shape[1]] = PROMPT_LOSS
        weight = weight[counts]
        if len(weight):
            told: Tensor = Divergence.apply(  # type: ignore[no-untyped-call]
                head.normed(states[counts]).to(matrix.dtype),
                batch.final[:, -width:][counts].to(matrix.dtype),
                batch.log_mass[:, -width:][counts],
                weight / weight.sum(),
                matrix,
                loss,
            )
            weights.append(ROUND_WEIGHT**number)
            found.append(weights[-1] * told)
    return torch.stack(found).sum() / sum(weights)


class Progress(NamedTuple):
    """After some steps of training."""

    step: int
    share: float  #: of the training that is done
    loss: float  #: mean of what was trained since the last, per round and token


def train(
    head: FeatureHead,
    target: PreTrainedModel,
    answers: Sequence[Answer],
    *,
    loss: Loss = "kl",
    num_rounds: int = 5,
    epochs: int = 3,
    minutes: float = math.inf,
    learning_rate: float = 1e-3,
    batch_tokens: int = 2048,
    seed: int = 0,
    every: int = 20,
) -> Iterator[Progress]:
    """Train in place; tells how it goes every so many steps, and at the end.

    AdamW, with a learning rate that rises over a twentieth of the training and falls to zero.

    Parameters
    ----------
    target : whose answers they are; what its layers hold is found again in each step
    num_rounds : as long a chain as is to be drafted well; trained for late, see `rounds_at`
    minutes : at most; the rate falls to zero then, whatever is left of the epochs
    batch_tokens : tokens of one step, about
    """
    rng = random.Random(seed)
    plan = [batch for _ in range(epochs) for batch in _batches(answers, batch_tokens, rng)]
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate, (0.9, 0.95), weight_decay=0.01)
    begin = time.monotonic()
    before: list[Tensor] = []
    since: list[Tensor] = []
    share, num_steps = 0.0, 0
    for chosen in plan:
        spent = (time.monotonic() - begin) / max(60 * minutes, 1e-9)
        if spent > 1 and num_steps:
            break
        # Never less than before: the clock may be ahead of the steps, and fall behind.
        share = min(1.0, max(share, (num_steps + 1) / len(plan), spent))
        rate = min(share / WARM_UP_SHARE, (1 - share) / (1 - WARM_UP_SHARE))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(rate, 1 / len(plan))
        batch = batch_of(target, [answers[i] for i in chosen], head.config.layers)
        with torch.autocast(head.device.type, torch.bfloat16):
            total = mean_loss(head, batch, rounds_at(share, num_rounds), loss)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_steps += 1
        since.append(total.detach())
        if num_steps % every == 0 and num_steps < len(plan):
            yield Progress(num_steps, share, float(torch.stack(since).mean()))
            before, since = since, []
    yield Progress(num_steps, 1.0, float(torch.stack(since or before).mean()))


def rounds_at(share: float, num_rounds: int) -> int:
    """Rounds of a step, when that ``share`` of all is done: few at first, which is cheap."""
    late = (share - FIRST_ROUND_SHARE) / (1 - FIRST_ROUND_SHARE)
    return 1 if late <= 0 else min(num_rounds, 2 + int(late * (num_rounds - 1)))


def _batches(answers: Sequence[Answer], batch_tokens: int, rng: random.Random) -> list[list[int]]:
    """All answers in random order, those of like lengths together, by their places."""

    def shape(i: int) -> tuple[int, int]:
        before = min(answers[i].num_prompt, MAX_PROMPT_TOKENS)
        return (before + len(answers[i].tokens) - answers[i].num_prompt) // 16, before

    order = list(range(len(answers)))
    rng.shuffle(order)
    found: list[list[int]] = []
    for begin in range(0, len(order), POOL_ANSWERS):
        pool = sorted(order[begin : begin + POOL_ANSWERS], key=shape)
        batch: list[int] = []
        tokens = 0
        for i in pool:
            batch.append(i)
            tokens += len(answers[i].tokens) - max(0, answers[i].num_prompt - MAX_PROMPT_TOKENS)
            if tokens >= batch_tokens:
                found.append(batch)
                batch, tokens = [], 0
        if batch:
            found.append(batch)
    rng.shuffle(found)
    return found


def frequent_tokens(answers: Sequence[Answer], count: int, vocabulary: int) -> Tensor:
    """The ``count`` tokens that are most frequent, in rising order of their ids.

    In answers and, at a third of the weight, in prompts: they know more of the rare ones.
    """
    said = torch.cat([answer.tokens[answer.num_prompt :] for answer in answers])
    asked = torch.cat([answer.tokens[: answer.num_prompt] for answer in answers])
    counts = said.bincount(minlength=vocabulary) + PROMPT_WEIGHT * asked.bincount(
        minlength=vocabulary
    )
    return counts.topk(min(count, vocabulary)).indices.sort().values


def new_head(
    target: PreTrainedModel,
    answers: Sequence[Answer],
    layers: tuple[int, ...],
    intermediate_size: int,
    token_ids: Tensor,
    seed: int = 0,
) -> FeatureHead:
    """An untrained head, which begins as the target's last layer where they are of one shape.

    What the layer adds to its input is scaled down as the input is: states are of unit size here.
    """
    config = target.config.get_text_config()
    heads = config.num_attention_heads
    shape = HeadConfig(
        target=feature_head.fingerprint(target),
        layers=layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_key_heads=getattr(config, "num_key_value_heads", None) or heads,
        intermediate_size=intermediate_size,
        rope_theta=(getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0),
    )
    torch.manual_seed(seed)
    head = FeatureHead(shape, token_ids, target)
    size = shape.hidden_size
    looked = batch_of(target, answers[:: -(-len(answers) // FIRST_LOOK)], layers)
    last = looked.final[looked.present].float()
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.02 if module.in_features == size else 0.01)
        head.fuse.weight[:, -size:] += torch.eye(size)
        head.join.weight[:, size:] += torch.eye(size)
        head.norm_output.copy_(last.pow(2).mean(0).sqrt())
        _begin_as(head, target, answers[0].tokens)
    return head.to(target.device)


def _begin_as(head: FeatureHead, target: Any, text: Tensor) -> None:
    """Take over the target's last layer, if it has Llama's parts and the head's shape.

    Of a layer that is narrower than the head's, the head's first units are the layer's.
    """
    try:
        layer = target.get_decoder().layers[-1]
        attention, mlp = layer.self_attn, layer.mlp
        pairs = [
            (head.query.weight, attention.q_proj.weight),
            (head.key.weight, attention.k_proj.weight),
            (head.value.weight, attention.v_proj.weight),
            (head.output.weight, attention.o_proj.weight),
            (head.norm_attention, layer.input_layernorm.weight),
            (head.norm_mlp, layer.post_attention_layernorm.weight),
        ]
        wide = [
            (head.gate.weight, mlp.gate_proj.weight),
            (head.up.weight, mlp.up_proj.weight),
            (head.down.weight.T, mlp.down_proj.weight.T),
        ]
    except AttributeError:
        return
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return
    if any(len(ours) < len(theirs) for ours, theirs in wide):
        return
    for ours, theirs in pairs + wide:
        ours[: len(theirs)].copy_(theirs)
    text = text[None].to(target.device)
    states = target(input_ids=text, output_hidden_states=True).hidden_states[-2][0]
    size = float(states.float().pow(2).mean(-1).sqrt().median())
    head.output.weight /= size
    head.down.weight /= size
