"""Whether NaN as the cosine makes a formula NaN."""

from __future__ import annotations

from .expression import Expression, build, topological

#: Known of a number: whether it is NaN. Of a mask: what it is. None: it depends.
_Known = bool | None


def keeping_nan(e: Expression, cosine: Expression) -> Expression:
    """``e``, as NaN where the cosine is, even if a comparison with it would choose a number."""
    return e if gives_nan(e) else build("where", build("eq", cosine, cosine), e, cosine)


def gives_nan(e: Expression) -> bool:
    """Whether ``e`` is NaN if the cosine is, whatever numbers and variables are."""
    known: dict[Expression, _Known] = {}
    for inner in topological(e):
        known[inner] = _of(inner, [known[arg] for arg in inner.args])
    return known[e] is True


def _of(e: Expression, args: list[_Known]) -> _Known:
    if e.op == "leaf":
        return True if e.kind == "cosine" else None if e.mask else False
    if e.op == "const":
        return bool(e.payload) if e.mask else e.payload != e.payload
    if e.op in ("lt", "le", "eq"):
        return False if True in args else None
    if e.op == "not":
        return None if args[0] is None else not args[0]
    if e.op in ("and", "or"):
        decides = e.op == "or"
        return decides if decides in args else None if None in args else not decides
    if e.op == "where":
        mask, yes, no = args
        if mask is None:
            return yes if yes is no else None
        return yes if mask else no
    if e.op in ("max", "min"):
        # The first, unless the second is beyond it, which NaN never is.
        first, second = args
        return first if first is not False or second is True else None if second is None else False
    return True if True in args else None if None in args else False
