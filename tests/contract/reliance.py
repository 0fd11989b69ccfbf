"""How the contract is written down: one `On` per name of vLLM that a file of ours relies on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class On:
    """One name of vLLM, and what we rely on in it.

    Attributes:
        name: Where our code finds it, re-exports included: ``vllm.config.VllmConfig``.
        why: What breaks without it.
        value: A constant's value.
        bases: Class names that must be among its ancestors.
        members: Enum members, ``"NAME"`` or ``"NAME = value"``.
        attributes: What its instances have: fields, properties, class attributes, or set on ``self``. May
            name the type: ``"attention_config: AttentionConfig"``.
        fields: Fields of a dataclass or NamedTuple that we construct, replace or spread.
        called: Calls as we write them, with vLLM's parameter names for positional arguments and ``...`` for
            values: ``"get_path(include_classname=...)"``. Of a function or class itself, or of its methods.
            ``**vllm.some.Class`` stands for one keyword per field of that class.
        declared: Methods that we override, with exactly the signature that vLLM declares:
            ``"@classmethod customize_spec(cls, spec)"``.
        code: Expressions or statements that must occur in its body: how vLLM calls us, and what it does with
            what we return.
        since: First version that has it; older ones must not, because we probe for it.
    """

    name: str
    why: str = ""
    value: object = None
    bases: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    declared: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    since: str = ""


Contract = dict[str, tuple[On, ...]]  # by our file
