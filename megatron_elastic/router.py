"""The router: budget -> a soft selection while it learns, a hard one when it is decided.

One small net per axis sees only the budget, never a token, so after training it is a table (Nemotron Elastic, eqs
6-11). It is replicated on every rank, in fp32, outside Megatron's gradient buckets: what crosses ranks is the gradient
of its *probabilities*, so every rank takes the same step and the nets stay bitwise equal without being reduced.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_elastic.axes import AXES
from megatron_elastic.budget import Budget, Selection
from megatron_elastic.cost_model import parameters, selections
from megatron_elastic.errors import ElasticError
from megatron_elastic.layout import ModelShape


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Hyperparameters of the router (Nemotron Elastic, section 'Experimental Setup').

    Attributes:
        iterations: optimizer steps until the choices are decided and the router is frozen.
        width: hidden width of each net.
        std: standard deviation of its initial weights.
        temperature: Gumbel-softmax temperature, first and last, annealed exponentially.
        scale: factor on the logits, first and last, linear.
        learning_rate: AdamW's, after the warm-up.
        warmup: iterations of linear warm-up.
        clip: gradient norm above which the router's gradient is scaled down.
        penalty: weight of the budget penalty (lambda).
        dead_zone: relative deviation from the target that costs nothing.
        tolerance: relative deviation from the target that a decided selection may have.
        seed: of the initial weights and of the noise.
        check_interval: optimizer steps between two comparisons of the router over all ranks; 0 never compares.
    """

    iterations: int
    width: int = 256
    std: float = 0.1
    temperature: tuple[float, float] = (1.0, 0.05)
    scale: tuple[float, float] = (1.0, 10.0)
    learning_rate: float = 1e-2
    warmup: int = 60
    clip: float = 1.0
    penalty: float = 1.0
    dead_zone: float = 0.0
    tolerance: float = 0.02
    seed: int = 1234
    check_interval: int = 100

    def progress(self, step: int) -> float:
        """Share of the router's schedule that has passed before `step`, in [0, 1]."""
        return min(1.0, step / max(1, self.iterations - 1))

    def temperature_at(self, step: int) -> float:
        """Temperature of the Gumbel-softmax at an optimizer step."""
        first, last = self.temperature
        return float(first * (last / first) ** self.progress(step))

    def scale_at(self, step: int) -> float:
        """Factor on the logits at an optimizer step."""
        first, last = self.scale
        return first + (last - first) * self.progress(step)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate at an optimizer step."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))


def gumbel_noise(size: int, *, seed: int, step: int, budget: int, axis: str, draw: int = 0, layer: int = 0) -> Tensor:
    """Gumbel(0, 1) noise as a pure function of its coordinates: the same on every rank, independent between axes.

    Args:
        size: number of choices.
        seed: of the run.
        step: optimizer step.
        budget: index of the budget.
        axis: name of the axis.
        draw: 0, or the global base-sample index where every sample draws its own.
        layer: layer number where the axis is heterogeneous.

    Returns:
        `[size]` fp32 on the CPU.
    """
    coordinates = struct.pack("<6q", seed, step, draw, budget, AXES.index(axis), layer)
    digest = hashlib.blake2b(coordinates, digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
    return -torch.log(-torch.log(uniform)).float()


class Router(torch.nn.Module):
    """Budget -> probabilities of the choices of every axis."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        shape: ModelShape,
        choices: Mapping[str, Sequence[int]],
        budgets: Sequence[Budget],
    ) -> None:
        super().__init__()
        self.config, self.shape, self.budgets = config, shape, tuple(budgets)
        self.choices = {axis: tuple(choices[axis]) for axis in AXES}
        self.nets = torch.nn.ModuleDict()
        generator = torch.Generator().manual_seed(config.seed)
        for axis in AXES:
            net = torch.nn.Sequential(
                torch.nn.Linear(len(self.budgets), config.width, device="meta", dtype=torch.float32),
                torch.nn.LeakyReLU(0.1),
                torch.nn.Linear(config.width, len(self.choices[axis]), device="meta", dtype=torch.float32),
            )
            # Made without storage first: the layers' own initial weights would come from the global generator.
            net.to_empty(device="cpu")
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.zero_()
                    if parameter.dim() == 2:
                        parameter.normal_(0.0, config.std, generator=generator)
            self.nets[axis] = net

    def pinned(self, budget: int) -> bool:
        """Whether a budget is the full one, which always selects everything."""
        return self.budgets[budget].fraction >= 1.0

    def logits(self, budget: int, axis: str, step: int) -> Tensor:
        """Scaled logits of the choices, `[choices]`."""
        net = self.nets[axis]
        weight = next(net.parameters())
        one_hot = torch.zeros(len(self.budgets), dtype=weight.dtype, device=weight.device)
        one_hot[budget] = 1.0
        logits: Tensor = net(one_hot) * self.config.scale_at(step)
        return logits

    def probabilities(self, budget: int, axis: str, step: int, *, noise: bool = True) -> Tensor:
        """Gumbel-softmax probabilities of the choices, `[choices]` (eq 11); certain of the full size where pinned."""
        if self.pinned(budget):
            full = torch.zeros(len(self.choices[axis]), device=next(self.parameters()).device)
            full[0] = 1.0
            return full
        logits = self.logits(budget, axis, step)
        if noise:
            gumbel = gumbel_noise(len(logits), seed=self.config.seed, step=step, budget=budget, axis=axis)
            logits = logits + gumbel.to(logits.device)
        return torch.softmax(logits / self.config.temperature_at(step), dim=-1)

    def expected_cost(self, budget: int, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Parameters at the expected size of every axis, as a share of the budget's target (0-dim)."""
        sizes = {
            axis: probabilities[axis].double() @ torch.tensor(self.choices[axis], dtype=torch.float64).to(
                probabilities[axis].device
            )
            for axis in AXES
        }
        target = self.budgets[budget].fraction * parameters(self.shape, self.shape.full)
        return parameters(self.shape, sizes) / target

    def penalty(self, budget: int, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Deviation from the target outside the dead zone, `|cost / target - 1|` (0-dim)."""
        deviation = (self.expected_cost(budget, probabilities) - 1.0).abs()
        return (deviation - self.config.dead_zone).clamp(min=0.0)

    @torch.no_grad()
    def decide(self, step: int) -> tuple[Selection, ...]:
        """The selection of every budget: the most probable one, without noise, that meets the target.

        Among the selections within `tolerance` of the target the most probable is taken, nested ones (no axis larger
        than in the next larger budget) before others. Deterministic, the same on every rank.
        """
        decided: list[Selection] = []
        parent = parameters(self.shape, self.shape.full)
        every = [(s, parameters(self.shape, s.as_dict())) for s in selections(self.choices)]
        for index, budget in enumerate(self.budgets):
            target = budget.fraction * parent
            scores = {
                axis: dict(
                    zip(
                        self.choices[axis],
                        self.probabilities(index, axis, step, noise=False).log().clamp(min=-1e4).tolist(),
                        strict=True,
                    )
                )
                for axis in AXES
            }
            within = [s for s, cost in every if abs(cost / target - 1.0) <= self.config.tolerance]
            if self.pinned(index) or not within:
                within = [min(every, key=lambda pair: abs(pair[1] / target - 1.0))[0]]

            def rank(selection: Selection, scores: dict[str, dict[int, float]] = scores) -> tuple[bool, float]:
                nested = not decided or selection.within(decided[-1])
                return nested, sum(scores[axis][size] for axis, size in selection.as_dict().items())

            decided.append(max(within, key=rank))
        return tuple(decided)


class RouterTrainer:
    """The router's own optimizer: leaves for the model, one reduction a step, one step per committed iteration."""

    def __init__(self, router: Router, weights: Sequence[float]) -> None:
        """Args:
        router: replicated, identical on every rank.
        weights: weight of each budget in the loss; they sum to 1.
        """
        self.router = router
        self.weights = tuple(weights)
        self.optimizer = torch.optim.AdamW(router.parameters(), lr=router.config.learning_rate, weight_decay=0.0)
        for parameter in router.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._leaves: dict[int, dict[str, Tensor]] = {}
        self._step = -1
        self._pending: Tensor | None = None

    def leaves(self, step: int, budget: int) -> dict[str, Tensor]:
        """Leaf copies of the probabilities, one set a step: every microbatch's backward ends at them.

        Args:
            step: optimizer step (the iteration about to be made).
            budget: index of the budget.

        Returns:
            axis -> `[choices]` fp32; gradients accumulate on them until `reduce`.
        """
        if step != self._step:
            self._leaves, self._step, self._pending = {}, step, None
        if budget not in self._leaves:
            with torch.no_grad():
                made = {axis: self.router.probabilities(budget, axis, step) for axis in AXES}
            self._leaves[budget] = {axis: p.detach().requires_grad_() for axis, p in made.items()}
        return self._leaves[budget]

    def reduce(self, tokens: Tensor, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sums the leaves' gradients over the world and keeps them for `commit`, overwriting on a rerun.

        Args:
            tokens: the global number of loss tokens, all budgets, as core's finalize leaves it.
            group: the world, or None for a single process.
        """
        width = max(len(c) for c in self.router.choices.values())
        rows = []
        for budget in range(len(self.router.budgets)):
            for axis in AXES:
                leaf = self._leaves.get(budget, {}).get(axis)
                row = next(self.router.parameters()).new_zeros(width)
                if leaf is not None and leaf.grad is not None:
                    row[: leaf.numel()] = leaf.grad
                    leaf.grad = None
                rows.append(row)
        stacked = torch.stack(rows)
        if group is not None and torch.distributed.get_world_size(group) > 1:
            torch.distributed.all_reduce(stacked, group=group)
        self._pending = stacked / tokens.to(stacked.device)

    def loss(self, step: int, gradients: Tensor) -> Tensor:
        """What the router minimises: the KD loss to first order plus the weighted budget penalty (0-dim).

        Args:
            step: optimizer step.
            gradients: of the KD loss in every probability, `[budgets * axes, choices]`.
        """
        total = torch.zeros((), dtype=torch.float64, device=gradients.device)
        for budget, weight in enumerate(self.weights):
            made = {axis: self.router.probabilities(budget, axis, step) for axis in AXES}
            for number, axis in enumerate(AXES):
                row = gradients[budget * len(AXES) + number, : len(made[axis])]
                total = total + (made[axis] * row).sum()
            total = total + weight * self.router.config.penalty * self.router.penalty(budget, made)
        return total

    def commit(self) -> bool:
        """Steps the router with the pending gradients, once; False where nothing is pending."""
        if self._pending is None:
            return False
        gradients, self._pending = self._pending, None
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():  # called from the backbone's optimizer step, which runs without
            self.loss(self._step, gradients).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.router.parameters(), self.router.config.clip)
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.router.config.learning_rate_at(self._step)
        self.optimizer.step()
        return True

    def fingerprint(self) -> int:
        """A number of 62 bits that tells one state of the router and its optimizer from another."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.tensors().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return int.from_bytes(digest.digest(), "little") >> 2

    def check_replicas(self, step: int, group: torch.distributed.ProcessGroup) -> None:
        """Compares the router over all ranks; a collective of the group.

        Args:
            step: optimizer step, for the message.
            group: the world.

        Raises:
            ElasticError: ranks disagree; raised on every rank.
        """
        ranks, mine = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        found = torch.zeros(ranks, dtype=torch.int64, device=next(self.router.parameters()).device)
        found[mine] = self.fingerprint()
        torch.distributed.all_reduce(found, group=group)
        kinds = Counter(found.tolist())
        if len(kinds) == 1:
            return
        usual = kinds.most_common(1)[0][0]
        others = [rank for rank, value in enumerate(found.tolist()) if value != usual]
        raise ElasticError(
            f"step {step}: the router differs between ranks: {others} of {ranks} ranks hold another one than the rest. "
            "It must be the same everywhere: look for a faulty device or a rank that runs other software, and start "
            "again from the last checkpoint"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save: weights and AdamW's state, by name, as live tensors."""
        found = {}
        for name, parameter in self.router.named_parameters():
            found[name] = parameter.data
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{name}.{key}"] = value
        return found
