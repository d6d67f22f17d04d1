"""Networks whose outputs have the same bits on every machine: made from a trained module, run, probed and watched."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from likely.exact.activations import Activation, Rectifier
from likely.exact.layers import Certified, Chain
from likely.exact.products import (
    ROUTES,
    BatchedProduct,
    Product,
    Route,
    full_precision_products,
    gradual_underflow,
)
from likely.exact.profiles import PROFILES, Uncovered
from likely.exact.rules import FORWARDS, FUNCTIONS, RULES, Setting, allowed, is_identity, plain_name


class Network:
    """A network in reproducible arithmetic; called as the module it was made from.

    Made by :func:`network`.  ``module`` is the tree of rules, whose other attributes are those of the original.
    """

    def __init__(self, module: nn.Module, setting: Setting, route: Route | None) -> None:
        self.module, self.setting, self._route = module, setting, route
        self.device = next((t.device for t in _tensors(module)), torch.device("cpu"))
        _at_hand(module)
        self._choose_routes()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.module, *args, **kwargs)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` in this network's arithmetic: a method of ``module``, or one that uses it."""
        with torch.no_grad(), full_precision_products(self.device), Watch(self.setting):
            return function(*args, **kwargs)

    @property
    def profile(self) -> str:
        """``exact32`` or ``exact64``."""
        return self.setting.profile.name

    @property
    def routes(self) -> dict[str, Route]:
        """The route of every product, by its name in the tree."""
        return {name: m.route for name, m in self.module.named_modules() if isinstance(m, Product | BatchedProduct)}

    def to(self, device: torch.device | str) -> Network:
        """The network on another device, its routes chosen anew."""
        return Network(
            copy.deepcopy(self.module).to(device), Setting(self.setting.profile, self.setting.causal), self._route
        )

    def reroute(self) -> None:
        """Compute every product by the next of its routes: another way to the same bits, to check results by.

        Raises:
            Irreproducible: a route gives other sums.
        """
        with torch.no_grad(), full_precision_products(self.device):
            for module in self.module.modules():
                if isinstance(module, Product | BatchedProduct):
                    module.choose(
                        self.device, module.routes[(module.routes.index(module.route) + 1) % len(module.routes)]
                    )

    def probe(self) -> bytes:
        """Eight bytes made of the outputs of all layers on fixed whole numbers: the same wherever the bits are."""
        digest = hashlib.blake2b(digest_size=8)
        with torch.no_grad(), full_precision_products(self.device), torch._C.DisableTorchFunction():
            for name, module in self.module.named_modules():
                for part in _probed(module, self.device):
                    digest.update(name.encode())
                    digest.update(_bytes(part))
        return digest.digest()

    def _choose_routes(self) -> None:
        with torch.no_grad(), full_precision_products(self.device):
            for module in self.module.modules():
                if isinstance(module, Product | BatchedProduct):
                    module.choose(self.device, self._route)


def _at_hand(tree: nn.Module) -> None:
    """Make parts and tensors of all modules plain attributes too; PyTorch would search for them in Python each time."""
    for module in tree.modules():
        vars(module).update({**module._parameters, **module._buffers, **module._modules})


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _probed(module: nn.Module, device: torch.device) -> Iterator[Tensor]:
    """What the probe sees of one module: sums, and values after scales, biases and activations."""
    if isinstance(module, Product):
        yield module(module.probe_input().to(device, module.profile.dtype))
    elif isinstance(module, BatchedProduct):
        yield module(*(x.to(device, module.profile.dtype) for x in module.probe_input()))
    elif isinstance(module, Chain | Activation):
        yield module(module.probe_input())


def _bytes(x: Tensor) -> bytes:
    """Little-endian bytes in the logical order of the axes; −0 and 0 are one."""
    whole = (x.detach().cpu() + 0.0).contiguous()
    return whole.numpy().astype(whole.numpy().dtype.newbyteorder("<"), copy=False).tobytes()


class Watch(TorchFunctionMode):
    """Lets through what the ``forward`` of a composite may do, puts rules in the place of functions, refuses the rest.

    Rules of leaves are not watched: they know what they do.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        rule = FUNCTIONS.get(function)
        if rule is not None:
            with torch._C.DisableTorchFunction():
                return rule(self.setting, *args, **named)
        reason = allowed(function, args, named)
        if reason is not None:
            raise Uncovered(f"{resolve_name(function) or plain_name(function)}: {reason}")
        return function(*args, **named)


def network(
    module: nn.Module, profile: str = "exact32", *, causal: bool = False, route: Route | None = None
) -> Network:
    """A network that computes what ``module`` does in evaluation, to within its rounding, and the same bits everywhere.

    The module is copied, never changed.  Each layer becomes its rule; a module made of others keeps its own ``forward``
    (or ``exact_forward``, if it has one), which may use only operations that are the same everywhere.

    Args:
        profile: ``exact32``, or ``exact64`` for sums below 2⁵³ in float64: no visible loss, but slow.
        causal: let no output depend on inputs that it does not see, not through a scale either (for masked and causal
            convolutions; linear layers and attention are so always).
        route: compute all products this way, and not the first way that passes the probe; the bits are the same.

    Raises:
        Uncovered: a layer has no rule.  (An operation without one is found when the network is called.)
        Irreproducible: this machine's arithmetic fails the probe.

    >>> layers = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))
    >>> exact = network(layers)
    >>> x = torch.randn(100, 3)
    >>> torch.equal(exact(x)[7:8], exact(x[7:8]))
    True
    """
    if profile not in PROFILES:
        raise ValueError(f"profile: expected {' or '.join(PROFILES)}, got {profile!r}")
    if route is not None and route not in ROUTES:
        raise ValueError(f"route: expected {', '.join(ROUTES)} or None, got {route!r}")
    setting = Setting(PROFILES[profile], causal)
    with torch.no_grad(), gradual_underflow():
        tree = _converted(copy.deepcopy(module).eval(), setting, type(module).__name__, {})
    tree.requires_grad_(False)
    return Network(tree, setting, route)


def _converted(module: nn.Module, setting: Setting, path: str, done: dict[int, nn.Module]) -> nn.Module:
    """The rule of a leaf, or the composite with its children converted in place."""
    if id(module) in done:
        return done[id(module)]
    if module._forward_hooks or module._forward_pre_hooks:
        raise Uncovered(f"{path}: {type(module).__name__} has forward hooks")
    maker = _maker(module, path)
    if maker is not None:
        try:
            converted = maker(module, setting)
        except Uncovered as error:
            raise Uncovered(f"{path}: {error}") from None
        converted = converted.to(next((t.device for t in _tensors(module)), "cpu"))
    else:
        converted = module
        done[id(module)] = module
        for name, child in list(module.named_children()):
            setattr(module, name, _converted(child, setting, f"{path}.{name}", done))
        if type(module).forward is nn.Sequential.forward:
            converted = Joined(module)
        forward = getattr(type(module), "exact_forward", None) or FORWARDS.get(type(module))
        if forward is not None:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    done[id(module)] = converted
    return converted


class Joined(nn.Module):
    """A sequence whose neighbouring layers and activations are computed as one :class:`~likely.exact.layers.Chain`.

    Everything else of the sequence is there as it was: its items, its attributes.
    """

    def __init__(self, sequence: nn.Module) -> None:
        super().__init__()
        self.sequence = sequence
        self.runs = nn.Sequential(*_runs([rule for rule in sequence.children() if not is_identity(rule)]))

    def forward(self, x: Any) -> Any:
        before: nn.Module | None = None
        for run in self.runs:
            if isinstance(run, Rectifier) and isinstance(before, Chain):
                x = run(x, in_place=True)
            elif isinstance(run, Chain) and isinstance(before, Rectifier):
                x = run(x, least=0.0)
            else:
                x = run(x)
            before = run
        return x

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("sequence"), name)

    def __getitem__(self, index: Any) -> Any:
        return self.sequence[index]  # type: ignore[index]

    def __len__(self) -> int:
        return len(self.sequence)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.sequence.children())


def _runs(rules: list[nn.Module]) -> Iterator[nn.Module]:
    """The rules, with chains for what can be computed together."""
    at = 0
    while at < len(rules):
        layers: list[Certified] = []
        activations: list[Activation | None] = [None]
        end = at
        if isinstance(rules[end], Activation):
            activations, end = [rules[end]], end + 1  # type: ignore[list-item]
        while end < len(rules) and isinstance(rules[end], Chain):
            layer: Any = rules[end].layers[0]  # type: ignore[index, union-attr]
            if layers and not layer.follows(layers[-1]):
                break
            layers.append(layer)
            end += 1
            activation = rules[end] if end < len(rules) and isinstance(rules[end], Activation) else None
            activations.append(activation)  # type: ignore[arg-type]
            end += activation is not None
        if layers:
            yield Chain(layers, activations)
        else:
            end = at + 1
            yield rules[at]
        at = end


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _maker(module: nn.Module, path: str) -> Callable[..., nn.Module] | None:
    """The maker of the module's rule; None for a composite, which keeps its own ``forward``."""
    kind = type(module)
    if hasattr(module, "exact_forward"):
        return None
    declared = getattr(module, "exact_as", None)
    for parent in (declared,) if declared is not None else kind.__mro__:
        if parent in RULES:
            if declared is None and kind.forward is not parent.forward:
                raise Uncovered(
                    f"{path}: {kind.__name__} has a forward of its own; if it computes what {parent.__name__} does, "
                    f"say so in the class (exact_as = nn.{parent.__name__}), else give it an exact_forward"
                )
            return RULES[parent]
    if kind.__module__.startswith("torch.nn.") and not isinstance(module, _CONTAINERS) and not any(module.children()):
        raise Uncovered(f"{path}: no rule for {kind.__name__}")
    return None
