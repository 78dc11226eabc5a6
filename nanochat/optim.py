"""One optimizer for 1..N ranks: Muon for the matrices of the blocks, AdamW for everything else.

Gradients are averaged over the ranks here, not in a wrapper around the model: small tensors by all-reduce; large AdamW
tensors by reduce-scatter over rows, each rank updating its rows; Muon stacks by reduce-scatter over matrices, each rank
updating those it owns. All-gathers bring the new values back. State is thus sharded over ranks (ZeRO-2 like); a world
of one rank is the same code with nothing to send.

Sources: Muon (Keller Jordan, 2024), Polar Express (arXiv 2505.16932), NorMuon (arXiv 2510.05491), cautious weight decay
(arXiv 2510.12402).
"""

import torch
import torch.distributed as dist

from nanochat.compilation import compile_function
from nanochat.runtime import multiplies_bfloat16

# Optimal quintic coefficients for five iterations, one triple each.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# torch 2.13 gave these two new names; both take (output, input, async_op=).
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
SMALL = 1024  # elements under which a tensor is reduced whole on every rank
ADAM_EPS = 1e-10


def param_groups(
    roles: dict,
    width: int,
    unembedding_lr: float = 0.008,
    embedding_lr: float = 0.3,
    matrix_lr: float = 0.02,
    scalar_lr: float = 0.5,
    weight_decay: float = 0.28,
    smear_lr: float = 0.2,
) -> list[dict]:
    """The optimizer groups of a model's `roles()`: one for each AdamW role, one for each shape of matrix.

    The first three learning rates were tuned at width 768 and go with width^-0.5.
    """
    scale = (width / 768) ** -0.5
    table = (  # role, learning rate, betas, weight decay
        ("lm_head", unembedding_lr * scale, (0.8, 0.96), 0.01),
        ("wte", embedding_lr * scale, (0.8, 0.995), 0.001),
        ("value_embeds", embedding_lr * scale * 0.5, (0.8, 0.995), 0.01),
        ("resid_lambdas", scalar_lr * 0.01, (0.8, 0.95), 0.05),
        ("x0_lambdas", scalar_lr, (0.96, 0.95), 0.0),
        ("smear_backout", smear_lr, (0.8, 0.95), 0.0),
    )
    groups = [
        dict(kind="adamw", role=role, named=list(roles[role]), lr=lr, betas=betas, weight_decay=decay)
        for role, lr, betas, decay in table
    ]
    by_shape: dict[tuple, list] = {}
    for name, parameter in roles["transformer_matrices"]:
        by_shape.setdefault(tuple(parameter.shape), []).append((name, parameter))
    for shape in sorted(by_shape):
        groups.append(
            dict(
                kind="muon",
                role="transformer_matrices",
                named=by_shape[shape],
                lr=matrix_lr,
                momentum=0.95,
                beta2=0.9,
                weight_decay=weight_decay,
            )
        )
    for group in groups:
        group["initial_lr"] = group["lr"]
        group["initial_weight_decay"] = group["weight_decay"]
    return [group for group in groups if group["named"]]


def orthogonalization_dtype(device: torch.device, compute_dtype: torch.dtype = torch.float32) -> torch.dtype:
    """bfloat16 on devices that multiply it fast, on a CPU only when the run computes in it too; float32 elsewhere: a
    CPU without bf16 units is 100 times slower with it. Never float16, whose range the iteration leaves."""
    wanted = device.type == "cuda" or compute_dtype == torch.bfloat16
    return torch.bfloat16 if wanted and multiplies_bfloat16(device) else torch.float32


class MuonAdamW:
    """step() reduces the gradients over ranks and updates the parameters. Change `lr`, `momentum` and `weight_decay`
    of `groups` between steps. dtype: that of the orthogonalization. compiles: the updates, one for each shape."""

    def __init__(
        self,
        groups: list[dict],
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype | None = None,
        compiles: bool = False,
    ):
        self.groups, self.rank, self.world_size, self.compiles = groups, rank, world_size, compiles
        device = groups[0]["named"][0][1].device
        self.dtype = dtype or orthogonalization_dtype(device)
        self.state: dict[str, dict[str, torch.Tensor]] = {}  # by parameter name, this rank's share
        self.steps = 0
        for group in groups:
            if group["kind"] == "adamw":
                for name, parameter in group["named"]:
                    share = self._rows(parameter.detach())
                    self.state[name] = {
                        "exp_avg": torch.zeros_like(share, dtype=_state_dtype(share)),
                        "exp_avg_sq": torch.zeros_like(share, dtype=_state_dtype(share)),
                    }
            elif owned := self._owned(group):  # the state of a stack lies as one; by name, a view of it
                parameter = owned[0][1]
                m, n = parameter.shape
                shapes = {"momentum_buffer": (m, n), "second_momentum_buffer": (m, 1) if m >= n else (1, n)}
                group["state"] = {key: parameter.new_zeros(len(owned), *shape) for key, shape in shapes.items()}
                for i, (name, _) in enumerate(owned):
                    self.state[name] = {key: stack[i] for key, stack in group["state"].items()}

    def set_rates(self, lr_multiplier: float, momentum: float, weight_decay_multiplier: float = 1.0) -> None:
        """Learning rates relative to those of the beginning; momentum and decay of the Muon groups."""
        for group in self.groups:
            group["lr"] = group["initial_lr"] * lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = group["initial_weight_decay"] * weight_decay_multiplier

    def muon_rates(self) -> dict[str, float]:
        """What is logged of the Muon groups: momentum and decay as they are set."""
        group = next(group for group in self.groups if group["kind"] == "muon")
        return {"train/momentum": group["momentum"], "train/weight_decay": group["weight_decay"]}

    def zero_grad(self) -> None:
        for group in self.groups:
            for _, parameter in group["named"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Three phases: start every reduction; as each finishes, update and start its gather; wait for the gathers."""
        self.steps += 1
        reductions = []
        for group in self.groups:
            if group["kind"] == "adamw":
                reductions += [(group, item, self._reduce_adamw(item[1])) for item in group["named"]]
            else:
                reductions.append((group, None, self._reduce_muon(group)))
        gathers = []
        for group, item, (grad, work) in reductions:
            if work is not None:
                work.wait()
            gathers.append(self._adamw(group, *item, grad) if group["kind"] == "adamw" else self._muon(group, grad))
        for work, finish in (gather for gather in gathers if gather is not None):
            work.wait()
            finish()

    def _function(self, update):
        return compile_function(update) if self.compiles else update

    def _numbers(self, *values):
        """What changes from step to step: a number would be built into the compiled code, and compiled anew."""
        return [torch.tensor(value, dtype=torch.float64) for value in values] if self.compiles else values

    def _per_rank(self, count: int) -> int:
        """Of so many rows or matrices; the last ranks may have fewer."""
        return -(-count // self.world_size)

    # -- AdamW: arithmetic in float32, also for bfloat16 tables

    def _is_whole(self, parameter) -> bool:
        return self.world_size == 1 or parameter.numel() < SMALL

    def _rows(self, tensor):
        """This rank's rows of an AdamW tensor: the same number on every rank, but fewer or none on the last ones where
        they do not divide."""
        if self._is_whole(tensor):
            return tensor
        count = self._per_rank(tensor.size(0))
        return tensor[self.rank * count : (self.rank + 1) * count]

    def _padded(self, tensor, num_rows):
        """The tensor with rows of zeros added: collectives want equal shares."""
        missing = num_rows - tensor.size(0)
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor.contiguous()

    def _reduce_adamw(self, parameter):
        grad = parameter.grad
        if self.world_size == 1:
            return grad, None
        if self._is_whole(parameter):
            return grad, _Average(dist.all_reduce(grad, async_op=True), grad, self.world_size)
        count = self._per_rank(grad.size(0))
        share = grad.new_empty(count, *grad.shape[1:])
        work = reduce_scatter(share, self._padded(grad, count * self.world_size), async_op=True)
        return share, _Average(work, share, self.world_size)

    def _adamw(self, group, name, parameter, grad):
        weight = self._rows(parameter.detach())
        state = self.state[name]
        tensors = (weight, grad[: weight.size(0)], state["exp_avg"], state["exp_avg_sq"])
        numbers = adamw_numbers(self.steps, group["lr"], group["betas"], group["weight_decay"])
        self._function(adamw_update)(*tensors, *self._numbers(*numbers), group["betas"])
        if self._is_whole(parameter):
            return None
        if parameter.size(0) == grad.size(0) * self.world_size:
            return all_gather(parameter.detach(), weight.clone(), async_op=True), lambda: None
        share = self._padded(weight, grad.size(0))
        whole = parameter.new_empty(grad.size(0) * self.world_size, *parameter.shape[1:])
        work = all_gather(whole, share, async_op=True)
        return work, lambda: parameter.detach().copy_(whole[: parameter.size(0)])

    # -- Muon: the matrices of one shape as a stack

    def _owned(self, group):
        """The matrices of a stack that this rank updates."""
        count = self._per_rank(len(group["named"]))
        return group["named"][self.rank * count : (self.rank + 1) * count]

    def _reduce_muon(self, group):
        grads = [parameter.grad for _, parameter in group["named"]]
        if self.world_size == 1:
            return torch.stack(grads), None
        count = self._per_rank(len(group["named"]))
        padding = count * self.world_size - len(grads)
        stack = torch.stack(grads + [torch.zeros_like(grads[0])] * padding)
        share = torch.empty_like(stack[:count])
        work = reduce_scatter(share, stack, async_op=True)
        return share, _Average(work, share, self.world_size)

    def _muon(self, group, grad):
        owned = self._owned(group)
        if owned:
            parameters = [parameter.detach() for _, parameter in owned]
            weights = torch.stack(parameters)
            tensors = (weights, grad[: len(owned)], *group["state"].values())
            numbers = self._numbers(group["lr"], group["momentum"], group["weight_decay"])
            self._function(muon_update)(*tensors, *numbers, group["beta2"], self.dtype)
            torch._foreach_copy_(parameters, list(weights.unbind()))
        if self.world_size == 1:
            return None
        share = torch.zeros_like(grad)
        if owned:
            share[: len(owned)] = weights
        whole = grad.new_empty((share.size(0) * self.world_size, *share.shape[1:]))

        def finish():
            for (_, parameter), weight in zip(group["named"], whole, strict=False):
                parameter.detach().copy_(weight)

        return all_gather(whole, share, async_op=True), finish

    # -- saving: state by parameter name, whole tensors once gathered by the caller

    def state_shares(self) -> dict[str, dict[str, tuple[torch.Tensor, int, int]]]:
        """This rank's state: name -> key -> (tensor, first row, rows of the whole). A Muon state is whole or absent."""
        shares = {}
        for group in self.groups:
            for name, parameter in group["named"]:
                if name not in self.state:
                    continue
                sharded = group["kind"] == "adamw" and not self._is_whole(parameter)
                rows = parameter.size(0)
                first = min(rows, self.rank * self._per_rank(rows)) if sharded else 0
                whole = {key: rows if sharded else value.size(0) for key, value in self.state[name].items()}
                shares[name] = {key: (value, first, whole[key]) for key, value in self.state[name].items()}
        return shares


class _Average:
    """A reduction under way whose result is divided by the number of ranks when it is there (gloo has no mean)."""

    def __init__(self, work, tensor, world_size):
        self.work, self.tensor, self.world_size = work, tensor, world_size

    def wait(self):
        if self.work is not None:
            self.work.wait()
        self.tensor.div_(self.world_size)


def _state_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def adamw_numbers(step: int, lr: float, betas: tuple, weight_decay: float) -> tuple[float, float, float]:
    """What changes with the step: decay of the weights, size of the step, correction of the second moment."""
    beta1, beta2 = betas
    return 1 - lr * weight_decay, lr / (1 - beta1**step), 1 - beta2**step


def adamw_update(weight, grad, exp_avg, exp_avg_sq, decay, step_size, correction, betas: tuple) -> None:
    """One AdamW step in place: decay first, moments bias-corrected, epsilon outside the root."""
    beta1, beta2 = betas
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    update = exp_avg / (exp_avg_sq / correction).sqrt_().add_(ADAM_EPS)
    weight.copy_(weight.to(exp_avg.dtype) * decay - update * step_size)


def polar_express(x: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices of a stack (S, m, n), approximately, in the dtype of x."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


def muon_update(
    weights, grad, momentum_buffer, variance, lr: float, momentum: float, weight_decay: float, beta2: float, dtype
) -> None:
    """One Muon step in place for a stack of matrices (S, m, n); variance: (S, m, 1) if m >= n else (S, 1, n)."""
    m, n = weights.shape[-2:]
    # Nesterov momentum
    momentum_buffer.add_((grad - momentum_buffer) * (1 - momentum))
    update = grad + (momentum_buffer - grad) * momentum
    # orthogonalize
    precise = update.dtype == torch.float64
    update = polar_express(update if precise else update.to(dtype)).to(weights.dtype)
    # NorMuon: equal step sizes along the longer side, the Frobenius norm as it was
    mean_square = update.square().mean(dim=-1 if m >= n else -2, keepdim=True)
    variance.lerp_(mean_square, 1 - beta2)
    scale = variance.clamp(min=1e-10).rsqrt()
    before = update.norm(dim=(-2, -1), keepdim=True)
    update = update * scale
    update = update * (before / update.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
    # decay only what the step also wants smaller
    lr = lr * max(1.0, m / n) ** 0.5
    agrees = update * weights >= 0
    weights.sub_(lr * update + (lr * weight_decay) * (weights * agrees))
