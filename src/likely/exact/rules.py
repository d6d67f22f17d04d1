"""Which rule takes the place of which layer, and which operation a composite's own ``forward`` may use.

:data:`RULES` maps a type of ``torch.nn`` to the maker of its rule; a subclass is served by its parent's rule if it
inherits the parent's ``forward``, or says ``exact_as = nn.Linear`` (or whichever) because it computes the same in
another way.
:data:`FUNCTIONS` maps a function of PyTorch to its rule, and :data:`ALLOWED` names those that are right as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.exact import attention, functions
from likely.exact.activations import CURVES, Activation, Curve, Rectifier
from likely.exact.layers import (
    CausalConvolution,
    Chain,
    Convolution,
    FixedNormalisation,
    Normalisation,
    affine,
    standardised,
)
from likely.exact.profiles import Profile, Rule, Uncovered


@dataclass
class Setting:
    """What the rules of one network have in common.

    Args:
        profile: how integers are held.
        causal: whether no output may depend on an input that it does not see, through a scale either.
    """

    profile: Profile
    causal: bool = False
    kept: dict[Any, Any] = field(default_factory=dict)


class Softmax(Rule):
    """``nn.Softmax`` and ``nn.LogSoftmax``."""

    def __init__(self, function: Callable[..., Tensor], dim: int) -> None:
        super().__init__()
        self.function, self.dim = function, dim

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.dim)


class AsItIs(Rule):
    """A layer that is reproducible as it stands: it moves, compares or clamps numbers, or does one IEEE operation."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def _as_it_is(layer: nn.Module, setting: Setting) -> nn.Module:
    return AsItIs(layer)


def is_identity(rule: nn.Module) -> bool:
    """Whether the rule passes its input on as it is."""
    return isinstance(rule, AsItIs) and isinstance(rule.layer, nn.Identity)


def _identity(layer: nn.Module, setting: Setting) -> nn.Module:
    return AsItIs(nn.Identity())


def _embedding(layer: nn.Embedding, setting: Setting) -> nn.Module:
    if layer.max_norm is not None:
        raise Uncovered("an embedding with max_norm changes its weights as it is read")
    return AsItIs(layer)


def _upsample(layer: nn.Upsample, setting: Setting) -> nn.Module:
    if layer.mode != "nearest":
        raise Uncovered(f"up-sampling of mode {layer.mode!r}; 'nearest' is covered")
    return AsItIs(layer)


def _convolution(layer: Any, setting: Setting) -> nn.Module:
    if setting.causal:
        return CausalConvolution(layer, setting.profile)
    return Chain([Convolution(layer, setting.profile)], [None, None])


def _group_norm(layer: nn.GroupNorm, setting: Setting) -> nn.Module:
    if setting.causal:
        raise Uncovered("group normalisation looks at the whole example, which a causal network may not")
    return Normalisation(layer, setting.profile, layer.num_groups)


def _softmax(function: Callable[..., Tensor]) -> Callable[..., nn.Module]:
    def make(layer: Any, setting: Setting) -> nn.Module:
        if layer.dim is None:
            raise Uncovered("softmax without dim")
        return Softmax(function, layer.dim)

    return make


def _activation(make: Callable[..., Curve]) -> Callable[..., nn.Module]:
    return lambda layer, setting: Activation(make(layer), setting.profile)


def _weight(layer: nn.Linear) -> Tensor:
    """The weight that the layer multiplies by, which is not its parameter where it is masked."""
    masked = getattr(layer, "masked_weight", None)
    return layer.weight if masked is None else masked()


_AS_THEY_ARE: tuple[type[nn.Module], ...] = (
    *(nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.Threshold),
    *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.MaxPool1d, nn.MaxPool2d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
)

#: The maker of the rule of each type of layer: ``maker(layer, setting) -> module``.
RULES: dict[type[nn.Module], Callable[[Any, Setting], nn.Module]] = {
    nn.Linear: lambda layer, setting: affine(_weight(layer), layer.bias, setting.profile),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d), _convolution),
    nn.MultiheadAttention: lambda layer, setting: attention.MultiheadAttention(layer, setting.profile),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), lambda layer, setting: Normalisation(layer, setting.profile)),
    nn.GroupNorm: _group_norm,
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d), lambda layer, setting: FixedNormalisation(layer, setting.profile)
    ),
    nn.Softmax: _softmax(attention.softmax),
    nn.LogSoftmax: _softmax(attention.log_softmax),
    nn.Embedding: _embedding,
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    **{kind: _activation(make) for kind, make in CURVES.items()},
    nn.ReLU: lambda layer, setting: Rectifier(),
    **dict.fromkeys(_AS_THEY_ARE, _as_it_is),
    **dict.fromkeys(
        (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout), _identity
    ),
}


def _encoder_layer(
    self: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """What ``nn.TransformerEncoderLayer`` computes, without its fast path, which looks into its layers."""

    def attended(x: Tensor) -> Tensor:
        return self.self_attn(x, x, x, src_key_padding_mask, need_weights=False, attn_mask=src_mask)[0]

    def fed(x: Tensor) -> Tensor:
        return self.linear2(self.activation(self.linear1(x)))

    if self.norm_first:
        x = src + attended(self.norm1(src))
        return x + fed(self.norm2(x))
    x = self.norm1(src + attended(src))
    return self.norm2(x + fed(x))


def _encoder_layers(
    self: Any,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """What ``nn.TransformerEncoder`` computes, likewise."""
    for layer in self.layers:
        src = layer(src, mask, src_key_padding_mask)
    return src if self.norm is None else self.norm(src)


#: The ``forward`` of composites of PyTorch whose own does more than call their layers.
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder_layers,
}

# Functions ----------------------------------------------------------------------------------------------------------


def _curve(make: Callable[..., nn.Module]) -> Callable[..., Tensor]:
    """The rule of a functional activation; its options make the layer that has the curve."""

    def rule(setting: Setting, x: Tensor, *options: Any, **named: Any) -> Tensor:
        named.pop("inplace", None)
        key = (make, options, tuple(sorted(named.items())))
        if key not in setting.kept:
            layer = make(*options, **named)
            setting.kept[key] = RULES[type(layer)](layer, setting).to(x.device)
        return setting.kept[key](x)

    return rule


def _elementary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """In float64, then back to the type of x."""

    def rule(setting: Setting, x: Tensor) -> Tensor:
        x = x if x.is_floating_point() else x.to(setting.profile.dtype)
        return function(x.double()).to(x.dtype)

    return rule


def _softmax_rule(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(setting: Setting, x: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        x = x if x.is_floating_point() else x.to(setting.profile.dtype)
        return function(x if dtype is None else x.to(dtype), dim)

    return rule


def _attention(
    setting: Setting,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or enable_gqa:
        raise Uncovered("scaled_dot_product_attention with dropout_p or enable_gqa")
    if "attention" not in setting.kept:
        setting.kept["attention"] = attention.Attention(setting.profile)
        setting.kept["attention"].product.choose(query.device)
    return setting.kept["attention"](query, key, value, attn_mask, is_causal, scale)


def _layer_norm(
    setting: Setting,
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = standardised(x.to(setting.profile.dtype), tuple(range(x.dim() - len(shape), x.dim())), eps)
    y = y if weight is None else y * weight.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _power(setting: Setting, x: Tensor, exponent: float) -> Tensor:
    if exponent == 2:
        return x * x
    if exponent == 0.5:
        return _elementary(functions.sqrt)(setting, x)
    raise Uncovered(f"a power of {exponent}")


def _spellings(*names: str) -> list[Callable[..., Any]]:
    """Functions and methods of PyTorch of that name, wherever it has them."""
    homes = (torch, Tensor, F, torch.special)
    return list(dict.fromkeys(getattr(home, name) for name in names for home in homes if hasattr(home, name)))


def _table() -> dict[Callable[..., Any], Callable[..., Tensor]]:
    rules: list[tuple[tuple[str, ...], Callable[..., Tensor]]] = [
        (("silu",), _curve(nn.SiLU)),
        (("gelu",), _curve(nn.GELU)),
        (("tanh",), _curve(nn.Tanh)),
        (("sigmoid", "expit"), _curve(nn.Sigmoid)),
        (("softplus",), _curve(nn.Softplus)),
        (("elu",), _curve(nn.ELU)),
        (("celu",), _curve(nn.CELU)),
        (("selu",), _curve(nn.SELU)),
        (("mish",), _curve(nn.Mish)),
        (("logsigmoid",), _curve(nn.LogSigmoid)),
        (("exp",), _elementary(functions.exp)),
        (("expm1",), _elementary(functions.expm1)),
        (("log",), _elementary(functions.log)),
        (("log1p",), _elementary(functions.log1p)),
        (("asinh", "arcsinh"), _elementary(functions.asinh)),
        (("sqrt",), _elementary(functions.sqrt)),
        (("ndtr",), _elementary(functions.normal_cdf)),
        (("softmax",), _softmax_rule(attention.softmax)),
        (("log_softmax",), _softmax_rule(attention.log_softmax)),
        (("scaled_dot_product_attention",), _attention),
        (("layer_norm",), _layer_norm),
        (("pow", "__pow__"), _power),
    ]
    return {spelling: rule for names, rule in rules for spelling in _spellings(*names)}


#: The rule that takes the place of a function of PyTorch in a composite's ``forward``: ``rule(setting, *arguments)``.
FUNCTIONS = _table()

_NAMES = """
    abs absolute add clamp clamp_min clamp_max clip copysign hardtanh leaky_relu maximum minimum mul multiply neg
    negative positive relu relu6 round ceil floor trunc sign sub subtract square threshold rsub
    eq ge gt le lt ne equal isnan isinf isfinite isneginf isposinf logical_and logical_not logical_or logical_xor
    bitwise_and bitwise_not bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift and or xor invert lshift
    rshift
    all any amax amin argmax argmin argsort aminmax max min searchsorted sort topk unique one_hot max_pool1d max_pool2d
    adjoint as_strided as_tensor atleast_1d atleast_2d broadcast_tensors broadcast_to cat chunk clone column_stack
    concat concatenate contiguous copy cpu cuda detach diagonal dstack embedding expand expand_as fill fill_diagonal
    flatten flip fliplr flipud gather getitem hsplit hstack index_copy index_fill index_select masked_fill
    masked_scatter masked_select meshgrid moveaxis movedim nan_to_num narrow new_empty new_full new_ones new_tensor
    new_zeros nonzero numpy pad permute pixel_shuffle pixel_unshuffle put ravel repeat repeat_interleave reshape
    reshape_as resolve_conj resolve_neg roll rot90 scatter select setitem split split_with_sizes squeeze stack
    swapaxes swapdims t take take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold unsqueeze
    view view_as vsplit vstack where zero
    arange empty empty_like eye full full_like ones ones_like scalar_tensor tensor tril_indices triu_indices zeros
    zeros_like bool byte char double float int long short to type type_as item tolist len index contains iter hash
    format repr data_ptr dim element_size get_device has_names is_complex is_conj is_contiguous is_floating_point
    is_inference is_neg is_nonzero is_same_size is_signed is_tensor ndimension nelement numel nbytes result_type
    promote_types can_cast size storage_offset stride requires_grad get
"""
#: Names of functions and methods that IEEE 754 defines to the bit, that move numbers without computing, or that compare
#: them.  In-place forms and reflected operators go by the plain name; ``get`` is the look at an attribute.
ALLOWED = frozenset(_NAMES.split())

#: Sums of floats depend on their order; sums of these types do not.
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SUMS = frozenset({"sum", "cumsum", "count_nonzero", "prod", "cumprod", "bincount", "dot", "matmul", "mm"})
_DIVISIONS = frozenset({"truediv", "div", "divide", "true_divide"})
_ADDITIONS = frozenset({"add", "sub", "subtract", "rsub"})


def plain_name(function: Callable[..., Any]) -> str:
    """The name of a function of PyTorch without underscores and the letters of in-place and reflected forms.

    >>> [plain_name(f) for f in (torch.add, Tensor.add_, Tensor.__iadd__, Tensor.__rmul__, Tensor.shape.__get__)]
    ['add', 'add', 'add', 'mul', 'get']
    """
    name = getattr(function, "__name__", str(function))
    known = ALLOWED | _SUMS | _DIVISIONS
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        return inner[1:] if inner not in known and inner[:1] in "ir" and inner[1:] in known else inner
    return name.rstrip("_") if name.rstrip("_") in known else name


def allowed(function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> str | None:
    """None if the function gives the same bits everywhere for these arguments, else why not."""
    name = plain_name(function)
    if name in _DIVISIONS:
        reflected = getattr(function, "__name__", "").startswith("__r")
        divisor = args[1] if len(args) > 1 else named.get("other")
        if reflected or not isinstance(divisor, Tensor | int | float) or named.get("rounding_mode"):
            return "divides a number by a tensor: a reciprocal and a product; divide torch.full_like(x, number) by x"
        number = not isinstance(divisor, Tensor) or divisor.device != args[0].device  # a scalar of the processor is one
        if number and (divisor == 0 or math.frexp(abs(float(divisor)))[0] != 0.5):
            return "divides by a Python number, which some devices do by its reciprocal; divide by a tensor or multiply"
        return None
    if name in _SUMS:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if (
            tensors
            and all(a.dtype in _WHOLE for a in tensors)
            and not (named.get("dtype") or torch.int64).is_floating_point
        ):
            return None
        return "sums floats, whose order is not fixed"
    if name in _ADDITIONS and named.get("alpha", 1) != 1:
        return "multiplies and adds in one step"
    if name in ALLOWED:
        return None
    return "has no rule"
